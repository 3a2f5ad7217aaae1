//! A conditional update: one statement takes a ticket, if there is one, and writes the reservation.
//!
//! There is no gap between read and write, because there is no separate read: the condition is part
//! of the update, and Postgres evaluates it again on the current row once it has the row lock. The
//! unique keys of the schema `guarded` do the same for the buyer's second click: the violation
//! rolls back the whole statement, stock included, and the answer is the existing reservation.
//!
//! Guarantee: keeps every invariant but the order of service, on any number of instances.
//! Limit: what one statement on one database can express. Cost: the lowest of all, one round trip,
//! and the row is locked for no longer than that.
//!
//! Postgres manual, 13.2.1 "Read Committed Isolation Level" (the re-check) and 7.8 "WITH Queries".
//! Book: LV.2, "conditional-update".

use async_trait::async_trait;
use box_office::{
    ExistingReservation, Open, Order, Outcome, Refusal, Reservation, Reserve, ReserveError, Steps, StrategyContext,
};
use uuid::Uuid;

/// Sells in one statement.
pub struct ConditionalUpdate {
    context: StrategyContext,
}

impl Open for ConditionalUpdate {
    async fn open(context: StrategyContext) -> anyhow::Result<Self> {
        Ok(Self { context })
    }
}

impl ConditionalUpdate {
    // ANCHOR: refusal
    /// The reason why the statement took no ticket. A conflicting reservation is committed by now:
    /// the statement has waited for it.
    async fn refusal(&self, order: &Order, steps: &Steps) -> Result<Outcome, ReserveError> {
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
        let known: bool = sqlx::query_scalar("select exists (select from sale where id = $1)")
            .bind(order.sale)
            .fetch_one(&self.context.database)
            .await?;
        Err(if known { Refusal::SoldOut } else { Refusal::UnknownSale }.into())
    }
    // ANCHOR_END: refusal
}

#[async_trait]
impl Reserve for ConditionalUpdate {
    async fn reserve(&self, order: &Order, steps: &Steps) -> Result<Outcome, ReserveError> {
        // ANCHOR: statement
        let sold: Result<Option<Uuid>, sqlx::Error> = sqlx::query_scalar(
            "with taken as (
                   update sale
                      set stock = stock - 1
                    where id = $2
                      and stock > 0
                returning id
             )
             insert into reservation (id, sale_id, buyer_id, request_key)
                select $1, id, $3, $4
                  from taken
             returning id",
        )
        .bind(Uuid::now_v7())
        .bind(order.sale)
        .bind(order.buyer)
        .bind(order.key.as_str())
        .fetch_optional(&self.context.database)
        .await;
        // ANCHOR_END: statement
        // ANCHOR: answers
        match sold {
            Ok(Some(id)) => {
                steps.at("committed").await;
                Ok(Outcome::Confirmed(Reservation { id }))
            }
            Ok(None) => {
                steps.at("no ticket taken").await;
                self.refusal(order, steps).await
            }
            Err(sqlx::Error::Database(error)) if error.is_unique_violation() => {
                steps.at("a reservation was there first").await;
                self.refusal(order, steps).await
            }
            Err(error) => Err(error.into()),
        }
        // ANCHOR_END: answers
    }
}
