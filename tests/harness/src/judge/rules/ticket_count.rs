//! The count of tickets: no oversell (I1), conservation (I2), no undersell (I7).

use super::{Found, all_last_answers_final, most_at_once};
use crate::{
    history::{Micros, Refused, Request, Row, Status},
    judge::{
        Evidence,
        history_index::{End, HistoryIndex, Order},
        verdict::Tally,
    },
};

/// Checks I1. With rows: at every moment, no more rows hold a ticket than there are tickets.
/// Without rows: no more confirmations than tickets.
pub(super) fn oversell(index: &HistoryIndex<'_>, tally: &Tally) -> Option<Found> {
    let capacity = tally.capacity;
    let most = if index.has_rows() {
        most_at_once(index.rows().iter().filter_map(Row::held_us))
    } else {
        tally.sold
    };
    (most > capacity).then(|| Found {
        count: most - capacity,
        summary: format!("{most} reservations held a ticket at the same time, of {capacity} tickets"),
        evidence: conflicting_pair(index).map(|pair| Evidence::of(&pair)),
    })
}

/// Checks I2. Without rows or stock, only a sum above the number of tickets is certainly wrong.
pub(super) fn conservation(index: &HistoryIndex<'_>, tally: &Tally) -> Option<Found> {
    let Tally {
        capacity, sold, stock, ..
    } = *tally;
    let held = index.rows().iter().filter(|row| row.status == Status::Held).count() as u64;
    let all_known = index.has_rows() && stock.is_some();
    let left = stock.unwrap_or(0);
    let sum = i128::from(if all_known { left } else { left.max(0) }) + i128::from(sold);
    let off = sum - i128::from(capacity);
    let mut wrong = vec![];
    if left < 0 {
        wrong.push(format!("the stock is {left}"));
    }
    if all_known && off != 0 {
        wrong.push(format!("stock {left} + {sold} sold = {sum}, but there were {capacity}"));
    } else if off > 0 {
        wrong.push(format!(
            "at least {sum} tickets are sold or left, but there were {capacity}"
        ));
    }
    if held > 0 {
        wrong.push(format!("{held} reservations are still held"));
    }
    (!wrong.is_empty()).then(|| Found {
        count: u64::try_from(off.unsigned_abs()).unwrap_or(u64::MAX).max(held).max(1),
        summary: wrong.join("; "),
        evidence: None,
    })
}

/// Checks I7: no ticket is left while a buyer goes without. With releases: no more tickets are left
/// than were released, because each may have been released after the last buyer had sent a request.
pub(super) fn undersell(index: &HistoryIndex<'_>, tally: &Tally) -> Option<Found> {
    if (index.has_releases && !index.has_rows()) || !all_last_answers_final(index) {
        return None;
    }
    // A buyer who only used another buyer's key, claimed a priority, or did not get to the end in time, may go without.
    // An order that is said to have expired before its time is no excuse, nor is one that is said to be
    // declined and never held a ticket.
    let goes_without = |order: &Order<'_>, request: &Request| match request.end() {
        End::Refused(Refused::KeyOfAnotherBuyer | Refused::NotVip) => true,
        End::Refused(Refused::Declined | Refused::Cancelled) => index.may_have_ended_unpaid(request),
        End::Refused(Refused::Expired) => {
            let ended_us = request.ended_us();
            ended_us.is_none_or(|ended_us| index.may_have_expired(order, ended_us))
        }
        _ => false,
    };
    let came = |order: &Order<'_>| {
        let mut finals = order.requests.iter().filter(|request| request.is_final());
        finals.any(|request| !goes_without(order, request))
    };
    let mut buyers: Vec<usize> = index.orders().filter(came).map(|order| order.buyer).collect();
    buyers.sort_unstable();
    buyers.dedup();
    let buyers = buyers.len() as u64;
    let requests = || index.history.requests.iter();
    // Without rows, every unknown outcome may have taken a ticket.
    let unsure = match index.has_rows() {
        true => 0,
        false => requests().filter(|request| request.is_uncertain()).count() as u64,
    };
    let released = index.rows().iter().filter(|row| !row.is_live()).count() as u64;
    let (sold, due) = (tally.sold + unsure + released, tally.capacity.min(buyers));
    (sold < due).then(|| {
        let sold_out = requests().filter(|request| request.end() == End::Refused(&Refused::SoldOut));
        let first = sold_out.min_by_key(|request| (request.sent_us, request.request));
        Found {
            count: due - sold,
            summary: format!(
                "{} sold, and {buyers} buyers came for {} tickets",
                sold - released,
                tally.capacity
            ),
            evidence: first.map(|request| Evidence::of(&[request])),
        }
    })
}

/// The two confirmed requests with the shortest overlap. If traced, typically two that had both
/// read before either wrote.
fn conflicting_pair<'a>(index: &HistoryIndex<'a>) -> Option<[&'a Request; 2]> {
    /// The time of a request inside the server; if it was not traced, from sent to answered.
    fn inside(request: &Request) -> Option<(Micros, Micros)> {
        match (request.steps.first(), request.steps.last()) {
            (Some(first), Some(last)) => Some((first.at_us, last.at_us)),
            _ => Some((request.sent_us, request.answered_us?)),
        }
    }
    let mut confirmed: Vec<(Micros, Micros, &Request)> = index
        .confirmed()
        .filter_map(|request| inside(request).map(|(from_us, to_us)| (from_us, to_us, request)))
        .collect();
    confirmed.sort_unstable_by_key(|&(from_us, to_us, request)| (from_us, to_us, request.request));
    confirmed
        .windows(2)
        .filter(|pair| pair[1].0 < pair[0].1)
        .min_by_key(|pair| pair[0].1.max(pair[1].1) - pair[0].0)
        .map(|pair| [pair[0].2, pair[1].2])
}
