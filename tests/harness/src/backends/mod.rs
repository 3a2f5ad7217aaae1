//! Backends: where the services of a test or a rush come from.
//!
//! Each service is looked for on its own, in this order, and one line on stderr says what was chosen and why:
//!
//! 1. **external**: its URL is set (`DATABASE_URL`, `REDIS_URL`; for Kafka `KAFKA_BOOTSTRAP_SERVERS`).
//! 2. **docker**: an engine answers, and the image is there or can be pulled. `OVERSOLD_POSTGRES_IMAGE`, `OVERSOLD_REDIS_IMAGE` and
//!    `OVERSOLD_KAFKA_IMAGE` name other images.
//! 3. **native**: its programs are on this machine. `OVERSOLD_POSTGRES_BIN` and `OVERSOLD_REDIS_BIN` name their folders where they can't be
//!    found. Kafka is Java and a folder of jars, which `OVERSOLD_KAFKA_JARS` names.
//!
//! `OVERSOLD_BACKENDS=docker` or `=native` takes that source and no other. What was started here is stopped and removed by the [`reaper`] when
//! this process ends, in whatever way it ends.

mod docker;
mod environment;
mod kafka;
mod managed_server;
mod native;
mod postgres;
pub mod reaper;
mod redis;
mod search;

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

pub use environment::{Services, TestEnvironment};
pub use kafka::{Kafka, Prefix as KafkaPrefix, programs as kafka_programs};
pub use managed_server::Private;
pub use native::on_path;
pub use postgres::{Database, Durability, Postgres, program as postgres_program};
pub use redis::{Prefix, Redis, Reply};

/// The Postgres of this process: found or started once, and shared by all its tests. It trades durability for speed.
///
/// # Errors
/// There is none; the error says what was tried and how to get one. It is remembered.
pub async fn postgres() -> Result<Arc<Postgres>, Missing> {
    static SHARED: OnceCell<Result<Arc<Postgres>, Missing>> = OnceCell::const_new();
    let found = SHARED.get_or_init(|| async { Postgres::find(Durability::Fast).await.map(Arc::new) });
    found.await.clone()
}

/// The Redis of this process: found or started once, and shared by all its tests.
///
/// # Errors
/// There is none; the error says what was tried and how to get one. It is remembered.
pub async fn redis() -> Result<Arc<Redis>, Missing> {
    static SHARED: OnceCell<Result<Arc<Redis>, Missing>> = OnceCell::const_new();
    let found = SHARED.get_or_init(|| async { Redis::find().await.map(Arc::new) });
    found.await.clone()
}

/// The Kafka of this process: found or started once, and shared by all its tests.
///
/// # Errors
/// There is none; the error says what was tried and how to get one. It is remembered.
pub async fn kafka() -> Result<Arc<Kafka>, Missing> {
    static SHARED: OnceCell<Result<Arc<Kafka>, Missing>> = OnceCell::const_new();
    let found = SHARED.get_or_init(|| async { Kafka::find().await.map(Arc::new) });
    found.await.clone()
}

/// Where a service comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Source {
    /// Somebody runs it, and told its URL.
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

/// What a service is and where it came from, as `oversold doctor` prints it.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// The service: `postgres`, `redis` or `kafka`.
    pub service: &'static str,
    /// Where it comes from.
    pub source: Source,
    /// Why not from a source that comes earlier.
    pub reason: String,
    /// The version, as the service tells it.
    pub version: String,
    /// Host and port.
    pub address: String,
    /// From the start of the search to the first answer.
    pub start_up_ms: u64,
    /// The settings in force that decide what a crash can lose, such as `fsync`.
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

/// Why there is no service.
#[derive(Clone, Debug, thiserror::Error)]
pub enum Missing {
    /// A setting can't be understood.
    #[error("{variable} is `{held}`; it takes {takes}")]
    BadSetting {
        /// The environment variable.
        variable: &'static str,
        /// What it holds, without secrets.
        held: String,
        /// What it takes.
        takes: &'static str,
    },
    /// No source has it.
    #[error("there is no {service}:{}\n{remedy}", lines(tried))]
    Nowhere {
        /// The service: `postgres`, `redis` or `kafka`.
        service: &'static str,
        /// The sources that were tried, and what was wrong with each.
        tried: Vec<(Source, String)>,
        /// What to do about it.
        remedy: String,
    },
}

fn lines(tried: &[(Source, String)]) -> String {
    tried
        .iter()
        .map(|(source, reason)| format!("\n  {source}: {reason}"))
        .collect()
}

/// The error at the root of another, which says what is wrong without repeating where.
fn root(error: &dyn std::error::Error) -> &dyn std::error::Error {
    error.source().map_or(error, root)
}

/// A setting that is there and not empty.
fn setting(variable: &str) -> Option<OsString> {
    env::var_os(variable).filter(|held| !held.is_empty())
}

/// A URL without what is secret in it: its password and its parameters.
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

/// A port on which nobody listens, outside the range from which systems take the ports of outgoing connections: a server
/// that stops and starts again finds it free.
fn free_port() -> std::io::Result<u16> {
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

#[cfg(test)]
mod tests {
    use super::*;

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
