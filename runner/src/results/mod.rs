//! Result files: what `--json` writes, the folder `results` keeps, and the tables of the book are made of. The names of the fields are stable.

pub mod bench;
mod disk;
mod metadata;
pub mod rush;

use std::{
    fs::File,
    io::{BufWriter, Write},
    path::Path,
};

use anyhow::Context;
pub use metadata::{Backend, Machine, RunMetadata};
use serde::Serialize;

/// Creates a result file. Commands do so before they measure: no run is wasted on a file that can't be written.
pub(crate) fn create(path: &Path) -> anyhow::Result<File> {
    File::create(path).with_context(|| format!("writing {}", path.display()))
}

/// Writes the results of a run to their file.
pub(crate) fn write(file: File, results: &impl Serialize) -> anyhow::Result<()> {
    let mut file = BufWriter::new(file);
    serde_json::to_writer_pretty(&mut file, results)?;
    writeln!(file)?;
    file.flush()?;
    Ok(())
}
