//! Whether a server can do what a sale needs: write to the database, and use the other services of
//! its strategy.
//!
//! A service that answers is not enough: a replica answers, and so does a server that is out of
//! memory or whose topic was deleted.

use std::{
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use anyhow::anyhow;
use sqlx::{ConnectOptions, Connection as _, PgConnection, PgExecutor, postgres::PgConnectOptions};
use tokio::{
    sync::Mutex as AsyncMutex,
    time::{Instant, sleep, timeout},
};

use crate::{CauseLog, Indeterminate, Reserve, ReserveError, causes, http::App};

/// The interval of the probes of a server that answers before an order is decided.
const PROBE_INTERVAL: Duration = Duration::from_secs(1);

/// The same while it is not ready: what comes back is used again soon.
const RETRY_INTERVAL: Duration = Duration::from_millis(100);

/// Changes no row, and yet Postgres checks what a reservation needs: that the tables are there, that
/// this role may write to them, and that the transaction is not read-only, as on a replica.
const WRITE_PROBE: &str = "with stock as (update sale set stock = stock where false)
     insert into reservation (id)
     select id
       from reservation
      where false";

/// Needs space on the disk of the database, as the probe above does not: it extends a file. The
/// table is gone with its transaction.
const SPACE_PROBE: &str = "create temporary table oversold_probe on commit drop as select 1 as number";

/// The interval of the probes for space, as long as they succeed: each is a durable commit.
const SPACE_INTERVAL: Duration = Duration::from_secs(5);

/// Checks that the database accepts the writes of a reservation.
///
/// # Errors
/// As those of a reservation.
async fn probe_database(database: impl PgExecutor<'_>) -> Result<(), ReserveError> {
    sqlx::query(WRITE_PROBE).execute(database).await?;
    Ok(())
}

/// Checks the same on a new connection, which is closed again: for one who must not wait for a pool.
///
/// # Errors
/// As those of a reservation. It has no timeout.
pub async fn probe_new_connection(options: &PgConnectOptions) -> Result<(), ReserveError> {
    let mut connection = options.connect().await?;
    probe_database(&mut connection).await?;
    Ok(connection.close().await?)
}

/// The readiness of one server.
pub(crate) struct Readiness {
    /// The server answers before an order is decided.
    accepts_first: bool,
    /// Why the last probe failed. Only a server that accepts first keeps it.
    not_ready: Mutex<Option<String>>,
    /// The last probe of the strategy: when it began, and why it failed.
    strategy: AsyncMutex<Option<(Instant, Result<(), String>)>>,
    /// When the last probe for space succeeded.
    had_space: AsyncMutex<Option<Instant>>,
    log: CauseLog,
}

impl Readiness {
    /// `accepts_first`: the server answers before an order is decided.
    pub(crate) fn new(accepts_first: bool) -> Self {
        Self {
            accepts_first,
            not_ready: Mutex::default(),
            strategy: AsyncMutex::default(),
            had_space: AsyncMutex::default(),
            log: CauseLog::default(),
        }
    }

    /// Whether an order may be accepted: the last probe found that it can be decided. A server
    /// whose answers are final always tries.
    ///
    /// # Errors
    /// [`Indeterminate::BackendAway`] with the reason.
    pub(crate) fn check(&self) -> Result<(), Indeterminate> {
        match &*self.not_ready() {
            None => Ok(()),
            Some(why) => Err(Indeterminate::BackendAway(anyhow!("this server is not ready: {why}"))),
        }
    }

    fn not_ready(&self) -> MutexGuard<'_, Option<String>> {
        self.not_ready.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Keeps the result of a probe for [`check`](Self::check), and logs it.
    fn record(&self, why: Option<String>) {
        if let Some(why) = &why {
            self.log(why);
        }
        if self.accepts_first {
            let before = std::mem::replace(&mut *self.not_ready(), why.clone());
            if before.is_some() && why.is_none() {
                tracing::info!("ready");
            }
        }
    }

    fn log(&self, why: &str) {
        self.log.warn_text("not ready", why);
    }

    /// Checks that the database has space on its disk, on a connection of its own: no reservation may
    /// have to wait for a commit that hangs.
    async fn probe_space(&self, options: &PgConnectOptions) -> Result<(), ReserveError> {
        /// The first characters of the SQLSTATE codes for insufficient resources and system errors.
        const NO_SPACE: [&str; 2] = ["53", "58"];

        let mut had_space = self.had_space.lock().await;
        if had_space.is_some_and(|at| at.elapsed() < SPACE_INTERVAL) {
            return Ok(());
        }
        // Another reason to fail is for the other probe to find, or a privilege that no sale needs.
        let Ok(mut connection) = options.connect().await else {
            return Ok(());
        };
        let written = sqlx::query(SPACE_PROBE).execute(&mut connection).await;
        if let Err(sqlx::Error::Database(why)) = &written
            && let Some(code) = why.code()
            && NO_SPACE.iter().any(|class| code.starts_with(class))
        {
            written?;
        }
        *had_space = Some(Instant::now());
        Ok(())
    }

    /// Probes the services of the strategy. Requests that come while a probe runs share the next
    /// one: a thousand buyers who ask at once are two probes.
    async fn probe_strategy(&self, strategy: &dyn Reserve) -> Result<(), ReserveError> {
        let asked = Instant::now();
        let mut last = self.strategy.lock().await;
        let result = match &*last {
            Some((began, result)) if *began >= asked => result.clone(),
            _ => {
                let began = Instant::now();
                let result = strategy.ready().await.map_err(|why| causes(&why));
                *last = Some((began, result.clone()));
                result
            }
        };
        result.map_err(|why| Indeterminate::BackendAway(anyhow!(why)).into())
    }
}

/// The readiness probe: the database through the pool of the reservations, as a server without a
/// free connection is not ready, and the services of the strategy.
///
/// # Errors
/// [`ReserveError::Indeterminate`]; [`Indeterminate::Overloaded`] if it takes longer than
/// [`Limits::probe_timeout`](crate::Limits::probe_timeout).
pub(crate) async fn probe(app: &App) -> Result<(), ReserveError> {
    let mut undecidable = true;
    // Safe to cancel: one statement, no transaction.
    let probe = async {
        probe_database(&app.database).await?;
        app.readiness
            .probe_space(&app.database.pool().connect_options())
            .await?;
        let ready = app.readiness.probe_strategy(&*app.strategy).await;
        if ready.is_err() {
            undecidable = app.strategy.decidable().await.is_err();
        }
        ready
    };
    let result = timeout(app.limits.probe_timeout, probe)
        .await
        .unwrap_or(Err(Indeterminate::Overloaded.into()));
    match &result {
        Ok(()) => app.readiness.record(None),
        // A pool that is busy does not keep an accepted order from being decided.
        Err(ReserveError::Indeterminate(Indeterminate::Overloaded)) => {}
        Err(why) if undecidable => app.readiness.record(Some(causes(why))),
        Err(why) => app.readiness.log(&causes(why)),
    }
    result
}

/// Probes what decides orders again and again, after a [first](probe_decidable) probe. For a server
/// that answers before an order is decided: it accepts none that cannot be decided.
pub(crate) async fn watch(app: Arc<App>, mut connection: Option<PgConnection>) {
    loop {
        let ready = app.readiness.check().is_ok();
        sleep(if ready { PROBE_INTERVAL } else { RETRY_INTERVAL }).await;
        probe_decidable(&app, &mut connection).await;
    }
}

/// Probes whether an order can be decided, on a connection that no load keeps busy, and records the
/// result.
pub(crate) async fn probe_decidable(app: &App, connection: &mut Option<PgConnection>) {
    let options = app.database.pool().connect_options();
    let probe = async {
        probe_connection(connection, &options).await?;
        app.readiness.probe_space(&options).await?;
        app.strategy.decidable().await
    };
    let limit = app.limits.probe_timeout;
    app.readiness.record(match timeout(limit, probe).await {
        Ok(Ok(())) => None,
        Ok(Err(why)) => Some(causes(&why)),
        Err(_) => Some(format!("no answer to the probe within {limit:?}")),
    });
}

/// Probes the database on one connection, which is kept for the next probe if this one succeeds. A
/// connection whose probe fails or is cancelled is closed.
async fn probe_connection(
    connection: &mut Option<PgConnection>,
    options: &PgConnectOptions,
) -> Result<(), ReserveError> {
    let mut open = match connection.take() {
        Some(open) => open,
        None => options.connect().await?,
    };
    probe_database(&mut open).await?;
    *connection = Some(open);
    Ok(())
}
