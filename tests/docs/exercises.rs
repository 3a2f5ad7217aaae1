//! The exercises. `make exercises` proves them, in minutes; whether their patches fit the code is checked here at once.

use std::{fs, path::Path, process::Command};

use mutants::Mutant;

use super::{Problem, none, root};

/// What to do about a patch that does not apply.
const TO_DO: &str = "make it anew from the code as it is";

#[test]
fn every_patch_of_an_exercise_applies_to_the_code_as_it_is() {
    let mut problems = vec![];
    for exercise in fs::read_dir(root().join("book/exercises")).unwrap() {
        let folder = exercise.unwrap().path();
        let solution = folder.join("solution.patch");
        if solution.is_file() {
            problems.extend(does_not_apply(&solution));
        } else {
            problems.extend(stale_wrong_fixes(&folder.join("wrong-fixes")));
        }
    }
    none(problems);
}

fn does_not_apply(patch: &Path) -> Option<Problem> {
    let git = Command::new("git")
        .args(["apply", "--check"])
        .arg(patch)
        .current_dir(root())
        .output()
        .unwrap();
    let why = || String::from_utf8_lossy(&git.stderr).trim().to_owned();
    (!git.status.success()).then(|| Problem::new(patch, 1, why(), TO_DO))
}

fn stale_wrong_fixes(folder: &Path) -> Vec<Problem> {
    let fixes = match Mutant::read_all(folder) {
        Ok(fixes) if fixes.len() >= 2 => fixes,
        Ok(_) => return vec![Problem::new(folder, 1, "an exercise takes two wrong fixes", "add one")],
        Err(why) => return vec![Problem::new(folder, 1, format!("{why:#}"), "write two wrong fixes")],
    };
    let stale = |fix: Mutant| {
        let stale = fix.apply(|path| fs::read_to_string(root().join(path))).err()?;
        let file = folder.join(&fix.name).with_extension("patch");
        Some(Problem::new(file, 1, stale.to_string(), TO_DO))
    };
    fixes.into_iter().filter_map(stale).collect()
}
