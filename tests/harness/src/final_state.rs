//! The final state of a sale: its stock and rows, read through the two views that every level has.

use anyhow::anyhow;
use box_office::{BuyerId, SaleId};
use sqlx::{AssertSqlSafe, PgPool};
use uuid::Uuid;

use crate::history::{Row, Status};

/// A sale in the database.
#[derive(Clone, Debug)]
pub struct Sold {
    /// The tickets that were on sale.
    pub capacity: u64,
    /// The tickets that are left; negative if the strategy oversold.
    pub stock: i64,
    /// Every reservation.
    pub rows: Vec<Row>,
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
    let released_at = if has_releases(pool).await? {
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
    })
}

/// Whether the rows tell when a ticket was released.
async fn has_releases(pool: &PgPool) -> sqlx::Result<bool> {
    sqlx::query_scalar(
        "select exists (select
                          from information_schema.columns
                         where table_schema = current_schema()
                           and table_name = 'reservation_now'
                           and column_name = 'released_at')",
    )
    .fetch_one(pool)
    .await
}
