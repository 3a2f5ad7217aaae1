//! One answer for each request key (I9).

use uuid::Uuid;

use super::{Cases, Found};
use crate::{
    history::{Micros, Refused, Request, Row},
    judge::{
        evidence::in_words,
        history_index::{End, HistoryIndex, Order},
    },
};

/// Checks I9: answers contradict neither an earlier answer nor the rows.
pub(super) fn contradictions(index: &HistoryIndex<'_>) -> Option<Found> {
    let mut cases = Cases::default();
    for orders in index.orders_of_key.all() {
        confirmed_otherwise(index, orders, &mut cases);
    }
    for order in index.orders() {
        refused_after_all(&order, &mut cases);
        if index.has_rows() {
            last_answer_and_rows(index, &order, &mut cases);
        }
    }
    cases.found("answers contradict an earlier one or the rows")
}

/// After a confirmation, every later confirmation under the same key, of any buyer, names the same
/// reservation.
fn confirmed_otherwise(index: &HistoryIndex<'_>, orders: &[usize], cases: &mut Cases) {
    let mut confirmed: Vec<(Micros, Uuid, &Request)> = vec![];
    for &order in orders {
        for &request in index.order(order).requests {
            if let (End::Confirmed(reservation), Some(ended_us)) = (request.end(), request.ended_us()) {
                confirmed.push((ended_us, reservation, request));
            }
        }
    }
    confirmed.sort_unstable_by_key(|(ended_us, _, request)| (*ended_us, request.sent_us, request.request));
    let Some(&first) = confirmed.first() else { return };
    let other = confirmed.iter().find(|(_, reservation, _)| *reservation != first.1);
    let Some(&other) = other else { return };
    for &(_, reservation, request) in &confirmed {
        // The earliest confirmation of another reservation.
        let (known_us, _, earlier) = if reservation == first.1 { other } else { first };
        if known_us < request.sent_us {
            cases.pair(earlier, request, || {
                format!(
                    "buyer {} was confirmed under key {}, and buyer {} later with another reservation",
                    earlier.buyer, earlier.key, request.buyer
                )
            });
        }
    }
}

/// After the confirmation of an order, no later request of it is refused.
fn refused_after_all(order: &Order<'_>, cases: &mut Cases) {
    let confirmed = order.requests.iter().copied();
    let confirmed =
        confirmed.filter(|request| matches!(request.end(), End::Confirmed(_)) && request.ended_us().is_some());
    let Some(first) = confirmed.min_by_key(|request| (request.ended_us(), request.sent_us, request.request)) else {
        return;
    };
    for &request in order.requests {
        if request.is_final() && matches!(request.end(), End::Refused(_)) && first.ended_before(request.sent_us) {
            cases.pair(first, request, || {
                format!(
                    "buyer {} was confirmed under key {}, and later refused",
                    request.buyer, request.key
                )
            });
        }
    }
}

/// The last final answer agrees with the rows. If several concurrent answers may be the last, one
/// that agrees is enough.
fn last_answer_and_rows(index: &HistoryIndex<'_>, order: &Order<'_>, cases: &mut Cases) {
    let finals = || order.requests.iter().copied().filter(|request| request.is_final());
    let Some(last_sent_us) = finals().map(|request| request.sent_us).max() else {
        return;
    };
    let mut last = finals()
        .filter(|request| !request.ended_before(last_sent_us))
        .peekable();
    let Some(&shown) = last.peek() else { return };
    if last.all(|request| disagrees_with_rows(index, order, request)) {
        cases.request(shown, || {
            format!(
                "buyer {} was told {:?} last under key {}, and the rows say otherwise",
                shown.buyer,
                in_words(&shown.answer),
                shown.key
            )
        });
    }
}

fn disagrees_with_rows(index: &HistoryIndex<'_>, order: &Order<'_>, last: &Request) -> bool {
    // Rows match answers by reservation: a row whose reservation was answered to another order is
    // not this order's.
    let of_another = |row: &Row| {
        let mut answers = index.answers_of(row.reservation).iter();
        answers.any(|(answered, _)| *answered != order.number)
    };
    let mut own_rows = index.rows_of(order).iter().filter(|row| !of_another(row));
    match last.end() {
        // A confirmed order without any row breaks I4 instead.
        End::Confirmed(reservation) => match index.rows_of_reservation(reservation) {
            [] => own_rows.next().is_some(),
            rows => !last.has_changed() && !rows.iter().any(|(_, row)| row.is_live()),
        },
        End::Refused(refused) => {
            // A request with unknown outcome may have taken a ticket after the refusal: a later
            // repeat, or any request once tickets were released.
            let mut uncertain = order.requests.iter().filter(|request| request.is_uncertain());
            let taken_since = uncertain.any(|request| index.has_releases || last.sent_us <= request.sent_us);
            let named =
                |row: &Row| matches!(refused, Refused::AlreadyReserved { earlier } if *earlier == row.reservation);
            !taken_since && !last.has_changed() && own_rows.any(|row| row.is_live() && !named(row))
        }
        _ => false,
    }
}
