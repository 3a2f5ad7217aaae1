//! `oversold judge FILE`: checks a recorded history.

use std::{fs::File, io::BufReader, path::Path};

use anyhow::Context;
use harness::{history::History, judge::judge};

use crate::exit::ExitKind;

/// Checks a recorded history against all invariants.
pub(crate) fn run(path: &Path, json: bool) -> anyhow::Result<ExitKind> {
    let file = File::open(path).with_context(|| format!("opening {}", path.display()))?;
    let history = History::read(BufReader::new(file)).with_context(|| format!("reading {}", path.display()))?;
    let verdict = judge(&history);
    if json {
        println!("{}", serde_json::to_string_pretty(&verdict)?);
    } else {
        println!("{}\n{verdict}", history.header.strategy);
    }
    Ok(if verdict.findings.is_empty() {
        ExitKind::AsPromised
    } else {
        ExitKind::Broken
    })
}
