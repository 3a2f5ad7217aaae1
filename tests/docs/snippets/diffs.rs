//! Diffs: each mutant against the strategy that it was made from.

use box_office::Place;
use harness::twins::{code, twin_of};
use similar::TextDiff;

use super::source;
use crate::strategies;

/// The diffs of all mutants.
pub(super) fn all() -> impl Iterator<Item = (String, String)> {
    strategies(Place::Broken).map(|(level, broken)| {
        let text = source(broken.source);
        let twin = twin_of(&text).unwrap_or_else(|| panic!("{}: its docs name no `Twin: `", broken.source));
        let twin = level
            .strategy(twin)
            .unwrap_or_else(|| panic!("{}: its twin {twin:?} is no strategy of {}", broken.source, level.name));
        let name = broken.name.trim_start_matches("broken/");
        (
            format!("diffs/{}-{name}.md", level.name),
            diff((twin.source, &source(twin.source)), (broken.source, &text)),
        )
    })
}

/// The diff between two files, each a path and a text.
fn diff(twin: (&str, &str), broken: (&str, &str)) -> String {
    let (before, after) = (code(twin.1), code(broken.1));
    let diff = TextDiff::from_lines(&before, &after);
    let mut text = format!("```diff\n--- {}\n+++ {}\n", twin.0, broken.0);
    for hunk in diff.unified_diff().context_radius(3).iter_hunks() {
        // Without the line numbers, which would be counted below the docs.
        let hunk = hunk.to_string();
        let (_, lines) = hunk.split_once('\n').unwrap_or_default();
        text += "@@\n";
        text += lines;
    }
    text + "```\n"
}

#[test]
fn a_diff_shows_the_mistake_and_not_the_docs() {
    let twin = "//! Right.\n\nuse a;\n\n// ANCHOR: lock\nlet guard = lock();\n// ANCHOR_END: lock\nsell();\n";
    let broken =
        "//! Broken: dropped at once.\n//!\n//! Twin: `right`. Caught by I1.\n\nuse a;\n\nlet _ = lock();\nsell();\n";
    assert_eq!(twin_of(broken), Some("right"));
    assert_eq!(
        diff(("right.rs", twin), ("broken.rs", broken)),
        "```diff\n--- right.rs\n+++ broken.rs\n@@\n use a;\n \n-let guard = lock();\n+let _ = lock();\n sell();\n```\n"
    );
}
