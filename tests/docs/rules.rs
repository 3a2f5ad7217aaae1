//! Rules for every page: its includes exist, its headings are in order, its measurements come from result files.

use std::{
    collections::BTreeSet,
    fs,
    path::{Component, Path, PathBuf},
    sync::LazyLock,
};

use regex::Regex;

use crate::{
    Problem, none, only,
    pages::{self, Page},
    root,
    snippets::NOT_MEASURED,
    strategies,
};

/// The sections of a strategy's page, in their order.
fn sections(level: &str) -> &'static [&'static str] {
    match level {
        "lv1" => &[
            "The test",
            "Predict",
            "Red",
            "Why",
            "What it costs",
            "Exercise",
            "Use it when",
        ],
        _ => &[
            "The test",
            "Predict",
            "Red",
            "Why",
            "The fix",
            "Break it",
            "What it costs",
            "Use it when",
        ],
    }
}

/// Text that looks like a measurement and is a constant, and where it comes from.
const CONSTANTS: &[(&str, &str)] = &[("12 seconds", "ANSWER_TIMEOUT in box-office/src/database")];

/// An include: the file from the root of the repository, and the anchor in it.
struct Include {
    line: usize,
    file: PathBuf,
    anchor: Option<String>,
}

fn includes(page: &Page) -> Vec<Include> {
    static INCLUDE: LazyLock<Regex> = LazyLock::new(|| {
        Regex::new(r"(^|[^\\])\{\{\s*#(?:rustdoc_)?include\s+([^:}\s]+)(?::([^}\s]*))?\s*\}\}").unwrap()
    });
    let folder = page.file.parent().unwrap_or(Path::new(""));
    let mut found = vec![];
    for line in &page.lines {
        for include in INCLUDE.captures_iter(&line.text) {
            found.push(Include {
                line: line.number,
                file: without_dots(&folder.join(&include[2])),
                anchor: include.get(3).map(|anchor| anchor.as_str().to_owned()),
            });
        }
    }
    found
}

/// `a/../b` is `b`.
pub(crate) fn without_dots(path: &Path) -> PathBuf {
    let mut plain = PathBuf::new();
    for part in path.components() {
        match part {
            Component::ParentDir if plain.pop() => {}
            Component::CurDir => {}
            part => plain.push(part),
        }
    }
    plain
}

fn includes_of_nothing(pages: &[Page], read: impl Fn(&Path) -> Option<String>) -> Vec<Problem> {
    let mut problems = vec![];
    for page in pages {
        let includes = includes(page);
        // An include that is not recognised here would go unchecked.
        let written = page
            .lines
            .iter()
            .filter(|line| line.text.contains("{{#"))
            .map(|line| line.number);
        for line in written.filter(|line| !includes.iter().any(|include| include.line == *line)) {
            problems.push(Problem::new(
                &page.file,
                line,
                "this is no include that can be checked",
                "write {{#include FILE}} or {{#include FILE:ANCHOR}}",
            ));
        }
        for Include { line, file, anchor } in includes {
            let shown = file.display();
            let Some(text) = read(&file) else {
                let to_do = if file.starts_with("book/generated") {
                    "it would be a generated snippet: `make generated` writes those that there are"
                } else {
                    "the path is seen from the page's folder"
                };
                problems.push(Problem::new(
                    &page.file,
                    line,
                    format!("there is no file {shown}"),
                    to_do,
                ));
                continue;
            };
            let Some(anchor) = anchor else { continue };
            if anchor.is_empty() || anchor.starts_with(|c: char| c.is_ascii_digit()) {
                problems.push(Problem::new(
                    &page.file,
                    line,
                    format!("lines {anchor:?} of {shown} change with the next edit"),
                    "include an anchor: `ANCHOR: name` and `ANCHOR_END: name` in a comment",
                ));
                continue;
            }
            // A patch is included from its anchor to its end.
            let is_patch = file.extension().is_some_and(|extension| extension == "patch");
            let marks: &[&str] = if is_patch {
                &["ANCHOR"]
            } else {
                &["ANCHOR", "ANCHOR_END"]
            };
            for mark in marks {
                let mark = format!("{mark}: {anchor}");
                if !text.lines().any(|line| line.trim_end().ends_with(&mark)) {
                    problems.push(Problem::new(
                        &page.file,
                        line,
                        format!("{shown} has no `{mark}`"),
                        "mdBook would include nothing, and not say so: put the anchor there, or name another",
                    ));
                }
            }
        }
    }
    problems
}

/// The pages of the strategies by their names: `lv1/read-then-write`.
fn headings_out_of_order(page: &Page, level: &str) -> Vec<Problem> {
    let sections = sections(level);
    let headings: Vec<(usize, &str)> = page
        .prose()
        .filter_map(|line| Some((line.number, line.text.strip_prefix("## ")?.trim())))
        .collect();
    let names: Vec<&str> = headings.iter().map(|(_, heading)| *heading).collect();
    if names == sections {
        return vec![];
    }
    let first = names
        .iter()
        .zip(sections)
        .take_while(|(is, should)| is == should)
        .count();
    let wrong = match (names.get(first), sections.get(first)) {
        (Some(is), Some(should)) => format!("the section {is:?} stands where {should:?} should"),
        (None, Some(should)) => format!("the section {should:?} is missing"),
        (is, _) => format!("the section {:?} is one too many", is.unwrap_or(&"")),
    };
    let line = headings.get(first).map_or(page.lines.len(), |(line, _)| *line);
    let to_do = format!(
        "a strategy's page of {level} has, in this order: {}",
        sections.join(", ")
    );
    vec![Problem::new(&page.file, line, wrong, to_do)]
}

fn strategies_without_a_chapter(names: impl Iterator<Item = String>, pages: &[Page]) -> Vec<Problem> {
    let missing = names.filter(|name| {
        let file = PathBuf::from(format!("book/src/{name}.md"));
        !pages.iter().any(|page| page.file == file)
    });
    missing
        .map(|name| {
            Problem::new(
                format!("book/src/{name}.md"),
                1,
                format!("the strategy {name} has no chapter"),
                "write it, and name it in SUMMARY.md; or the strategy is not on the trail",
            )
        })
        .collect()
}

fn pages_apart_from_the_summary(pages: &[Page], summary: &Page) -> Vec<Problem> {
    static LINK: LazyLock<Regex> = LazyLock::new(|| Regex::new(r"\]\(([^)#\s]+\.md)\)").unwrap());
    let mut problems = vec![];
    let mut listed = BTreeSet::new();
    for line in &summary.lines {
        for link in LINK.captures_iter(&line.text) {
            let file = without_dots(&Path::new("book/src").join(&link[1]));
            if !pages.iter().any(|page| page.file == file) {
                problems.push(Problem::new(
                    &summary.file,
                    line.number,
                    format!("there is no page {}", file.display()),
                    "write it, or take the line out",
                ));
            }
            listed.insert(file);
        }
    }
    for page in pages.iter().filter(|page| !listed.contains(&page.file)) {
        problems.push(Problem::new(
            &page.file,
            1,
            "SUMMARY.md does not name this page, so no reader finds it",
            "name it there, or delete it",
        ));
    }
    problems
}

fn measurements_in_prose(pages: &[Page], constants: &[(&str, &str)]) -> Vec<Problem> {
    static FIGURE: LazyLock<Regex> = LazyLock::new(|| {
        let units = "(?:ms|µs|s|seconds?|milliseconds?|req/s|requests (?:a|per) second|/s|MiB|MB)";
        Regex::new(&format!(r"\b\d[\d.,]*(?:\s?{units}\b|\s?%)")).unwrap()
    });
    let mut problems = vec![];
    for page in pages {
        for line in page.prose().filter(|line| !line.text.contains("{{#")) {
            for figure in FIGURE.find_iter(&line.text).map(|found| found.as_str()) {
                if !constants.iter().any(|(constant, _)| *constant == figure) {
                    problems.push(Problem::new(
                        &page.file,
                        line.number,
                        format!("{figure:?} looks like a measurement"),
                        "include it from book/generated/figures, or, if it is a constant, add it to CONSTANTS in tests/docs/rules.rs",
                    ));
                }
            }
        }
    }
    problems
}

/// A page must not include a table without measurements.
fn includes_without_measurements(pages: &[Page], read: impl Fn(&Path) -> Option<String>) -> Vec<Problem> {
    let mut problems = vec![];
    for page in pages {
        for Include { line, file, .. } in includes(page) {
            if read(&file).is_some_and(|text| text.starts_with(NOT_MEASURED)) {
                problems.push(Problem::new(
                    &page.file,
                    line,
                    format!("{} holds no measurements yet", file.display()),
                    "measure them: `make results`",
                ));
            }
        }
    }
    problems
}

fn unused_snippets(generated: &[PathBuf], pages: &[Page]) -> Vec<Problem> {
    let used: BTreeSet<PathBuf> = pages
        .iter()
        .flat_map(|page| includes(page).into_iter().map(|include| include.file))
        .collect();
    generated
        .iter()
        .filter(|file| !used.contains(*file))
        .map(|file| {
            Problem::new(
                file,
                1,
                "no page includes this snippet",
                "include it, or stop generating it",
            )
        })
        .collect()
}

fn from_the_root(file: &Path) -> Option<String> {
    fs::read_to_string(root().join(file)).ok()
}

#[test]
fn every_include_names_a_file_and_an_anchor() {
    none(includes_of_nothing(&pages::all(), from_the_root));
}

#[rstest::rstest]
#[case::file("{{#include ../gone.rs}}", "there is no file book/gone.rs")]
#[case::file_in_a_fence("```rust\n{{#include ../gone.rs:a}}\n```", "there is no file book/gone.rs")]
#[case::anchor("{{#include ../here.rs:gone}}", "has no `ANCHOR: gone`")]
#[case::end_of_the_anchor("{{#include ../here.rs:open}}", "has no `ANCHOR_END: open`")]
#[case::lines("{{#include ../here.rs:1:3}}", "change with the next edit")]
#[case::something_else("{{#playground ../here.rs}}", "no include that can be checked")]
fn an_include_of_nothing_is_found(#[case] text: &str, #[case] expected: &str) {
    let here = "// ANCHOR: whole\nfn main() {}\n// ANCHOR_END: whole\n// ANCHOR: open\n";
    let read = |file: &Path| (file == Path::new("book/here.rs")).then(|| here.to_owned());
    let page = |text| Page::new("book/src/page.md", text);

    none(includes_of_nothing(&[page("{{#include ../here.rs:whole}}")], read));
    let problems = includes_of_nothing(&[page(text)], read);
    let found: Vec<String> = problems.iter().map(Problem::to_string).collect();
    assert!(found.iter().any(|it| it.contains(expected)), "{found:?}");
}

#[test]
fn every_strategy_s_page_has_its_sections_in_order() {
    let pages = pages::book();
    let problems = strategies().flat_map(|(level, strategy)| {
        let file = PathBuf::from(format!("book/src/{}/{}.md", level.name, strategy.name));
        let page = pages.iter().find(|page| page.file == file);
        page.map_or(vec![], |page| headings_out_of_order(page, level.name))
    });
    none(problems.collect());
}

#[rstest::rstest]
#[case::another_order(&[1, 0, 2, 3, 4, 5, 6], "\"Predict\" stands where \"The test\" should")]
#[case::one_missing(&[0, 1, 2, 3, 4, 5], "\"Use it when\" is missing")]
#[case::one_twice(&[0, 1, 2, 3, 4, 5, 6, 6], "one too many")]
fn sections_out_of_order_are_found(#[case] order: &[usize], #[case] expected: &str) {
    let page = |order: &[usize]| {
        let headings = order
            .iter()
            .map(|&index| format!("## {}\n\ntext\n", sections("lv1")[index]));
        Page::new("page.md", &headings.collect::<String>())
    };
    none(headings_out_of_order(&page(&[0, 1, 2, 3, 4, 5, 6]), "lv1"));
    let found = only(headings_out_of_order(&page(order), "lv1"));
    assert!(found.contains(expected), "{found}");
}

#[test]
fn every_strategy_of_the_trail_has_a_chapter() {
    let names = strategies().map(|(level, strategy)| format!("{}/{}", level.name, strategy.name));
    none(strategies_without_a_chapter(names, &pages::book()));
}

#[test]
fn a_strategy_without_a_chapter_is_found() {
    let pages = [Page::new("book/src/lv1/one.md", "")];
    let names = ["lv1/one", "lv1/two"].into_iter().map(str::to_owned);
    let found = only(strategies_without_a_chapter(names, &pages));
    assert!(found.contains("lv1/two has no chapter"), "{found}");
}

#[test]
fn every_page_is_in_the_summary() {
    none(pages_apart_from_the_summary(&pages::book(), &pages::summary()));
}

#[test]
fn a_page_outside_the_summary_is_found_and_a_line_without_a_page_too() {
    let pages = [Page::new("book/src/a.md", ""), Page::new("book/src/lv1/b.md", "")];
    let summary = |text| Page::new("book/src/SUMMARY.md", text);

    none(pages_apart_from_the_summary(
        &pages,
        &summary("[a](a.md)\n- [b](lv1/b.md)"),
    ));
    let found = only(pages_apart_from_the_summary(&pages, &summary("[a](a.md)")));
    assert!(found.contains("b.md:1: SUMMARY.md does not name"), "{found}");
    let found = only(pages_apart_from_the_summary(
        &pages,
        &summary("[a](a.md) [b](./lv1/b.md)\n[c](c.md)"),
    ));
    assert!(
        found.contains("SUMMARY.md:2: there is no page book/src/c.md"),
        "{found}"
    );
}

#[test]
fn no_measurement_is_typed_into_the_prose() {
    none(measurements_in_prose(&pages::all(), CONSTANTS));
}

#[rstest::rstest]
#[case::milliseconds("It takes 12.5 ms.")]
#[case::microseconds("It takes 40µs.")]
#[case::seconds("It took 3 s")]
#[case::a_rate("It sells 1,200 req/s.")]
#[case::a_share("That is 40 % of it.")]
#[case::a_share_without_a_space("That is 40% of it.")]
#[case::memory("It needs 30 MiB.")]
#[case::in_words("It needs 3 seconds.")]
fn a_measurement_in_the_prose_is_found(#[case] text: &str) {
    let found = only(measurements_in_prose(&[Page::new("page.md", text)], &[]));
    assert!(found.contains("looks like a measurement"), "{found}");
}

#[test]
fn a_number_that_is_no_measurement_passes() {
    let text = "100 tickets, 1,000 buyers, LV.1's 3 strategies, after 5 s\n```text\n12 ms\n```\n{{#include 12 ms}}";
    none(measurements_in_prose(
        &[Page::new("page.md", text)],
        &[("5 s", "a constant")],
    ));
}

#[test]
fn every_table_that_a_page_includes_was_measured() {
    none(includes_without_measurements(&pages::all(), from_the_root));
}

#[test]
fn a_page_that_shows_no_measurements_is_found() {
    let page = Page::new("book/src/page.md", "Look:\n\n{{#include ../generated/figures/a.md}}");
    let figures = |text: &'static str| move |_: &Path| Some(text.to_owned());
    none(includes_without_measurements(
        std::slice::from_ref(&page),
        figures("| a | 1 |\n"),
    ));
    let found = only(includes_without_measurements(
        &[page],
        figures("not measured yet: `make results`\n"),
    ));
    assert!(
        found.starts_with("book/src/page.md:3:") && found.contains("book/generated/figures/a.md"),
        "{found}"
    );
}

#[test]
fn every_generated_snippet_is_used() {
    let generated: Vec<PathBuf> = pages::files_below(&root().join("book/generated"))
        .iter()
        .map(|file| file.strip_prefix(root()).unwrap().to_owned())
        .collect();
    none(unused_snippets(&generated, &pages::all()));
}

#[test]
fn an_unused_snippet_is_found() {
    let pages = [Page::new(
        "book/src/lv1/a.md",
        "{{#include ../../generated/traces/a.md}}",
    )];
    let generated = ["a", "b"].map(|name| PathBuf::from(format!("book/generated/traces/{name}.md")));
    let found = only(unused_snippets(&generated, &pages));
    assert!(found.starts_with("book/generated/traces/b.md:1:"), "{found}");
}
