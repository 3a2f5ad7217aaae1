//! Read the stock, check it, and let the database decrement it.
//!
//! `stock = stock - 1` is atomic: a concurrent update waits for the row lock, so none is lost.
//! The check is stale: every transaction that has read 1 passes it, and the stock goes negative.
//!
//! Guarantee: stock + sold = capacity. It does not hold the stock at zero or above.
//! It ends at two concurrent buyers.
//! Anomaly: check-then-act, also called time of check to time of use (TOCTOU). Cost: none.
//!
//! Postgres manual, 13.2.1 "Read Committed Isolation Level". Book: LV.1, "check-then-decrement".

use async_trait::async_trait;
use box_office::{
    ExistingReservation, Open, Order, Outcome, Refusal, Reservation, Reserve, ReserveError, Steps, StrategyContext,
};
use uuid::Uuid;

/// Reserves by checking the stock and letting the database decrement it.
pub struct CheckThenDecrement {
    context: StrategyContext,
}

impl Open for CheckThenDecrement {
    async fn open(context: StrategyContext) -> anyhow::Result<Self> {
        Ok(Self { context })
    }
}

#[async_trait]
impl Reserve for CheckThenDecrement {
    async fn reserve(&self, order: &Order, steps: &Steps) -> Result<Outcome, ReserveError> {
        let mut tx = self.context.begin().await?;
        steps.at("transaction begun").await;

        // ANCHOR: read
        let stock: i64 = sqlx::query_scalar(
            "select stock
               from sale
              where id = $1",
        )
        // ANCHOR_END: read
        .bind(order.sale)
        .fetch_optional(&mut *tx)
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

        // ANCHOR: write
        sqlx::query(
            "update sale
                set stock = stock - 1
              where id = $1",
        )
        .bind(order.sale)
        .execute(&mut *tx)
        .await?;
        steps.at("stock written").await;
        // ANCHOR_END: write

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
    }
}
