//! The invariants, a function each.

use std::collections::HashMap;

use box_office::{BuyerId, Invariant};
use uuid::Uuid;

use super::{
    Evidence,
    evidence::in_words,
    index::{End, Index, Order},
    verdict::{Coverage, Finding, NotChecked, Tally, Verdict},
};
use crate::history::{Answer, Micros, Refused, Request, Row, Status};

/// What one rule found: how often, in words, and the first case.
struct Found {
    count: u64,
    summary: String,
    evidence: Option<Evidence>,
}

pub(super) fn judge(index: &Index<'_>) -> Verdict {
    use Invariant::{
        Conservation, NoDuplicate, NoFalseRefusal, NoOversell, NoUndersell, NothingInvented, NothingLost, OneAnswer,
        Order, Progress,
    };
    let mut not_checked = vec![NotChecked {
        invariant: Order,
        why: "a history does not tell the order of service",
    }];
    let mut skip = |invariant, why| not_checked.push(NotChecked { invariant, why });
    if index.history.rows.is_none() {
        skip(NothingLost, "the rows could not be read");
        skip(NothingInvented, "the rows could not be read");
    }
    if index.history.rows.is_none() || index.history.header.stock.is_none() {
        skip(
            Conservation,
            "rows or stock could not be read: only what is certain without them was checked",
        );
    }
    if index.has_releases {
        skip(NoUndersell, "tickets were given back");
        skip(
            NoFalseRefusal,
            "tickets were given back: only what is necessary for \"sold out\" was checked",
        );
    }
    if index
        .rows()
        .iter()
        .any(|row| !row.is_live() && row.released_us.is_none())
    {
        skip(NoOversell, "nobody knows until when released tickets were held");
        skip(NoDuplicate, "nobody knows until when released tickets were held");
    }
    if !everybody_knows(index) {
        skip(NoUndersell, "a buyer's last answer is not final");
    }

    let tally = tally(index);
    let rules = [
        (
            NoOversell,
            oversell(index, &tally),
            "Had the second read the stock before the first had committed?",
        ),
        (
            Conservation,
            conservation(index, &tally),
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
            undersell(index, &tally),
            "Who was told no while this ticket was there?",
        ),
        (
            OneAnswer,
            contradictions(index),
            "What does the server know of a key that it has answered before?",
        ),
        (Progress, unfinished(index), "What was this request waiting for?"),
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
    Verdict {
        findings: findings.collect(),
        tally,
        coverage: Coverage {
            requests: index.history.requests.len() as u64,
            greatest_overlap: greatest_overlap(index),
            faults: index.history.faults.len() as u64,
        },
        not_checked,
    }
}

fn tally(index: &Index<'_>) -> Tally {
    let capacity = index.history.header.capacity;
    let mut buyers: Vec<BuyerId> = if index.has_rows() {
        let live = index.rows().iter().filter(|row| row.is_live());
        live.map(|row| row.buyer).collect()
    } else {
        index.told().map(|request| request.buyer).collect()
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

/// I1. With rows: at no moment more of them hold a ticket than there are. Without: nor were more buyers told that they have one.
fn oversell(index: &Index<'_>, tally: &Tally) -> Option<Found> {
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

/// I2. What could not be read may be anything: without rows or stock, only more tickets than there were are certainly wrong.
fn conservation(index: &Index<'_>, tally: &Tally) -> Option<Found> {
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

/// I3. With rows: those that came while their buyer had a live one, or after another under their key.
fn duplicates(index: &Index<'_>) -> Option<Found> {
    if !index.has_rows() {
        return duplicates_told(index);
    }
    let mut too_many: Vec<[&Row; 2]> = vec![];
    for rows in index.rows_of_key.all() {
        too_many.extend(rows.iter().skip(1).map(|row| [rows[0], *row]));
    }
    for rows in index.rows_of_buyer.all() {
        // Of those that came before, the one that is live the longest.
        let mut longest: Option<(Micros, &Row)> = None;
        for &row in rows {
            let Some((from_us, until_us)) = row.held_us() else {
                continue;
            };
            match longest {
                Some((live_until_us, other)) if from_us < live_until_us => too_many.push([other, row]),
                _ => {}
            }
            if longest.is_none_or(|(live_until_us, _)| live_until_us < until_us) {
                longest = Some((until_us, row));
            }
        }
    }
    // A row that is too many for its buyer and for its key is one case, not two.
    too_many.sort_by_key(|[first, row]| (row.taken_us, row.reservation, first.taken_us, first.reservation));
    too_many.dedup_by_key(|[_, row]| std::ptr::from_ref(*row));
    let &[first, second] = too_many.first()?;
    let whose = if first.buyer == second.buyer {
        format!("buyer {}", first.buyer)
    } else {
        format!("key {}", first.key)
    };
    let told: Vec<&Request> = [first, second]
        .iter()
        .filter_map(|row| index.answers_of(row.reservation).first())
        .map(|&(_, request)| request)
        .collect();
    Some(Found {
        count: too_many.len() as u64,
        summary: format!(
            "{} reservations too many for their buyer or key; the first is one of {whose}",
            too_many.len()
        ),
        evidence: Some(match told.len() {
            2 => Evidence::of(&told),
            _ => Evidence::of_rows(&[first, second]),
        }),
    })
}

/// I3, where only the answers are known: what was confirmed stays, so that two are two.
fn duplicates_told(index: &Index<'_>) -> Option<Found> {
    let mut told: Vec<&Request> = index.told().collect();
    let mut too_many: Vec<[&Request; 2]> = vec![];
    told.sort_unstable_by_key(|request| (request.buyer, request.sent_us, request.request));
    for of_buyer in told.chunk_by(|one, other| one.buyer == other.buyer) {
        too_many.extend(of_buyer[1..].iter().map(|request| [of_buyer[0], *request]));
    }
    told.sort_unstable_by(|one, other| {
        (&one.key, one.sent_us, one.request).cmp(&(&other.key, other.sent_us, other.request))
    });
    for of_key in told.chunk_by(|one, other| one.key == other.key) {
        too_many.extend(of_key[1..].iter().map(|request| [of_key[0], *request]));
    }
    too_many.sort_by_key(|[first, second]| (second.sent_us, second.request, first.sent_us, first.request));
    too_many.dedup_by_key(|[_, second]| std::ptr::from_ref(*second));
    let pair = too_many.first()?;
    Some(Found {
        count: too_many.len() as u64,
        summary: format!(
            "buyers were told of {} reservations too many for their buyer or key",
            too_many.len()
        ),
        evidence: Some(Evidence::of(pair)),
    })
}

/// I4.
fn lost(index: &Index<'_>) -> Option<Found> {
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
    cases.found("answers are not what came of them")
}

/// I5.
fn invented(index: &Index<'_>) -> Option<Found> {
    let mut cases = Cases::default();
    for &(asked, row) in index.rows_of_reservation.all().flatten() {
        let Row {
            reservation,
            buyer,
            key,
            ..
        } = row;
        let mut answers = index.answers_of(*reservation).iter();
        let may_have_asked = |order| {
            let mut requests = index.order(order).requests.iter();
            requests.any(|request| request.may_have_made(row))
        };
        if let Some((_, answered)) = answers.find(|(order, _)| Some(*order) != asked) {
            cases.row(row, || {
                format!(
                    "reservation {reservation} was answered to buyer {} under key {}, its row names buyer {buyer} and key {key}",
                    answered.buyer, answered.key
                )
            });
        } else if asked.is_none() {
            cases.row(row, || {
                format!("nobody asked for reservation {reservation} of buyer {buyer}, key {key}")
            });
        } else if !asked.is_some_and(may_have_asked) {
            cases.row(row, || {
                format!("buyer {buyer} was refused every time under key {key}, and has reservation {reservation}")
            });
        }
    }
    cases.found("rows that nobody asked for")
}

/// I6.
fn false_refusals(index: &Index<'_>) -> Option<Found> {
    let takers_us = index.takers_us();
    let unsure_us = unsure_us(index);
    let mut had = HashMap::new();
    let mut cases = Cases::default();
    for order in index.orders() {
        for &request in order.requests {
            let (End::Refused(refused), Some(ended_us)) = (request.end(), request.ended_us()) else {
                continue;
            };
            let is_true = match refused {
                Refused::SoldOut => {
                    let taken = takers_us.partition_point(|&sent_us| sent_us <= ended_us);
                    taken as u64 >= index.history.header.capacity
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
                // A repeat gives an order no new life.
                Refused::Expired => {
                    let passes_us = |expiry_us| order.requests[0].sent_us.saturating_add(expiry_us);
                    let expiry_us = index.history.header.expiry_us;
                    expiry_us.is_some_and(|expiry_us| passes_us(expiry_us) <= ended_us)
                }
                Refused::Declined | Refused::RateLimited => true,
            };
            if !is_true {
                cases.request(request, || {
                    let why_not = match refused {
                        Refused::SoldOut => "not enough others can have taken a ticket by then",
                        Refused::AlreadyReserved { .. } => "the reservation that was named is not the buyer's",
                        Refused::KeyOfAnotherBuyer => "nobody else had sent this key",
                        Refused::Expired => "the order's time was not up",
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

/// From when until when a buyer may have had a reservation, as far as anybody can know. `None`: never.
fn may_have_had(
    index: &Index<'_>,
    order: &Order<'_>,
    reservation: Uuid,
    unsure_us: &[Option<Micros>],
) -> Option<(Micros, Micros)> {
    let buyer = order.requests[0].buyer;
    let answers = index.answers_of(reservation);
    let told = answers.iter().filter(|(_, request)| request.buyer == buyer);
    let told_us = told.filter_map(|(told, _)| index.took_us[*told]);
    let rows = index.rows_of_reservation(reservation).iter();
    let rows: Vec<_> = rows.filter(|(_, row)| row.buyer == buyer).collect();
    let from_us = if index.has_rows() {
        rows.first()?;
        let asked_us = rows.iter().filter_map(|(asked, _)| index.took_us[(*asked)?]);
        // A row that nobody asked for may always have been there.
        told_us.chain(asked_us).min().unwrap_or(0)
    } else {
        // Another request of the buyer may have made it and never been answered.
        told_us.chain(unsure_us[order.buyer]).min()?
    };
    // Row times can't be held against the refusal. But what a buyer was told is over, and is not live, was over by then.
    let is_live = rows.iter().any(|(_, row)| row.is_live());
    let over_us = answers.iter().filter(|(_, request)| request.refused().is_some());
    let over_us = over_us.filter_map(|(_, request)| request.ended_us()).min();
    Some((from_us, over_us.filter(|_| !is_live).unwrap_or(Micros::MAX)))
}

/// For each buyer, when the first request was sent of which nobody can say whether it took a ticket. Rows can say.
fn unsure_us(index: &Index<'_>) -> Vec<Option<Micros>> {
    if index.has_rows() {
        return vec![];
    }
    let first_unsure = |requests: &[&Request]| {
        let first = requests.iter().find(|request| request.is_uncertain());
        first.map(|request| request.sent_us)
    };
    index.requests_of_buyer.all().map(first_unsure).collect()
}

/// I7.
fn undersell(index: &Index<'_>, tally: &Tally) -> Option<Found> {
    if index.has_releases || !everybody_knows(index) {
        return None;
    }
    // Who only ever used another buyer's key never came as far as the tickets.
    let came = |requests: &&[&Request]| {
        let mut finals = requests.iter().filter(|request| request.is_final());
        finals.any(|request| request.end() != End::Refused(&Refused::KeyOfAnotherBuyer))
    };
    let buyers = index.requests_of_buyer.all().filter(came).count() as u64;
    let requests = || index.history.requests.iter();
    // Where rows could not be read, whatever was left undecided may have taken a ticket.
    let unsure = match index.has_rows() {
        true => 0,
        false => requests().filter(|request| request.is_uncertain()).count() as u64,
    };
    let (sold, due) = (tally.sold + unsure, tally.capacity.min(buyers));
    (sold < due).then(|| {
        let sold_out = requests().filter(|request| request.end() == End::Refused(&Refused::SoldOut));
        let first = sold_out.min_by_key(|request| (request.sent_us, request.request));
        Found {
            count: due - sold,
            summary: format!("{sold} sold, and {buyers} buyers came for {} tickets", tally.capacity),
            evidence: first.map(|request| Evidence::of(&[request])),
        }
    })
}

/// Whether every buyer's last answer is final. Of requests that were sent at the same time, each may be the last.
fn everybody_knows(index: &Index<'_>) -> bool {
    index.requests_of_buyer.all().all(|requests| {
        let last_us = requests.last().map(|request| request.sent_us);
        let mut last = requests
            .iter()
            .rev()
            .take_while(|request| Some(request.sent_us) == last_us);
        last.all(|request| request.is_final())
    })
}

/// I9.
fn contradictions(index: &Index<'_>) -> Option<Found> {
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

/// Once a key is confirmed, a later confirmation of it, whoever is told, is of the same reservation.
fn confirmed_otherwise(index: &Index<'_>, orders: &[usize], cases: &mut Cases) {
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
        // The earliest one of another reservation.
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

/// Once an order is confirmed, its buyer is not refused any more.
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

/// The last final answer agrees with the rows. Which one was last may be open: then it is enough that one of them does.
fn last_answer_and_rows(index: &Index<'_>, order: &Order<'_>, cases: &mut Cases) {
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

fn disagrees_with_rows(index: &Index<'_>, order: &Order<'_>, last: &Request) -> bool {
    // Rows match answers by reservation: one that was answered to somebody else is not this order's.
    let of_another = |row: &Row| {
        let mut answers = index.answers_of(row.reservation).iter();
        answers.any(|(answered, _)| *answered != order.number)
    };
    let mut own_rows = index.rows_of(order).iter().filter(|row| !of_another(row));
    match last.end() {
        // A confirmed order without any row is lost, which is another rule's.
        End::Confirmed(reservation) => match index.rows_of_reservation(reservation) {
            [] => own_rows.next().is_some(),
            rows => !last.has_changed() && !rows.iter().any(|(_, row)| row.is_live()),
        },
        End::Refused(refused) => {
            // What stayed undecided may have taken a ticket after the refusal: a later repeat, or any, once tickets came back.
            let mut uncertain = order.requests.iter().filter(|request| request.is_uncertain());
            let taken_since = uncertain.any(|request| index.has_releases || last.sent_us <= request.sent_us);
            let named =
                |row: &Row| matches!(refused, Refused::AlreadyReserved { earlier } if *earlier == row.reservation);
            !taken_since && !last.has_changed() && own_rows.any(|row| row.is_live() && !named(row))
        }
        _ => false,
    }
}

/// I10.
fn unfinished(index: &Index<'_>) -> Option<Found> {
    let faults = &index.history.faults;
    // `None`: something was never healed, which may excuse whoever is undecided.
    let healed_us = faults
        .iter()
        .map(|fault| fault.healed_us)
        .try_fold(0, |latest, healed_us| Some(healed_us?.max(latest)));
    let mut cases = Cases::default();
    for order in index.orders() {
        let first_ended_us = order.requests.iter().filter_map(|request| request.ended_us()).min();
        // The last time at which the buyer was told something final.
        let told_us = order.requests.iter().filter(|request| request.is_settled());
        let told_us = told_us.map(|request| request.ended_us().unwrap_or(Micros::MAX)).max();
        for &request in order.requests {
            let sent_us = request.sent_us;
            let is_repeat = first_ended_us.is_some_and(|ended_us| ended_us < sent_us);
            let was_told = told_us.is_some_and(|told_us| sent_us <= told_us);
            let must_be_told = match healed_us {
                None => false,
                // Nothing struck: nothing excuses silence.
                Some(_) if faults.is_empty() => is_repeat || request.ended_us().is_none(),
                Some(healed_us) => healed_us < sent_us,
            };
            let what = if is_late(index, request) {
                "was answered after the deadline"
            } else if request.end() == End::Unexpected {
                "got an answer that means nothing"
            } else if request.end() == End::Open {
                "was accepted and never told how it ended"
            } else if request.is_uncertain() && must_be_told && !was_told {
                "never got a final answer"
            } else {
                continue;
            };
            cases.request(request, || {
                format!("buyer {} {what} under key {}", request.buyer, request.key)
            });
        }
    }
    cases.found("requests did not come to their end")
}

fn is_late(index: &Index<'_>, request: &Request) -> bool {
    let by_us = request.sent_us.saturating_add(index.history.header.deadline_us);
    request.ended_us().is_some_and(|ended_us| ended_us > by_us)
}

/// What a rule has collected: how many cases, and the first of them.
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

/// Two confirmed requests that overlap as briefly as any: where they were traced, two that had both looked before either had written.
fn conflicting_pair<'a>(index: &Index<'a>) -> Option<[&'a Request; 2]> {
    /// The time a request was inside the server, or, where it was not traced, under way.
    fn inside(request: &Request) -> Option<(Micros, Micros)> {
        match (request.steps.first(), request.steps.last()) {
            (Some(first), Some(last)) => Some((first.at_us, last.at_us)),
            _ => Some((request.sent_us, request.answered_us?)),
        }
    }
    let mut confirmed: Vec<(Micros, Micros, &Request)> = index
        .told()
        .filter_map(|request| inside(request).map(|(from_us, to_us)| (from_us, to_us, request)))
        .collect();
    confirmed.sort_unstable_by_key(|&(from_us, to_us, request)| (from_us, to_us, request.request));
    confirmed
        .windows(2)
        .filter(|pair| pair[1].0 < pair[0].1)
        .min_by_key(|pair| pair[0].1.max(pair[1].1) - pair[0].0)
        .map(|pair| [pair[0].2, pair[1].2])
}

/// How many intervals there are at the same time, at most. One that ends at a time makes room for one that begins at it.
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

/// How many requests were under way at the same time, at most. Here, equal times count as the same time.
fn greatest_overlap(index: &Index<'_>) -> u64 {
    let requests = index.history.requests.iter();
    most_at_once(requests.map(|request| {
        let until_us = request.answered_us.unwrap_or(Micros::MAX);
        (request.sent_us, until_us.saturating_add(1))
    }))
}
