//! The book and the README: generated snippets are up to date, and every command, file, anchor and link that they name exists.
//!
//! `make generated` (that is, `OVERSOLD_BLESS=1`) regenerates the snippets. Everything else that fails here is fixed by hand.

#![allow(clippy::unwrap_used)]

mod commands;
mod exercises;
mod html;
mod names;
mod pages;
mod readme;
mod rules;
mod snippets;

use std::{
    fmt,
    path::{Path, PathBuf},
};

use box_office::{Level, Strategy};

/// The levels that the book is about.
static LEVELS: [&Level; 4] = [
    &lv1_race_condition::LEVEL,
    &lv2_db_lock::LEVEL,
    &lv3_redis_lock::LEVEL,
    &lv4_kafka::LEVEL,
];

/// The root of the repository.
fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap()
}

/// Every strategy of every level, without the mutants.
fn strategies() -> impl Iterator<Item = (&'static Level, &'static Strategy)> {
    LEVELS
        .iter()
        .flat_map(|&level| level.strategies.iter().map(move |strategy| (level, strategy)))
}

/// A problem that a person has to fix.
struct Problem {
    file: PathBuf,
    line: usize,
    wrong: String,
    to_do: String,
}

impl Problem {
    fn new(file: impl Into<PathBuf>, line: usize, wrong: impl Into<String>, to_do: impl Into<String>) -> Self {
        Self {
            file: file.into(),
            line,
            wrong: wrong.into(),
            to_do: to_do.into(),
        }
    }
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            file,
            line,
            wrong,
            to_do,
        } = self;
        write!(f, "{}:{line}: {wrong}\n    {to_do}", file.display())
    }
}

/// Fails if there is a problem, with a list of all.
#[track_caller]
fn none(problems: Vec<Problem>) {
    let shown: Vec<String> = problems.iter().map(Problem::to_string).collect();
    assert!(shown.is_empty(), "\n{}\n", shown.join("\n"));
}

/// The one problem that a check must find in a broken input, for the tests of the checks themselves.
#[track_caller]
fn only(problems: Vec<Problem>) -> String {
    let shown: Vec<String> = problems.iter().map(Problem::to_string).collect();
    let [one] = &shown[..] else {
        panic!("one problem was expected: {shown:?}");
    };
    one.clone()
}
