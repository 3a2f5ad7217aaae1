//! Order of service (I8), by the record of offsets.

use std::collections::HashMap;

use uuid::Uuid;

use super::{Cases, Found};
use crate::{
    history::{Decision, Micros, Request},
    judge::{Evidence, history_index::HistoryIndex},
};

/// An order that was decided.
struct Decided<'a> {
    decision: &'a Decision,
    /// The request whose sending came first.
    first: &'a Request,
    /// When it was accepted, if that is certain to be in this queue: it was sent once.
    accepted_us: Option<Micros>,
}

/// Checks I8: in each queue, orders are decided in the order of their offsets, and the offsets are
/// in the order in which the orders were accepted.
pub(super) fn disorder(index: &HistoryIndex<'_>) -> Option<Found> {
    let mut queues: HashMap<(&str, i32), Vec<&Decision>> = HashMap::new();
    for decision in index.history.decisions.iter().flatten() {
        let queue = (decision.topic.as_str(), decision.partition);
        queues.entry(queue).or_default().push(decision);
    }
    let mut cases = Cases::default();
    for decisions in queues.values_mut() {
        decisions.sort_unstable_by_key(|decision| decision.number);
        decided_before_earlier_ones(index, decisions, &mut cases);
        overtaken_on_the_way(index, decisions, &mut cases);
    }
    cases.found("orders were not served in turn")
}

/// Orders whose offset is lower than that of one decided before them.
fn decided_before_earlier_ones(index: &HistoryIndex<'_>, decisions: &[&Decision], cases: &mut Cases) {
    for pair in decisions.windows(2) {
        let [before, after] = pair else { continue };
        if before.offset < after.offset {
            continue;
        }
        let at = (after.number, after.reservation.as_u128());
        cases.add(at, || {
            let requests = [after, before].map(|decision| first_request(index, decision.reservation));
            let why = format!(
                "offset {} of {} was decided after offset {}",
                after.offset, after.topic, before.offset
            );
            (why, Evidence::of(&requests.into_iter().flatten().collect::<Vec<_>>()))
        });
    }
}

/// Orders that have a lower offset than one which was accepted before they were sent.
fn overtaken_on_the_way(index: &HistoryIndex<'_>, decisions: &[&Decision], cases: &mut Cases) {
    let decided = decisions.iter().filter_map(|decision| {
        let (order, request) = *index.answers_of(decision.reservation).first()?;
        let order = index.order(order);
        Some(Decided {
            decision,
            first: order.requests[0],
            accepted_us: request.answered_us.filter(|_| order.requests.len() == 1),
        })
    });
    let by_sending = |decided: &Decided<'_>| (decided.first.sent_us, decided.first.request);
    let mut sent: Vec<Decided<'_>> = decided.collect();
    sent.sort_unstable_by_key(by_sending);
    let mut accepted: Vec<(Micros, &Decided<'_>)> = sent
        .iter()
        .filter_map(|decided| Some((decided.accepted_us?, decided)))
        .collect();
    accepted.sort_unstable_by_key(|&(accepted_us, decided)| (accepted_us, decided.first.request));

    let mut accepted = accepted.into_iter().peekable();
    let mut last: Option<&Decided<'_>> = None;
    for later in &sent {
        while let Some((_, earlier)) = accepted.next_if(|&(accepted_us, _)| accepted_us < later.first.sent_us) {
            if last.is_none_or(|last| last.decision.offset < earlier.decision.offset) {
                last = Some(earlier);
            }
        }
        let Some(earlier) = last.filter(|last| last.decision.offset > later.decision.offset) else {
            continue;
        };
        cases.pair(earlier.first, later.first, || {
            format!(
                "buyer {} had been accepted when buyer {} sent the order, and was served later",
                earlier.first.buyer, later.first.buyer
            )
        });
    }
}

/// The request that was sent first of those which this reservation was answered to.
fn first_request<'a>(index: &'a HistoryIndex<'_>, reservation: Uuid) -> Option<&'a Request> {
    index.answers_of(reservation).first().map(|&(_, request)| request)
}
