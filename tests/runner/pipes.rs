//! A reader that leaves before the end, as in `oversold list | head -1`: the command ends quietly, with its own exit code.

use std::{fs, io, process::Stdio};

use rstest::rstest;
use serde_json::Value;
use tempfile::tempdir;

use crate::command;

/// The write end of a pipe that nobody reads.
fn unread() -> io::PipeWriter {
    let (reader, writer) = io::pipe().unwrap();
    drop(reader);
    writer
}

#[rstest]
#[case::list(&["list"], 0)]
#[case::list_as_json(&["list", "--json"], 0)]
#[case::help(&["--help"], 0)]
#[case::help_of_a_command(&["help", "rush"], 0)]
#[case::version(&["--version"], 0)]
#[case::source(&["source", "lv1/read-then-write"], 0)]
#[case::source_of_a_mutant(&["source", "lv2/mutants/guard-before-commit"], 0)]
#[case::diff(&["source", "lv2/mutants/guard-before-commit", "--diff"], 0)]
#[case::exercises(&["exercise"], 0)]
#[case::solution(&["exercise", "lv2-read-again", "--solution"], 0)]
#[case::trace(&["trace", "lv1/read-then-write"], 0)]
#[case::doctor(&["doctor"], 0)]
#[case::rush_that_shows_nothing(&["rush", "lv1/read-then-write", "--buyers", "1"], 4)]
#[case::server_help(&["serve", "--help"], 0)]
fn a_command_whose_output_nobody_reads_ends_like_any_other(#[case] arguments: &[&str], #[case] code: i32) {
    let output = command(arguments).stdout(unread()).output().unwrap();
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(code), "{stderr}");
    assert!(!stderr.contains("panicked"), "{stderr}");
}

/// Without stderr as well, as in `oversold rush 2>&1 | head -1`; its results are written all the same.
#[test]
fn a_rush_that_nobody_watches_writes_its_results() {
    let folder = tempdir().unwrap();
    let json = folder.path().join("rush.json");
    let mut rush = command(&["rush", "lv2/pessimistic", "--buyers", "20", "--json"]);
    rush.arg(&json).stdout(unread()).stderr(unread());
    assert_eq!(rush.status().unwrap().code(), Some(0));
    let results: Value = serde_json::from_slice(&fs::read(&json).unwrap()).unwrap();
    assert_eq!(results["strategies"][0]["verdict"], "as promised");
}

#[rstest]
#[case::no_such_level(&["rush", "lv9"], 2)]
#[case::no_command(&[], 2)]
#[case::no_such_server(&["serve", "lv9"], 2)]
#[case::nobody_there(&["dead-letters", "--kafka-bootstrap-servers", "127.0.0.1:1"], 3)]
fn an_error_that_nobody_reads_has_its_exit_code(#[case] arguments: &[&str], #[case] code: i32) {
    let mut failing = command(arguments);
    failing.stdin(Stdio::null()).stdout(unread()).stderr(unread());
    assert_eq!(failing.status().unwrap().code(), Some(code));
}

#[tokio::test]
async fn dead_letters_that_nobody_reads_end_like_any_other() {
    let kafka = harness::backends::kafka().await.unwrap();
    let list = ["dead-letters", "--kafka-bootstrap-servers", kafka.bootstrap_servers()];
    let output = command(&list).stdout(unread()).output().unwrap();
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(0), "{stderr}");
}

/// A history is judged, and its verdict is the exit code.
#[rstest]
#[case::as_text(&[])]
#[case::as_json(&["--json"])]
fn a_verdict_that_nobody_reads_is_the_exit_code(#[case] arguments: &[&str]) {
    let folder = tempdir().unwrap();
    // Work between check and decrement: requests that happen to come one after another would oversell nothing.
    let rush = ["rush", "lv1/check-then-decrement", "--work-ms", "20", "--history"];
    let rushed = command(&rush).arg(folder.path()).output().unwrap();
    assert!(rushed.status.success(), "{}", String::from_utf8_lossy(&rushed.stdout));
    let file = folder.path().join("lv1-check-then-decrement.jsonl");
    let output = command(&[&["judge"], arguments].concat())
        .arg(file)
        .stdout(unread())
        .output()
        .unwrap();
    assert_eq!(
        output.status.code(),
        Some(1),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
}
