//! Where a figure was measured.

use std::{env, fs, process::Command, thread::available_parallelism};

use serde::Serialize;

/// The machine, as it is written beside every figure.
#[derive(Serialize)]
pub(crate) struct Machine {
    system: String,
    processor: Option<String>,
    cores: usize,
    memory_mib: Option<u64>,
}

impl Machine {
    /// This one.
    pub(crate) fn this() -> Self {
        Self {
            system: format!("{} {}", std::env::consts::OS, std::env::consts::ARCH),
            processor: proc_value("/proc/cpuinfo", "model name"),
            cores: available_parallelism().map_or(1, usize::from),
            memory_mib: proc_value("/proc/meminfo", "MemTotal")
                .and_then(|value| value.split_whitespace().next()?.parse::<u64>().ok())
                .map(|kib| kib / 1024),
        }
    }
}

/// The value after `name:`, where Linux tells it.
fn proc_value(file: &str, name: &str) -> Option<String> {
    let text = fs::read_to_string(file).ok()?;
    let line = text.lines().find(|line| line.starts_with(name))?;
    Some(line.split_once(':')?.1.trim().to_owned())
}

/// The commit that is checked out, and `+` if something was changed since, but for the figures themselves and what is made of them.
/// `None` outside a checkout.
pub(crate) fn commit() -> Option<String> {
    let git = |arguments: &[&str]| {
        let output = Command::new("git").args(arguments).output().ok()?;
        output
            .status
            .success()
            .then(|| String::from_utf8_lossy(&output.stdout).trim().to_owned())
    };
    let commit = git(&["rev-parse", "--short=12", "HEAD"])?;
    let code = [":(top)", ":(top,exclude)results", ":(top,exclude)book/generated"];
    let changed = !git(&[&["status", "--porcelain", "--untracked-files=no", "--"], &code[..]].concat())?.is_empty();
    Some(format!("{commit}{}", if changed { "+" } else { "" }))
}

/// The command line of this process, as it is written beside every figure.
pub(crate) fn this_command() -> String {
    env::args()
        .skip(1)
        .fold("oversold".to_owned(), |command, word| command + " " + &word)
}
