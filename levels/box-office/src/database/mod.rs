//! The connections to Postgres. Every answer has a deadline, and a connection that misses one is
//! closed.
//!
//! A connection can fall silent at any moment: a firewall, a proxy or a host between here and
//! Postgres forgets it and closes nothing. sqlx 0.9 waits for an answer without a limit, also where
//! it returns a connection to its pool, and offers no TCP keepalive. So the deadlines are here.

mod startup;

use std::{
    fmt, io,
    ops::{Deref, DerefMut},
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use futures_util::{
    FutureExt, StreamExt, TryFutureExt, TryStreamExt, future::BoxFuture, poll, stream, stream::BoxStream,
};
use sqlx::{
    Connection as _, Describe, Either, Execute, Executor, PgConnection, PgPool, Postgres, SqlStr,
    pool::PoolConnection,
    postgres::{PgConnectOptions, PgPoolOptions, PgQueryResult, PgRow, PgStatement, PgTypeInfo},
};
use tokio::{
    runtime::Handle,
    time::{error::Elapsed, timeout},
};

// ANCHOR: deadlines
/// How long a reservation waits for a pooled connection before it is answered
/// `Indeterminate::Overloaded`.
const ACQUIRE_TIMEOUT: Duration = Duration::from_secs(5);

/// Timeouts that Postgres enforces itself, so that no transaction has to be cancelled from outside.
/// The order matters: a wait for a lock times out before its statement does, and a lock holder may
/// be idle for as long as the longest `WORK_MS`.
pub(crate) const DATABASE_TIMEOUTS: [(&str, &str); 3] = [
    ("lock_timeout", "5s"),
    ("statement_timeout", "10s"),
    ("idle_in_transaction_session_timeout", "15s"),
];

/// How long a statement waits for its answer. Postgres ends it earlier, so after this time the
/// connection is silent. It is closed, and the outcome of the statement is unknown.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(12);
// ANCHOR_END: deadlines

pub(crate) use startup::{create, prepare};

/// A connection that was idle for this long is pinged before it is handed out. No restart of
/// Postgres is shorter.
const PING_AFTER_IDLE: Duration = Duration::from_millis(50);

/// How long the ping may take. A silent connection is replaced after that.
const PING_TIMEOUT: Duration = Duration::from_millis(500);

/// A connection pool whose connections do not wait for ever.
#[derive(Clone)]
pub struct Database {
    pool: PgPool,
    stale_plans: StalePlans,
}

/// When a prepared statement was last found to be stale: the tables or views had changed since it
/// was prepared. Statements on connections that are older may be stale as well.
#[derive(Clone, Default)]
struct StalePlans(Arc<Mutex<Option<Instant>>>);

impl StalePlans {
    fn found(&self) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some(Instant::now());
    }

    /// Whether a connection of this age may have one.
    fn may_affect(&self, age: Duration) -> bool {
        let found = *self.0.lock().unwrap_or_else(PoisonError::into_inner);
        found.is_some_and(|found| age > found.elapsed())
    }
}

impl Database {
    /// A pool of at most `size` connections, which are opened when they are needed.
    ///
    /// By default sqlx pings every connection on acquire (`test_before_acquire`), which costs each
    /// reservation a round trip, and the ping has no time limit. Here a connection is pinged only
    /// if it was idle.
    pub fn lazy(connect: PgConnectOptions, size: u32) -> Self {
        let stale_plans = StalePlans::default();
        let checked = stale_plans.clone();
        let pool = PgPoolOptions::new()
            .max_connections(size)
            .acquire_timeout(ACQUIRE_TIMEOUT)
            .test_before_acquire(false)
            .before_acquire(move |connection, about| {
                let may_be_stale = checked.may_affect(about.age);
                Box::pin(async move {
                    if !may_be_stale && about.idle_for >= PING_AFTER_IDLE {
                        let pinged = timeout(PING_TIMEOUT, connection.ping()).await;
                        pinged.unwrap_or_else(|_| Err(silent(PING_TIMEOUT)))?;
                    }
                    Ok(!may_be_stale)
                })
            })
            .connect_lazy_with(connect);
        Self { pool, stale_plans }
    }

    /// The pool, for its statistics and settings. Its own connections have no deadlines.
    pub fn pool(&self) -> &PgPool {
        &self.pool
    }

    async fn acquire(&self) -> sqlx::Result<Connection> {
        Ok(Connection {
            pooled: Some(self.pool.acquire().await?),
            stale_plans: self.stale_plans.clone(),
            in_transaction: false,
            may_have_unread: false,
            is_unusable: false,
        })
    }

    /// Begins a transaction. Cancel-safe, unlike [`PgPool::begin`]: in sqlx 0.9, a `begin` that is
    /// cancelled half-way leaves its transaction open, and the next user of that connection would
    /// run inside it.
    ///
    /// # Errors
    /// [`sqlx::Error::PoolTimedOut`] if no connection is free in time, or the error of the
    /// connection.
    pub async fn begin(&self) -> sqlx::Result<Transaction> {
        let mut connection = self.acquire().await?;
        // Before it is sent: from here on a drop rolls back.
        connection.in_transaction = true;
        connection.execute("begin").await?;
        Ok(Transaction { connection })
    }
}

impl From<PgPool> for Database {
    /// A pool with settings of its own, for tests.
    fn from(pool: PgPool) -> Self {
        Self {
            pool,
            stale_plans: StalePlans::default(),
        }
    }
}

/// A transaction. It is rolled back if it is dropped before [`commit`](Self::commit).
#[derive(Debug)]
pub struct Transaction {
    connection: Connection,
}

impl Transaction {
    /// Commits.
    ///
    /// # Errors
    /// The error of the connection. The outcome is unknown then: the commit may have been carried
    /// out.
    pub async fn commit(self) -> sqlx::Result<()> {
        self.end("commit").await
    }

    /// Rolls back, and returns once Postgres has answered.
    ///
    /// # Errors
    /// The error of the connection.
    pub async fn rollback(self) -> sqlx::Result<()> {
        self.end("rollback").await
    }

    async fn end(mut self, statement: &'static str) -> sqlx::Result<()> {
        self.connection.execute(statement).await?;
        self.connection.in_transaction = false;
        Ok(())
    }
}

impl Deref for Transaction {
    type Target = Connection;

    fn deref(&self) -> &Connection {
        &self.connection
    }
}

impl DerefMut for Transaction {
    fn deref_mut(&mut self) -> &mut Connection {
        &mut self.connection
    }
}

/// A pooled connection, which executes statements with a deadline for every answer. Dropped, it
/// returns to the pool or is closed.
pub struct Connection {
    /// `None` only while it is dropped.
    pooled: Option<PoolConnection<Postgres>>,
    stale_plans: StalePlans,
    in_transaction: bool,
    /// A statement was cancelled, or failed: a part of its answer may be unread.
    may_have_unread: bool,
    /// It did not answer, it broke, or it has a stale plan.
    is_unusable: bool,
}

impl Connection {
    /// The connection, to send a statement; [`answered`](Self::answered) takes the answer.
    fn ask(&mut self) -> &mut PgConnection {
        self.may_have_unread = true;
        self.pooled.as_mut().expect("it is there until the drop")
    }

    fn answered<T>(&mut self, answer: Result<sqlx::Result<T>, Elapsed>) -> sqlx::Result<T> {
        let answer = answer.unwrap_or_else(|_| Err(silent(ANSWER_TIMEOUT)));
        match &answer {
            Ok(_) => self.may_have_unread = false,
            Err(why) if is_stale_plan(why) => {
                self.stale_plans.found();
                self.is_unusable = true;
            }
            Err(sqlx::Error::Database(_)) => {}
            Err(_) => self.is_unusable = true,
        }
        answer
    }

    /// The whole answer to a statement.
    async fn all<'q>(
        &mut self,
        query: impl Execute<'q, Postgres> + 'q,
    ) -> sqlx::Result<Vec<Either<PgQueryResult, PgRow>>> {
        let answer = timeout(ANSWER_TIMEOUT, self.ask().fetch_many(query).try_collect()).await;
        self.answered(answer)
    }

    async fn at_most_one<'q>(&mut self, query: impl Execute<'q, Postgres> + 'q) -> sqlx::Result<Option<PgRow>> {
        let answer = timeout(ANSWER_TIMEOUT, self.ask().fetch_optional(query)).await;
        self.answered(answer)
    }

    async fn prepared(&mut self, sql: SqlStr, parameters: &[PgTypeInfo]) -> sqlx::Result<PgStatement> {
        let answer = timeout(ANSWER_TIMEOUT, self.ask().prepare_with(sql, parameters)).await;
        self.answered(answer)
    }

    async fn described(&mut self, sql: SqlStr) -> sqlx::Result<Describe<Postgres>> {
        let answer = timeout(ANSWER_TIMEOUT, self.ask().describe(sql)).await;
        self.answered(answer)
    }
}

impl fmt::Debug for Connection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Connection").finish_non_exhaustive()
    }
}

impl fmt::Debug for Database {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Database").finish_non_exhaustive()
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        let Some(mut pooled) = self.pooled.take() else { return };
        let runtime = Handle::try_current().ok().filter(|_| !self.is_unusable);
        let Some(runtime) = runtime else {
            // Closed at once, and its place in the pool is free.
            drop(pooled.detach());
            return;
        };
        let (in_transaction, may_have_unread) = (self.in_transaction, self.may_have_unread);
        runtime.spawn(async move {
            if in_transaction {
                let rolled_back = timeout(ANSWER_TIMEOUT, roll_back(&mut pooled, may_have_unread)).await;
                if !matches!(rolled_back, Ok(Ok(()))) {
                    drop(pooled.detach());
                    return;
                }
            }
            // It waits for the answer to a ping. If the future is dropped, the connection is closed.
            if timeout(ANSWER_TIMEOUT, pooled.return_to_pool()).await.is_err() {
                tracing::warn!("a connection to Postgres fell silent and was closed");
            }
        });
    }
}

/// Rolls back. The answer may be left to the ping that follows, which saves a round trip.
async fn roll_back(connection: &mut PgConnection, may_have_unread: bool) -> sqlx::Result<()> {
    let mut rollback = connection.execute("rollback");
    if may_have_unread {
        // It is sent only after the rest of the earlier answer.
        return rollback.await.map(drop);
    }
    match poll!(&mut rollback) {
        std::task::Poll::Ready(answer) => answer.map(drop),
        std::task::Poll::Pending => Ok(()),
    }
}

fn silent(after: Duration) -> sqlx::Error {
    let why = format!("no answer from Postgres within {after:?}");
    sqlx::Error::Io(io::Error::new(io::ErrorKind::TimedOut, why))
}

/// "cached plan must not change result type": the statement was prepared before the tables or views
/// changed. It fails whenever it is executed on this connection.
fn is_stale_plan(error: &sqlx::Error) -> bool {
    const FEATURE_NOT_SUPPORTED: &str = "0A000";

    let error = error.as_database_error();
    error.is_some_and(|error| error.code().as_deref() == Some(FEATURE_NOT_SUPPORTED))
}

impl<'c> Executor<'c> for &'c mut Connection {
    type Database = Postgres;

    fn fetch_many<'e, 'q: 'e, E>(self, query: E) -> BoxStream<'e, sqlx::Result<Either<PgQueryResult, PgRow>>>
    where
        'c: 'e,
        E: 'q + Execute<'q, Postgres>,
    {
        let all = async move { self.all(query).await };
        all.map_ok(items).try_flatten_stream().boxed()
    }

    fn fetch_optional<'e, 'q: 'e, E>(self, query: E) -> BoxFuture<'e, sqlx::Result<Option<PgRow>>>
    where
        'c: 'e,
        E: 'q + Execute<'q, Postgres>,
    {
        async move { self.at_most_one(query).await }.boxed()
    }

    fn prepare_with<'e>(self, sql: SqlStr, parameters: &'e [PgTypeInfo]) -> BoxFuture<'e, sqlx::Result<PgStatement>>
    where
        'c: 'e,
    {
        self.prepared(sql, parameters).boxed()
    }

    fn describe<'e>(self, sql: SqlStr) -> BoxFuture<'e, sqlx::Result<Describe<Postgres>>>
    where
        'c: 'e,
    {
        self.described(sql).boxed()
    }
}

impl<'c> Executor<'c> for &'c Database {
    type Database = Postgres;

    fn fetch_many<'e, 'q: 'e, E>(self, query: E) -> BoxStream<'e, sqlx::Result<Either<PgQueryResult, PgRow>>>
    where
        'c: 'e,
        E: 'q + Execute<'q, Postgres>,
    {
        let all = async move { self.acquire().await?.all(query).await };
        all.map_ok(items).try_flatten_stream().boxed()
    }

    fn fetch_optional<'e, 'q: 'e, E>(self, query: E) -> BoxFuture<'e, sqlx::Result<Option<PgRow>>>
    where
        'c: 'e,
        E: 'q + Execute<'q, Postgres>,
    {
        async move { self.acquire().await?.at_most_one(query).await }.boxed()
    }

    fn prepare_with<'e>(self, sql: SqlStr, parameters: &'e [PgTypeInfo]) -> BoxFuture<'e, sqlx::Result<PgStatement>>
    where
        'c: 'e,
    {
        async move { self.acquire().await?.prepared(sql, parameters).await }.boxed()
    }

    fn describe<'e>(self, sql: SqlStr) -> BoxFuture<'e, sqlx::Result<Describe<Postgres>>>
    where
        'c: 'e,
    {
        async move { self.acquire().await?.described(sql).await }.boxed()
    }
}

fn items<T>(items: Vec<T>) -> stream::Iter<impl Iterator<Item = sqlx::Result<T>>> {
    stream::iter(items.into_iter().map(Ok))
}
