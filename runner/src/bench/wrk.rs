//! The load: `wrk`, which takes so little of the processor that it leaves it to what is measured.

use std::{fs, net::SocketAddr, path::PathBuf, time::Duration};

use anyhow::Context;
use harness::{
    backends::{on_path, reaper},
    rush::SALE,
};
use serde::{Deserialize, Serialize};

use super::tool::{self, ToolMissing};

const SCRIPT: &str = include_str!("wrk.lua");
/// An answer that takes longer counts as none.
const TIMEOUT: &str = "20s";

/// The program, and the script that it runs.
pub(super) struct Wrk {
    program: PathBuf,
    script: PathBuf,
}

/// What came back, in the script's own last line.
#[derive(Clone, Copy, Debug, PartialEq, Deserialize, Serialize)]
pub(super) struct Load {
    /// Answers of every kind.
    pub(super) answers: u64,
    pub(super) took_us: u64,
    /// Answers other than 2xx and 3xx.
    pub(super) refused: u64,
    /// Requests that met a closed connection or got no answer in time.
    pub(super) cut_off: u64,
    pub(super) p50_us: u64,
    pub(super) p95_us: u64,
    pub(super) p99_us: u64,
    pub(super) max_us: u64,
}

impl Load {
    pub(super) fn confirmed(&self) -> u64 {
        self.answers.saturating_sub(self.refused)
    }

    pub(super) fn confirmed_a_second(&self) -> f64 {
        self.confirmed() as f64 / (self.took_us as f64 / 1e6)
    }
}

impl Wrk {
    pub(super) fn find() -> Result<PathBuf, ToolMissing> {
        let install = if cfg!(target_os = "macos") {
            "brew install wrk"
        } else {
            "sudo apt-get install --yes wrk"
        };
        tool::needed(on_path("wrk"), "wrk", install)
    }

    pub(super) fn new(program: PathBuf) -> anyhow::Result<Self> {
        let script = reaper::folder("wrk")?.join("reserve.lua");
        fs::write(&script, SCRIPT)?;
        Ok(Self { program, script })
    }

    /// Sends reservations over so many connections, each the next as soon as the last was answered, from buyers after `first_buyer`.
    pub(super) async fn run(
        &self,
        address: SocketAddr,
        clients: u32,
        time: Duration,
        first_buyer: u64,
    ) -> anyhow::Result<Load> {
        let mut command = tool::command(&self.program)?;
        command
            // One thread: its buyers need no offset, and it keeps up with any database.
            .args(["--threads", "1", "--timeout", TIMEOUT])
            .args(["--connections", &clients.to_string()])
            .args(["--duration", &format!("{}s", time.as_secs())])
            .arg("--script")
            .arg(&self.script)
            .arg(format!("http://{address}"))
            .arg("--")
            .arg(format!("/api/sales/{SALE}/reservations"))
            .arg(first_buyer.to_string());
        parse(&tool::output(&mut command, "wrk").await?)
    }
}

fn parse(output: &str) -> anyhow::Result<Load> {
    let last = output.lines().rfind(|line| line.starts_with('{'));
    let last = last.with_context(|| format!("wrk did not say what it counted:\n{output}"))?;
    serde_json::from_str(last).with_context(|| format!("reading what wrk counted: {last}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_wrk_counted_is_its_last_line() {
        let load = parse(include_str!("samples/wrk.txt")).expect("it is a real output");
        let counted = Load {
            answers: 6615,
            took_us: 1_004_418,
            refused: 0,
            cut_off: 0,
            p50_us: 6859,
            p95_us: 13_289,
            p99_us: 17_607,
            max_us: 26_923,
        };
        assert_eq!(load, counted);
        assert_eq!(load.confirmed_a_second().round(), 6586.0);
        assert_eq!(Load { refused: 15, ..load }.confirmed(), 6600);
    }

    #[test]
    fn an_output_without_counts_is_quoted() {
        let error = parse("unable to connect to 127.0.0.1:1 Connection refused\n").expect_err("nothing was counted");
        assert!(error.to_string().contains("Connection refused"), "{error}");
    }
}
