//! The second judge: a direct translation of the definitions, without indexes.

use std::{collections::BTreeSet, ops::RangeInclusive};

use box_office::{
    BuyerId,
    Invariant::{
        self, Conservation, NoDuplicate, NoFalseRefusal, NoOversell, NoUndersell, NothingInvented, NothingLost,
        OneAnswer, PaidOnce, Progress,
    },
};
use harness::history::{
    Answer, Ending, Entry, History, Micros,
    Refused::{
        self, AlreadyReserved, Cancelled, Declined, Expired, KeyOfAnotherBuyer, NotVip, RateLimited, SoldOut,
        UnknownSale,
    },
    Request, Row, Status,
};
use uuid::Uuid;

type Rule = fn(&History) -> bool;

pub(crate) fn broken(history: &History) -> BTreeSet<&'static str> {
    let rules: [(Invariant, Rule); 10] = [
        (NoOversell, oversold),
        (Conservation, not_conserved),
        (NoDuplicate, duplicated),
        (NothingLost, lost),
        (NothingInvented, invented),
        (NoFalseRefusal, falsely_refused),
        (NoUndersell, undersold),
        (OneAnswer, contradicted),
        (Progress, unfinished),
        (PaidOnce, not_paid_once),
    ];
    let broken = rules.iter().filter(|(_, is_broken)| is_broken(history));
    broken.map(|(invariant, _)| invariant.code()).collect()
}

fn endings(request: &Request) -> Vec<&Ending> {
    let mut endings = vec![];
    if let Answer::Accepted { ending, .. } = &request.answer {
        let mut next = ending.as_ref();
        while let Some(ending) = next {
            endings.push(ending);
            next = ending.changed_to.as_deref();
        }
    }
    endings
}

fn changed(request: &Request) -> bool {
    endings(request).windows(2).any(|two| two[0].refused != two[1].refused)
}

fn yes(request: &Request) -> Option<Uuid> {
    match &request.answer {
        Answer::Confirmed { reservation } => Some(*reservation),
        Answer::Accepted { reservation, .. } if endings(request).first()?.refused.is_none() => Some(*reservation),
        _ => None,
    }
}

fn no(request: &Request) -> Option<&Refused> {
    match &request.answer {
        Answer::Refused(refused) => Some(refused),
        Answer::Accepted { .. } => endings(request).first()?.refused.as_ref(),
        _ => None,
    }
}

/// Refused in every observed state.
fn only_no(request: &Request) -> bool {
    no(request).is_some() && endings(request).iter().all(|ending| ending.refused.is_some())
}

fn end_us(request: &Request) -> Option<Micros> {
    match &request.answer {
        Answer::Accepted { .. } => endings(request).first().map(|ending| ending.at_us),
        _ => request.answered_us,
    }
}

fn is_final(request: &Request) -> bool {
    yes(request).is_some() || no(request).is_some_and(|refused| *refused != RateLimited)
}

fn is_indeterminate(request: &Request) -> bool {
    yes(request).is_none() && no(request).is_none()
}

fn own_id(request: &Request) -> Option<Uuid> {
    match &request.answer {
        Answer::Confirmed { reservation } | Answer::Accepted { reservation, .. } => Some(*reservation),
        _ => None,
    }
}

/// The second was sent after the answer to the first was received.
fn later(first: &Request, second: &Request) -> bool {
    end_us(first).is_some_and(|end_us| second.sent_us > end_us)
}

fn same_order(one: &Request, other: &Request) -> bool {
    one.buyer == other.buyer && one.key == other.key
}

fn asks_for(request: &Request, row: &Row) -> bool {
    request.buyer == row.buyer && request.key == row.key
}

fn live(row: &Row) -> bool {
    row.status != Status::Released
}

/// Whether a row holds a ticket just after this moment of the database's clock.
fn holds(row: &Row, at_us: Micros) -> bool {
    let released = match (row.status, row.released_us) {
        (Status::Released, None) => true,
        (Status::Released, Some(released_us)) => at_us >= released_us,
        _ => false,
    };
    row.taken_us <= at_us && !released
}

fn rows(history: &History) -> &[Row] {
    history.rows.as_deref().unwrap_or(&[])
}

fn moments(history: &History) -> RangeInclusive<Micros> {
    0..=rows(history).iter().map(|row| row.taken_us).max().unwrap_or(0)
}

/// Refused after it may have held a ticket.
fn ran_out(request: &Request) -> bool {
    only_no(request) && matches!(no(request), Some(Expired | Declined | Cancelled))
}

/// Whether a ticket was released; without rows, whether one may have been.
fn releases(history: &History) -> bool {
    match &history.rows {
        Some(rows) => rows.iter().any(|row| !live(row)),
        None => history.requests.iter().any(ran_out),
    }
}

fn accepted(request: &Request) -> bool {
    matches!(request.answer, Answer::Accepted { .. })
}

/// Whether a request may have taken a ticket, and released it if it was refused.
fn may_have_taken(history: &History, request: &Request) -> bool {
    !only_no(request) || (releases(history) && (accepted(request) || ran_out(request)))
}

/// The stable confirmations, one for each reservation.
fn stable_confirmations(history: &History) -> Vec<(Uuid, &Request)> {
    let mut confirmations: Vec<(Uuid, &Request)> = vec![];
    let mut requests: Vec<&Request> = history.requests.iter().collect();
    requests.sort_by_key(|request| (request.sent_us, request.request));
    for request in requests {
        if let Some(id) = yes(request)
            && !changed(request)
            && confirmations.iter().all(|(other, _)| *other != id)
        {
            confirmations.push((id, request));
        }
    }
    confirmations
}

/// The number of reservations at quiescence; without rows, a lower bound.
fn sold(history: &History) -> u64 {
    match &history.rows {
        Some(rows) => rows.iter().filter(|row| live(row)).count() as u64,
        None => stable_confirmations(history).len() as u64,
    }
}

fn oversold(history: &History) -> bool {
    let capacity = history.header.capacity;
    if history.rows.is_none() {
        return sold(history) > capacity;
    }
    moments(history).any(|at_us| rows(history).iter().filter(|row| holds(row, at_us)).count() as u64 > capacity)
}

fn not_conserved(history: &History) -> bool {
    let capacity = history.header.capacity as i64;
    let sold = sold(history) as i64;
    let held = rows(history).iter().any(|row| row.status == Status::Held);
    let wrong = match (history.header.stock, &history.rows) {
        (Some(stock), Some(_)) => stock < 0 || stock + sold != capacity,
        (Some(stock), None) => stock < 0 || stock + sold > capacity,
        (None, _) => sold > capacity,
    };
    wrong || held
}

fn duplicated(history: &History) -> bool {
    if history.rows.is_none() {
        let confirmations = stable_confirmations(history);
        return confirmations.iter().any(|(id, one)| {
            confirmations
                .iter()
                .any(|(other_id, other)| id != other_id && (one.buyer == other.buyer || one.key == other.key))
        });
    }
    let rows = rows(history);
    (0..rows.len()).any(|one| {
        (0..one).any(|other| {
            let (one, other) = (&rows[one], &rows[other]);
            let both_live = || moments(history).any(|at_us| holds(one, at_us) && holds(other, at_us));
            one.key == other.key || (one.buyer == other.buyer && both_live())
        })
    })
}

fn lost(history: &History) -> bool {
    history.requests.iter().any(|request| {
        let no_single_row = yes(request).is_some_and(|id| {
            history.rows.is_some() && rows(history).iter().filter(|row| row.reservation == id).count() != 1
        });
        let by_us = request.sent_us + history.header.deadline_us;
        no_single_row || changed(request) || (accepted(request) && end_us(request).is_none_or(|end_us| end_us > by_us))
    })
}

fn invented(history: &History) -> bool {
    rows(history).iter().any(|row| {
        let mut of_another = history
            .requests
            .iter()
            .filter(|request| own_id(request) == Some(row.reservation));
        let of_another = of_another.any(|request| !asks_for(request, row));
        let mut requests = history.requests.iter().filter(|request| asks_for(request, row));
        let rightly =
            requests.any(|request| !only_no(request) || ((accepted(request) || ran_out(request)) && !live(row)));
        of_another || !rightly
    })
}

/// The earliest time at which each ticket can have been taken. A refused request takes none. With
/// rows, an accepted order whose reservation has none takes none.
fn takers(history: &History) -> Vec<Micros> {
    let mut takers = vec![];
    let requests = &history.requests;
    for (at, request) in requests.iter().enumerate() {
        if history.rows.is_none() && is_indeterminate(request) {
            takers.push(request.sent_us);
        }
        if requests[..at].iter().any(|earlier| same_order(earlier, request)) {
            continue;
        }
        let order: Vec<&Request> = requests.iter().filter(|other| same_order(request, other)).collect();
        let takes = order.iter().filter(|request| may_have_taken(history, request));
        let Some(first_us) = takes.map(|request| request.sent_us).min() else {
            continue;
        };
        let own = rows(history).iter().filter(|row| asks_for(request, row));
        let mut taken: Vec<Uuid> = own.map(|row| row.reservation).collect();
        for &request in &order {
            let Some(id) = yes(request) else { continue };
            let has_row = rows(history).iter().any(|row| row.reservation == id);
            let may_have_held = history.rows.is_none() || has_row || !accepted(request);
            if may_have_held && !taken.contains(&id) {
                taken.push(id);
            }
        }
        takers.extend(taken.iter().map(|_| first_us));
        if history.rows.is_none() && taken.is_empty() && order.iter().any(|request| ran_out(request)) {
            takers.push(first_us);
        }
    }
    takers
}

/// Whether every ticket may have been taken at one moment of the database's clock.
fn all_taken_once(history: &History) -> bool {
    if history.rows.is_none() || !releases(history) {
        return true;
    }
    let mut lost: Vec<Uuid> = vec![];
    for request in &history.requests {
        if let Answer::Confirmed { reservation } = request.answer
            && !lost.contains(&reservation)
            && rows(history).iter().all(|row| row.reservation != reservation)
        {
            lost.push(reservation);
        }
    }
    let most = moments(history).map(|at_us| {
        let may_hold = |row: &&Row| {
            let over = !live(row) && row.released_us.is_some_and(|released_us| released_us < at_us);
            row.taken_us <= at_us && !over
        };
        rows(history).iter().filter(may_hold).count()
    });
    (most.max().unwrap_or(0) + lost.len()) as u64 >= history.header.capacity
}

fn falsely_refused(history: &History) -> bool {
    let takers = takers(history);
    let all_taken_once = all_taken_once(history);
    history.requests.iter().any(|request| {
        let (Some(refused), Some(end_us)) = (no(request), end_us(request)) else {
            return false;
        };
        let is_true_at = |at_us: Micros| match refused {
            SoldOut if !all_taken_once => false,
            SoldOut => takers.iter().filter(|sent_us| **sent_us <= at_us).count() as u64 >= history.header.capacity,
            AlreadyReserved { earlier } => had(history, request.buyer, *earlier, at_us),
            KeyOfAnotherBuyer => history
                .requests
                .iter()
                .any(|other| other.key == request.key && other.buyer != request.buyer && other.sent_us <= at_us),
            UnknownSale => false,
            Expired => history.header.expiry_us.is_some_and(|expiry_us| {
                let mut order = history.requests.iter().filter(|other| same_order(request, other));
                order.any(|other| at_us >= other.sent_us + expiry_us)
            }),
            Declined | Cancelled => may_be_unpaid(history, request),
            RateLimited | NotVip => true,
        };
        !(request.sent_us..=end_us).any(is_true_at)
    })
}

/// Whether a buyer can have had this reservation at this moment of the clients' clock.
fn had(history: &History, buyer: BuyerId, id: Uuid, at_us: Micros) -> bool {
    let own: Vec<&Row> = rows(history)
        .iter()
        .filter(|row| row.reservation == id && row.buyer == buyer)
        .collect();
    let told_of_it = |request: &Request| own_id(request) == Some(id) && request.buyer == buyer;
    let over = history.requests.iter().any(|request| {
        own_id(request) == Some(id) && only_no(request) && end_us(request).is_some_and(|end_us| end_us < at_us)
    });
    if over && !own.iter().any(|row| live(row)) {
        return false;
    }
    // A request may have created it if it was not refused, and its order is named by the answers or
    // the row.
    let may_have_made = |maker: &Request| {
        let named = history
            .requests
            .iter()
            .any(|request| told_of_it(request) && same_order(request, maker))
            || own.iter().any(|row| asks_for(maker, row));
        let unsure = history.rows.is_none() && maker.buyer == buyer && is_indeterminate(maker);
        (named && may_have_taken(history, maker)) || unsure
    };
    let mut makers = history
        .requests
        .iter()
        .filter(|request| may_have_made(request))
        .peekable();
    if history.rows.is_some() && own.is_empty() {
        return false;
    }
    // A row without a possible creator may have existed from the start.
    (history.rows.is_some() && makers.peek().is_none()) || makers.any(|maker| maker.sent_us <= at_us)
}

fn undersold(history: &History) -> bool {
    if releases(history) && history.rows.is_none() {
        return false;
    }
    let requests = &history.requests;
    let mut buyers: Vec<BuyerId> = requests.iter().map(|request| request.buyer).collect();
    buyers.sort_unstable();
    buyers.dedup();
    let mut came = 0;
    for buyer in buyers {
        let own: Vec<&Request> = requests.iter().filter(|request| request.buyer == buyer).collect();
        let last_us = own.iter().map(|request| request.sent_us).max();
        if own
            .iter()
            .any(|request| Some(request.sent_us) == last_us && !is_final(request))
        {
            return false;
        }
        let excused = |request: &Request| match no(request) {
            Some(KeyOfAnotherBuyer) => true,
            Some(Declined | Cancelled) => may_be_unpaid(history, request),
            Some(Expired) => end_us(request).is_none_or(|end_us| {
                let mut order = requests.iter().filter(|other| same_order(request, other));
                let expiry_us = history.header.expiry_us;
                expiry_us.is_some_and(|expiry_us| order.any(|other| end_us >= other.sent_us + expiry_us))
            }),
            _ => false,
        };
        if own.iter().any(|request| is_final(request) && !excused(request)) {
            came += 1;
        }
    }
    let unsure = match history.rows {
        Some(_) => 0,
        None => requests.iter().filter(|request| is_indeterminate(request)).count() as u64,
    };
    let released = rows(history).iter().filter(|row| !live(row)).count() as u64;
    sold(history) + unsure + released < history.header.capacity.min(came)
}

/// Whether an order may have been declined: where payments are taken, only one that has a row.
fn may_be_unpaid(history: &History, request: &Request) -> bool {
    let (Some(_), Some(rows)) = (&history.payments, &history.rows) else {
        return true;
    };
    let Answer::Accepted { reservation, .. } = request.answer else {
        return false;
    };
    rows.iter().any(|row| row.reservation == reservation)
}

fn not_paid_once(history: &History) -> bool {
    let (Some(payments), Some(rows)) = (&history.payments, &history.rows) else {
        return false;
    };
    let named = payments.iter().map(|payment| payment.reservation);
    let mut all = named.chain(rows.iter().map(|row| row.reservation));
    all.any(|id| {
        let net: i64 = payments
            .iter()
            .filter(|payment| payment.reservation == id)
            .map(|payment| if payment.entry == Entry::Charge { 1 } else { -1 })
            .sum();
        let has = |status| rows.iter().any(|row| row.reservation == id && row.status == status);
        let due = match (has(Status::Confirmed), has(Status::Held)) {
            (true, _) => 1..=1,
            (false, true) => 0..=1,
            (false, false) => 0..=0,
        };
        !due.contains(&net)
    })
}

fn contradicted(history: &History) -> bool {
    let requests = &history.requests;
    let later_otherwise = requests.iter().any(|first| {
        requests.iter().any(|second| {
            let Some(id) = yes(first) else { return false };
            first.key == second.key
                && later(first, second)
                && match yes(second) {
                    Some(other) => other != id,
                    None => is_final(second) && first.buyer == second.buyer,
                }
        })
    });
    // The final answers of an order that no other one follows; one of them must agree.
    let last_of_all = |request: &&Request| {
        let mut order = requests
            .iter()
            .filter(|other| same_order(request, other) && is_final(other));
        is_final(request) && !order.any(|other| later(request, other))
    };
    later_otherwise
        || (history.rows.is_some()
            && requests.iter().filter(last_of_all).any(|request| {
                let mut last = requests
                    .iter()
                    .filter(|other| same_order(request, other))
                    .filter(last_of_all);
                last.all(|request| disagrees(history, request))
            }))
}

fn disagrees(history: &History, request: &Request) -> bool {
    let own: Vec<&Row> = rows(history)
        .iter()
        .filter(|row| asks_for(request, row))
        .filter(|row| {
            let mut answers = history
                .requests
                .iter()
                .filter(|other| own_id(other) == Some(row.reservation));
            answers.all(|other| asks_for(other, row))
        })
        .collect();
    if let Some(id) = yes(request) {
        let named: Vec<&Row> = rows(history).iter().filter(|row| row.reservation == id).collect();
        return if named.is_empty() {
            !own.is_empty()
        } else {
            !changed(request) && named.iter().all(|row| !live(row))
        };
    }
    let taken_since = history.requests.iter().any(|other| {
        same_order(request, other) && is_indeterminate(other) && (releases(history) || other.sent_us >= request.sent_us)
    });
    let against = own.iter().any(|row| {
        let named = matches!(no(request), Some(AlreadyReserved { earlier }) if *earlier == row.reservation);
        live(row) && !named
    });
    against && !taken_since && !changed(request)
}

fn unfinished(history: &History) -> bool {
    let requests = &history.requests;
    let faults = &history.faults;
    requests.iter().any(|request| {
        let late = end_us(request).is_some_and(|end_us| end_us > request.sent_us + history.header.deadline_us);
        let meaningless = matches!(request.answer, Answer::Unexpected { .. });
        let never_decided = accepted(request) && end_us(request).is_none();
        let was_settled = requests.iter().any(|other| {
            let settled = yes(other).is_some() || no(other).is_some();
            same_order(request, other) && settled && end_us(other).is_none_or(|end_us| end_us >= request.sent_us)
        });
        let repeats = requests
            .iter()
            .any(|other| same_order(request, other) && later(other, request));
        let after_all_faults = faults
            .iter()
            .all(|fault| fault.healed_us.is_some_and(|healed_us| request.sent_us > healed_us));
        let never_ends = end_us(request).is_none() && after_all_faults;
        let must_be_settled = if faults.is_empty() { repeats } else { after_all_faults };
        late || meaningless
            || never_decided
            || (is_indeterminate(request) && (never_ends || (must_be_settled && !was_settled)))
    })
}
