//! Redis: an external server, or one of our own with the same settings from every source.

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
    search::{Candidate, Service, search},
};
use prefix::ExternalOwner;
pub use prefix::Prefix;
pub use resp::Reply;
use resp::{Connection, Place};

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

/// The settings of every server that is started here. Nothing is ever written to a disk: a server that starts again is empty.
fn settings(password: &str) -> [(&'static str, &str); 3] {
    [("save", ""), ("appendonly", "no"), ("requirepass", password)]
}

/// A Redis server.
pub struct Redis {
    server: Server,
    place: Place,
    url: String,
    report: Report,
}

enum Server {
    External(ExternalOwner),
    Managed(Arc<ManagedServer>),
}

impl Redis {
    /// Finds a server or starts one. What was started ends when this is dropped, or with this process.
    ///
    /// # Errors
    /// There is none; the error says what was tried and how to get one.
    pub async fn find() -> Result<Self, Missing> {
        Self::search(&[Source::External, Source::Docker, Source::Native]).await
    }

    /// Starts a server that nobody else uses, at an address that it keeps when it is stopped and started again. It is never an external one.
    ///
    /// # Errors
    /// None can be started; the error says what was tried and how to get one.
    pub async fn private() -> Result<Private<Self>, Missing> {
        let redis = Self::search(&[Source::Docker, Source::Native]).await?;
        let managed = match &redis.server {
            Server::Managed(managed) => Arc::clone(managed),
            Server::External(_) => unreachable!("nobody looked for an external one"),
        };
        Ok(Private::new(redis, managed))
    }

    async fn search(order: &[Source]) -> Result<Self, Missing> {
        search(&SERVICE, order, async |candidate| match candidate.source {
            Source::External => {
                let (owner, place) = external(&candidate.url).await?;
                let url = candidate.url.clone();
                Self::new(Server::External(owner), place, url, candidate).await
            }
            managed => {
                let password = Alphanumeric.sample_string(&mut rand::rng(), 32);
                let managed = start(managed, &password).await?;
                let (host, port) = managed.address();
                let place = Place::with_password(host, port, &password);
                let url = format!("redis://:{password}@{host}:{port}/0");
                Self::new(Server::Managed(Arc::new(managed)), place, url, candidate).await
            }
        })
        .await
    }

    async fn new(server: Server, place: Place, url: String, candidate: Candidate) -> anyhow::Result<Self> {
        let mut connection = place.connect().await?;
        let version = version(&mut connection).await?;
        let mut durability = BTreeMap::new();
        for setting in ["save", "appendonly"] {
            durability.insert(setting, configured(&mut connection, setting).await?);
        }
        let address = format!("{}:{}", place.host, place.port);
        Ok(Self {
            server,
            place,
            url,
            report: candidate.report(version, address, durability)?,
        })
    }

    /// Its URL, password included. [`without_secrets`](crate::backends::without_secrets) makes it fit to be shown.
    pub fn url(&self) -> &str {
        &self.url
    }

    /// Where it comes from, which one it is, and what it would lose in a crash.
    pub fn report(&self) -> &Report {
        &self.report
    }

    /// Runs a command on a connection of its own, such as `command(&["PTTL", key])`. A refusal is a [`Reply::Error`].
    ///
    /// # Errors
    /// The server does not answer.
    pub async fn command(&self, words: &[impl AsRef<str>]) -> anyhow::Result<Reply> {
        let asking = async { self.place.connect().await?.command(words).await };
        asking.await.with_context(|| {
            let name = words.first().map_or("nothing", AsRef::as_ref);
            format!("asking Redis at {} for {name}", self.report.address)
        })
    }
}

/// The server at a URL that the user gave.
async fn external(url: &str) -> anyhow::Result<(ExternalOwner, Place)> {
    let place = Place::parse(url).with_context(|| {
        format!("{URL_VARIABLE} is no URL of a Redis server, such as redis://user:password@host:6379/0")
    })?;
    let shown = super::without_secrets(url);
    let does_not_answer = |error: io::Error| anyhow::anyhow!("{shown} does not answer: {error}");
    let mut connection = place.connect().await.map_err(does_not_answer)?;
    connection.obeyed(&["PING"]).await.map_err(does_not_answer)?;
    // A command that writes, and has nothing to: a replica refuses it, and so does a server that lets this user only read.
    let deleting = connection.obeyed(&["DEL", "oversold:{0.0}:none"]).await;
    deleting.with_context(|| format!("{shown} can't be written to"))?;
    let owner = ExternalOwner::register(&place).await;
    let owner = owner.with_context(|| format!("{shown} does not tell whose keys are whose"))?;
    Ok((owner, place))
}

/// Starts a server, and waits until it answers.
async fn start(source: Source, password: &str) -> anyhow::Result<ManagedServer> {
    let probe: ReadinessProbe = {
        let password = password.to_owned();
        Box::new(move |host, port| Box::pin(probe(Place::with_password(&host, port, &password))))
    };
    match source {
        Source::Docker => ManagedServer::in_container(docker::start(password).await?, probe).await,
        _ => ManagedServer::as_process(native::prepare(password)?, probe).await,
    }
}

/// Asks a server that was just started whether it is ready.
async fn probe(place: Place) -> Result<(), NotReady> {
    let asked = async { place.connect().await?.obeyed(&["PING"]).await };
    asked.await.map(drop).map_err(|error| NotReady {
        may_become_ready: !matches!(
            error.kind(),
            io::ErrorKind::PermissionDenied | io::ErrorKind::InvalidData
        ),
        error: error.into(),
    })
}

/// The version, as the server tells it.
async fn version(connection: &mut Connection) -> io::Result<String> {
    let about = connection.obeyed(&["INFO", "server"]).await?;
    let version = match &about {
        Reply::Bulk(about) => about.lines().find_map(|line| line.strip_prefix("redis_version:")),
        _ => None,
    };
    let version = version.ok_or_else(|| io::Error::other("INFO does not tell the version"))?;
    Ok(version.to_owned())
}

/// A setting that is in force, where the server tells it.
async fn configured(connection: &mut Connection, setting: &str) -> io::Result<String> {
    Ok(match connection.command(&["CONFIG", "GET", setting]).await? {
        Reply::Array(told) => match told.as_slice() {
            [_, Reply::Bulk(value)] => value.clone(),
            _ => "not told".to_owned(),
        },
        _ => "not told".to_owned(),
    })
}
