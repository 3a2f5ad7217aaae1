//! A mutex: one buyer at a time, within one process.
//!
//! The sale's mutex is held from before the stock is read until after the commit, so LV.1's
//! `read_then_write` runs alone and is right. The mutex lives in the memory of one process; a
//! second instance has a mutex of its own.
//!
//! Guarantee: on one instance, keeps every invariant but the order of service. On two it oversells,
//! and sells one buyer two tickets.
//! Limit: the process. Autoscaling starts a second instance, and so does a rolling restart in which
//! the old and the new instance overlap. And if a connection breaks with a commit in flight, the
//! mutex is released although Postgres may still carry out the commit.
//! Cost: one buyer at a time for each sale; a waiter holds no connection. A waiter that times out
//! gets `Indeterminate`.
//!
//! Tokio's documentation of `Mutex`: waiters queue first in, first out. Book: LV.2, "mutex".

use std::time::Duration;

use async_trait::async_trait;
use box_office::{
    ExistingReservation, Indeterminate, Open, Order, Outcome, Refusal, Reservation, Reserve, ReserveError, Steps,
    StrategyContext, Transaction,
};
use tokio::{sync::Mutex as AsyncMutex, time::timeout};
use uuid::Uuid;

// ANCHOR: locks
/// The number of locks. Sales share them (lock striping), so requests for invented sales cost no
/// memory.
const LOCKS: usize = 64;
// ANCHOR_END: locks

/// How long a request waits for the mutex. The holder may be waiting for a connection itself, and
/// the queue behind it is unbounded.
const LOCK_TIME: Duration = Duration::from_secs(5);

/// Sells under a mutex in this process.
pub struct Mutex {
    context: StrategyContext,
    locks: [AsyncMutex<()>; LOCKS],
}

impl Open for Mutex {
    async fn open(context: StrategyContext) -> anyhow::Result<Self> {
        Ok(Self {
            context,
            locks: std::array::from_fn(|_| AsyncMutex::new(())),
        })
    }
}

impl Mutex {
    // ANCHOR: lock-of
    /// The lock of this key.
    fn lock_of(&self, key: i64) -> &AsyncMutex<()> {
        &self.locks[key.unsigned_abs() as usize % LOCKS]
    }
    // ANCHOR_END: lock-of

    /// LV.1's `read_then_write`, up to its commit: right as long as no other transaction runs it.
    async fn sell(&self, tx: &mut Transaction, order: &Order, steps: &Steps) -> Result<Outcome, ReserveError> {
        let stock: i64 = sqlx::query_scalar(
            "select stock
               from sale
              where id = $1",
        )
        .bind(order.sale)
        .fetch_optional(&mut **tx)
        .await?
        .ok_or(Refusal::UnknownSale)?;
        steps.at("stock read").saw(stock).await;

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
        .fetch_optional(&mut **tx)
        .await?;
        steps
            .at("earlier reservation looked up")
            .saw(if earlier.is_some() { "one" } else { "none" })
            .await;
        if let Some(earlier) = earlier {
            return Ok(earlier.resolve(order)?);
        }
        if stock <= 0 {
            return Err(Refusal::SoldOut.into());
        }
        steps.at("decided to sell").await;
        self.context.simulate_work().await;

        sqlx::query(
            "update sale
                set stock = $2
              where id = $1",
        )
        .bind(order.sale)
        .bind(stock - 1)
        .execute(&mut **tx)
        .await?;
        steps.at("stock written").saw(stock - 1).await;

        let id = Uuid::now_v7();
        sqlx::query(
            "insert into reservation (id, sale_id, buyer_id, request_key)
             values ($1, $2, $3, $4)",
        )
        .bind(id)
        .bind(order.sale)
        .bind(order.buyer)
        .bind(order.key.as_str())
        .execute(&mut **tx)
        .await?;
        steps.at("reservation written").await;
        Ok(Outcome::Confirmed(Reservation { id }))
    }
}

#[async_trait]
impl Reserve for Mutex {
    async fn reserve(&self, order: &Order, steps: &Steps) -> Result<Outcome, ReserveError> {
        // ANCHOR: lock
        let lock = self.lock_of(order.sale);
        let guard = match lock.try_lock() {
            Ok(guard) => guard,
            Err(_) => {
                steps.blocked("waits for the mutex");
                let waiting = timeout(LOCK_TIME, lock.lock());
                waiting.await.map_err(|_| Indeterminate::Overloaded)?
            }
        };
        steps.at("mutex taken").await;

        let mut tx = self.context.begin().await?;
        steps.at("transaction begun").await;
        let answer = self.sell(&mut tx, order, steps).await;
        if answer.is_ok() {
            tx.commit().await?;
            steps.at("committed").await;
        }
        drop(guard); // only now: dropped before the commit, the next buyer would read the old stock
        steps.at("lock released").await;
        answer
        // ANCHOR_END: lock
    }
}
