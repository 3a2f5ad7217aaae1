//! Redis as a native process.

use std::{fmt::Write as _, fs::OpenOptions, io::Write, os::unix::fs::OpenOptionsExt, path::PathBuf};

use super::{SERVICE, settings};
use crate::backends::native::{Home, Memory, Process, on_path, port_argument, programs};

const BIN_VARIABLE: &str = "OVERSOLD_REDIS_BIN";
const PROGRAM: &str = "redis-server";

/// Writes the settings file. The process is not started yet.
pub(super) fn prepare(password: &str) -> anyhow::Result<Process> {
    let on_path = on_path(PROGRAM).and_then(|program| Some(program.parent()?.to_owned()));
    // The folders of Homebrew.
    let usual = ["/opt/homebrew/bin", "/usr/local/bin"].map(PathBuf::from);
    let folder = programs(
        BIN_VARIABLE,
        &[PROGRAM],
        on_path.into_iter().chain(usual),
        "such as /usr/local/bin",
    )?;

    let home = Home::make(SERVICE.name, Memory::Never)?;
    // In a file, as other users can see arguments.
    let file = home.folder().join("redis.conf");
    let mut content = "bind 127.0.0.1\n".to_owned();
    for (setting, value) in settings(password) {
        writeln!(content, "{setting} \"{value}\"")?;
    }
    OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(&file)?
        .write_all(content.as_bytes())?;
    home.chown_to_server_user(&file)?;
    let arguments = vec![file.into_os_string()];
    Ok(Process::new(
        home,
        folder.join(PROGRAM),
        arguments,
        port_argument("--port"),
    ))
}
