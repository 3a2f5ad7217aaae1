//! The patches of the levels: each applies, and plants one mistake.

#![allow(clippy::unwrap_used)]

use std::{
    collections::BTreeMap,
    fs, io,
    path::{Path, PathBuf},
    process::Command,
    sync::atomic::{AtomicUsize, Ordering},
};

use mutants::{Change, Mutant, Refreshed, refresh};

/// The number of lines that one mistake may take, removed and added ones together.
const MAX_LINES: usize = 10;

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).ancestors().nth(2).unwrap()
}

/// Every mutant of every level, with the folder of its level.
fn all() -> Vec<(PathBuf, Mutant)> {
    let mut levels: Vec<_> = fs::read_dir(root().join("levels"))
        .unwrap()
        .map(|level| level.unwrap().path())
        .collect();
    levels.retain(|level| level.join("mutants").is_dir());
    let of = |level: PathBuf| {
        let mutants = Mutant::read_all(&level.join("mutants")).unwrap();
        mutants
            .into_iter()
            .map(move |mutant| (level.clone(), mutant))
            .collect::<Vec<_>>()
    };
    levels.into_iter().flat_map(of).collect()
}

/// Fails with all of them.
#[track_caller]
fn none(problems: Vec<String>) {
    assert!(problems.is_empty(), "\n{}\n", problems.join("\n"));
}

#[test]
fn every_mutant_applies() {
    let mutants = all();
    assert!(mutants.len() >= 36, "{} mutants", mutants.len());
    let stale = |(level, mutant): (PathBuf, Mutant)| {
        let stale = mutant.apply(|path| fs::read_to_string(root().join(path))).err()?;
        let patch = level.join("mutants").join(&mutant.name).with_extension("patch");
        Some(format!(
            "{}: {stale}\n    cargo run -p oversold -- source --refresh",
            patch.display()
        ))
    };
    none(mutants.into_iter().filter_map(stale).collect());
}

#[test]
fn every_mutant_plants_one_mistake() {
    let too_large = |(_, mutant): (PathBuf, Mutant)| {
        let lines = mutant.changed_lines();
        let problem = match lines {
            0 => "changes nothing".to_owned(),
            1..=MAX_LINES => return None,
            _ => format!("changes {lines} lines, and one mistake takes at most {MAX_LINES}"),
        };
        Some(format!("{} {problem}:\n{}", mutant.name, mutant.content()))
    };
    none(all().into_iter().filter_map(too_large).collect());
}

#[test]
fn every_mutant_is_of_a_strategy_and_changes_its_own_level_only() {
    let astray = |(level, mutant): (PathBuf, Mutant)| {
        let source = level
            .join("src")
            .join(mutant.strategy.replace('-', "_"))
            .with_extension("rs");
        if !source.is_file() {
            return Some(format!("{}: there is no strategy {:?}", mutant.name, mutant.strategy));
        }
        let src = level.strip_prefix(root()).unwrap().join("src");
        let elsewhere = mutant
            .changes
            .iter()
            .find(|change| !Path::new(&change.path).starts_with(&src));
        elsewhere.map(|change| format!("{} changes {}", mutant.name, change.path))
    };
    none(all().into_iter().filter_map(astray).collect());
}

/// Readers and `oversold exercise` apply patches with git.
#[test]
fn git_applies_what_we_apply() {
    for (level, mutant) in all() {
        let patch = level.join("mutants").join(&mutant.name).with_extension("patch");
        let git = Command::new("git")
            .args(["apply", "--check"])
            .arg(&patch)
            .current_dir(root())
            .output()
            .unwrap();
        assert!(
            git.status.success(),
            "{}: {}",
            mutant.name,
            String::from_utf8_lossy(&git.stderr)
        );
    }
}

const PATCH: &str = "\
The second line is wrong.

Strategy: plain
Why: it looks right
Caught by: nothing

--- a/levels/lv0/src/plain.rs
+++ b/levels/lv0/src/plain.rs
@@ -1,3 +1,3 @@
 one
-two
+2
 three
";

fn parsed() -> Mutant {
    Mutant::parse("wrong", PATCH).unwrap()
}

#[test]
fn a_patch_is_read_as_it_is_written() {
    let mutant = parsed();
    assert_eq!(
        (mutant.summary.as_str(), mutant.strategy.as_str()),
        ("The second line is wrong.", "plain")
    );
    assert_eq!(mutant.changes.len(), 1);
    assert_eq!(mutant.changed_lines(), 2);
    assert_eq!(mutant.content(), PATCH);
}

#[test]
fn what_a_patch_lacks_is_named() {
    let lacks = |text: &str| Mutant::parse("wrong", text).unwrap_err().to_string();
    assert!(lacks("Only words.\n").contains("there is no diff"));
    assert!(lacks(&PATCH.replace("Why:", "Because:")).contains("`Why:`"));
    assert!(lacks(&PATCH.replace("The second line is wrong.", "")).contains("the first line"));
    assert!(lacks(&PATCH.replace("+++ b/", "+++ ")).contains("`+++ b/"));
}

#[test]
fn a_hunk_that_does_not_fit_is_named() {
    let sources = BTreeMap::from([("levels/lv0/src/plain.rs", "one\nzwei\nthree\n")]);
    let read = |path: &str| {
        sources
            .get(path)
            .map(|text| (*text).to_owned())
            .ok_or(io::ErrorKind::NotFound.into())
    };
    let stale = parsed().apply(read).unwrap_err();
    assert_eq!(stale.path, "levels/lv0/src/plain.rs");
    assert!(stale.to_string().contains("hunk"), "{stale}");
}

#[test]
fn lines_that_moved_do_not_matter() {
    let source = "zero\nzero and a half\none\ntwo\nthree\n";
    let mutated = parsed().apply(|_| Ok(source.to_owned())).unwrap();
    assert_eq!(mutated[0].1, "zero\nzero and a half\none\n2\nthree\n");
}

/// A repository in cargo's folder for tests with the sources `before` committed and `after` in the working tree.
fn repository(before: &str, after: &str) -> (PathBuf, PathBuf) {
    static REPOSITORIES: AtomicUsize = AtomicUsize::new(0);
    let number = REPOSITORIES.fetch_add(1, Ordering::Relaxed);
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("repository-{number}"));
    if folder.exists() {
        fs::remove_dir_all(&folder).unwrap();
    }
    let source = folder.join("levels/lv0/src/plain.rs");
    let patch = folder.join("wrong.patch");
    fs::create_dir_all(source.parent().unwrap()).unwrap();
    fs::write(&source, before).unwrap();
    fs::write(&patch, PATCH).unwrap();
    for words in [
        &["init", "--quiet"][..],
        &["add", "."],
        &["commit", "--quiet", "--message", "as it was"],
    ] {
        let mut git = Command::new("git");
        git.args(["-c", "user.name=test", "-c", "user.email=test@localhost"])
            .args(words);
        assert!(git.current_dir(&folder).status().unwrap().success());
    }
    fs::write(&source, after).unwrap();
    (folder, patch)
}

#[test]
fn a_stale_patch_is_refreshed_against_the_source_as_it_is() {
    let (folder, patch) = repository("one\ntwo\nthree\n4\n5\n6\n", "eins\ntwo\nthree\n4\n5\n6\n");
    // The first line is context of the hunk: the patch does not apply any more.
    let merged = refresh(&folder, &patch);
    // Adjacent lines conflict, and the refusal shows both sides.
    let conflict = merged.unwrap_err().to_string();
    assert!(conflict.contains("<<<<<<<") && conflict.contains("eins"), "{conflict}");

    let (folder, patch) = repository("one\ntwo\nthree\nfour\n", "one\ntwo\nthree\nfour\n");
    assert_eq!(refresh(&folder, &patch).unwrap(), Refreshed::Unchanged);
}

#[test]
fn a_context_line_that_changed_is_taken_over() {
    let before = "use a;\n\none\ntwo\nthree\n";
    let change = Change::between("levels/lv0/src/plain.rs", before, &before.replace("two", "2"));
    let (folder, patch) = repository(before, &before.replace("use a;", "use b;"));
    let text = PATCH.split("--- a/").next().unwrap();
    fs::write(&patch, format!("{text}{}", change.diff)).unwrap();
    assert_eq!(refresh(&folder, &patch).unwrap(), Refreshed::Written);
    let mutant = Mutant::read(&patch).unwrap();
    let mutated = mutant.apply(|path| fs::read_to_string(folder.join(path))).unwrap();
    assert_eq!(mutated[0].1, "use b;\n\none\n2\nthree\n");
}
