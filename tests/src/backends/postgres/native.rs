//! Postgres as a process of its own, with a data folder of its own.

use std::{
    fs::{self, File, OpenOptions},
    io::Write,
    net::Ipv4Addr,
    os::unix::{
        fs::{OpenOptionsExt, chown},
        process::CommandExt,
    },
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::{Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use anyhow::{Context, bail};
use rand::distr::{Alphanumeric, SampleString};
use rustix::process::{Pid, Signal, kill_process};
use sqlx::postgres::{PgConnectOptions, PgSslMode};

use super::{Durability, LOOK_AGAIN_AFTER, answers, settings};
use crate::backends::{
    free_port, keeper,
    native::{on_path, unprivileged_user, versioned},
    setting,
};

const BIN_VARIABLE: &str = "OVERSOLD_POSTGRES_BIN";
/// How long an orderly shutdown may take.
const ENDS_WITHIN: Duration = Duration::from_secs(30);
/// How often another port is tried when somebody was quicker.
const PORTS_TO_TRY: u32 = 3;

/// A server's data folder, and its process while it is up.
pub(super) struct Server {
    programs: PathBuf,
    /// Its log.
    folder: PathBuf,
    /// Its data: the same folder, or one in memory.
    data_folder: PathBuf,
    port: u16,
    password: String,
    durability: Durability,
    process: Mutex<Option<Child>>,
}

impl Server {
    /// Makes a data folder and starts a server on it.
    pub(super) async fn start(durability: Durability) -> anyhow::Result<Self> {
        let mut server = tokio::task::spawn_blocking(move || Self::initialise(durability)).await??;
        for tries_left in (0..PORTS_TO_TRY).rev() {
            server.port = free_port()?;
            match server.launch().await {
                Ok(()) => break,
                Err(_) if tries_left > 0 && server.log().contains("could not bind") => {}
                Err(error) => return Err(error),
            }
        }
        Ok(server)
    }

    fn initialise(durability: Durability) -> anyhow::Result<Self> {
        let programs = programs()?;
        let folder = keeper::folder("postgres")?;
        let in_memory = match durability {
            Durability::Fast => keeper::folder_in_memory("postgres")?,
            Durability::Durable => None,
        };
        let server = Self {
            data_folder: in_memory.unwrap_or_else(|| folder.clone()),
            folder,
            programs,
            port: 0,
            password: Alphanumeric.sample_string(&mut rand::rng(), 32),
            durability,
            process: Mutex::default(),
        };
        let password_file = server.folder.join("password");
        OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(&password_file)?
            .write_all(server.password.as_bytes())?;
        if let Some(user) = unprivileged_user() {
            for path in [&server.folder, &server.data_folder, &password_file] {
                chown(path, Some(user.uid), Some(user.gid))?;
            }
        }

        let made = server
            .command("initdb")?
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
            .arg(server.data())
            .status()?;
        fs::remove_file(&password_file)?;
        if !made.success() {
            bail!("initdb failed ({made}): {}", server.log());
        }
        Ok(server)
    }

    /// How to reach its database for administration.
    pub(super) fn admin(&self) -> PgConnectOptions {
        PgConnectOptions::new_without_pgpass()
            .host(&Ipv4Addr::LOCALHOST.to_string())
            .port(self.port)
            .username("postgres")
            .password(&self.password)
            .database("postgres")
            .ssl_mode(PgSslMode::Disable)
    }

    /// Starts the server, unless it is up, and waits until it answers.
    pub(super) async fn launch(&self) -> anyhow::Result<()> {
        {
            let mut process = self.process();
            if let Some(child) = process.as_mut()
                && child.try_wait()?.is_none()
            {
                return Ok(());
            }
            let child = self
                .command("postgres")?
                .arg("-D")
                .arg(self.data())
                .args(["-p", &self.port.to_string()])
                .args(["-c", "listen_addresses=127.0.0.1", "-c", "unix_socket_directories="])
                .args(settings(self.durability))
                .spawn()?;
            *process = Some(child);
        }
        answers(&self.admin(), async || match self.process().as_mut() {
            Some(child) => match child.try_wait()? {
                None => Ok(()),
                Some(status) => bail!("postgres ended ({status}): {}", self.log()),
            },
            None => bail!("postgres was stopped while it started"),
        })
        .await
    }

    /// Shuts it down in order, unless it is down.
    pub(super) async fn stop(&self) -> anyhow::Result<()> {
        // "Fast shutdown": clients are cut off, not waited for.
        self.send(Signal::INT)?;
        self.ended().await
    }

    /// Kills every process of it, unless it is down.
    pub(super) async fn kill(&self) -> anyhow::Result<()> {
        // Held still first, so that none of its processes is made or noticed to be missing between the look and the blow.
        self.send(Signal::STOP)?;
        if let Some(postmaster) = self.pid() {
            for pid in children(postmaster)? {
                // It may have ended by itself since.
                let _ = kill_process(pid, Signal::KILL);
            }
        }
        self.send(Signal::KILL)?;
        self.ended().await
    }

    /// The postmaster's pid, while it is up.
    pub(super) fn pid(&self) -> Option<u32> {
        self.process().as_ref().map(Child::id)
    }

    async fn ended(&self) -> anyhow::Result<()> {
        let began = Instant::now();
        loop {
            {
                let mut process = self.process();
                let up = match process.as_mut() {
                    None => false,
                    Some(child) => child.try_wait()?.is_none(),
                };
                if !up {
                    *process = None;
                    return Ok(());
                }
            }
            if began.elapsed() > ENDS_WITHIN {
                bail!("postgres did not end within {ENDS_WITHIN:?}: {}", self.log());
            }
            tokio::time::sleep(LOOK_AGAIN_AFTER).await;
        }
    }

    fn send(&self, signal: Signal) -> anyhow::Result<()> {
        // The lock keeps the child from being reaped, and so its pid from being somebody else's.
        let mut process = self.process();
        if let Some(child) = process.as_mut()
            && child.try_wait()?.is_none()
        {
            kill_process(Pid::from_child(child), signal)?;
        }
        Ok(())
    }

    fn process(&self) -> MutexGuard<'_, Option<Child>> {
        self.process.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn data(&self) -> PathBuf {
        self.data_folder.join("data")
    }

    /// One of Postgres's programs, as the user that it runs as, writing to the log.
    fn command(&self, program: &str) -> anyhow::Result<Command> {
        let log = File::options().create(true).append(true).open(self.log_file())?;
        let mut command = keeper::command(self.programs.join(program))?;
        command
            .current_dir(&self.folder)
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log);
        // Settings for clients, such as PGDATA or PGPORT, are for other servers than this one.
        for (variable, _) in std::env::vars_os() {
            if variable.to_string_lossy().starts_with("PG") {
                command.env_remove(variable);
            }
        }
        if let Some(user) = unprivileged_user() {
            command.uid(user.uid).gid(user.gid);
        }
        Ok(command)
    }

    fn log_file(&self) -> PathBuf {
        self.folder.join("log")
    }

    /// The end of its log.
    fn log(&self) -> String {
        const LINES: usize = 10;
        let log = fs::read_to_string(self.log_file()).unwrap_or_else(|error| error.to_string());
        let lines: Vec<&str> = log.lines().collect();
        lines[lines.len().saturating_sub(LINES)..].join("\n")
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // "Immediate shutdown": nothing is written, as nobody will read it. What goes wrong here, the keeper puts right.
        let _ = self.send(Signal::QUIT);
        let _ = self.send(Signal::CONT);
        if let Some(mut child) = self.process().take() {
            let _ = child.wait();
        }
        for folder in [&self.data_folder, &self.folder] {
            let _ = keeper::clear(folder);
        }
    }
}

/// The processes whose parent is this one.
fn children(parent: u32) -> anyhow::Result<Vec<Pid>> {
    let table = Command::new("ps").args(["-A", "-o", "ppid=", "-o", "pid="]).output()?;
    let table = String::from_utf8_lossy(&table.stdout).into_owned();
    let child = |line: &str| {
        let (ppid, pid) = line.trim().split_once(char::is_whitespace)?;
        let pid = pid.trim().parse().ok().and_then(Pid::from_raw)?;
        (ppid.parse() == Ok(parent)).then_some(pid)
    };
    Ok(table.lines().filter_map(child).collect())
}

/// One of the programs that come with Postgres, such as `pgbench`: beside `initdb`, or else on PATH.
pub fn program(name: &str) -> Option<PathBuf> {
    let beside = programs().ok().map(|folder| folder.join(name));
    beside.filter(|file| file.is_file()).or_else(|| on_path(name))
}

/// The folder that holds `initdb` and `postgres`.
fn programs() -> anyhow::Result<PathBuf> {
    let complete = |folder: &Path| {
        ["initdb", "postgres"]
            .iter()
            .all(|program| folder.join(program).is_file())
    };
    if let Some(folder) = setting(BIN_VARIABLE) {
        let folder = PathBuf::from(folder);
        if !complete(&folder) {
            bail!(
                "{BIN_VARIABLE} is `{}`, which does not hold initdb and postgres",
                folder.display()
            );
        }
        return Ok(folder);
    }
    // On PATH there may be links, to only some of the programs.
    let on_path = on_path("initdb").and_then(|initdb| Some(fs::canonicalize(initdb).ok()?.parent()?.to_owned()));
    on_path
        .into_iter()
        .chain(versioned("/usr/lib/postgresql", "", "bin"))
        .chain(versioned("/usr", "pgsql-", "bin"))
        .chain(versioned("/opt/homebrew/opt", "postgresql", "bin"))
        .chain(versioned("/usr/local/opt", "postgresql", "bin"))
        .chain(versioned("/Applications/Postgres.app/Contents/Versions", "", "bin"))
        .find(|folder| complete(folder))
        .context("initdb and postgres are neither on PATH nor in the usual places, such as /usr/lib/postgresql/*/bin")
}
