//! `oversold serve`.

use std::process::ExitCode;

use box_office::Settings;

use crate::{exit::USAGE, levels::SelectedStrategy};

/// Serves the level or strategy with this name; for a level alone, `STRATEGY` selects the strategy.
pub(crate) fn run(name: &str, settings: &Settings) -> ExitCode {
    let selected = match (name.contains('/'), &settings.strategy) {
        (false, Some(strategy)) => SelectedStrategy::one(&format!("{name}/{strategy}")),
        _ => SelectedStrategy::one(name),
    };
    match selected {
        Ok(selected) => box_office::serve(selected.level, selected.strategy, settings),
        Err(error) => {
            eprintln!("oversold: {error:#}");
            ExitCode::from(USAGE)
        }
    }
}
