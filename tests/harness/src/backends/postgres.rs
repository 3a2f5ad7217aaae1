//! Postgres: an external server, or one started here with the same settings from every source.

mod database;
mod docker;
mod native;

use std::{
    collections::{BTreeMap, HashMap},
    str::FromStr,
    sync::Arc,
    time::Duration,
};

use anyhow::{Context, bail};
use rand::distr::{Alphanumeric, SampleString};
use sqlx::{
    ConnectOptions, Connection,
    postgres::{PgConnectOptions, PgSslMode},
};
use tokio::{
    sync::{Mutex, OnceCell},
    time::timeout,
};

use super::{
    Missing, Private, Report, Source,
    managed_server::{ManagedServer, NotReady, ReadinessProbe},
    root,
    source_selection::{Candidate, Service, search},
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

/// Time limit of the first connection to an external server. A server that speaks another protocol
/// may never answer.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// What a server started here may lose when the machine crashes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Durability {
    /// Everything: commits do not wait for the disk. For tests, whose data is discarded.
    Fast,
    /// Nothing that was committed: the defaults of Postgres. For measurements.
    Durable,
}

/// The settings of every server started here, as arguments.
fn settings(durability: Durability) -> Vec<String> {
    let mut settings = vec![
        // Several servers of a test, each with its pool, run beside the pools of other tests.
        "max_connections=500",
        // The default of 1 s would make every test of a deadlock wait that long.
        "deadlock_timeout=10ms",
        // In files of the data folder, which are removed with it. A killed server would leave
        // segments behind in /dev/shm.
        "dynamic_shared_memory_type=mmap",
    ];
    if durability == Durability::Fast {
        // Keeps little WAL, which may be in memory.
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

/// A Postgres server on which tests create databases.
pub struct Postgres {
    server: Server,
    /// Connection options of its administration database.
    admin: PgConnectOptions,
    report: Report,
    /// One migrated template database for each schema, created on first use.
    templates: Mutex<HashMap<String, Arc<OnceCell<()>>>>,
}

enum Server {
    External(ExternalOwner),
    Managed(Arc<ManagedServer>),
}

impl Postgres {
    /// Finds a server or starts one. A started server stops when this is dropped or this process
    /// ends.
    ///
    /// # Errors
    /// [`Missing`] if no source provides a server.
    pub async fn find(durability: Durability) -> Result<Self, Missing> {
        Self::search(&[Source::External, Source::Docker, Source::Native], durability).await
    }

    /// Starts a server for one test, from Docker or native programs. It keeps its address when it
    /// is stopped and started again.
    ///
    /// # Errors
    /// [`Missing`] if no server can be started.
    pub async fn private(durability: Durability) -> Result<Private, Missing> {
        let postgres = Self::search(&[Source::Docker, Source::Native], durability).await?;
        let managed = match &postgres.server {
            Server::Managed(managed) => Arc::clone(managed),
            Server::External(_) => unreachable!("external servers were not searched"),
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

    /// The server's source, version, address and durability settings.
    pub fn report(&self) -> &Report {
        &self.report
    }
}

/// Starts a server, and waits until it is ready.
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

/// Connection options of the administration database of a server started here.
fn admin(host: &str, port: u16, password: &str) -> PgConnectOptions {
    PgConnectOptions::new_without_pgpass()
        .host(host)
        .port(port)
        .username("postgres")
        .password(password)
        .database("postgres")
        .ssl_mode(PgSslMode::Disable)
}

/// The readiness probe: connects once.
async fn probe(admin: PgConnectOptions) -> Result<(), NotReady> {
    /// SQLSTATE of a server that is starting up or shutting down.
    const CANNOT_CONNECT_NOW: &str = "57P03";

    let request = async { admin.connect().await?.close().await };
    request.await.map_err(|error| NotReady {
        may_become_ready: match &error {
            sqlx::Error::Io(_) => true,
            sqlx::Error::Database(refused) => refused.code().as_deref() == Some(CANNOT_CONNECT_NOW),
            _ => false,
        },
        error: error.into(),
    })
}

/// Connects to the server at the user's URL, and checks that the user may create databases.
async fn external(url: &str) -> anyhow::Result<(Server, PgConnectOptions)> {
    // The parser's messages may repeat its input, and with it the password.
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
    let connected = timeout(CONNECT_TIMEOUT, admin.connect()).await;
    let connected = connected
        .with_context(|| format!("{shown} does not answer within {CONNECT_TIMEOUT:?}; is it a Postgres server?"))?;
    let mut connection = connected.map_err(|error| anyhow::anyhow!("{shown} does not answer: {}", root(&error)))?;
    let may_create: bool =
        sqlx::query_scalar("select rolcreatedb or rolsuper from pg_roles where rolname = current_user")
            .fetch_one(&mut connection)
            .await?;
    if !may_create {
        bail!(
            "the user of {shown} may not create databases, and every test has a database of its own (`alter role … createdb`)"
        );
    }
    let owner = ExternalOwner::register(&admin, connection).await?;
    Ok((Server::External(owner), admin))
}
