//! `oversold list`: levels and strategies with their guarantees.

use box_office::{FailureMode, Invariant, Promise, Promises};
use serde::Serialize;

use crate::{exit::ExitKind, levels::LEVELS};

/// A strategy in the output of `--json`. The names of the fields are stable.
#[derive(Serialize)]
struct Listed {
    name: String,
    summary: &'static str,
    /// Whether it is a strategy with one planted mistake.
    mutant: bool,
    clicks: u32,
    /// The services besides Postgres.
    needs: Vec<&'static str>,
    /// What its settings can switch on.
    improvements: Vec<&'static str>,
    single_instance: Codes,
    multi_instance: Codes,
    failure_modes: Vec<ListedFailureMode>,
}

/// A failure mode of the strategy, and the invariants that it violates.
#[derive(Serialize)]
struct ListedFailureMode {
    trigger: &'static str,
    violates: &'static [Invariant],
}

/// The invariants by what the guarantee says about them.
#[derive(Serialize)]
struct Codes {
    keeps: Vec<Invariant>,
    breaks: Vec<Invariant>,
    leaves_open: Vec<Invariant>,
}

impl From<Promises> for Codes {
    fn from(promises: Promises) -> Self {
        Self {
            keeps: promises.those(Promise::Keeps).collect(),
            breaks: promises.those(Promise::Breaks).collect(),
            leaves_open: promises.those(Promise::NotPromised).collect(),
        }
    }
}

/// Prints every strategy with its guarantee.
pub(crate) fn run(json: bool) -> anyhow::Result<ExitKind> {
    if json {
        println!("{}", serde_json::to_string_pretty(&listed())?);
    } else {
        print_text();
    }
    Ok(ExitKind::AsPromised)
}

fn listed() -> Vec<Listed> {
    let of_a_level = LEVELS.iter().flat_map(|level| {
        let listed = |strategy: &'static box_office::Strategy| Listed {
            name: format!("{}/{}", level.name, strategy.name),
            summary: strategy.summary,
            mutant: strategy.is_mutant(),
            clicks: strategy.clicks,
            needs: strategy.needs.iter().map(|service| service.name()).collect(),
            improvements: strategy
                .improvements
                .iter()
                .map(|improvement| improvement.name())
                .collect(),
            single_instance: strategy.guarantee.single_instance.into(),
            multi_instance: strategy.guarantee.multi_instance.into(),
            failure_modes: strategy
                .guarantee
                .failure_modes
                .iter()
                .map(|&FailureMode { trigger, violates }| ListedFailureMode { trigger, violates })
                .collect(),
        };
        level.all().map(listed)
    });
    of_a_level.collect()
}

fn print_text() {
    for level in LEVELS {
        println!("{}  {}", level.name, level.summary);
        for strategy in level.all() {
            println!("  {}/{}: {}", level.name, strategy.name, strategy.summary);
            let (single, multi) = (strategy.guarantee.single_instance, strategy.guarantee.multi_instance);
            if single == multi {
                println!("      on any number of instances: {}", summary(&single));
            } else {
                println!("      on one instance: {}", summary(&single));
                println!("      on several:      {}", summary(&multi));
            }
            for FailureMode { trigger, violates } in strategy.guarantee.failure_modes {
                match violates {
                    [] => println!("      until {trigger}"),
                    _ => println!("      until {trigger}: breaks {}", codes(violates.iter().copied())),
                }
            }
        }
    }
    println!();
    for invariant in Invariant::ALL {
        println!("{:>4}  {}", invariant.code(), invariant.title());
    }
}

/// What a guarantee keeps and breaks, in a few words.
pub(crate) fn summary(promises: &Promises) -> String {
    let [breaks, open] = [Promise::Breaks, Promise::NotPromised].map(|promise| codes(promises.those(promise)));
    match (breaks.as_str(), promises.about(Invariant::Order)) {
        ("", _) if open.is_empty() => "keeps all".to_owned(),
        ("", _) => format!("keeps all but {open}"),
        _ => format!("breaks {breaks}; promises nothing about {open}"),
    }
}

fn codes(invariants: impl Iterator<Item = Invariant>) -> String {
    invariants.map(Invariant::code).collect::<Vec<_>>().join(", ")
}
