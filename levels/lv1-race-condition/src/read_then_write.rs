//! Read the stock, check it, and write the decremented value back (read-modify-write).
//!
//! Two concurrent transactions read the same stock and write the same new value: one sale is lost.
//! It is correct while buyers come one after another, so no sequential test fails.
//!
//! Guarantee: none on the number of tickets sold. It ends at two concurrent buyers.
//! Anomaly: the lost update. `read committed`, the default isolation level of Postgres, allows it.
//! Cost: none, which is why this code is so common.
//!
//! Postgres manual, 13.2.1 "Read Committed Isolation Level". Book: LV.1, "read-then-write".

use async_trait::async_trait;
use box_office::{
    ExistingReservation, Open, Order, Outcome, Refusal, Reservation, Reserve, ReserveError, Steps, StrategyContext,
};
use uuid::Uuid;

/// Reserves by reading the stock and writing it back.
pub struct ReadThenWrite {
    context: StrategyContext,
}

impl Open for ReadThenWrite {
    async fn open(context: StrategyContext) -> anyhow::Result<Self> {
        Ok(Self { context })
    }
}

#[async_trait]
impl Reserve for ReadThenWrite {
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
                set stock = $2
              where id = $1",
        )
        .bind(order.sale)
        .bind(stock - 1)
        .execute(&mut *tx)
        .await?;
        steps.at("stock written").saw(stock - 1).await;
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
