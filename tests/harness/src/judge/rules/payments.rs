//! Money (I11): every ticket is paid for once, every other charge is refunded.

use super::{Cases, Found};
use crate::{
    history::{Entry, Payment, Row, Status},
    judge::{Evidence, history_index::HistoryIndex},
};

/// Checks I11: of each reservation, the charges minus the refunds are 1 if it has a ticket for
/// good, otherwise 0. Of a reservation that is still held they may be either.
pub(super) fn not_paid_once(index: &HistoryIndex<'_>) -> Option<Found> {
    if index.history.payments.is_none() || !index.has_rows() {
        return None;
    }
    let mut cases = Cases::default();
    for (rows, payments) in index.rows_and_payments() {
        let refunds = payments.iter().filter(|payment| payment.entry == Entry::Refund).count();
        let charges = payments.len() - refunds;
        let has = |status| rows.iter().any(|(_, row)| row.status == status);
        let is_right = if has(Status::Confirmed) {
            charges == refunds + 1
        } else if has(Status::Held) {
            refunds <= charges && charges <= refunds + 1
        } else {
            charges == refunds
        };
        if is_right {
            continue;
        }
        let row: Option<&Row> = rows.first().map(|(_, row)| *row);
        let payment: Option<&Payment> = payments.first().copied();
        let named = payment.map(|payment| payment.reservation);
        let Some(reservation) = named.or(row.map(|row| row.reservation)) else {
            continue;
        };
        cases.add((row.map_or(0, |row| row.taken_us), reservation.as_u128()), || {
            let state = match row.map(|row| row.status) {
                None => "never had a ticket",
                Some(Status::Confirmed) => "has a ticket",
                Some(Status::Held) => "is held",
                Some(Status::Released) => "was released",
            };
            let answer = index.answers_of(reservation).first();
            let evidence = match answer {
                Some((_, request)) => Evidence::of(&[request]),
                None => Evidence::of_rows(row.as_slice()),
            };
            let why = format!("reservation {reservation} {state}: {charges} charges, {refunds} refunds");
            (why, evidence)
        });
    }
    cases.found("reservations whose charges minus refunds do not match their state")
}
