//! A level: a table of strategies, each with its guarantee, its schema, and a constructor.

use std::{future::Future, time::Duration};

use anyhow::bail;
use async_trait::async_trait;
use futures_util::future::BoxFuture;
use sqlx::migrate::Migrator;
use uuid::Uuid;

use crate::{
    BuyerId, Database, Guarantee, Improvement, Improvements, Instrumentation, Order, Outcome, Promises, RedisUrl,
    ReserveError, SaleId, Steps, StrategyMetrics, Transaction, api,
};

/// A strategy: one way to reserve a ticket.
#[async_trait]
pub trait Reserve: Send + Sync {
    /// Reserves one ticket for the buyer of `order`. `steps` are the request's scheduling points.
    ///
    /// # Errors
    /// [`ReserveError::Refused`] if the state of the sale does not allow it,
    /// [`ReserveError::Indeterminate`] if the outcome is unknown, [`ReserveError::RateLimited`] if
    /// the request was over a limit and nothing was done.
    async fn reserve(&self, order: &Order, steps: &Steps) -> Result<Outcome, ReserveError>;

    /// Probes the services that the strategy needs besides Postgres, for the server's readiness
    /// probe.
    ///
    /// # Errors
    /// [`ReserveError::Indeterminate`] if a required service fails its probe.
    async fn ready(&self) -> Result<(), ReserveError> {
        Ok(())
    }

    /// Checks that some server can decide an order that this one accepts. Less than
    /// [`ready`](Self::ready): this server may still be waiting for its share of the work. Only a
    /// strategy that accepts orders first is asked, and then accepts none.
    ///
    /// # Errors
    /// [`ReserveError::Indeterminate`] if a service that decides orders fails its probe.
    async fn decidable(&self) -> Result<(), ReserveError> {
        Ok(())
    }

    /// Whether `id` was issued to an accepted order, which may have no row yet.
    fn accepted(&self, _id: Uuid) -> bool {
        false
    }

    /// The stored events of an accepted order after the one numbered `after`, in order (long
    /// polling).
    ///
    /// If there is none yet, it waits for one up to `timeout`, and then returns an empty list.
    /// `None` means that the strategy has no events, because its rows are final at once.
    ///
    /// # Errors
    /// [`ReserveError::Indeterminate`] if the database is unavailable.
    async fn events(&self, _id: Uuid, _after: i64, _timeout: Duration) -> Result<Option<Vec<Event>>, ReserveError> {
        Ok(None)
    }

    /// Cancels an order whose ticket is held. Returns whether the ticket is being released.
    ///
    /// # Errors
    /// [`ReserveError::Indeterminate`] if the database is unavailable.
    async fn cancel(&self, _id: Uuid) -> Result<bool, ReserveError> {
        Ok(false)
    }

    /// Names buyers as VIPs of a sale that exists. Only a strategy that supports
    /// [`Improvement::Priority`] is asked.
    ///
    /// # Errors
    /// [`ReserveError::Indeterminate`] if the database is unavailable.
    async fn name_vips(&self, _sale: SaleId, _buyers: &[BuyerId]) -> Result<(), ReserveError> {
        Ok(())
    }

    /// Graceful shutdown: background consumers finish their in-flight messages and stop. The server
    /// calls it once, after the last request.
    async fn close(&self) {}
}

/// A stored state change of an accepted order.
#[derive(Clone, Debug)]
pub struct Event {
    /// The event id, which increases. A client that reconnects sends it as `Last-Event-ID`.
    pub number: i64,
    /// The reservation after the change.
    pub reservation: api::Reservation,
}

/// A strategy that can be created from its dependencies.
pub trait Open: Reserve + Sized + 'static {
    /// Connects to the services that the strategy needs and starts its background tasks, if it has any.
    ///
    /// # Errors
    /// A setting is missing or wrong, or a service cannot be reached.
    fn open(context: StrategyContext) -> impl Future<Output = anyhow::Result<Self>> + Send;
}

/// A level of the workbook. Each level's library exports one.
pub struct Level {
    /// The short name: `lv1`.
    pub name: &'static str,
    /// The name of its package and its server binary: `lv1-race-condition`.
    pub package: &'static str,
    /// Its subject, in one line.
    pub summary: &'static str,
    /// Asks Kafka for the lag of the level's consumer group, in messages; each request to the broker takes this long at most.
    /// `None`: the level has no consumer group.
    pub lag: Option<fn(&KafkaConfig, Duration) -> anyhow::Result<u64>>,
    /// Its strategies; the first is the default of the level's server.
    pub strategies: &'static [Strategy],
    /// Its mutants: strategies with one planted mistake each. They grade the test suite.
    pub mutants: &'static [Strategy],
}

impl Level {
    /// Every strategy, mutants included.
    pub fn all(&self) -> impl Iterator<Item = &'static Strategy> {
        self.strategies.iter().chain(self.mutants)
    }

    /// Finds a strategy or a mutant by its name.
    pub fn strategy(&self, name: &str) -> Option<&'static Strategy> {
        self.all().find(|strategy| strategy.name == name)
    }

    /// The file in which a strategy of this level stands, relative to the root of the repository: its source, or a mutant's patch.
    pub fn source(&self, strategy: &Strategy) -> String {
        match strategy.name.strip_prefix(MUTANTS) {
            Some(name) => format!("levels/{}/mutants/{name}.patch", self.package),
            None => format!("levels/{}/src/{}.rs", self.package, strategy.name.replace('-', "_")),
        }
    }
}

/// The prefix of every mutant's name.
const MUTANTS: &str = "mutants/";

/// A strategy as its level lists it.
#[derive(Clone, Copy)]
pub struct Strategy {
    /// The name within the level: `read-then-write`, or `mutants/for-share`.
    pub name: &'static str,
    /// The idea, in one line. A mutant's: its mistake.
    pub summary: &'static str,
    /// The invariants that it keeps and breaks. Unless said otherwise: all are kept on any number of instances, but for the order of service.
    pub guarantee: Guarantee,
    /// The number of concurrent requests that each buyer sends, each with its own request key, to put the guarantee under stress. 2 unless said otherwise.
    pub clicks: u32,
    /// The tables that it runs on.
    pub schema: Schema,
    /// The services that it needs besides Postgres.
    pub needs: &'static [Service],
    /// The improvements that it supports; each has a setting that switches it on.
    pub improvements: &'static [Improvement],
    /// The scheduling points that a reservation can reach. Their metrics exist before the first buyer;
    /// those of a point that is not listed, from the first reservation that reaches it.
    pub steps: &'static [&'static str],
    /// Creates it.
    pub open: fn(StrategyContext) -> Opening,
}

impl Strategy {
    /// Describes the strategy `S`.
    pub const fn new<S: Open>(name: &'static str, summary: &'static str, schema: Schema) -> Self {
        Self::opened_by(name, summary, schema, open::<S>)
    }

    /// Describes a mutant.
    pub const fn mutant(mutant: Mutant, schema: Schema) -> Self {
        Self::opened_by(mutant.name, mutant.summary, schema, mutant.open)
    }

    const fn opened_by(
        name: &'static str,
        summary: &'static str,
        schema: Schema,
        open: fn(StrategyContext) -> Opening,
    ) -> Self {
        Self {
            name,
            summary,
            guarantee: Guarantee::uniform(Promises::ALL_KEPT),
            clicks: 2,
            schema,
            needs: &[],
            improvements: &[],
            steps: &[],
            open,
        }
    }

    /// The same strategy with another guarantee.
    pub const fn guarantee(self, guarantee: Guarantee) -> Self {
        Self { guarantee, ..self }
    }

    /// The same strategy with this many clicks for each buyer.
    pub const fn clicks(self, clicks: u32) -> Self {
        Self { clicks, ..self }
    }

    /// The same strategy on other tables.
    pub const fn schema(self, schema: Schema) -> Self {
        Self { schema, ..self }
    }

    /// The same strategy, which needs these services besides Postgres.
    pub const fn needs(self, needs: &'static [Service]) -> Self {
        Self { needs, ..self }
    }

    /// The same strategy, which supports these improvements.
    pub const fn improvements(self, improvements: &'static [Improvement]) -> Self {
        Self { improvements, ..self }
    }

    /// The same strategy, whose reservations can reach these scheduling points.
    pub const fn steps(self, steps: &'static [&'static str]) -> Self {
        Self { steps, ..self }
    }

    /// Whether this is a mutant.
    pub fn is_mutant(&self) -> bool {
        self.name.starts_with(MUTANTS)
    }
}

/// A mutant as the build script of its level generates it from the patch.
#[derive(Clone, Copy)]
pub struct Mutant {
    /// The name within the level: `mutants/for-share`.
    pub name: &'static str,
    /// The planted mistake, in one line: the first of the patch.
    pub summary: &'static str,
    /// Creates it.
    pub open: fn(StrategyContext) -> Opening,
}

impl Mutant {
    /// A mutant with this mistake in the strategy `S`.
    pub const fn of<S: Open>(name: &'static str, summary: &'static str) -> Self {
        Self {
            name,
            summary,
            open: open::<S>,
        }
    }

    /// A mutant whose patch does not apply to the source. It cannot be opened.
    pub const fn stale(name: &'static str, summary: &'static str) -> Self {
        Self {
            name,
            summary,
            open: |_| {
                Box::pin(async {
                    bail!(
                        "the patch of this mutant does not apply to the source: `oversold source` tells which hunk and how to refresh it"
                    )
                })
            },
        }
    }

    /// A mutant that was not compiled into the level. It cannot be opened.
    pub const fn left_out(name: &'static str, summary: &'static str) -> Self {
        Self {
            name,
            summary,
            open: |_| {
                Box::pin(async {
                    bail!("this server was built without the mutants, with OVERSOLD_WITHOUT_MUTANTS set")
                })
            },
        }
    }
}

/// Creates the strategy `S` behind its trait.
fn open<S: Open>(context: StrategyContext) -> Opening {
    Box::pin(async { Ok(Box::new(S::open(context).await?) as Box<dyn Reserve>) })
}

/// The strategy, once it is created.
pub type Opening = BoxFuture<'static, anyhow::Result<Box<dyn Reserve>>>;

/// A service that a strategy may need besides Postgres.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Service {
    /// Redis, configured with `REDIS_URL`.
    Redis,
    /// Kafka, configured with `KAFKA_BOOTSTRAP_SERVERS`.
    Kafka,
}

impl Service {
    /// The name in lists and messages.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Redis => "redis",
            Self::Kafka => "kafka",
        }
    }
}

/// The tables that a strategy runs on.
#[derive(Clone, Copy)]
pub struct Schema {
    /// The name in messages and in the names of databases: `bare`.
    pub name: &'static str,
    /// The migrations that create the tables and the views `sale_now` and `reservation_now`.
    pub migrations: &'static Migrator,
}

/// The dependencies of a strategy.
#[derive(Clone)]
pub struct StrategyContext {
    /// The connection pool of the migrated database.
    pub database: Database,
    /// The simulated work of every reservation inside its critical section: `WORK_MS`.
    pub work: Duration,
    /// The metrics that a strategy records, beside those of the server.
    pub metrics: StrategyMetrics,
    /// The Redis configuration. Present for every strategy that needs Redis.
    pub redis: Option<RedisConfig>,
    /// The Kafka configuration. Present for every strategy that needs Kafka.
    pub kafka: Option<KafkaConfig>,
    /// The improvements that are switched on. The strategy supports all of them.
    pub improvements: Improvements,
    /// Scheduling points for background work, such as consumers.
    pub instrumentation: Instrumentation,
}

/// The Kafka configuration of a server.
#[derive(Clone, Debug)]
pub struct KafkaConfig {
    /// A comma-separated list of `host:port`.
    pub bootstrap_servers: String,
    /// The prefix of every topic and consumer group.
    pub prefix: String,
    /// The number of consumers of this server. With 0 it only accepts orders, and other servers
    /// process them.
    pub consumers: u32,
    /// `session.timeout.ms`: a consumer without heartbeats for this long loses its partitions in a
    /// rebalance.
    pub session: Duration,
}

/// The Redis configuration of a server.
#[derive(Clone, Debug)]
pub struct RedisConfig {
    /// The URL. Its `Debug` and `Display` hide the password.
    pub url: RedisUrl,
    /// The prefix of every key and channel.
    pub prefix: String,
    /// The lease of a lock: it expires this long after its last renewal. `LOCK_LEASE_MS`.
    pub lease: Duration,
}

impl StrategyContext {
    /// Begins a transaction, see [`Database::begin`].
    ///
    /// # Errors
    /// [`sqlx::Error::PoolTimedOut`] if no connection is free in time, or the error of the
    /// connection.
    pub async fn begin(&self) -> sqlx::Result<Transaction> {
        self.database.begin().await
    }

    /// Sleeps for [`work`](Self::work). A strategy awaits it where a real one would call a payment
    /// or seating service: between its first read and its last write.
    pub async fn simulate_work(&self) {
        // Even a sleep of zero yields to the scheduler, which would change the interleaving.
        if !self.work.is_zero() {
            tokio::time::sleep(self.work).await;
        }
    }
}
