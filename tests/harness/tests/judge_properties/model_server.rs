//! A correct model server, and the requests that are sent to it.

use box_office::BuyerId;
use harness::history::{
    Answer, Ending,
    Entry::{Charge, Refund},
    FORMAT_VERSION, Header, History, Micros, Payment,
    Refused::{self, AlreadyReserved, Declined, KeyOfAnotherBuyer, RateLimited, SoldOut},
    Request, Row, Status,
};
use proptest::{collection::vec, prelude::*};
use uuid::Uuid;

const DEADLINE_US: Micros = 8;

const EXPIRY_US: Micros = 4;

pub(crate) fn id(number: u8) -> Uuid {
    Uuid::from_u128(number.into())
}

pub(crate) fn ending(at_us: Micros, refused: Option<Refused>) -> Ending {
    Ending {
        at_us,
        refused,
        changed_to: None,
    }
}

/// A generated request.
#[derive(Clone, Debug)]
pub(crate) struct GeneratedRequest {
    buyer: BuyerId,
    key: u8,
    sent_us: Micros,
    /// Microseconds from sent to the server's decision.
    until_decided_us: Micros,
    /// Microseconds from the decision to the answer.
    until_answered_us: Micros,
    fate: u8,
}

pub(crate) fn asks() -> impl Strategy<Value = Vec<GeneratedRequest>> {
    let ask = (1..=3_i64, 0..4_u8, 0..12_u64, 0..4_u64, 0..4_u64, 0..20_u8).prop_map(
        |(buyer, key, sent_us, until_decided_us, until_answered_us, fate)| GeneratedRequest {
            buyer,
            // Most keys belong to one buyer.
            key: if key == 3 {
                0
            } else {
                key + 3 * u8::try_from(buyer).expect("few buyers")
            },
            sent_us,
            until_decided_us,
            until_answered_us,
            fate,
        },
    );
    vec(ask, 1..=6)
}

/// Serves the requests: decides them one at a time, each at a moment between sent and answered.
pub(crate) fn sell(capacity: u64, asks: &[GeneratedRequest]) -> History {
    let mut rows: Vec<Row> = vec![];
    // The orders that were declined before they held a ticket.
    let mut declined: Vec<(String, BuyerId, Uuid)> = vec![];
    let mut answers: Vec<(usize, Answer)> = vec![];
    let mut order: Vec<usize> = (0..asks.len()).collect();
    order.sort_by_key(|&number| asks[number].sent_us + asks[number].until_decided_us);
    for (turn, number) in order.into_iter().enumerate() {
        let ask = &asks[number];
        let key = ask.key.to_string();
        let ended_us = ask.sent_us + ask.until_decided_us + ask.until_answered_us;
        let now_us = 2 * turn as Micros;
        let taken = rows.iter().filter(|row| row.status != Status::Released).count() as u64;
        let of_key = rows.iter().find(|row| row.key == key).cloned();
        let of_buyer = rows
            .iter()
            .find(|row| row.buyer == ask.buyer && row.status != Status::Released)
            .cloned();
        let mut sold = |status| {
            let reservation = id(u8::try_from(rows.len()).expect("few rows"));
            rows.push(Row {
                reservation,
                buyer: ask.buyer,
                key: key.clone(),
                status,
                taken_us: now_us,
                released_us: (status == Status::Released).then_some(now_us + 1),
            });
            reservation
        };
        let accepted = |reservation, refused| Answer::Accepted {
            reservation,
            ending: Some(ending(ended_us, refused)),
        };
        let of_declined = declined.iter().find(|(declined, ..)| *declined == key).cloned();
        let answer = match (of_key, of_buyer, ask.fate) {
            (_, _, 0) => Answer::Refused(RateLimited),
            (_, _, 1) => Answer::Indeterminate,
            (_, _, fate) if of_declined.is_some() => match (of_declined, fate) {
                (Some((_, buyer, _)), _) if buyer != ask.buyer => Answer::Refused(KeyOfAnotherBuyer),
                (Some((_, _, order)), 4..) => accepted(order, Some(Declined)),
                _ => Answer::Indeterminate,
            },
            (Some(row), _, _) if row.buyer != ask.buyer => Answer::Refused(KeyOfAnotherBuyer),
            (Some(row), _, fate) => match (fate, row.status) {
                (2..4, _) => Answer::Indeterminate,
                (_, Status::Released) => accepted(row.reservation, Some(Declined)),
                (4..8, _) => accepted(row.reservation, None),
                _ => Answer::Confirmed {
                    reservation: row.reservation,
                },
            },
            (None, Some(row), _) => Answer::Refused(AlreadyReserved {
                earlier: row.reservation,
            }),
            (None, None, fate) if taken == capacity => match fate {
                4..8 => accepted(id(100 + u8::try_from(number).expect("few requests")), Some(SoldOut)),
                _ => Answer::Refused(SoldOut),
            },
            (None, None, 2..4) => {
                sold(Status::Confirmed);
                Answer::Indeterminate
            }
            (None, None, 4..8) => accepted(sold(Status::Confirmed), None),
            (None, None, 8) => accepted(sold(Status::Released), Some(Declined)),
            (None, None, 9) => {
                let order = id(100 + u8::try_from(number).expect("few requests"));
                declined.push((key, ask.buyer, order));
                accepted(order, Some(Declined))
            }
            (None, None, _) => Answer::Confirmed {
                reservation: sold(Status::Confirmed),
            },
        };
        answers.push((number, answer));
    }
    answers.sort_by_key(|(number, _)| *number);
    // Who takes payments declines nobody before a ticket is held.
    history(capacity, asks, answers, rows, declined.is_empty())
}

/// Builds the history of these answers and rows.
fn history(
    capacity: u64,
    asks: &[GeneratedRequest],
    answers: Vec<(usize, Answer)>,
    rows: Vec<Row>,
    takes_payments: bool,
) -> History {
    let paid = |row: &Row| {
        // Of those that were released, every other one had been paid for.
        let entries: &[_] = match row.status {
            Status::Confirmed => &[Charge],
            _ if row.reservation.as_u128().is_multiple_of(2) => &[Charge, Refund],
            _ => &[],
        };
        let reservation = row.reservation;
        let payments = entries.iter().map(move |&entry| Payment { reservation, entry });
        payments.collect::<Vec<_>>()
    };
    let payments = rows.iter().flat_map(paid).collect();
    let sold = rows.iter().filter(|row| row.status != Status::Released).count();
    let requests = asks.iter().zip(answers).map(|(ask, (number, answer))| Request {
        request: number as u64,
        buyer: ask.buyer,
        key: ask.key.to_string(),
        sent_us: ask.sent_us,
        answered_us: Some(ask.sent_us + ask.until_decided_us + ask.until_answered_us),
        answer,
        steps: vec![],
    });
    History {
        header: Header {
            version: FORMAT_VERSION,
            strategy: "generated".to_owned(),
            sale: 1,
            capacity,
            deadline_us: DEADLINE_US,
            expiry_us: Some(EXPIRY_US),
            stock: Some(capacity as i64 - sold as i64),
        },
        requests: requests.collect(),
        rows: Some(rows),
        faults: vec![],
        payments: takes_payments.then_some(payments),
        decisions: None,
    }
}
