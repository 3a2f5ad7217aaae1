//! What each improvement is for: the same fault without it and with it, in a number. `make ablations`
//! writes what the tests record, and the book shows it.

use std::{env, fmt::Display, fs, path::PathBuf};

/// Where the numbers are written; if it is not set, they are only printed.
const FOLDER: &str = "OVERSOLD_ABLATIONS";

/// Whether the improvement is switched on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Improvement {
    Off,
    On,
}

/// Records what was measured of a strategy, such as `("rate-limit", Off, "single-writer", "200 of 200
/// orders accepted")`. The book shows `single-writer`.
pub(crate) fn record(ablation: &str, improvement: Improvement, strategy: &str, measured: impl Display) {
    println!("ablation {ablation}, {improvement:?}, {strategy}: {measured}");
    let Some(folder) = env::var_os(FOLDER).filter(|_| strategy == "single-writer") else {
        return;
    };
    let side = match improvement {
        Improvement::Off => "without",
        Improvement::On => "with",
    };
    let file = PathBuf::from(folder).join(format!("{ablation}.{side}.txt"));
    fs::create_dir_all(file.parent().unwrap()).unwrap();
    fs::write(&file, format!("{measured}\n")).unwrap();
}
