//! The checkout that a command works on, and the programs that it runs there.

use std::{
    env,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::LazyLock,
};

use anyhow::{Context, bail};
use box_office::Level;

/// The root of the checkout that the current folder is in; if it is in none, of the one that this
/// command was built from.
pub(crate) fn root() -> &'static Path {
    static ROOT: LazyLock<PathBuf> = LazyLock::new(|| {
        let here = env::current_dir().unwrap_or_default();
        let around = here
            .ancestors()
            .find(|folder| folder.join("levels/box-office").is_dir());
        let built_from = Path::new(env!("CARGO_MANIFEST_DIR")).parent();
        around.or(built_from).unwrap_or(&here).to_owned()
    });
    &ROOT
}

/// `cargo test` of a level's test target in a checkout, with the environment of a shell: cargo sets variables for what it runs, and this
/// process may run under cargo. The words that follow go to the test runner.
pub(crate) fn cargo_test(checkout: &Path, level: &Level) -> Command {
    let mut command = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command
        .current_dir(checkout)
        .args(["test", "--quiet", "--package", level.package])
        .args(["--test", level.name, "--"])
        .env("RUST_BACKTRACE", "0")
        .stdin(Stdio::null());
    let set_by_cargo = env::vars_os().filter(|(name, _)| {
        let name = name.to_string_lossy();
        let is_setting = name == "CARGO_HOME" || name == "CARGO_TARGET_DIR" || name.starts_with("CARGO_BUILD_");
        name.starts_with("CARGO") && !is_setting
    });
    for (name, _) in set_by_cargo {
        command.env_remove(name);
    }
    command
}

/// Runs git in a checkout and returns what it printed.
///
/// # Errors
/// Git is missing, or it fails; with its error output.
pub(crate) fn git(checkout: &Path, words: &[&str]) -> anyhow::Result<String> {
    let output = Command::new("git")
        .arg("-C")
        .arg(checkout)
        .args(words)
        .output()
        .context("running git")?;
    if !output.status.success() {
        bail!(
            "git {}: {}",
            words.join(" "),
            String::from_utf8_lossy(&output.stderr).trim()
        );
    }
    Ok(String::from_utf8(output.stdout)?)
}
