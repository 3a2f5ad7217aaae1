//! `oversold bench --waiters`.

use std::fs;

use rstest::rstest;
use serde_json::Value;
use tempfile::tempdir;

use crate::{command, err};

/// The tables of the book about the lock use these names.
#[rstest]
fn waiters_are_timed_and_their_commands_counted(
    #[values("lv3/spin", "lv3/rlock", "lv3/fenced")] strategy: &str,
    #[values(1, 3)] instances: u32,
) {
    let folder = tempdir().unwrap();
    let json = folder.path().join("waiters.json");
    let output = command(&["bench", strategy, "--waiters", "100", "--rounds", "1"])
        .args(["--instances", &instances.to_string(), "--json"])
        .arg(&json)
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(0), "{}", err(&output));
    let results: Value = serde_json::from_slice(&fs::read(&json).unwrap()).unwrap();
    assert_eq!(results["strategy"], strategy);
    assert_eq!(results["waiters"], 100);
    assert_eq!(results["instances"], instances);
    assert_eq!(results["void"], Value::Array(vec![]), "{results}");
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
    if strategy != "lv3/spin" && instances == 1 {
        // They queue in their process, where one at a time asks Redis, and none in vain: what is measured is that queue.
        assert_eq!(results["rounds"][0]["commands"]["evalsha"], 200, "{results}");
    }
    if strategy != "lv3/spin" {
        // A waiter that is woken by a message does not poll.
        assert!(
            results["commands_sent_each"]["median"].as_f64() <= Some(6.0),
            "{results}"
        );
    }
}
