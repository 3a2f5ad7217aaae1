//! The ceiling of a lock: the same commands, sent to Redis by `redis-benchmark`.

use std::path::PathBuf;

use anyhow::Context;
use harness::backends::on_path;

use crate::commands::tool::{self, ToolMissing};

/// The program `redis-benchmark`.
pub(super) struct RedisBenchmark(PathBuf);

impl RedisBenchmark {
    pub(super) fn find() -> Result<Self, ToolMissing> {
        let install = if cfg!(target_os = "macos") {
            "brew install redis"
        } else {
            "sudo apt-get install --yes redis-tools (elsewhere it comes with the server)"
        };
        tool::needed(on_path("redis-benchmark"), "redis-benchmark", install).map(Self)
    }

    /// Sends `requests` commands over this many connections, each with batches of `pipeline` commands in flight, and returns the answers per
    /// second. `__rand_int__` in a word stands for a random one of `keys` numbers.
    pub(super) async fn run(
        &self,
        url: &str,
        connections: u32,
        pipeline: u32,
        requests: u32,
        keys: u32,
        words: &[String],
    ) -> anyhow::Result<f64> {
        let mut command = tool::command(&self.0)?;
        // It takes an empty user name for a user.
        let url = url.replacen("redis://:", "redis://default:", 1);
        command
            .args(["-u", &url, "--csv"])
            .args(["-c", &connections.to_string()])
            .args(["-P", &pipeline.to_string()])
            .args(["-n", &requests.to_string()])
            .args(["-r", &keys.to_string()])
            .args(words);
        parse(&tool::output(&mut command, "redis-benchmark").await?)
    }
}

/// Reads CSV: a header, and a line with the command and its measurements, all quoted. redis-benchmark exits with 1 if Redis rejects a command.
fn parse(output: &str) -> anyhow::Result<f64> {
    // Six latencies follow the rate. The command before it may contain anything, so fields are counted from the end.
    const AFTER_THE_RATE: usize = 6;

    let rate = output
        .lines()
        .rev()
        .find_map(|line| line.rsplit("\",\"").nth(AFTER_THE_RATE)?.parse().ok());
    rate.with_context(|| format!("redis-benchmark does not report a rate:\n{output}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_rate_is_what_comes_after_the_command() {
        let rate = parse(include_str!("samples/redis-benchmark.txt")).expect("it is a real output");
        assert_eq!(rate, 18_365.47);
    }

    #[test]
    fn an_output_without_a_rate_is_quoted() {
        let error = parse("Could not connect to Redis at 127.0.0.1:1: Connection refused\n").expect_err("no rate");
        assert!(error.to_string().contains("Connection refused"), "{error}");
    }
}
