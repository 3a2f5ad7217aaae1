//! The levels that this command was built with, and how their names are written on the command line.

use anyhow::{Context, bail};
use box_office::{Level, Strategy};

/// In the order of the road. A level that was left out of the build is not here.
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

    /// The file in which the strategy stands, relative to the root of the repository.
    pub(crate) fn source(self) -> String {
        self.level.source(self.strategy)
    }

    /// Reads `LEVEL/STRATEGY`, or `LEVEL` for its first strategy.
    pub(crate) fn one(text: &str) -> anyhow::Result<Self> {
        let (level, strategy) = split(text)?;
        Ok(match strategy {
            Some(strategy) => strategy,
            None => Self {
                level,
                strategy: level.strategies.first().context("the level has no strategy")?,
            },
        })
    }

    /// Reads `LEVEL/STRATEGY`, or `LEVEL` for all that a reader meets on its trail.
    pub(crate) fn trail(text: &str) -> anyhow::Result<Vec<Self>> {
        let (level, strategy) = split(text)?;
        Ok(strategy.map_or_else(|| trail_of(level), |strategy| vec![strategy]))
    }

    /// The trail through all levels.
    pub(crate) fn whole_trail() -> Vec<Self> {
        LEVELS.iter().copied().flat_map(trail_of).collect()
    }
}

fn trail_of(level: &'static Level) -> Vec<SelectedStrategy> {
    let on_the_trail = level.strategies.iter();
    on_the_trail
        .map(|strategy| SelectedStrategy { level, strategy })
        .collect()
}

fn split(text: &str) -> anyhow::Result<(&'static Level, Option<SelectedStrategy>)> {
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
