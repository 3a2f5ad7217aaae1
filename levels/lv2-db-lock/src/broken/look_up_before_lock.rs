//! Broken: check, then act. The buyer's earlier reservation is looked up before the row is locked: two clicks both find none, then queue.
//!
//! Twin: `pessimistic`. Caught by I3, with two clicks.

use async_trait::async_trait;
use box_office::{
    ExistingReservation, Order, Outcome, Refusal, Reservation, Reserve, ReserveError, Steps, StrategyContext,
};
use uuid::Uuid;

/// Sells under a lock on the sale's row.
pub struct Pessimistic {
    context: StrategyContext,
}

impl Pessimistic {
    /// Sells on this context.
    pub fn new(context: StrategyContext) -> Self {
        Self { context }
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
              where id = $1",
        )
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
        let stock: i64 = sqlx::query_scalar("select stock from sale where id = $1 for update")
            .bind(order.sale)
            .fetch_one(&mut *tx)
            .await?;
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
