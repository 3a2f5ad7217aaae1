//! The levels that this command was built with, and their names on the command line.

use std::env;

use anyhow::{Context, bail};
use box_office::{Level, Strategy};
use harness::rush::Program;

/// In the order of the book. A level whose feature is off is not among them.
pub(crate) static LEVELS: &[&Level] = &[
    #[cfg(feature = "lv1")]
    &lv1_race_condition::LEVEL,
    #[cfg(feature = "lv2")]
    &lv2_db_lock::LEVEL,
    #[cfg(feature = "lv3")]
    &lv3_redis_lock::LEVEL,
    #[cfg(feature = "lv4")]
    &lv4_kafka::LEVEL,
];

/// A strategy and the level that it belongs to.
#[derive(Clone, Copy)]
pub(crate) struct SelectedStrategy {
    /// The level.
    pub(crate) level: &'static Level,
    /// One of its strategies.
    pub(crate) strategy: &'static Strategy,
}

impl SelectedStrategy {
    /// `lv1/read-then-write`.
    pub(crate) fn name(&self) -> String {
        format!("{}/{}", self.level.name, self.strategy.name)
    }

    /// This program as a server of the level.
    ///
    /// # Errors
    /// The path of this program is unknown.
    pub(crate) fn program(&self) -> anyhow::Result<Program> {
        Ok(Program::new(env::current_exe()?)
            .argument("serve")
            .argument(self.level.name))
    }

    /// The file of the strategy, relative to the root of the repository: its source, or a mutant's patch.
    pub(crate) fn source(&self) -> String {
        self.level.source(self.strategy)
    }

    /// Reads `LEVEL/STRATEGY`, or `LEVEL` for its first strategy.
    pub(crate) fn one(text: &str) -> anyhow::Result<Self> {
        let (level, strategy) = parse(text)?;
        Ok(match strategy {
            Some(strategy) => strategy,
            None => Self {
                level,
                strategy: level.strategies.first().context("the level has no strategy")?,
            },
        })
    }

    /// Reads `LEVEL/STRATEGY`, or `LEVEL` for all of its main strategies.
    pub(crate) fn main_strategies(text: &str) -> anyhow::Result<Vec<Self>> {
        let (level, strategy) = parse(text)?;
        Ok(strategy.map_or_else(|| main_strategies_of(level).collect(), |strategy| vec![strategy]))
    }

    /// The main strategies of all levels.
    pub(crate) fn all_main_strategies() -> Vec<Self> {
        LEVELS.iter().copied().flat_map(main_strategies_of).collect()
    }
}

fn main_strategies_of(level: &'static Level) -> impl Iterator<Item = SelectedStrategy> {
    let strategies = level.strategies.iter();
    strategies.map(move |strategy| SelectedStrategy { level, strategy })
}

/// Reads `LEVEL/STRATEGY`, or `LEVEL` without a strategy.
pub(crate) fn parse(text: &str) -> anyhow::Result<(&'static Level, Option<SelectedStrategy>)> {
    let (level_name, strategy_name) = text
        .split_once('/')
        .map_or((text, None), |(level, name)| (level, Some(name)));
    let Some(&level) = LEVELS.iter().find(|level| level.name == level_name) else {
        let known: Vec<&str> = LEVELS.iter().map(|level| level.name).collect();
        bail!("there is no level {level_name:?}; there is {}", known.join(", "));
    };
    let Some(strategy_name) = strategy_name else {
        return Ok((level, None));
    };
    let Some(strategy) = level.strategy(strategy_name) else {
        let known: Vec<&str> = level.all().map(|strategy| strategy.name).collect();
        bail!(
            "{level_name} has no strategy {strategy_name:?}; it has {}",
            known.join(", ")
        );
    };
    Ok((level, Some(SelectedStrategy { level, strategy })))
}
