//! Broken strategies beside their correct twins: each differs by its one mistake, or it would not show what catches that mistake.

use std::{fs, path::Path};

use anyhow::{Context, ensure};
use similar::{ChangeTag, TextDiff};

/// How many lines one mistake may take, removed and added ones together.
const MOST_LINES: usize = 10;

/// Compares every file of `broken/` in a level's source folder with the twin that its documentation names, as ``Twin: `mutex` ``.
/// What the modules say of themselves at their head does not count.
///
/// Returns how many there are.
///
/// # Errors
/// A file names no twin or differs from it by too much; with the diff.
pub fn differ_by_one_mistake(source: &Path) -> anyhow::Result<usize> {
    let mut pairs = 0;
    for entry in fs::read_dir(source.join("broken"))? {
        let path = entry?.path();
        if path.file_name().is_some_and(|name| name == "mod.rs") {
            continue;
        }
        differs_by_one_mistake(&path, source).with_context(|| path.display().to_string())?;
        pairs += 1;
    }
    Ok(pairs)
}

fn differs_by_one_mistake(broken: &Path, source: &Path) -> anyhow::Result<()> {
    let broken = fs::read_to_string(broken)?;
    let name = twin_of(&broken).context("its documentation names no twin: \"Twin: `…`\"")?;
    let twin = source.join(name.replace('-', "_")).with_extension("rs");
    let twin = fs::read_to_string(&twin).with_context(|| twin.display().to_string())?;
    let (twin, broken) = (code(&twin), code(&broken));
    let diff = TextDiff::from_lines(&twin, &broken);
    let changed = diff
        .iter_all_changes()
        .filter(|change| change.tag() != ChangeTag::Equal)
        .count();
    ensure!(
        changed > 0,
        "it does not differ from {name}: its mistake is mended, and so it is listed as broken in vain"
    );
    ensure!(
        changed <= MOST_LINES,
        "it differs from {name} by {changed} lines, and one mistake takes at most {MOST_LINES}:\n{}",
        diff.unified_diff()
    );
    Ok(())
}

/// The name after ``Twin: ` `` in the documentation of a broken strategy's file.
pub fn twin_of(source: &str) -> Option<&str> {
    source.split_once("Twin: `")?.1.split_once('`').map(|(name, _)| name)
}

/// The code of a file: what stands below the module's documentation, without the marks by which the book includes parts of it.
pub fn code(source: &str) -> String {
    let lines = source
        .lines()
        .filter(|line| !line.starts_with("//!") && !line.trim_start().starts_with("// ANCHOR"));
    let code: Vec<&str> = lines.skip_while(|line| line.is_empty()).collect();
    code.join("\n") + "\n"
}
