//! The load generator `wrk`. It uses so little of the processor that nearly all of it is left to the server under test.

use std::{fs, net::SocketAddr, path::PathBuf, time::Duration};

use anyhow::Context;
use harness::{
    backends::{on_path, reaper},
    rush::SALE,
};

use crate::{
    commands::tool::{self, ToolMissing},
    results::bench::WrkReport,
};

const SCRIPT: &str = include_str!("wrk.lua");
/// A request without an answer by then counts as cut off.
const TIMEOUT: &str = "20s";

/// The program `wrk`, and the script that it runs.
pub(super) struct Wrk {
    program: PathBuf,
    script: PathBuf,
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

    /// Sends reservations in a closed loop with this many clients, from buyers numbered upwards of `first_buyer`.
    pub(super) async fn run(
        &self,
        address: SocketAddr,
        clients: u32,
        time: Duration,
        first_buyer: u64,
    ) -> anyhow::Result<WrkReport> {
        let mut command = tool::command(&self.program)?;
        command
            // With one thread buyers need no offset for each, and one keeps up with any database.
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

fn parse(output: &str) -> anyhow::Result<WrkReport> {
    let last = output.lines().rfind(|line| line.starts_with('{'));
    let last = last.with_context(|| format!("wrk did not report what it counted:\n{output}"))?;
    serde_json::from_str(last).with_context(|| format!("reading what wrk counted: {last}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_wrk_counted_is_its_last_line() {
        let load = parse(include_str!("samples/wrk.txt")).expect("it is a real output");
        let counted = WrkReport {
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
        assert_eq!(WrkReport { refused: 15, ..load }.confirmed(), 6600);
    }

    #[test]
    fn an_output_without_counts_is_quoted() {
        let error = parse("unable to connect to 127.0.0.1:1 Connection refused\n").expect_err("nothing was counted");
        assert!(error.to_string().contains("Connection refused"), "{error}");
    }
}
