//! Postgres: an external server, or one of our own with the same settings from every source.

mod database;
mod docker;
mod native;

use std::{
    collections::{BTreeMap, HashMap},
    ops::Deref,
    str::FromStr,
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::{Context, bail};
use sqlx::{ConnectOptions, Connection, postgres::PgConnectOptions};
use tokio::sync::{Mutex, OnceCell};

use super::{Missing, Report, Source, forced, remedy, root, setting};
pub use database::Database;
use database::ExternalOwner;
pub use native::program;

const SERVICE: &str = "postgres";
const URL_VARIABLE: &str = "DATABASE_URL";
/// How long a server may take from its start to its first answer.
const READY_WITHIN: Duration = Duration::from_secs(60);
const LOOK_AGAIN_AFTER: Duration = Duration::from_millis(5);

/// What a server that is started here may lose when the machine crashes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Durability {
    /// Everything: no commit waits for the disk. For tests, whose data nobody needs afterwards.
    Fast,
    /// Nothing that was committed: Postgres as it comes. For every number that is to mean something.
    Durable,
}

/// The settings of every server that is started here, as arguments.
fn settings(durability: Durability) -> Vec<String> {
    let mut settings = vec![
        // Several servers of a test, each with its pool, beside the pools of other tests.
        "max_connections=500",
        // The default of 1 s would make every test of a deadlock wait that long.
        "deadlock_timeout=10ms",
        // In files of the data folder, which go with it: a server that is killed leaves others behind in /dev/shm.
        "dynamic_shared_memory_type=mmap",
    ];
    if durability == Durability::Fast {
        // Little log is kept, as it may lie in memory.
        settings.extend([
            "fsync=off",
            "full_page_writes=off",
            "max_wal_size=256MB",
            "min_wal_size=32MB",
        ]);
    }
    let arguments = settings.into_iter().flat_map(|setting| ["-c", setting]);
    arguments.map(str::to_owned).collect()
}

/// A Postgres server, and what is needed to make databases on it.
pub struct Postgres {
    server: Server,
    /// How to reach its database for administration.
    admin: PgConnectOptions,
    report: Report,
    /// One migrated template for each schema, made by whoever needs it first.
    templates: Mutex<HashMap<String, Arc<OnceCell<()>>>>,
}

enum Server {
    External(ExternalOwner),
    Own(Own),
}

/// A server that was started here.
enum Own {
    Docker(docker::Server),
    Native(native::Server),
}

impl Own {
    fn admin(&self) -> PgConnectOptions {
        match self {
            Self::Docker(server) => server.admin(),
            Self::Native(server) => server.admin(),
        }
    }
}

impl Postgres {
    /// Finds a server or starts one. What was started ends when this is dropped, or with this process.
    ///
    /// # Errors
    /// There is none; the error says what was tried and how to get one.
    pub async fn find(durability: Durability) -> Result<Self, Missing> {
        Self::search(&[Source::External, Source::Docker, Source::Native], durability).await
    }

    /// Starts a server that nobody else uses, at an address that it keeps when it is stopped and started again. It is never an external one.
    ///
    /// # Errors
    /// None can be started; the error says what was tried and how to get one.
    pub async fn private(durability: Durability) -> Result<Private, Missing> {
        let found = Self::search(&[Source::Docker, Source::Native], durability).await;
        found.map(Private)
    }

    async fn search(order: &[Source], durability: Durability) -> Result<Self, Missing> {
        let began = Instant::now();
        let forced = forced()?;
        let mut passed_over = Vec::new();
        for &source in forced.as_ref().map_or(order, std::slice::from_ref) {
            let found = match source {
                Source::External => match setting(URL_VARIABLE) {
                    None => Err(anyhow::anyhow!("{URL_VARIABLE} is not set")),
                    // Whoever names a server wants that one, so nothing else is tried when it is not there.
                    Some(url) => {
                        let found = external(&url.to_string_lossy()).await;
                        return Self::new(found, source, began, format!("{URL_VARIABLE} is set"))
                            .await
                            .map_err(|error| Missing::Nowhere {
                                service: SERVICE,
                                tried: vec![(source, format!("{error:#}"))],
                                remedy: format!(
                                    "Set {URL_VARIABLE} to a server that answers, or unset it to have one started."
                                ),
                            });
                    }
                },
                Source::Docker => docker::Server::start(durability).await.map(Own::Docker).map(started),
                Source::Native => native::Server::start(durability).await.map(Own::Native).map(started),
            };
            let reason = match forced {
                Some(_) => "OVERSOLD_BACKENDS asks for it".to_owned(),
                None => super::reason(&passed_over),
            };
            match Self::new(found, source, began, reason).await {
                Ok(postgres) => return Ok(postgres),
                Err(error) => passed_over.push((source, format!("{error:#}"))),
            }
        }
        Err(Missing::Nowhere {
            service: SERVICE,
            tried: passed_over,
            remedy: remedy(SERVICE, forced),
        })
    }

    async fn new(
        found: anyhow::Result<(Server, PgConnectOptions)>,
        source: Source,
        began: Instant,
        reason: String,
    ) -> anyhow::Result<Self> {
        let (server, admin) = found?;
        let mut connection = admin.connect().await?;
        let mut show = async |setting: &'static str| -> sqlx::Result<String> {
            let statement = sqlx::AssertSqlSafe(format!("show {setting}"));
            sqlx::query_scalar(statement).fetch_one(&mut connection).await
        };
        let report = Report {
            service: SERVICE,
            source,
            reason,
            version: show("server_version").await?,
            address: format!("{}:{}", admin.get_host(), admin.get_port()),
            start_up_ms: u64::try_from(began.elapsed().as_millis())?,
            durability: BTreeMap::from([
                ("fsync", show("fsync").await?),
                ("synchronous_commit", show("synchronous_commit").await?),
                ("full_page_writes", show("full_page_writes").await?),
            ]),
        };
        connection.close().await?;
        eprintln!("{report}");
        Ok(Self {
            server,
            admin,
            report,
            templates: Mutex::default(),
        })
    }

    /// Where it comes from, which one it is, and what it would lose in a crash.
    pub fn report(&self) -> &Report {
        &self.report
    }
}

fn started(server: Own) -> (Server, PgConnectOptions) {
    let admin = server.admin();
    (Server::Own(server), admin)
}

/// The server at a URL that the user gave.
async fn external(url: &str) -> anyhow::Result<(Server, PgConnectOptions)> {
    // Messages of the parser may repeat what it was given, and so the password.
    let admin = PgConnectOptions::from_str(url)
        .ok()
        .filter(|_| {
            ["postgres://", "postgresql://"]
                .iter()
                .any(|scheme| url.starts_with(scheme))
        })
        .with_context(|| {
            format!("{URL_VARIABLE} is no URL of a Postgres database, such as postgres://user:password@host:5432/name")
        })?;
    let shown = super::without_secrets(url);
    let connected = admin.connect().await;
    let mut connection = connected.map_err(|error| anyhow::anyhow!("{shown} does not answer: {}", root(&error)))?;
    let may_create: bool =
        sqlx::query_scalar("select rolcreatedb or rolsuper from pg_roles where rolname = current_user")
            .fetch_one(&mut connection)
            .await?;
    if !may_create {
        bail!("the user of {shown} may not create databases, and every test has its own (`alter role … createdb`)");
    }
    let owner = ExternalOwner::register(&admin, connection).await?;
    Ok((Server::External(owner), admin))
}

/// Waits until a server answers that was just started. `still_there` says why there is nothing to wait for any more.
async fn answers(
    admin: &PgConnectOptions,
    mut still_there: impl AsyncFnMut() -> anyhow::Result<()>,
) -> anyhow::Result<()> {
    /// Postgres: it is starting up, or shutting down.
    const CANNOT_CONNECT_NOW: &str = "57P03";

    let began = Instant::now();
    loop {
        let error = match admin.connect().await {
            Ok(connection) => return Ok(connection.close().await?),
            Err(error) => error,
        };
        still_there().await?;
        let comes_yet = match &error {
            sqlx::Error::Io(_) => true,
            sqlx::Error::Database(refused) => refused.code().as_deref() == Some(CANNOT_CONNECT_NOW),
            _ => false,
        };
        if !comes_yet || began.elapsed() > READY_WITHIN {
            return Err(error).with_context(|| {
                format!(
                    "it was started, but did not answer at {}:{}",
                    admin.get_host(),
                    admin.get_port()
                )
            });
        }
        tokio::time::sleep(LOOK_AGAIN_AFTER).await;
    }
}

/// A server that a test may break. It keeps its address.
pub struct Private(Postgres);

impl Deref for Private {
    type Target = Postgres;

    fn deref(&self) -> &Postgres {
        &self.0
    }
}

impl Private {
    /// Shuts it down in order: connections are cut, what was committed is there when it starts again. Nothing happens if it is down.
    ///
    /// # Errors
    /// It does not end in time.
    pub async fn stop(&self) -> anyhow::Result<()> {
        match self.own() {
            Own::Docker(server) => server.stop().await,
            Own::Native(server) => server.stop().await,
        }
    }

    /// Kills all its processes, as a crash would. Nothing happens if it is down.
    ///
    /// # Errors
    /// It can't be killed.
    pub async fn kill(&self) -> anyhow::Result<()> {
        match self.own() {
            Own::Docker(server) => server.kill().await,
            Own::Native(server) => server.kill().await,
        }
    }

    /// Starts it again at the same address, and waits until it answers. Nothing happens if it is up.
    ///
    /// # Errors
    /// It does not come up.
    pub async fn start(&self) -> anyhow::Result<()> {
        match self.own() {
            Own::Docker(server) => server.launch().await,
            Own::Native(server) => server.launch().await,
        }
    }

    /// The process that all others of the server descend from; `None` while it is down. For a container it is the pid that the engine
    /// sees, which is one of this machine only if the engine runs on it.
    ///
    /// # Errors
    /// The engine does not tell.
    pub async fn pid(&self) -> anyhow::Result<Option<u32>> {
        match self.own() {
            Own::Docker(server) => server.pid().await,
            Own::Native(server) => Ok(server.pid()),
        }
    }

    fn own(&self) -> &Own {
        match &self.0.server {
            Server::Own(server) => server,
            Server::External(_) => unreachable!("`Postgres::private` does not look for an external server"),
        }
    }
}
