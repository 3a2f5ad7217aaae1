//! Answers and rows match: nothing lost (I4), nothing invented (I5).

use super::{Cases, Found, is_late};
use crate::{
    history::{Answer, Row},
    judge::history_index::{End, HistoryIndex},
};

/// Checks I4: every confirmation has its row, and every accepted order its final state.
pub(super) fn lost(index: &HistoryIndex<'_>) -> Option<Found> {
    let mut cases = Cases::default();
    for request in &index.history.requests {
        let buyer = request.buyer;
        if let (End::Confirmed(reservation), true) = (request.end(), index.has_rows()) {
            let rows = index.rows_of_reservation(reservation).len();
            if rows != 1 {
                cases.request(request, || {
                    format!("reservation {reservation} was confirmed and has {rows} rows")
                });
                continue;
            }
        }
        if !matches!(request.answer, Answer::Accepted { .. }) {
            continue;
        }
        if request.end() == End::Open {
            cases.request(request, || {
                format!("an order of buyer {buyer} was accepted and never decided")
            });
        } else if is_late(index, request) {
            cases.request(request, || {
                format!("an order of buyer {buyer} was accepted and decided after its deadline")
            });
        } else if request.has_changed() {
            cases.request(request, || {
                format!("the final state of an order of buyer {buyer} changed")
            });
        }
    }
    cases.found("confirmed or accepted orders were lost, decided late, or changed")
}

/// Checks I5: every row has a request that may have created it.
pub(super) fn invented(index: &HistoryIndex<'_>) -> Option<Found> {
    let mut cases = Cases::default();
    for &(order_of_row, row) in index.rows_of_reservation.all().flatten() {
        let Row {
            reservation,
            buyer,
            key,
            ..
        } = row;
        let mut answers = index.answers_of(*reservation).iter();
        let may_have_requested = |order| {
            let mut requests = index.order(order).requests.iter();
            requests.any(|request| request.may_have_made(row))
        };
        if let Some((_, answered)) = answers.find(|(order, _)| Some(*order) != order_of_row) {
            cases.row(row, || {
                format!(
                    "reservation {reservation} was answered to buyer {} under key {}, its row names buyer {buyer} and key {key}",
                    answered.buyer, answered.key
                )
            });
        } else if order_of_row.is_none() {
            cases.row(row, || {
                format!("no request was for reservation {reservation} of buyer {buyer}, key {key}")
            });
        } else if !order_of_row.is_some_and(may_have_requested) {
            cases.row(row, || {
                format!("buyer {buyer} was refused every time under key {key}, and has reservation {reservation}")
            });
        }
    }
    cases.found("rows without a request")
}
