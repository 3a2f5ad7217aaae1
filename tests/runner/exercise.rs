//! `oversold exercise` and `oversold source`, in a clone of this checkout.

use std::{
    fs,
    path::Path,
    process::{Command, Output},
};

use crate::{command, err, out, oversold};

const NAME: &str = "lv2-read-again";
const SOURCE: &str = "levels/lv2-db-lock/src/optimistic.rs";

fn clone() -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
    let git = Command::new("git")
        .args(["clone", "--quiet", "--shared"])
        .arg(root)
        .arg(folder.path())
        .status();
    assert!(git.unwrap().success());
    folder
}

fn exercise(checkout: &Path, arguments: &[&str]) -> Output {
    command(&[&["exercise", NAME], arguments].concat())
        .current_dir(checkout)
        .output()
        .unwrap()
}

#[test]
fn an_exercise_puts_its_mistake_in_and_is_taken_back_with_a_copy_of_the_work() {
    let checkout = clone();
    let source = checkout.path().join(SOURCE);
    let right = fs::read_to_string(&source).unwrap();

    let begun = exercise(checkout.path(), &[]);
    assert_eq!(begun.status.code(), Some(0), "{}", err(&begun));
    assert!(
        out(&begun).contains(SOURCE) && out(&begun).contains("red about I1, I2"),
        "{}",
        out(&begun)
    );
    let mistaken = fs::read_to_string(&source).unwrap();
    assert_ne!(mistaken, right);

    let solution = exercise(checkout.path(), &["--solution"]);
    assert!(
        out(&solution).contains("-        let stock = *first"),
        "{}",
        out(&solution)
    );

    let edited = format!("{mistaken}// mine\n");
    fs::write(&source, &edited).unwrap();
    let again = exercise(checkout.path(), &[]);
    assert_eq!(again.status.code(), Some(2));
    assert!(
        err(&again).contains("has changes that are not committed"),
        "{}",
        err(&again)
    );
    assert_eq!(fs::read_to_string(&source).unwrap(), edited);

    let reset = exercise(checkout.path(), &["--reset"]);
    assert_eq!(reset.status.code(), Some(0), "{}", err(&reset));
    assert_eq!(fs::read_to_string(&source).unwrap(), right);
    let kept = checkout.path().join("target/exercises").join(NAME).join(SOURCE);
    assert_eq!(fs::read_to_string(kept).unwrap(), edited);
}

/// It changes nothing by itself; what its solution touches is taken back.
#[test]
fn an_exercise_that_redesigns_is_taken_back_too() {
    let checkout = clone();
    let source = checkout
        .path()
        .join("levels/lv1-race-condition/src/check_then_decrement.rs");
    let right = fs::read_to_string(&source).unwrap();
    fs::write(&source, format!("{right}// mine\n")).unwrap();
    let reset = command(&["exercise", "lv1-one-statement", "--reset"])
        .current_dir(checkout.path())
        .output()
        .unwrap();
    assert_eq!(reset.status.code(), Some(0), "{}", err(&reset));
    assert_eq!(fs::read_to_string(&source).unwrap(), right);
}

#[test]
fn a_mutant_is_shown_as_its_source_or_as_its_patch() {
    let source = oversold(&["source", "lv2/mutants/skip-locked"]);
    assert!(out(&source).contains("for update skip locked"), "{}", out(&source));
    assert!(
        out(&source).contains("impl Reserve for Pessimistic"),
        "{}",
        out(&source)
    );
    let diff = oversold(&["source", "lv2/mutants/skip-locked", "--diff"]);
    assert!(
        out(&diff).contains("+                for update skip locked"),
        "{}",
        out(&diff)
    );
    assert!(!out(&diff).contains("impl Reserve for Pessimistic"), "{}", out(&diff));
}
