//! Broken: the transaction is begun and ended by hand. When the request is cancelled in between, nobody rolls back: the connection goes back
//! to the pool with the transaction open and the sale's row locked.
//!
//! Twin: `pessimistic`, whose transaction rolls back when it is dropped. Caught by cancelling at every step.

use async_trait::async_trait;
use box_office::{Earlier, No, Order, Outcome, Refusal, Reservation, Reserve, Stage, Steps};
use uuid::Uuid;

/// Sells under a lock on the sale's row.
pub struct Pessimistic {
    stage: Stage,
}

impl Pessimistic {
    /// Sells on this stage.
    pub fn new(stage: Stage) -> Self {
        Self { stage }
    }
}

#[async_trait]
impl Reserve for Pessimistic {
    async fn reserve(&self, order: &Order, steps: &Steps) -> Result<Outcome, No> {
        // ANCHOR: lock
        let mut tx = self.stage.database.acquire().await?;
        sqlx::query("begin").execute(&mut *tx).await?;
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

        // Inside the lock: outside it, the same buyer's second click would find nothing either.
        let earlier: Option<Earlier> = sqlx::query_as(
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
        if let Some(earlier) = earlier {
            return Ok(earlier.answer(order)?);
        }
        if stock <= 0 {
            return Err(Refusal::SoldOut.into());
        }
        steps.at("decided to sell").await;
        self.stage.business_time().await;
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

        sqlx::query("commit").execute(&mut *tx).await?;
        steps.at("committed").await;
        Ok(Outcome::Confirmed(Reservation { id }))
        // ANCHOR_END: write
    }
}
