//! The generated snippets of the book: the tests make each again and compare it with the committed file; `OVERSOLD_BLESS=1` writes them.

mod ablations;
mod measurements;
mod red;
mod road;
mod tables;
mod traces;

use std::{
    collections::BTreeMap,
    env, fs,
    path::{Path, PathBuf},
};

use similar::TextDiff;

use crate::{Problem, none, only, pages, root};
pub(crate) use measurements::NOT_MEASURED;

/// Set by `make generated`.
const BLESS: &str = "OVERSOLD_BLESS";

/// The folder of the snippets, from the root of the repository.
const FOLDER: &str = "book/generated";

/// Files of the folder, and their text.
type Snippets = BTreeMap<PathBuf, String>;

/// All snippets that are the same on every machine.
fn snippets() -> Snippets {
    traces::all()
        .chain(measurements::all())
        .chain(ablations::all())
        .map(|(name, text)| (PathBuf::from(name), text.trim_end().to_owned() + "\n"))
        .collect()
}

/// The text of a file, from the root of the repository.
fn source(path: &str) -> String {
    fs::read_to_string(root().join(path)).unwrap_or_else(|error| panic!("{path}: {error}"))
}

/// Compares the snippets with the committed files: a problem for each that is missing, out of date, or not generated any more.
fn differences(snippets: &Snippets, committed: &Snippets) -> Vec<Problem> {
    let to_do = "`make generated` writes it anew: read what has changed, then commit it";
    let mut problems = vec![];
    for (file, text) in snippets {
        let shown = Path::new(FOLDER).join(file);
        match committed.get(file) {
            None => problems.push(Problem::new(shown, 1, "this snippet is not written yet", to_do)),
            Some(old) if old != text => {
                let line = old
                    .lines()
                    .zip(text.lines())
                    .take_while(|(old, new)| old == new)
                    .count()
                    + 1;
                let diff = TextDiff::from_lines(old, text);
                let diff = diff.unified_diff().context_radius(1).to_string();
                problems.push(Problem::new(
                    shown,
                    line,
                    format!("this is out of date:\n{diff}"),
                    to_do,
                ));
            }
            Some(_) => {}
        }
    }
    for file in committed.keys().filter(|file| !snippets.contains_key(*file)) {
        let to_do = "`make generated` deletes it";
        problems.push(Problem::new(
            Path::new(FOLDER).join(file),
            1,
            "nothing makes this snippet",
            to_do,
        ));
    }
    problems
}

fn committed() -> Snippets {
    let folder = root().join(FOLDER);
    let files = pages::files_below(&folder).into_iter();
    files
        .map(|file| {
            let text = fs::read_to_string(&file).unwrap();
            (file.strip_prefix(&folder).unwrap().to_owned(), text)
        })
        .collect()
}

fn write(snippets: &Snippets) {
    let folder = root().join(FOLDER);
    for file in committed().keys().filter(|file| !snippets.contains_key(*file)) {
        fs::remove_file(folder.join(file)).unwrap();
    }
    for (file, text) in snippets {
        let file = folder.join(file);
        fs::create_dir_all(file.parent().unwrap()).unwrap();
        fs::write(file, text).unwrap();
    }
}

#[test]
fn the_generated_snippets_are_up_to_date() {
    let mut snippets = snippets();
    let mut committed = committed();
    if env::var_os(BLESS).is_some() {
        snippets.extend(red::record_all());
        write(&snippets);
        return;
    }
    // Recorded runs differ from one another, so they are checked by what they report.
    let mut problems = red::check_all(&mut committed);
    problems.extend(differences(&snippets, &committed));
    none(problems);
}

#[test]
fn a_snippet_that_is_missing_or_out_of_date_or_left_behind_is_found() {
    let snippets = |files: &[(&str, &str)]| -> Snippets {
        let owned = files
            .iter()
            .map(|(file, text)| (PathBuf::from(file), (*text).to_owned()));
        owned.collect()
    };
    let made = snippets(&[("a.md", "1\n2\n")]);

    none(differences(&made, &made));
    let found = only(differences(&made, &snippets(&[])));
    assert!(found.contains("a.md:1: this snippet is not written yet"), "{found}");
    let found = only(differences(&made, &snippets(&[("a.md", "1\n3\n")])));
    assert!(
        found.contains("a.md:2: this is out of date") && found.contains("-3\n+2"),
        "{found}"
    );
    let found = only(differences(&snippets(&[]), &made));
    assert!(found.contains("nothing makes this snippet"), "{found}");
}
