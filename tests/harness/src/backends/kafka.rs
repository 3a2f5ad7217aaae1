//! Kafka: an external cluster, or a broker of our own with the same settings from every source.

mod docker;
mod native;
mod prefix;
mod wire_protocol;

use std::{collections::BTreeMap, io, sync::Arc, time::Duration};

use anyhow::Context;

use super::{
    Missing, Private, Report, Source,
    managed_server::{ManagedServer, NotReady, ReadinessProbe},
    search::{Candidate, Service, search},
};
pub use native::programs;
pub use prefix::Prefix;
use prefix::Run;
use wire_protocol::Connection;

const SERVICE: Service = Service {
    name: "kafka",
    url_variable: URL_VARIABLE,
    // What it takes is more than a package: infra/setup.sh fetches it.
    packages: &[],
};
const URL_VARIABLE: &str = "KAFKA_BOOTSTRAP_SERVERS";

/// Every cluster needs one. That of the containers, too.
const CLUSTER_ID: &str = "5L6g3nShT-eMCtK--X86sw";

/// How long it may take until a new topic can be written to.
const CREATE_TOPIC_TIMEOUT: Duration = Duration::from_secs(10);

/// The settings of every broker that is started here.
fn settings() -> [(&'static str, &'static str); 11] {
    [
        // A topic that a client makes by asking for it would have one partition.
        ("auto.create.topics.enable", "false"),
        // What Kafka keeps for itself, small: with the default of 50 partitions, the first group would wait for them.
        ("offsets.topic.num.partitions", "4"),
        ("offsets.topic.replication.factor", "1"),
        ("transaction.state.log.num.partitions", "4"),
        ("transaction.state.log.replication.factor", "1"),
        ("transaction.state.log.min.isr", "1"),
        // The first consumer of a group does not wait for more of them.
        ("group.initial.rebalance.delay.ms", "0"),
        // Tests let a consumer be missed sooner than the 6 s that are the least by default.
        ("group.min.session.timeout.ms", "500"),
        // A broker that was killed takes part again once its last life has timed out, after 9 s by default.
        ("broker.session.timeout.ms", "2000"),
        ("broker.heartbeat.interval.ms", "200"),
        // The cleaner of compacted topics takes 128 MiB by default.
        ("log.cleaner.dedupe.buffer.size", "2097152"),
    ]
}

/// A Kafka cluster; of our own, it has one broker.
pub struct Kafka {
    server: Server,
    servers: String,
    report: Report,
}

enum Server {
    External(Run),
    Managed(Arc<ManagedServer>),
}

impl Kafka {
    /// Finds a broker or starts one. What was started ends when this is dropped, or with this process.
    ///
    /// # Errors
    /// There is none; the error says what was tried and how to get one.
    pub async fn find() -> Result<Self, Missing> {
        Self::search(&[Source::External, Source::Docker, Source::Native]).await
    }

    /// Starts a broker that nobody else uses, at an address that it keeps when it is stopped and started again. It is never an external one.
    ///
    /// # Errors
    /// None can be started; the error says what was tried and how to get one.
    pub async fn private() -> Result<Private<Self>, Missing> {
        let kafka = Self::search(&[Source::Docker, Source::Native]).await?;
        let managed = match &kafka.server {
            Server::Managed(managed) => Arc::clone(managed),
            Server::External(_) => unreachable!("nobody looked for an external one"),
        };
        Ok(Private::new(kafka, managed))
    }

    async fn search(order: &[Source]) -> Result<Self, Missing> {
        search(&SERVICE, order, async |candidate| match candidate.source {
            Source::External => {
                let servers = candidate.url.clone();
                Self::new(Server::External(external(&servers).await?), servers, candidate).await
            }
            managed => {
                let managed = start(managed).await?;
                let (host, port) = managed.address();
                let servers = format!("{host}:{port}");
                Self::new(Server::Managed(Arc::new(managed)), servers, candidate).await
            }
        })
        .await
    }

    async fn new(server: Server, servers: String, candidate: Candidate) -> anyhow::Result<Self> {
        let version = Connection::open(&servers).await?.version().await?;
        // No broker waits for its disk unless told to: what it acknowledged is with the operating system.
        let report = candidate.report(version, servers.clone(), BTreeMap::new())?;
        Ok(Self {
            server,
            servers,
            report,
        })
    }

    /// Where its clients begin: `host:port`, or several with commas between them.
    pub fn bootstrap_servers(&self) -> &str {
        &self.servers
    }

    /// Where it comes from, and which one it is.
    pub fn report(&self) -> &Report {
        &self.report
    }

    /// The topics that begin with `prefix`, each with the number of its partitions.
    ///
    /// # Errors
    /// No broker answers.
    pub async fn topics(&self, prefix: &str) -> anyhow::Result<BTreeMap<String, usize>> {
        let asking = async { Connection::open(&self.servers).await?.metadata().await };
        let metadata = asking
            .await
            .with_context(|| format!("asking Kafka at {}", self.servers))?;
        let topics = metadata.topics.into_iter();
        Ok(topics
            .filter(|topic| topic.name.starts_with(prefix))
            .map(|topic| (topic.name, topic.partitions))
            .collect())
    }

    /// Makes a topic, and returns once it can be written to.
    ///
    /// # Errors
    /// It is there already, or no broker answers.
    pub async fn create_topic(&self, name: &str, partitions: i32) -> anyhow::Result<()> {
        let making = async {
            let mut connection = Connection::open(&self.servers).await?;
            connection.create_topic(name, partitions).await
        };
        let made = tokio::time::timeout(CREATE_TOPIC_TIMEOUT, making).await;
        made.map_err(|_| anyhow::anyhow!("it has no leader after {CREATE_TOPIC_TIMEOUT:?}"))
            .and_then(|made| Ok(made?))
            .with_context(|| format!("making {name} in Kafka at {}", self.servers))
    }
}

/// The cluster that the user named.
async fn external(servers: &str) -> anyhow::Result<Run> {
    let named = |server: &str| {
        let (host, port) = server.trim().rsplit_once(':')?;
        let is_host = !host.is_empty() && !host.contains(['/', '@']);
        (is_host && port.parse::<u16>().is_ok()).then_some(())
    };
    // Not repeated, as somebody may have put a password there.
    servers
        .split(',')
        .try_for_each(|server| named(server).ok_or(()))
        .ok()
        .with_context(|| format!("{URL_VARIABLE} is no list of brokers, such as host:9092,other-host:9092"))?;
    let asking = async {
        let mut connection = Connection::open(servers).await?;
        connection.version().await?;
        Run::begin(&mut connection).await
    };
    // One that wants TLS or a login hangs up.
    asking.await.map_err(|error: io::Error| {
        anyhow::anyhow!("{servers} does not answer to a client without TLS and login: {error}")
    })
}

/// Starts a broker, and waits until it answers.
async fn start(source: Source) -> anyhow::Result<ManagedServer> {
    let probe: ReadinessProbe = Box::new(|host, port| Box::pin(probe(format!("{host}:{port}"))));
    match source {
        Source::Docker => ManagedServer::in_container(docker::start().await?, probe).await,
        _ => ManagedServer::as_process(tokio::task::spawn_blocking(native::prepare).await??, probe).await,
    }
}

/// Asks a broker that was just started whether it is ready: it takes part in its cluster, and what it has can be written to.
async fn probe(server: String) -> Result<(), NotReady> {
    let asked = async { Connection::open(&server).await?.metadata().await };
    let error = match asked.await {
        Ok(metadata) if metadata.brokers > 0 && metadata.topics.iter().all(|topic| topic.led) => return Ok(()),
        Ok(_) => anyhow::anyhow!("it does not lead its partitions yet"),
        Err(error) if error.kind() == io::ErrorKind::InvalidData => {
            return Err(NotReady {
                error: error.into(),
                may_become_ready: false,
            });
        }
        Err(error) => error.into(),
    };
    Err(NotReady {
        error,
        may_become_ready: true,
    })
}
