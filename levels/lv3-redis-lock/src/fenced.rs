//! A distributed lock with a fencing token: the row itself refuses who comes too late.
//!
//! Every holder gets a token, greater than all before it. The first thing it does is to raise the sale's fence to its token, in the statement
//! that reads the stock; from then on no earlier holder can write. Its own write goes through only while the fence is still its own. So the
//! lock may be lost at any moment, and nothing goes wrong.
//!
//! Guarantee: keeps everything but an order of service, on any number of instances, also when a holder is frozen past its lease, and when
//! Redis loses its memory: the token comes from a clock as well as from a counter.
//! Where it ends: at the resource. What can't compare a token, such as a payment or an e-mail, is not protected. And the clock of Redis must
//! not be set back by more than Redis was away when it lost its memory.
//! Costs: `rlock`'s two round trips, and one more write for everybody who may sell.
//!
//! M. Kleppmann, "How to do distributed locking" (2016). Book: LV.3, "fenced".

use async_trait::async_trait;
use box_office::{
    ExistingReservation, Indeterminate, Open, Order, Outcome, Refusal, Reservation, Reserve, ReserveError, Steps,
    StrategyContext,
};
use uuid::Uuid;

use crate::lock::{Connections, Lease, Owner, RLock, Tokens, WAIT};

/// Sells under a lock in Redis, with a token that the row checks.
pub struct Fenced {
    context: StrategyContext,
    lock: RLock,
}

impl Open for Fenced {
    async fn open(context: StrategyContext) -> anyhow::Result<Self> {
        let (connections, lease) = Connections::on(&context).await?;
        let lock = RLock::new(connections, Lease::Renewed(lease), Tokens::Growing)?;
        Ok(Self { context, lock })
    }
}

impl Fenced {
    /// Every statement is a transaction of its own: it is the token that holds them together.
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
        if stock > 0 {
            // Whoever may write raises the fence first, and reads behind it: nobody with an earlier token can write any more.
            let behind_the_fence: Option<i64> = sqlx::query_scalar(
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
            stock = behind_the_fence.ok_or(Indeterminate::TimedOut)?;
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
        if let Some(earlier) = earlier {
            return Ok(earlier.resolve(order)?);
        }
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
            // The lock was lost, and whoever has it now has raised the fence. Nothing was written, and the buyer asks again.
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
                self.lock.acquire(&name, &owner, WAIT).await?
            }
        };
        let token = guard.token().expect("this lock hands out tokens");
        steps.at("lock taken").saw(token).await;

        let answer = self.sell(token, order, steps).await;
        let _ = guard.release().await;
        steps.at("lock released").await;
        answer
        // ANCHOR_END: lock
    }

    async fn ready(&self) -> Result<(), ReserveError> {
        Ok(self.lock.connections().send(redis::Cmd::ping()).await?)
    }
}
