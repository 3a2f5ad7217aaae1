//! Pessimistic locking: lock the row first, then decide.
//!
//! `for update` locks the sale's row until the commit. The holder of the row lock reads a stock
//! that no other transaction can change before that, so read, check and write become one critical
//! section. This clause is the whole difference from LV.1's `read_then_write`.
//!
//! Guarantee: keeps every invariant but the order of service, on any number of instances.
//! Limit: row-lock contention. The buyers of one sale are served one after another, with a durable
//! commit each, and every waiter holds a pooled connection. `lock_timeout` bounds the wait. The
//! lock covers the transaction only: a value read outside it is stale.
//!
//! Postgres manual, 13.3.2 "Row-Level Locks". Book: LV.2, "pessimistic".

use async_trait::async_trait;
use box_office::{
    ExistingReservation, Open, Order, Outcome, Refusal, Reservation, Reserve, ReserveError, Steps, StrategyContext,
};
use uuid::Uuid;

/// Sells under a lock on the sale's row.
pub struct Pessimistic {
    context: StrategyContext,
}

impl Open for Pessimistic {
    async fn open(context: StrategyContext) -> anyhow::Result<Self> {
        Ok(Self { context })
    }
}

#[async_trait]
impl Reserve for Pessimistic {
    async fn reserve(&self, order: &Order, steps: &Steps) -> Result<Outcome, ReserveError> {
        // ANCHOR: lock
        let mut tx = self.context.begin().await?;
        steps.at("transaction begun").await;

        let stock: i64 = sqlx::query_scalar(
            "select stock
               from sale
              where id = $1
                for update",
        )
        .bind(order.sale)
        .fetch_optional(&mut *tx)
        .await?
        .ok_or(Refusal::UnknownSale)?;
        steps.at("stock read").saw(stock).await;

        // Under the lock: before it, a second click of the buyer would miss the first reservation.
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
            return Ok(earlier.resolve(order)?);
        }
        if stock <= 0 {
            return Err(Refusal::SoldOut.into());
        }
        steps.at("decided to sell").await;
        self.context.simulate_work().await;
        // ANCHOR_END: lock

        // ANCHOR: write
        sqlx::query(
            "update sale
                set stock = $2
              where id = $1",
        )
        .bind(order.sale)
        .bind(stock - 1)
        .execute(&mut *tx)
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
        .execute(&mut *tx)
        .await?;
        steps.at("reservation written").await;

        tx.commit().await?;
        steps.at("committed").await;
        Ok(Outcome::Confirmed(Reservation { id }))
        // ANCHOR_END: write
    }
}
