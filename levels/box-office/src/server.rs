//! A server: startup, shutdown, and everything it owns.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use sqlx::{ConnectOptions, migrate::MigrateError, postgres::PgConnectOptions};
use tokio::{
    sync::Semaphore,
    task::JoinHandle,
    time::{Instant, timeout_at},
};
use tokio_util::{
    sync::{CancellationToken, DropGuard},
    task::TaskTracker,
};
use tracing::Instrument;

use crate::{
    CauseLog, Database, DatabaseUrl, Instrumentation, KafkaConfig, Level, RedisConfig, RedisUrl, Service, Settings,
    Strategy, StrategyContext,
    breakpoint::Breakpoint,
    connections::{accept, listen},
    database::{self, DATABASE_TIMEOUTS},
    http::{About, App, LiveFeed, RushTarget},
    metrics::{Metrics, PriorityMetrics, RelayMetrics, StrategyMetrics},
    readiness::{self, Readiness},
    sale_states::SaleStates,
    trace::Recorder,
};

/// A running server. It owns its pool, metrics, connections and reservations: two servers share
/// nothing.
///
/// Dropping it stops accepting connections; [`Server::shut_down`] also drains it.
pub struct Server {
    address: SocketAddr,
    stop: CancellationToken,
    _stop_when_dropped: DropGuard,
    accepting: JoinHandle<()>,
    connections: TaskTracker,
    app: Arc<App>,
}

/// The error of [`Server::start`]. Its message never contains a password.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// `DATABASE_URL` is not set.
    #[error("DATABASE_URL (--database-url) is not set; expected {}", DatabaseUrl::EXPECTED)]
    NoDatabaseUrl,
    /// `REDIS_URL` is not set, and the strategy needs it.
    #[error("REDIS_URL (--redis-url) is not set; expected {}", RedisUrl::EXPECTED)]
    NoRedisUrl,
    /// `KAFKA_BOOTSTRAP_SERVERS` is not set, and the strategy needs it.
    #[error(
        "KAFKA_BOOTSTRAP_SERVERS (--kafka-bootstrap-servers) is not set; expected {}",
        crate::settings::BOOTSTRAP_SERVERS
    )]
    NoKafka,
    /// A setting of an improvement that the strategy does not support.
    #[error("{variable} ({flag}) is set, but {strategy} does not support it: {improvement}")]
    Unsupported {
        /// The variable.
        variable: &'static str,
        /// Its flag.
        flag: &'static str,
        /// The name of the improvement.
        improvement: &'static str,
        /// The name of the level and the strategy.
        strategy: String,
    },
    /// Two settings that contradict each other, in one line.
    #[error("{0}")]
    Contradiction(String),
    /// The trace file is not writable.
    #[error("OVERSOLD_TRACE_FILE (--trace-file) holds {path:?}; expected a writable file: {why}")]
    TraceFile {
        /// The value of the variable.
        path: std::path::PathBuf,
        /// The error of the operating system.
        why: std::io::Error,
    },
    /// The database is unreachable, or rejects the connection.
    #[error("DATABASE_URL (--database-url): no connection to Postgres at {place}: {why}")]
    Database {
        /// Its host, port and database.
        place: String,
        /// The error of the driver.
        why: String,
    },
    /// The database is reached through a connection pooler that does not give this server sessions
    /// of its own, with its settings.
    #[error(
        "DATABASE_URL (--database-url): the connection pooler at {place} {why}; connect to Postgres directly, or in \
         session mode with {} in force for this user",
        settings_in_force()
    )]
    Pooler {
        /// Its host, port and database.
        place: String,
        /// What it does.
        why: String,
    },
    /// The database has the tables of another level or schema.
    #[error(
        "DATABASE_URL (--database-url): {place} has tables of another level, strategy or version, not those of {level} \
         (schema {schema:?}): each takes a database of its own, such as `create database oversold_{level}_{schema}`"
    )]
    OtherTables {
        /// Its host, port and database.
        place: String,
        /// The name of the level that was to be served.
        level: &'static str,
        /// The name of its schema.
        schema: &'static str,
    },
    /// The migrations failed.
    #[error("DATABASE_URL (--database-url): the migrations of schema {schema:?} failed: {why}")]
    Migrations {
        /// The name of the schema.
        schema: &'static str,
        /// The error of the migrator.
        why: MigrateError,
    },
    /// The strategy failed to open.
    #[error("{strategy} failed to start: {why:#}")]
    Strategy {
        /// The name of the strategy.
        strategy: &'static str,
        /// Its error.
        why: anyhow::Error,
    },
    /// The address can't be bound.
    #[error("HOST and PORT (--host, --port) say {address}, which can't be bound: {why}")]
    Address {
        /// The value of the variables.
        address: SocketAddr,
        /// The error of the operating system.
        why: std::io::Error,
    },
}

/// The settings that a pooler must have in force.
fn settings_in_force() -> String {
    DATABASE_TIMEOUTS
        .map(|(name, value)| format!("{name}={value}"))
        .join(", ")
}

impl StartError {
    /// The exit code of a program that fails with this error: 2 for a wrong setting, 3 for a
    /// missing backend.
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::NoDatabaseUrl
            | Self::NoRedisUrl
            | Self::NoKafka
            | Self::Unsupported { .. }
            | Self::Contradiction(_)
            | Self::TraceFile { .. }
            | Self::Address { .. } => 2,
            Self::Database { .. }
            | Self::Pooler { .. }
            | Self::OtherTables { .. }
            | Self::Migrations { .. }
            | Self::Strategy { .. } => 3,
        }
    }
}

/// The error of [`Server::shut_down`]: the drain timeout expired with work in flight.
#[derive(Debug, thiserror::Error)]
#[error("not drained within {after:?}: {connections} connections and {reservations} reservations were aborted")]
pub struct DrainTimeout {
    /// The drain timeout.
    pub after: Duration,
    /// Connections that were still sending or reading.
    pub connections: usize,
    /// Reservations that were still running; their outcome is unknown.
    pub reservations: usize,
}

impl Server {
    /// Starts a server in the background: migrates the database, opens the strategy, and listens.
    ///
    /// # Errors
    /// [`StartError`], one variant for each step.
    pub async fn start(
        level: &'static Level,
        strategy: &'static Strategy,
        settings: &Settings,
    ) -> Result<Self, StartError> {
        let name = format!("{}/{}", level.name, strategy.name);
        let context = context(level, strategy, settings).await?;
        let (database, metrics) = (context.database.clone(), context.metrics.clone());
        let instrumentation = context.instrumentation.clone();
        let opened = (strategy.open)(context).await.map_err(|why| StartError::Strategy {
            strategy: strategy.name,
            why,
        })?;

        let address = SocketAddr::new(settings.host, settings.port);
        let (listener, address) = listen(address).map_err(|why| StartError::Address { address, why })?;

        let stop = CancellationToken::new();
        let connections = TaskTracker::new();
        let reservations = TaskTracker::new();
        let accepts_first = strategy.needs.contains(&Service::Kafka);
        let app = Arc::new(App {
            strategy: opened,
            sales: SaleStates::default(),
            readiness: Readiness::new(accepts_first),
            causes: CauseLog::default(),
            metrics: Metrics::new(
                &name,
                &settings.instance,
                strategy,
                metrics,
                database.pool().clone(),
                connections.clone(),
                reservations.clone(),
            ),
            database,
            instrumentation,
            reservations,
            permits: Arc::new(Semaphore::new(settings.limits.reservations)),
            admin_token: settings.admin_token.clone(),
            live: LiveFeed::new(
                About::new(level, strategy, settings),
                settings.live_peers.clone(),
                RushTarget::new(settings.rush_url.as_ref(), address),
            ),
            has_priority: settings.improvements.order_priority.is_some(),
            limits: settings.limits,
            keep_alive: settings.http_keep_alive,
            stop: stop.clone(),
        });
        let span = tracing::info_span!("server", strategy = name, instance = settings.instance);
        if accepts_first {
            let mut connection = None;
            readiness::probe_decidable(&app, &mut connection).await;
            let (stop, watch) = (stop.clone(), readiness::watch(Arc::clone(&app), connection));
            let watch = async move { stop.run_until_cancelled(watch).await };
            tokio::spawn(watch.instrument(span.clone()));
        }
        let accept = accept(listener, Arc::clone(&app), stop.clone(), connections.clone());
        Ok(Self {
            address,
            _stop_when_dropped: stop.clone().drop_guard(),
            stop,
            accepting: tokio::spawn(accept.instrument(span)),
            connections,
            app,
        })
    }

    /// Its breakpoint may pause the process from now on.
    pub(crate) fn arm_breakpoint(&self) {
        if let Some(breakpoint) = &self.app.instrumentation.breakpoint {
            breakpoint.arm();
        }
    }

    /// The address that the server listens on.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Shuts the server down gracefully.
    ///
    /// It stops accepting, completes requests in flight, closes idle connections after
    /// [`Limits::shutdown_grace`](crate::Limits::shutdown_grace), waits for reservations whose
    /// clients have disconnected, closes the strategy and the pool, and writes the trace.
    ///
    /// # Errors
    /// [`DrainTimeout`] if this takes longer than
    /// [`Limits::drain_timeout`](crate::Limits::drain_timeout); what is still in flight then is
    /// aborted.
    pub async fn shut_down(self) -> Result<(), DrainTimeout> {
        let after = self.app.limits.drain_timeout;
        let deadline = Instant::now() + after;
        self.stop.cancel();
        let mut accepting = self.accepting;
        let drained = timeout_at(deadline, async {
            // The accept loop ends by itself once the kernel's backlog is empty.
            let _ = (&mut accepting).await;
            self.connections.close();
            self.connections.wait().await;
            self.app.reservations.close();
            self.app.reservations.wait().await;
            self.app.strategy.close().await;
            self.app.database.pool().close().await;
        })
        .await;
        accepting.abort();
        if let Some(recorder) = &self.app.instrumentation.recorder
            && let Err(why) = recorder.write()
        {
            tracing::error!(%why, "the trace could not be written");
        }
        drained.map_err(|_| DrainTimeout {
            after,
            connections: self.connections.len(),
            reservations: self.app.reservations.len(),
        })
    }
}

/// Builds the dependencies of a strategy from the settings. The database is migrated, the pool
/// connects lazily.
async fn context(
    level: &'static Level,
    strategy: &Strategy,
    settings: &Settings,
) -> Result<StrategyContext, StartError> {
    settings.improvements.check(level, strategy)?;
    let url = settings.database_url.as_ref().ok_or(StartError::NoDatabaseUrl)?;
    let redis = redis_config(strategy, settings)?;
    let kafka = kafka_config(strategy, settings)?;
    let instrumentation = instrumentation(settings)?;
    Ok(StrategyContext {
        database: database(level, strategy, url, settings).await?,
        work: settings.work,
        metrics: StrategyMetrics {
            relay: settings.improvements.outbox_relay.then(RelayMetrics::default),
            priority: settings.improvements.order_priority.map(|_| PriorityMetrics::default()),
            ..StrategyMetrics::default()
        },
        redis,
        kafka,
        improvements: settings.improvements.clone(),
        instrumentation,
    })
}

fn redis_config(strategy: &Strategy, settings: &Settings) -> Result<Option<RedisConfig>, StartError> {
    match &settings.redis_url {
        None if strategy.needs.contains(&Service::Redis) => Err(StartError::NoRedisUrl),
        url => Ok(url.clone().map(|url| RedisConfig {
            url,
            prefix: settings.redis_prefix.clone(),
            lease: settings.lock_lease,
        })),
    }
}

fn kafka_config(strategy: &Strategy, settings: &Settings) -> Result<Option<KafkaConfig>, StartError> {
    match &settings.kafka_bootstrap_servers {
        None if strategy.needs.contains(&Service::Kafka) => Err(StartError::NoKafka),
        servers => Ok(servers.clone().map(|bootstrap_servers| KafkaConfig {
            bootstrap_servers,
            prefix: settings.kafka_prefix.clone(),
            consumers: settings.kafka_consumers,
            session: settings.kafka_session,
        })),
    }
}

fn instrumentation(settings: &Settings) -> Result<Instrumentation, StartError> {
    let recorder = match &settings.trace_file {
        None => None,
        Some(path) => Some(Recorder::create(path).map_err(|why| StartError::TraceFile {
            path: path.clone(),
            why,
        })?),
    };
    Ok(Instrumentation {
        recorder,
        breakpoint: settings.stop_at.clone().map(Breakpoint::new),
    })
}

/// Creates the database if there is none, and migrates it.
///
/// # Errors
/// [`StartError`].
pub(crate) async fn migrate(level: &'static Level, strategy: &Strategy, settings: &Settings) -> Result<(), StartError> {
    let url = settings.database_url.as_ref().ok_or(StartError::NoDatabaseUrl)?;
    database::create(url).await?;
    database::prepare(
        &connect_options(level, strategy, url, settings),
        url,
        level.name,
        strategy.schema,
    )
    .await
}

/// How this server connects to its database.
fn connect_options(
    level: &'static Level,
    strategy: &Strategy,
    url: &DatabaseUrl,
    settings: &Settings,
) -> PgConnectOptions {
    url.options()
        .clone()
        .application_name(&format!("{}/{} {}", level.name, strategy.name, settings.instance))
        .disable_statement_logging()
        .options(DATABASE_TIMEOUTS)
}

/// Checks and migrates the database, and creates the pool.
async fn database(
    level: &'static Level,
    strategy: &Strategy,
    url: &DatabaseUrl,
    settings: &Settings,
) -> Result<Database, StartError> {
    let connect = connect_options(level, strategy, url, settings);
    database::prepare(&connect, url, level.name, strategy.schema).await?;
    Ok(Database::lazy(connect, settings.database_pool_size))
}
