//! `oversold list`.

use box_office::{FailureMode, Invariant, Promise, Promises};
use serde::Serialize;

use crate::{Ended, levels::LEVELS};

/// A strategy for programs that read. The names are stable.
#[derive(Serialize)]
struct Listed {
    name: String,
    summary: &'static str,
    /// Whether it is a strategy with one planted mistake.
    mutant: bool,
    clicks: u32,
    /// The services besides Postgres.
    needs: Vec<&'static str>,
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

/// The invariants by what is promised about them.
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

/// Prints every strategy, what it is, and what it promises.
pub(crate) fn print(json: bool) -> anyhow::Result<Ended> {
    if json {
        println!("{}", serde_json::to_string_pretty(&listed())?);
    } else {
        print_for_people();
    }
    Ok(Ended::AsPromised)
}

fn listed() -> Vec<Listed> {
    let of_a_level = LEVELS.iter().flat_map(|level| {
        let listed = |strategy: &'static box_office::Strategy| Listed {
            name: format!("{}/{}", level.name, strategy.name),
            summary: strategy.summary,
            mutant: strategy.is_mutant(),
            clicks: strategy.clicks,
            needs: strategy.needs.iter().map(|service| service.name()).collect(),
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

fn print_for_people() {
    for level in LEVELS {
        println!("{}  {}", level.name, level.summary);
        for strategy in level.all() {
            println!("  {}/{}: {}", level.name, strategy.name, strategy.summary);
            let (alone, together) = (strategy.guarantee.single_instance, strategy.guarantee.multi_instance);
            if alone == together {
                println!("      on any number of instances: {}", in_words(&alone));
            } else {
                println!("      on one instance: {}", in_words(&alone));
                println!("      on several:      {}", in_words(&together));
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

/// What a strategy keeps and breaks, as short as it can be said.
pub(crate) fn in_words(promises: &Promises) -> String {
    let [broken, open] = [Promise::Breaks, Promise::NotPromised].map(|promise| codes(promises.those(promise)));
    match (broken.as_str(), promises.about(Invariant::Order)) {
        ("", _) => format!("keeps all but {open}"),
        _ => format!("breaks {broken}; promises nothing about {open}"),
    }
}

fn codes(invariants: impl Iterator<Item = Invariant>) -> String {
    invariants.map(Invariant::code).collect::<Vec<_>>().join(", ")
}
