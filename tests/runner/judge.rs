//! `oversold judge`.

use std::fs;

use serde_json::Value;
use tempfile::tempdir;

use crate::{err, out, oversold};

/// `judge` reads what `rush --history` writes and reaches the same verdict; a broken invariant is exit code 1.
#[test]
fn a_recorded_history_is_judged_again() {
    let folder = tempdir().unwrap();
    let histories = folder.path().join("histories");
    let recorded = oversold(&[
        "rush",
        "lv1/check-then-decrement",
        "--history",
        histories.to_str().unwrap(),
    ]);
    assert_eq!(recorded.status.code(), Some(0), "{}", err(&recorded));
    let file = histories.join("lv1-check-then-decrement.jsonl");

    let judged = oversold(&["judge", file.to_str().unwrap()]);
    assert_eq!(judged.status.code(), Some(1), "{}", err(&judged));
    assert!(out(&judged).contains("BROKEN I1"), "{}", out(&judged));

    let verdict: Value = serde_json::from_str(&out(&oversold(&["judge", "--json", file.to_str().unwrap()]))).unwrap();
    assert_eq!(verdict["coverage"]["requests"], 1000);
    assert!(!verdict["findings"].as_array().unwrap().is_empty());

    // A truncated file is rejected, with the number of the bad line.
    let text = fs::read_to_string(&file).unwrap();
    let cut = folder.path().join("cut.jsonl");
    fs::write(&cut, &text[..text.len() - 2]).unwrap();
    let refused = oversold(&["judge", cut.to_str().unwrap()]);
    assert_eq!(refused.status.code(), Some(2), "{}", err(&refused));
    assert!(err(&refused).contains("line "), "{}", err(&refused));
}
