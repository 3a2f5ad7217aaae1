//! Result files: what `--json` writes, the folder `results` keeps, and the tables of the book are made of. The names of the fields are stable.

pub mod bench;
mod disk;
mod metadata;
pub mod rush;

use std::{
    fs::{self, File},
    io::{ErrorKind, Write},
    path::{Path, PathBuf},
};

use anyhow::Context;
pub use metadata::{Backend, Machine, RunMetadata};
use serde::Serialize;

/// A result file that is open and not written yet. Dropping it leaves everything as it was: a run that fails leaves no file of its own,
/// and the results of an earlier one as they are.
pub(crate) struct ResultFile {
    path: PathBuf,
    file: File,
    /// Whether dropping it removes it.
    is_new: bool,
}

impl ResultFile {
    /// Opens the file. Commands do so before they measure: no run is wasted on a file that can't be written.
    pub(crate) fn open(path: &Path) -> anyhow::Result<Self> {
        let mut options = File::options();
        let (opened, is_new) = match options.write(true).create_new(true).open(path) {
            Err(why) if why.kind() == ErrorKind::AlreadyExists => (options.create_new(false).open(path), false),
            opened => (opened, true),
        };
        Ok(Self {
            path: path.to_owned(),
            file: opened.with_context(|| format!("writing {}", path.display()))?,
            is_new,
        })
    }

    /// Writes the results of a run.
    pub(crate) fn write(mut self, results: &impl Serialize) -> anyhow::Result<()> {
        let mut text = serde_json::to_vec_pretty(results)?;
        text.push(b'\n');
        // There is nothing to truncate in a pipe.
        if self.file.metadata()?.is_file() {
            self.file.set_len(0)?;
        }
        self.file.write_all(&text)?;
        self.is_new = false;
        Ok(())
    }
}

impl Drop for ResultFile {
    fn drop(&mut self) {
        if self.is_new {
            let _ = fs::remove_file(&self.path);
        }
    }
}
