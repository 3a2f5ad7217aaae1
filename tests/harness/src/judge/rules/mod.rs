//! The rules: one function for each invariant, grouped by subject.

mod contradictions;
mod duplicates;
mod lost_and_invented;
mod order;
mod payments;
mod progress;
mod refusals;
mod ticket_count;

use box_office::{BuyerId, Invariant};

use self::{
    contradictions::contradictions,
    duplicates::duplicates,
    lost_and_invented::{invented, lost},
    order::disorder,
    payments::not_paid_once,
    progress::unfinished,
    refusals::false_refusals,
    ticket_count::{conservation, oversell, undersell},
};
use super::{
    Evidence,
    history_index::HistoryIndex,
    verdict::{Coverage, Finding, NotChecked, Tally, Verdict},
};
use crate::history::{Micros, Request, Row};

/// The result of one broken rule: the number of cases, a summary, and the first case.
struct Found {
    count: u64,
    summary: String,
    evidence: Option<Evidence>,
}

/// Checks a history against every invariant.
pub(super) fn judge(index: &HistoryIndex<'_>) -> Verdict {
    let tally = tally(index);
    Verdict {
        findings: findings(index, &tally),
        tally,
        coverage: Coverage {
            requests: index.history.requests.len() as u64,
            greatest_overlap: greatest_overlap(index),
            faults: index.history.faults.len() as u64,
        },
        not_checked: not_checked(index),
    }
}

/// The invariants that can't be checked on this history, or only in part, and why.
fn not_checked(index: &HistoryIndex<'_>) -> Vec<NotChecked> {
    use Invariant::{
        Conservation, NoDuplicate, NoFalseRefusal, NoOversell, NoUndersell, NothingInvented, NothingLost, Order,
        PaidOnce,
    };
    let mut not_checked = vec![];
    let mut skip = |invariant, why| not_checked.push(NotChecked { invariant, why });
    if index.history.decisions.is_none() {
        skip(Order, "a history does not tell the order of service");
    }
    if index.history.rows.is_none() {
        skip(NothingLost, "the rows could not be read");
        skip(NothingInvented, "the rows could not be read");
        if index.history.payments.is_some() {
            skip(PaidOnce, "the rows could not be read");
        }
    }
    if index.history.rows.is_none() || index.history.header.stock.is_none() {
        skip(
            Conservation,
            "rows or stock could not be read: only what is certain without them was checked",
        );
    }
    if index.has_releases {
        skip(
            NoUndersell,
            "tickets were released: only tickets that no release explains were counted",
        );
        skip(
            NoFalseRefusal,
            "tickets were released: only what is necessary for \"sold out\" was checked",
        );
    }
    if index
        .rows()
        .iter()
        .any(|row| !row.is_live() && row.released_us.is_none())
    {
        skip(NoOversell, "the release times of released tickets are unknown");
        skip(NoDuplicate, "the release times of released tickets are unknown");
    }
    if !all_last_answers_final(index) {
        skip(NoUndersell, "a buyer's last answer is not final");
    }
    not_checked
}

/// The broken invariants in the order of their codes, each with a question that leads to the cause.
fn findings(index: &HistoryIndex<'_>, tally: &Tally) -> Vec<Finding> {
    use Invariant::{
        Conservation, NoDuplicate, NoFalseRefusal, NoOversell, NoUndersell, NothingInvented, NothingLost, OneAnswer,
        Order, PaidOnce, Progress,
    };
    let rules = [
        (
            NoOversell,
            oversell(index, tally),
            "Had the second read the stock before the first had committed?",
        ),
        (
            Conservation,
            conservation(index, tally),
            "Is a write missing in the stock, or is there one that its check should have stopped?",
        ),
        (
            NoDuplicate,
            duplicates(index),
            "What did the second request look for, and when was it there to be found?",
        ),
        (
            NothingLost,
            lost(index),
            "What had happened when the buyer was told, and what had not?",
        ),
        (NothingInvented, invented(index), "Who wrote this row, and for whom?"),
        (
            NoFalseRefusal,
            false_refusals(index),
            "What did the server believe when it said no, and where had it read that?",
        ),
        (
            NoUndersell,
            undersell(index, tally),
            "Who was told no while this ticket was there?",
        ),
        (
            Order,
            disorder(index),
            "Which of the two did the consumer see first, and what did it do with it?",
        ),
        (
            OneAnswer,
            contradictions(index),
            "What does the server know of a key that it has answered before?",
        ),
        (Progress, unfinished(index), "What was this request waiting for?"),
        (
            PaidOnce,
            not_paid_once(index),
            "What did the server know of this charge when the order came to its end?",
        ),
    ];
    let findings = rules.into_iter().filter_map(|(invariant, found, question)| {
        let Found {
            count,
            summary,
            evidence,
        } = found?;
        Some(Finding {
            invariant,
            count,
            summary,
            evidence,
            question,
        })
    });
    findings.collect()
}

fn tally(index: &HistoryIndex<'_>) -> Tally {
    let capacity = index.history.header.capacity;
    let mut buyers: Vec<BuyerId> = if index.has_rows() {
        let live = index.rows().iter().filter(|row| row.is_live());
        live.map(|row| row.buyer).collect()
    } else {
        index.confirmed().map(|request| request.buyer).collect()
    };
    let sold = buyers.len() as u64;
    buyers.sort_unstable();
    buyers.dedup();
    Tally {
        capacity,
        sold,
        stock: index.history.header.stock,
        oversold_by: sold.saturating_sub(capacity),
        duplicates: sold - buyers.len() as u64,
    }
}

/// Whether every buyer's last answer is final. Each of several requests sent at the same time may
/// be the last.
fn all_last_answers_final(index: &HistoryIndex<'_>) -> bool {
    index.requests_of_buyer.all().all(|requests| {
        let last_us = requests.last().map(|request| request.sent_us);
        let mut last = requests
            .iter()
            .rev()
            .take_while(|request| Some(request.sent_us) == last_us);
        last.all(|request| request.is_final())
    })
}

fn is_late(index: &HistoryIndex<'_>, request: &Request) -> bool {
    let by_us = request.sent_us.saturating_add(index.history.header.deadline_us);
    request.ended_us().is_some_and(|ended_us| ended_us > by_us)
}

/// The cases that a rule has collected: their number, and the first.
#[derive(Default)]
struct Cases {
    count: u64,
    first: Option<((Micros, u128), String, Evidence)>,
}

impl Cases {
    fn add(&mut self, at: (Micros, u128), case: impl FnOnce() -> (String, Evidence)) {
        self.count += 1;
        if self.first.as_ref().is_none_or(|(first, ..)| at < *first) {
            let (why, evidence) = case();
            self.first = Some((at, why, evidence));
        }
    }

    fn request(&mut self, request: &Request, why: impl FnOnce() -> String) {
        self.add((request.sent_us, request.request.into()), || {
            (why(), Evidence::of(&[request]))
        });
    }

    fn pair(&mut self, earlier: &Request, request: &Request, why: impl FnOnce() -> String) {
        self.add((request.sent_us, request.request.into()), || {
            (why(), Evidence::of(&[earlier, request]))
        });
    }

    fn row(&mut self, row: &Row, why: impl FnOnce() -> String) {
        self.add((row.taken_us, row.reservation.as_u128()), || {
            (why(), Evidence::of_rows(&[row]))
        });
    }

    fn found(self, what: &str) -> Option<Found> {
        let Self { count, first } = self;
        first.map(|(_, why, evidence)| Found {
            count,
            summary: format!("{count} {what}; {why}"),
            evidence: Some(evidence),
        })
    }
}

/// The maximum number of overlapping intervals. Intervals are half-open: one that ends where
/// another begins does not overlap it.
fn most_at_once(intervals: impl Iterator<Item = (Micros, Micros)>) -> u64 {
    let mut edges: Vec<(Micros, i64)> = vec![];
    for (from_us, until_us) in intervals {
        edges.push((from_us, 1));
        edges.push((until_us, -1));
    }
    edges.sort_unstable();
    let (mut now, mut most) = (0_i64, 0_i64);
    for (_, change) in edges {
        now += change;
        most = most.max(now);
    }
    most.unsigned_abs()
}

/// The maximum number of requests in flight. Here, a request that ends where another begins
/// overlaps it.
fn greatest_overlap(index: &HistoryIndex<'_>) -> u64 {
    let requests = index.history.requests.iter();
    most_at_once(requests.map(|request| {
        let until_us = request.answered_us.unwrap_or(Micros::MAX);
        (request.sent_us, until_us.saturating_add(1))
    }))
}
