//! A patch that no longer applies is made anew against the source as it is.

use std::{fs, io, path::Path, process::Command};

use anyhow::{Context, bail};

use crate::{Change, Mutant};

/// The outcome of [`refresh`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refreshed {
    /// The patch fits as it is.
    Unchanged,
    /// The patch file has been written anew.
    Written,
}

/// Makes the diff of a patch anew, if it does not apply to the working tree: the mistake is merged from
/// the last commit to which the patch still applies into the sources as they are.
///
/// # Errors
/// The patch applies to no commit of its sources, or the mistake and the change of the source touch the
/// same lines.
pub fn refresh(root: &Path, patch: &Path) -> anyhow::Result<Refreshed> {
    let mut mutant = Mutant::read(patch)?;
    if mutant.apply(|path| fs::read_to_string(root.join(path))).is_ok() {
        return Ok(Refreshed::Unchanged);
    }
    let (commit, mutated) = last_fit(root, &mutant)?;
    let merge = |(path, theirs): (String, String)| {
        let ancestor = committed(root, &commit, &path)?;
        let ours = fs::read_to_string(root.join(&path))?;
        match diffy::merge(&ancestor, &ours, &theirs) {
            Ok(merged) => Ok(Change::between(&path, &ours, &merged)),
            Err(merged) => bail!(
                "the mistake and a change of {path} touch the same lines:\n{}",
                conflicts(&merged)
            ),
        }
    };
    mutant.changes = mutated.into_iter().map(merge).collect::<anyhow::Result<_>>()?;
    fs::write(patch, mutant.content())?;
    Ok(Refreshed::Written)
}

/// The conflicting parts of a merge, with their markers.
fn conflicts(merged: &str) -> String {
    let parts = merged.split("<<<<<<<").skip(1);
    let parts = parts.map(|part| part.split_inclusive(">>>>>>> theirs\n").next().unwrap_or_default());
    parts.map(|part| format!("<<<<<<<{part}")).collect()
}

/// The newest commit to which the patch applies, and what its files are with the patch.
fn last_fit(root: &Path, mutant: &Mutant) -> anyhow::Result<(String, Vec<(String, String)>)> {
    let paths = mutant.changes.iter().map(|change| change.path.as_str());
    let commits = git(
        root,
        ["log", "--format=%H", "--max-count=200", "--"].into_iter().chain(paths),
    )?;
    let fits = |commit: &str| mutant.apply(|path| committed(root, commit, path)).ok();
    commits
        .lines()
        .find_map(|commit| fits(commit).map(|mutated| (commit.to_owned(), mutated)))
        .context("the patch applies to none of the last commits of its sources: write its diff by hand")
}

/// The content of a file in a commit.
pub(crate) fn committed(root: &Path, commit: &str, path: &str) -> io::Result<String> {
    git(root, ["show", &format!("{commit}:{path}")])
}

pub(crate) fn git<'a>(root: &Path, words: impl IntoIterator<Item = &'a str>) -> io::Result<String> {
    let output = Command::new("git").arg("-C").arg(root).args(words).output()?;
    if !output.status.success() {
        return Err(io::Error::other(
            String::from_utf8_lossy(&output.stderr).trim().to_owned(),
        ));
    }
    String::from_utf8(output.stdout).map_err(io::Error::other)
}
