//! `oversold judge FILE`.

use std::{fs::File, io::BufReader, path::Path};

use anyhow::Context;
use harness::{history::History, judge::judge};

use crate::Ended;

/// Judges a recorded history against everything that must be true of a sale.
pub(crate) fn judge_file(path: &Path, json: bool) -> anyhow::Result<Ended> {
    let file = File::open(path).with_context(|| format!("opening {}", path.display()))?;
    let history = History::read(BufReader::new(file)).with_context(|| format!("reading {}", path.display()))?;
    let verdict = judge(&history);
    if json {
        println!("{}", serde_json::to_string_pretty(&verdict)?);
    } else {
        println!("{}\n{verdict}", history.header.strategy);
    }
    Ok(if verdict.findings.is_empty() {
        Ended::AsPromised
    } else {
        Ended::Broken
    })
}
