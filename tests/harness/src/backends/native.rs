//! Native servers: where their programs are, which user runs them, and a process that can be
//! stopped and started.

use std::{
    env,
    ffi::OsString,
    fs::{self, File},
    net::Ipv4Addr,
    os::unix::{fs::chown, process::CommandExt},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::{LazyLock, Mutex, MutexGuard, OnceLock, PoisonError},
    time::{Duration, Instant},
};

use anyhow::bail;
use rustix::process::{Pid, Signal, kill_process};

use super::{free_port, is_port_taken, reaper, setting};

/// Time limit of a graceful shutdown.
const SHUTDOWN_TIMEOUT: Duration = Duration::from_secs(30);
const POLL_INTERVAL: Duration = Duration::from_millis(5);

/// Whether a server's data may be in memory, for data that is discarded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Memory {
    IfThereIsRoom,
    Never,
}

/// The folders of a server. Dropping it removes them.
pub(super) struct Home {
    /// The folder of its log.
    folder: PathBuf,
    /// The folder of its data: the same, or one in memory.
    data_folder: PathBuf,
}

impl Home {
    pub(super) fn make(service: &str, memory: Memory) -> anyhow::Result<Self> {
        let folder = reaper::folder(service)?;
        let in_memory = match memory {
            Memory::IfThereIsRoom => reaper::folder_in_memory(service)?,
            Memory::Never => None,
        };
        let home = Self {
            data_folder: in_memory.unwrap_or_else(|| folder.clone()),
            folder,
        };
        home.chown_to_server_user(&home.folder)?;
        home.chown_to_server_user(&home.data_folder)?;
        Ok(home)
    }

    pub(super) fn folder(&self) -> &Path {
        &self.folder
    }

    pub(super) fn data_folder(&self) -> &Path {
        &self.data_folder
    }

    /// Makes the user that runs the server the owner of a file.
    pub(super) fn chown_to_server_user(&self, file: &Path) -> anyhow::Result<()> {
        if let Some(user) = unprivileged_user() {
            chown(file, Some(user.uid), Some(user.gid))?;
        }
        Ok(())
    }

    /// A command for one of the service's programs, run as the server's user, with its output in
    /// the log.
    pub(super) fn command(&self, program: &Path) -> anyhow::Result<Command> {
        let log = File::options().create(true).append(true).open(self.log_file())?;
        let mut command = reaper::command(program)?;
        command
            .current_dir(&self.folder)
            // For messages in English, which are searched for the reason of a failed start.
            .env("LC_ALL", "C")
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log);
        // Variables such as PGDATA or PGPORT are meant for other servers than this one.
        for (variable, _) in env::vars_os() {
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

    fn whole_log(&self) -> String {
        fs::read_to_string(self.log_file()).unwrap_or_else(|error| error.to_string())
    }

    /// The last 10 lines of its log.
    pub(super) fn log(&self) -> String {
        const LINES: usize = 10;
        let log = self.whole_log();
        let lines: Vec<&str> = log.lines().collect();
        lines[lines.len().saturating_sub(LINES)..].join("\n")
    }
}

impl Drop for Home {
    fn drop(&mut self) {
        // The reaper handles any failure here.
        for folder in [&self.data_folder, &self.folder] {
            let _ = reaper::clear(folder);
        }
    }
}

/// Returns the arguments that make a server listen on a port. Called once for each port that is
/// tried.
pub(super) type PortArguments = Box<dyn Fn(u16) -> anyhow::Result<Vec<OsString>> + Send + Sync>;

/// For a program that takes its port as an argument of this name.
pub(super) fn port_argument(name: &'static str) -> PortArguments {
    Box::new(move |port| Ok(vec![name.into(), port.to_string().into()]))
}

/// A server as a process of this machine.
pub(super) struct Process {
    home: Home,
    program: PathBuf,
    arguments: Vec<OsString>,
    arguments_for_port: PortArguments,
    /// The port to listen on; `None`: any free one.
    fixed_port: Option<u16>,
    port: u16,
    port_arguments: Vec<OsString>,
    /// Requests a graceful shutdown.
    stop_signal: Signal,
    /// Ends the process at once when its data is discarded.
    drop_signal: Signal,
    child: Mutex<Option<Child>>,
}

impl Process {
    /// A process that is not started yet.
    pub(super) fn new(
        home: Home,
        program: PathBuf,
        arguments: Vec<OsString>,
        arguments_for_port: PortArguments,
    ) -> Self {
        Self {
            home,
            program,
            arguments,
            arguments_for_port,
            fixed_port: None,
            port: 0,
            port_arguments: Vec::new(),
            // For Postgres this is the "fast shutdown", which disconnects clients instead of
            // waiting for them.
            stop_signal: Signal::INT,
            drop_signal: Signal::KILL,
            child: Mutex::default(),
        }
    }

    /// Sets the signal that requests a graceful shutdown; SIGINT by default.
    pub(super) fn stop_signal(mut self, signal: Signal) -> Self {
        self.stop_signal = signal;
        self
    }

    /// Sets the signal that ends the process on drop, for one that has to clean up; SIGKILL by
    /// default.
    pub(super) fn drop_signal(mut self, signal: Signal) -> Self {
        self.drop_signal = signal;
        self
    }

    /// Sets the port; by default any free one.
    pub(super) fn fixed_port(mut self, port: Option<u16>) -> Self {
        self.fixed_port = port;
        self
    }

    /// Chooses a free port, unless it is fixed.
    pub(super) fn choose_port(&mut self) -> anyhow::Result<()> {
        self.port = match self.fixed_port {
            Some(port) => port,
            None => free_port()?,
        };
        self.port_arguments = (self.arguments_for_port)(self.port)?;
        Ok(())
    }

    /// Whether the process exited because another process had taken its port.
    pub(super) fn port_was_taken(&self) -> bool {
        is_port_taken(&self.home.whole_log())
    }

    /// Its host and port.
    pub(super) fn address(&self) -> (&str, u16) {
        static HOST: LazyLock<String> = LazyLock::new(|| Ipv4Addr::LOCALHOST.to_string());
        (&HOST, self.port)
    }

    /// Starts the process unless it is running. It need not be ready on return.
    pub(super) fn launch(&self) -> anyhow::Result<()> {
        let mut child = self.child();
        if let Some(child) = child.as_mut()
            && child.try_wait()?.is_none()
        {
            return Ok(());
        }
        let mut command = self.home.command(&self.program)?;
        command.args(&self.arguments).args(&self.port_arguments);
        *child = Some(command.spawn()?);
        Ok(())
    }

    /// Fails with the end of the log unless the process is running.
    pub(super) fn ensure_running(&self) -> anyhow::Result<()> {
        let name = self.name();
        match self.child().as_mut() {
            Some(child) => match child.try_wait()? {
                None => Ok(()),
                Some(status) => bail!("{name} ended ({status}): {}", self.home.log()),
            },
            None => bail!("{name} was stopped while it started"),
        }
    }

    /// Shuts the process down gracefully unless it is down.
    pub(super) async fn stop(&self) -> anyhow::Result<()> {
        self.send(self.stop_signal)?;
        self.ended().await
    }

    /// Kills the process and its children unless it is down.
    pub(super) async fn kill(&self) -> anyhow::Result<()> {
        // Stopped first, so that no child is created or reaped between listing the children and
        // killing them.
        self.send(Signal::STOP)?;
        let children = self.send_to_children(Signal::KILL)?;
        self.send(Signal::KILL)?;
        self.ended().await?;
        // Postgres does not start again while a child still holds the shared memory.
        self.within_shutdown_timeout(|| Ok(!any_running(&children)?)).await
    }

    /// Freezes the process and its children (SIGSTOP) unless it is down.
    pub(super) fn freeze(&self) -> anyhow::Result<()> {
        self.send(Signal::STOP)?;
        self.send_to_children(Signal::STOP)?;
        Ok(())
    }

    /// Resumes the process and its children (SIGCONT).
    pub(super) fn thaw(&self) -> anyhow::Result<()> {
        self.send_to_children(Signal::CONT)?;
        self.send(Signal::CONT)
    }

    /// Signals the child processes, and returns them.
    fn send_to_children(&self, signal: Signal) -> anyhow::Result<Vec<Pid>> {
        let Some(parent) = self.pid() else {
            return Ok(Vec::new());
        };
        let children = children(parent)?;
        for pid in &children {
            // It may have exited in the meantime.
            let _ = kill_process(*pid, signal);
        }
        Ok(children)
    }

    /// Its pid, while it is running.
    pub(super) fn pid(&self) -> Option<u32> {
        self.child().as_ref().map(Child::id)
    }

    async fn ended(&self) -> anyhow::Result<()> {
        self.within_shutdown_timeout(|| {
            let mut child = self.child();
            let ended = match child.as_mut() {
                None => true,
                Some(child) => child.try_wait()?.is_some(),
            };
            if ended {
                *child = None;
            }
            Ok(ended)
        })
        .await
    }

    /// Waits until `ended` holds.
    async fn within_shutdown_timeout(&self, mut ended: impl FnMut() -> anyhow::Result<bool>) -> anyhow::Result<()> {
        let began = Instant::now();
        while !ended()? {
            if began.elapsed() > SHUTDOWN_TIMEOUT {
                bail!(
                    "{} did not end within {SHUTDOWN_TIMEOUT:?}: {}",
                    self.name(),
                    self.home.log()
                );
            }
            tokio::time::sleep(POLL_INTERVAL).await;
        }
        Ok(())
    }

    fn send(&self, signal: Signal) -> anyhow::Result<()> {
        // The lock keeps the child from being reaped, and so its pid from being reused.
        let mut child = self.child();
        if let Some(child) = child.as_mut()
            && child.try_wait()?.is_none()
        {
            kill_process(Pid::from_child(child), signal)?;
        }
        Ok(())
    }

    fn child(&self) -> MutexGuard<'_, Option<Child>> {
        self.child.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn name(&self) -> String {
        let name = self.program.file_name().unwrap_or_default();
        name.to_string_lossy().into_owned()
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // The reaper handles any failure here.
        let _ = self.send(self.drop_signal);
        let _ = self.send(Signal::CONT);
        if let Some(mut child) = self.child().take() {
            let _ = child.wait();
        }
    }
}

/// The child processes of a process.
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

/// Whether any of these processes has not exited. One that only waits to be reaped has.
fn any_running(pids: &[Pid]) -> anyhow::Result<bool> {
    if pids.is_empty() {
        return Ok(false);
    }
    let pids: Vec<_> = pids.iter().map(|pid| pid.as_raw_nonzero().to_string()).collect();
    let states = Command::new("ps")
        .args(["-o", "stat=", "-p", &pids.join(",")])
        .output()?;
    let states = String::from_utf8_lossy(&states.stdout).into_owned();
    Ok(states.lines().any(|state| !state.trim_start().starts_with('Z')))
}

/// The folder that contains all these programs: the one that `variable` names, else the first of
/// the usual ones.
pub(super) fn programs(
    variable: &str,
    programs: &[&str],
    mut usual: impl Iterator<Item = PathBuf>,
    such_as: &str,
) -> anyhow::Result<PathBuf> {
    let holds_all = |folder: &PathBuf| programs.iter().all(|program| folder.join(program).is_file());
    let names = programs.join(" and ");
    let found = match setting(variable).map(PathBuf::from) {
        Some(named) if holds_all(&named) => return Ok(named),
        Some(named) => bail!("{variable} is `{}`, which does not hold {names}", named.display()),
        None => usual.find(holds_all),
    };
    let neither = if programs.len() > 1 {
        "are neither"
    } else {
        "is neither"
    };
    found.ok_or_else(|| anyhow::anyhow!("{names} {neither} on PATH nor in the usual places, {such_as}"))
}

/// An unprivileged user, for servers that refuse to run as root.
#[derive(Clone, Copy, Debug)]
pub(super) struct User {
    pub(super) uid: u32,
    pub(super) gid: u32,
}

/// The user that runs servers when this process runs as root: `postgres` if it exists, else
/// `nobody`. `None` if this process is not root.
pub(super) fn unprivileged_user() -> Option<User> {
    static USER: OnceLock<Option<User>> = OnceLock::new();
    *USER.get_or_init(|| {
        if !rustix::process::geteuid().is_root() {
            return None;
        }
        ["postgres", "nobody"].into_iter().find_map(|name| {
            Some(User {
                uid: id("-u", name)?,
                gid: id("-g", name)?,
            })
        })
    })
}

/// Asks `id`, which also knows the users of directory services and of macOS.
fn id(which: &str, name: &str) -> Option<u32> {
    let answer = Command::new("id").args([which, name]).output().ok()?;
    String::from_utf8_lossy(&answer.stdout).trim().parse().ok()
}

/// Finds a program on `PATH`.
pub fn on_path(program: &str) -> Option<PathBuf> {
    env::split_paths(&env::var_os("PATH")?)
        .map(|folder| folder.join(program))
        .find(|file| file.is_file())
}

/// Finds the program of a system service. Debian keeps some, such as nginx, in a folder that is not
/// on every user's `PATH`.
pub fn on_system_path(program: &str) -> Option<PathBuf> {
    on_path(program).or_else(|| Some(Path::new("/usr/sbin").join(program)).filter(|file| file.is_file()))
}

/// The folders `parent/PREFIX*/SUFFIX`, highest version first.
pub(super) fn versioned(parent: &str, prefix: &str, suffix: &str) -> Vec<PathBuf> {
    let Ok(entries) = fs::read_dir(parent) else {
        return Vec::new();
    };
    let mut found: Vec<(f64, PathBuf)> = entries
        .filter_map(|entry| {
            let name = entry.ok()?.file_name().into_string().ok()?;
            let version = name.strip_prefix(prefix)?.trim_start_matches(['@', '-']);
            let folder = Path::new(parent).join(&name).join(suffix);
            Some((version.parse().unwrap_or(0.0), folder))
        })
        .collect();
    found.sort_by(|(a, _), (b, _)| b.total_cmp(a));
    found.into_iter().map(|(_, folder)| folder).collect()
}
