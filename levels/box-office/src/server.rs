//! One server: everything it owns, from its first connection to its last.
//!
//! The accept loop is written out because a server that faces the world needs what `axum::serve` leaves out: time for
//! slow headers, a bound on connections, and an end that does not wait for idle clients.

use std::{io::ErrorKind, net::SocketAddr, pin::pin, sync::Arc, time::Duration};

use hyper::{server::conn::http1, service::service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
#[cfg(target_os = "linux")]
use rustix::net::sockopt::set_tcp_user_timeout;
use rustix::process::{Resource, getrlimit};
use sqlx::{ConnectOptions, Connection, migrate::MigrateError, postgres::PgConnectOptions};
use tokio::{
    net::{TcpListener, TcpSocket, TcpStream},
    sync::{OwnedSemaphorePermit, Semaphore},
    task::JoinHandle,
    time::{Instant, sleep, timeout, timeout_at},
};
use tokio_util::{
    sync::{CancellationToken, DropGuard},
    task::TaskTracker,
};
use tower::ServiceExt;
use tracing::Instrument;

use crate::{
    DatabaseUrl, Instrumentation, KafkaConfig, Level, Limits, RedisConfig, RedisUrl, Service, Settings, Strategy,
    StrategyContext,
    breakpoint::Breakpoint,
    http::{self, App},
    metrics::{Metrics, StrategyMetrics},
    trace::Recorder,
};

/// How long a start waits for the database.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

// ANCHOR: deadlines
/// How long a reservation waits for a connection of the pool before the buyer hears "undecided".
const ACQUIRE_TIMEOUT: Duration = Duration::from_secs(5);

/// What Postgres itself gives up, so that nobody has to cut a transaction from outside. The order matters: who waits for
/// a lock gives up before its statement does, and a holder may be idle for as long as the longest `WORK_MS`.
const DATABASE_TIMEOUTS: [(&str, &str); 3] = [
    ("lock_timeout", "5s"),
    ("statement_timeout", "10s"),
    ("idle_in_transaction_session_timeout", "15s"),
];
// ANCHOR_END: deadlines

/// Clients that may wait to be accepted. A thousand buyers come at one instant; the kernel's usual queue holds fewer.
const BACKLOG: u32 = 4096;

/// The most that the headers of a request may take, in bytes.
const MAX_HEADER_BYTES: usize = 32 * 1024;

/// A server that sells. It owns its pool, metrics, connections and reservations: two of them share nothing.
///
/// Dropped, it stops to accept; [`Server::shut_down`] is what drains.
pub struct Server {
    address: SocketAddr,
    stop: CancellationToken,
    _stop_when_dropped: DropGuard,
    accepting: JoinHandle<()>,
    connections: TaskTracker,
    app: Arc<App>,
}

/// Why a server did not start. Never holds a password.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// `DATABASE_URL` is not there.
    #[error("DATABASE_URL (--database-url) is not set; it takes {}", DatabaseUrl::TAKES)]
    NoDatabaseUrl,
    /// `REDIS_URL` is not there, and the strategy needs it.
    #[error("REDIS_URL (--redis-url) is not set; it takes {}", RedisUrl::TAKES)]
    NoRedisUrl,
    /// `KAFKA_BOOTSTRAP_SERVERS` is not there, and the strategy needs it.
    #[error(
        "KAFKA_BOOTSTRAP_SERVERS (--kafka-bootstrap-servers) is not set; it takes {}",
        crate::settings::BOOTSTRAP_SERVERS
    )]
    NoKafka,
    /// The trace file can't be written.
    #[error("OVERSOLD_TRACE_FILE (--trace-file) holds {path:?}; it takes a file that can be written: {why}")]
    TraceFile {
        /// What the variable held.
        path: std::path::PathBuf,
        /// What the system said.
        why: std::io::Error,
    },
    /// The database can't be reached, or does not let us in.
    #[error("DATABASE_URL (--database-url): no connection to Postgres at {place}: {why}")]
    Database {
        /// Where it should be.
        place: String,
        /// What the driver said.
        why: String,
    },
    /// The tables can't be made, as when the database holds those of another schema.
    #[error("DATABASE_URL (--database-url): the tables of schema {schema:?} can't be made there: {why}")]
    Migrations {
        /// The schema's name.
        schema: &'static str,
        /// What the migrator said.
        why: MigrateError,
    },
    /// The strategy can't be made ready.
    #[error("{strategy} can't be made ready: {why:#}")]
    Strategy {
        /// The strategy's name.
        strategy: &'static str,
        /// What it said.
        why: anyhow::Error,
    },
    /// The address can't be listened on.
    #[error("HOST and PORT (--host, --port) say {address}; it can't be listened on: {why}")]
    Address {
        /// What the variables held.
        address: SocketAddr,
        /// What the system said.
        why: std::io::Error,
    },
}

impl StartError {
    /// The exit code of a program that fails with this: 2 for a wrong setting, 3 for a missing backend.
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::NoDatabaseUrl | Self::NoRedisUrl | Self::NoKafka | Self::TraceFile { .. } | Self::Address { .. } => 2,
            Self::Database { .. } | Self::Migrations { .. } | Self::Strategy { .. } => 3,
        }
    }
}

/// What had to be left behind at the end of a server.
#[derive(Debug, thiserror::Error)]
#[error("not drained in {after:?}: {connections} connections and {reservations} reservations were cut off")]
pub struct DrainTimeout {
    /// How long the server waited.
    pub after: Duration,
    /// Clients that were still sending or reading.
    pub connections: usize,
    /// Reservations that still ran: nobody knows how they end.
    pub reservations: usize,
}

impl Server {
    /// Connects, makes the tables, opens the strategy, listens, and serves in the background.
    ///
    /// # Errors
    /// See [`StartError`].
    pub async fn start(
        level: &'static Level,
        strategy: &'static Strategy,
        settings: &Settings,
    ) -> Result<Self, StartError> {
        let name = format!("{}/{}", level.name, strategy.name);
        let url = settings.database_url.as_ref().ok_or(StartError::NoDatabaseUrl)?;
        let redis = match &settings.redis_url {
            None if strategy.needs.contains(&Service::Redis) => return Err(StartError::NoRedisUrl),
            url => url.clone().map(|url| RedisConfig {
                url,
                prefix: settings.redis_prefix.clone(),
                lease: settings.lock_lease,
            }),
        };
        let kafka = match &settings.kafka_bootstrap_servers {
            None if strategy.needs.contains(&Service::Kafka) => return Err(StartError::NoKafka),
            servers => servers.clone().map(|bootstrap_servers| KafkaConfig {
                bootstrap_servers,
                prefix: settings.kafka_prefix.clone(),
                consumers: settings.kafka_consumers,
                session: settings.kafka_session,
            }),
        };
        let recorder = match &settings.trace_file {
            None => None,
            Some(path) => Some(Recorder::create(path).map_err(|why| StartError::TraceFile {
                path: path.clone(),
                why,
            })?),
        };

        let instrumentation = Instrumentation {
            recorder,
            breakpoint: settings.stop_at.clone().map(Breakpoint::new),
        };

        let connect = url
            .options()
            .clone()
            .application_name(&format!("{name} {}", settings.instance))
            .disable_statement_logging();
        migrate(&connect, url, strategy).await?;
        let database = StrategyContext::pool_options(settings.database_pool_size)
            .acquire_timeout(ACQUIRE_TIMEOUT)
            .connect_lazy_with(connect.options(DATABASE_TIMEOUTS));
        let context = StrategyContext {
            database: database.clone(),
            work: settings.work,
            metrics: StrategyMetrics::default(),
            redis,
            kafka,
            instrumentation: instrumentation.clone(),
        };
        let metrics = context.metrics.clone();
        let opened = (strategy.open)(context).await.map_err(|why| StartError::Strategy {
            strategy: strategy.name,
            why,
        })?;

        let address = SocketAddr::new(settings.host, settings.port);
        let (listener, address) = listen(address).map_err(|why| StartError::Address { address, why })?;

        let stop = CancellationToken::new();
        let connections = TaskTracker::new();
        let reservations = TaskTracker::new();
        let app = Arc::new(App {
            strategy: opened,
            metrics: Metrics::new(
                &name,
                &settings.instance,
                metrics,
                strategy.needs,
                database.clone(),
                connections.clone(),
                reservations.clone(),
            ),
            database,
            instrumentation,
            reservations,
            permits: Arc::new(Semaphore::new(settings.limits.reservations)),
            admin_token: settings.admin_token.clone(),
            limits: settings.limits,
            stop: stop.clone(),
        });
        let span = tracing::info_span!("server", strategy = name, instance = settings.instance);
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

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Stops to accept, answers what is in flight, closes idle connections after their last words, waits for the reservations
    /// whose buyers hung up, closes the pool, and writes the trace.
    ///
    /// # Errors
    /// Something was not done after [`Limits::drain_timeout`] and is cut off.
    pub async fn shut_down(self) -> Result<(), DrainTimeout> {
        let after = self.app.limits.drain_timeout;
        let deadline = Instant::now() + after;
        self.stop.cancel();
        let mut accepting = self.accepting;
        let drained = timeout_at(deadline, async {
            // It ends by itself once it has served those whom the kernel had connected.
            let _ = (&mut accepting).await;
            self.connections.close();
            self.connections.wait().await;
            self.app.reservations.close();
            self.app.reservations.wait().await;
            self.app.strategy.close().await;
            self.app.database.close().await;
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

/// Makes the tables, on a connection of its own: a pool would hide why the database can't be reached.
///
/// Several instances may do this at once: sqlx takes an advisory lock.
async fn migrate(connect: &PgConnectOptions, url: &DatabaseUrl, strategy: &Strategy) -> Result<(), StartError> {
    let unreachable = |why: String| StartError::Database {
        place: url.to_string(),
        why,
    };
    let mut connection = timeout(CONNECT_TIMEOUT, connect.connect())
        .await
        .map_err(|_| unreachable(format!("no answer within {CONNECT_TIMEOUT:?}")))?
        .map_err(|why| unreachable(why.to_string()))?;
    strategy
        .schema
        .migrations
        .run(&mut connection)
        .await
        .map_err(|why| StartError::Migrations {
            schema: strategy.schema.name,
            why,
        })?;
    connection.close().await.map_err(|why| unreachable(why.to_string()))
}

fn listen(address: SocketAddr) -> std::io::Result<(TcpListener, SocketAddr)> {
    let socket = if address.is_ipv4() {
        TcpSocket::new_v4()
    } else {
        TcpSocket::new_v6()
    }?;
    // A server that restarts gets its port back at once.
    socket.set_reuseaddr(true)?;
    socket.bind(address)?;
    let listener = socket.listen(BACKLOG)?;
    let address = listener.local_addr()?;
    Ok((listener, address))
}

async fn accept(listener: TcpListener, app: Arc<App>, stop: CancellationToken, connections: TaskTracker) {
    /// Out of files, most likely: until somebody leaves there is nothing to do.
    const RETRY_DELAY: Duration = Duration::from_millis(50);

    let routes = http::routes(Arc::clone(&app));
    // Clients may take half of the files that this process can open: the pool and the trace need some as well.
    let files = getrlimit(Resource::Nofile).current.unwrap_or(u64::MAX);
    let most = usize::try_from(files / 2).map_or(app.limits.connections, |half| half.min(app.limits.connections));
    let free = Arc::new(Semaphore::new(most));
    let begin = |stream: TcpStream, permit: OwnedSemaphorePermit| {
        let serve_connection = serve_connection(stream, routes.clone(), app.limits, stop.clone(), permit);
        connections.spawn(serve_connection.in_current_span());
    };
    loop {
        let next = async {
            let permit = Arc::clone(&free).acquire_owned().await;
            (permit.expect("the semaphore is never closed"), listener.accept().await)
        };
        let (permit, accepted) = tokio::select! {
            // The stop first: a crowd that never ends must not keep the server from ending.
            biased;
            () = stop.cancelled() => break,
            next = next => next,
        };
        match accepted {
            Ok((stream, _)) => begin(stream, permit),
            Err(why) => {
                tracing::warn!(%why, "a connection could not be accepted");
                sleep(RETRY_DELAY).await;
            }
        }
    }
    // Who was connected by the kernel before the stop is still served; closing the listener would cut them off. The kernel is asked itself: tokio
    // says that there is nobody whenever it has not looked lately, or thinks that this task was busy for long enough.
    let Ok(listener) = listener.into_std() else { return };
    for _ in 0..BACKLOG {
        let permit = Arc::clone(&free).acquire_owned().await;
        let permit = permit.expect("the semaphore is never closed");
        match listener.accept() {
            Ok((stream, _)) => {
                if stream.set_nonblocking(true).is_ok()
                    && let Ok(stream) = TcpStream::from_std(stream)
                {
                    begin(stream, permit);
                }
            }
            // This one has hung up, another may be behind it.
            Err(why) if why.kind() == ErrorKind::ConnectionAborted => {}
            Err(_) => break,
        }
    }
}

/// Serves one connection until either side has had enough.
async fn serve_connection(
    stream: TcpStream,
    routes: axum::Router,
    limits: Limits,
    stop: CancellationToken,
    _permit: OwnedSemaphorePermit,
) {
    // A client may be sending in the very instant in which its server is told to end, and can't know whether it is heard on a connection that is
    // closed just then. So whoever is connected at the end has some time left, and the answer then says that it is the last.
    let last_words_are_over = async {
        stop.cancelled().await;
        sleep(limits.shutdown_grace).await;
    };
    let mut last_words_are_over = pin!(last_words_are_over);
    // hyper closes a connection at once if it is told to end before it has read anything there, though the kernel may hold a request.
    tokio::select! {
        biased;
        came = timeout(limits.header_timeout, stream.readable()) => {
            if !matches!(came, Ok(Ok(()))) {
                return;
            }
        }
        () = last_words_are_over.as_mut() => return,
    }
    // An answer is one small write: waiting for more to send would only delay it.
    let _ = stream.set_nodelay(true);
    // Nothing else ends a connection whose client asks and never reads the answers.
    #[cfg(target_os = "linux")]
    let _ = set_tcp_user_timeout(
        &stream,
        u32::try_from(limits.tcp_user_timeout.as_millis()).unwrap_or(u32::MAX),
    );
    let answering = TaskTracker::new();
    let service = service_fn(|request| answering.track_future(routes.clone().oneshot(request)));
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(limits.header_timeout)
        .max_buf_size(MAX_HEADER_BYTES)
        .serve_connection(TokioIo::new(stream), service);
    let mut connection = pin!(connection);
    let ended = tokio::select! {
        // The connection first: a request that has arrived is in flight, even if the time is over in the same instant.
        biased;
        ended = connection.as_mut() => ended,
        () = last_words_are_over => {
            if answering.is_empty() {
                return;
            }
            connection.as_mut().graceful_shutdown();
            connection.await
        }
    };
    if let Err(why) = ended {
        tracing::debug!(%why, "a connection ended badly");
    }
}
