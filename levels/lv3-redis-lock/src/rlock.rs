//! A distributed lock: one buyer at a time, on any number of instances.
//!
//! The lock lives in Redis, so all instances share it. It corresponds to Redisson's `RLock`: a
//! pub/sub message wakes its waiters, and a watchdog renews the lease while the holder's process
//! runs. Under it runs LV.1's `read_then_write`, one transaction at a time, and so it is right.
//!
//! Guarantee: keeps every invariant but the order of service, on any number of instances, as long
//! as no lease expires under its holder.
//! Limit: a process that is frozen while it holds the lock (a long garbage collection, a virtual
//! machine that is migrated, SIGSTOP) renews nothing. The lease expires, another instance acquires
//! the lock, and when the first resumes it sells on a stale read: an oversell. The same happens if
//! the holder cannot reach Redis for a whole lease, if Redis loses the lock, and if Postgres
//! carries out a commit after its connection broke and the lease expired.
//! Cost: two round trips to Redis for each buyer, in sequence; one more service to run.
//!
//! Redis documentation, "Distributed Locks with Redis". Book: LV.3, "rlock".

use async_trait::async_trait;
use box_office::{
    ExistingReservation, Open, Order, Outcome, Refusal, Reservation, Reserve, ReserveError, Steps, StrategyContext,
    Transaction,
};
use uuid::Uuid;

use crate::lock::{Connections, FencingTokens, LOCK_TIMEOUT, Lease, Owner, RLock};

/// Sells under a reentrant lock in Redis.
pub struct Rlock {
    context: StrategyContext,
    lock: RLock,
}

impl Open for Rlock {
    async fn open(context: StrategyContext) -> anyhow::Result<Self> {
        // ANCHOR: open
        let (connections, lease) = Connections::from_context(&context).await?;
        let lock = RLock::new(connections, Lease::Renewed(lease), FencingTokens::None)?;
        lock.check_permissions().await?;
        Ok(Self { context, lock })
        // ANCHOR_END: open
    }
}

impl Rlock {
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
impl Reserve for Rlock {
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
