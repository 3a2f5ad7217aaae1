//! The final state of a sale: its stock and rows, read through the two views that every level has;
//! and the record of the order of its decisions, where a level keeps one.

use anyhow::anyhow;
use box_office::{BuyerId, SaleId};
use sqlx::{AssertSqlSafe, PgPool};
use uuid::Uuid;

use crate::history::{Decision, Row, Status};

/// A sale in the database.
#[derive(Clone, Debug)]
pub struct Sold {
    /// The tickets that were on sale.
    pub capacity: u64,
    /// The tickets that are left; negative if the strategy oversold.
    pub stock: i64,
    /// Every reservation.
    pub rows: Vec<Row>,
    /// Where each decided order stood in its queue, if that is recorded.
    pub decisions: Option<Vec<Decision>>,
}

/// Reads a sale. The result is meaningful only at quiescence.
///
/// # Errors
/// Fails if the views can't be read or the sale does not exist.
pub async fn read(pool: &PgPool, sale: SaleId) -> anyhow::Result<Sold> {
    let (capacity, stock): (i64, i64) = sqlx::query_as("select capacity, stock from sale_now where sale_id = $1")
        .bind(sale)
        .fetch_one(pool)
        .await?;
    // Only the levels whose tickets can come back tell when one did.
    let released_at = if has_column(pool, "reservation_now", "released_at").await? {
        "released_at"
    } else {
        "null::timestamptz"
    };
    let reservations: Vec<(Uuid, BuyerId, String, String, i64, Option<i64>)> = sqlx::query_as(AssertSqlSafe(format!(
        "select id,
                buyer_id,
                request_key,
                status,
                (extract(epoch from changed_at) * 1000000)::bigint,
                (extract(epoch from {released_at}) * 1000000)::bigint
           from reservation_now
          where sale_id = $1
            and status <> 'refused'" // a stored answer, which holds no ticket
    )))
    .bind(sale)
    .fetch_all(pool)
    .await?;
    let rows = reservations
        .into_iter()
        .filter_map(|(reservation, buyer, key, status, taken_us, released_us)| {
            let status = match status.as_str() {
                "confirmed" => Ok(Status::Confirmed),
                "held" => Ok(Status::Held),
                "released" => Ok(Status::Released),
                // Such an order may have ended before it held a ticket.
                "declined" | "expired" | "cancelled" => released_us.map(|_| Ok(Status::Released))?,
                unknown => Err(anyhow!(
                    "reservation {reservation} has the status {unknown:?}, which is unknown"
                )),
            };
            Some((|| {
                Ok(Row {
                    reservation,
                    buyer,
                    key,
                    status: status?,
                    taken_us: u64::try_from(taken_us)?,
                    released_us: released_us.map(u64::try_from).transpose()?,
                })
            })())
        });
    Ok(Sold {
        capacity: capacity.try_into()?,
        stock,
        rows: rows.collect::<anyhow::Result<_>>()?,
        decisions: decisions(pool, sale).await?,
    })
}

/// Reads where each decided order stood in its queue. `None`: nothing is recorded.
async fn decisions(pool: &PgPool, sale: SaleId) -> anyhow::Result<Option<Vec<Decision>>> {
    if !has_column(pool, "decision_now", "number").await? {
        return Ok(None);
    }
    let recorded: Vec<(i64, Uuid, String, i32, i64)> = sqlx::query_as(
        "select distinct number, reservation_id, topic, partition, log_offset
           from decision_now
           join reservation_now on reservation_now.id = reservation_id
          where sale_id = $1
          order by number",
    )
    .bind(sale)
    .fetch_all(pool)
    .await?;
    let decisions = recorded
        .into_iter()
        .map(|(number, reservation, topic, partition, offset)| {
            Ok(Decision {
                number: u64::try_from(number)?,
                reservation,
                topic,
                partition,
                offset: u64::try_from(offset)?,
            })
        });
    let decisions: Vec<Decision> = decisions.collect::<anyhow::Result<_>>()?;
    Ok((!decisions.is_empty()).then_some(decisions))
}

/// Whether a view has a column: not every level has all of them.
async fn has_column(pool: &PgPool, view: &str, column: &str) -> sqlx::Result<bool> {
    sqlx::query_scalar(
        "select exists (select
                          from information_schema.columns
                         where table_schema = current_schema()
                           and table_name = $1
                           and column_name = $2)",
    )
    .bind(view)
    .bind(column)
    .fetch_one(pool)
    .await
}
