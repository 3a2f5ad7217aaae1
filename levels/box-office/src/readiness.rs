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
use sqlx::{ConnectOptions, PgConnection, PgExecutor, postgres::PgConnectOptions};
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
    /// `accepts_first`: the server answers before an order is decided. It is not ready until its
    /// first probe.
    pub(crate) fn new(accepts_first: bool) -> Self {
        Self {
            accepts_first,
            not_ready: Mutex::new(accepts_first.then(|| "its first probe has not ended".to_owned())),
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
            self.log.warn_text("not ready", why);
        }
        if self.accepts_first {
            let before = std::mem::replace(&mut *self.not_ready(), why.clone());
            if before.is_some() && why.is_none() {
                tracing::info!("ready");
            }
        }
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
    // Safe to cancel: one statement, no transaction.
    let probe = async {
        probe_database(&app.database).await?;
        app.readiness.probe_space(&app.database.connect_options()).await?;
        app.readiness.probe_strategy(&*app.strategy).await
    };
    let result = timeout(app.limits.probe_timeout, probe)
        .await
        .unwrap_or(Err(Indeterminate::Overloaded.into()));
    // A pool that is busy does not keep an accepted order from being decided.
    if !matches!(result, Err(ReserveError::Indeterminate(Indeterminate::Overloaded))) {
        app.readiness.record(result.as_ref().err().map(|why| causes(why)));
    }
    result
}

/// Probes the backends again and again, on a connection of its own that no load keeps busy. For a
/// server that answers before an order is decided: it accepts none that cannot be decided.
pub(crate) async fn watch(app: Arc<App>) {
    let options = app.database.connect_options();
    let mut connection = None;
    loop {
        let probe = async {
            probe_connection(&mut connection, &options).await?;
            app.readiness.probe_space(&options).await?;
            app.readiness.probe_strategy(&*app.strategy).await
        };
        let limit = app.limits.probe_timeout;
        let why = match timeout(limit, probe).await {
            Ok(Ok(())) => None,
            Ok(Err(why)) => Some(causes(&why)),
            Err(_) => Some(format!("no answer to the probe within {limit:?}")),
        };
        let pause = if why.is_none() { PROBE_INTERVAL } else { RETRY_INTERVAL };
        app.readiness.record(why);
        sleep(pause).await;
    }
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
