//! Backends: the Postgres, Redis and Kafka that a test or a rush runs on.
//!
//! The sources of each service are tried in this order, and one line on stderr reports which one
//! was chosen and why:
//!
//! 1. **external**: its URL is set (`DATABASE_URL`, `REDIS_URL`; for Kafka
//!    `KAFKA_BOOTSTRAP_SERVERS`).
//! 2. **docker**: an engine answers, and the image is there or can be pulled.
//!    `OVERSOLD_POSTGRES_IMAGE`, `OVERSOLD_REDIS_IMAGE` and `OVERSOLD_KAFKA_IMAGE` name other
//!    images.
//! 3. **native**: its programs are installed on this machine. `OVERSOLD_POSTGRES_BIN` and
//!    `OVERSOLD_REDIS_BIN` name their folders if they are not in the usual places. Kafka needs Java
//!    and a folder of jars, which `OVERSOLD_KAFKA_JARS` names.
//!
//! `OVERSOLD_BACKENDS=docker` or `=native` forces one source. The [`reaper`] stops and removes what
//! this process started, however this process ends.

mod docker;
mod kafka;
mod managed_server;
mod native;
mod nginx;
mod postgres;
mod prometheus;
pub mod reaper;
mod redis;
mod source_selection;
mod test_environment;

use std::{
    collections::BTreeMap,
    env,
    ffi::OsString,
    fmt,
    net::{Ipv4Addr, TcpListener},
    sync::Arc,
};

use serde::Serialize;
use tokio::sync::OnceCell;

pub use kafka::{Kafka, Prefix as KafkaPrefix, programs as kafka_programs};
pub use managed_server::Private;
pub use native::{on_path, on_system_path};
pub use nginx::{Nginx, NginxSettings};
pub use postgres::{Database, Durability, Postgres, program as postgres_program};
pub use prometheus::{Prometheus, PrometheusSettings};
pub use redis::{Prefix, Redis, Reply};
pub use test_environment::{Services, TestEnvironment};

/// The Postgres of this process: found or started once, and shared by all its tests. It runs with
/// [`Durability::Fast`].
///
/// # Errors
/// [`Missing`] if no source provides a Postgres. The first result is cached.
pub async fn postgres() -> Result<Arc<Postgres>, Missing> {
    static SHARED: OnceCell<Result<Arc<Postgres>, Missing>> = OnceCell::const_new();
    let found = SHARED.get_or_init(|| async { Postgres::find(Durability::Fast).await.map(Arc::new) });
    found.await.clone()
}

/// The Redis of this process: found or started once, and shared by all its tests.
///
/// # Errors
/// [`Missing`] if no source provides a Redis. The first result is cached.
pub async fn redis() -> Result<Arc<Redis>, Missing> {
    static SHARED: OnceCell<Result<Arc<Redis>, Missing>> = OnceCell::const_new();
    let found = SHARED.get_or_init(|| async { Redis::find().await.map(Arc::new) });
    found.await.clone()
}

/// The Kafka of this process: found or started once, and shared by all its tests.
///
/// # Errors
/// [`Missing`] if no source provides a Kafka. The first result is cached.
pub async fn kafka() -> Result<Arc<Kafka>, Missing> {
    static SHARED: OnceCell<Result<Arc<Kafka>, Missing>> = OnceCell::const_new();
    let found = SHARED.get_or_init(|| async { Kafka::find().await.map(Arc::new) });
    found.await.clone()
}

/// The origin of a service.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Source {
    /// A server that an environment variable names.
    External,
    /// A container, started by this process.
    Docker,
    /// A process, started by this process.
    Native,
}

impl Source {
    /// The name in settings and messages.
    pub const fn name(self) -> &'static str {
        match self {
            Self::External => "external",
            Self::Docker => "docker",
            Self::Native => "native",
        }
    }
}

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

/// The chosen server of a service and its source, as `oversold doctor` prints it.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// The service: `postgres`, `redis` or `kafka`.
    pub service: &'static str,
    /// The source.
    pub source: Source,
    /// Why no earlier source was chosen.
    pub reason: String,
    /// The version that the service reports.
    pub version: String,
    /// Host and port.
    pub address: String,
    /// Time from the start of the search to the first answer, in milliseconds.
    pub start_up_ms: u64,
    /// The effective settings that determine what a crash can lose, such as `fsync`.
    pub durability: BTreeMap<&'static str, String>,
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            service,
            source,
            reason,
            version,
            address,
            start_up_ms,
            ..
        } = self;
        write!(
            f,
            "{service}: {source}, {version} at {address}, ready in {start_up_ms} ms ({reason})"
        )
    }
}

/// A service that no source provides.
#[derive(Clone, Debug, thiserror::Error)]
pub enum Missing {
    /// A setting can't be understood.
    #[error("{variable} is `{held}`; expected {takes}")]
    BadSetting {
        /// The environment variable.
        variable: &'static str,
        /// Its value, without secrets.
        held: String,
        /// The values it takes.
        takes: &'static str,
    },
    /// No source provides the service.
    #[error("there is no {service}:{}\n{remedy}", lines(tried))]
    Nowhere {
        /// The service: `postgres`, `redis` or `kafka`.
        service: &'static str,
        /// The sources that were tried, each with the reason for its failure.
        tried: Vec<(Source, String)>,
        /// How to get one.
        remedy: String,
    },
}

fn lines(tried: &[(Source, String)]) -> String {
    tried
        .iter()
        .map(|(source, reason)| format!("\n  {source}: {reason}"))
        .collect()
}

/// The root cause of an error.
fn root(error: &dyn std::error::Error) -> &dyn std::error::Error {
    error.source().map_or(error, root)
}

/// The value of an environment variable that is set and not empty.
fn setting(variable: &str) -> Option<OsString> {
    env::var_os(variable).filter(|held| !held.is_empty())
}

/// A URL with its password masked and its parameters removed.
pub fn without_secrets(url: &str) -> String {
    let (scheme, rest) = url.split_once("://").unwrap_or(("", url));
    let rest = rest.split(['?', '#']).next().unwrap_or_default();
    let shown = match rest.rsplit_once('@') {
        None => rest.to_owned(),
        Some((user, place)) => match user.split_once(':') {
            None => rest.to_owned(),
            Some((name, _)) => format!("{name}:***@{place}"),
        },
    };
    if scheme.is_empty() {
        shown
    } else {
        format!("{scheme}://{shown}")
    }
}

/// A free port outside the ephemeral range, so that a server that restarts finds its port still
/// free.
///
/// # Errors
/// The error of the operating system, if no port was free.
pub fn free_port() -> std::io::Result<u16> {
    const TRIES: usize = 100;
    let mut last = std::io::ErrorKind::AddrInUse.into();
    for _ in 0..TRIES {
        match TcpListener::bind((Ipv4Addr::LOCALHOST, rand::random_range(15_000..32_000))) {
            Ok(listener) => return Ok(listener.local_addr()?.port()),
            Err(error) => last = error,
        }
    }
    Err(last)
}

/// Whether an error or a log says that another process has taken the port in the meantime: in the
/// words of Docker's proxy, of the kernel, of Docker Desktop, and of rootless engines.
fn is_port_taken(output: &str) -> bool {
    let output = output.to_lowercase();
    [
        "port is already allocated",
        "address already in use",
        "address in use",
        "failed to bind host port",
        "ports are not available",
    ]
    .iter()
    .any(|wording| output.contains(wording))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_port_that_was_taken_is_recognised_in_every_wording() {
        for output in [
            "driver failed programming external connectivity on endpoint oversold-redis-1 (b0c1): Bind for 0.0.0.0:17001 failed: port is already allocated",
            "failed to set up container networking: driver failed programming external connectivity on endpoint oversold-redis-1 (b0c1): failed to bind host port for 0.0.0.0:17001:172.17.0.2:6379/tcp: address already in use",
            "driver failed programming external connectivity on endpoint oversold-redis-1 (b0c1): Error starting userland proxy: listen tcp4 0.0.0.0:17001: bind: address already in use",
            "failed to bind host port 0.0.0.0:17001/tcp: Cannot assign the port",
            "Ports are not available: exposing port TCP 0.0.0.0:17001 -> 127.0.0.1:0: listen tcp 0.0.0.0:17001: bind: address already in use",
            "rootlessport listen tcp 0.0.0.0:17001: bind: address already in use",
            "error while calling PortManager.AddPort(): listen tcp 0.0.0.0:17001: bind: address already in use",
            "LOG:  could not bind IPv4 address \"127.0.0.1\": Address already in use",
            "# Warning: Could not create server TCP listening socket 127.0.0.1:17001: bind: Address already in use",
            "org.apache.kafka.common.KafkaException: Socket server failed to bind to 127.0.0.1:17001: Address already in use.",
            "java.net.BindException: Address already in use: bind",
        ] {
            assert!(is_port_taken(output), "{output}");
        }
        for output in [
            "No such image: redis:7-alpine",
            "Conflict. The container name \"/oversold-redis-1\" is already in use by container \"b0c1\"",
            "FATAL:  lock file \"postmaster.pid\" already exists",
            "failed to create task for container: OCI runtime create failed",
        ] {
            assert!(!is_port_taken(output), "{output}");
        }
    }

    #[test]
    fn a_shown_url_has_no_password_and_no_parameters() {
        for (url, shown) in [
            ("postgres://me:s3cret@db:5432/sale", "postgres://me:***@db:5432/sale"),
            (
                "postgres://me:s3:c@r/et@db/sale?password=s3cret",
                "postgres://me:***@db/sale",
            ),
            ("postgres://me@db/sale", "postgres://me@db/sale"),
            ("redis://:s3cret@cache:6379/0", "redis://:***@cache:6379/0"),
            ("me:s3cret@db", "me:***@db"),
            ("db:5432", "db:5432"),
        ] {
            assert_eq!(without_secrets(url), shown);
        }
    }
}
