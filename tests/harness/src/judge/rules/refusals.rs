//! No false refusal (I6).

use std::collections::HashMap;

use uuid::Uuid;

use super::{Cases, Found, most_at_once};
use crate::{
    history::{Micros, Refused, Request, Row},
    judge::{
        evidence::in_words,
        history_index::{End, HistoryIndex, Order},
    },
};

/// Checks I6: every refusal was true at some moment between its request and its answer.
pub(super) fn false_refusals(index: &HistoryIndex<'_>) -> Option<Found> {
    let earliest_effects_us = index.earliest_effects_us();
    let unsure_us = unsure_us(index);
    let was_ever_sold_out = was_ever_sold_out(index);
    let mut had = HashMap::new();
    let mut cases = Cases::default();
    for order in index.orders() {
        for &request in order.requests {
            let (End::Refused(refused), Some(ended_us)) = (request.end(), request.ended_us()) else {
                continue;
            };
            let is_true = match refused {
                Refused::SoldOut => {
                    let taken = earliest_effects_us.partition_point(|&sent_us| sent_us <= ended_us);
                    was_ever_sold_out && taken as u64 >= index.history.header.capacity
                }
                Refused::AlreadyReserved { earlier } => had
                    .entry((order.buyer, *earlier))
                    .or_insert_with(|| may_have_had(index, &order, *earlier, &unsure_us))
                    .is_some_and(|(from_us, until_us)| from_us <= ended_us && request.sent_us <= until_us),
                Refused::KeyOfAnotherBuyer => {
                    let mut orders = index.orders_of_key.of(order.key).iter();
                    let other = orders.find(|other| **other != order.number);
                    other.is_some_and(|&other| index.order(other).requests[0].sent_us <= ended_us)
                }
                Refused::UnknownSale => false,
                Refused::Expired => index.may_have_expired(&order, ended_us),
                Refused::Declined | Refused::Cancelled => index.may_have_ended_unpaid(request),
                // Neither says anything about the sale.
                Refused::RateLimited | Refused::NotVip => true,
            };
            if !is_true {
                cases.request(request, || {
                    let why_not = match refused {
                        Refused::SoldOut => "not enough others can have taken a ticket by then",
                        Refused::AlreadyReserved { .. } => "the reservation that was named is not the buyer's",
                        Refused::KeyOfAnotherBuyer => "no other buyer had sent this key",
                        Refused::Expired => "the order's time was not up",
                        Refused::Declined | Refused::Cancelled => "no ticket was ever held for the order",
                        _ => "there is",
                    };
                    format!(
                        "buyer {} was told {:?}, but {why_not}",
                        request.buyer,
                        in_words(&request.answer)
                    )
                });
            }
        }
    }
    cases.found("refusals were not true")
}

/// Whether all tickets may have been taken at one moment of the database's clock. With releases,
/// that many takers are not enough: they may have had the same ticket one after another.
fn was_ever_sold_out(index: &HistoryIndex<'_>) -> bool {
    if !index.has_rows() || !index.has_releases {
        return true;
    }
    // Equal times count as concurrent, and a ticket released at an unknown time as never released.
    let held = index.rows().iter().map(|row: &Row| {
        let released_us = row.released_us.filter(|_| !row.is_live());
        (row.taken_us, released_us.unwrap_or(Micros::MAX - 1).saturating_add(1))
    });
    most_at_once(held) + index.lost_tickets() >= index.history.header.capacity
}

/// The longest interval in which a buyer may have had a reservation, as far as the history shows.
/// `None`: never.
fn may_have_had(
    index: &HistoryIndex<'_>,
    order: &Order<'_>,
    reservation: Uuid,
    unsure_us: &[Option<Micros>],
) -> Option<(Micros, Micros)> {
    let buyer = order.requests[0].buyer;
    let answers = index.answers_of(reservation);
    let to_buyer = answers.iter().filter(|(_, request)| request.buyer == buyer);
    let answered_us = to_buyer.filter_map(|(order, _)| index.earliest_effect_us[*order]);
    let rows = index.rows_of_reservation(reservation).iter();
    let rows: Vec<_> = rows.filter(|(_, row)| row.buyer == buyer).collect();
    let from_us = if index.has_rows() {
        rows.first()?;
        let requested_us = rows.iter().filter_map(|(order, _)| index.earliest_effect_us[(*order)?]);
        // A row without a request may have existed from the start.
        answered_us.chain(requested_us).min().unwrap_or(0)
    } else {
        // An unanswered request of the buyer may have created it.
        answered_us.chain(unsure_us[order.buyer]).min()?
    };
    // Row times are not comparable with the refusal. But a reservation that was answered as over,
    // and is not live, was over by then.
    let is_live = rows.iter().any(|(_, row)| row.is_live());
    let over_us = answers.iter().filter(|(_, request)| request.refused().is_some());
    let over_us = over_us.filter_map(|(_, request)| request.ended_us()).min();
    Some((from_us, over_us.filter(|_| !is_live).unwrap_or(Micros::MAX)))
}

/// For each buyer, when the first request with unknown outcome was sent. Empty with rows, which
/// show every outcome.
fn unsure_us(index: &HistoryIndex<'_>) -> Vec<Option<Micros>> {
    if index.has_rows() {
        return vec![];
    }
    let first_unsure = |requests: &[&Request]| {
        let first = requests.iter().find(|request| request.is_uncertain());
        first.map(|request| request.sent_us)
    };
    index.requests_of_buyer.all().map(first_unsure).collect()
}
