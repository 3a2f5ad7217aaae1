//! Progress (I10): every request ends within its deadline.

use super::{Cases, Found, is_late};
use crate::{
    history::Micros,
    judge::history_index::{End, HistoryIndex},
};

/// Checks I10: every request ends within its deadline, with a final answer.
pub(super) fn unfinished(index: &HistoryIndex<'_>) -> Option<Found> {
    let faults = &index.history.faults;
    // `None`: a fault was never healed, which may excuse any unknown outcome.
    let healed_us = faults
        .iter()
        .map(|fault| fault.healed_us)
        .try_fold(0, |latest, healed_us| Some(healed_us?.max(latest)));
    let mut cases = Cases::default();
    for order in index.orders() {
        let first_ended_us = order.requests.iter().filter_map(|request| request.ended_us()).min();
        // The last time at which the buyer received a final answer.
        let settled_us = order.requests.iter().filter(|request| request.is_settled());
        let settled_us = settled_us
            .map(|request| request.ended_us().unwrap_or(Micros::MAX))
            .max();
        for &request in order.requests {
            let sent_us = request.sent_us;
            let is_repeat = first_ended_us.is_some_and(|ended_us| ended_us < sent_us);
            let was_settled = settled_us.is_some_and(|settled_us| sent_us <= settled_us);
            // A fault excuses every request that was sent before it was healed.
            let is_excused = healed_us.is_none_or(|healed_us| !faults.is_empty() && sent_us <= healed_us);
            let must_be_settled = !is_excused && (is_repeat || !faults.is_empty());
            let what = if is_late(index, request) {
                "was answered after the deadline"
            } else if request.end() == End::Unexpected {
                "got an answer outside the HTTP contract"
            } else if request.end() == End::Open {
                "was accepted and never got its final state"
            } else if request.is_uncertain() && request.ended_us().is_none() && !is_excused {
                "never got an answer"
            } else if request.is_uncertain() && must_be_settled && !was_settled {
                "never got a final answer"
            } else {
                continue;
            };
            cases.request(request, || {
                format!("buyer {} {what} under key {}", request.buyer, request.key)
            });
        }
    }
    cases.found("requests missed their deadline or got no final answer")
}
