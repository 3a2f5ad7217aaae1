//! Traces: one exact interleaving of each strategy, as `oversold trace` prints it.

use std::{process::Command, sync::LazyLock};

use box_office::Service;
use regex::Regex;

use crate::strategies;

/// The traces of all main strategies whose requests decide; those decided by consumers have none.
pub(super) fn all() -> impl Iterator<Item = (String, String)> {
    let traced = strategies().filter(|(_, strategy)| !strategy.needs.contains(&Service::Kafka));
    traced.map(|(level, strategy)| {
        let file = format!("traces/{}-{}.md", level.name, strategy.name);
        (file, trace(&format!("{}/{}", level.name, strategy.name)))
    })
}

fn trace(name: &str) -> String {
    let mut command = Command::new(env!("CARGO_BIN_EXE_oversold"));
    let output = command.args(["trace", name, "--markdown"]).output().unwrap();
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "oversold trace {name}: {stderr}");
    with_tokens_numbered(&String::from_utf8(output.stdout).unwrap())
}

/// Replaces fencing tokens, which follow the clock, by their number in the trace, in the same width.
fn with_tokens_numbered(trace: &str) -> String {
    static TOKEN: LazyLock<Regex> = LazyLock::new(|| Regex::new(r"\b\d{16}\b").unwrap());
    let mut seen: Vec<&str> = vec![];
    for token in TOKEN.find_iter(trace).map(|found| found.as_str()) {
        if !seen.contains(&token) {
            seen.push(token);
        }
    }
    let mut text = trace.to_owned();
    for (index, token) in seen.into_iter().enumerate() {
        text = text.replace(token, &format!("{:<16}", format!("token {}", index + 1)));
    }
    text
}

#[test]
fn a_trace_shows_tokens_by_their_number() {
    let line = |token: &str| format!("| lock taken: {token} |\n");
    assert_eq!(
        with_tokens_numbered(&(line("1795470000000001") + &line("1795470000000009") + &line("1795470000000001"))),
        line("token 1         ") + &line("token 2         ") + &line("token 1         ")
    );
}
