//! Blocked backends as Postgres reports them, and the request that each backend serves.

use std::{
    collections::{HashMap, HashSet},
    sync::{Arc, Mutex, PoisonError},
};

use sqlx::{
    PgConnection, PgPool,
    postgres::{PgConnectOptions, PgPoolOptions},
};

/// The request that holds each connection. A connection returns to the pool only after its
/// transaction has ended.
#[derive(Clone, Default)]
pub(super) struct Holders(Arc<Mutex<HashMap<i32, Holder>>>);

/// A request of a schedule.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Holder {
    pub(super) schedule: i64,
    pub(super) request: usize,
}

tokio::task_local! {
    /// The request that the task serves.
    pub(super) static CURRENT_REQUEST: Holder;
}

impl Holders {
    /// Creates a pool that records which request holds which connection.
    pub(super) async fn pool(&self, options: PgConnectOptions, size: u32) -> sqlx::Result<PgPool> {
        let (connected, taken, returned) = (self.clone(), self.clone(), self.clone());
        PgPoolOptions::new()
            .max_connections(size)
            .after_connect(move |connection, _| {
                let holders = connected.clone();
                Box::pin(async move { holders.take(connection).await })
            })
            .before_acquire(move |connection, _| {
                let holders = taken.clone();
                Box::pin(async move { holders.take(connection).await.map(|()| true) })
            })
            .after_release(move |connection, _| {
                let holders = returned.clone();
                Box::pin(async move {
                    let pid = pid_of(connection).await?;
                    holders.all(|holders| holders.remove(&pid));
                    Ok(true)
                })
            })
            .connect_with(options)
            .await
    }

    async fn take(&self, connection: &mut PgConnection) -> sqlx::Result<()> {
        // The pool's first connection belongs to no request.
        if let Ok(holder) = CURRENT_REQUEST.try_with(|holder| *holder) {
            let pid = pid_of(connection).await?;
            self.all(|holders| holders.insert(pid, holder));
        }
        Ok(())
    }

    /// The request that holds this backend's connection.
    pub(super) fn of(&self, pid: i32) -> Option<Holder> {
        self.all(|holders| holders.get(&pid).copied())
    }

    /// Whether a request holds a connection.
    pub(super) fn holds(&self, holder: Holder) -> bool {
        self.all(|holders| holders.values().any(|&other| other == holder))
    }

    fn all<T>(&self, look: impl FnOnce(&mut HashMap<i32, Holder>) -> T) -> T {
        look(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

async fn pid_of(connection: &mut PgConnection) -> sqlx::Result<i32> {
    sqlx::query_scalar("select pg_backend_pid()")
        .fetch_one(connection)
        .await
}

/// The blocked backends of one database, at one moment.
#[derive(Debug)]
pub(super) struct Blocked {
    /// For each blocked backend, the backends that it waits for.
    waits_for: HashMap<i32, Vec<i32>>,
    /// The backends that run no statement.
    idle: HashSet<i32>,
}

impl Blocked {
    /// Queries which backends of the database wait for which (`pg_blocking_pids`).
    pub(super) async fn query(observer: &PgPool) -> sqlx::Result<Self> {
        let backends: Vec<(i32, bool, Vec<i32>)> = sqlx::query_as(
            "select pid,
                    state like 'idle%',
                    case when wait_event_type = 'Lock' then pg_blocking_pids(pid) else '{}' end
               from pg_stat_activity
              where datname = current_database()
                and state is not null",
        )
        .fetch_all(observer)
        .await?;
        let idle = backends.iter().filter(|(_, idle, _)| *idle).map(|(pid, ..)| *pid);
        Ok(Self {
            idle: idle.collect(),
            waits_for: backends
                .into_iter()
                .filter(|(.., blockers)| !blockers.is_empty())
                .map(|(pid, _, blockers)| (pid, blockers))
                .collect(),
        })
    }

    /// Whether the backend runs no statement: what it has locked stays locked until its client goes
    /// on.
    pub(super) fn is_idle(&self, pid: i32) -> bool {
        self.idle.contains(&pid)
    }

    pub(super) fn pids(&self) -> impl Iterator<Item = i32> {
        self.waits_for.keys().copied()
    }

    /// The root of the chain of backends that `pid` waits for: one that is not blocked itself.
    /// `None` for a deadlock, which Postgres is about to break.
    pub(super) fn root(&self, pid: i32) -> Option<i32> {
        let mut seen = HashSet::new();
        let mut next = pid;
        while let Some(blockers) = self.waits_for.get(&next) {
            if !seen.insert(next) {
                return None;
            }
            next = *blockers.first()?;
        }
        Some(next)
    }
}
