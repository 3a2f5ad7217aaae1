//! Mutants: strategies with one planted mistake each, kept as patches against the correct source.
//!
//! A mutant is the file `levels/LEVEL/mutants/NAME.patch`. It begins with text: one line that says what
//! is wrong, then `Strategy:`, `Why:` (why somebody would write it), `Caught by:` and, where there is
//! one, `In Spring:`. A unified diff follows, with paths from the root of the repository, so `git apply`
//! takes the file as it is.
//!
//! The level's build script calls [`build()`], which compiles every mutant into the level as a module.

mod build;
mod refresh;

use std::{fmt, fs, io, path::Path};

use anyhow::{Context, bail, ensure};
use diffy::Patch;

pub use build::{WITHOUT_MUTANTS, build};
pub use refresh::{Refreshed, refresh};

/// A strategy with one planted mistake, as its patch describes it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mutant {
    /// The name of the patch, without its extension: `overtaken-is-sold-out`.
    pub name: String,
    /// The mistake, in one line.
    pub summary: String,
    /// The name of the strategy that it is a mutant of: `pessimistic`.
    pub strategy: String,
    /// The whole text before the diff.
    pub text: String,
    /// The changes, one entry a file.
    pub changes: Vec<Change>,
}

/// What a mutant changes in one file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Change {
    /// The path of the file from the root of the repository: `levels/lv2-db-lock/src/mutex.rs`.
    pub path: String,
    /// The unified diff of that file.
    pub diff: String,
}

/// The reason why a patch cannot be applied.
#[derive(Debug)]
pub struct Stale {
    /// The file that has changed.
    pub path: String,
    /// The reason: which hunk does not fit, or why the file cannot be read.
    pub reason: String,
}

impl fmt::Display for Stale {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "it does not apply to {}: {}", self.path, self.reason)
    }
}

impl std::error::Error for Stale {}

/// What must stand in a patch's text, each at the beginning of a line.
const FIELDS: [&str; 3] = ["Strategy:", "Why:", "Caught by:"];

impl Mutant {
    /// Reads a patch file.
    ///
    /// # Errors
    /// The file cannot be read, or it lacks a part.
    pub fn read(path: &Path) -> anyhow::Result<Self> {
        let read = || {
            let name = path
                .file_stem()
                .and_then(|name| name.to_str())
                .context("no file name")?;
            Self::parse(name, &fs::read_to_string(path)?)
        };
        read().with_context(|| path.display().to_string())
    }

    /// Reads the text of a patch file.
    ///
    /// # Errors
    /// It lacks a part of the text, or has no diff.
    pub fn parse(name: &str, content: &str) -> anyhow::Result<Self> {
        let (text, diffs) = match content.find("\n--- ") {
            Some(end) => content.split_at(end + 1),
            None => bail!("there is no diff, which begins with a line `--- a/levels/…`"),
        };
        let summary = text.lines().next().unwrap_or_default().trim();
        ensure!(
            !summary.is_empty(),
            "the first line says what is wrong, and it is empty"
        );
        for field in FIELDS {
            ensure!(
                text.lines().any(|line| line.starts_with(field)),
                "no line begins with `{field}`"
            );
        }
        let strategy = text.lines().find_map(|line| line.strip_prefix("Strategy:"));
        let changes = diffs
            .split_inclusive('\n')
            .fold(vec![], |mut files: Vec<String>, line| {
                match files.last_mut() {
                    Some(file) if !line.starts_with("--- ") => file.push_str(line),
                    _ => files.push(line.to_owned()),
                }
                files
            });
        Ok(Self {
            name: name.to_owned(),
            summary: summary.to_owned(),
            strategy: strategy.unwrap_or_default().trim().to_owned(),
            text: text.trim_end().to_owned(),
            changes: changes.into_iter().map(Change::parse).collect::<anyhow::Result<_>>()?,
        })
    }

    /// Reads all patches of a folder, in the order of their names.
    ///
    /// # Errors
    /// The folder or a patch in it cannot be read.
    pub fn read_all(folder: &Path) -> anyhow::Result<Vec<Self>> {
        let entries = fs::read_dir(folder).with_context(|| folder.display().to_string())?;
        let mut paths = entries.map(|entry| Ok(entry?.path())).collect::<io::Result<Vec<_>>>()?;
        paths.retain(|path| path.extension().is_some_and(|extension| extension == "patch"));
        paths.sort();
        paths.iter().map(|path| Self::read(path)).collect()
    }

    /// Applies the patch to the sources that `read` returns by path. Returns each changed file's path
    /// and new content.
    ///
    /// # Errors
    /// [`Stale`] if a file cannot be read, or a hunk does not fit.
    pub fn apply(&self, read: impl Fn(&str) -> io::Result<String>) -> Result<Vec<(String, String)>, Stale> {
        let apply = |change: &Change| {
            let stale = |reason: String| Stale {
                path: change.path.clone(),
                reason,
            };
            let source = read(&change.path).map_err(|why| stale(why.to_string()))?;
            let patch = Patch::from_str(&change.diff).map_err(|why| stale(why.to_string()))?;
            let mutated = diffy::apply(&source, &patch).map_err(|why| stale(why.to_string()))?;
            Ok((change.path.clone(), mutated))
        };
        self.changes.iter().map(apply).collect()
    }

    /// The number of removed and added lines.
    pub fn changed_lines(&self) -> usize {
        let lines = self.changes.iter().flat_map(|change| change.diff.lines().skip(2));
        lines.filter(|line| line.starts_with(['+', '-'])).count()
    }

    /// The content of the patch file.
    pub fn content(&self) -> String {
        let diffs: String = self.changes.iter().map(|change| change.diff.as_str()).collect();
        format!("{}\n\n{diffs}", self.text)
    }
}

impl Change {
    fn parse(diff: String) -> anyhow::Result<Self> {
        let path = diff.lines().nth(1).and_then(|line| line.strip_prefix("+++ b/"));
        let path = path
            .context("the second line of a diff is `+++ b/levels/…`")?
            .trim()
            .to_owned();
        Patch::from_str(&diff).with_context(|| format!("the diff of {path}"))?;
        Ok(Self { path, diff })
    }

    /// The change from one content of a file to another.
    pub fn between(path: &str, before: &str, after: &str) -> Self {
        let patch = diffy::create_patch(before, after).to_string();
        let hunks = patch.find("@@").map_or("", |start| &patch[start..]);
        Self {
            path: path.to_owned(),
            diff: format!("--- a/{path}\n+++ b/{path}\n{hunks}"),
        }
    }
}
