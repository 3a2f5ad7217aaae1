//! A measurement that fails or is interrupted: what there is of it is shown and marked, no results are written, and the exit code is that
//! of the failure or of the signal.

use std::{
    env, fs,
    io::{BufRead, BufReader, Read},
    iter,
    os::unix::fs::PermissionsExt,
    path::Path,
    process::{Child, ChildStderr, Command, ExitStatus, Stdio},
    thread,
    time::{Duration, Instant},
};

use rstest::rstest;
use tempfile::tempdir;

use crate::{command, err, out};

/// Results of an earlier run.
const EARLIER: &str = "the results of an earlier run";

/// The exit codes of shells after these signals.
const INTERRUPTED: Option<i32> = Some(130);
const TERMINATED: Option<i32> = Some(143);

/// Time limit of every wait.
const TIMEOUT: Duration = Duration::from_secs(60);

#[test]
fn a_rush_that_fails_in_its_fourth_strategy_shows_the_first_three() {
    let folder = tempdir().unwrap();
    let histories = folder.path().join("histories");
    // Where its history should go.
    fs::create_dir_all(histories.join("lv2-conditional-update.jsonl")).unwrap();
    let json = folder.path().join("rush.json");
    let output = command(&["rush", "lv2", "--buyers", "20"])
        .arg("--history")
        .arg(&histories)
        .arg("--json")
        .arg(&json)
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(2), "{}", err(&output));
    assert!(
        err(&output).contains("oversold: lv2/conditional-update: writing "),
        "{}",
        err(&output)
    );
    for strategy in ["mutex", "pessimistic", "optimistic"] {
        assert!(out(&output).contains(&format!("│ lv2/{strategy} ")), "{}", out(&output));
    }
    assert!(!out(&output).contains("│ lv2/conditional-update"), "{}", out(&output));
    assert!(
        out(&output).ends_with(
            "INCOMPLETE: the run ended early, and writes no results. Rounds, of 1: \
             lv2/mutex 1, lv2/pessimistic 1, lv2/optimistic 1, lv2/conditional-update 0\n"
        ),
        "{}",
        out(&output)
    );
    assert!(!json.exists());
}

#[rstest]
#[case::by_ctrl_c("INT", INTERRUPTED, "interrupted")]
#[case::by_sigterm("TERM", TERMINATED, "terminated")]
fn a_rush_that_is_interrupted_shows_what_it_has(#[case] signal: &str, #[case] code: Option<i32>, #[case] says: &str) {
    let folder = tempdir().unwrap();
    let json = folder.path().join("rush.json");
    fs::write(&json, EARLIER).unwrap();
    // In the second one a buyer waits for 10 s.
    let mut rush = command(&["rush", "lv2/conditional-update", "lv2/pessimistic"]);
    rush.args(["--buyers", "3", "--work-ms", "10000", "--history"])
        .arg(folder.path())
        .arg("--json")
        .arg(&json);
    let mut rush = Running::start(rush);
    let first = folder.path().join("lv2-conditional-update.jsonl");
    until("the first strategy is measured", || first.exists());
    rush.signal(signal);
    let (status, out, err) = rush.ends();
    assert_eq!(status.code(), code, "{out}\n{err}");
    assert!(err.ends_with(&format!("oversold: {says}\n")), "{err}");
    assert!(out.contains("│ lv2/conditional-update "), "{out}");
    assert!(
        out.ends_with("Rounds, of 1: lv2/conditional-update 1, lv2/pessimistic 0\n"),
        "{out}"
    );
    assert_eq!(fs::read_to_string(&json).unwrap(), EARLIER);
}

/// A bench whose `wrk` fails at its call with this number, after two rounds.
#[rstest]
#[case::sustained(&["lv3/spin", "--rounds", "5"], 5, "after 2 of 5 rounds")]
#[case::by_pool(&["lv2/pessimistic", "--pools", "1,2,4"], 5, "after 2 of 3 rounds")]
#[case::accepting(&["lv4/single-writer", "--rounds", "5"], 9, "after 2 of 5 rounds")]
fn a_bench_that_fails_shows_the_rounds_before(#[case] arguments: &[&str], #[case] call: u32, #[case] says: &str) {
    let folder = tempdir().unwrap();
    let json = folder.path().join("bench.json");
    let output = bench(folder.path(), arguments, call, "exit 7").output().unwrap();
    assert_eq!(output.status.code(), Some(2), "{}", err(&output));
    assert!(err(&output).contains("oversold: wrk failed"), "{}", err(&output));
    assert!(out(&output).contains(arguments[0]), "{}", out(&output));
    assert!(
        out(&output).contains(&format!("INCOMPLETE: the measurement ended early, {says}")),
        "{}",
        out(&output)
    );
    assert!(!json.exists());
}

#[test]
fn a_bench_that_is_interrupted_shows_the_rounds_before_and_ends_its_tool() {
    let folder = tempdir().unwrap();
    let json = folder.path().join("bench.json");
    fs::write(&json, EARLIER).unwrap();
    let reached = folder.path().join("reached");
    // The tool becomes a process that is known by its pid.
    let then = format!(
        "echo $$ >'{0}.new' && mv '{0}.new' '{0}' && exec sleep 600",
        reached.display()
    );
    let arguments = ["lv2/pessimistic", "--pools", "2", "--rounds", "5"];
    let mut bench = Running::start(bench(folder.path(), &arguments, 5, &then));
    until("the third round has begun", || reached.exists());
    bench.signal("TERM");
    let (status, out, err) = bench.ends();
    assert_eq!(status.code(), TERMINATED, "{out}\n{err}");
    assert!(out.contains("lv2/pessimistic, pool"), "{out}");
    assert!(
        out.contains("INCOMPLETE: the measurement ended early, after 2 of 5 rounds"),
        "{out}"
    );
    assert_eq!(fs::read_to_string(&json).unwrap(), EARLIER);
    let pid = fs::read_to_string(&reached).unwrap();
    until("the tool has ended", || !is_alive(pid.trim()));
}

#[test]
fn waiters_that_are_interrupted_write_no_results() {
    let folder = tempdir().unwrap();
    let json = folder.path().join("waiters.json");
    let mut waiters = command(&["bench", "lv3/rlock", "--waiters", "1000", "--rounds", "100", "--json"]);
    waiters.arg(&json).env_remove("REDIS_URL");
    let mut waiters = Running::start(waiters);
    // One line each: that it is a debug build, and where Redis comes from.
    let mut line = String::new();
    while !line.starts_with("redis: ") {
        line.clear();
        assert!(waiters.err.read_line(&mut line).unwrap() > 0, "it ended");
    }
    waiters.signal("INT");
    let (status, out, err) = waiters.ends();
    assert_eq!(status.code(), INTERRUPTED, "{out}\n{err}");
    assert!(!json.exists());
}

/// `oversold bench` with a `wrk` that answers at once, and at its call with this number does something else.
fn bench(folder: &Path, arguments: &[&str], call: u32, then: &str) -> Command {
    let tools = folder.join("tools");
    fs::create_dir(&tools).unwrap();
    let wrk = tools.join("wrk");
    let counted =
        r#"{"answers":0,"took_us":1000000,"refused":0,"cut_off":0,"p50_us":1,"p95_us":1,"p99_us":1,"max_us":1}"#;
    let script = format!(
        "#!/bin/sh\necho >>'{0}'\n[ \"$(wc -l <'{0}')\" -lt {call} ] || {{ {then}; }}\necho '{counted}'\n",
        folder.join("calls").display()
    );
    fs::write(&wrk, script).unwrap();
    fs::set_permissions(&wrk, fs::Permissions::from_mode(0o755)).unwrap();
    let path = env::var_os("PATH").unwrap();
    let folders = iter::once(tools).chain(env::split_paths(&path));
    let mut bench = command(&[&["bench"], arguments].concat());
    bench
        .args(["--seconds", "1", "--json"])
        .arg(folder.join("bench.json"))
        .env("PATH", env::join_paths(folders).unwrap());
    bench
}

fn until(what: &str, mut holds: impl FnMut() -> bool) {
    let began = Instant::now();
    while !holds() {
        assert!(began.elapsed() < TIMEOUT, "waited {TIMEOUT:?} until {what}");
        thread::sleep(Duration::from_millis(10));
    }
}

/// A command that runs.
struct Running {
    child: Child,
    err: BufReader<ChildStderr>,
}

impl Running {
    fn start(mut command: Command) -> Self {
        let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        let err = BufReader::new(child.stderr.take().unwrap());
        Self { child, err }
    }

    fn signal(&mut self, signal: &str) {
        let pid = self.child.id().to_string();
        assert!(
            Command::new("kill")
                .args(["-s", signal, &pid])
                .status()
                .unwrap()
                .success()
        );
    }

    /// Waits for its end. Returns what it printed that nobody has read.
    fn ends(mut self) -> (ExitStatus, String, String) {
        let (mut out, mut err) = (String::new(), String::new());
        self.child.stdout.take().unwrap().read_to_string(&mut out).unwrap();
        self.err.read_to_string(&mut err).unwrap();
        (self.child.wait().unwrap(), out, err)
    }
}

fn is_alive(pid: &str) -> bool {
    let state = Command::new("ps").args(["-o", "state=", "-p", pid]).output().unwrap();
    let state = String::from_utf8_lossy(&state.stdout);
    !matches!(state.trim().chars().next(), None | Some('Z'))
}
