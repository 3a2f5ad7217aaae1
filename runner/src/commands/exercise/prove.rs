//! Proves the exercises in a copy of this checkout: the contract test is red for just the reasons that the exercise names, green with
//! the solution, and red with each of its wrong fixes.

use std::{collections::BTreeSet, env, fs, path::PathBuf, process::Command};

use anyhow::{Context, bail, ensure};
use box_office::{Invariant, Level};
use harness::RED;
use mutants::{Mutant, WITHOUT_MUTANTS};

use super::{Exercise, Start, names, read_from};
use crate::{
    checkout::{cargo_test, git, root},
    commands::red::{CONTRACT_TEST, tests_of},
    exit::ExitKind,
};

/// The test that runs a strategy through every order of steps, where a level has one.
const ORDERS_TEST: &str = "no_order_of_steps_breaks_it";

pub(super) fn run(selected: &[String]) -> anyhow::Result<ExitKind> {
    let copy = Copy::new()?;
    let mut failed = vec![];
    for name in if selected.is_empty() {
        names()?
    } else {
        selected.to_vec()
    } {
        let exercise = Exercise::read(&name)?;
        match copy.prove(&exercise) {
            Ok(proof) => println!("{name}: {proof}"),
            Err(why) => {
                eprintln!("{name}: {why:#}");
                failed.push(name);
            }
        }
        copy.restore()?;
    }
    ensure!(failed.is_empty(), "not proved: {}", failed.join(", "));
    Ok(ExitKind::AsPromised)
}

/// A copy of this checkout, changes that are not committed yet included, in a repository of its own. It is built into the same target
/// folder, where the libraries are built already.
struct Copy {
    folder: PathBuf,
}

impl Copy {
    fn new() -> anyhow::Result<Self> {
        let folder = root().join("target/exercises/checkout");
        if folder.exists() {
            fs::remove_dir_all(&folder)?;
        }
        let listed = git(root(), &["ls-files", "--cached", "--others", "--exclude-standard"])?;
        for file in listed.lines() {
            let (from, to) = (root().join(file), folder.join(file));
            // A file that is deleted and not committed is listed, too.
            if from.is_file() {
                fs::create_dir_all(to.parent().context("a file is in a folder")?)?;
                fs::copy(&from, &to).with_context(|| file.to_owned())?;
            }
        }
        let copy = Self { folder };
        git(&copy.folder, &["init", "--quiet"])?;
        git(&copy.folder, &["add", "--all"])?;
        let author = ["-c", "user.name=oversold", "-c", "user.email=oversold@localhost"];
        git(
            &copy.folder,
            &[&author[..], &["commit", "--quiet", "--message", "as it is"]].concat(),
        )?;
        Ok(copy)
    }

    fn restore(&self) -> anyhow::Result<()> {
        git(&self.folder, &["checkout", "--quiet", "--", "."]).map(drop)
    }

    fn prove(&self, exercise: &Exercise) -> anyhow::Result<String> {
        match exercise.start()? {
            Start::Mistake(mutant) => self.prove_mistake(exercise, &mutant),
            Start::AsItIs => self.prove_redesign(exercise),
        }
    }

    fn prove_mistake(&self, exercise: &Exercise, mutant: &Mutant) -> anyhow::Result<String> {
        let strategy = &mutant.strategy;
        let right = self.contract(exercise, strategy, false)?;
        ensure!(
            right.is_empty(),
            "without the mistake the contract test is red about {right:?}"
        );
        self.write(mutant)?;
        let red = self.contract(exercise, strategy, false)?;
        exercise.check(&red).context("with the mistake")?;
        let folder = exercise.folder.join("wrong-fixes");
        let wrong = Mutant::read_all(&folder)?;
        ensure!(
            wrong.len() >= 2,
            "{} has {} wrong fixes, and takes two",
            folder.display(),
            wrong.len()
        );
        for fix in &wrong {
            self.restore()?;
            self.write(fix)?;
            let red = self.contract(exercise, strategy, false)?;
            ensure!(
                !red.is_empty(),
                "with the wrong fix {:?} the contract test is green",
                fix.name
            );
        }
        Ok(format!(
            "red about {}; green without the mistake; red with {} wrong fixes",
            codes(&red),
            wrong.len()
        ))
    }

    fn prove_redesign(&self, exercise: &Exercise) -> anyhow::Result<String> {
        let strategy = exercise.selected.strategy.name;
        let red = self.contract(exercise, strategy, true)?;
        exercise.check(&red).context("before the solution")?;
        let patch = exercise.folder.join("solution.patch");
        git(&self.folder, &["apply", &patch.display().to_string()])?;
        let left = self.contract(exercise, strategy, true)?;
        ensure!(
            left.is_empty(),
            "with the solution the contract test is red about {}",
            codes(&left)
        );
        self.contract(exercise, strategy, false)?;
        Ok(format!(
            "red about {} before its solution, and green with it",
            codes(&red)
        ))
    }

    /// Puts the changes of a patch into the copy.
    fn write(&self, mutant: &Mutant) -> anyhow::Result<()> {
        for (path, content) in mutant
            .apply(read_from(&self.folder))
            .with_context(|| mutant.name.clone())?
        {
            fs::write(self.folder.join(path), content)?;
        }
        Ok(())
    }

    /// Runs the contract tests of a strategy and its orders of steps, as they are or as `make red` does, and returns the invariants that they are red about.
    fn contract(&self, exercise: &Exercise, strategy: &str, red: bool) -> anyhow::Result<BTreeSet<Invariant>> {
        let listed = self
            .cargo_test(exercise)
            .args(["--list", "--format", "terse"])
            .output()?;
        ensure!(
            listed.status.success(),
            "it does not build:\n{}",
            String::from_utf8_lossy(&listed.stderr)
        );
        let listed = String::from_utf8(listed.stdout)?;
        let cases = cases(exercise.selected.level, strategy, &listed);
        ensure!(!cases.is_empty(), "no contract test is of {strategy}");
        let mut tested = self.cargo_test(exercise);
        if red {
            tested.env(RED, "1");
        }
        let output = tested.arg("--exact").args(cases).output()?;
        let printed = String::from_utf8_lossy(&output.stdout);
        let broken: BTreeSet<Invariant> = Invariant::ALL
            .into_iter()
            .filter(|invariant| printed.contains(&format!("BROKEN {} ", invariant.code())))
            .collect();
        if output.status.success() {
            return Ok(BTreeSet::new());
        }
        ensure!(
            !broken.is_empty(),
            "the tests fail, but about no invariant:\n{printed}{}",
            String::from_utf8_lossy(&output.stderr)
        );
        Ok(broken)
    }

    fn cargo_test(&self, exercise: &Exercise) -> Command {
        let mut command = cargo_test(&self.folder, exercise.selected.level);
        let target = env::var_os("CARGO_TARGET_DIR").map_or_else(|| root().join("target"), PathBuf::from);
        command.env("CARGO_TARGET_DIR", target).env(WITHOUT_MUTANTS, "1");
        command
    }
}

impl Drop for Copy {
    fn drop(&mut self) {
        // What is left is overwritten by the next run.
        let _ = fs::remove_dir_all(&self.folder);
    }
}

/// The cases of a strategy, on any number of instances, in the contract tests and in that of all orders.
fn cases<'a>(level: &Level, strategy: &str, listed: &'a str) -> Vec<&'a str> {
    let is_of = |case: &str, name: &str| {
        let name = name.replace('-', "_");
        case == name || case.starts_with(&format!("{name}_"))
    };
    let is_of_a_mutant = |case: &str| {
        let mut mutants = level.mutants.iter().filter_map(|mutant| mutant.name.split_once('/'));
        mutants.any(|(_, name)| is_of(case, name))
    };
    let tests = [CONTRACT_TEST, ORDERS_TEST]
        .into_iter()
        .flat_map(|function| tests_of(function, listed));
    let of_strategy = tests.filter(|test| is_of(test.case, strategy) && !is_of_a_mutant(test.case));
    of_strategy.map(|test| test.name).collect()
}

impl Exercise {
    /// Holds what is red against what the exercise says.
    fn check(&self, red: &BTreeSet<Invariant>) -> anyhow::Result<()> {
        let (must, may) = (&self.description.red, &self.description.may);
        let missing = must
            .iter()
            .copied()
            .filter(|invariant| !red.contains(invariant))
            .collect::<BTreeSet<_>>();
        let unexpected = red
            .iter()
            .copied()
            .filter(|invariant| !must.contains(invariant) && !may.contains(invariant));
        let unexpected = unexpected.collect::<BTreeSet<_>>();
        match (missing.is_empty(), unexpected.is_empty()) {
            (true, true) => Ok(()),
            (false, _) => bail!(
                "the contract test is red about {:?}, and not about {}",
                codes(red),
                codes(&missing)
            ),
            (true, false) => bail!("the contract test is red about {}, too", codes(&unexpected)),
        }
    }
}

fn codes(invariants: &BTreeSet<Invariant>) -> String {
    match invariants.is_empty() {
        true => "nothing".to_owned(),
        false => invariants
            .iter()
            .map(|invariant| invariant.code())
            .collect::<Vec<_>>()
            .join(", "),
    }
}
