//! Optimistic locking: decide without a lock, and write only if the row has not changed since it
//! was read.
//!
//! The sale's row carries a version. The update names the version that was read; if another buyer
//! has raised it, the update matches no row, nothing is written, and the attempt starts again from
//! a fresh read. No lock is held while the strategy decides.
//!
//! Guarantee: keeps every invariant but the order of service, on any number of instances.
//! Limit: contention. One attempt wins each round, and the work of all others is wasted. Attempts
//! are bounded by a number and a deadline; beyond either the answer is `Indeterminate`, never "sold
//! out", as there may be tickets left.
//!
//! Kung and Robinson, "On Optimistic Methods for Concurrency Control", 1981. Full jitter: AWS
//! Architecture Blog, "Exponential Backoff And Jitter". Book: LV.2, "optimistic".

use std::time::{Duration, Instant};

use async_trait::async_trait;
use box_office::{
    ExistingReservation, Indeterminate, Open, Order, Outcome, Refusal, Reservation, Reserve, ReserveError, Steps,
    StrategyContext,
};
use uuid::Uuid;

// ANCHOR: bounds
/// The number of attempts of one request.
const ATTEMPTS: u32 = 200;

/// No attempt starts after this time.
const DEADLINE: Duration = Duration::from_secs(5);

/// The longest pause after the first failed attempt. It doubles with each further one.
const FIRST_PAUSE: Duration = Duration::from_millis(1);

/// The upper bound of all pauses.
const LONGEST_PAUSE: Duration = Duration::from_millis(32);
// ANCHOR_END: bounds

/// Sells if the sale still has the version that was read.
pub struct Optimistic {
    context: StrategyContext,
}

/// The outcome of one attempt.
enum Attempt {
    Sold(Outcome),
    /// Another transaction wrote first.
    Overtaken,
}

impl Open for Optimistic {
    async fn open(context: StrategyContext) -> anyhow::Result<Self> {
        Ok(Self { context })
    }
}

impl Optimistic {
    async fn attempt(&self, order: &Order, steps: &Steps) -> Result<Attempt, ReserveError> {
        let mut tx = self.context.begin().await?;
        steps.at("transaction begun").await;

        // ANCHOR: read
        let (stock, version): (i64, i64) = sqlx::query_as(
            "select stock, version
               from sale
              where id = $1",
        )
        .bind(order.sale)
        .fetch_optional(&mut *tx)
        .await?
        .ok_or(Refusal::UnknownSale)?;
        steps
            .at("stock and version read")
            .saw(format!("{stock}, version {version}"))
            .await;

        // Read after the version: a reservation in between raises the version, and the update below
        // matches no row.
        let earlier: Option<ExistingReservation> = sqlx::query_as(
            "select id, buyer_id, request_key
               from reservation
              where sale_id = $1
                and (buyer_id = $2 or request_key = $3)
              order by request_key = $3 desc
              limit 1",
        )
        .bind(order.sale)
        .bind(order.buyer)
        .bind(order.key.as_str())
        .fetch_optional(&mut *tx)
        .await?;
        steps
            .at("earlier reservation looked up")
            .saw(if earlier.is_some() { "one" } else { "none" })
            .await;
        if let Some(earlier) = earlier {
            return Ok(Attempt::Sold(earlier.resolve(order)?));
        }
        // The version need not be compared for this: in this level a stock never rises.
        if stock <= 0 {
            return Err(Refusal::SoldOut.into());
        }
        steps.at("decided to sell").await;
        self.context.simulate_work().await;
        // ANCHOR_END: read

        // ANCHOR: compare
        let updated = sqlx::query(
            "update sale
                set stock = $2, version = version + 1
              where id = $1
                and version = $3",
        )
        .bind(order.sale)
        .bind(stock - 1)
        .bind(version)
        .execute(&mut *tx)
        .await?;
        if updated.rows_affected() == 0 {
            tx.rollback().await?;
            steps.at("overtaken").await;
            return Ok(Attempt::Overtaken);
        }
        steps.at("stock written").saw(stock - 1).await;
        // ANCHOR_END: compare

        let id = Uuid::now_v7();
        sqlx::query(
            "insert into reservation (id, sale_id, buyer_id, request_key)
             values ($1, $2, $3, $4)",
        )
        .bind(id)
        .bind(order.sale)
        .bind(order.buyer)
        .bind(order.key.as_str())
        .execute(&mut *tx)
        .await?;
        steps.at("reservation written").await;

        tx.commit().await?;
        steps.at("committed").await;
        Ok(Attempt::Sold(Outcome::Confirmed(Reservation { id })))
    }
}

#[async_trait]
impl Reserve for Optimistic {
    async fn reserve(&self, order: &Order, steps: &Steps) -> Result<Outcome, ReserveError> {
        // ANCHOR: retry
        let started = Instant::now();
        let mut longest = FIRST_PAUSE;
        for attempt in 1..=ATTEMPTS {
            if let Attempt::Sold(outcome) = self.attempt(order, steps).await? {
                return Ok(outcome);
            }
            if attempt == ATTEMPTS || started.elapsed() > DEADLINE {
                break;
            }
            self.context.metrics.retries.inc();
            // Full jitter, so that conflicting attempts do not retry together. No connection is
            // held meanwhile.
            let pause = longest.mul_f64(rand::random_range(0.0..1.0));
            tokio::time::sleep(pause).await;
            longest = (longest * 2).min(LONGEST_PAUSE);
        }
        Err(Indeterminate::Overloaded.into())
        // ANCHOR_END: retry
    }
}
