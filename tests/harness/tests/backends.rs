//! Where the services come from, what is said when one comes from nowhere, and that nothing stays behind.
//!
//! Settings are read from the environment and a process can end only once, so most tests run this very program again as a child: with
//! settings and a temporary folder of its own, in a role named by [`ROLE`] and on a service named by [`SERVICE`].

#![allow(clippy::unwrap_used)]

use std::{
    any::Any,
    borrow::Cow,
    collections::BTreeMap,
    env,
    ffi::OsStr,
    fs,
    io::{self, BufRead, BufReader, Read, Write},
    net::TcpStream,
    os::unix::{fs::PermissionsExt, process::CommandExt},
    path::{Path, PathBuf},
    process::{Child, ChildStdin, Command, Output, Stdio},
    sync::{Arc, LazyLock, OnceLock},
    thread,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use box_office::Schema;
use harness::backends::{
    self, Database, Durability, Kafka, Missing, Postgres, Private, Redis, Reply, Report, Source, keeper,
};
use libtest_mimic::{Arguments, Completion, Failed, Trial};
use rustix::process::{Pid, Signal, kill_process, kill_process_group};
use serde_json::{Value, json};
use sqlx::{
    Connection, PgConnection, SqlSafeStr,
    migrate::{Migration, MigrationType, Migrator},
};
use tempfile::TempDir;

/// Names what a child of this test is to do.
const ROLE: &str = "OVERSOLD_TEST_ROLE";
/// Names the service it is to do that on.
const SERVICE: &str = "OVERSOLD_TEST_SERVICE";
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
            let absent = test
                .needs
                .iter()
                .find_map(|&source| Some((source, absent(test.service, source)?)));
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
                format!("OVERSOLD_REQUIRE lists `{name}`; expected `docker` and `native`, with a comma between them")
            })
        })
        .collect()
}

/// A service, with its names.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Service {
    Postgres,
    Redis,
    Kafka,
}

impl Service {
    const ALL: [Self; 3] = [Self::Postgres, Self::Redis, Self::Kafka];

    fn name(self) -> &'static str {
        match self {
            Self::Postgres => "postgres",
            Self::Redis => "redis",
            Self::Kafka => "kafka",
        }
    }

    /// One of its settings, such as `OVERSOLD_REDIS_BIN`.
    fn setting(self, what: &str) -> String {
        format!("OVERSOLD_{}_{what}", self.name().to_uppercase())
    }

    /// The setting that names the folder of its programs.
    fn folder_variable(self) -> String {
        self.setting(if self == Self::Kafka { "JARS" } else { "BIN" })
    }

    fn url_variable(self) -> &'static str {
        match self {
            Self::Postgres => "DATABASE_URL",
            Self::Redis => "REDIS_URL",
            Self::Kafka => "KAFKA_BOOTSTRAP_SERVERS",
        }
    }

    /// Why there is no native one for [`nowhere`].
    fn not_native(self) -> &'static str {
        match self {
            Self::Postgres => "OVERSOLD_POSTGRES_BIN is `/nowhere`, which does not hold initdb and postgres",
            Self::Redis => "OVERSOLD_REDIS_BIN is `/nowhere`, which does not hold redis-server",
            Self::Kafka => "OVERSOLD_KAFKA_JARS is `/nowhere`, which does not hold the jars of Kafka",
        }
    }
}

/// Why there is no such source on this machine, if there is none.
fn absent(service: Service, source: Source) -> Option<&'static str> {
    static KNOWN: [OnceLock<Option<String>>; 6] = [const { OnceLock::new() }; 6];
    let known = &KNOWN[service as usize * 2 + usize::from(source == Source::Native)];
    let reason = known.get_or_init(|| {
        let temp = temp();
        let said = Role::new(service, "find", temp.path()).forced(source).said();
        said["error"].as_str().map(|error| {
            let line = error.lines().find_map(|line| line.trim().strip_prefix(source.name()));
            line.unwrap_or(error).trim_start_matches(": ").to_owned()
        })
    });
    reason.as_deref()
}

struct Test {
    name: String,
    service: Service,
    needs: Vec<Source>,
    run: Box<dyn FnOnce() + Send>,
}

fn test(name: impl Into<String>, service: Service, needs: &[Source], run: impl FnOnce() + Send + 'static) -> Test {
    Test {
        name: name.into(),
        service,
        needs: needs.to_vec(),
        run: Box::new(run),
    }
}

type OfEach = (&'static str, &'static [Source], fn(Service));
type OfOne = (&'static str, Service, &'static [Source], fn());

fn tests() -> Vec<Test> {
    use Service::{Kafka, Postgres, Redis};
    use Source::{Docker, Native};

    let of_each_service: [OfEach; 10] = [
        (
            "an_external_server_is_used_and_left_as_it_was",
            &[Native],
            an_external_server_is_used_and_left_as_it_was,
        ),
        (
            "a_forced_source_wins_over_an_external_one",
            &[Native],
            a_forced_source_wins_over_an_external_one,
        ),
        (
            "every_bad_setting_gets_one_clear_line",
            &[],
            every_bad_setting_gets_one_clear_line,
        ),
        (
            "a_server_that_was_asked_for_and_is_not_there_is_named_without_its_password",
            &[],
            an_absent_external_server,
        ),
        (
            "nothing_there_says_what_was_tried_and_what_to_install",
            &[],
            nothing_there_says_what_was_tried,
        ),
        (
            "an_absent_source_is_ignored_with_its_reason",
            &[],
            an_absent_source_is_ignored_with_its_reason,
        ),
        (
            "without_a_usable_image_a_native_server_takes_over",
            &[Docker, Native],
            without_an_image_native_takes_over,
        ),
        (
            "setup_is_silent_when_there_is_nothing_to_install",
            &[Native],
            setup_is_silent,
        ),
        (
            "setup_says_what_to_run_where_nothing_can_be_installed",
            &[],
            setup_says_what_to_run,
        ),
        (
            "the_image_is_the_same_everywhere",
            &[],
            the_image_is_the_same_everywhere,
        ),
    ];
    let of_one_service: [OfOne; 16] = [
        (
            "an_external_user_must_be_allowed_to_create_databases",
            Postgres,
            &[Native],
            an_external_user_must_be_allowed_to_create_databases,
        ),
        (
            "an_external_user_must_be_allowed_to_write",
            Redis,
            &[Native],
            an_external_user_must_be_allowed_to_write,
        ),
        (
            "what_a_killed_run_left_in_an_external_kafka_goes_after_a_day",
            Kafka,
            &[Native],
            an_external_kafka_is_swept,
        ),
        ("no_java_is_said_so", Kafka, &[], no_java_is_said_so),
        (
            "jars_that_do_not_start_show_the_end_of_the_log",
            Kafka,
            &[Native],
            jars_that_do_not_start_show_the_end_of_the_log,
        ),
        (
            "an_image_that_does_not_start_shows_the_end_of_its_log",
            Kafka,
            &[Docker],
            an_image_that_does_not_start_shows_the_end_of_its_log,
        ),
        (
            "a_required_source_that_is_absent_fails",
            Postgres,
            &[],
            a_required_source_that_is_absent_fails,
        ),
        (
            "a_bad_list_of_required_sources_is_refused",
            Postgres,
            &[],
            a_bad_list_of_required_sources_is_refused,
        ),
        (
            "setup_takes_the_names_of_services",
            Postgres,
            &[],
            setup_takes_the_names_of_services,
        ),
        (
            "setup_names_the_tools_that_a_build_takes",
            Postgres,
            &[],
            setup_names_the_tools_that_a_build_takes,
        ),
        (
            "an_image_that_cannot_be_pulled_is_tried_once",
            Postgres,
            &[Docker],
            an_image_that_cannot_be_pulled_is_tried_once,
        ),
        (
            "a_folder_whose_owner_lives_is_not_swept",
            Postgres,
            &[Native],
            a_folder_whose_owner_lives_is_not_swept,
        ),
        (
            "a_process_that_was_given_an_old_pid_is_left_alone",
            Postgres,
            &[],
            a_process_that_was_given_an_old_pid_is_left_alone,
        ),
        (
            "a_process_that_ignores_the_signal_is_killed",
            Postgres,
            &[],
            a_process_that_ignores_the_signal_is_killed,
        ),
        (
            "a_book_stays_while_something_of_it_does",
            Postgres,
            &[],
            a_book_stays_while_something_of_it_does,
        ),
        (
            "a_program_that_starts_after_the_end_gives_up",
            Postgres,
            &[],
            a_program_that_starts_after_the_end_gives_up,
        ),
    ];
    let mut tests = Vec::new();
    for service in Service::ALL {
        for (name, needs, run) in of_each_service {
            tests.push(test(format!("{}::{name}", service.name()), service, needs, move || {
                run(service);
            }));
        }
    }
    for service in [Postgres, Redis] {
        let name = "what_a_killed_run_left_on_an_external_server_goes_with_the_next";
        let name = format!("{}::{name}", service.name());
        tests.push(test(name, service, &[Native], move || {
            an_external_server_is_swept(service)
        }));
    }
    for (name, service, needs, run) in of_one_service {
        tests.push(test(name, service, needs, run));
    }

    let (each, postgres, redis, kafka): (&[_], &[_], &[_], &[_]) = (&Service::ALL, &[Postgres], &[Redis], &[Kafka]);
    for source in [Docker, Native] {
        for (services, what, role) in [
            (each, "serves_with_the_settings_of_every_source", "serve"),
            (each, "is_shared_by_all_runtimes_of_a_process", "share"),
            (each, "keeps_its_address_when_it_is_stopped_or_killed", "break"),
            (each, "is_gone_when_a_private_one_is_dropped", "private"),
            (postgres, "gives_each_of_many_at_once_a_database_of_its_own", "race"),
            (postgres, "drops_a_database_with_its_last_owner", "drop"),
            (postgres, "can_be_durable", "durable"),
            (redis, "deletes_the_keys_of_a_prefix_with_its_owner", "drop"),
            (kafka, "deletes_the_topics_of_a_prefix_with_its_owner", "drop"),
            (kafka, "answers_again_when_it_was_frozen", "freeze"),
            (redis, "answers_with_every_kind_of_reply", "reply"),
        ] {
            for &service in services {
                let name = format!("{}::{source}::{what}", service.name());
                tests.push(test(name, service, &[source], move || {
                    let temp = temp();
                    Role::new(service, role, temp.path()).forced(source).succeeds();
                }));
            }
        }
        for service in Service::ALL {
            let name = |what: &str| format!("{}::{source}::{what}", service.name());
            for end in [End::Exit, End::Panic, End::CtrlC, End::Kill] {
                let name = name(&format!("leaves_nothing_behind_after_{}", end.name()));
                tests.push(test(name, service, &[source], move || {
                    nothing_stays_behind(service, source, end);
                }));
            }
            let name = name("is_swept_by_the_next_run_when_its_keeper_was_killed");
            tests.push(test(name, service, &[source], move || {
                the_next_run_sweeps(service, source)
            }));
        }
    }
    tests
}

// ---------------------------------------------------------------------------------------------------------------------------------------
// Roles: what a child does.

fn play(role: &str) {
    let named = env::var(SERVICE).unwrap();
    let service = Service::ALL
        .into_iter()
        .find(|service| service.name() == named)
        .unwrap();
    let runtime = tokio::runtime::Runtime::new().unwrap();
    match role {
        "find" => {
            let said = match runtime.block_on(report(service)) {
                Ok(report) => serde_json::to_value(report).unwrap(),
                Err(missing) => {
                    json!({ "error": missing.to_string(), "setting": matches!(missing, Missing::BadSetting { .. }) })
                }
            };
            println!("{said}");
        }
        "hold" => hold(service, &runtime),
        "keep" => {
            keeper::folder("empty").unwrap();
        }
        "stubborn" => stubborn(),
        "serve" => runtime.block_on(async {
            match service {
                Service::Postgres => serve_postgres().await,
                Service::Redis => serve_redis().await,
                Service::Kafka => serve_kafka().await,
            }
        }),
        "share" => share(service),
        "race" => race(),
        "drop" => runtime.block_on(async {
            match service {
                Service::Postgres => drop_database().await,
                Service::Redis => drop_prefix().await,
                Service::Kafka => drop_topics().await,
            }
        }),
        "reply" => runtime.block_on(reply()),
        "break" => runtime.block_on(async {
            match service {
                Service::Postgres => break_postgres().await,
                Service::Redis => break_redis().await,
                Service::Kafka => break_kafka().await,
            }
        }),
        "private" => runtime.block_on(drop_private(service)),
        "freeze" => runtime.block_on(freeze()),
        "durable" => runtime.block_on(durable()),
        _ => unreachable!("no role is called {role}"),
    }
}

/// Leaves a process behind that only SIGKILL ends.
#[allow(clippy::zombie_processes)]
fn stubborn() {
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

fn say(value: &Value) {
    println!("{value}");
    io::stdout().flush().unwrap();
}

/// What is told of the shared server.
async fn report(service: Service) -> Result<Report, Missing> {
    Ok(match service {
        Service::Postgres => backends::postgres().await?.report().clone(),
        Service::Redis => backends::redis().await?.report().clone(),
        Service::Kafka => backends::kafka().await?.report().clone(),
    })
}

/// Holds a server, and a database or a prefix with a key or a topic, until stdin ends, and then ends as it was told to.
fn hold(service: Service, runtime: &tokio::runtime::Runtime) {
    let (address, holds, _held): (String, String, Box<dyn Any>) = runtime.block_on(async {
        match service {
            Service::Postgres => {
                let postgres = backends::postgres().await.unwrap();
                let database = postgres.database(schema("tickets")).await.unwrap();
                let url = database.url();
                let (_, name) = url.rsplit_once('/').unwrap();
                let name = name.split('?').next().unwrap().to_owned();
                let held: Box<dyn Any> = Box::new((Arc::clone(&postgres), database));
                (postgres.report().address.clone(), name, held)
            }
            Service::Redis => {
                let redis = backends::redis().await.unwrap();
                let prefix = redis.prefix();
                let key = format!("{prefix}lock");
                redis.command(&["SET", &key, "me"]).await.unwrap();
                let held: Box<dyn Any> = Box::new((Arc::clone(&redis), prefix));
                (redis.report().address.clone(), key, held)
            }
            Service::Kafka => {
                let kafka = backends::kafka().await.unwrap();
                let prefix = kafka.prefix();
                let topic = format!("{prefix}orders");
                kafka.create_topic(&topic, 2).await.unwrap();
                let held: Box<dyn Any> = Box::new((Arc::clone(&kafka), prefix));
                (kafka.report().address.clone(), topic, held)
            }
        }
    });
    let folder = keeper::folder("asked").unwrap();
    say(&json!({ "folder": folder.parent(), "address": address, "holds": holds }));
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

async fn serve_postgres() {
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

async fn serve_redis() {
    let redis = backends::redis().await.unwrap();
    let bulk = |text: &str| Reply::Bulk(text.to_owned());
    for (setting, value) in [("save", ""), ("appendonly", "no")] {
        let told = redis.command(&["CONFIG", "GET", setting]).await.unwrap();
        assert_eq!(told, Reply::Array(vec![bulk(setting), bulk(value)]));
        assert_eq!(redis.report().durability[setting], value);
    }

    let report = redis.report();
    assert_eq!(report.source.name(), env::var("OVERSOLD_BACKENDS").unwrap());
    let Reply::Bulk(about) = redis.command(&["INFO", "server"]).await.unwrap() else {
        panic!("INFO has a text");
    };
    assert!(about.contains(&format!("redis_version:{}", report.version)), "{about}");
    assert!(redis.url().contains(&report.address), "{report}");

    // Its port may be open to others than this machine, so it asks for a password.
    let mut stranger = TcpStream::connect(&report.address).unwrap();
    stranger.write_all(b"PING\r\n").unwrap();
    let mut answer = String::new();
    BufReader::new(stranger).read_line(&mut answer).unwrap();
    assert!(answer.starts_with("-NOAUTH"), "{answer}");
}

async fn serve_kafka() {
    let kafka = backends::kafka().await.unwrap();
    let (prefix, other) = (kafka.prefix(), kafka.prefix());
    assert_ne!(*prefix, *other);
    let topic = format!("{prefix}orders");
    kafka.create_topic(&topic, 3).await.unwrap();
    let made = BTreeMap::from([(topic.clone(), 3)]);
    assert_eq!(kafka.topics(&prefix).await.unwrap(), made);
    assert_eq!(kafka.topics(&other).await.unwrap(), BTreeMap::new());
    let again = kafka.create_topic(&topic, 3).await.unwrap_err();
    assert!(format!("{again:#}").contains("error code 36"), "{again:#}");

    let report = kafka.report();
    assert_eq!(report.source.name(), env::var("OVERSOLD_BACKENDS").unwrap());
    assert!(report.version.starts_with("4."), "{report}");
    assert_eq!(kafka.bootstrap_servers(), report.address);
    assert!(TcpStream::connect(&report.address).is_ok(), "{report}");
}

async fn drop_topics() {
    let kafka = backends::kafka().await.unwrap();
    let (kept, dropped) = (kafka.prefix(), kafka.prefix());
    for topic in ["orders", "orders-dead"] {
        kafka.create_topic(&format!("{dropped}{topic}"), 2).await.unwrap();
    }
    let topic = format!("{kept}orders");
    kafka.create_topic(&topic, 2).await.unwrap();
    drop(dropped);
    let began = Instant::now();
    let left = BTreeMap::from([(topic, 2)]);
    while kafka.topics("oversold-").await.unwrap() != left {
        assert!(began.elapsed() < PATIENCE, "waited for the topics to be deleted");
    }
}

async fn freeze() {
    let kafka = Kafka::private().await.unwrap();
    kafka.freeze().await.unwrap();
    let asked = kafka.topics("");
    tokio::pin!(asked);
    let answered = tokio::time::timeout(Duration::from_millis(200), &mut asked).await;
    assert!(answered.is_err(), "it stands still: {answered:?}");
    kafka.thaw().await.unwrap();
    // On the connection that was opened meanwhile.
    asked.await.unwrap();
    kafka.freeze().await.unwrap();
    kafka.kill().await.unwrap();
    kafka.start().await.unwrap();
    kafka.topics("").await.unwrap();
}

async fn reply() {
    let redis = backends::redis().await.unwrap();
    let (prefix, other) = (redis.prefix(), redis.prefix());
    assert_ne!(*prefix, *other);
    let key = format!("{prefix}lock");
    let bulk = |text: &str| Reply::Bulk(text.to_owned());
    for (words, expected) in [
        (vec!["SET", &key, "me", "NX"], Reply::Status("OK".to_owned())),
        (vec!["SET", &key, "you", "NX"], Reply::Nil),
        (vec!["GET", &key], bulk("me")),
        (vec!["PTTL", &key], Reply::Int(-1)),
        (vec!["MGET", &key, &other], Reply::Array(vec![bulk("me"), Reply::Nil])),
    ] {
        assert_eq!(redis.command(&words).await.unwrap(), expected, "{words:?}");
    }
    let refused = redis.command(&["HGET", &key, "count"]).await.unwrap();
    assert!(
        matches!(&refused, Reply::Error(why) if why.starts_with("WRONGTYPE")),
        "{refused:?}"
    );
}

async fn drop_prefix() {
    let redis = backends::redis().await.unwrap();
    let (kept, dropped) = (redis.prefix(), redis.prefix());
    // More than one SCAN finds, and none of the other prefix.
    for number in 0..1500 {
        redis
            .command(&["SET", &format!("{dropped}{number}"), "1"])
            .await
            .unwrap();
    }
    redis.command(&["SET", &format!("{kept}lock"), "1"]).await.unwrap();
    drop(dropped);
    let began = Instant::now();
    while redis.command(&["DBSIZE"]).await.unwrap() != Reply::Int(1) {
        assert!(began.elapsed() < PATIENCE, "waited for the keys to be deleted");
    }
    assert_eq!(
        redis.command(&["EXISTS", &format!("{kept}lock")]).await.unwrap(),
        Reply::Int(1)
    );
}

fn share(service: Service) {
    // Which one it is. It lives as long as the process.
    let on_its_own_runtime = || {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap();
        runtime.block_on(async {
            match service {
                Service::Postgres => {
                    let postgres = backends::postgres().await.unwrap();
                    let database = postgres.database(schema("tickets")).await.unwrap();
                    database.pool(1).await.unwrap();
                    Arc::as_ptr(&postgres).addr()
                }
                Service::Redis => {
                    let redis = backends::redis().await.unwrap();
                    redis.command(&["PING"]).await.unwrap();
                    Arc::as_ptr(&redis).addr()
                }
                Service::Kafka => {
                    let kafka = backends::kafka().await.unwrap();
                    kafka.topics("").await.unwrap();
                    Arc::as_ptr(&kafka).addr()
                }
            }
        })
    };
    let first = thread::scope(|scope| {
        let threads: Vec<_> = (0..4).map(|_| scope.spawn(on_its_own_runtime)).collect();
        let found: Vec<_> = threads.into_iter().map(|thread| thread.join().unwrap()).collect();
        assert!(found.iter().all(|one| *one == found[0]));
        found[0]
    });
    // And after all runtimes that took part in starting it are gone.
    assert_eq!(first, on_its_own_runtime());
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

async fn break_postgres() {
    let postgres = Postgres::private(Durability::Fast).await.unwrap();
    let database = postgres.database(schema("tickets")).await.unwrap();
    let write = async |number: i64| {
        let mut connection = connect(&database).await;
        let insert = sqlx::query("insert into tickets values ($1)").bind(number);
        insert.execute(&mut connection).await.unwrap();
        connection
    };
    let is_cut = async |mut connection: PgConnection| connection.ping().await.is_err();
    let written = async || {
        let rows = sqlx::query_scalar("select count(*) from tickets");
        let mut connection = PgConnection::connect(&database.url()).await.ok()?;
        Some(rows.fetch_one(&mut connection).await.unwrap())
    };
    // What was committed is still there.
    let left = [1, 2, 3];
    break_private(&postgres, &postgres.report().address, write, is_cut, written, left).await;
}

async fn break_redis() {
    let redis = Redis::private().await.unwrap();
    let prefix = redis.prefix();
    let address = &redis.report().address;
    let write = async |number: i64| {
        let set = redis.command(&["SET", &format!("{prefix}{number}"), "1"]).await;
        assert_eq!(set.unwrap(), Reply::Status("OK".to_owned()));
        let mut connection = TcpStream::connect(address).unwrap();
        connection.write_all(b"PING\r\n").unwrap();
        assert!(connection.read(&mut [0; 100]).unwrap() > 0, "it is served");
        connection
    };
    let is_cut = async |mut connection: TcpStream| !matches!(connection.read(&mut [0; 100]), Ok(1..));
    let written = async || match redis.command(&["DBSIZE"]).await.ok()? {
        Reply::Int(keys) => Some(keys),
        other => panic!("{other:?}"),
    };
    // It comes back empty.
    break_private(&redis, address, write, is_cut, written, [0, 0, 0]).await;
}

async fn break_kafka() {
    let kafka = Kafka::private().await.unwrap();
    let prefix = kafka.prefix();
    let address = kafka.bootstrap_servers();
    let write = async |number: i64| {
        kafka.create_topic(&format!("{prefix}{number}"), 1).await.unwrap();
        TcpStream::connect(address).unwrap()
    };
    let is_cut = async |mut connection: TcpStream| !matches!(connection.read(&mut [0; 100]), Ok(1..));
    let written = async || Some(i64::try_from(kafka.topics(&prefix).await.ok()?.len()).unwrap());
    // What was acknowledged is still there.
    break_private(&kafka, address, write, is_cut, written, [1, 2, 3]).await;
}

/// Stops or kills a server after each write. `left` is what is to be there after each start.
async fn break_private<S, C>(
    server: &Private<S>,
    address: &str,
    write: impl AsyncFn(i64) -> C,
    is_cut: impl AsyncFn(C) -> bool,
    written: impl AsyncFn() -> Option<i64>,
    left: [i64; 3],
) {
    let mut pids = vec![server.pid().await.unwrap().unwrap()];
    for ((number, kill), left) in [(1, false), (2, true), (3, true)].into_iter().zip(left) {
        let connection = write(number).await;
        if kill {
            server.kill().await.unwrap();
        } else {
            server.stop().await.unwrap();
        }
        assert!(is_cut(connection).await, "the connection is cut");
        assert_eq!(written().await, None, "nobody answers");
        assert_eq!(server.pid().await.unwrap(), None);
        // What is down already stays down.
        server.stop().await.unwrap();
        server.kill().await.unwrap();

        server.start().await.unwrap();
        server.start().await.unwrap();
        assert_eq!(written().await, Some(left), "what is left after a start");
        assert!(TcpStream::connect(address).is_ok(), "at the same address");
        pids.push(server.pid().await.unwrap().unwrap());
    }
    pids.sort_unstable();
    pids.dedup();
    assert_eq!(pids.len(), 4, "it was another process each time: {pids:?}");
}

async fn drop_private(service: Service) {
    match service {
        Service::Postgres => {
            let start = async || Postgres::private(Durability::Fast).await.unwrap();
            let segments = drop_two(start, Postgres::report).await;
            let gone = segments
                .iter()
                .filter(|segment| !shared_memory().contains(segment))
                .count();
            let native = env::var("OVERSOLD_BACKENDS").unwrap() == "native";
            assert!(!native || gone >= 2, "both segments of shared memory are gone");
        }
        Service::Redis => {
            drop_two(async || Redis::private().await.unwrap(), Redis::report).await;
        }
        Service::Kafka => {
            drop_two(async || Kafka::private().await.unwrap(), Kafka::report).await;
        }
    }
}

/// Drops two private servers, of which one was killed. Returns the segments of shared memory that there were before.
async fn drop_two<S>(start: impl AsyncFn() -> Private<S>, report: fn(&S) -> &Report) -> Vec<String> {
    let up = start().await;
    let killed = start().await;
    assert_ne!(report(&up).address, report(&killed).address);
    killed.kill().await.unwrap();
    let addresses = [report(&up).address.clone(), report(&killed).address.clone()];
    let segments = shared_memory();
    drop(up);
    drop(killed);
    for address in addresses {
        assert!(TcpStream::connect(&address).is_err(), "{address} is closed");
    }
    segments
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
    fn new(service: Service, role: &str, temp: &Path) -> Self {
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

    fn set(mut self, setting: impl AsRef<OsStr>, value: impl AsRef<OsStr>) -> Self {
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
        // A server may change how it is shown.
        let book = self.folder().join("pids");
        pids.extend(names_in(&book).into_iter().map(|entry| {
            let entry = fs::read_to_string(book.join(entry)).unwrap();
            entry.split_whitespace().next().unwrap().parse::<u32>().unwrap()
        }));
        pids.sort_unstable();
        pids.dedup();
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

/// A server for tests of external ones: a private native one of this process, with something of somebody else on it.
struct External {
    runtime: tokio::runtime::Runtime,
    service: Service,
    /// What to give to children.
    url: String,
    server: Server,
}

enum Server {
    Postgres(Box<(Database, Private<Postgres>)>),
    Redis(Box<Private<Redis>>),
    Kafka(Box<Private<Kafka>>),
}

impl External {
    fn start(service: Service) -> Self {
        let runtime = tokio::runtime::Runtime::new().unwrap();
        let (server, url) = runtime.block_on(async {
            match service {
                Service::Postgres => {
                    let postgres = Postgres::private(Durability::Fast).await.unwrap();
                    let database = postgres.database(schema("tickets")).await.unwrap();
                    let url = database.url();
                    (Server::Postgres(Box::new((database, postgres))), url)
                }
                Service::Redis => {
                    let redis = Redis::private().await.unwrap();
                    redis.command(&["SET", "oversold:{someone}:else", "1"]).await.unwrap();
                    let url = redis.url().to_owned();
                    (Server::Redis(Box::new(redis)), url)
                }
                Service::Kafka => {
                    let kafka = Kafka::private().await.unwrap();
                    kafka.create_topic("oversold-someone-else", 1).await.unwrap();
                    let servers = kafka.bootstrap_servers().to_owned();
                    (Server::Kafka(Box::new(kafka)), servers)
                }
            }
        });
        Self {
            runtime,
            service,
            url,
            server,
        }
    }

    /// The databases, keys or topics that are on it.
    fn contents(&self) -> Vec<String> {
        self.runtime.block_on(async {
            match &self.server {
                Server::Postgres(server) => {
                    let names = sqlx::query_scalar("select datname from pg_database order by 1");
                    names.fetch_all(&mut connect(&server.0).await).await.unwrap()
                }
                Server::Redis(redis) => {
                    let Reply::Array(keys) = redis.command(&["KEYS", "*"]).await.unwrap() else {
                        panic!("KEYS gives keys");
                    };
                    let mut keys: Vec<String> = keys
                        .into_iter()
                        .map(|key| match key {
                            Reply::Bulk(key) => key,
                            other => panic!("{other:?}"),
                        })
                        .collect();
                    keys.sort_unstable();
                    keys
                }
                Server::Kafka(kafka) => kafka.topics("").await.unwrap().into_keys().collect(),
            }
        })
    }

    fn role(&self, role: &str, temp: &Path) -> Role {
        Role::new(self.service, role, temp).set(self.service.url_variable(), &self.url)
    }
}

// ---------------------------------------------------------------------------------------------------------------------------------------
// The tests.

fn an_external_server_is_used_and_left_as_it_was(service: Service) {
    let external = External::start(service);
    let before = external.contents();
    let temp = temp();
    let mut held = external.role("hold", temp.path()).held();
    assert!(external.url.contains(held.word("address")), "{}", held.word("address"));
    let during = external.contents();
    assert_eq!(during.len(), before.len() + 1, "{during:?}");
    assert!(during.iter().any(|one| one == held.word("holds")), "{during:?}");
    held.end(End::Exit);
    assert_eq!(external.contents(), before);
    temp.becomes_empty();

    let said = external.role("find", temp.path()).said();
    let reason = format!("{} is set", service.url_variable());
    assert_eq!((&said["source"], &said["reason"]), (&json!("external"), &json!(reason)));
}

fn an_external_server_is_swept(service: Service) {
    let external = External::start(service);
    let before = external.contents();
    let temp = temp();
    let mut killed = external.role("hold", temp.path()).held();
    let mut alive = external.role("hold", temp.path()).held();
    killed.end(End::Kill);
    assert_eq!(
        external.contents().len(),
        before.len() + 2,
        "SIGKILL leaves a database or a key behind"
    );

    // Its connection may take a moment to be missed by the server.
    until("the next run to sweep it", || {
        external.role("find", temp.path()).succeeds();
        external.contents().len() == before.len() + 1
    });
    let left = external.contents();
    assert!(
        left.iter().any(|one| one == alive.word("holds")),
        "what a run holds that is alive stays: {left:?}"
    );
    alive.end(End::Exit);
    assert_eq!(external.contents(), before);
}

fn an_external_kafka_is_swept() {
    let external = External::start(Service::Kafka);
    let Server::Kafka(kafka) = &external.server else {
        unreachable!("it is a Kafka")
    };
    let before = external.contents();
    let since_1970 = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs();
    let [old, young] = [25, 23].map(|hours| format!("oversold-{}-00c0ffee-0-orders", since_1970 - hours * 60 * 60));
    external.runtime.block_on(async {
        kafka.create_topic(&old, 1).await.unwrap();
        kafka.create_topic(&young, 1).await.unwrap();
    });
    assert_eq!(external.contents().len(), before.len() + 2);
    external.role("find", temp().path()).succeeds();
    let mut left = before;
    left.push(young);
    left.sort_unstable();
    assert_eq!(external.contents(), left);
}

fn an_external_user_must_be_allowed_to_create_databases() {
    let external = External::start(Service::Postgres);
    let Server::Postgres(server) = &external.server else {
        unreachable!("it is a Postgres")
    };
    external.runtime.block_on(async {
        let user = sqlx::raw_sql("create role guest login password 'guest'");
        user.execute(&mut connect(&server.0).await).await.unwrap();
    });
    a_guest_is_refused(&external, "may not create databases");
}

fn an_external_user_must_be_allowed_to_write() {
    let external = External::start(Service::Redis);
    let Server::Redis(redis) = &external.server else {
        unreachable!("it is a Redis")
    };
    let user = redis.command(&["ACL", "SETUSER", "guest", "on", ">guest", "~*", "+@all", "-@write"]);
    let user = external.runtime.block_on(user).unwrap();
    assert_eq!(user, Reply::Status("OK".to_owned()));
    a_guest_is_refused(&external, "can't be written to: NOPERM");
}

fn a_guest_is_refused(external: &External, part: &str) {
    let (scheme, rest) = external.url.split_once("://").unwrap();
    let (_, place) = rest.rsplit_once('@').unwrap();
    let said = Role::new(external.service, "find", temp().path())
        .set(
            external.service.url_variable(),
            format!("{scheme}://guest:guest@{place}"),
        )
        .said();
    let error = said["error"].as_str().unwrap();
    assert!(error.contains(part), "{error}");
    assert!(!error.contains("guest:guest"), "{error}");
}

fn a_forced_source_wins_over_an_external_one(service: Service) {
    let temp = temp();
    let role = Role::new(service, "find", temp.path());
    let role = role.set(
        service.url_variable(),
        format!("{}://nobody@127.0.0.1:1/0", service.name()),
    );
    let said = role.forced(Source::Native).said();
    assert_eq!(
        (&said["source"], &said["reason"]),
        (&json!("native"), &json!("OVERSOLD_BACKENDS asks for it"))
    );
}

fn every_bad_setting_gets_one_clear_line(service: Service) {
    let (bin, image) = (service.folder_variable(), service.setting("IMAGE"));
    for (setting, value, line) in [
        (
            "OVERSOLD_BACKENDS",
            "podman",
            "OVERSOLD_BACKENDS is `podman`; expected `docker` or `native`",
        ),
        (
            "OVERSOLD_BACKENDS",
            "external",
            "OVERSOLD_BACKENDS is `external`; expected `docker` or `native`",
        ),
    ] {
        let said = Role::new(service, "find", temp().path()).set(setting, value).said();
        assert_eq!(said, json!({ "error": line, "setting": true }));
    }
    for (source, setting, value, part) in [
        (Source::Native, bin.as_str(), "/nowhere", service.not_native()),
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
            image.as_str(),
            "latest:",
            &format!("{image} is `latest:`, which is no name of an image"),
        ),
    ] {
        let said = Role::new(service, "find", temp().path())
            .forced(source)
            .set(setting, value)
            .said();
        let error = said["error"].as_str().unwrap();
        assert!(error.contains(part), "{error}");
    }
}

fn an_absent_external_server(service: Service) {
    let (scheme, variable) = (service.name(), service.url_variable());
    let (absent, shown, what) = match service {
        Service::Kafka => ("127.0.0.1:1".to_owned(), "127.0.0.1:1".to_owned(), "list of brokers"),
        _ => (
            format!("{scheme}://me:s3cret@127.0.0.1:1/0"),
            format!("{scheme}://me:***@127.0.0.1:1/0"),
            "URL of a ",
        ),
    };
    let not_understood = format!("{variable} is no {what}");
    for (url, part) in [
        (absent, format!("{shown} does not answer")),
        ("mysql://me:s3cret@127.0.0.1:1/0".to_owned(), not_understood.clone()),
        ("s3cret".to_owned(), not_understood),
    ] {
        let output = Role::new(service, "find", temp().path()).set(variable, url).succeeds();
        let said: Value = serde_json::from_slice(&output.stdout).unwrap();
        let error = said["error"].as_str().unwrap();
        assert!(error.contains(&part), "{error}");
        let remedy = format!("Set {variable} to a server that answers, or unset it to have one started.");
        assert!(error.ends_with(&remedy), "{error}");
        assert!(!text(&output).contains("s3cret"), "{}", text(&output));
    }
}

/// A child for which there is no service anywhere.
fn nowhere(service: Service, role: &str, temp: &Path) -> Role {
    Role::new(service, role, temp)
        .set("DOCKER_HOST", "unix:///nowhere/docker.sock")
        .set("OVERSOLD_POSTGRES_BIN", "/nowhere")
        .set("OVERSOLD_REDIS_BIN", "/nowhere")
        .set("OVERSOLD_KAFKA_JARS", "/nowhere")
}

fn nothing_there_says_what_was_tried(service: Service) {
    let said = nowhere(service, "find", temp().path()).said();
    let error = said["error"].as_str().unwrap();
    let (tried, remedy) = error.rsplit_once('\n').unwrap();
    assert_eq!(
        tried,
        format!(
            "there is no {}:\
             \n  external: {} is not set\
             \n  docker: no Docker engine answers at unix:///nowhere/docker.sock\
             \n  native: {}",
            service.name(),
            service.url_variable(),
            service.not_native()
        )
    );
    assert!(
        remedy.starts_with("To get one: ") && remedy.ends_with(", or start a Docker engine."),
        "{remedy}"
    );
    assert!(
        remedy.contains("install") && remedy.contains(service.name()),
        "{remedy}"
    );
}

/// This program as a whole, on a machine that has nothing.
fn this_test(temp: &Path, filter: &str) -> Role {
    let mut role = nowhere(Service::Postgres, "", temp);
    role.0.env_remove(ROLE).args(["--exact", filter]);
    role
}

fn an_absent_source_is_ignored_with_its_reason(service: Service) {
    for (source, reason) in [
        ("docker", "no Docker engine answers at unix:///nowhere/docker.sock"),
        ("native", service.not_native()),
    ] {
        let name = format!("{}::{source}::is_gone_when_a_private_one_is_dropped", service.name());
        let output = this_test(temp().path(), &name).succeeds();
        let line = format!("{name} ... ignored (no {source} source: {reason})");
        assert!(text(&output).contains(&line), "{}", text(&output));
        assert!(
            text(&output).contains("0 passed; 0 failed; 1 ignored"),
            "{}",
            text(&output)
        );
    }
}

fn a_required_source_that_is_absent_fails() {
    let output = this_test(temp().path(), "postgres::docker::can_be_durable")
        .set("OVERSOLD_REQUIRE", "native, docker")
        .ends();
    assert_eq!(output.status.code(), Some(101));
    let line = "OVERSOLD_REQUIRE lists docker, but: no Docker engine answers at unix:///nowhere/docker.sock";
    assert!(text(&output).contains(line), "{}", text(&output));

    // One that is not listed may still be absent.
    this_test(temp().path(), "postgres::docker::can_be_durable")
        .set("OVERSOLD_REQUIRE", "native")
        .succeeds();
}

fn a_bad_list_of_required_sources_is_refused() {
    let output = this_test(temp().path(), "postgres::docker::can_be_durable")
        .set("OVERSOLD_REQUIRE", "native,podman")
        .ends();
    assert_eq!(output.status.code(), Some(2));
    let line = "OVERSOLD_REQUIRE lists `podman`; expected `docker` and `native`, with a comma between them\n";
    assert_eq!(String::from_utf8_lossy(&output.stderr), line);
}

fn no_java_is_said_so() {
    let temp = temp();
    let path = tempfile::tempdir().unwrap();
    std::os::unix::fs::symlink("/usr/bin/env", path.path().join("env")).unwrap();
    fs::write(temp.path().join("kafka_2.13-0.jar"), "").unwrap();
    let said = Role::new(Service::Kafka, "find", temp.path())
        .forced(Source::Native)
        .set("OVERSOLD_KAFKA_JARS", temp.path())
        .set("JAVA_HOME", "/nowhere")
        .set("PATH", path.path())
        .said();
    let error = said["error"].as_str().unwrap();
    assert!(error.contains("java is neither in JAVA_HOME nor on PATH"), "{error}");
    fs::remove_file(temp.path().join("kafka_2.13-0.jar")).unwrap();
}

fn jars_that_do_not_start_show_the_end_of_the_log() {
    let jars = temp();
    fs::write(jars.path().join("kafka_2.13-0.jar"), "").unwrap();
    let said = Role::new(Service::Kafka, "find", temp().path())
        .forced(Source::Native)
        .set("OVERSOLD_KAFKA_JARS", jars.path())
        .said();
    let error = said["error"].as_str().unwrap();
    assert!(error.contains("could not format its data folder"), "{error}");
    assert!(error.contains("kafka.tools.StorageTool"), "{error}");
    fs::remove_file(jars.path().join("kafka_2.13-0.jar")).unwrap();
}

/// With an image that is there and holds something else than Kafka.
fn an_image_that_does_not_start_shows_the_end_of_its_log() {
    let other = env::var("OVERSOLD_REDIS_IMAGE").unwrap_or_else(|_| "redis:7-alpine".to_owned());
    let said = Role::new(Service::Kafka, "find", temp().path())
        .forced(Source::Docker)
        .set("OVERSOLD_KAFKA_IMAGE", other)
        .said();
    let error = said["error"].as_str().unwrap();
    assert!(error.contains("the container did not start"), "{error}");
}

const NO_IMAGE: &str = "localhost:1/oversold/none:here";

fn an_image_that_cannot_be_pulled_is_tried_once() {
    let temp = temp();
    let role = || {
        Role::new(Service::Postgres, "find", temp.path())
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

fn without_an_image_native_takes_over(service: Service) {
    let temp = temp();
    let said = Role::new(service, "find", temp.path())
        .set(service.setting("IMAGE"), NO_IMAGE)
        .said();
    assert_eq!(said["source"], "native");
    let reason = said["reason"].as_str().unwrap();
    let start = format!("{} is not set; image {NO_IMAGE} is not here", service.url_variable());
    assert!(reason.starts_with(&start), "{reason}");
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

fn nothing_stays_behind(service: Service, source: Source, end: End) {
    let temp = temp();
    let mut held = Role::new(service, "hold", temp.path()).forced(source).held();
    let pids = held.processes();
    let containers = held.containers();
    let elsewhere = held.elsewhere();
    assert!(elsewhere.iter().all(|folder| folder.exists()), "{elsewhere:?}");
    match source {
        Source::Docker => assert!(containers.iter().all(|name| container_exists(name)) && containers.len() == 1),
        _ => {
            let at_least = if service == Service::Postgres { 5 } else { 2 };
            assert!(
                pids.len() >= at_least,
                "the keeper, the server and its children: {pids:?}"
            );
        }
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

fn the_next_run_sweeps(service: Service, source: Source) {
    let temp = temp();
    let mut held = Role::new(service, "hold", temp.path()).forced(source).held();
    let pids = held.processes();
    let containers = held.containers();
    let elsewhere = held.elsewhere();
    assert!(elsewhere.iter().all(|folder| folder.exists()), "{elsewhere:?}");
    kill_process(held.keeper(), Signal::KILL).unwrap();
    held.end(End::Kill);
    TcpStream::connect(held.word("address")).expect("without its keeper, the server outlives its owner");

    Role::new(Service::Postgres, "keep", temp.path()).succeeds();
    temp.becomes_empty();
    until("every process to end", || {
        processes().iter().all(|process| !pids.contains(&process.pid))
    });
    assert!(!containers.iter().any(|name| container_exists(name)), "{containers:?}");
}

fn a_folder_whose_owner_lives_is_not_swept() {
    let temp = temp();
    let mut held = Role::new(Service::Postgres, "hold", temp.path())
        .forced(Source::Native)
        .held();
    kill_process(held.keeper(), Signal::KILL).unwrap();
    Role::new(Service::Postgres, "keep", temp.path()).succeeds();
    until("the other run's folder to go", || names_in(temp.path()).len() == 1);
    TcpStream::connect(held.word("address")).expect("the server is untouched");

    held.end(End::Exit);
    Role::new(Service::Postgres, "keep", temp.path()).succeeds();
    temp.becomes_empty();
}

fn a_process_that_was_given_an_old_pid_is_left_alone() {
    let temp = temp();
    let mut bystander = Command::new("sleep").arg("1000").process_group(0).spawn().unwrap();
    let stale = temp.path().join("oversold-run-stale");
    fs::create_dir_all(stale.join("pids")).unwrap();
    fs::write(stale.join("owner"), "").unwrap();
    fs::write(stale.join("pids/postgres-0"), format!("{} 1\n", bystander.id())).unwrap();
    Role::new(Service::Postgres, "keep", temp.path()).succeeds();
    temp.becomes_empty();
    let ended = bystander.try_wait().unwrap();
    bystander.kill().unwrap();
    bystander.wait().unwrap();
    assert_eq!(ended, None);
}

fn a_process_that_ignores_the_signal_is_killed() {
    let temp = temp();
    let said = Role::new(Service::Postgres, "stubborn", temp.path()).said();
    let pid = u32::try_from(said["pid"].as_u64().unwrap()).unwrap();
    temp.becomes_empty();
    until("the stubborn process to end", || {
        processes().iter().all(|process| process.pid != pid)
    });
}

/// The engine and the folder of this test are programs that do as a file tells them. No time passes between its tries.
fn a_book_stays_while_something_of_it_does() {
    let temp = tempfile::tempdir().unwrap();
    let (book, programs) = (temp.path().join("book"), temp.path().join("programs"));
    let (container, elsewhere) = (book.join("containers/oversold-kafka-1"), book.join("elsewhere/data-1"));
    fs::create_dir(&programs).unwrap();
    for (name, script) in [
        ("sleep", ""),
        (
            "docker",
            r#"case "$(cat "$0.is") $*" in
               "away "* | "stubborn "*" rm "*) exit 1 ;;
               "empty "*" inspect "*) exit 1 ;;
               "stubborn "*" ls "*) echo 0123456789ab ;;
               esac"#,
        ),
        ("rm", r#"case "$*" in *resists*) exit 1 ;; esac; exec /bin/rm "$@""#),
    ] {
        let program = programs.join(name);
        fs::write(&program, format!("#!/bin/sh\n{script}\n")).unwrap();
        fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).unwrap();
    }
    let path = format!("{}:{}", programs.display(), env::var("PATH").unwrap());
    let clear = |engine_is: &str| {
        fs::write(programs.join("docker.is"), engine_is).unwrap();
        let mut command = Command::new("sh");
        command.arg(repository().join("tests/harness/src/backends/keeper.sh"));
        command.arg("clear").arg(&book).env("PATH", &path);
        let cleared = command.stdin(Stdio::null()).output().unwrap().status.success();
        assert_eq!(cleared, !book.exists());
        cleared
    };
    let write = |data: &Path| {
        for entry in [&container, &elsewhere] {
            fs::create_dir_all(entry.parent().unwrap()).unwrap();
        }
        fs::create_dir_all(data).unwrap();
        fs::write(&container, "\n").unwrap();
        fs::write(&elsewhere, format!("{}\n", data.display())).unwrap();
    };

    let data = temp.path().join("data");
    for engine_is in ["away", "stubborn"] {
        write(&data);
        assert!(!clear(engine_is));
        assert!(
            container.exists() && !elsewhere.exists() && !data.exists(),
            "{engine_is}"
        );
        assert!(clear("well"));
    }

    // It was entered, and its maker died before the engine was asked.
    write(&data);
    assert!(clear("empty"));

    let data = temp.path().join("data-resists");
    write(&data);
    assert!(!clear("well"));
    assert!(elsewhere.exists() && !container.exists());
    let yields = temp.path().join("data-yields");
    fs::rename(&data, &yields).unwrap();
    fs::write(&elsewhere, format!("{}\n", yields.display())).unwrap();
    assert!(clear("well"));
    assert!(!yields.exists());
}

/// The keeper clears up while a process that was just started has not signed the book yet.
fn a_program_that_starts_after_the_end_gives_up() {
    // Not this process's own book: other tests sign there at the same time.
    let folder = keeper::folder("probe").unwrap();
    let proof = folder.join("it-ran");
    let script = repository().join("tests/harness/src/backends/keeper.sh");
    let run = || {
        let mut command = Command::new("sh");
        command.arg(&script).arg("run").arg(&folder).arg("touch-0").arg("touch");
        command.arg(&proof).stderr(Stdio::null()).status().unwrap()
    };

    fs::create_dir(folder.join("pids")).unwrap();
    assert!(run().success());
    fs::remove_file(&proof).unwrap();

    // As the keeper does.
    fs::rename(folder.join("pids"), folder.join("pids.closed")).unwrap();
    assert!(!run().success());
    assert!(!proof.exists());
}

/// `infra/setup.sh` with no setting but those it is given.
fn setup(services: &[&str]) -> Command {
    let mut setup = Command::new("/bin/sh");
    setup.arg(repository().join("infra/setup.sh")).args(services);
    for setting in [
        "DATABASE_URL",
        "REDIS_URL",
        "OVERSOLD_BACKENDS",
        "OVERSOLD_POSTGRES_IMAGE",
        "OVERSOLD_REDIS_IMAGE",
    ] {
        setup.env_remove(setting);
    }
    setup
}

fn repository() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).ancestors().nth(2).unwrap()
}

fn setup_is_silent(service: Service) {
    for (setting, value) in [
        ("OVERSOLD_BACKENDS", "native"),
        (service.url_variable(), "redis://me@db/0"),
    ] {
        let output = setup(&[service.name()]).env(setting, value).output().unwrap();
        assert_eq!(text(&output), "exit status: 0\n", "{setting}");
    }
}

fn setup_takes_the_names_of_services() {
    let output = setup(&["mysql"]).output().unwrap();
    assert_eq!(
        text(&output),
        "exit status: 2\nsetup: there is no service mysql; there are postgres, redis and kafka\n"
    );

    // Without a name, it is Postgres alone.
    let mut all = setup(&[]);
    all.env("DATABASE_URL", "postgres://me@db/sale")
        .env("OVERSOLD_REDIS_BIN", "/nowhere")
        .env("OVERSOLD_KAFKA_JARS", "/nowhere");
    assert_eq!(text(&all.output().unwrap()), "exit status: 0\n");
}

fn setup_says_what_to_run(service: Service) {
    // With no program on PATH but this one, nothing can be installed, whatever this machine has.
    let path = tempfile::tempdir().unwrap();
    std::os::unix::fs::symlink("/usr/bin/uname", path.path().join("uname")).unwrap();
    let nothing = || {
        let mut setup = setup(&[service.name()]);
        setup
            .env("PATH", path.path())
            .env(service.folder_variable(), "/nowhere");
        setup
    };
    for (forced, code, parts) in [
        (
            "",
            1,
            [
                &format!("there is no {service:?}, and none can be installed from here"),
                "start a Docker engine",
                &format!("export {}=", service.url_variable()),
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
            ["OVERSOLD_BACKENDS is `podman`", "expected `docker` or `native`", ""],
        ),
    ] {
        let output = nothing().env("OVERSOLD_BACKENDS", forced).output().unwrap();
        assert_eq!(output.status.code(), Some(code), "{}", text(&output));
        for part in parts {
            assert!(text(&output).contains(part), "{}", text(&output));
        }
    }
}

fn setup_names_the_tools_that_a_build_takes() {
    let path = tempfile::tempdir().unwrap();
    for program in ["uname", "make"] {
        std::os::unix::fs::symlink(format!("/usr/bin/{program}"), path.path().join(program)).unwrap();
    }
    let mut setup = setup(&["postgres"]);
    setup
        .env("PATH", path.path())
        .env("DATABASE_URL", "postgres://me@db/sale");
    let output = setup.output().unwrap();
    assert_eq!(output.status.code(), Some(1), "{}", text(&output));
    for part in ["there is no c++, ps", "Do this:"] {
        assert!(text(&output).contains(part), "{}", text(&output));
    }
}

fn the_image_is_the_same_everywhere(service: Service) {
    let image_name = match service {
        Service::Kafka => "apache/kafka-native:",
        Service::Postgres => "postgres:",
        Service::Redis => "redis:",
    };
    let image = |file: &str| {
        let content = fs::read_to_string(repository().join(file)).unwrap();
        let before = content
            .match_indices(image_name)
            .map(|(at, found)| &content[at + found.len()..])
            .find(|tag| tag.starts_with(|c: char| c.is_ascii_digit()));
        let tag = before.unwrap_or_else(|| panic!("{file} names an image"));
        let end = tag
            .find(|c: char| !c.is_ascii_alphanumeric() && !"-.".contains(c))
            .unwrap();
        tag[..end].to_owned()
    };
    let suite = image(&format!("tests/harness/src/backends/{}/docker.rs", service.name()));
    assert_eq!(image("infra/setup.sh"), suite);
    assert_eq!(image("docker-compose.yml"), suite);
}
