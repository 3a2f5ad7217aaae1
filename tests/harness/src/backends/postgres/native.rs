//! Postgres as a native process with its own data folder.

use std::{
    fs::{self, OpenOptions},
    io::Write,
    os::unix::fs::OpenOptionsExt,
    path::PathBuf,
};

use anyhow::bail;
use rustix::process::Signal;

use super::{Durability, SERVICE, settings};
use crate::backends::native::{Home, Memory, Process, on_path, port_argument, programs, versioned};

const BIN_VARIABLE: &str = "OVERSOLD_POSTGRES_BIN";

/// Creates a data folder whose superuser has this password. The process is not started yet.
pub(super) fn prepare(durability: Durability, password: &str) -> anyhow::Result<Process> {
    let programs = folder()?;
    let memory = match durability {
        Durability::Fast => Memory::IfThereIsRoom,
        Durability::Durable => Memory::Never,
    };
    let home = Home::make(SERVICE.name, memory)?;
    let data = home.data_folder().join("data");
    let password_file = home.folder().join("password");
    OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(&password_file)?
        .write_all(password.as_bytes())?;
    home.chown_to_server_user(&password_file)?;

    let made = home
        .command(&programs.join("initdb"))?
        .args([
            "--username=postgres",
            "--auth=password",
            "--encoding=UTF8",
            "--locale=C",
            "--no-sync",
        ])
        .arg("--pwfile")
        .arg(&password_file)
        .arg("--pgdata")
        .arg(&data)
        .status()?;
    fs::remove_file(&password_file)?;
    if !made.success() {
        bail!("initdb failed ({made}): {}", home.log());
    }

    let mut arguments = vec!["-D".into(), data.into_os_string()];
    arguments.extend(["-c", "listen_addresses=127.0.0.1", "-c", "unix_socket_directories="].map(Into::into));
    arguments.extend(settings(durability).into_iter().map(Into::into));
    Ok(
        Process::new(home, programs.join("postgres"), arguments, port_argument("-p"))
            // "Immediate shutdown": nothing is written, as the data is discarded.
            .drop_signal(Signal::QUIT),
    )
}

/// Finds a program of the Postgres distribution, such as `pgbench`: in the folder of `initdb`, or
/// else on `PATH`.
pub fn program(name: &str) -> Option<PathBuf> {
    let beside = folder().ok().map(|folder| folder.join(name));
    beside.filter(|file| file.is_file()).or_else(|| on_path(name))
}

/// Finds the folder of `initdb` and `postgres`.
fn folder() -> anyhow::Result<PathBuf> {
    // PATH may contain links to only some of the programs.
    let on_path = on_path("initdb").and_then(|initdb| Some(fs::canonicalize(initdb).ok()?.parent()?.to_owned()));
    let usual = on_path
        .into_iter()
        .chain(versioned("/usr/lib/postgresql", "", "bin"))
        .chain(versioned("/usr", "pgsql-", "bin"))
        .chain(versioned("/opt/homebrew/opt", "postgresql", "bin"))
        .chain(versioned("/usr/local/opt", "postgresql", "bin"))
        .chain(versioned("/Applications/Postgres.app/Contents/Versions", "", "bin"));
    programs(
        BIN_VARIABLE,
        &["initdb", "postgres"],
        usual,
        "such as /usr/lib/postgresql/*/bin",
    )
}
