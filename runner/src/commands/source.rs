//! `oversold source`: the source of a strategy, or of a mutant with its mistake in place.

use std::{fs, path::Path};

use anyhow::{Context, ensure};
use clap::Args;
use mutants::{Mutant, Refreshed, refresh};

use crate::{
    checkout::root,
    exit::ExitKind,
    levels::{LEVELS, SelectedStrategy},
};

#[derive(Args)]
pub(crate) struct SourceArgs {
    /// A strategy or a mutant, as LEVEL/STRATEGY: lv2/pessimistic, lv2/mutants/second-connection.
    #[arg(value_name = "LEVEL/STRATEGY", required_unless_present = "refresh")]
    strategy: Option<String>,
    /// Print the patch of the mutant: what is wrong, and the diff against the correct source.
    #[arg(long, conflicts_with = "refresh")]
    diff: bool,
    /// Make the diffs anew of all mutants, or of this one, whose patches no longer apply because their source has changed.
    #[arg(long)]
    refresh: bool,
}

pub(crate) fn run(args: &SourceArgs) -> anyhow::Result<ExitKind> {
    let selected = args.strategy.as_deref().map(SelectedStrategy::one).transpose()?;
    match selected {
        _ if args.refresh => refresh_patches(selected),
        Some(selected) if args.diff => {
            ensure!(
                selected.strategy.is_mutant(),
                "{} is not a mutant: it has no diff",
                selected.name()
            );
            print!("{}", fs::read_to_string(root().join(selected.source()))?);
            Ok(ExitKind::AsPromised)
        }
        Some(selected) => print_source(selected),
        None => Ok(ExitKind::AsPromised),
    }
}

fn print_source(selected: SelectedStrategy) -> anyhow::Result<ExitKind> {
    let path = root().join(selected.source());
    if !selected.strategy.is_mutant() {
        print!("{}", fs::read_to_string(path)?);
        return Ok(ExitKind::AsPromised);
    }
    let mutant = Mutant::read(&path)?;
    let mutated = mutant.apply(|path| fs::read_to_string(root().join(path)));
    let mutated =
        mutated.with_context(|| format!("{}; `oversold source --refresh` makes it anew", selected.source()))?;
    for (file, content) in mutated {
        if mutant.changes.len() > 1 {
            println!("// {file}");
        }
        print!("{content}");
    }
    Ok(ExitKind::AsPromised)
}

fn refresh_patches(selected: Option<SelectedStrategy>) -> anyhow::Result<ExitKind> {
    let all = LEVELS.iter().flat_map(|&level| {
        level
            .mutants
            .iter()
            .map(move |strategy| SelectedStrategy { level, strategy })
    });
    let mut exit = ExitKind::AsPromised;
    for mutant in selected.map_or_else(|| all.collect(), |one| vec![one]) {
        let patch = mutant.source();
        match refresh(root(), Path::new(&root().join(&patch))) {
            Ok(Refreshed::Unchanged) => {}
            Ok(Refreshed::Written) => println!("{patch}: written"),
            Err(why) => {
                eprintln!("{patch}: {why:#}");
                exit = ExitKind::Broken;
            }
        }
    }
    Ok(exit)
}
