//! External programs that commands run.

use std::{fmt, path::PathBuf, process::Stdio};

use anyhow::{Context, bail};
use harness::backends::reaper;

/// A program that is not on this machine.
#[derive(Debug)]
pub(crate) struct ToolMissing {
    name: &'static str,
    install: &'static str,
}

impl fmt::Display for ToolMissing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "there is no {}; to get it: {}", self.name, self.install)
    }
}

impl std::error::Error for ToolMissing {}

/// The file of a program, or how to install it.
pub(crate) fn needed(file: Option<PathBuf>, name: &'static str, install: &'static str) -> Result<PathBuf, ToolMissing> {
    file.ok_or(ToolMissing { name, install })
}

/// A command for this program. Its process ends when this one does.
pub(crate) fn command(file: &PathBuf) -> anyhow::Result<tokio::process::Command> {
    let mut command = tokio::process::Command::from(reaper::command(file)?);
    command.stdin(Stdio::null()).kill_on_drop(true);
    Ok(command)
}

/// Runs a program to its end, and returns its standard output.
pub(crate) async fn output(command: &mut tokio::process::Command, name: &str) -> anyhow::Result<String> {
    let output = command.output().await.with_context(|| format!("running {name}"))?;
    if !output.status.success() {
        let stderr = String::from_utf8_lossy(&output.stderr);
        bail!("{name} failed ({}): {}", output.status, stderr.trim());
    }
    Ok(String::from_utf8(output.stdout)?)
}
