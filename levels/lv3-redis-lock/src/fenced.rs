//! A distributed lock with a fencing token: the row rejects a stale holder.
//!
//! Every holder gets a token greater than all before it. It first raises the sale's fence to its
//! token, in the statement that reads the stock; from then on no earlier holder can write. Its own
//! write succeeds only while the fence still equals its token. So the lock may be lost at any
//! moment without harm.
//!
//! Guarantee: keeps every invariant but the order of service, on any number of instances, also when
//! a holder is frozen past its lease, and when Redis loses its data: the token comes from a clock
//! as well as from a counter.
//! Limit: the fence protects the row only. A resource that cannot compare tokens, such as a payment
//! or an e-mail, is not protected. And the clock of Redis must not be set back by more than the
//! time Redis was down when it lost its data.
//! Cost: the two round trips of `rlock`, and one more write for each buyer while there is stock.
//!
//! M. Kleppmann, "How to do distributed locking" (2016). Book: LV.3, "fenced".

use async_trait::async_trait;
use box_office::{
    ExistingReservation, Indeterminate, Open, Order, Outcome, Refusal, Reservation, Reserve, ReserveError, Steps,
    StrategyContext,
};
use uuid::Uuid;

use crate::lock::{Connections, FencingTokens, LOCK_TIMEOUT, Lease, Owner, RLock};

/// Sells under a lock in Redis whose fencing token the row checks.
pub struct Fenced {
    context: StrategyContext,
    lock: RLock,
}

impl Open for Fenced {
    async fn open(context: StrategyContext) -> anyhow::Result<Self> {
        let (connections, lease) = Connections::from_context(&context).await?;
        let lock = RLock::new(connections, Lease::Renewed(lease), FencingTokens::Monotonic)?;
        lock.check_permissions().await?;
        Ok(Self { context, lock })
    }
}

impl Fenced {
    /// Every statement is its own transaction: the token makes them safe together.
    async fn sell(&self, token: i64, order: &Order, steps: &Steps) -> Result<Outcome, ReserveError> {
        // ANCHOR: raise
        let stock: Option<i64> = sqlx::query_scalar(
            "select stock
               from sale
              where id = $1",
        )
        .bind(order.sale)
        .fetch_optional(&self.context.database)
        .await?;
        let mut stock = stock.ok_or(Refusal::UnknownSale)?;
        // "Sold out" needs no fence: in this level a stock never rises.
        if stock > 0 {
            // Raises the fence before it reads the stock: from here on no holder of an earlier
            // token can write.
            let fenced_stock: Option<i64> = sqlx::query_scalar(
                "update sale
                    set fence = $2
                  where id = $1
                    and fence < $2
              returning stock",
            )
            .bind(order.sale)
            .bind(token)
            .fetch_optional(&self.context.database)
            .await?;
            stock = fenced_stock.ok_or(Indeterminate::TimedOut)?;
        }
        steps.at("stock read").saw(stock).await;
        // ANCHOR_END: raise

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
        .fetch_optional(&self.context.database)
        .await?;
        steps
            .at("earlier reservation looked up")
            .saw(if earlier.is_some() { "one" } else { "none" })
            .await;
        if let Some(earlier) = earlier {
            return Ok(earlier.resolve(order)?);
        }
        // Also true if it was read without the fence, as in this level a stock never rises.
        if stock <= 0 {
            return Err(Refusal::SoldOut.into());
        }
        steps.at("decided to sell").await;
        self.context.simulate_work().await;

        // ANCHOR: write
        let id = Uuid::now_v7();
        let written = sqlx::query(
            "with sold as (
                 update sale
                    set stock = $3
                  where id = $1
                    and fence = $2
              returning id
             )
             insert into reservation (id, sale_id, buyer_id, request_key)
             select $4, sold.id, $5, $6
               from sold",
        )
        .bind(order.sale)
        .bind(token)
        .bind(stock - 1)
        .bind(id)
        .bind(order.buyer)
        .bind(order.key.as_str())
        .execute(&self.context.database)
        .await?;
        if written.rows_affected() == 0 {
            // The lock was lost, and a later holder has raised the fence. Nothing was written; the
            // buyer may retry.
            steps.at("write refused").await;
            return Err(Indeterminate::TimedOut.into());
        }
        steps.at("reservation written").saw(stock - 1).await;
        Ok(Outcome::Confirmed(Reservation { id }))
        // ANCHOR_END: write
    }
}

#[async_trait]
impl Reserve for Fenced {
    async fn reserve(&self, order: &Order, steps: &Steps) -> Result<Outcome, ReserveError> {
        // ANCHOR: lock
        let name = format!("sale:{}", order.sale);
        let owner = Owner::fresh();
        let guard = match self.lock.try_acquire(&name, &owner).await? {
            Some(guard) => guard,
            None => {
                steps.blocked("waits for the lock");
                self.lock.acquire(&name, &owner, LOCK_TIMEOUT).await?
            }
        };
        let token = guard.token().expect("this lock issues tokens");
        steps.at("lock taken").saw(token).await;

        let answer = self.sell(token, order, steps).await;
        let _ = guard.release().await;
        steps.at("lock released").await;
        answer
        // ANCHOR_END: lock
    }

    async fn ready(&self) -> Result<(), ReserveError> {
        Ok(self.lock.ready().await?)
    }
}
