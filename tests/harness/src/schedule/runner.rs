//! The schedule runner: a strategy on its own database, for one schedule after another.

use std::{
    collections::HashSet,
    sync::{
        Arc, Mutex,
        atomic::{AtomicI64, Ordering},
    },
    time::Duration,
};

use box_office::{
    Improvements, Instrumentation, Invariant, Outcome, Promise, Refusal, Reserve, ReserveError, SaleId, Strategy,
    StrategyContext, StrategyMetrics, points, trace::now_monotonic_us,
};
use sqlx::{PgPool, postgres::PgConnectOptions};
use tokio::sync::Notify;

use super::{Schedule, blocked::Holders, state::Shared};
use crate::{
    backends::TestEnvironment,
    history::{Answer, Refused},
};

/// The lease of locks in Redis: longer than any schedule, so that a lease ends only when a test
/// ends it.
const LEASE: Duration = Duration::from_secs(600);

/// A strategy on its own database, on which schedules run one after another.
pub struct ScheduleRunner {
    pub(super) strategy: &'static Strategy,
    pub(super) reserve: Arc<dyn Reserve>,
    /// The schedule's own connection, which requests never use.
    pub(super) observer: PgPool,
    pub(super) holders: Holders,
    pub(super) sales: AtomicI64,
    pub(super) environment: TestEnvironment,
}

impl ScheduleRunner {
    /// Creates the strategy on a new database.
    ///
    /// # Errors
    /// Fails if a backend is missing or the strategy can't be created.
    pub async fn of(strategy: &'static Strategy) -> anyhow::Result<Self> {
        Self::with_settings(strategy, &[]).await
    }

    /// The same, with these settings of Postgres on every connection of the strategy.
    ///
    /// # Errors
    /// As [`of`](Self::of).
    pub async fn with_settings(strategy: &'static Strategy, settings: &[(&str, &str)]) -> anyhow::Result<Self> {
        /// Size of the strategy's pool: more concurrent requests make no readable schedule.
        const CONNECTIONS: u32 = 8;

        let environment = TestEnvironment::shared(strategy).await?;
        let database = environment.database();
        let holders = Holders::default();
        let options: PgConnectOptions = database.url().parse()?;
        let options = options.options(settings.iter().copied());
        let context = StrategyContext {
            database: holders.pool(options, CONNECTIONS).await?.into(),
            work: Duration::ZERO,
            metrics: StrategyMetrics::default(),
            redis: environment.redis(LEASE)?,
            kafka: None,
            improvements: Improvements::default(),
            instrumentation: Instrumentation::default(),
        };
        Ok(Self {
            strategy,
            reserve: (strategy.open)(context).await?.into(),
            observer: database.pool(1).await?,
            holders,
            sales: AtomicI64::new(0),
            environment,
        })
    }

    /// The backends of the strategy.
    pub fn environment(&self) -> &TestEnvironment {
        &self.environment
    }

    /// Opens a new sale with this number of tickets, and returns its schedule without any request.
    ///
    /// # Errors
    /// Fails if the sale can't be written.
    pub async fn sale(&self, capacity: u32) -> anyhow::Result<Schedule<'_>> {
        let sale = 1 + self.sales.fetch_add(1, Ordering::Relaxed);
        open_sale(&self.observer, sale, capacity).await?;
        Ok(Schedule {
            runner: self,
            sale,
            capacity,
            requests: vec![],
            shared: Arc::new(Shared {
                state: Mutex::default(),
                changed: Notify::new(),
            }),
            started_us: now_monotonic_us(),
            blocked: HashSet::new(),
        })
    }

    /// Runs the schedule that the book shows for a strategy: both requests read before either
    /// writes.
    ///
    /// It has two buyers and one ticket; for a strategy that fails at a buyer's second click, two
    /// clicks and two tickets. The first request runs to [`points::DECIDED_TO_SELL`], the second
    /// towards it, then the first to its answer, then the second.
    ///
    /// # Errors
    /// As [`Schedule::run_towards`] and [`Schedule::run_to_completion`].
    pub async fn both_read_before_either_writes(&self) -> anyhow::Result<Schedule<'_>> {
        let promised = self.strategy.guarantee.single_instance;
        let by_clicks = promised.about(Invariant::NoDuplicate) == Promise::Breaks
            && promised.about(Invariant::NoOversell) == Promise::Keeps;
        let mut schedule = self.sale(if by_clicks { 2 } else { 1 }).await?;
        let first = schedule.buyer("Ann");
        let second = if by_clicks {
            schedule.click(first)
        } else {
            schedule.buyer("Bob")
        };
        schedule.run_towards(first, points::DECIDED_TO_SELL).await?;
        schedule.run_towards(second, points::DECIDED_TO_SELL).await?;
        schedule.run_to_completion(first).await?;
        schedule.run_to_completion(second).await?;
        Ok(schedule)
    }
}

/// Inserts a sale, as the server's administration route does.
pub(super) async fn open_sale(pool: &PgPool, sale: SaleId, capacity: u32) -> sqlx::Result<()> {
    sqlx::query("insert into sale (id, name, capacity, stock) values ($1, 'the last tickets', $2, $2)")
        .bind(sale)
        .bind(i64::from(capacity))
        .execute(pool)
        .await
        .map(drop)
}

pub(super) fn answer_of(result: Result<Outcome, ReserveError>) -> Answer {
    match result {
        Ok(Outcome::Confirmed(reservation)) => Answer::Confirmed {
            reservation: reservation.id,
        },
        Ok(Outcome::Accepted(reservation)) => Answer::Accepted {
            reservation: reservation.id,
            ending: None,
        },
        Err(ReserveError::Refused(refusal)) => Answer::Refused(match refusal {
            Refusal::SoldOut => Refused::SoldOut,
            Refusal::AlreadyReserved { earlier } => Refused::AlreadyReserved { earlier: earlier.id },
            Refusal::KeyOfAnotherBuyer => Refused::KeyOfAnotherBuyer,
            Refusal::UnknownSale => Refused::UnknownSale,
            Refusal::Expired => Refused::Expired,
            Refusal::NotVip => Refused::NotVip,
        }),
        Err(ReserveError::Indeterminate(_)) => Answer::Indeterminate,
        Err(ReserveError::RateLimited(_)) => Answer::Refused(Refused::RateLimited),
    }
}
