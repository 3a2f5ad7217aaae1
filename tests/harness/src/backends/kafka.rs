//! Kafka: an external cluster, or one broker started here with the same settings from every source.

mod docker;
mod native;
mod prefix;
mod wire_protocol;

use std::{collections::BTreeMap, io, sync::Arc, time::Duration};

use anyhow::Context;

use super::{
    Missing, Private, Report, Source,
    managed_server::{ManagedServer, NotReady, ReadinessProbe},
    source_selection::{Candidate, Service, search},
};
pub use native::programs;
pub use prefix::Prefix;
use prefix::Run;
use wire_protocol::Connection;

const SERVICE: Service = Service {
    name: "kafka",
    url_variable: URL_VARIABLE,
    // No package provides it: infra/setup.sh downloads it.
    packages: &[],
};
const URL_VARIABLE: &str = "KAFKA_BOOTSTRAP_SERVERS";

/// The cluster id of every broker started here, in containers too.
const CLUSTER_ID: &str = "5L6g3nShT-eMCtK--X86sw";

/// Time limit until a new topic accepts writes.
const CREATE_TOPIC_TIMEOUT: Duration = Duration::from_secs(10);

/// The settings of every broker started here.
fn settings() -> [(&'static str, &'static str); 11] {
    [
        // An automatically created topic would have one partition.
        ("auto.create.topics.enable", "false"),
        // Small internal topics: with the default of 50 partitions, the first consumer group would
        // wait for them.
        ("offsets.topic.num.partitions", "4"),
        ("offsets.topic.replication.factor", "1"),
        ("transaction.state.log.num.partitions", "4"),
        ("transaction.state.log.replication.factor", "1"),
        ("transaction.state.log.min.isr", "1"),
        // The first consumer of a group does not wait for more of them.
        ("group.initial.rebalance.delay.ms", "0"),
        // Tests use session timeouts below the default minimum of 6 s.
        ("group.min.session.timeout.ms", "500"),
        // A killed broker rejoins once its previous session has timed out, by default after 9 s.
        ("broker.session.timeout.ms", "2000"),
        ("broker.heartbeat.interval.ms", "200"),
        // The log cleaner of compacted topics allocates 128 MiB by default.
        ("log.cleaner.dedupe.buffer.size", "2097152"),
    ]
}

/// A Kafka cluster; one started here has one broker.
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
    /// Finds a broker or starts one. A started broker stops when this is dropped or this process
    /// ends.
    ///
    /// # Errors
    /// [`Missing`] if no source provides a broker.
    pub async fn find() -> Result<Self, Missing> {
        Self::search(&[Source::External, Source::Docker, Source::Native]).await
    }

    /// Starts a broker for one test, from Docker or native programs. It keeps its address when it
    /// is stopped and started again.
    ///
    /// # Errors
    /// [`Missing`] if no broker can be started.
    pub async fn private() -> Result<Private<Self>, Missing> {
        let kafka = Self::search(&[Source::Docker, Source::Native]).await?;
        let managed = match &kafka.server {
            Server::Managed(managed) => Arc::clone(managed),
            Server::External(_) => unreachable!("external servers were not searched"),
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
        // By default a broker does not wait for its disk: acknowledged messages are in the
        // operating system's page cache.
        let report = candidate.report(version, servers.clone(), BTreeMap::new())?;
        Ok(Self {
            server,
            servers,
            report,
        })
    }

    /// The bootstrap servers: `host:port`, or several separated by commas.
    pub fn bootstrap_servers(&self) -> &str {
        &self.servers
    }

    /// The cluster's source, version and address.
    pub fn report(&self) -> &Report {
        &self.report
    }

    /// The topics whose names start with `prefix`, each with its number of partitions.
    ///
    /// # Errors
    /// Fails if no broker answers.
    pub async fn topics(&self, prefix: &str) -> anyhow::Result<BTreeMap<String, usize>> {
        let request = async { Connection::open(&self.servers).await?.metadata().await };
        let metadata = request
            .await
            .with_context(|| format!("querying Kafka at {}", self.servers))?;
        let topics = metadata.topics.into_iter();
        Ok(topics
            .filter(|topic| topic.name.starts_with(prefix))
            .map(|topic| (topic.name, topic.partitions))
            .collect())
    }

    /// Creates a topic, and returns once it accepts writes.
    ///
    /// # Errors
    /// Fails if the topic exists or no broker answers.
    pub async fn create_topic(&self, name: &str, partitions: i32) -> anyhow::Result<()> {
        let making = async {
            let mut connection = Connection::open(&self.servers).await?;
            connection.create_topic(name, partitions).await
        };
        let made = tokio::time::timeout(CREATE_TOPIC_TIMEOUT, making).await;
        made.map_err(|_| anyhow::anyhow!("it has no leader after {CREATE_TOPIC_TIMEOUT:?}"))
            .and_then(|made| Ok(made?))
            .with_context(|| format!("creating {name} in Kafka at {}", self.servers))
    }
}

/// Connects to the cluster that the user named.
async fn external(servers: &str) -> anyhow::Result<Run> {
    let named = |server: &str| {
        let (host, port) = server.trim().rsplit_once(':')?;
        let is_host = !host.is_empty() && !host.contains(['/', '@']);
        (is_host && port.parse::<u16>().is_ok()).then_some(())
    };
    // The message does not repeat the value, which may contain a password.
    servers
        .split(',')
        .try_for_each(|server| named(server).ok_or(()))
        .ok()
        .with_context(|| format!("{URL_VARIABLE} is no list of brokers, such as host:9092,other-host:9092"))?;
    let connecting = async {
        let mut connection = Connection::open(servers).await?;
        connection.version().await?;
        Run::begin(&mut connection).await
    };
    // A broker that requires TLS or a login closes the connection.
    connecting.await.map_err(|error: io::Error| {
        anyhow::anyhow!("{servers} does not answer to a client without TLS and login: {error}")
    })
}

/// Starts a broker, and waits until it is ready.
async fn start(source: Source) -> anyhow::Result<ManagedServer> {
    let probe: ReadinessProbe = Box::new(|host, port| Box::pin(probe(format!("{host}:{port}"))));
    match source {
        Source::Docker => ManagedServer::in_container(docker::start().await?, probe).await,
        _ => ManagedServer::as_process(tokio::task::spawn_blocking(native::prepare).await??, probe).await,
    }
}

/// The readiness probe: the broker has joined its cluster and leads its partitions.
async fn probe(server: String) -> Result<(), NotReady> {
    let request = async { Connection::open(&server).await?.metadata().await };
    let error = match request.await {
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
