//! A spin lock in Redis: a key that is set only if it does not exist, and waiters that poll.
//!
//! `SET key owner NX PX lease` is the whole lock: one command, so the lock never exists without a
//! TTL. A script releases it: it deletes the key only while the value is still the owner's. A
//! client that does not get the lock retries after a pause that doubles, with jitter. Under the
//! lock runs LV.1's `read_then_write`, one transaction at a time.
//!
//! Guarantee: keeps every invariant but the order of service, on any number of instances, as long
//! as no work under the lock takes longer than the lease.
//! Limit: the lease is fixed. A holder that is slow, frozen, or waits for the database continues
//! after its lease while another holds the lock. So does a commit that Postgres carries out after
//! its connection broke and the lease expired, and a holder whose lock Redis lost.
//! Cost: commands. Every waiter polls, and a released lock stays free until the next poll.
//!
//! Redis documentation, `SET`, "Patterns". Book: LV.3, "spin".

use async_trait::async_trait;
use box_office::{
    ExistingReservation, Open, Order, Outcome, Refusal, Reservation, Reserve, ReserveError, Steps, StrategyContext,
    Transaction,
};
use uuid::Uuid;

use crate::lock::{Backoff, Connections, LOCK_TIMEOUT, Lease, Owner, SpinLock};

/// Sells under a spin lock in Redis.
pub struct Spin {
    context: StrategyContext,
    lock: SpinLock,
}

impl Open for Spin {
    async fn open(context: StrategyContext) -> anyhow::Result<Self> {
        // ANCHOR: open
        let (connections, lease) = Connections::from_context(&context).await?;
        let lock = SpinLock::new(connections, Lease::Fixed(lease), Backoff::default())?;
        Ok(Self { context, lock })
        // ANCHOR_END: open
    }
}

impl Spin {
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
impl Reserve for Spin {
    async fn reserve(&self, order: &Order, steps: &Steps) -> Result<Outcome, ReserveError> {
        // ANCHOR: lock
        let name = format!("sale:{}", order.sale);
        let owner = Owner::fresh();
        let mut guard = match self.lock.try_acquire(&name, &owner).await? {
            Some(guard) => guard,
            None => {
                steps.blocked("waits for the lock");
                self.lock.acquire(&name, &owner, LOCK_TIMEOUT).await?
            }
        };
        steps.at("lock taken").await;

        let mut tx = self.context.begin().await?;
        steps.at("transaction begun").await;
        let answer = self.sell(&mut tx, order, steps).await;
        if answer.is_ok() {
            guard.commit_under_lock(tx.commit()).await?;
            steps.at("committed").await;
        }
        // After the commit, as in LV.2: the sale stands whether or not the lock was still held.
        let _ = guard.release().await;
        steps.at("lock released").await;
        answer
        // ANCHOR_END: lock
    }

    async fn ready(&self) -> Result<(), ReserveError> {
        Ok(self.lock.ready().await?)
    }
}
