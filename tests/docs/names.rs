//! Every name in inline code that looks like one of this repository's exists: functions and settings, items of Rust, and files.

use std::{collections::BTreeSet, fs, path::Path, sync::LazyLock};

use regex::Regex;

use crate::{
    Problem, none, only,
    pages::{self, Page},
    root,
};

/// The page that says which test each claim rests on.
const CLAIMS: &str = "book/src/start/claims.md";

/// Names that are not this repository's.
const FOREIGN: &[&str] = &["sqlx::migrate!", "clock_gettime", "pg_test_fsync", "tcp_retries2"];

/// What is there.
struct Known {
    words: BTreeSet<String>,
    files: Vec<String>,
    /// The names of functions, among which are the tests.
    functions: BTreeSet<String>,
}

impl Known {
    fn here() -> Self {
        static WORD: LazyLock<Regex> = LazyLock::new(|| Regex::new(r"\w+").unwrap());
        static FUNCTION: LazyLock<Regex> = LazyLock::new(|| Regex::new(r"\bfn (\w+)").unwrap());
        let docs = root().join("tests/docs");
        let files = ["levels", "tests", "runner", "load", "infra"]
            .into_iter()
            .flat_map(|folder| pages::files_below(&root().join(folder)))
            // Without these files, which contain wrong names.
            .filter(|file| !file.starts_with(&docs));
        let mut known = Self {
            words: BTreeSet::new(),
            files: vec![],
            functions: BTreeSet::new(),
        };
        for file in files {
            // What is no text names nothing.
            let Ok(text) = fs::read_to_string(&file) else { continue };
            known
                .words
                .extend(WORD.find_iter(&text).map(|word| word.as_str().to_owned()));
            known
                .functions
                .extend(FUNCTION.captures_iter(&text).map(|found| found[1].to_owned()));
            known
                .files
                .push(format!("/{}", file.strip_prefix(root()).unwrap().display()));
        }
        known
    }

    fn objection(&self, page: &Path, code: &str) -> Option<&'static str> {
        static SNAKE: LazyLock<Regex> =
            LazyLock::new(|| Regex::new(r"^([a-z][a-z0-9]*(?:_[a-z0-9]+)+)(?:\(.*\))?$").unwrap());
        static ITEM: LazyLock<Regex> = LazyLock::new(|| Regex::new(r"^\w+(?:::\w+)*::(\w+)(?:\(.*\))?!?$").unwrap());
        static FILE: LazyLock<Regex> = LazyLock::new(|| Regex::new(r"^[\w/-]+\.(?:rs|lua|sql|sh|js)$").unwrap());
        if FOREIGN.contains(&code) {
            return None;
        }
        if let Some(name) = SNAKE.captures(code) {
            if page == Path::new(CLAIMS) {
                return (!self.functions.contains(&name[1])).then_some("no test has this name");
            }
            // Shorter ones are mostly settings, and not all of them are set here.
            let is_a_sentence = name[1].matches('_').count() >= 3;
            return (is_a_sentence && !self.words.contains(&name[1])).then_some("nothing has this name");
        }
        if let Some(name) = ITEM.captures(code) {
            return (!self.words.contains(&name[1])).then_some("nothing has this name");
        }
        let is_there = || self.files.iter().any(|file| file.ends_with(&format!("/{code}")));
        (FILE.is_match(code) && !is_there()).then_some("there is no such file")
    }
}

fn unknown_names(pages: &[Page], known: &Known) -> Vec<Problem> {
    let mut problems = vec![];
    for page in pages {
        for (line, code) in page.inline_code() {
            if let Some(wrong) = known.objection(&page.file, code) {
                let to_do = "take the name that it has now, or add it to FOREIGN in tests/docs/names.rs";
                problems.push(Problem::new(&page.file, line, format!("`{code}`: {wrong}"), to_do));
            }
        }
    }
    problems
}

#[test]
fn every_name_on_a_page_is_there() {
    none(unknown_names(&pages::all(), &Known::here()));
}

#[rstest::rstest]
#[case::a_test("book/src/page.md", "`a_test_of_another_name`")]
#[case::an_item("book/src/page.md", "`Tokens::Growing`")]
#[case::a_method("book/src/page.md", "`RLock::seize(name)`")]
#[case::a_file("book/src/page.md", "`lock/holding.rs`")]
#[case::a_setting_is_no_test(CLAIMS, "`lock_timeout`")]
fn a_name_that_is_not_there_is_found(#[case] file: &str, #[case] text: &str) {
    let found = only(unknown_names(&[Page::new(file, text)], &Known::here()));
    assert!(found.starts_with(file), "{found}");
}

#[test]
fn a_name_that_is_there_passes() {
    let text = "`a_sale_keeps_its_guarantee`, `lock_timeout`, `FencingTokens::Monotonic`, `lock/guard.rs`, `tokio::spawn`, `acquire(name, owner)`";
    none(unknown_names(&[Page::new("book/src/page.md", text)], &Known::here()));
}
