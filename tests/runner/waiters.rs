//! `oversold bench --waiters`.

use std::fs;

use rstest::rstest;
use serde_json::Value;
use tempfile::tempdir;

use crate::{command, err};

/// The tables of the book about the lock use these names.
#[rstest]
#[case::spin("lv3/spin")]
#[case::rlock("lv3/rlock")]
#[case::fenced("lv3/fenced")]
fn waiters_are_timed_and_their_commands_counted(#[case] strategy: &str) {
    let folder = tempdir().unwrap();
    let json = folder.path().join("waiters.json");
    let arguments = ["bench", strategy, "--waiters", "100", "--rounds", "1", "--json"];
    let output = command(&arguments).arg(&json).output().unwrap();
    assert_eq!(output.status.code(), Some(0), "{}", err(&output));
    let results: Value = serde_json::from_slice(&fs::read(&json).unwrap()).unwrap();
    assert_eq!(results["strategy"], strategy);
    assert_eq!(results["waiters"], 100);
    assert!(results["took_ms"]["median"].as_f64() > Some(0.0), "{results}");
    // Each waiter acquires and releases the lock.
    assert!(
        results["commands_sent_each"]["median"].as_f64() >= Some(2.0),
        "{results}"
    );
    assert!(
        results["rounds"][0]["commands"]["evalsha"].as_u64() >= Some(100),
        "{results}"
    );
    if strategy != "lv3/spin" {
        // A waiter that is woken by a message does not poll.
        assert!(
            results["commands_sent_each"]["median"].as_f64() <= Some(6.0),
            "{results}"
        );
    }
}
