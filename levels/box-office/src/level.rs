//! What a level is: a table of strategies, each with its guarantee, its schema, and a way to open it.

use std::time::Duration;

use async_trait::async_trait;
use futures_util::future::BoxFuture;
use sqlx::{
    Connection, PgPool, Transaction,
    migrate::Migrator,
    postgres::{PgPoolOptions, PgTransaction},
};

use uuid::Uuid;

use crate::{Guarantee, Instrumentation, Order, Outcome, RedisUrl, ReserveError, Steps, StrategyMetrics, api};

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
    /// yet it waits for one, up to `timeout`, and then there are none. `None`: the strategy has no events, its rows are final at once.
    ///
    /// # Errors
    /// Nobody can say, as the database is away.
    async fn events(&self, _id: Uuid, _after: i64, _timeout: Duration) -> Result<Option<Vec<Event>>, ReserveError> {
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

/// A level of the workbook. Each level's library exports one.
pub struct Level {
    /// The short name: `lv1`.
    pub name: &'static str,
    /// The name of its package and of its server: `lv1-race-condition`.
    pub package: &'static str,
    /// What it shows, in one line.
    pub summary: &'static str,
    /// Asks Kafka, each question for so long at most, how many messages the group that decides has not passed. `None`: the level has no such group.
    pub lag: Option<fn(&KafkaConfig, Duration) -> anyhow::Result<u64>>,
    /// Its strategies; the first is what a server sells with unless told otherwise.
    pub strategies: &'static [Strategy],
}

impl Level {
    /// Finds a strategy by its name.
    pub fn strategy(&self, name: &str) -> Option<&'static Strategy> {
        self.strategies.iter().find(|strategy| strategy.name == name)
    }
}

/// A strategy as its level lists it.
pub struct Strategy {
    /// The name within the level: `read-then-write`.
    pub name: &'static str,
    /// The idea, in one line.
    pub summary: &'static str,
    /// Where the reader meets it.
    pub place: Place,
    /// What it keeps and what it breaks.
    pub guarantee: Guarantee,
    /// How many requests each buyer must send at once, each under its own key, for the guarantee to be tried.
    pub clicks: u32,
    /// The tables it runs on.
    pub schema: Schema,
    /// What it needs besides Postgres.
    pub needs: &'static [Service],
    /// The path of its source file, from the root of the repository.
    pub source: &'static str,
    /// Makes it ready to sell.
    pub open: fn(StrategyContext) -> Opening,
}

/// A strategy that is made ready to sell.
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

/// Where a reader meets a strategy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// On the reader's path.
    Trail,
    /// Beside it, for the curious.
    Shelf,
    /// Wrong on purpose: it grades the suite.
    Broken,
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
    pub metrics: StrategyMetrics,
    /// Where Redis is. There for every strategy that needs it.
    pub redis: Option<RedisConfig>,
    /// Where Kafka is. There for every strategy that needs it.
    pub kafka: Option<KafkaConfig>,
    /// Who watches what the strategy does beside the requests.
    pub instrumentation: Instrumentation,
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
