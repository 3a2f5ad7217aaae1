//! A server behind PgBouncer. Without one on this machine the tests are ignored.

use std::{
    fs::{self, Permissions},
    net::TcpListener,
    os::unix::fs::PermissionsExt,
    path::Path,
    process::{Child, Command, Stdio},
};

use harness::until;
use libtest_mimic::{Completion, Trial};
use rustix::process::Signal;
use tempfile::TempDir;

use crate::{
    Process,
    common::{TestEnvironment, environment, reserve},
    in_a_runtime, program,
};

/// A PgBouncer, and what a server says of it.
pub(crate) struct Pooler {
    name: &'static str,
    mode: &'static str,
    /// The startup parameters that it ignores; it refuses others.
    ignores: &'static str,
    /// Whether the database has the settings of a server in force for every session.
    in_force: bool,
    /// Why the server does not start. `None`: it serves.
    says: Option<&'static str>,
}

pub(crate) const POOLERS: [Pooler; 4] = [
    Pooler {
        name: "a_pooler_that_refuses_the_settings_is_exit_code_3",
        mode: "session",
        ignores: "extra_float_digits",
        in_force: true,
        says: Some("refuses a session setting (unsupported startup parameter: options)"),
    },
    Pooler {
        name: "a_pooler_that_ignores_the_settings_is_exit_code_3",
        mode: "session",
        ignores: "extra_float_digits,options",
        in_force: false,
        says: Some("ignores lock_timeout=5s, it is 0"),
    },
    Pooler {
        name: "a_pooler_in_transaction_mode_is_exit_code_3",
        mode: "transaction",
        ignores: "extra_float_digits,options",
        in_force: true,
        says: Some("shares a backend between sessions (transaction mode)"),
    },
    Pooler {
        name: "a_pooler_in_session_mode_with_the_settings_in_force_will_do",
        mode: "session",
        ignores: "extra_float_digits,options",
        in_force: true,
        says: None,
    },
];

pub(crate) fn trial(pooler: &'static Pooler) -> Trial {
    Trial::ignorable_test(pooler.name, move || {
        let Some(pgbouncer) = [
            "/usr/sbin/pgbouncer",
            "/usr/bin/pgbouncer",
            "/opt/homebrew/bin/pgbouncer",
        ]
        .into_iter()
        .find(|path| Path::new(path).exists()) else {
            return Ok(Completion::ignored_with("needs pgbouncer: infra/test-tools.sh"));
        };
        in_a_runtime(starts_or_says_why_not(pgbouncer, pooler));
        Ok(Completion::Completed)
    })
}

async fn starts_or_says_why_not(pgbouncer: &str, pooler: &Pooler) {
    let environment = environment().await;
    if pooler.in_force {
        let mut connection = environment.connect().await;
        for setting in [
            "lock_timeout = '5s'",
            "statement_timeout = '10s'",
            "idle_in_transaction_session_timeout = '15s'",
        ] {
            let set = format!(
                "do $$ begin execute format('alter database %I set {}', current_database()); end $$",
                setting.replace('\'', "''")
            );
            let set = sqlx::raw_sql(sqlx::AssertSqlSafe(set)).execute(&mut connection).await;
            set.expect("it is set");
        }
    }
    let running = Running::start(pgbouncer, pooler, &environment).await;
    let Some(why) = pooler.says else {
        let server = Process::start(&environment, &[("DATABASE_URL", &running.url)]);
        assert_eq!(reserve(server.address, 1, "first").await.status, 201);
        server.signal(Signal::TERM);
        let (code, _, stderr) = server.wait();
        assert_eq!(code, Some(0), "{stderr}");
        return;
    };
    let output = program(&[("DATABASE_URL", &running.url)], &[])
        .output()
        .expect("it runs");
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(
        stderr.starts_with("error: DATABASE_URL (--database-url): the connection pooler at 127.0.0.1:")
            && stderr.contains(why)
            && stderr.contains(
                "; connect to Postgres directly, or in session mode with lock_timeout=5s, statement_timeout=10s, \
                 idle_in_transaction_session_timeout=15s in force for this user"
            ),
        "{stderr}"
    );
    assert_eq!((output.status.code(), stderr.lines().count()), (Some(3), 1), "{stderr}");
}

/// A running PgBouncer. It is killed when it is dropped.
struct Running {
    child: Child,
    url: String,
    _folder: TempDir,
}

impl Running {
    async fn start(pgbouncer: &str, pooler: &Pooler, environment: &TestEnvironment) -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        let port = TcpListener::bind("127.0.0.1:0").and_then(|free| free.local_addr());
        let port = port.expect("a port").port();
        let variables = environment.database.environment();
        let variable = |name: &str| {
            let found = variables.iter().find(|(known, _)| *known == name);
            found.map_or("", |(_, value)| value.as_str())
        };
        let settings = format!(
            "[databases]\n{database} = host={} port={} user={} password={}\n\
             [pgbouncer]\nlisten_addr = 127.0.0.1\nlisten_port = {port}\nunix_socket_dir =\nauth_type = any\n\
             pool_mode = {}\nignore_startup_parameters = {}\n",
            variable("PGHOST"),
            variable("PGPORT"),
            variable("PGUSER"),
            variable("PGPASSWORD"),
            pooler.mode,
            pooler.ignores,
            database = variable("PGDATABASE"),
        );
        let file = folder.path().join("pgbouncer.ini");
        fs::write(&file, settings).expect("its settings");
        // It does not run as root, and reads them as another user.
        fs::set_permissions(folder.path(), Permissions::from_mode(0o755)).expect("the folder is readable");
        let mut command = Command::new(pgbouncer);
        if rustix::process::geteuid().is_root() {
            command.args(["--user", "nobody"]);
        }
        let child = command
            .arg("--quiet")
            .arg(&file)
            .stdin(Stdio::null())
            .spawn()
            .expect("it starts");
        let url = format!(
            "postgres://ann@127.0.0.1:{port}/{}?sslmode=disable",
            variable("PGDATABASE")
        );
        until("PgBouncer to listen", async || {
            tokio::net::TcpStream::connect(("127.0.0.1", port)).await.is_ok()
        })
        .await;
        Self {
            child,
            url,
            _folder: folder,
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
