//! The exercises: every solution applies to the code. `make exercises` proves them, which takes minutes.

use std::{fs, process::Command};

use super::{Problem, none, root};

#[test]
fn every_solution_applies_to_the_code_as_it_is() {
    let mut problems = vec![];
    for exercise in fs::read_dir(root().join("book/exercises")).unwrap() {
        let patch = exercise.unwrap().path().join("solution.patch");
        let tried = Command::new("git")
            .args(["apply", "--check"])
            .arg(&patch)
            .current_dir(root())
            .output()
            .unwrap();
        if !tried.status.success() {
            let why = String::from_utf8_lossy(&tried.stderr).trim().to_owned();
            problems.push(Problem::new(
                patch,
                1,
                why,
                "make the solution again, from the current code",
            ));
        }
    }
    none(problems);
}
