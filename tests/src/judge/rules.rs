//! The invariants, a function each.

use std::collections::{HashMap, HashSet};

use box_office::{BuyerId, Invariant};
use uuid::Uuid;

use super::{
    Evidence,
    index::{End, Index},
    verdict::{Coverage, Finding, NotChecked, Tally, Verdict},
};
use crate::history::{Answer, Micros, Refused, Request, Row, Status};

/// What one rule found: how often, in words, and the smallest case.
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
        skip(Conservation, "rows or stock could not be read");
    }
    if index.has_releases() {
        skip(NoUndersell, "tickets were given back");
        skip(
            NoFalseRefusal,
            "tickets were given back: only what is necessary for \"sold out\" was checked",
        );
    }
    if !everybody_knows(index) {
        skip(NoUndersell, "a buyer's last answer is not final");
    }

    let tally = tally(index);
    let rules = [
        (
            NoOversell,
            oversell(index, &tally),
            "How many had read the stock before the first of them wrote?",
        ),
        (
            Conservation,
            conservation(index, &tally),
            "Which write left no trace in the stock?",
        ),
        (
            NoDuplicate,
            duplicates(index, &tally),
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
    let sold = match &index.history.rows {
        Some(rows) => rows.iter().filter(|row| row.is_live()).count(),
        None => index.told.len(),
    } as u64;
    let mut live: HashMap<BuyerId, u64> = HashMap::new();
    match &index.history.rows {
        Some(rows) => rows
            .iter()
            .filter(|row| row.is_live())
            .for_each(|row| *live.entry(row.buyer).or_default() += 1),
        None => index
            .told
            .values()
            .for_each(|request| *live.entry(request.buyer).or_default() += 1),
    }
    Tally {
        capacity,
        sold,
        stock: index.history.header.stock,
        oversold_by: sold.saturating_sub(capacity),
        duplicates: live.values().map(|reservations| reservations - 1).sum(),
    }
}

/// I1. With rows: at no moment more of them hold a ticket than there are. Without: nor were more buyers told so.
fn oversell(index: &Index<'_>, tally: &Tally) -> Option<Found> {
    let capacity = tally.capacity;
    let most = most_at_once(
        index
            .rows()
            .iter()
            .filter(|row| row.taken_us <= row.until_us())
            .map(|row| (row.taken_us, row.until_us())),
    );
    let told = if index.has_releases() {
        0
    } else {
        index.told.len() as u64
    };
    let most = most.max(told);
    (most > capacity).then(|| Found {
        count: most - capacity,
        summary: format!("{most} reservations held a ticket at the same time, of {capacity} tickets"),
        evidence: conflicting_pair(index).map(|pair| Evidence::of(&pair)),
    })
}

/// I2.
fn conservation(index: &Index<'_>, tally: &Tally) -> Option<Found> {
    let (Some(stock), Some(rows)) = (tally.stock, &index.history.rows) else {
        return None;
    };
    let held = rows.iter().filter(|row| row.status == Status::Held).count() as u64;
    let sum = i128::from(stock) + i128::from(tally.sold);
    let off = sum.abs_diff(i128::from(tally.capacity));
    let mut wrong = vec![];
    if stock < 0 {
        wrong.push(format!("the stock is {stock}"));
    }
    if off > 0 {
        wrong.push(format!(
            "stock {stock} + {} sold = {sum}, but there were {}",
            tally.sold, tally.capacity
        ));
    } else if tally.sold > tally.capacity && stock >= 0 {
        wrong.push(format!("{} sold of {}", tally.sold, tally.capacity));
    }
    if held > 0 {
        wrong.push(format!("{held} reservations are still held"));
    }
    (!wrong.is_empty()).then(|| Found {
        count: u64::try_from(off).unwrap_or(u64::MAX).max(held).max(1),
        summary: wrong.join("; "),
        evidence: None,
    })
}

/// I3.
fn duplicates(index: &Index<'_>, tally: &Tally) -> Option<Found> {
    let of_a_buyer = index.rows_by_buyer.values().filter(|rows| rows.len() > 1).map(|rows| {
        (
            most_at_once(rows.iter().map(|row| (row.taken_us, row.until_us()))),
            rows,
        )
    });
    let of_a_key = index
        .rows_by_key
        .values()
        .filter(|rows| rows.len() > 1)
        .map(|rows| (rows.len() as u64, rows));
    let too_many: Vec<(u64, &Vec<&Row>)> = of_a_buyer.chain(of_a_key).filter(|(most, _)| *most > 1).collect();
    let count: u64 = too_many.iter().map(|(most, _)| most - 1).sum();
    if let Some((_, rows)) = too_many
        .into_iter()
        .min_by_key(|(_, rows)| (rows.len(), rows[0].taken_us))
    {
        let buyers: HashSet<BuyerId> = rows.iter().map(|row| row.buyer).collect();
        let of = match buyers.len() {
            1 => format!("buyer {} has {} of them", rows[0].buyer, rows.len()),
            _ => format!("key {} has {} of them", rows[0].key, rows.len()),
        };
        let requests: Vec<&Request> = rows
            .iter()
            .filter_map(|row| index.told.get(&row.reservation).copied())
            .take(2)
            .collect();
        return Some(Found {
            count,
            summary: format!("{count} reservations too many for their buyer or key; {of}"),
            evidence: Some(match requests.len() {
                2 => Evidence::of(&requests),
                _ => Evidence::of_rows(&rows[..2]),
            }),
        });
    }
    (index.history.rows.is_none() && tally.duplicates > 0 && !index.has_releases()).then(|| Found {
        count: tally.duplicates,
        summary: format!(
            "buyers were told of {} reservations too many for one each",
            tally.duplicates
        ),
        evidence: None,
    })
}

/// I4.
fn lost(index: &Index<'_>) -> Option<Found> {
    let mut cases: Vec<&Request> = vec![];
    let mut why = String::new();
    for request in &index.history.requests {
        let missing = match request.end() {
            End::Confirmed(reservation) if index.history.rows.is_some() => {
                let rows = index.rows_by_id.get(&reservation).map_or(0, Vec::len);
                (rows != 1).then(|| format!("reservation {reservation} was confirmed and has {rows} rows"))
            }
            End::Open => Some(format!(
                "an order of buyer {} was accepted and never decided",
                request.buyer
            )),
            _ => None,
        };
        let missing = missing.or_else(|| match &request.answer {
            Answer::Accepted {
                ending: Some(ending), ..
            } if ending.changed_to.is_some() => Some(format!(
                "the final state of an order of buyer {} changed",
                request.buyer
            )),
            _ => None,
        });
        if let Some(missing) = missing {
            if cases.is_empty() {
                why = missing;
            }
            cases.push(request);
        }
    }
    found(&cases, "answers are not what the rows say", &why)
}

/// I5.
fn invented(index: &Index<'_>) -> Option<Found> {
    let mut cases: Vec<&Row> = vec![];
    let mut why = String::new();
    for row in index.rows() {
        let order = index.orders.get(&(row.buyer, row.key.as_str()));
        let wrong = match (order, index.told.get(&row.reservation)) {
            (_, Some(request)) if request.buyer != row.buyer || request.key != row.key => Some(format!(
                "reservation {} was confirmed to buyer {} under key {}, its row names buyer {} and key {}",
                row.reservation, request.buyer, request.key, row.buyer, row.key
            )),
            (None, _) => Some(format!(
                "nobody asked for reservation {} of buyer {}, key {}",
                row.reservation, row.buyer, row.key
            )),
            (Some(order), _) if order.requests.iter().all(|request| refused_a_ticket(request)) => Some(format!(
                "buyer {} was refused every time under key {}, and has reservation {}",
                row.buyer, row.key, row.reservation
            )),
            _ => None,
        };
        if let Some(wrong) = wrong {
            if cases.is_empty() {
                why = wrong;
            }
            cases.push(row);
        }
    }
    let first = cases.first()?;
    Some(Found {
        count: cases.len() as u64,
        summary: format!("{} rows that nobody asked for; {why}", cases.len()),
        evidence: Some(Evidence::of_rows(&[first])),
    })
}

/// Whether a request ended with a no, so that no ticket may come of it. An order that ended after it had held a ticket has a row all the same.
fn refused_a_ticket(request: &Request) -> bool {
    matches!(request.end(), End::Refused(refused) if !matches!(refused, Refused::Expired | Refused::Declined))
}

/// I6.
fn false_refusals(index: &Index<'_>) -> Option<Found> {
    let capacity = index.history.header.capacity;
    let takers_us = index.takers_us();
    let mut cases: Vec<&Request> = vec![];
    let mut why = String::new();
    for request in &index.history.requests {
        let (End::Refused(refused), Some(ended_us)) = (request.end(), request.ended_us()) else {
            continue;
        };
        let wrong = match refused {
            Refused::SoldOut => {
                let taken = takers_us.partition_point(|&sent_us| sent_us <= ended_us) as u64;
                (taken < capacity)
                    .then(|| format!("told \"sold out\" when at most {taken} of {capacity} could be taken"))
            }
            Refused::AlreadyReserved { earlier } => {
                (!has_reservation(index, request.buyer, *earlier, ended_us)).then(|| {
                    format!(
                        "told of reservation {earlier}, which buyer {} does not have",
                        request.buyer
                    )
                })
            }
            Refused::KeyOfAnotherBuyer => {
                let buyers = index.buyers_of_key.get(request.key.as_str()).into_iter().flatten();
                let by_another = buyers
                    .into_iter()
                    .any(|&(buyer, first_us)| buyer != request.buyer && first_us <= ended_us);
                (!by_another).then(|| {
                    format!(
                        "told that key {} is another buyer's, and nobody else had sent it",
                        request.key
                    )
                })
            }
            Refused::UnknownSale => Some("told that there is no such sale".to_owned()),
            Refused::Expired => {
                let passed = index
                    .history
                    .header
                    .expiry_us
                    .is_some_and(|expiry_us| ended_us >= request.sent_us.saturating_add(expiry_us));
                (!passed).then(|| "told \"expired\" before its time was up".to_owned())
            }
            Refused::Declined | Refused::RateLimited => None,
        };
        if let Some(wrong) = wrong {
            if cases.is_empty() {
                why = format!("buyer {} was {wrong}", request.buyer);
            }
            cases.push(request);
        }
    }
    found(&cases, "refusals were not true", &why)
}

/// Whether a buyer had the reservation that a refusal names, as far as anybody can know.
fn has_reservation(index: &Index<'_>, buyer: BuyerId, reservation: Uuid, by_us: Micros) -> bool {
    let asked_before = |key: &str| {
        let order = index.orders.get(&(buyer, key));
        order.is_some_and(|order| order.requests.iter().any(|request| request.sent_us <= by_us))
    };
    match &index.history.rows {
        Some(_) => {
            let rows = index.rows_by_id.get(&reservation).into_iter().flatten();
            rows.into_iter().any(|row| row.buyer == buyer && asked_before(&row.key))
        }
        // Another request of the buyer may have made it and never been answered.
        None => match index.told.get(&reservation) {
            // It took the ticket when its key was first sent, and may have been told only on a repeat.
            Some(request) => request.buyer == buyer && asked_before(&request.key),
            None => index.history.requests.iter().any(|request| {
                request.buyer == buyer
                    && request.sent_us <= by_us
                    && matches!(request.end(), End::Undecided | End::Open)
            }),
        },
    }
}

/// I7.
fn undersell(index: &Index<'_>, tally: &Tally) -> Option<Found> {
    if index.has_releases() || !everybody_knows(index) {
        return None;
    }
    let buyers: HashSet<BuyerId> = index.history.requests.iter().map(|request| request.buyer).collect();
    let due = tally.capacity.min(buyers.len() as u64);
    (tally.sold < due).then(|| {
        let refused: Vec<&Request> = index
            .history
            .requests
            .iter()
            .filter(|request| matches!(request.end(), End::Refused(Refused::SoldOut)))
            .take(1)
            .collect();
        Found {
            count: due - tally.sold,
            summary: format!(
                "{} sold, and {} buyers came for {} tickets",
                tally.sold,
                buyers.len(),
                tally.capacity
            ),
            evidence: (!refused.is_empty()).then(|| Evidence::of(&refused)),
        }
    })
}

/// Whether the last answer to every order is final.
fn everybody_knows(index: &Index<'_>) -> bool {
    index
        .orders
        .values()
        .all(|order| last_sent(&order.requests).is_some_and(|request| request.is_final()))
}

fn last_sent<'a>(requests: &[&'a Request]) -> Option<&'a Request> {
    requests.iter().copied().max_by_key(|request| request.sent_us)
}

/// I9.
fn contradictions(index: &Index<'_>) -> Option<Found> {
    let mut cases: Vec<&Request> = vec![];
    let mut pair: Option<(&Request, &Request)> = None;
    let mut why = String::new();
    for ((buyer, key), order) in &index.orders {
        // The first confirmation, by when the client had it: what is sent after that must agree.
        let confirmed = order
            .requests
            .iter()
            .filter_map(|request| match (request.end(), request.ended_us()) {
                (End::Confirmed(reservation), Some(ended_us)) => Some((ended_us, reservation, *request)),
                _ => None,
            })
            .min_by_key(|(ended_us, ..)| *ended_us);
        if let Some((known_us, reservation, first)) = confirmed {
            for request in order
                .requests
                .iter()
                .filter(|request| request.sent_us > known_us && request.is_final())
            {
                let same = matches!(request.end(), End::Confirmed(other) if other == reservation);
                if !same {
                    if pair.is_none() {
                        why = format!("buyer {buyer} was confirmed under key {key}, and later told otherwise");
                        pair = Some((first, request));
                    }
                    cases.push(request);
                }
            }
        }
        // The last final answer agrees with the rows, unless something that is still undecided may have come after it.
        let all_final = order
            .requests
            .iter()
            .all(|request| request.is_final() || request.is_refused_by_the_door());
        let mut finals: Vec<&&Request> = order.requests.iter().filter(|request| request.is_final()).collect();
        finals.sort_by_key(|request| request.ended_us());
        if let (true, Some(last), Some(_)) = (all_final, finals.last(), &index.history.rows)
            && matches!(last.end(), End::Refused(_))
            && !finals
                .iter()
                .any(|request| request.ended_us() >= Some(last.sent_us) && matches!(request.end(), End::Confirmed(_)))
            && index
                .rows_by_key
                .get(key)
                .into_iter()
                .flatten()
                .any(|row| row.buyer == *buyer && row.is_live())
            && confirmed.is_some()
            && !cases.iter().any(|case| std::ptr::eq(*case, **last))
        {
            if pair.is_none() {
                why = format!("buyer {buyer} was refused last under key {key}, and has a reservation under it");
            }
            cases.push(last);
        }
    }
    let mut found = found(&cases, "answers contradict an earlier one", &why)?;
    if let Some((first, second)) = pair {
        found.evidence = Some(Evidence::of(&[first, second]));
    }
    Some(found)
}

/// I10.
fn unfinished(index: &Index<'_>) -> Option<Found> {
    let deadline_us = index.history.header.deadline_us;
    // A fault that was never healed may excuse whoever is undecided.
    let healed_us = index
        .history
        .faults
        .iter()
        .map(|fault| fault.healed_us)
        .try_fold(0, |latest, healed_us| Some(healed_us?.max(latest)));
    let mut cases: Vec<&Request> = vec![];
    let mut why = String::new();
    for order in index.orders.values() {
        let last = last_sent(&order.requests);
        for &request in &order.requests {
            let late = request
                .ended_us()
                .is_some_and(|ended_us| ended_us > request.sent_us.saturating_add(deadline_us));
            let open = matches!(request.end(), End::Open);
            let never_told = last.is_some_and(|last| std::ptr::eq(last, request))
                && !request.is_final()
                && healed_us.is_some_and(|healed_us| request.sent_us >= healed_us);
            if late || open || never_told {
                if cases.is_empty() {
                    let what = if late {
                        "was answered after its deadline"
                    } else {
                        "never got a final answer"
                    };
                    why = format!("buyer {} {what} under key {}", request.buyer, request.key);
                }
                cases.push(request);
            }
        }
    }
    found(&cases, "requests did not come to their end", &why)
}

fn found(cases: &[&Request], what: &str, first: &str) -> Option<Found> {
    let smallest = cases.iter().min_by_key(|request| (request.sent_us, request.request))?;
    Some(Found {
        count: cases.len() as u64,
        summary: format!("{} {what}; {first}", cases.len()),
        evidence: Some(Evidence::of(&[smallest])),
    })
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
        .told
        .values()
        .filter_map(|request| inside(request).map(|(from_us, to_us)| (from_us, to_us, *request)))
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

fn greatest_overlap(index: &Index<'_>) -> u64 {
    let requests = &index.history.requests;
    most_at_once(
        requests
            .iter()
            .map(|request| (request.sent_us, request.answered_us.unwrap_or(Micros::MAX))),
    )
}
