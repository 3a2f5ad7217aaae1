//! A level's server as a program: settings, the ready line, signals, exit codes, and secrets that
//! must not leak.
//!
//! This test binary is also that program: with a variable set, it acts as the server of the test
//! double.

mod common;
mod pooler;

use std::{
    ffi::OsString,
    io::{BufRead, BufReader, Read},
    net::SocketAddr,
    os::unix::ffi::OsStringExt,
    process::{Child, ChildStdout, Command, ExitCode, Output, Stdio},
    time::Duration,
};

use box_office::{Limits, Settings};
use common::{LEVEL, TestEnvironment, ask, environment, listener_closed, on, read_answer, reserve, within};
use harness::until;
use libtest_mimic::{Arguments, Trial};
use pooler::POOLERS;
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    runtime::Runtime,
};

const ACT_AS_SERVER: &str = "BOX_OFFICE_TEST_ACTS_AS_SERVER";
/// The value of the variable for a server with a short drain timeout.
const SHORT_DRAIN: &str = "short drain";

fn main() -> ExitCode {
    if let Some(how) = std::env::var_os(ACT_AS_SERVER) {
        return if how == SHORT_DRAIN {
            serve_with_short_drain()
        } else {
            box_office::main(&LEVEL)
        };
    }
    let mut trials: Vec<Trial> = INVALID_SETTINGS
        .iter()
        .map(|invalid| trial(invalid.name, || exits_with_its_error(invalid)))
        .collect();
    trials.extend([
        trial("a_value_that_is_not_utf8_is_named", a_value_that_is_not_utf8_is_named),
        trial("a_port_in_use_is_named", a_port_in_use_is_named),
        trial("a_missing_database_is_exit_code_3", a_missing_database_is_exit_code_3),
        trial(
            "a_strategy_that_cannot_be_opened_is_exit_code_3",
            a_strategy_that_cannot_be_opened_is_exit_code_3,
        ),
        trial(
            "help_names_every_variable_and_strategy_and_no_secret",
            help_names_every_variable_and_strategy_and_no_secret,
        ),
        trial("it_is_ready_with_one_line_and_ends_with_0_on_sigterm", || {
            shuts_down_on(Signal::TERM)
        }),
        trial("it_is_ready_with_one_line_and_ends_with_0_on_ctrl_c", || {
            shuts_down_on(Signal::INT)
        }),
        trial(
            "a_shutdown_that_aborts_a_reservation_is_exit_code_1",
            a_shutdown_that_aborts_a_reservation_is_exit_code_1,
        ),
        trial(
            "json_log_lines_are_json_even_after_a_panic",
            json_log_lines_are_json_even_after_a_panic,
        ),
        trial("secrets_are_in_no_log_line", secrets_are_in_no_log_line),
        trial(
            "idle_connections_are_kept_as_long_as_the_setting_says",
            idle_connections_are_kept_as_long_as_the_setting_says,
        ),
        trial(
            "a_reader_of_the_help_may_leave_before_its_end",
            a_reader_of_the_help_may_leave_before_its_end,
        ),
        trial(
            "a_server_whose_log_nobody_reads_any_more_shuts_down_like_any_other",
            a_server_whose_log_nobody_reads_any_more_shuts_down_like_any_other,
        ),
        trial(
            "a_database_that_never_answers_is_exit_code_3",
            a_database_that_never_answers_is_exit_code_3,
        ),
        trial(
            "tables_of_another_level_are_exit_code_3",
            tables_of_another_level_are_exit_code_3,
        ),
        trial(
            "migrate_creates_the_database_once_and_exits",
            migrate_creates_the_database_once_and_exits,
        ),
        trial(
            "health_is_whether_the_server_is_ready",
            health_is_whether_the_server_is_ready,
        ),
    ]);
    trials.extend(POOLERS.iter().map(pooler::trial));
    libtest_mimic::run(&Arguments::from_args(), trials).exit_code()
}

fn serve_with_short_drain() -> ExitCode {
    let url = std::env::var("DATABASE_URL").expect("a database");
    let limits = Limits {
        drain_timeout: Duration::from_millis(300),
        ..Limits::default()
    };
    let settings = Settings { limits, ..on(&url) };
    box_office::serve(&LEVEL, &LEVEL.strategies[0], &settings)
}

fn trial(name: &str, test: impl FnOnce() + Send + 'static) -> Trial {
    Trial::test(name, move || {
        test();
        Ok(())
    })
}

/// The program with only these variables in its environment.
fn program(variables: &[(&str, &str)], flags: &[&str]) -> Command {
    let mut program = Command::new(std::env::current_exe().expect("this test binary"));
    program
        .env_clear()
        .env(ACT_AS_SERVER, "1")
        .envs(variables.iter().copied())
        .args(flags);
    program
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    program
}

/// An invalid setting and its one-line error.
struct InvalidSetting {
    name: &'static str,
    variables: &'static [(&'static str, &'static str)],
    flags: &'static [&'static str],
    line: &'static str,
}

/// Nothing listens here. No case of the table gets as far as connecting.
const UNREACHABLE: (&str, &str) = ("DATABASE_URL", "postgres://ann:hunter2@127.0.0.1:1/oversold");

const INVALID_SETTINGS: &[InvalidSetting] = &[
    InvalidSetting {
        name: "a_missing_database_url_is_named",
        variables: &[],
        flags: &[],
        line: "DATABASE_URL (--database-url) is not set; expected the URL of a Postgres database, \
               such as postgres://user:password@localhost:5432/oversold",
    },
    InvalidSetting {
        name: "an_empty_database_url_is_none",
        variables: &[("DATABASE_URL", "")],
        flags: &[],
        line: "DATABASE_URL (--database-url) is not set; expected the URL of a Postgres database, \
               such as postgres://user:password@localhost:5432/oversold",
    },
    InvalidSetting {
        name: "a_database_url_of_another_database_is_not_shown",
        variables: &[("DATABASE_URL", "mysql://ann:hunter2@localhost/oversold")],
        flags: &[],
        line: "DATABASE_URL (--database-url) holds an invalid value (not shown: it is a secret); expected the URL of a \
               Postgres database, such as postgres://user:password@localhost:5432/oversold",
    },
    InvalidSetting {
        name: "a_broken_database_url_is_not_shown",
        variables: &[],
        flags: &["--database-url", "postgres://ann:hunter2@localhost:port/oversold"],
        line: "DATABASE_URL (--database-url) holds an invalid value (not shown: it is a secret); expected the URL of a \
               Postgres database, such as postgres://user:password@localhost:5432/oversold",
    },
    InvalidSetting {
        name: "a_port_that_is_no_number_is_named",
        variables: &[UNREACHABLE, ("PORT", "http")],
        flags: &[],
        line: r#"PORT (--port) holds "http"; expected a port number, 0 (any free one) to 65535"#,
    },
    InvalidSetting {
        name: "a_port_that_is_too_big_is_named",
        variables: &[UNREACHABLE],
        flags: &["--port", "65536"],
        line: r#"PORT (--port) holds "65536"; expected a port number, 0 (any free one) to 65535"#,
    },
    InvalidSetting {
        name: "an_empty_value_is_named",
        variables: &[UNREACHABLE, ("PORT", "")],
        flags: &[],
        line: "PORT (--port) is empty; expected a port number, 0 (any free one) to 65535",
    },
    InvalidSetting {
        name: "a_host_that_is_no_address_is_named",
        variables: &[UNREACHABLE, ("HOST", "localhost")],
        flags: &[],
        line: r#"HOST (--host) holds "localhost"; expected an IP address, such as 127.0.0.1, or 0.0.0.0 for every interface"#,
    },
    InvalidSetting {
        name: "a_pool_of_nothing_is_named",
        variables: &[UNREACHABLE, ("DATABASE_POOL_SIZE", "0")],
        flags: &[],
        line: r#"DATABASE_POOL_SIZE (--database-pool-size) holds "0"; expected a number of connections, 1 to 1000"#,
    },
    InvalidSetting {
        name: "negative_work_is_named",
        variables: &[UNREACHABLE, ("WORK_MS", "-1")],
        flags: &[],
        line: r#"WORK_MS (--work-ms) holds "-1"; expected a number of milliseconds, 0 to 10000"#,
    },
    InvalidSetting {
        name: "a_breakpoint_without_its_hit_is_named",
        variables: &[UNREACHABLE, ("OVERSOLD_STOP_AT", "stock read")],
        flags: &[],
        line: r#"OVERSOLD_STOP_AT (--stop-at) holds "stock read"; expected a scheduling point and the number of the hit, such as stock read#1"#,
    },
    InvalidSetting {
        name: "work_over_the_timeouts_is_named",
        variables: &[UNREACHABLE, ("WORK_MS", "10001")],
        flags: &[],
        line: r#"WORK_MS (--work-ms) holds "10001"; expected a number of milliseconds, 0 to 10000"#,
    },
    InvalidSetting {
        name: "an_instance_of_two_words_is_named",
        variables: &[UNREACHABLE, ("INSTANCE", "two words")],
        flags: &[],
        line: r#"INSTANCE (--instance) holds "two words"; expected a name of 1 to 40 visible ASCII characters without spaces"#,
    },
    InvalidSetting {
        name: "an_unknown_log_format_is_named",
        variables: &[UNREACHABLE, ("LOG_FORMAT", "xml")],
        flags: &[],
        line: r#"LOG_FORMAT (--log-format) holds "xml"; expected pretty or json"#,
    },
    InvalidSetting {
        name: "a_log_filter_that_is_none_is_named",
        variables: &[UNREACHABLE, ("RUST_LOG", "box_office=loud")],
        flags: &[],
        line: r#"RUST_LOG (--log) holds "box_office=loud"; expected a tracing filter, such as info or box_office=debug"#,
    },
    InvalidSetting {
        name: "a_redis_url_of_something_else_is_not_shown",
        variables: &[UNREACHABLE, ("REDIS_URL", "http://ann:hunter2@localhost:6379")],
        flags: &[],
        line: "REDIS_URL (--redis-url) holds an invalid value (not shown: it is a secret); expected the URL of a Redis \
               server, such as redis://:password@localhost:6379/0",
    },
    InvalidSetting {
        name: "a_broken_redis_url_is_not_shown",
        variables: &[UNREACHABLE],
        flags: &["--redis-url", "redis://ann:hunter2@localhost:port/0"],
        line: "REDIS_URL (--redis-url) holds an invalid value (not shown: it is a secret); expected the URL of a Redis \
               server, such as redis://:password@localhost:6379/0",
    },
    InvalidSetting {
        name: "a_redis_prefix_of_two_words_is_named",
        variables: &[UNREACHABLE, ("REDIS_PREFIX", "two words")],
        flags: &[],
        line: r#"REDIS_PREFIX (--redis-prefix) holds "two words"; expected at most 100 visible ASCII characters without spaces"#,
    },
    InvalidSetting {
        name: "an_improvement_that_the_strategy_does_not_support_is_named",
        variables: &[UNREACHABLE, ("ORDER_TTL_MS", "100")],
        flags: &[],
        line: "ORDER_TTL_MS (--order-ttl-ms) is set, but lv0/scripted does not support it: message TTL",
    },
    InvalidSetting {
        name: "a_payment_service_for_a_strategy_that_holds_no_tickets_is_named",
        variables: &[UNREACHABLE, ("PAYMENT_URL", "http://127.0.0.1:1")],
        flags: &[],
        line: "PAYMENT_URL (--payment-url) is set, but lv0/scripted does not support it: saga",
    },
    InvalidSetting {
        name: "a_payment_url_with_a_password_is_named",
        variables: &[UNREACHABLE],
        flags: &["--payment-url", "http://shop:secret@127.0.0.1:1"],
        line: "PAYMENT_URL (--payment-url) holds an invalid value (not shown: it is a secret); expected http://HOST:PORT, without user and password",
    },
    InvalidSetting {
        name: "a_hold_of_next_to_nothing_is_named",
        variables: &[UNREACHABLE],
        flags: &["--hold-ms", "99"],
        line: r#"HOLD_MS (--hold-ms) holds "99"; expected a number of milliseconds, 100 to 86400000"#,
    },
    InvalidSetting {
        name: "a_time_to_live_of_nothing_is_named",
        variables: &[UNREACHABLE],
        flags: &["--order-ttl-ms", "0"],
        line: r#"ORDER_TTL_MS (--order-ttl-ms) holds "0"; expected a number of milliseconds, 1 to 86400000"#,
    },
    InvalidSetting {
        name: "a_priority_of_no_orders_is_named",
        variables: &[UNREACHABLE],
        flags: &["--order-priority", "0"],
        line: r#"ORDER_PRIORITY (--order-priority) holds "0"; expected the number of VIP orders for each other order, 1 to 100"#,
    },
    InvalidSetting {
        name: "priority_for_a_strategy_without_two_queues_is_named",
        variables: &[UNREACHABLE, ("ORDER_PRIORITY", "4")],
        flags: &[],
        line: "ORDER_PRIORITY (--order-priority) is set, but lv0/scripted does not support it: priority",
    },
    InvalidSetting {
        name: "a_switch_that_is_neither_on_nor_off_is_named",
        variables: &[UNREACHABLE, ("CIRCUIT_BREAKER", "yes")],
        flags: &[],
        line: r#"CIRCUIT_BREAKER (--circuit-breaker) holds "yes"; expected true or false"#,
    },
    InvalidSetting {
        name: "a_lease_of_next_to_nothing_is_named",
        variables: &[UNREACHABLE, ("LOCK_LEASE_MS", "9")],
        flags: &[],
        line: r#"LOCK_LEASE_MS (--lock-lease-ms) holds "9"; expected a number of milliseconds, 10 to 600000"#,
    },
    InvalidSetting {
        name: "a_lease_with_a_unit_is_named",
        variables: &[UNREACHABLE, ("LOCK_LEASE_MS", "10s")],
        flags: &[],
        line: r#"LOCK_LEASE_MS (--lock-lease-ms) holds "10s"; expected a number of milliseconds, 10 to 600000"#,
    },
    InvalidSetting {
        name: "an_idle_time_in_seconds_is_named",
        variables: &[UNREACHABLE, ("HTTP_KEEP_ALIVE_MS", "75")],
        flags: &[],
        line: r#"HTTP_KEEP_ALIVE_MS (--http-keep-alive-ms) holds "75"; expected a number of milliseconds, 100 to 3600000"#,
    },
    InvalidSetting {
        name: "an_unknown_strategy_lists_the_known_ones",
        variables: &[UNREACHABLE, ("STRATEGY", "hope")],
        flags: &[],
        line: r#"STRATEGY (--strategy) holds "hope"; expected scripted or unopenable"#,
    },
    InvalidSetting {
        name: "a_bad_admin_token_is_not_shown",
        variables: &[UNREACHABLE, ("OVERSOLD_ADMIN_TOKEN", "hunter2 hunter2")],
        flags: &[],
        line: "OVERSOLD_ADMIN_TOKEN (--admin-token) holds an invalid value (not shown: it is a secret); \
               expected one or more visible ASCII characters without spaces",
    },
    InvalidSetting {
        name: "a_peer_that_is_more_than_an_origin_is_named",
        variables: &[
            UNREACHABLE,
            ("LIVE_PEERS", "http://127.0.0.1:8082,http://127.0.0.1:8083/live"),
        ],
        flags: &[],
        line: r#"LIVE_PEERS (--live-peers) holds "http://127.0.0.1:8083/live"; expected the origin of a server, such as http://127.0.0.1:8080"#,
    },
    InvalidSetting {
        name: "a_balancer_with_tls_is_named",
        variables: &[UNREACHABLE, ("RUSH_URL", "https://shop.example")],
        flags: &[],
        line: r#"RUSH_URL (--rush-url) holds "https://shop.example"; expected the origin of a balancer without TLS, such as http://127.0.0.1:8080"#,
    },
    InvalidSetting {
        name: "a_trace_file_that_cannot_be_written_is_named",
        variables: &[UNREACHABLE, ("OVERSOLD_TRACE_FILE", "/no/such/folder/trace")],
        flags: &[],
        line: r#"OVERSOLD_TRACE_FILE (--trace-file) holds "/no/such/folder/trace"; expected a writable file: No such file or directory (os error 2)"#,
    },
    InvalidSetting {
        name: "an_unknown_flag_is_named",
        variables: &[UNREACHABLE],
        flags: &["--fast"],
        line: "unexpected argument '--fast' found; see --help",
    },
];

fn exits_with_its_error(invalid: &InvalidSetting) {
    let output = program(invalid.variables, invalid.flags).output().expect("it runs");
    assert_fails_with(&output, 2, invalid.line);
}

#[track_caller]
fn assert_fails_with(output: &Output, code: i32, line: &str) {
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!(stderr, format!("error: {line}\n"));
    assert_eq!(
        (output.status.code(), output.stdout.as_slice()),
        (Some(code), b"".as_slice())
    );
}

fn a_value_that_is_not_utf8_is_named() {
    let mut program = program(&[UNREACHABLE], &[]);
    let output = program
        .env("PORT", OsString::from_vec(vec![0xff]))
        .output()
        .expect("it runs");
    assert_fails_with(&output, 2, "PORT (--port) is not valid UTF-8");
}

fn in_a_runtime<F: Future>(test: F) -> F::Output {
    Runtime::new().expect("a runtime").block_on(test)
}

fn a_port_in_use_is_named() {
    in_a_runtime(async {
        let taken = environment().await;
        let port = taken.address().port().to_string();
        let url = taken.database.url();
        let output = program(&[("DATABASE_URL", &url), ("PORT", &port)], &[])
            .output()
            .expect("it runs");
        let line = format!("HOST and PORT (--host, --port) say 127.0.0.1:{port}, which can't be bound");
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert!(
            stderr.starts_with(&format!("error: {line}: Address already in use")),
            "{stderr}"
        );
        assert_eq!((output.status.code(), stderr.lines().count()), (Some(2), 1), "{stderr}");
    });
}

fn a_missing_database_is_exit_code_3() {
    let unreachable = program(&[UNREACHABLE], &[]).output().expect("it runs");
    let stderr = String::from_utf8_lossy(&unreachable.stderr);
    let start = "error: DATABASE_URL (--database-url): no connection to Postgres at 127.0.0.1:1, database oversold: ";
    assert!(
        stderr.starts_with(start) && stderr.contains("Connection refused"),
        "{stderr}"
    );
    assert!(!stderr.contains("hunter2") && stderr.lines().count() == 1, "{stderr}");
    assert_eq!(
        (unreachable.status.code(), unreachable.stdout.as_slice()),
        (Some(3), b"".as_slice())
    );

    in_a_runtime(async {
        let environment = environment().await;
        let url = environment.database.url();
        let (place, options) = url.split_once('?').unwrap_or((&url, ""));
        let url = format!("{place}_missing?{options}");
        let unknown = program(&[("DATABASE_URL", &url)], &[]).output().expect("it runs");
        let stderr = String::from_utf8_lossy(&unknown.stderr);
        assert!(
            stderr.contains("_missing") && stderr.contains("does not exist"),
            "{stderr}"
        );
        assert_eq!(
            (unknown.status.code(), stderr.lines().count()),
            (Some(3), 1),
            "{stderr}"
        );
    });
}

/// Such as the port of another service, which waits for the rest of a request of its own protocol.
fn a_database_that_never_answers_is_exit_code_3() {
    let silent = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
    let place = silent.local_addr().expect("its address");
    let url = format!("postgres://ann:hunter2@{place}/oversold");
    let output = program(&[("DATABASE_URL", &url)], &[]).output().expect("it runs");
    let line = format!(
        "DATABASE_URL (--database-url): no connection to Postgres at {place}, database oversold: no answer within 5s; \
         is it a Postgres server?"
    );
    assert_fails_with(&output, 3, &line);
}

fn tables_of_another_level_are_exit_code_3() {
    in_a_runtime(async {
        for others in [
            // Another migration with the same number, and one that this schema does not have.
            "update _sqlx_migrations set checksum = '\\x00'",
            "insert into _sqlx_migrations select 99, description, now(), true, checksum, 0 from _sqlx_migrations",
            // Tables that were made by hand.
            "drop table _sqlx_migrations",
        ] {
            let environment = environment().await;
            let mut connection = environment.connect().await;
            let changed = sqlx::raw_sql(others).execute(&mut connection).await;
            changed.expect("the tables are another level's");
            let url = environment.database.url();
            let output = program(&[("DATABASE_URL", &url)], &[]).output().expect("it runs");
            let stderr = String::from_utf8_lossy(&output.stderr);
            assert!(
                stderr.contains(
                    "has tables of another level, strategy or version, not those of lv0 (schema \"double\"): \
                     each takes a database of its own, such as `create database oversold_lv0_double`"
                ),
                "{stderr}"
            );
            assert_eq!((output.status.code(), stderr.lines().count()), (Some(3), 1), "{stderr}");
        }
    });
}

fn migrate_creates_the_database_once_and_exits() {
    in_a_runtime(async {
        let environment = environment().await;
        let url = environment.database.url();
        let (place, options) = url.split_once('?').unwrap_or((&url, ""));
        let created = format!("{place}-created?{options}");
        // Several at once, as if every instance did it; and once more, on what is there.
        let migrate = || program(&[("DATABASE_URL", &created)], &["--migrate"]);
        let together: Vec<_> = (0..3).map(|_| migrate().spawn().expect("it runs")).collect();
        let together = together
            .into_iter()
            .map(|child| child.wait_with_output().expect("it ends"));
        for output in together.chain([migrate().output().expect("it runs")]) {
            let stderr = String::from_utf8_lossy(&output.stderr);
            assert_eq!(
                (output.status.code(), output.stdout.as_slice()),
                (Some(0), b"".as_slice()),
                "{stderr}"
            );
        }
        let name = place.rsplit('/').next().expect("a database");
        let drop_it = sqlx::raw_sql(sqlx::AssertSqlSafe(format!("drop database \"{name}-created\"")));
        drop_it
            .execute(&mut environment.connect().await)
            .await
            .expect("it is there, and nobody is connected");
    });
    let unreachable = program(&[UNREACHABLE], &["--migrate"]).output().expect("it runs");
    assert_eq!(unreachable.status.code(), Some(3));
}

fn health_is_whether_the_server_is_ready() {
    in_a_runtime(async {
        let environment = environment().await;
        let process = Process::start(&environment, &[]);
        let port = process.address.port().to_string();
        let health = || program(&[("PORT", &port)], &["--health"]).output().expect("it runs");
        assert_eq!(health().status.code(), Some(0));

        let mut connection = environment.connect().await;
        let broken = sqlx::raw_sql("alter table sale rename to another").execute(&mut connection);
        broken.await.expect("it is renamed");
        let output = health();
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{stderr}");
        assert!(stderr.starts_with("error: not ready: "), "{stderr}");

        process.signal(Signal::TERM);
        process.wait();
        assert_eq!(health().status.code(), Some(1), "nobody listens");
    });
}

fn a_strategy_that_cannot_be_opened_is_exit_code_3() {
    in_a_runtime(async {
        let url = environment().await.database;
        let output = program(&[("DATABASE_URL", &url.url()), ("STRATEGY", "unopenable")], &[])
            .output()
            .expect("it runs");
        assert_fails_with(&output, 3, "unopenable failed to start: it was never alive");
    });
}

fn help_names_every_variable_and_strategy_and_no_secret() {
    let secrets = [UNREACHABLE, ("OVERSOLD_ADMIN_TOKEN", "hunter2")];
    let output = program(&secrets, &["--help"]).output().expect("it runs");
    let help = String::from_utf8(output.stdout).expect("text");
    assert_eq!(output.status.code(), Some(0));
    for name in [
        "DATABASE_URL",
        "DATABASE_POOL_SIZE",
        "HOST",
        "PORT",
        "STRATEGY",
        "INSTANCE",
        "WORK_MS",
        "REDIS_URL",
        "REDIS_PREFIX",
        "LOCK_LEASE_MS",
        "HTTP_KEEP_ALIVE_MS",
        "ORDER_TTL_MS",
        "CIRCUIT_BREAKER",
        "OUTBOX_RELAY",
        "ORDER_PRIORITY",
        "PAYMENT_URL",
        "HOLD_MS",
        "PAYMENT_TIMEOUT_MS",
        "OVERSOLD_ADMIN_TOKEN",
        "LIVE_PEERS",
        "RUSH_URL",
        "LOG_FORMAT",
        "OVERSOLD_TRACE_FILE",
        "OVERSOLD_STOP_AT",
        "RUST_LOG",
        LEVEL.summary,
        LEVEL.strategies[0].summary,
        LEVEL.strategies[1].summary,
    ] {
        assert!(help.contains(name), "no {name} in\n{help}");
    }
    assert!(!help.contains("hunter2"), "{help}");
}

fn a_reader_of_the_help_may_leave_before_its_end() {
    let mut program = program(&[], &["--help"]);
    let (reader, writer) = std::io::pipe().expect("a pipe");
    drop(reader);
    let output = program.stdout(writer).output().expect("it runs");
    assert_eq!(
        (output.status.code(), output.stderr.as_slice()),
        (Some(0), b"".as_slice())
    );
}

fn a_server_whose_log_nobody_reads_any_more_shuts_down_like_any_other() {
    in_a_runtime(async {
        let environment = environment().await;
        let mut server = Process::start(&environment, &[]);
        drop(server.child.stderr.take());
        assert_eq!(reserve(server.address, 1, "a").await.status, 201);
        // It logs the signal, and that it has drained.
        server.signal(Signal::TERM);
        assert_eq!(server.child.wait().expect("it ends").code(), Some(0));
    });
}

fn idle_connections_are_kept_as_long_as_the_setting_says() {
    const LIVEZ: &[u8] = b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n";

    in_a_runtime(async {
        let environment = environment().await;
        let short = Process::start(&environment, &[("HTTP_KEEP_ALIVE_MS", "300")]);
        let long = Process::start(&environment, &[("HTTP_KEEP_ALIVE_MS", "60000")]);
        let mut kept = TcpStream::connect(long.address).await.expect("it listens");
        let mut closed = TcpStream::connect(short.address).await.expect("it listens");
        for stream in [&mut kept, &mut closed] {
            stream.write_all(LIVEZ).await.expect("it reads");
            assert_eq!(read_answer(stream).await.expect("an answer").status, 200);
        }
        let mut rest = vec![];
        within("the short one to close", closed.read_to_end(&mut rest))
            .await
            .expect("it closes");
        assert_eq!(rest, b"");
        // Idle for longer than that by now, and still open.
        kept.write_all(LIVEZ).await.expect("it reads");
        assert_eq!(read_answer(&mut kept).await.expect("an answer").status, 200);
    });
}

/// A server process. It is killed when it is dropped.
struct Process {
    child: Child,
    stdout: BufReader<ChildStdout>,
    address: SocketAddr,
}

impl Process {
    /// Starts it, and reads its address from the ready line.
    fn start(environment: &TestEnvironment, variables: &[(&str, &str)]) -> Self {
        let url = environment.database.url();
        let mut all = vec![("DATABASE_URL", url.as_str())];
        all.extend(variables);
        let mut child = program(&all, &["--port", "0"]).spawn().expect("it starts");
        let mut stdout = BufReader::new(child.stdout.take().expect("its stdout"));
        let mut ready = String::new();
        stdout.read_line(&mut ready).expect("its line");
        let address = ready
            .strip_prefix("lv0/scripted listens on http://")
            .unwrap_or_else(|| panic!("{ready:?}"));
        let address = address.trim_end().parse().expect("an address");
        Self { child, stdout, address }
    }

    fn signal(&self, signal: Signal) {
        let pid = Pid::from_child(&self.child);
        kill_process(pid, signal).expect("it lives");
    }

    /// Waits for the exit: the exit code, the rest of stdout, and stderr.
    fn wait(mut self) -> (Option<i32>, String, String) {
        let (mut stdout, mut stderr) = (String::new(), String::new());
        self.stdout.read_to_string(&mut stdout).expect("text");
        let mut errors = self.child.stderr.take().expect("its stderr");
        errors.read_to_string(&mut stderr).expect("text");
        (self.child.wait().expect("it ends").code(), stdout, stderr)
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // It has already exited, unless the test failed.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

async fn one_in_flight(address: SocketAddr) {
    until("the request to be in flight", async || {
        let metrics = ask(address, "GET", "/metrics", &[], "").await;
        metrics.text().contains("oversold_reservations_in_flight 1")
    })
    .await;
}

fn shuts_down_on(signal: Signal) {
    in_a_runtime(async {
        let environment = environment().await;
        let process = Process::start(&environment, &[]);
        let address = process.address;
        assert_eq!(reserve(address, 1, "fine").await.status, 201);

        let holder = environment.block_buyer_42().await;
        let in_flight = tokio::spawn(async move { reserve(address, 42, "wait").await });
        one_in_flight(address).await;
        process.signal(signal);
        listener_closed(address).await;
        holder.release().await;

        assert_eq!(in_flight.await.expect("no panic").status, 201);
        let (code, stdout, stderr) = process.wait();
        assert_eq!((code, stdout.as_str()), (Some(0), ""), "{stderr}");
        assert!(
            stderr.contains("shutting down") && stderr.contains("drained"),
            "{stderr}"
        );
    });
}

fn a_shutdown_that_aborts_a_reservation_is_exit_code_1() {
    in_a_runtime(async {
        let environment = environment().await;
        let process = Process::start(&environment, &[(ACT_AS_SERVER, SHORT_DRAIN)]);
        let _holder = environment.block_buyer_42().await;
        let mut buyer = TcpStream::connect(process.address).await.expect("it listens");
        let request = "POST /api/sales/1/reservations HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n\
                       Idempotency-Key: wait\r\nContent-Length: 16\r\n\r\n{\"buyer_id\": 42}";
        buyer.write_all(request.as_bytes()).await.expect("it reads");
        one_in_flight(process.address).await;

        process.signal(Signal::TERM);
        let (code, stdout, stderr) = process.wait();
        assert_eq!((code, stdout.as_str()), (Some(1), ""), "{stderr}");
        assert!(stderr.contains("1 reservations were aborted"), "{stderr}");
    });
}

fn json_log_lines_are_json_even_after_a_panic() {
    in_a_runtime(async {
        let environment = environment().await;
        let process = Process::start(&environment, &[("LOG_FORMAT", "json"), ("INSTANCE", "box-3")]);
        let headers = [
            ("Content-Type", "application/json"),
            ("Idempotency-Key", "panic"),
            ("X-Request-Id", "r-7"),
        ];
        let path = "/api/sales/1/reservations";
        ask(process.address, "POST", path, &headers, r#"{"buyer_id": 1}"#)
            .await
            .is_problem(500, "crashed");
        process.signal(Signal::TERM);
        let (_, _, stderr) = process.wait();
        let lines: Vec<Value> = stderr
            .lines()
            .map(|line| serde_json::from_str(line).unwrap_or_else(|why| panic!("{why}: {line}")))
            .collect();
        let panicked = lines
            .iter()
            .find(|line| line["fields"]["message"] == "panicked")
            .expect("the panic");
        assert!(
            panicked["fields"]["panic"]
                .as_str()
                .is_some_and(|panic| panic.contains("as asked")),
            "{panicked}"
        );
        let spans = panicked["spans"].as_array().expect("spans");
        assert!(spans.iter().any(|span| span["instance"] == "box-3"), "{panicked}");
        assert!(spans.iter().any(|span| span["id"] == "r-7"), "{panicked}");
    });
}

fn secrets_are_in_no_log_line() {
    in_a_runtime(async {
        let environment = environment().await;
        let process = Process::start(
            &environment,
            &[("RUST_LOG", "trace"), ("OVERSOLD_ADMIN_TOKEN", "hunter2")],
        );
        let headers = [
            ("Content-Type", "application/json"),
            ("Authorization", "Bearer hunter2"),
        ];
        let opened = ask(
            process.address,
            "PUT",
            "/api/sales/1",
            &headers,
            r#"{"name": "Night", "capacity": 3}"#,
        )
        .await;
        assert_eq!(opened.status, 201);
        process.signal(Signal::TERM);
        let (_, _, stderr) = process.wait();
        assert!(stderr.contains("answered") && !stderr.contains("hunter2"), "{stderr}");
    });
}
