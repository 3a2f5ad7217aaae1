//! Redis: an external server, or one started here with the same settings from every source.

mod docker;
mod native;
mod prefix;
mod resp;

use std::{collections::BTreeMap, io, sync::Arc};

use anyhow::Context;
use rand::distr::{Alphanumeric, SampleString};

use super::{
    Missing, Private, Report, Source,
    managed_server::{ManagedServer, NotReady, ReadinessProbe},
    source_selection::{Candidate, Service, search},
};
use prefix::ExternalOwner;
pub use prefix::Prefix;
pub use resp::Reply;
use resp::{Connection, Endpoint};

const SERVICE: Service = Service {
    name: "redis",
    url_variable: URL_VARIABLE,
    packages: &[
        ("apt-get", "apt-get install --yes redis-server"),
        ("dnf", "dnf install redis"),
        ("pacman", "pacman -S redis"),
        ("brew", "brew install redis"),
    ],
};
const URL_VARIABLE: &str = "REDIS_URL";

/// The settings of every server started here. It never writes to a disk, so it is empty after a
/// restart.
fn settings(password: &str) -> [(&'static str, &str); 3] {
    [("save", ""), ("appendonly", "no"), ("requirepass", password)]
}

/// A Redis server.
pub struct Redis {
    server: Server,
    endpoint: Endpoint,
    url: String,
    report: Report,
}

enum Server {
    External(ExternalOwner),
    Managed(Arc<ManagedServer>),
}

impl Redis {
    /// Finds a server or starts one. A started server stops when this is dropped or this process
    /// ends.
    ///
    /// # Errors
    /// [`Missing`] if no source provides a server.
    pub async fn find() -> Result<Self, Missing> {
        Self::search(&[Source::External, Source::Docker, Source::Native]).await
    }

    /// Starts a server for one test, from Docker or native programs. It keeps its address when it
    /// is stopped and started again.
    ///
    /// # Errors
    /// [`Missing`] if no server can be started.
    pub async fn private() -> Result<Private<Self>, Missing> {
        let redis = Self::search(&[Source::Docker, Source::Native]).await?;
        let managed = match &redis.server {
            Server::Managed(managed) => Arc::clone(managed),
            Server::External(_) => unreachable!("external servers were not searched"),
        };
        Ok(Private::new(redis, managed))
    }

    async fn search(order: &[Source]) -> Result<Self, Missing> {
        search(&SERVICE, order, async |candidate| match candidate.source {
            Source::External => {
                let (owner, endpoint) = external(&candidate.url).await?;
                let url = candidate.url.clone();
                Self::new(Server::External(owner), endpoint, url, candidate).await
            }
            managed => {
                let password = Alphanumeric.sample_string(&mut rand::rng(), 32);
                let managed = start(managed, &password).await?;
                let (host, port) = managed.address();
                let endpoint = Endpoint::with_password(host, port, &password);
                let url = format!("redis://:{password}@{host}:{port}/0");
                Self::new(Server::Managed(Arc::new(managed)), endpoint, url, candidate).await
            }
        })
        .await
    }

    async fn new(server: Server, endpoint: Endpoint, url: String, candidate: Candidate) -> anyhow::Result<Self> {
        let mut connection = endpoint.connect().await?;
        let version = version(&mut connection).await?;
        let mut durability = BTreeMap::new();
        for setting in ["save", "appendonly"] {
            durability.insert(setting, configured(&mut connection, setting).await?);
        }
        let address = format!("{}:{}", endpoint.host, endpoint.port);
        Ok(Self {
            server,
            endpoint,
            url,
            report: candidate.report(version, address, durability)?,
        })
    }

    /// Its URL, including the password. [`without_secrets`](crate::backends::without_secrets) masks
    /// it for messages.
    pub fn url(&self) -> &str {
        &self.url
    }

    /// The server's source, version, address and durability settings.
    pub fn report(&self) -> &Report {
        &self.report
    }

    /// Runs a command on a new connection, such as `command(&["PTTL", key])`. An error reply is a
    /// [`Reply::Error`].
    ///
    /// # Errors
    /// Fails if the server does not answer.
    pub async fn command(&self, words: &[impl AsRef<str>]) -> anyhow::Result<Reply> {
        let request = async { self.endpoint.connect().await?.command(words).await };
        request.await.with_context(|| {
            let name = words.first().map_or("nothing", AsRef::as_ref);
            format!("querying Redis at {} for {name}", self.report.address)
        })
    }
}

/// Connects to the server at the user's URL, and checks that it accepts writes and lists its
/// clients.
async fn external(url: &str) -> anyhow::Result<(ExternalOwner, Endpoint)> {
    let endpoint = Endpoint::parse(url).with_context(|| {
        format!("{URL_VARIABLE} is no URL of a Redis server, such as redis://user:password@host:6379/0")
    })?;
    let shown = super::without_secrets(url);
    let does_not_answer = |error: io::Error| anyhow::anyhow!("{shown} does not answer: {error}");
    let mut connection = endpoint.connect().await.map_err(does_not_answer)?;
    connection.obeyed(&["PING"]).await.map_err(does_not_answer)?;
    // A write command without effect: a replica rejects it, and so does a server on which this user
    // may only read.
    let deleting = connection.obeyed(&["DEL", "oversold:{0.0}:none"]).await;
    deleting.with_context(|| format!("{shown} can't be written to"))?;
    let owner = ExternalOwner::register(&endpoint).await;
    let owner = owner.with_context(|| format!("{shown} does not list its clients"))?;
    Ok((owner, endpoint))
}

/// Starts a server, and waits until it is ready.
async fn start(source: Source, password: &str) -> anyhow::Result<ManagedServer> {
    let probe: ReadinessProbe = {
        let password = password.to_owned();
        Box::new(move |host, port| Box::pin(probe(Endpoint::with_password(&host, port, &password))))
    };
    match source {
        Source::Docker => ManagedServer::in_container(docker::start(password).await?, probe).await,
        _ => ManagedServer::as_process(native::prepare(password)?, probe).await,
    }
}

/// The readiness probe: sends PING.
async fn probe(endpoint: Endpoint) -> Result<(), NotReady> {
    let request = async { endpoint.connect().await?.obeyed(&["PING"]).await };
    request.await.map(drop).map_err(|error| NotReady {
        may_become_ready: !matches!(
            error.kind(),
            io::ErrorKind::PermissionDenied | io::ErrorKind::InvalidData
        ),
        error: error.into(),
    })
}

/// The version that the server reports.
async fn version(connection: &mut Connection) -> io::Result<String> {
    let about = connection.obeyed(&["INFO", "server"]).await?;
    let version = match &about {
        Reply::Bulk(about) => about.lines().find_map(|line| line.strip_prefix("redis_version:")),
        _ => None,
    };
    let version = version.ok_or_else(|| io::Error::other("INFO does not contain the version"))?;
    Ok(version.to_owned())
}

/// The effective value of a setting, or `not reported` if the server does not report it.
async fn configured(connection: &mut Connection, setting: &str) -> io::Result<String> {
    Ok(match connection.command(&["CONFIG", "GET", setting]).await? {
        Reply::Array(reply) => match reply.as_slice() {
            [_, Reply::Bulk(value)] => value.clone(),
            _ => "not reported".to_owned(),
        },
        _ => "not reported".to_owned(),
    })
}
