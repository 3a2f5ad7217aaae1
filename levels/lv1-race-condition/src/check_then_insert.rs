//! Select the buyer's reservation; if there is none, decrement the stock and insert one.
//!
//! The stock is safe: its check and its decrement are one statement. Reservations are not: two
//! concurrent requests of a buyer both select before either commits, find no row, and both insert.
//!
//! Guarantee: at most `capacity` tickets. It ends at two concurrent requests of one buyer.
//! Anomaly: check-then-act on a row that does not exist yet: there is no row to lock. Cost: none.
//!
//! Postgres manual, 13.2.1 "Read Committed Isolation Level". Book: LV.1, "check-then-insert".

use async_trait::async_trait;
use box_office::{
    ExistingReservation, Open, Order, Outcome, Refusal, Reservation, Reserve, ReserveError, Steps, StrategyContext,
};
use uuid::Uuid;

/// Reserves by selecting an existing reservation before inserting one.
pub struct CheckThenInsert {
    context: StrategyContext,
}

impl Open for CheckThenInsert {
    async fn open(context: StrategyContext) -> anyhow::Result<Self> {
        Ok(Self { context })
    }
}

#[async_trait]
impl Reserve for CheckThenInsert {
    async fn reserve(&self, order: &Order, steps: &Steps) -> Result<Outcome, ReserveError> {
        let mut tx = self.context.begin().await?;
        steps.at("transaction begun").await;

        // ANCHOR: look
        let earlier: Option<ExistingReservation> = sqlx::query_as(
            "select id, buyer_id, request_key
               from reservation
              where sale_id = $1
                and (buyer_id = $2 or request_key = $3)
              order by request_key = $3 desc
              limit 1",
        )
        // ANCHOR_END: look
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
        steps.at("decided to sell").await;
        self.context.simulate_work().await;

        let stock_left: Option<i64> = sqlx::query_scalar(
            "   update sale
                   set stock = stock - 1
                 where id = $1
                   and stock > 0
             returning stock",
        )
        .bind(order.sale)
        .fetch_optional(&mut *tx)
        .await?;
        let Some(stock_left) = stock_left else {
            let known: bool = sqlx::query_scalar("select exists (select from sale where id = $1)")
                .bind(order.sale)
                .fetch_one(&mut *tx)
                .await?;
            return Err(if known { Refusal::SoldOut } else { Refusal::UnknownSale }.into());
        };
        steps.at("stock written").saw(stock_left).await;

        // ANCHOR: insert
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
        // ANCHOR_END: insert

        tx.commit().await?;
        steps.at("committed").await;
        Ok(Outcome::Confirmed(Reservation { id }))
    }
}
