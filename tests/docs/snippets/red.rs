//! Recorded failures: the contract test of each strategy that breaks it, as `make red` shows it.

use std::{
    collections::BTreeSet,
    path::{Path, PathBuf},
    process::Command,
};

use box_office::{Promise, Promises, Strategy};

use super::{BLESS, FOLDER, Snippets};
use crate::{Problem, none, only, root, strategies};

/// The main strategies that break something on a single instance: name, strategy, and file of the recorded failure.
fn failing() -> impl Iterator<Item = (String, &'static Strategy, PathBuf)> {
    let breaking =
        strategies().filter(|(_, strategy)| strategy.guarantee.single_instance.those(Promise::Breaks).count() > 0);
    breaking.map(|(level, strategy)| {
        let file = PathBuf::from(format!("red/{}-{}.md", level.name, strategy.name));
        (format!("{}/{}", level.name, strategy.name), strategy, file)
    })
}

/// Runs the failing tests, and records what they print.
pub(super) fn record_all() -> impl Iterator<Item = (PathBuf, String)> {
    failing().map(|(name, _, file)| (file, record(&name)))
}

/// Checks what the committed records report, and takes them out of the committed files.
pub(super) fn check_all(committed: &mut Snippets) -> Vec<Problem> {
    let mut problems = vec![];
    for (_, strategy, file) in failing() {
        let recorded = committed.remove(&file).unwrap_or_default();
        let file = Path::new(FOLDER).join(file);
        problems.extend(misnamed(&file, &recorded, &strategy.guarantee.single_instance));
    }
    problems
}

fn record(name: &str) -> String {
    let output = Command::new(env!("CARGO_BIN_EXE_oversold"))
        .args(["red", name])
        .current_dir(root())
        .env_remove(BLESS)
        .output()
        .unwrap();
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "oversold red {name}: {stderr}");
    format!(
        "```text\n{}\n```\n",
        String::from_utf8(output.stdout).unwrap().trim_end()
    )
}

/// Compares the invariants that a recorded failure reports with those that the strategy declares to break.
fn misnamed(file: &Path, text: &str, promises: &Promises) -> Vec<Problem> {
    let named: BTreeSet<&str> = text
        .lines()
        .filter_map(|line| line.trim_start().strip_prefix("BROKEN ")?.split(' ').next())
        .collect();
    let codes = |promise| promises.those(promise).map(|invariant| invariant.code());
    let missing: Vec<&str> = codes(Promise::Breaks).filter(|code| !named.contains(code)).collect();
    let too_many: Vec<&str> = codes(Promise::Keeps).filter(|code| named.contains(code)).collect();
    if missing.is_empty() && too_many.is_empty() {
        return vec![];
    }
    vec![Problem::new(
        file,
        1,
        format!(
            "the recorded run names {named:?} as broken; it lacks {missing:?}, and the strategy keeps {too_many:?}"
        ),
        "record it anew: `make generated`",
    )]
}

#[test]
fn a_recorded_failure_that_names_something_else_is_found() {
    use box_office::Invariant::{Conservation, NoOversell};
    let promises = Promises::ALL_KEPT.breaks(&[NoOversell, Conservation]);
    let misnamed = |text| misnamed(Path::new("red.md"), text, &promises);

    none(misnamed("BROKEN I1 (no oversell): …\n…\nBROKEN I2 (conservation): …"));
    let found = only(misnamed("BROKEN I1 (no oversell): …"));
    assert!(found.contains("lacks [\"I2\"]"), "{found}");
    let found = only(misnamed("BROKEN I1 (…)\nBROKEN I2 (…)\nBROKEN I4 (…)"));
    assert!(found.contains("keeps [\"I4\"]"), "{found}");
}
