//! Mistakes that are planted in a correct history.

use box_office::BuyerId;
use harness::history::{
    Answer, Ending,
    Entry::{Charge, Refund},
    Fault, History, Micros, Payment,
    Refused::{AlreadyReserved, Expired, KeyOfAnotherBuyer, SoldOut, UnknownSale},
    Row, Status,
};
use proptest::prelude::*;

use crate::model_server::{ending, id};

/// A mistake: its kind, its place, and a parameter.
pub(crate) type Mistake = (u8, prop::sample::Index, u8);

pub(crate) fn plant(history: &mut History, &(what, at, number): &Mistake) {
    let small = Micros::from(number % 4);
    if what < 9 {
        if history.requests.is_empty() {
            return;
        }
        let at = at.index(history.requests.len());
        let request = &mut history.requests[at];
        let end_us = request.answered_us.unwrap_or(request.sent_us);
        match what {
            0..3 => request.answer = any_answer(number, end_us),
            3 => request.answered_us = Some(end_us + small),
            4 => request.sent_us = request.sent_us.saturating_sub(small),
            5 => request.key = (number % 13).to_string(),
            6 => request.buyer = BuyerId::from(1 + number % 3),
            7 => {
                request.answered_us = None;
                request.answer = Answer::Indeterminate;
            }
            _ => {
                history.requests.remove(at);
            }
        }
        return;
    }
    if what >= 16 {
        match (&mut history.payments, number % 4) {
            (Some(payments), 0) if !payments.is_empty() => {
                payments.remove(at.index(payments.len()));
            }
            (payments, 1) => *payments = None,
            (Some(payments), _) => payments.push(Payment {
                reservation: id(number / 8 % 8),
                entry: if number % 4 == 2 { Charge } else { Refund },
            }),
            (None, _) => {}
        }
        return;
    }
    match (what, &mut history.rows) {
        (9, _) => history.header.stock = history.header.stock.map(|stock| stock + i64::from(number % 3) - 1),
        (10, _) => {
            history.faults = vec![Fault {
                fault: "planted".to_owned(),
                struck_us: 0,
                healed_us: (number % 3 > 0).then_some(small * 3),
            }];
        }
        (11, rows) => {
            *rows = None;
            if number % 2 == 0 {
                history.header.stock = None;
            }
        }
        (12, Some(rows)) => rows.push(Row {
            reservation: id(number % 8),
            buyer: BuyerId::from(1 + number % 3),
            key: (number % 13).to_string(),
            status: Status::Confirmed,
            taken_us: Micros::from(number % 12),
            released_us: None,
        }),
        (_, Some(rows)) if !rows.is_empty() => {
            let at = at.index(rows.len());
            let row = &mut rows[at];
            match (what, number % 4) {
                (13, 0) => row.buyer = BuyerId::from(1 + number % 3),
                (13, 1) => row.key = (number % 13).to_string(),
                (13, 2) => row.reservation = id(number % 8),
                (13, _) => row.taken_us = Micros::from(number % 12),
                (14, 0) => row.status = Status::Held,
                (14, 1) => row.status = Status::Released,
                (14, _) => {
                    row.status = Status::Released;
                    row.released_us = Some(row.taken_us + small);
                }
                _ => {
                    rows.remove(at);
                }
            }
        }
        _ => {}
    }
}

fn any_answer(number: u8, at_us: Micros) -> Answer {
    let some_id = id(number / 16 % 4);
    let accepted = |ending| Answer::Accepted {
        reservation: some_id,
        ending,
    };
    match number % 16 {
        0..4 => Answer::Refused(SoldOut),
        4 => Answer::Confirmed { reservation: some_id },
        5 => Answer::Refused(AlreadyReserved { earlier: some_id }),
        6 => Answer::Refused(KeyOfAnotherBuyer),
        7 => Answer::Refused(UnknownSale),
        8 => Answer::Refused(Expired),
        9 => Answer::Indeterminate,
        10 => Answer::Unexpected { what: "500".to_owned() },
        11 => accepted(None),
        12 => accepted(Some(ending(at_us + 1, None))),
        13 => accepted(Some(ending(at_us, Some(SoldOut)))),
        14 => accepted(Some(ending(at_us, Some(Expired)))),
        _ => accepted(Some(Ending {
            at_us,
            refused: (number & 16 > 0).then_some(SoldOut),
            changed_to: Some(Box::new(ending(at_us + 1, (number & 32 > 0).then_some(SoldOut)))),
        })),
    }
}
