//! The rows of a sale, read through the two views that every level has.

use box_office::{BuyerId, SaleId};
use sqlx::PgPool;
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
    let reservations: Vec<(Uuid, BuyerId, String, String, i64)> = sqlx::query_as(
        "select id, buyer_id, request_key, status, (extract(epoch from changed_at) * 1000000)::bigint
           from reservation_now
          where sale_id = $1
            and status <> 'refused'", // a stored answer, which holds no ticket
    )
    .bind(sale)
    .fetch_all(pool)
    .await?;
    let rows = reservations
        .into_iter()
        .map(|(reservation, buyer, key, status, changed_us)| {
            let status = match status.as_str() {
                "confirmed" => Status::Confirmed,
                "held" => Status::Held,
                "released" => Status::Released,
                unknown => anyhow::bail!("reservation {reservation} has the status {unknown:?}, which is unknown"),
            };
            Ok(Row {
                reservation,
                buyer,
                key,
                status,
                taken_us: u64::try_from(changed_us)?,
                released_us: None,
            })
        });
    Ok(Sold {
        capacity: capacity.try_into()?,
        stock,
        rows: rows.collect::<anyhow::Result<_>>()?,
    })
}
