//! Child processes that run this program in a role, and the processes, containers and folders that
//! they create.

use std::{
    env,
    ffi::OsStr,
    fs,
    io::{BufRead, BufReader, Write},
    os::unix::{fs::PermissionsExt, process::CommandExt},
    path::{Path, PathBuf},
    process::{Child, ChildStdin, Command, Output, Stdio},
    thread,
    time::{Duration, Instant},
};

use harness::backends::Source;
use rustix::process::{Pid, Signal, kill_process, kill_process_group};
use serde_json::Value;
use tempfile::TempDir;

use crate::{repository, service::Service};

/// The environment variable that names the role of a child.
pub(crate) const ROLE: &str = "OVERSOLD_TEST_ROLE";

/// The environment variable that names the service of a child.
pub(crate) const SERVICE: &str = "OVERSOLD_TEST_SERVICE";

/// Time limit of every wait.
pub(crate) const TIMEOUT: Duration = Duration::from_secs(60);

/// Interval between two checks of a condition.
const POLL_INTERVAL: Duration = Duration::from_millis(10);

/// A command for a child in a role, with only the settings that it is given.
pub(crate) struct Role(pub(crate) Command);

impl Role {
    pub(crate) fn new(service: Service, role: &str, temp: &Path) -> Self {
        let mut command = with_ctrl_c(env::current_exe().unwrap());
        command
            .env(ROLE, role)
            .env(SERVICE, service.name())
            .env("TMPDIR", temp)
            .stdin(Stdio::piped())
            .process_group(0);
        for setting in [
            "DATABASE_URL",
            "REDIS_URL",
            "KAFKA_BOOTSTRAP_SERVERS",
            "OVERSOLD_BACKENDS",
            "OVERSOLD_REQUIRE",
        ] {
            command.env_remove(setting);
        }
        Self(command)
    }

    pub(crate) fn set(mut self, setting: impl AsRef<OsStr>, value: impl AsRef<OsStr>) -> Self {
        self.0.env(setting, value);
        self
    }

    pub(crate) fn forced(self, source: Source) -> Self {
        self.set("OVERSOLD_BACKENDS", source.name())
    }

    pub(crate) fn ends(mut self) -> Output {
        self.0.stdin(Stdio::null()).output().unwrap()
    }

    pub(crate) fn succeeds(self) -> Output {
        let output = self.ends();
        assert!(output.status.success(), "{}", text(&output));
        output
    }

    /// Runs the child, and returns its JSON from stdout.
    pub(crate) fn json(self) -> Value {
        let output = self.succeeds();
        serde_json::from_slice(&output.stdout).unwrap_or_else(|_| panic!("{}", text(&output)))
    }

    /// Starts the child, and waits for its first line.
    pub(crate) fn held(mut self) -> Held {
        let mut child = self.0.stdout(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap())
            .read_line(&mut line)
            .unwrap();
        let stdin = child.stdin.take();
        let report = serde_json::from_str(&line).expect("the child reports what it holds");
        Held { child, stdin, report }
    }
}

/// A command that receives SIGINT, even if this test runs in the background of a shell, which
/// ignores it.
fn with_ctrl_c(program: PathBuf) -> Command {
    let env_can = Command::new("env")
        .args(["--default-signal=INT", "true"])
        .stderr(Stdio::null())
        .status();
    if env_can.is_ok_and(|status| status.success()) {
        let mut command = Command::new("env");
        command.arg("--default-signal=INT").arg(program);
        command
    } else {
        Command::new(program)
    }
}

/// A child that holds a server.
pub(crate) struct Held {
    pub(crate) child: Child,
    pub(crate) stdin: Option<ChildStdin>,
    pub(crate) report: Value,
}

impl Held {
    pub(crate) fn word(&self, word: &str) -> &str {
        self.report[word].as_str().unwrap()
    }

    pub(crate) fn folder(&self) -> PathBuf {
        PathBuf::from(self.word("folder"))
    }

    /// The processes of its folders: the reaper, the server, and the server's children.
    pub(crate) fn processes(&self) -> Vec<u32> {
        let table = processes();
        let mut folders = self.elsewhere();
        folders.push(self.folder());
        let ours = |process: &&Process| {
            folders
                .iter()
                .any(|folder| process.line.contains(folder.to_str().unwrap()))
        };
        let mut pids: Vec<u32> = table.iter().filter(ours).map(|process| process.pid).collect();
        // A server may change its process title.
        let registry = self.folder().join("pids");
        pids.extend(names_in(&registry).into_iter().map(|entry| {
            let entry = fs::read_to_string(registry.join(entry)).unwrap();
            entry.split_whitespace().next().unwrap().parse::<u32>().unwrap()
        }));
        pids.sort_unstable();
        pids.dedup();
        let children = table.iter().filter(|process| pids.contains(&process.parent));
        pids.extend(children.map(|process| process.pid).collect::<Vec<_>>());
        pids
    }

    pub(crate) fn reaper(&self) -> Pid {
        let table = processes();
        let reaper = table
            .iter()
            .find(|process| process.line.contains(&format!("keep {}", self.word("folder"))));
        Pid::from_raw(i32::try_from(reaper.unwrap().pid).unwrap()).unwrap()
    }

    pub(crate) fn containers(&self) -> Vec<String> {
        names_in(&self.folder().join("containers"))
    }

    /// Its folders outside its run folder.
    pub(crate) fn elsewhere(&self) -> Vec<PathBuf> {
        let registry = self.folder().join("elsewhere");
        let entries = names_in(&registry).into_iter();
        entries
            .map(|entry| PathBuf::from(fs::read_to_string(registry.join(entry)).unwrap().trim()))
            .collect()
    }

    pub(crate) fn end(&mut self, end: End) {
        let stdin = self.stdin.take();
        match end {
            End::Exit => drop(stdin),
            End::Panic => writeln!(stdin.unwrap(), "panic").unwrap(),
            End::CtrlC => kill_process_group(Pid::from_child(&self.child), Signal::INT).unwrap(),
            End::Kill => kill_process(Pid::from_child(&self.child), Signal::KILL).unwrap(),
        }
        let status = self.child.wait().unwrap();
        assert_eq!(status.success(), end == End::Exit, "{status}");
    }
}

/// How a child ends.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum End {
    Exit,
    Panic,
    CtrlC,
    Kill,
}

impl End {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Exit => "exit",
            Self::Panic => "a_panic",
            Self::CtrlC => "ctrl_c",
            Self::Kill => "sigkill",
        }
    }
}

pub(crate) fn text(output: &Output) -> String {
    let [stdout, stderr] = [&output.stdout, &output.stderr].map(|bytes| String::from_utf8_lossy(bytes));
    format!("{}\n{stdout}{stderr}", output.status)
}

/// A temporary folder of children, accessible to servers that run as another user. Dropping it
/// asserts that it becomes empty.
pub(crate) struct Temp(TempDir);

pub(crate) fn temp() -> Temp {
    let temp = tempfile::tempdir().unwrap();
    fs::set_permissions(temp.path(), fs::Permissions::from_mode(0o711)).unwrap();
    Temp(temp)
}

impl Temp {
    pub(crate) fn path(&self) -> &Path {
        self.0.path()
    }

    pub(crate) fn becomes_empty(&self) {
        until(&format!("{} to become empty", self.path().display()), || {
            names_in(self.path()).is_empty()
        });
    }
}

impl Drop for Temp {
    fn drop(&mut self) {
        // Without its folder, a reaper can't know what to stop. A failed test also waits, but has
        // already reported its failure.
        let began = Instant::now();
        while thread::panicking() && began.elapsed() < TIMEOUT && !names_in(self.path()).is_empty() {
            thread::sleep(POLL_INTERVAL);
        }
        if !thread::panicking() {
            self.becomes_empty();
        }
    }
}

pub(crate) struct Process {
    pub(crate) pid: u32,
    pub(crate) parent: u32,
    pub(crate) line: String,
}

/// All processes except zombies.
pub(crate) fn processes() -> Vec<Process> {
    let listed = Command::new("ps")
        .args(["-A", "-ww", "-o", "pid=", "-o", "ppid=", "-o", "state=", "-o", "args="])
        .output()
        .unwrap();
    let process = |line: &str| {
        let mut words = line.split_whitespace();
        let (pid, parent) = (words.next()?.parse().ok()?, words.next()?.parse().ok()?);
        let ended = words.next()?.starts_with('Z');
        let line = words.collect::<Vec<_>>().join(" ");
        (!ended).then_some(Process { pid, parent, line })
    };
    String::from_utf8_lossy(&listed.stdout)
        .lines()
        .filter_map(process)
        .collect()
}

pub(crate) fn until(what: &str, mut holds: impl FnMut() -> bool) {
    let began = Instant::now();
    while !holds() {
        assert!(began.elapsed() < TIMEOUT, "waited {TIMEOUT:?} for {what}");
        thread::sleep(POLL_INTERVAL);
    }
}

pub(crate) fn names_in(folder: &Path) -> Vec<String> {
    let entries = fs::read_dir(folder).unwrap();
    entries
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect()
}

/// Whether a container of this name exists, running or not.
pub(crate) fn container_exists(name: &str) -> bool {
    let filter = format!("name=^/{name}$");
    let engine = Command::new(repository().join("infra/docker-host.sh"))
        .output()
        .unwrap();
    let listed = Command::new("docker")
        .env("DOCKER_HOST", String::from_utf8_lossy(&engine.stdout).trim())
        .args(["container", "ls", "--all", "--quiet", "--filter", &filter])
        .output()
        .unwrap();
    assert!(listed.status.success(), "{}", text(&listed));
    !listed.stdout.is_empty()
}
