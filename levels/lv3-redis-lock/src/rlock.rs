//! A distributed lock: one buyer at a time, on any number of instances.
//!
//! The lock lives in Redis, so all instances know of it. It is what Redisson's `RLock` is to Java: who waits is woken by a message, and a
//! watchdog renews the lease for as long as the holder's process runs. Under it runs LV.1's `read_then_write`, alone, and so it is right.
//!
//! Guarantee: keeps everything but an order of service, on any number of instances, as long as no lease ends under its holder.
//! Where it ends: a process that is frozen while it holds the lock (a long garbage collection, a virtual machine that is moved, SIGSTOP)
//! renews nothing. The lease ends, somebody else gets the lock, and when the first goes on it sells on what it read before: an oversell.
//! The same comes of a holder that can't reach Redis for a lease, and of a Redis that forgets the lock.
//! So does a commit whose connection broke and that Postgres still carries out when the lease has ended.
//! Costs: two round trips to Redis for each buyer, one after another; a service more to run.
//!
//! Redis documentation, "Distributed Locks with Redis". Book: LV.3, "rlock".

use async_trait::async_trait;
use box_office::{
    ExistingReservation, Open, Order, Outcome, Refusal, Reservation, Reserve, ReserveError, Steps, StrategyContext,
};
use sqlx::postgres::PgTransaction;
use uuid::Uuid;

use crate::lock::{Connections, Lease, Owner, RLock, Tokens, WAIT};

/// Sells under a reentrant lock in Redis.
pub struct Rlock {
    context: StrategyContext,
    lock: RLock,
}

impl Open for Rlock {
    async fn open(context: StrategyContext) -> anyhow::Result<Self> {
        // ANCHOR: open
        let (connections, lease) = Connections::on(&context).await?;
        let lock = RLock::new(connections, Lease::Renewed(lease), Tokens::None)?;
        Ok(Self { context, lock })
        // ANCHOR_END: open
    }
}

impl Rlock {
    /// LV.1's `read_then_write`, up to its commit: right as long as nobody else is in it.
    async fn sell(&self, tx: &mut PgTransaction<'_>, order: &Order, steps: &Steps) -> Result<Outcome, ReserveError> {
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
                self.lock.acquire(&name, &owner, WAIT).await?
            }
        };
        steps.at("lock taken").await;

        let mut tx = self.context.begin().await?;
        steps.at("transaction begun").await;
        let answer = self.sell(&mut tx, order, steps).await;
        if answer.is_ok() {
            guard.covers(tx.commit()).await?;
            steps.at("committed").await;
        }
        // After the transaction, as in LV.2; and what is sold is sold, whether or not the lock was still there to be given back.
        let _ = guard.release().await;
        steps.at("lock released").await;
        answer
        // ANCHOR_END: lock
    }

    async fn ready(&self) -> Result<(), ReserveError> {
        Ok(self.lock.connections().send(redis::Cmd::ping()).await?)
    }
}
