//! The rows of sagas. Every write names the state that it follows: of two that take the same step,
//! the first wins.

use std::time::Duration;

use box_office::{BuyerId, Database, ReserveError, SaleId, Transaction};
use uuid::Uuid;

use crate::single_writer::append_events;

/// A saga whose next step this instance takes.
#[derive(Clone, Debug)]
pub struct Claimed {
    /// The reservation.
    pub reservation: Uuid,
    /// Its sale.
    pub sale: SaleId,
    /// Its buyer.
    pub buyer: BuyerId,
    /// The state that it has now.
    pub state: State,
    /// Whether money may have been taken that must be returned.
    pub refund_due: bool,
}

/// The state of a saga that is due.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// The payment service is asked, or is about to be.
    Charging,
    /// The sale's writer is to take the ticket back.
    Releasing,
    /// The ticket is back, and the refund is due.
    Released,
}

// ANCHOR: hold
/// Begins the sagas of tickets that were taken in this transaction.
///
/// # Errors
/// The error of the database.
pub async fn hold(tx: &mut Transaction, held: &[(Uuid, SaleId, BuyerId)], hold: Duration) -> Result<(), ReserveError> {
    sqlx::query(
        "insert into saga (reservation_id, sale_id, buyer_id, hold_until)
            select id, sale_id, buyer_id, clock_timestamp() + $4 * interval '1 millisecond'
              from unnest($1::uuid[], $2::bigint[], $3::bigint[]) as held (id, sale_id, buyer_id)",
    )
    .bind(held.iter().map(|(id, ..)| *id).collect::<Vec<_>>())
    .bind(held.iter().map(|(_, sale, _)| *sale).collect::<Vec<_>>())
    .bind(held.iter().map(|(.., buyer)| *buyer).collect::<Vec<_>>())
    .bind(milliseconds(hold))
    .execute(&mut **tx)
    .await?;
    Ok(())
}
// ANCHOR_END: hold

/// Which sagas a worker claims. They are claimed apart: a payment service that hangs must not keep
/// the tickets, and refunds that it does not make must not keep new buyers from paying.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Due {
    /// A charge.
    Charges,
    /// The release of a ticket; also of one whose hold has ended.
    Releases,
    /// A refund, of a ticket that has been released.
    Refunds,
}

impl Due {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Charges, Self::Releases, Self::Refunds];

    fn name(self) -> &'static str {
        match self {
            Self::Charges => "charges",
            Self::Releases => "releases",
            Self::Refunds => "refunds",
        }
    }
}

// ANCHOR: claim
/// Claims sagas that are due, for the time of `lease`: if their step is not stored by then, they are
/// due again. Those whose hold has ended without an answer are to be released.
///
/// # Errors
/// The error of the database.
pub async fn claim(
    database: &Database,
    what: Due,
    limit: usize,
    lease: Duration,
) -> Result<Vec<Claimed>, ReserveError> {
    let claimed: Vec<(Uuid, SaleId, BuyerId, String, bool)> = sqlx::query_as(
        "with due as (
             select reservation_id,
                    state in ('held', 'charging') as is_open,
                    hold_until <= clock_timestamp() as is_over
               from saga
              where due_at <= clock_timestamp()
                and $3 = case when state = 'released' then 'refunds'
                              when state = 'releasing' or hold_until <= clock_timestamp() then 'releases'
                              else 'charges'
                         end
              order by due_at
              limit $1
                for update skip locked
         )
         update saga
            set state = case when not is_open then state when is_over then 'releasing' else 'charging' end,
                ending = case when is_open and is_over then 'expired' else ending end,
                refund_due = refund_due or (is_over and state = 'charging'),
                attempts = case when is_open and is_over then 1 else attempts + 1 end,
                due_at = case when is_open and not is_over
                              then least(hold_until, clock_timestamp() + $2 * interval '1 millisecond')
                              else clock_timestamp() + $2 * interval '1 millisecond'
                          end
           from due
          where saga.reservation_id = due.reservation_id
         returning saga.reservation_id, sale_id, buyer_id, state, refund_due",
    )
    .bind(i64::try_from(limit).unwrap_or(i64::MAX))
    .bind(milliseconds(lease))
    .bind(what.name())
    .fetch_all(database)
    .await?;
    let claimed = claimed
        .into_iter()
        .map(|(reservation, sale, buyer, state, refund_due)| Claimed {
            reservation,
            sale,
            buyer,
            state: match state.as_str() {
                "charging" => State::Charging,
                "releasing" => State::Releasing,
                _ => State::Released,
            },
            refund_due,
        });
    Ok(claimed.collect())
}
// ANCHOR_END: claim

/// The age of the oldest payment whose outcome is unknown, from when its ticket was taken: a charge
/// that is asked for again, or money that may have been taken for a ticket that was released. Zero
/// if there is none.
///
/// # Errors
/// The error of the database.
pub async fn oldest_unknown(database: &Database, hold: Duration) -> Result<Duration, ReserveError> {
    let age_ms: Option<i64> = sqlx::query_scalar(
        "select (1000 * extract(epoch from clock_timestamp() - min(hold_until)))::bigint
           from saga
          where due_at is not null
            and (state = 'charging' and attempts > 1 or refund_due)",
    )
    .fetch_one(database)
    .await?;
    let age = age_ms.map(|age_ms| age_ms.saturating_add(milliseconds(hold)));
    Ok(Duration::from_millis(
        age.and_then(|age| age.try_into().ok()).unwrap_or(0),
    ))
}

/// Locks these sagas. All transactions lock them in this order.
///
/// # Errors
/// The error of the database.
pub async fn lock(tx: &mut Transaction, ids: &[Uuid]) -> Result<(), ReserveError> {
    sqlx::query(
        "select
           from saga
          where reservation_id = any($1)
          order by reservation_id
            for update",
    )
    .bind(ids)
    .execute(&mut **tx)
    .await?;
    Ok(())
}

// ANCHOR: approved
/// The money is taken: the tickets that are still held are confirmed. The others are being released,
/// or have been: their money goes back.
///
/// # Errors
/// The error of the database.
pub async fn approved(tx: &mut Transaction, ids: &[Uuid]) -> Result<(), ReserveError> {
    if ids.is_empty() {
        return Ok(());
    }
    let confirmed: Vec<Uuid> = sqlx::query_scalar(
        "update saga
            set state = 'confirmed', due_at = null
          where reservation_id = any($1)
            and state = 'charging'
         returning reservation_id",
    )
    .bind(ids)
    .fetch_all(&mut **tx)
    .await?;
    sqlx::query(
        "update saga
            set refund_due = true, due_at = clock_timestamp()
          where reservation_id = any($1)
            and state in ('releasing', 'released')",
    )
    .bind(ids)
    .execute(&mut **tx)
    .await?;
    sqlx::query(
        "update reservation
            set status = 'confirmed'
          where id = any($1)",
    )
    .bind(&confirmed)
    .execute(&mut **tx)
    .await?;
    append_events(tx, &confirmed, &vec![Some("confirmed"); confirmed.len()]).await
}
// ANCHOR_END: approved

/// No money is taken: the tickets that are still held are to be released.
///
/// # Errors
/// The error of the database.
pub async fn declined(tx: &mut Transaction, ids: &[Uuid]) -> Result<(), ReserveError> {
    change(
        tx,
        ids,
        "update saga
            set state = 'releasing', ending = 'declined', attempts = 0, due_at = clock_timestamp()
          where reservation_id = any($1)
            and state = 'charging'",
    )
    .await
}

/// The outcome is unknown: the payment service is asked again soon, at the latest when the hold
/// ends.
///
/// # Errors
/// The error of the database.
pub async fn unanswered(tx: &mut Transaction, ids: &[Uuid]) -> Result<(), ReserveError> {
    change(
        tx,
        ids,
        "update saga
            set due_at = least(hold_until, clock_timestamp() + least(attempts, 10) * interval '100 milliseconds')
          where reservation_id = any($1)
            and state = 'charging'",
    )
    .await
}

/// The releases of these sagas are commanded if they were due, and the money of those `refunded` is
/// returned. What is not done yet is due again: a release after `retry`, and later each time, as its
/// command may only wait behind many orders.
///
/// # Errors
/// The error of the database.
pub async fn wound_down(
    tx: &mut Transaction,
    ids: &[Uuid],
    refunded: &[Uuid],
    retry: Duration,
) -> Result<(), ReserveError> {
    if ids.is_empty() {
        return Ok(());
    }
    sqlx::query(
        "update saga
            set refund_due = refund_due and reservation_id <> all($2),
                due_at = case when state = 'releasing' then clock_timestamp() + least(attempts, 20) * $3 * interval '1 millisecond'
                              when refund_due and reservation_id <> all($2)
                              then clock_timestamp() + least(attempts, 10) * interval '100 milliseconds'
                          end
          where reservation_id = any($1)
            and state in ('releasing', 'released')",
    )
    .bind(ids)
    .bind(refunded)
    .bind(milliseconds(retry))
    .execute(&mut **tx)
    .await?;
    Ok(())
}

// ANCHOR: release
/// Releases the tickets of these reservations whose saga says so, and puts them back into the stock.
/// Only the sale's writer calls it, in the transaction of its batch.
///
/// # Errors
/// The error of the database.
pub async fn release(tx: &mut Transaction, ids: &[Uuid]) -> Result<(), ReserveError> {
    if ids.is_empty() {
        return Ok(());
    }
    lock(tx, ids).await?;
    let released: Vec<(Uuid, SaleId, String)> = sqlx::query_as(
        "update saga
            set state = 'released', due_at = case when refund_due then clock_timestamp() end
          where reservation_id = any($1)
            and state = 'releasing'
         returning reservation_id, sale_id, ending",
    )
    .bind(ids)
    .fetch_all(&mut **tx)
    .await?;
    let ids: Vec<Uuid> = released.iter().map(|(id, ..)| *id).collect();
    let sales: Vec<SaleId> = released.iter().map(|(_, sale, _)| *sale).collect();
    let endings: Vec<Option<&str>> = released.iter().map(|(.., ending)| Some(ending.as_str())).collect();
    sqlx::query(
        "update reservation
            set status = ending, released_at = clock_timestamp()
           from unnest($1::uuid[], $2::text[]) as released (reservation_id, ending)
          where id = reservation_id",
    )
    .bind(&ids)
    .bind(&endings)
    .execute(&mut **tx)
    .await?;
    sqlx::query(
        "update sale
            set stock = stock + released.count
           from (select sale_id, count(*) from unnest($1::bigint[]) as sale_id group by sale_id) as released
          where id = released.sale_id",
    )
    .bind(&sales)
    .execute(&mut **tx)
    .await?;
    append_events(tx, &ids, &endings).await
}
// ANCHOR_END: release

/// Cancels a hold: the ticket is to be released, and what may have been charged is to be refunded.
/// Returns whether the ticket is being released: because of this call or an earlier one, or because
/// the payment was declined or the hold has ended.
///
/// # Errors
/// The error of the database.
pub async fn cancel(database: &Database, id: Uuid) -> Result<bool, ReserveError> {
    let cancelled = sqlx::query(
        "update saga
            set state = 'releasing',
                ending = 'cancelled',
                refund_due = state = 'charging',
                attempts = 0,
                due_at = clock_timestamp()
          where reservation_id = $1
            and state in ('held', 'charging')",
    )
    .bind(id)
    .execute(database)
    .await?;
    if cancelled.rows_affected() > 0 {
        return Ok(true);
    }
    let releasing: bool =
        sqlx::query_scalar("select exists (select from saga where reservation_id = $1 and state = 'releasing')")
            .bind(id)
            .fetch_one(database)
            .await?;
    Ok(releasing)
}

/// Changes these sagas by a statement that takes their ids. Of none, nothing is sent.
async fn change(tx: &mut Transaction, ids: &[Uuid], statement: &'static str) -> Result<(), ReserveError> {
    if !ids.is_empty() {
        sqlx::query(statement).bind(ids).execute(&mut **tx).await?;
    }
    Ok(())
}

fn milliseconds(time: Duration) -> i64 {
    i64::try_from(time.as_millis()).unwrap_or(i64::MAX)
}
