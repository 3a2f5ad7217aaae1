//! Where Postgres comes from, what is said when it comes from nowhere, and that nothing stays behind.
//!
//! Settings are read from the environment and a process can end only once, so most tests run this very program again as a child: with
//! settings and a temporary folder of its own, in a role named by [`ROLE`].

#![allow(clippy::unwrap_used)]

use std::{
    borrow::Cow,
    env,
    ffi::OsStr,
    fs,
    io::{self, BufRead, BufReader, Write},
    net::TcpStream,
    os::unix::{fs::PermissionsExt, process::CommandExt},
    path::{Path, PathBuf},
    process::{Child, ChildStdin, Command, Output, Stdio},
    sync::{Arc, LazyLock, OnceLock},
    thread,
    time::{Duration, Instant},
};

use box_office::Schema;
use libtest_mimic::{Arguments, Completion, Failed, Trial};
use rustix::process::{Pid, Signal, kill_process, kill_process_group};
use serde_json::{Value, json};
use sqlx::{
    Connection, PgConnection, SqlSafeStr,
    migrate::{Migration, MigrationType, Migrator},
};
use suite::backends::{self, Database, Durability, Missing, Postgres, Source, keeper};
use tempfile::TempDir;

/// Names what a child of this test is to do.
const ROLE: &str = "OVERSOLD_TEST_ROLE";
/// How long anything may take that should happen at once.
const PATIENCE: Duration = Duration::from_secs(60);
/// How often a condition is looked at that is waited for.
const LOOK_AGAIN_AFTER: Duration = Duration::from_millis(10);

fn main() {
    if let Ok(role) = env::var(ROLE) {
        return play(&role);
    }
    let required = match required() {
        Ok(required) => required,
        Err(message) => {
            eprintln!("{message}");
            std::process::exit(2);
        }
    };
    let tests = tests().into_iter().map(|test| {
        let required = required.clone();
        Trial::ignorable_test(test.name.clone(), move || {
            let absent = test.needs.iter().find_map(|&source| Some((source, absent(source)?)));
            match absent {
                Some((source, reason)) if required.contains(&source) => {
                    Err(Failed::from(format!("OVERSOLD_REQUIRE lists {source}, but: {reason}")))
                }
                Some((source, reason)) => Ok(Completion::ignored_with(format!("no {source} source: {reason}"))),
                None => {
                    (test.run)();
                    Ok(Completion::Completed)
                }
            }
        })
    });
    let mut arguments = Arguments::from_args();
    // They mostly wait for servers to start and to end.
    arguments.test_threads.get_or_insert(4);
    libtest_mimic::run(&arguments, tests.collect()).exit();
}

/// The sources that must be there, from `OVERSOLD_REQUIRE`.
fn required() -> Result<Vec<Source>, String> {
    let listed = env::var("OVERSOLD_REQUIRE").unwrap_or_default();
    let names = listed.split(',').map(str::trim).filter(|name| !name.is_empty());
    names
        .map(|name| {
            let mut known = [Source::Docker, Source::Native].into_iter();
            known.find(|source| source.name() == name).ok_or_else(|| {
                format!("OVERSOLD_REQUIRE lists `{name}`; it takes `docker` and `native`, with a comma between them")
            })
        })
        .collect()
}

/// Why there is no such source on this machine, if there is none.
fn absent(source: Source) -> Option<&'static str> {
    static NATIVE: OnceLock<Option<String>> = OnceLock::new();
    static DOCKER: OnceLock<Option<String>> = OnceLock::new();
    let known = if source == Source::Native { &NATIVE } else { &DOCKER };
    let reason = known.get_or_init(|| {
        let temp = temp();
        let said = Role::new("find", temp.path()).forced(source).said();
        said["error"].as_str().map(|error| {
            let line = error.lines().find_map(|line| line.trim().strip_prefix(source.name()));
            line.unwrap_or(error).trim_start_matches(": ").to_owned()
        })
    });
    reason.as_deref()
}

struct Test {
    name: String,
    needs: Vec<Source>,
    run: Box<dyn FnOnce() + Send>,
}

fn test(name: impl Into<String>, needs: &[Source], run: impl FnOnce() + Send + 'static) -> Test {
    Test {
        name: name.into(),
        needs: needs.to_vec(),
        run: Box::new(run),
    }
}

fn tests() -> Vec<Test> {
    use Source::{Docker, Native};

    let mut tests = vec![
        test(
            "an_external_server_is_used_and_left_as_it_was",
            &[Native],
            an_external_server_is_used_and_left_as_it_was,
        ),
        test(
            "what_a_killed_run_left_on_an_external_server_goes_with_the_next",
            &[Native],
            an_external_server_is_swept,
        ),
        test(
            "an_external_user_must_be_allowed_to_create_databases",
            &[Native],
            an_external_user_must_be_allowed,
        ),
        test(
            "a_forced_source_wins_over_an_external_one",
            &[Native],
            a_forced_source_wins_over_an_external_one,
        ),
        test(
            "every_bad_setting_gets_one_clear_line",
            &[],
            every_bad_setting_gets_one_clear_line,
        ),
        test(
            "a_server_that_was_asked_for_and_is_not_there_is_named_without_its_password",
            &[],
            an_absent_external_server,
        ),
        test(
            "nothing_there_says_what_was_tried_and_what_to_install",
            &[],
            nothing_there_says_what_was_tried,
        ),
        test(
            "an_absent_source_is_ignored_with_its_reason",
            &[],
            an_absent_source_is_ignored_with_its_reason,
        ),
        test(
            "a_required_source_that_is_absent_fails",
            &[],
            a_required_source_that_is_absent_fails,
        ),
        test(
            "a_bad_list_of_required_sources_is_refused",
            &[],
            a_bad_list_of_required_sources_is_refused,
        ),
        test(
            "an_image_that_cannot_be_pulled_is_tried_once",
            &[Docker],
            an_image_that_cannot_be_pulled_is_tried_once,
        ),
        test(
            "without_a_usable_image_a_native_server_takes_over",
            &[Docker, Native],
            without_an_image_native_takes_over,
        ),
        test(
            "setup_is_silent_when_there_is_nothing_to_install",
            &[Native],
            setup_is_silent,
        ),
        test(
            "setup_says_what_to_run_where_nothing_can_be_installed",
            &[],
            setup_says_what_to_run,
        ),
        test(
            "the_image_is_the_same_everywhere",
            &[],
            the_image_is_the_same_everywhere,
        ),
        test(
            "a_folder_whose_owner_lives_is_not_swept",
            &[Native],
            a_folder_whose_owner_lives_is_not_swept,
        ),
        test(
            "a_process_that_was_given_an_old_pid_is_left_alone",
            &[],
            a_process_that_was_given_an_old_pid_is_left_alone,
        ),
        test(
            "a_process_that_ignores_the_signal_is_killed",
            &[],
            a_process_that_ignores_the_signal_is_killed,
        ),
        test(
            "a_program_that_starts_after_the_end_gives_up",
            &[],
            a_program_that_starts_after_the_end_gives_up,
        ),
    ];
    for source in [Docker, Native] {
        for (what, role) in [
            ("serves_with_the_settings_of_every_source", "serve"),
            ("is_shared_by_all_runtimes_of_a_process", "share"),
            ("gives_each_of_many_at_once_a_database_of_its_own", "race"),
            ("drops_a_database_with_its_last_owner", "drop"),
            ("keeps_its_address_and_its_data_when_it_is_stopped_or_killed", "break"),
            ("is_gone_when_a_private_one_is_dropped", "private"),
            ("can_be_durable", "durable"),
        ] {
            tests.push(test(format!("{source}::{what}"), &[source], move || {
                let temp = temp();
                Role::new(role, temp.path()).forced(source).succeeds();
            }));
        }
        for end in [End::Exit, End::Panic, End::CtrlC, End::Kill] {
            let name = format!("{source}::leaves_nothing_behind_after_{}", end.name());
            tests.push(test(name, &[source], move || nothing_stays_behind(source, end)));
        }
        let name = format!("{source}::is_swept_by_the_next_run_when_its_keeper_was_killed");
        tests.push(test(name, &[source], move || the_next_run_sweeps(source)));
    }
    tests
}

// ---------------------------------------------------------------------------------------------------------------------------------------
// Roles: what a child does.

fn play(role: &str) {
    let runtime = tokio::runtime::Runtime::new().unwrap();
    match role {
        "find" => {
            let said = match runtime.block_on(backends::postgres()) {
                Ok(postgres) => serde_json::to_value(postgres.report()).unwrap(),
                Err(missing) => {
                    json!({ "error": missing.to_string(), "setting": matches!(missing, Missing::BadSetting { .. }) })
                }
            };
            println!("{said}");
        }
        "hold" => hold(&runtime),
        "keep" => {
            keeper::folder("empty").unwrap();
        }
        "stubborn" => {
            let mut child = keeper::command("sh").unwrap();
            let child = child
                .args(["-c", "trap '' INT TERM; echo; sleep 1000"])
                .stdout(Stdio::piped());
            let mut child = child.spawn().unwrap();
            // It ignores the signal from here on.
            BufReader::new(child.stdout.take().unwrap())
                .read_line(&mut String::new())
                .unwrap();
            say(&json!({ "pid": child.id() }));
        }
        "serve" => runtime.block_on(serve()),
        "share" => share(),
        "race" => race(),
        "drop" => runtime.block_on(drop_database()),
        "break" => runtime.block_on(break_private()),
        "private" => runtime.block_on(drop_private()),
        "durable" => runtime.block_on(durable()),
        _ => unreachable!("no role is called {role}"),
    }
}

fn say(value: &Value) {
    println!("{value}");
    io::stdout().flush().unwrap();
}

/// Holds a server and a database until stdin ends, and then ends as it was told to.
fn hold(runtime: &tokio::runtime::Runtime) {
    let (postgres, database) = runtime.block_on(async {
        let postgres = backends::postgres().await.unwrap();
        let database = postgres.database(schema("tickets")).await.unwrap();
        (postgres, database)
    });
    let folder = keeper::folder("asked").unwrap();
    say(&json!({
        "folder": folder.parent(),
        "address": postgres.report().address,
        "url": database.url(),
    }));
    let mut how = String::new();
    io::stdin().read_line(&mut how).unwrap();
    assert_ne!(how.trim(), "panic", "as it was told to");
}

/// A schema of one table.
fn schema(name: &'static str) -> Schema {
    fn one(sql: &'static str) -> Migrator {
        let description = Cow::Borrowed("one table");
        let sql = sql.into_sql_str();
        Migrator::with_migrations(vec![Migration::new(1, description, MigrationType::Simple, sql, false)])
    }
    static TICKETS: LazyLock<Migrator> = LazyLock::new(|| one("create table tickets (id int primary key)"));
    static SEATS: LazyLock<Migrator> = LazyLock::new(|| one("create table seats (id int primary key)"));
    Schema {
        name,
        migrations: if name == "seats" { &SEATS } else { &TICKETS },
    }
}

async fn connect(database: &Database) -> PgConnection {
    PgConnection::connect(&database.url()).await.unwrap()
}

async fn show(connection: &mut PgConnection, setting: &'static str) -> String {
    let shown = sqlx::query_scalar("select current_setting($1)").bind(setting);
    shown.fetch_one(connection).await.unwrap()
}

async fn serve() {
    let postgres = backends::postgres().await.unwrap();
    let database = postgres.database(schema("tickets")).await.unwrap();
    let pool = database.pool(2).await.unwrap();
    sqlx::query("insert into tickets values (1)")
        .execute(&pool)
        .await
        .unwrap();

    let mut connection = connect(&database).await;
    for (setting, value) in [
        ("max_connections", "500"),
        ("deadlock_timeout", "10ms"),
        ("fsync", "off"),
        ("full_page_writes", "off"),
        ("synchronous_commit", "on"),
        ("server_encoding", "UTF8"),
    ] {
        assert_eq!(show(&mut connection, setting).await, value, "{setting}");
    }

    let report = postgres.report();
    assert_eq!(report.source.name(), env::var("OVERSOLD_BACKENDS").unwrap());
    assert_eq!(report.version, show(&mut connection, "server_version").await);
    assert_eq!(report.durability["fsync"], "off");
    assert!(TcpStream::connect(&report.address).is_ok(), "{report}");
}

async fn durable() {
    let postgres = Postgres::find(Durability::Durable).await.unwrap();
    for setting in ["fsync", "synchronous_commit", "full_page_writes"] {
        assert_eq!(postgres.report().durability[setting], "on", "{setting}");
    }
}

fn share() {
    let on_its_own_runtime = || {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap();
        runtime.block_on(async {
            let postgres = backends::postgres().await.unwrap();
            let database = postgres.database(schema("tickets")).await.unwrap();
            database.pool(1).await.unwrap();
            postgres
        })
    };
    let first = thread::scope(|scope| {
        let threads: Vec<_> = (0..4).map(|_| scope.spawn(on_its_own_runtime)).collect();
        let found: Vec<_> = threads.into_iter().map(|thread| thread.join().unwrap()).collect();
        assert!(found.iter().all(|postgres| Arc::ptr_eq(postgres, &found[0])));
        Arc::clone(&found[0])
    });
    // And after all runtimes that took part in starting it are gone.
    assert!(Arc::ptr_eq(&first, &on_its_own_runtime()));
}

fn race() {
    let databases: Vec<(&str, Database)> = thread::scope(|scope| {
        let threads: Vec<_> = (0..8)
            .map(|number| {
                scope.spawn(move || {
                    let name = if number % 2 == 0 { "tickets" } else { "seats" };
                    let runtime = tokio::runtime::Builder::new_current_thread()
                        .enable_all()
                        .build()
                        .unwrap();
                    let database = runtime.block_on(async {
                        let postgres = backends::postgres().await.unwrap();
                        postgres.database(schema(name)).await.unwrap()
                    });
                    (name, database)
                })
            })
            .collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    });
    let runtime = tokio::runtime::Runtime::new().unwrap();
    runtime.block_on(async {
        for (name, database) in &databases {
            let mut connection = connect(database).await;
            let insert = format!("insert into {name} values (1)");
            // The primary key would refuse a row that another one wrote.
            sqlx::raw_sql(sqlx::AssertSqlSafe(insert))
                .execute(&mut connection)
                .await
                .unwrap();
        }
        let postgres = backends::postgres().await.unwrap();
        let later = postgres.database(schema("tickets")).await.unwrap();
        let rows = sqlx::query_scalar("select count(*) from tickets");
        let rows: i64 = rows.fetch_one(&mut connect(&later).await).await.unwrap();
        assert_eq!(rows, 0, "what a test writes does not reach the template");
    });
}

async fn drop_database() {
    let postgres = backends::postgres().await.unwrap();
    let [kept, dropped] = [
        postgres.database(schema("tickets")).await.unwrap(),
        postgres.database(schema("tickets")).await.unwrap(),
    ];
    let _still_connected = connect(&dropped).await;
    let mut connection = connect(&kept).await;
    let names = async |connection: &mut PgConnection| -> Vec<String> {
        let names = sqlx::query_scalar("select datname from pg_database where datname like 'tickets%'");
        names.fetch_all(connection).await.unwrap()
    };
    assert_eq!(names(&mut connection).await.len(), 2);
    drop(dropped);
    let began = Instant::now();
    while names(&mut connection).await.len() > 1 {
        assert!(began.elapsed() < PATIENCE, "waited for the database to be dropped");
    }
}

async fn break_private() {
    let postgres = Postgres::private(Durability::Fast).await.unwrap();
    let database = postgres.database(schema("tickets")).await.unwrap();
    let address = postgres.report().address.clone();
    let mut pids = vec![postgres.pid().await.unwrap().unwrap()];

    for (number, kill) in [(1, false), (2, true), (3, true)] {
        let mut connection = connect(&database).await;
        let insert = sqlx::query("insert into tickets values ($1)").bind(number);
        insert.execute(&mut connection).await.unwrap();

        if kill {
            postgres.kill().await.unwrap();
        } else {
            postgres.stop().await.unwrap();
        }
        assert!(connection.ping().await.is_err(), "the connection is cut");
        assert!(PgConnection::connect(&database.url()).await.is_err(), "nobody answers");
        assert_eq!(postgres.pid().await.unwrap(), None);
        // What is down already stays down.
        postgres.stop().await.unwrap();
        postgres.kill().await.unwrap();

        postgres.start().await.unwrap();
        postgres.start().await.unwrap();
        let rows = sqlx::query_scalar("select count(*) from tickets");
        let rows: i64 = rows.fetch_one(&mut connect(&database).await).await.unwrap();
        assert_eq!(rows, number, "what was committed is still there");
        assert!(TcpStream::connect(&address).is_ok(), "at the same address");
        pids.push(postgres.pid().await.unwrap().unwrap());
    }
    pids.sort_unstable();
    pids.dedup();
    assert_eq!(pids.len(), 4, "it was another process each time: {pids:?}");
}

async fn drop_private() {
    let up = Postgres::private(Durability::Fast).await.unwrap();
    let killed = Postgres::private(Durability::Fast).await.unwrap();
    assert_ne!(up.report().address, killed.report().address);
    killed.kill().await.unwrap();
    let addresses = [up.report().address.clone(), killed.report().address.clone()];
    let segments = shared_memory();
    drop(up);
    drop(killed);
    for address in addresses {
        assert!(TcpStream::connect(&address).is_err(), "{address} is closed");
    }
    let gone = segments.len()
        - shared_memory()
            .iter()
            .filter(|segment| segments.contains(segment))
            .count();
    let native = env::var("OVERSOLD_BACKENDS").unwrap() == "native";
    assert!(!native || gone >= 2, "both segments of shared memory are gone");
}

/// The System V segments of shared memory on this machine.
fn shared_memory() -> Vec<String> {
    let listed = Command::new("ipcs").arg("-m").output().unwrap();
    let listed = String::from_utf8(listed.stdout).unwrap();
    let id = |line: &str| {
        line.split_whitespace()
            .nth(1)
            .filter(|id| id.parse::<u32>().is_ok())
            .map(str::to_owned)
    };
    listed.lines().filter_map(id).collect()
}

// ---------------------------------------------------------------------------------------------------------------------------------------
// Children, and what is left of them.

/// A child that plays a role, with no setting but those it is given.
struct Role(Command);

impl Role {
    fn new(role: &str, temp: &Path) -> Self {
        let mut command = with_ctrl_c(env::current_exe().unwrap());
        command
            .env(ROLE, role)
            .env("TMPDIR", temp)
            .stdin(Stdio::piped())
            .process_group(0);
        for setting in ["DATABASE_URL", "OVERSOLD_BACKENDS", "OVERSOLD_REQUIRE"] {
            command.env_remove(setting);
        }
        Self(command)
    }

    fn set(mut self, setting: &str, value: impl AsRef<OsStr>) -> Self {
        self.0.env(setting, value);
        self
    }

    fn forced(self, source: Source) -> Self {
        self.set("OVERSOLD_BACKENDS", source.name())
    }

    fn ends(mut self) -> Output {
        self.0.stdin(Stdio::null()).output().unwrap()
    }

    fn succeeds(self) -> Output {
        let output = self.ends();
        assert!(output.status.success(), "{}", text(&output));
        output
    }

    /// What it says on stdout.
    fn said(self) -> Value {
        let output = self.succeeds();
        serde_json::from_slice(&output.stdout).unwrap_or_else(|_| panic!("{}", text(&output)))
    }

    /// Starts it and waits for its first words.
    fn held(mut self) -> Held {
        let mut child = self.0.stdout(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap();
        let mut said = String::new();
        BufReader::new(child.stdout.take().unwrap())
            .read_line(&mut said)
            .unwrap();
        let stdin = child.stdin.take();
        let said = serde_json::from_str(&said).expect("the child says what it holds");
        Held { child, stdin, said }
    }
}

/// A command for which Ctrl-C is not ignored, even if this test runs in the background of a shell, where it is.
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
struct Held {
    child: Child,
    stdin: Option<ChildStdin>,
    said: Value,
}

impl Held {
    fn word(&self, word: &str) -> &str {
        self.said[word].as_str().unwrap()
    }

    fn folder(&self) -> PathBuf {
        PathBuf::from(self.word("folder"))
    }

    /// The processes that were started for its folders: the keeper, the server, and the server's own.
    fn processes(&self) -> Vec<u32> {
        let table = processes();
        let mut folders = self.elsewhere();
        folders.push(self.folder());
        let ours = |process: &&Process| {
            folders
                .iter()
                .any(|folder| process.line.contains(folder.to_str().unwrap()))
        };
        let mut pids: Vec<u32> = table.iter().filter(ours).map(|process| process.pid).collect();
        let children = table.iter().filter(|process| pids.contains(&process.parent));
        pids.extend(children.map(|process| process.pid).collect::<Vec<_>>());
        pids
    }

    fn keeper(&self) -> Pid {
        let table = processes();
        let keeper = table
            .iter()
            .find(|process| process.line.contains(&format!("keep {}", self.word("folder"))));
        Pid::from_raw(i32::try_from(keeper.unwrap().pid).unwrap()).unwrap()
    }

    fn containers(&self) -> Vec<String> {
        names_in(&self.folder().join("containers"))
    }

    /// The folders it has in other places.
    fn elsewhere(&self) -> Vec<PathBuf> {
        let book = self.folder().join("elsewhere");
        let entries = names_in(&book).into_iter();
        entries
            .map(|entry| PathBuf::from(fs::read_to_string(book.join(entry)).unwrap().trim()))
            .collect()
    }

    fn end(&mut self, end: End) {
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
enum End {
    Exit,
    Panic,
    CtrlC,
    Kill,
}

impl End {
    fn name(self) -> &'static str {
        match self {
            Self::Exit => "exit",
            Self::Panic => "a_panic",
            Self::CtrlC => "ctrl_c",
            Self::Kill => "sigkill",
        }
    }
}

fn text(output: &Output) -> String {
    let [stdout, stderr] = [&output.stdout, &output.stderr].map(|bytes| String::from_utf8_lossy(bytes));
    format!("{}\n{stdout}{stderr}", output.status)
}

/// A temporary folder for children, which a server that runs as another user can reach. It must become empty after the last of them.
struct Temp(TempDir);

fn temp() -> Temp {
    let temp = tempfile::tempdir().unwrap();
    fs::set_permissions(temp.path(), fs::Permissions::from_mode(0o711)).unwrap();
    Temp(temp)
}

impl Temp {
    fn path(&self) -> &Path {
        self.0.path()
    }

    fn becomes_empty(&self) {
        until(&format!("{} to become empty", self.path().display()), || {
            names_in(self.path()).is_empty()
        });
    }
}

impl Drop for Temp {
    fn drop(&mut self) {
        // A keeper whose folder is taken away can't know what to end. A failed test waits too, but has said already what is wrong.
        let began = Instant::now();
        while thread::panicking() && began.elapsed() < PATIENCE && !names_in(self.path()).is_empty() {
            thread::sleep(LOOK_AGAIN_AFTER);
        }
        if !thread::panicking() {
            self.becomes_empty();
        }
    }
}

struct Process {
    pid: u32,
    parent: u32,
    line: String,
}

/// All processes that have not ended.
fn processes() -> Vec<Process> {
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

fn until(what: &str, mut holds: impl FnMut() -> bool) {
    let began = Instant::now();
    while !holds() {
        assert!(began.elapsed() < PATIENCE, "waited {PATIENCE:?} for {what}");
        thread::sleep(LOOK_AGAIN_AFTER);
    }
}

fn names_in(folder: &Path) -> Vec<String> {
    let entries = fs::read_dir(folder).unwrap();
    entries
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect()
}

/// Whether the engine has a container of this name, running or not.
fn container_exists(name: &str) -> bool {
    let filter = format!("name=^/{name}$");
    let listed = Command::new("docker")
        .args(["container", "ls", "--all", "--quiet", "--filter", &filter])
        .output()
        .unwrap();
    assert!(listed.status.success(), "{}", text(&listed));
    !listed.stdout.is_empty()
}

/// A server for tests of external ones: a native one of this process, and a database on it whose URL to give to children.
fn external() -> (tokio::runtime::Runtime, backends::Private, Database) {
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let (postgres, database) = runtime.block_on(async {
        let postgres = Postgres::private(Durability::Fast).await.unwrap();
        let database = postgres.database(schema("tickets")).await.unwrap();
        (postgres, database)
    });
    (runtime, postgres, database)
}

async fn databases(database: &Database) -> Vec<String> {
    let names = sqlx::query_scalar("select datname from pg_database order by 1");
    names.fetch_all(&mut connect(database).await).await.unwrap()
}

// ---------------------------------------------------------------------------------------------------------------------------------------
// The tests.

fn an_external_server_is_used_and_left_as_it_was() {
    let (runtime, _postgres, database) = external();
    let before = runtime.block_on(databases(&database));
    let temp = temp();
    let mut held = Role::new("hold", temp.path())
        .set("DATABASE_URL", database.url())
        .held();
    assert!(
        database.url().contains(held.word("address")),
        "{}",
        held.word("address")
    );
    let during = runtime.block_on(databases(&database));
    assert_eq!(during.len(), before.len() + 1, "{during:?}");
    held.end(End::Exit);
    assert_eq!(runtime.block_on(databases(&database)), before);
    temp.becomes_empty();

    let said = Role::new("find", temp.path())
        .set("DATABASE_URL", database.url())
        .said();
    assert_eq!(
        (&said["source"], &said["reason"]),
        (&json!("external"), &json!("DATABASE_URL is set"))
    );
}

fn an_external_server_is_swept() {
    let (runtime, _postgres, database) = external();
    let before = runtime.block_on(databases(&database));
    let temp = temp();
    let role = || Role::new("hold", temp.path()).set("DATABASE_URL", database.url());
    let mut killed = role().held();
    let mut alive = role().held();
    killed.end(End::Kill);
    assert_eq!(
        runtime.block_on(databases(&database)).len(),
        before.len() + 2,
        "SIGKILL leaves a database behind"
    );

    // Its connection may take a moment to be missed by the server.
    until("the next run to drop it", || {
        Role::new("find", temp.path())
            .set("DATABASE_URL", database.url())
            .succeeds();
        runtime.block_on(databases(&database)).len() == before.len() + 1
    });
    runtime.block_on(async {
        let connection = PgConnection::connect(alive.word("url")).await;
        connection.expect("the database of a run that is alive stays");
    });
    alive.end(End::Exit);
    assert_eq!(runtime.block_on(databases(&database)), before);
}

fn an_external_user_must_be_allowed() {
    let (runtime, _postgres, database) = external();
    runtime.block_on(async {
        let user = sqlx::raw_sql("create role guest login password 'guest'");
        user.execute(&mut connect(&database).await).await.unwrap();
    });
    let (_, place) = database
        .url()
        .rsplit_once('@')
        .map(|(_, place)| ((), place.to_owned()))
        .unwrap();
    let said = Role::new("find", temp().path())
        .set("DATABASE_URL", format!("postgres://guest:guest@{place}"))
        .said();
    let error = said["error"].as_str().unwrap();
    assert!(error.contains("may not create databases"), "{error}");
    assert!(!error.contains("guest:guest"), "{error}");
}

fn a_forced_source_wins_over_an_external_one() {
    let temp = temp();
    let role = Role::new("find", temp.path()).set("DATABASE_URL", "postgres://nobody@127.0.0.1:1/none");
    let said = role.forced(Source::Native).said();
    assert_eq!(
        (&said["source"], &said["reason"]),
        (&json!("native"), &json!("OVERSOLD_BACKENDS asks for it"))
    );
}

fn every_bad_setting_gets_one_clear_line() {
    for (setting, value, line) in [
        (
            "OVERSOLD_BACKENDS",
            "podman",
            "OVERSOLD_BACKENDS is `podman`; it takes `docker` or `native`",
        ),
        (
            "OVERSOLD_BACKENDS",
            "external",
            "OVERSOLD_BACKENDS is `external`; it takes `docker` or `native`",
        ),
    ] {
        let said = Role::new("find", temp().path()).set(setting, value).said();
        assert_eq!(said, json!({ "error": line, "setting": true }));
    }
    for (source, setting, value, part) in [
        (
            Source::Native,
            "OVERSOLD_POSTGRES_BIN",
            "/nowhere",
            "OVERSOLD_POSTGRES_BIN is `/nowhere`, which does not hold initdb and postgres",
        ),
        (
            Source::Docker,
            "DOCKER_HOST",
            "unix:///nowhere/docker.sock",
            "no Docker engine answers at unix:///nowhere/docker.sock",
        ),
        (
            Source::Docker,
            "DOCKER_HOST",
            "nonsense",
            "no Docker engine answers at nonsense",
        ),
        (
            Source::Docker,
            "OVERSOLD_POSTGRES_IMAGE",
            "postgres:",
            "OVERSOLD_POSTGRES_IMAGE is `postgres:`, which is no name of an image",
        ),
    ] {
        let said = Role::new("find", temp().path())
            .forced(source)
            .set(setting, value)
            .said();
        let error = said["error"].as_str().unwrap();
        assert!(error.contains(part), "{error}");
    }
}

fn an_absent_external_server() {
    for (url, part) in [
        (
            "postgres://me:s3cret@127.0.0.1:1/sale",
            "postgres://me:***@127.0.0.1:1/sale does not answer",
        ),
        (
            "mysql://me:s3cret@127.0.0.1:1/sale",
            "DATABASE_URL is no URL of a Postgres database",
        ),
        ("s3cret", "DATABASE_URL is no URL of a Postgres database"),
    ] {
        let output = Role::new("find", temp().path()).set("DATABASE_URL", url).succeeds();
        let said: Value = serde_json::from_slice(&output.stdout).unwrap();
        let error = said["error"].as_str().unwrap();
        assert!(error.contains(part), "{error}");
        assert!(
            error.ends_with("Set DATABASE_URL to a server that answers, or unset it to have one started."),
            "{error}"
        );
        assert!(!text(&output).contains("s3cret"), "{}", text(&output));
    }
}

/// A child for which there is no Postgres anywhere.
fn nowhere(role: &str, temp: &Path) -> Role {
    Role::new(role, temp)
        .set("DOCKER_HOST", "unix:///nowhere/docker.sock")
        .set("OVERSOLD_POSTGRES_BIN", "/nowhere")
}

fn nothing_there_says_what_was_tried() {
    let said = nowhere("find", temp().path()).said();
    let error = said["error"].as_str().unwrap();
    let (tried, remedy) = error.rsplit_once('\n').unwrap();
    assert_eq!(
        tried,
        "there is no postgres:\
         \n  external: DATABASE_URL is not set\
         \n  docker: no Docker engine answers at unix:///nowhere/docker.sock\
         \n  native: OVERSOLD_POSTGRES_BIN is `/nowhere`, which does not hold initdb and postgres"
    );
    assert!(
        remedy.starts_with("To get one: ") && remedy.ends_with(", or start a Docker engine."),
        "{remedy}"
    );
    assert!(remedy.contains("install"), "{remedy}");
}

/// This program as a whole, on a machine that has nothing.
fn this_test(temp: &Path, filter: &str) -> Role {
    let mut role = nowhere("", temp);
    role.0.env_remove(ROLE).args(["--exact", filter]);
    role
}

fn an_absent_source_is_ignored_with_its_reason() {
    for (source, reason) in [
        ("docker", "no Docker engine answers at unix:///nowhere/docker.sock"),
        (
            "native",
            "OVERSOLD_POSTGRES_BIN is `/nowhere`, which does not hold initdb and postgres",
        ),
    ] {
        let output = this_test(temp().path(), &format!("{source}::can_be_durable")).succeeds();
        let line = format!("{source}::can_be_durable ... ignored (no {source} source: {reason})");
        assert!(text(&output).contains(&line), "{}", text(&output));
        assert!(
            text(&output).contains("0 passed; 0 failed; 1 ignored"),
            "{}",
            text(&output)
        );
    }
}

fn a_required_source_that_is_absent_fails() {
    let output = this_test(temp().path(), "docker::can_be_durable")
        .set("OVERSOLD_REQUIRE", "native, docker")
        .ends();
    assert_eq!(output.status.code(), Some(101));
    let line = "OVERSOLD_REQUIRE lists docker, but: no Docker engine answers at unix:///nowhere/docker.sock";
    assert!(text(&output).contains(line), "{}", text(&output));

    // One that is not listed may still be absent.
    this_test(temp().path(), "docker::can_be_durable")
        .set("OVERSOLD_REQUIRE", "native")
        .succeeds();
}

fn a_bad_list_of_required_sources_is_refused() {
    let output = this_test(temp().path(), "docker::can_be_durable")
        .set("OVERSOLD_REQUIRE", "native,podman")
        .ends();
    assert_eq!(output.status.code(), Some(2));
    let line = "OVERSOLD_REQUIRE lists `podman`; it takes `docker` and `native`, with a comma between them\n";
    assert_eq!(String::from_utf8_lossy(&output.stderr), line);
}

const NO_IMAGE: &str = "localhost:1/oversold/none:here";

fn an_image_that_cannot_be_pulled_is_tried_once() {
    let temp = temp();
    let role = || {
        Role::new("find", temp.path())
            .forced(Source::Docker)
            .set("OVERSOLD_POSTGRES_IMAGE", NO_IMAGE)
    };
    for (tried, part) in [(true, "can't be pulled"), (false, "to have it tried again now, delete")] {
        let output = role().succeeds();
        assert!(
            text(&output).contains(&format!("image {NO_IMAGE} is not here, and")),
            "{}",
            text(&output)
        );
        assert!(text(&output).contains(part), "{}", text(&output));
        assert_eq!(text(&output).contains("pulling the image"), tried, "{}", text(&output));
    }
    forget_the_pull(&temp);
}

fn without_an_image_native_takes_over() {
    let temp = temp();
    let said = Role::new("find", temp.path())
        .set("OVERSOLD_POSTGRES_IMAGE", NO_IMAGE)
        .said();
    assert_eq!(said["source"], "native");
    let reason = said["reason"].as_str().unwrap();
    assert!(
        reason.starts_with(&format!("DATABASE_URL is not set; image {NO_IMAGE} is not here")),
        "{reason}"
    );
    forget_the_pull(&temp);
}

/// Deletes the note that a pull has failed, which stays on purpose.
fn forget_the_pull(temp: &Temp) {
    let names = names_in(temp.path());
    let note = names
        .iter()
        .find(|name| name.starts_with("oversold-pull-failed-"))
        .expect("there is a note");
    fs::remove_file(temp.path().join(note)).unwrap();
}

fn nothing_stays_behind(source: Source, end: End) {
    let temp = temp();
    let mut held = Role::new("hold", temp.path()).forced(source).held();
    let pids = held.processes();
    let containers = held.containers();
    let elsewhere = held.elsewhere();
    assert!(elsewhere.iter().all(|folder| folder.exists()), "{elsewhere:?}");
    match source {
        Source::Docker => assert!(containers.iter().all(|name| container_exists(name)) && containers.len() == 1),
        _ => assert!(pids.len() > 4, "the keeper, the server and its children: {pids:?}"),
    }
    TcpStream::connect(held.word("address")).unwrap();

    held.end(end);
    temp.becomes_empty();
    until("every process to end", || {
        processes().iter().all(|process| !pids.contains(&process.pid))
    });
    assert!(TcpStream::connect(held.word("address")).is_err());
    assert!(!containers.iter().any(|name| container_exists(name)), "{containers:?}");
}

fn the_next_run_sweeps(source: Source) {
    let temp = temp();
    let mut held = Role::new("hold", temp.path()).forced(source).held();
    let pids = held.processes();
    let containers = held.containers();
    let elsewhere = held.elsewhere();
    assert!(elsewhere.iter().all(|folder| folder.exists()), "{elsewhere:?}");
    kill_process(held.keeper(), Signal::KILL).unwrap();
    held.end(End::Kill);
    TcpStream::connect(held.word("address")).expect("without its keeper, the server outlives its owner");

    Role::new("keep", temp.path()).succeeds();
    temp.becomes_empty();
    until("every process to end", || {
        processes().iter().all(|process| !pids.contains(&process.pid))
    });
    assert!(!containers.iter().any(|name| container_exists(name)), "{containers:?}");
}

fn a_folder_whose_owner_lives_is_not_swept() {
    let temp = temp();
    let mut held = Role::new("hold", temp.path()).forced(Source::Native).held();
    kill_process(held.keeper(), Signal::KILL).unwrap();
    Role::new("keep", temp.path()).succeeds();
    until("the other run's folder to go", || names_in(temp.path()).len() == 1);
    let runtime = tokio::runtime::Runtime::new().unwrap();
    runtime
        .block_on(PgConnection::connect(held.word("url")))
        .expect("the server is untouched");

    held.end(End::Exit);
    Role::new("keep", temp.path()).succeeds();
    temp.becomes_empty();
}

fn a_process_that_was_given_an_old_pid_is_left_alone() {
    let temp = temp();
    let mut bystander = Command::new("sleep").arg("1000").process_group(0).spawn().unwrap();
    let stale = temp.path().join("oversold-run-stale");
    fs::create_dir_all(stale.join("pids")).unwrap();
    fs::write(stale.join("owner"), "").unwrap();
    fs::write(stale.join("pids/postgres-0"), format!("{} 1\n", bystander.id())).unwrap();
    Role::new("keep", temp.path()).succeeds();
    temp.becomes_empty();
    let ended = bystander.try_wait().unwrap();
    bystander.kill().unwrap();
    bystander.wait().unwrap();
    assert_eq!(ended, None);
}

fn a_process_that_ignores_the_signal_is_killed() {
    let temp = temp();
    let said = Role::new("stubborn", temp.path()).said();
    let pid = u32::try_from(said["pid"].as_u64().unwrap()).unwrap();
    temp.becomes_empty();
    until("the stubborn process to end", || {
        processes().iter().all(|process| process.pid != pid)
    });
}

/// The keeper clears up while a process that was just started has not signed the book yet.
fn a_program_that_starts_after_the_end_gives_up() {
    let mut command = keeper::command("touch").unwrap();
    let folder = keeper::folder("probe").unwrap();
    let proof = folder.join("it-ran");
    let book = folder.parent().unwrap().join("pids");
    let aside = folder.join("pids.closed");
    // As the keeper does. This process's own book is put back, as other tests of it sign there.
    fs::rename(&book, &aside).unwrap();
    let status = command.arg(&proof).stderr(Stdio::null()).status();
    fs::rename(&aside, &book).unwrap();
    assert!(!status.unwrap().success());
    assert!(!proof.exists());
}

/// `infra/setup.sh` with no setting but those it is given.
fn setup() -> Command {
    let mut setup = Command::new("/bin/sh");
    setup.arg(repository().join("infra/setup.sh"));
    for setting in ["DATABASE_URL", "OVERSOLD_BACKENDS", "OVERSOLD_POSTGRES_IMAGE"] {
        setup.env_remove(setting);
    }
    setup
}

fn repository() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap()
}

fn setup_is_silent() {
    for (setting, value) in [
        ("OVERSOLD_BACKENDS", "native"),
        ("DATABASE_URL", "postgres://me@db/sale"),
    ] {
        let output = setup().env(setting, value).output().unwrap();
        assert_eq!(text(&output), "exit status: 0\n", "{setting}");
    }
}

fn setup_says_what_to_run() {
    // With no program on PATH but this one, nothing can be installed, whatever this machine has.
    let path = tempfile::tempdir().unwrap();
    std::os::unix::fs::symlink("/usr/bin/uname", path.path().join("uname")).unwrap();
    let nothing = || {
        let mut setup = setup();
        setup.env("PATH", path.path()).env("OVERSOLD_POSTGRES_BIN", "/nowhere");
        setup
    };
    for (forced, code, parts) in [
        (
            "",
            1,
            [
                "there is no Postgres, and none can be installed from here",
                "start a Docker engine",
                "export DATABASE_URL=",
            ],
        ),
        (
            "docker",
            1,
            ["OVERSOLD_BACKENDS is `docker`", "no Docker engine answers", "start one"],
        ),
        (
            "podman",
            2,
            ["OVERSOLD_BACKENDS is `podman`", "it takes `docker` or `native`", ""],
        ),
    ] {
        let output = nothing().env("OVERSOLD_BACKENDS", forced).output().unwrap();
        assert_eq!(output.status.code(), Some(code), "{}", text(&output));
        for part in parts {
            assert!(text(&output).contains(part), "{}", text(&output));
        }
    }
}

fn the_image_is_the_same_everywhere() {
    let image = |file: &str| {
        let content = fs::read_to_string(repository().join(file)).unwrap();
        let (_, from) = content
            .split_once("postgres:1")
            .unwrap_or_else(|| panic!("{file} names an image"));
        let end = from.find(|c: char| !c.is_ascii_alphanumeric() && c != '-').unwrap();
        from[..end].to_owned()
    };
    let suite = image("tests/src/backends/postgres/docker.rs");
    assert_eq!(image("infra/setup.sh"), suite);
    assert_eq!(image("docker-compose.yml"), suite);
}
