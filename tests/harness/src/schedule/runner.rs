//! The runner: a strategy on a database of its own, which opens one sale after another.

use std::{
    collections::HashSet,
    sync::{
        Arc, Mutex,
        atomic::{AtomicI64, Ordering},
    },
    time::Duration,
};

use box_office::{
    Instrumentation, Invariant, Outcome, Promise, Refusal, Reserve, ReserveError, SaleId, Strategy, StrategyContext,
    StrategyMetrics, trace::now_monotonic_us,
};
use sqlx::PgPool;
use tokio::sync::Notify;

use super::{blocked::Holders, state::Shared, stepping::Schedule};
use crate::{
    backends::TestEnvironment,
    history::{Answer, Refused},
};

/// How long a lock in Redis outlives its holder: longer than any schedule. Here a lease ends when a test ends it, not by itself.
const LEASE: Duration = Duration::from_secs(600);

/// A strategy on a database of its own, on which one schedule after another can be run.
pub struct ScheduleRunner {
    pub(super) strategy: &'static Strategy,
    pub(super) reserve: Arc<dyn Reserve>,
    /// The schedule's own connection. Requests never use it.
    pub(super) observer: PgPool,
    pub(super) holders: Holders,
    pub(super) sales: AtomicI64,
    pub(super) environment: TestEnvironment,
}

impl ScheduleRunner {
    /// Opens a strategy on a fresh database.
    ///
    /// # Errors
    /// No Postgres, or the strategy can't be opened.
    pub async fn of(strategy: &'static Strategy) -> anyhow::Result<Self> {
        /// More requests than this at once make no schedule that a person can read.
        const CONNECTIONS: u32 = 8;

        let environment = TestEnvironment::shared(strategy).await?;
        let database = environment.database();
        let holders = Holders::default();
        let context = StrategyContext {
            database: holders.pool(database.url().parse()?, CONNECTIONS).await?,
            work: Duration::ZERO,
            counts: StrategyMetrics::default(),
            redis: environment.redis(LEASE)?,
            kafka: None,
            watch: Instrumentation::default(),
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

    /// What the strategy stands on.
    pub fn environment(&self) -> &TestEnvironment {
        &self.environment
    }

    /// Opens a new sale with so many tickets, for a schedule that nobody is in yet.
    ///
    /// # Errors
    /// The database can't be written.
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

    /// The forced run that the book shows for a strategy: both look before either writes.
    ///
    /// Two buyers and one ticket; or, for a strategy that fails at one buyer's second click, two clicks and two tickets. The first request
    /// runs until it has decided to sell, then the second as far as it gets, then the first to its answer, then the second.
    ///
    /// # Errors
    /// Whatever moving a request fails with.
    pub async fn both_read_before_either_writes(&self) -> anyhow::Result<Schedule<'_>> {
        const DECIDED: &str = "decided to sell";
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
        schedule.run_towards(first, DECIDED).await?;
        schedule.run_towards(second, DECIDED).await?;
        schedule.run_to_completion(first).await?;
        schedule.run_to_completion(second).await?;
        Ok(schedule)
    }
}

/// Opens a sale as the theatre does.
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
        }),
        Err(ReserveError::Indeterminate(_)) => Answer::Indeterminate,
    }
}
