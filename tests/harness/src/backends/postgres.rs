//! Postgres: an external server, or one of our own with the same settings from every source.

mod database;
mod docker;
mod native;

use std::{
    collections::{BTreeMap, HashMap},
    str::FromStr,
    sync::Arc,
};

use anyhow::{Context, bail};
use rand::distr::{Alphanumeric, SampleString};
use sqlx::{
    ConnectOptions, Connection,
    postgres::{PgConnectOptions, PgSslMode},
};
use tokio::sync::{Mutex, OnceCell};

use super::{
    Missing, Private, Report, Source,
    managed_server::{ManagedServer, NotReady, ReadinessProbe},
    root,
    search::{Candidate, Service, search},
};
pub use database::Database;
use database::ExternalOwner;
pub use native::program;

const SERVICE: Service = Service {
    name: "postgres",
    url_variable: URL_VARIABLE,
    packages: &[
        ("apt-get", "apt-get install --yes postgresql"),
        ("dnf", "dnf install postgresql-server"),
        ("pacman", "pacman -S postgresql"),
        ("brew", "brew install postgresql@17"),
    ],
};
const URL_VARIABLE: &str = "DATABASE_URL";

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
    Managed(Arc<ManagedServer>),
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
        let postgres = Self::search(&[Source::Docker, Source::Native], durability).await?;
        let managed = match &postgres.server {
            Server::Managed(managed) => Arc::clone(managed),
            Server::External(_) => unreachable!("nobody looked for an external one"),
        };
        Ok(Private::new(postgres, managed))
    }

    async fn search(order: &[Source], durability: Durability) -> Result<Self, Missing> {
        search(&SERVICE, order, async |candidate| {
            let (server, admin) = match candidate.source {
                Source::External => external(&candidate.url).await?,
                managed => start(managed, durability).await?,
            };
            Self::new(server, admin, candidate).await
        })
        .await
    }

    async fn new(server: Server, admin: PgConnectOptions, candidate: Candidate) -> anyhow::Result<Self> {
        let mut connection = admin.connect().await?;
        let mut show = async |setting: &'static str| -> sqlx::Result<String> {
            let statement = sqlx::AssertSqlSafe(format!("show {setting}"));
            sqlx::query_scalar(statement).fetch_one(&mut connection).await
        };
        let version = show("server_version").await?;
        let durability = BTreeMap::from([
            ("fsync", show("fsync").await?),
            ("synchronous_commit", show("synchronous_commit").await?),
            ("full_page_writes", show("full_page_writes").await?),
        ]);
        connection.close().await?;
        let address = format!("{}:{}", admin.get_host(), admin.get_port());
        Ok(Self {
            server,
            admin,
            report: candidate.report(version, address, durability)?,
            templates: Mutex::default(),
        })
    }

    /// Where it comes from, which one it is, and what it would lose in a crash.
    pub fn report(&self) -> &Report {
        &self.report
    }
}

/// Starts a server, and waits until it answers.
async fn start(source: Source, durability: Durability) -> anyhow::Result<(Server, PgConnectOptions)> {
    let password = Alphanumeric.sample_string(&mut rand::rng(), 32);
    let probe: ReadinessProbe = {
        let password = password.clone();
        Box::new(move |host, port| Box::pin(probe(admin(&host, port, &password))))
    };
    let managed = match source {
        Source::Docker => {
            ManagedServer::in_container(docker::start(durability, password.clone()).await?, probe).await?
        }
        _ => {
            let password = password.clone();
            let preparing = tokio::task::spawn_blocking(move || native::prepare(durability, &password));
            ManagedServer::as_process(preparing.await??, probe).await?
        }
    };
    let (host, port) = managed.address();
    let admin = admin(host, port, &password);
    Ok((Server::Managed(Arc::new(managed)), admin))
}

/// How to reach the database for administration of a server that was started here.
fn admin(host: &str, port: u16, password: &str) -> PgConnectOptions {
    PgConnectOptions::new_without_pgpass()
        .host(host)
        .port(port)
        .username("postgres")
        .password(password)
        .database("postgres")
        .ssl_mode(PgSslMode::Disable)
}

/// Asks a server that was just started whether it is ready.
async fn probe(admin: PgConnectOptions) -> Result<(), NotReady> {
    /// Postgres: it is starting up, or shutting down.
    const CANNOT_CONNECT_NOW: &str = "57P03";

    let asked = async { admin.connect().await?.close().await };
    asked.await.map_err(|error| NotReady {
        may_become_ready: match &error {
            sqlx::Error::Io(_) => true,
            sqlx::Error::Database(refused) => refused.code().as_deref() == Some(CANNOT_CONNECT_NOW),
            _ => false,
        },
        error: error.into(),
    })
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
        bail!("the user of {shown} may not create databases, and every test has its managed (`alter role … createdb`)");
    }
    let owner = ExternalOwner::register(&admin, connection).await?;
    Ok((Server::External(owner), admin))
}
