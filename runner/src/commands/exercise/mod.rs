//! `oversold exercise`: puts a mistake into a strategy, for the reader to fix.

mod prove;

use std::{
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context, ensure};
use box_office::Invariant;
use clap::Args;
use mutants::Mutant;
use serde::Deserialize;

use crate::{
    checkout::{git, root},
    exit::ExitKind,
    levels::SelectedStrategy,
};

#[derive(Args)]
pub(crate) struct ExerciseArgs {
    /// A folder of book/exercises. Without one, all exercises are listed, or proved.
    #[arg(value_name = "NAME")]
    names: Vec<String>,
    /// Show the solution: the diff from the exercise back to what is right.
    #[arg(long, conflicts_with_all = ["reset", "prove"])]
    solution: bool,
    /// Take the exercise back. A copy of the file as you left it is kept in target/exercises.
    #[arg(long, conflicts_with = "prove")]
    reset: bool,
    /// Prove the exercises in a copy of this checkout: red for their reasons, green with the solution, red with a wrong fix.
    #[arg(long)]
    prove: bool,
}

/// What `exercise.json` says.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Description {
    /// The mutant whose mistake is to be fixed, or the strategy that is to be redesigned, as LEVEL/STRATEGY.
    strategy: String,
    /// The invariants about which the contract test is red.
    red: Vec<Invariant>,
    /// Those about which it may be red besides: a race does not show them each time.
    #[serde(default)]
    may: Vec<Invariant>,
}

/// An exercise of the book.
struct Exercise {
    name: String,
    folder: PathBuf,
    description: Description,
    selected: SelectedStrategy,
}

/// What an exercise begins with.
enum Start {
    /// The mistake of a mutant is put into the correct source.
    Mistake(Mutant),
    /// The strategy as it is; the solution is a patch.
    AsItIs,
}

pub(crate) fn run(args: &ExerciseArgs) -> anyhow::Result<ExitKind> {
    if args.prove {
        return prove::run(&args.names);
    }
    let [name] = &args.names[..] else {
        ensure!(args.names.is_empty(), "one exercise at a time");
        return list();
    };
    let exercise = Exercise::read(name)?;
    match (args.solution, args.reset) {
        (true, _) => exercise.show_solution(),
        (_, true) => exercise.reset(),
        _ => exercise.begin(),
    }?;
    Ok(ExitKind::AsPromised)
}

fn list() -> anyhow::Result<ExitKind> {
    for name in names()? {
        let exercise = Exercise::read(&name)?;
        println!("{name:28} {}", exercise.description.strategy);
    }
    Ok(ExitKind::AsPromised)
}

fn names() -> anyhow::Result<Vec<String>> {
    let folder = root().join("book/exercises");
    let entries = fs::read_dir(&folder).with_context(|| folder.display().to_string())?;
    let mut names = vec![];
    for entry in entries {
        names.push(entry?.file_name().to_string_lossy().into_owned());
    }
    names.sort();
    Ok(names)
}

impl Exercise {
    fn read(name: &str) -> anyhow::Result<Self> {
        let names = names()?;
        ensure!(
            names.iter().any(|known| known == name),
            "there is no exercise {name:?}; there is {}",
            names.join(", ")
        );
        let folder = root().join("book/exercises").join(name);
        let file = folder.join("exercise.json");
        let read = || anyhow::Ok(serde_json::from_str::<Description>(&fs::read_to_string(&file)?)?);
        let description = read().with_context(|| file.display().to_string())?;
        Ok(Self {
            name: name.to_owned(),
            folder,
            selected: SelectedStrategy::one(&description.strategy)?,
            description,
        })
    }

    fn start(&self) -> anyhow::Result<Start> {
        match self.selected.strategy.is_mutant() {
            true => Ok(Start::Mistake(Mutant::read(&root().join(self.selected.source()))?)),
            false => Ok(Start::AsItIs),
        }
    }

    fn begin(&self) -> anyhow::Result<()> {
        let level = self.selected.level.name;
        match self.start()? {
            Start::Mistake(mutant) => {
                for change in &mutant.changes {
                    let changed = git(root(), &["status", "--porcelain", "--", &change.path])?;
                    ensure!(
                        changed.is_empty(),
                        "{} has changes that are not committed: commit them, or `make exercise NAME={} ARGS=--reset` keeps a \
                         copy and takes them back",
                        change.path,
                        self.name
                    );
                }
                for (path, content) in mutant.apply(read_from(root()))? {
                    fs::write(root().join(&path), content)?;
                    println!("There is a mistake in {path} now. Find it before you look at `git diff`.");
                }
            }
            Start::AsItIs => println!(
                "{} is wrong as it stands: {}",
                self.description.strategy,
                self.selected.source()
            ),
        }
        let red: Vec<&str> = self.description.red.iter().map(|invariant| invariant.code()).collect();
        println!();
        println!(
            "  make test LEVEL={level}   red about {}; you are done when all is green",
            red.join(", ")
        );
        println!("  make exercise NAME={} ARGS=--solution", self.name);
        println!("  make exercise NAME={} ARGS=--reset", self.name);
        Ok(())
    }

    fn show_solution(&self) -> anyhow::Result<()> {
        match self.start()? {
            Start::Mistake(mutant) => {
                let mutated = mutant
                    .apply(read_from(root()))
                    .or_else(|_| mutant.apply(read_from_head))?;
                for (path, mistaken) in mutated {
                    let right = read_from(root())(&path).ok().filter(|content| *content != mistaken);
                    let right = match right {
                        Some(right) if mutant.apply(read_from(root())).is_ok() => right,
                        _ => read_from_head(&path)?,
                    };
                    print!("{}", mutants::Change::between(&path, &mistaken, &right).diff);
                }
            }
            Start::AsItIs => print!("{}", fs::read_to_string(self.folder.join("solution.patch"))?),
        }
        Ok(())
    }

    fn reset(&self) -> anyhow::Result<()> {
        let paths: Vec<String> = match self.start()? {
            Start::Mistake(mutant) => {
                mutant.apply(read_from_head).context(
                    "the last commit is not what the exercise began with: take it back with `git checkout COMMIT -- FILE`",
                )?;
                mutant.changes.into_iter().map(|change| change.path).collect()
            }
            // What the solution changes is what a reader changes.
            Start::AsItIs => {
                let solution = fs::read_to_string(self.folder.join("solution.patch"))?;
                let paths = solution.lines().filter_map(|line| line.strip_prefix("+++ b/"));
                paths.map(str::to_owned).collect()
            }
        };
        for path in paths {
            let (file, right) = (root().join(&path), read_from_head(&path)?);
            let current = fs::read_to_string(&file)?;
            if current == right {
                continue;
            }
            let kept = root().join("target/exercises").join(&self.name).join(&path);
            fs::create_dir_all(kept.parent().unwrap_or(root()))?;
            fs::write(&kept, current)?;
            fs::write(&file, right)?;
            println!(
                "{path} is as in the last commit; your version is kept in {}",
                kept.display()
            );
        }
        Ok(())
    }
}

/// Reads a file of a checkout by its path from the root.
fn read_from(checkout: &Path) -> impl Fn(&str) -> std::io::Result<String> {
    move |path| fs::read_to_string(checkout.join(path))
}

/// Reads a file of the last commit.
fn read_from_head(path: &str) -> std::io::Result<String> {
    git(root(), &["show", &format!("HEAD:{path}")]).map_err(std::io::Error::other)
}
