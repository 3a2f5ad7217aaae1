//! What a level is: a table of strategies, each with its guarantee, its schema, and a way to open it.

use std::{future::Future, time::Duration};

use anyhow::bail;
use async_trait::async_trait;
use futures_util::future::BoxFuture;
use sqlx::{
    Connection, PgPool, Transaction,
    migrate::Migrator,
    postgres::{PgPoolOptions, PgTransaction},
};

use uuid::Uuid;

use crate::{
    Guarantee, Instrumentation, Order, Outcome, Promises, RedisUrl, ReserveError, Steps, StrategyMetrics, api,
};

/// One way to sell a ticket.
#[async_trait]
pub trait Reserve: Send + Sync {
    /// Sells one ticket to the buyer of `order`, or says why not. `steps` marks the places where a test can hold it.
    ///
    /// # Errors
    /// A [`Refusal`](crate::Refusal) where "no" is the truth, [`Indeterminate`](crate::Undecided) where nobody can say.
    async fn reserve(&self, order: &Order, steps: &Steps) -> Result<Outcome, ReserveError>;

    /// Whether the services that it needs besides Postgres answer. Part of the server's readiness.
    ///
    /// # Errors
    /// One does not.
    async fn ready(&self) -> Result<(), ReserveError> {
        Ok(())
    }

    /// Whether an order was accepted under this id, although there may be no row of it yet.
    fn accepted(&self, _id: Uuid) -> bool {
        false
    }

    /// What became of an accepted order, from stored state: every event after the one numbered `after`, in their order. Where there is none
    /// yet it waits for one, up to `patience`, and then there are none. `None`: the strategy has no events, its rows are final at once.
    ///
    /// # Errors
    /// Nobody can say, as the database is away.
    async fn events(&self, _id: Uuid, _after: i64, _patience: Duration) -> Result<Option<Vec<Event>>, ReserveError> {
        Ok(None)
    }

    /// Finishes what it has in hand beside the requests, and stops. The server calls it once, at its end, after the last request.
    async fn close(&self) {}
}

/// Something that became of an accepted order, as it is stored.
#[derive(Clone, Debug)]
pub struct Event {
    /// Its number: later events have greater ones. What a client that comes back sends as `Last-Event-ID`.
    pub number: i64,
    /// The reservation after it.
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
    /// The name of its package and of its server: `lv1-race-condition`.
    pub package: &'static str,
    /// What it shows, in one line.
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
    /// Creates it.
    pub open: fn(StrategyContext) -> Opening,
}

impl Strategy {
    /// Describes the strategy `S`.
    pub const fn new<S: Open>(name: &'static str, summary: &'static str, schema: Schema) -> Self {
        Self {
            name,
            summary,
            guarantee: Guarantee::uniform(Promises::ALL_KEPT),
            clicks: 2,
            schema,
            needs: &[],
            open: |context| Box::pin(async { Ok(Box::new(S::open(context).await?) as _) }),
        }
    }

    /// Describes a mutant.
    pub const fn mutant(mutant: Mutant, schema: Schema) -> Self {
        Self {
            name: mutant.name,
            summary: mutant.summary,
            guarantee: Guarantee::uniform(Promises::ALL_KEPT),
            clicks: 2,
            schema,
            needs: &[],
            open: mutant.open,
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
            open: |context| Box::pin(async { Ok(Box::new(S::open(context).await?) as _) }),
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
}

/// The strategy, once it is created.
pub type Opening = BoxFuture<'static, anyhow::Result<Box<dyn Reserve>>>;

/// A service besides Postgres, which every strategy needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Service {
    /// Redis; a server finds it by `REDIS_URL`.
    Redis,
    /// Kafka; a server finds it by `KAFKA_BOOTSTRAP_SERVERS`.
    Kafka,
}

impl Service {
    /// As it is written in lists and messages.
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
    /// Names it in messages and in the names of databases: `bare`.
    pub name: &'static str,
    /// Makes the tables, and the views `sale_now` and `reservation_now`.
    pub migrations: &'static Migrator,
}

/// What a strategy is opened with.
#[derive(Clone)]
pub struct StrategyContext {
    /// Connections to the level's own database, which is migrated already.
    pub database: PgPool,
    /// Business time that every reservation spends inside its critical section: `WORK_MS`.
    pub work: Duration,
    /// What a strategy counts beside what the server counts of every one.
    pub counts: StrategyMetrics,
    /// Where Redis is. There for every strategy that needs it.
    pub redis: Option<RedisConfig>,
    /// Where Kafka is. There for every strategy that needs it.
    pub kafka: Option<KafkaConfig>,
    /// Who watches what the strategy does beside the requests.
    pub watch: Instrumentation,
}

/// Where Kafka is, and how this server takes part.
#[derive(Clone, Debug)]
pub struct KafkaConfig {
    /// `host:port`, or several with commas between them.
    pub bootstrap_servers: String,
    /// What the name of every topic and group begins with.
    pub prefix: String,
    /// How many consumers this server runs; 0: it accepts orders, and others decide them.
    pub consumers: u32,
    /// How long the group waits for a consumer that is not heard of before it gives its partitions to others.
    pub session: Duration,
}

/// Where Redis is, and how a lock in it is to be taken.
#[derive(Clone, Debug)]
pub struct RedisConfig {
    /// Its URL. The password in it shows nowhere.
    pub url: RedisUrl,
    /// What stands before every key and channel.
    pub prefix: String,
    /// How long a lock outlives its holder: `LOCK_LEASE_MS`.
    pub lease: Duration,
}

impl StrategyContext {
    /// How a server opens its connections to the database, so many at most.
    ///
    /// sqlx would ask every connection whether it is still there before it hands it out: a round trip for each reservation. One that was in
    /// use a moment ago is taken at its word; one that has rested for as long as a restart of Postgres takes at least is asked.
    pub fn pool_options(size: u32) -> PgPoolOptions {
        const RESTED: Duration = Duration::from_millis(50);

        PgPoolOptions::new()
            .max_connections(size)
            .test_before_acquire(false)
            .before_acquire(|connection, about| {
                Box::pin(async move {
                    if about.idle_for >= RESTED {
                        connection.ping().await?;
                    }
                    Ok(true)
                })
            })
    }

    /// Begins a transaction. Whoever awaits this may be cancelled.
    ///
    /// A `begin` of the pool that is cancelled half-way leaves its transaction open on a connection that believes there is none, and who got
    /// that connection next would sell inside somebody else's transaction. So the statement is sent by a task of its own: it runs to its
    /// end whoever has left, and a transaction that nobody takes is rolled back.
    ///
    /// # Errors
    /// No connection is free in time, or the database does not answer.
    pub async fn begin(&self) -> sqlx::Result<PgTransaction<'static>> {
        let connection = self.database.acquire().await?;
        let begun = tokio::spawn(Transaction::begin(connection, None)).await;
        begun.unwrap_or(Err(sqlx::Error::WorkerCrashed))
    }

    /// Spends the business time. A strategy awaits it where a real one would call the payment or the seat map: between
    /// its first look and its last write.
    pub async fn simulate_work(&self) {
        // Even a sleep of nothing would give up the processor, and so change who comes first.
        if !self.work.is_zero() {
            tokio::time::sleep(self.work).await;
        }
    }
}
