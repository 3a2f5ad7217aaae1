//! Cancellation: the future of a reservation is dropped after the n-th poll, for every n until it
//! completes.

use std::{
    pin::Pin,
    task::{Context, Poll},
    time::{Duration, Instant},
};

use anyhow::{Context as _, ensure};
use box_office::{
    BuyerId, Database, Improvements, Instrumentation, Order, Outcome, Priority, RequestKey, Reserve, ReserveError,
    SaleId, Steps, Strategy, StrategyContext, StrategyMetrics, trace::now_monotonic_us,
};
use futures_util::future::{BoxFuture, try_join_all};
use sqlx::PgPool;
use tokio::time::timeout;

use super::runner::{answer_of, open_sale};
use crate::{
    backends::TestEnvironment,
    final_state,
    history::{Answer, FORMAT_VERSION, Fault, Header, History, Micros, Request},
    judge::judge,
};

/// Size of the strategy's pool: small, so that a leaked connection is noticed.
const CONNECTIONS: u32 = 2;

/// The lease of locks in Redis: longer than any wait here, so that a cancelled reservation has to
/// release its lock.
const LEASE: Duration = Duration::from_secs(60);

/// Consecutive completions after which no cancellation point is left. One may be luck: if the
/// database has answered before the first poll, there is one await less to cancel at.
const COMPLETIONS: usize = 5;

/// Time limit after a cancellation, by which the transaction has released its locks.
const TIMEOUT: Duration = Duration::from_secs(5);

/// Polls a future a limited number of times.
struct PollLimited<'a> {
    reserving: BoxFuture<'a, Result<Outcome, ReserveError>>,
    polls_left: usize,
}

impl Future for PollLimited<'_> {
    /// `None`: the future was still pending.
    type Output = Option<Result<Outcome, ReserveError>>;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        if self.polls_left == 0 {
            return Poll::Ready(None);
        }
        self.polls_left -= 1;
        self.reserving.as_mut().poll(context).map(Some)
    }
}

/// Cancels a reservation after every number of polls, and checks each time that nothing partial
/// remains: no open transaction, no leaked connection; a repeat with the same key gets the one
/// reservation, and the next buyer the other ticket.
///
/// Returns the number of cancellations.
///
/// # Errors
/// Names what remained, and after how many polls.
pub async fn cancelled_after_every_poll(strategy: &'static Strategy) -> anyhow::Result<usize> {
    cancelled_from(strategy, 0).await
}

/// The control run of [`cancelled_after_every_poll`], without any cancellation.
///
/// # Errors
/// Always fails: the fault did not strike.
pub async fn never_cancelled(strategy: &'static Strategy) -> anyhow::Result<usize> {
    cancelled_from(strategy, usize::MAX).await
}

async fn cancelled_from(strategy: &'static Strategy, fewest_polls: usize) -> anyhow::Result<usize> {
    let environment = TestEnvironment::shared(strategy).await?;
    let observer = environment.database().pool(1).await?;
    let (mut polls, mut sale): (usize, SaleId) = (fewest_polls, 0);
    let mut completions = 0;
    loop {
        sale += 1;
        let database = Database::lazy(environment.database().url().parse()?, CONNECTIONS);
        let pool = database.pool().clone();
        let context = StrategyContext {
            database,
            work: Duration::ZERO,
            metrics: StrategyMetrics::default(),
            redis: environment.redis(LEASE)?,
            kafka: None,
            improvements: Improvements::default(),
            instrumentation: Instrumentation::default(),
        };
        let reserve = (strategy.open)(context).await?;
        open_sale(&observer, sale, 2).await?;

        let first = order(sale, 1)?;
        let requests = vec![request(&first)];
        let unobserved = Steps::unobserved();
        let limited = PollLimited {
            reserving: reserve.reserve(&first, &unobserved),
            polls_left: polls,
        };
        let completed = limited.await;
        if let Some(result) = completed {
            result.context("it completed, but not with a ticket")?;
            completions += 1;
            if completions < COMPLETIONS {
                continue;
            }
            let cancelled = polls - fewest_polls;
            ensure!(
                cancelled > 0,
                "the fault did not strike: it completed {completions} times and was never cancelled"
            );
            return Ok(cancelled);
        }
        completions = 0;

        nothing_left_open(&observer)
            .await
            .with_context(|| format!("cancelled after {polls} polls"))?;
        let after = all_are_served(&*reserve, strategy, &observer, &pool, sale, requests);
        timeout(TIMEOUT, after)
            .await
            .with_context(|| format!("{TIMEOUT:?} later a request still waits"))
            .flatten()
            .with_context(|| format!("cancelled after {polls} polls"))?;
        pool.close().await;
        polls += 1;
    }
}

/// Checks the state after a cancelled reservation: no connection is leaked, its buyer gets one
/// ticket under the same key, the next buyer gets the other, and the judge finds nothing.
async fn all_are_served(
    reserve: &dyn Reserve,
    strategy: &Strategy,
    observer: &PgPool,
    pool: &PgPool,
    sale: SaleId,
    mut requests: Vec<Request>,
) -> anyhow::Result<()> {
    let fault = abandoned("the reservation was cancelled");
    let whole = try_join_all((0..CONNECTIONS).map(|_| pool.acquire()));
    drop(whole.await.context("a connection is leaked")?);
    for buyer in [1, 2] {
        let order = order(sale, buyer)?;
        let mut request = request(&order);
        request.answer = answer_of(reserve.reserve(&order, &Steps::unobserved()).await);
        request.answered_us = Some(now_monotonic_us());
        ensure!(
            matches!(request.answer, Answer::Confirmed { .. }),
            "the next request, of buyer {buyer}, is answered with {:?}",
            request.answer
        );
        requests.push(request);
    }
    let sold = final_state::read(observer, sale).await?;
    let history = History {
        header: Header {
            version: FORMAT_VERSION,
            strategy: strategy.name.to_owned(),
            sale,
            capacity: 2,
            deadline_us: Micros::MAX / 2,
            expiry_us: None,
            stock: Some(sold.stock),
        },
        requests,
        rows: Some(sold.rows),
        faults: vec![fault],
        payments: None,
        decisions: None,
    };
    let verdict = judge(&history);
    ensure!(verdict.findings.is_empty(), "{verdict}");
    Ok(())
}

/// Waits until no idle transaction holds locks in this database.
pub(super) async fn nothing_left_open(observer: &PgPool) -> anyhow::Result<()> {
    let mut locked = true;
    let deadline = Instant::now() + TIMEOUT;
    while locked {
        ensure!(
            Instant::now() < deadline,
            "a transaction is still open, and holds its locks"
        );
        locked = sqlx::query_scalar(
            "select exists (
                         select
                           from pg_stat_activity
                           join pg_locks using (pid)
                          where datname = current_database()
                            and state like 'idle in transaction%'
                            and relation is not null
                     )",
        )
        .fetch_one(observer)
        .await?;
    }
    Ok(())
}

pub(super) fn order(sale: SaleId, buyer: BuyerId) -> anyhow::Result<Order> {
    Ok(Order {
        sale,
        buyer,
        key: RequestKey::try_from(format!("buyer-{buyer}"))?,
        priority: Priority::Normal,
    })
}

/// A request without an answer.
pub(super) fn request(order: &Order) -> Request {
    Request {
        request: now_monotonic_us(),
        buyer: order.buyer,
        key: order.key.to_string(),
        sent_us: now_monotonic_us(),
        answered_us: None,
        answer: Answer::Indeterminate,
        steps: vec![],
    }
}

/// The fault that a request was abandoned by its client, and so has no answer.
pub(super) fn abandoned(fault: &str) -> Fault {
    let now_us = now_monotonic_us();
    Fault {
        fault: fault.to_owned(),
        struck_us: now_us,
        healed_us: Some(now_us),
    }
}
