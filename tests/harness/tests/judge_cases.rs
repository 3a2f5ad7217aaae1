//! A bank of histories that test the judge. Each is correct and at the edge of one invariant; one
//! planted change breaks that invariant.
//!
//! Times of requests are on the client's clock, times of rows on the database's. They are not
//! comparable, although both are small here.

use box_office::{
    BuyerId,
    Invariant::{
        self, Conservation, NoDuplicate, NoFalseRefusal, NoOversell, NoUndersell, NothingInvented, NothingLost,
        OneAnswer, Order, PaidOnce, Progress,
    },
};
use harness::{
    history::{
        Answer::{self, Indeterminate},
        Decision, Ending,
        Entry::{self, Charge, Refund},
        FORMAT_VERSION, Fault, Header, History, Micros, Payment,
        Refused::{
            self, AlreadyReserved, Cancelled, Declined, Expired, KeyOfAnotherBuyer, NotVip, RateLimited, SoldOut,
            UnknownSale,
        },
        Request, Row,
        Status::{self, Confirmed, Held, Released},
    },
    judge::judge,
};
use rstest::rstest;
use uuid::Uuid;

const DEADLINE_US: Micros = 1000;
const EXPIRY_US: Micros = 100;

/// A history under construction.
#[derive(Clone)]
struct Sale(History);

fn sale(capacity: u64) -> Sale {
    Sale(History {
        header: Header {
            version: FORMAT_VERSION,
            strategy: "bank".to_owned(),
            sale: 1,
            capacity,
            deadline_us: DEADLINE_US,
            expiry_us: Some(EXPIRY_US),
            stock: Some(i64::try_from(capacity).expect("a small number")),
        },
        requests: vec![],
        rows: Some(vec![]),
        faults: vec![],
        payments: None,
        decisions: None,
    })
}

fn id(number: u128) -> Uuid {
    Uuid::from_u128(number)
}

fn confirmed(number: u128) -> Answer {
    Answer::Confirmed {
        reservation: id(number),
    }
}

fn refused(reason: Refused) -> Answer {
    Answer::Refused(reason)
}

/// 202 without a final state.
fn accepted(number: u128) -> Answer {
    Answer::Accepted {
        reservation: id(number),
        ending: None,
    }
}

/// 202, and then this final state.
fn ends(number: u128, at_us: Micros, refused: Option<Refused>) -> Answer {
    Answer::Accepted {
        reservation: id(number),
        ending: Some(Ending {
            at_us,
            refused,
            changed_to: None,
        }),
    }
}

/// 202, then one final state, then another.
fn ends_twice(number: u128, first: Option<Refused>, second: Option<Refused>) -> Answer {
    Answer::Accepted {
        reservation: id(number),
        ending: Some(Ending {
            at_us: 30,
            refused: first,
            changed_to: Some(Box::new(Ending {
                at_us: 40,
                refused: second,
                changed_to: None,
            })),
        }),
    }
}

fn already(number: u128) -> Answer {
    refused(AlreadyReserved { earlier: id(number) })
}

impl Sale {
    /// Adds a request.
    fn ask(mut self, buyer: BuyerId, key: &str, sent_us: Micros, answered_us: Micros, answer: Answer) -> Self {
        self.0.requests.push(Request {
            request: self.0.requests.len() as u64,
            buyer,
            key: key.to_owned(),
            sent_us,
            answered_us: Some(answered_us),
            answer,
            steps: vec![],
        });
        self
    }

    /// Adds a reservation, and takes its ticket from the stock.
    fn row(mut self, buyer: BuyerId, key: &str, number: u128) -> Self {
        let rows = self.0.rows.get_or_insert_default();
        rows.push(Row {
            reservation: id(number),
            buyer,
            key: key.to_owned(),
            status: Confirmed,
            taken_us: 100 + rows.len() as Micros,
            released_us: None,
        });
        self.back(-1)
    }

    /// Adds a confirmed request with its row; key and reservation have the buyer's number.
    fn takes(self, buyer: BuyerId, sent_us: Micros, answered_us: Micros) -> Self {
        let number = u128::try_from(buyer).expect("buyers are positive");
        self.ask(buyer, &buyer.to_string(), sent_us, answered_us, confirmed(number))
            .row(buyer, &buyer.to_string(), number)
    }

    /// Adds an accepted order, whose ticket is released when the payment is declined.
    fn declines(self, buyer: BuyerId) -> Self {
        let number = u128::try_from(buyer).expect("buyers are positive");
        self.ask(buyer, &buyer.to_string(), 0, 5, ends(number, 50, Some(Declined)))
            .row(buyer, &buyer.to_string(), number)
            .released(10, 20)
    }

    /// Releases the ticket of the last row.
    fn released(mut self, taken_us: Micros, released_us: Micros) -> Self {
        let row = self.last_row();
        row.status = Released;
        row.taken_us = taken_us;
        row.released_us = Some(released_us);
        self.back(1)
    }

    fn back(mut self, tickets: i64) -> Self {
        self.0.header.stock = self.0.header.stock.map(|stock| stock + tickets);
        self
    }

    fn stock(mut self, stock: i64) -> Self {
        self.0.header.stock = Some(stock);
        self
    }

    fn no_stock(mut self) -> Self {
        self.0.header.stock = None;
        self
    }

    /// Removes rows and stock, as with a third-party server.
    fn foreign(mut self) -> Self {
        self.0.rows = None;
        self.no_stock()
    }

    fn last_row(&mut self) -> &mut Row {
        self.0.rows.as_mut().and_then(|rows| rows.last_mut()).expect("a row")
    }

    fn with_row(mut self, change: impl FnOnce(&mut Row)) -> Self {
        change(self.last_row());
        self
    }

    fn status(self, status: Status) -> Self {
        self.with_row(|row| row.status = status)
    }

    /// Removes the last row, which has released its ticket.
    fn never_had_a_row(self) -> Self {
        self.without_row().back(-1)
    }

    /// Removes the last row, and returns its ticket to the stock.
    fn without_row(mut self) -> Self {
        self.0.rows.as_mut().and_then(Vec::pop).expect("a row");
        self.back(1)
    }

    /// Changes the last request.
    fn with(mut self, change: impl FnOnce(&mut Request)) -> Self {
        change(self.0.requests.last_mut().expect("a request"));
        self
    }

    /// Replaces the answer of the last request.
    fn answer(self, answer: Answer) -> Self {
        self.with(|request| request.answer = answer)
    }

    fn sent(self, sent_us: Micros) -> Self {
        self.with(|request| request.sent_us = sent_us)
    }

    fn answered(self, answered_us: Micros) -> Self {
        self.with(|request| request.answered_us = Some(answered_us))
    }

    fn never_answered(self) -> Self {
        self.with(|request| request.answered_us = None)
    }

    /// Replaces the answer of the first request.
    fn first_answer(mut self, answer: Answer) -> Self {
        self.0.requests[0].answer = answer;
        self
    }

    /// Leaves the buyer's first request without an answer.
    fn first_never_answered(mut self, buyer: BuyerId) -> Self {
        let first = self.0.requests.iter_mut().find(|request| request.buyer == buyer);
        let first = first.expect("a request");
        (first.answered_us, first.answer) = (None, Indeterminate);
        self
    }

    fn fault(mut self, struck_us: Micros, healed_us: Option<Micros>) -> Self {
        self.0.faults.clear();
        self.and_fault(struck_us, healed_us)
    }

    fn and_fault(mut self, struck_us: Micros, healed_us: Option<Micros>) -> Self {
        self.0.faults.push(Fault {
            fault: "planted".to_owned(),
            struck_us,
            healed_us,
        });
        self
    }

    /// The sale takes payments: every reservation that is confirmed so far has paid for its ticket.
    fn paid(mut self) -> Self {
        let rows = self.0.rows.iter().flatten();
        let paid = rows.filter(|row| row.status == Confirmed).map(|row| Payment {
            reservation: row.reservation,
            entry: Charge,
        });
        self.0.payments = Some(paid.collect());
        self
    }

    /// Adds an entry to the ledger of the payment service.
    fn pays(mut self, number: u128, entry: Entry) -> Self {
        self.0.payments.get_or_insert_default().push(Payment {
            reservation: id(number),
            entry,
        });
        self
    }

    /// Removes the last entry of the ledger.
    fn unpaid(mut self) -> Self {
        self.0.payments.as_mut().and_then(Vec::pop).expect("a payment");
        self
    }

    /// Records the place in its queue of the next decision.
    fn decided(mut self, number: u128, topic: &str, offset: u64) -> Self {
        let decisions = self.0.decisions.get_or_insert_default();
        decisions.push(Decision {
            number: decisions.len() as u64,
            reservation: id(number),
            topic: topic.to_owned(),
            partition: 0,
            offset,
        });
        self
    }

    /// Exchanges the first two decisions.
    fn exchanged(mut self) -> Self {
        let decisions = self.0.decisions.get_or_insert_default();
        (decisions[0].number, decisions[1].number) = (decisions[1].number, decisions[0].number);
        self
    }

    /// Moves the first decision to this place.
    fn first_decided_at(mut self, topic: &str, offset: u64) -> Self {
        let first = &mut self.0.decisions.get_or_insert_default()[0];
        (first.topic, first.offset) = (topic.to_owned(), offset);
        self
    }

    fn no_fault(mut self) -> Self {
        self.0.faults.clear();
        self
    }
}

/// One ticket, held and released at 20.
fn declined() -> Sale {
    sale(1).declines(1)
}

/// One ticket, held and released at 20, then sold to another buyer.
fn sold_again() -> Sale {
    declined().takes(2, 60, 70).with_row(|row| row.taken_us = 20)
}

/// One ticket, held until it expires although the buyer has paid, refunded, and sold to another
/// buyer.
fn paid_too_late() -> Sale {
    sold_again()
        .first_answer(ends(1, EXPIRY_US, Some(Expired)))
        .paid()
        .pays(1, Charge)
        .pays(1, Refund)
}

/// Two tickets, which are held and released one after the other, and a buyer who is told "sold out"
/// while both are held.
fn held_at_once() -> Sale {
    sale(2)
        .declines(1)
        .declines(2)
        .with_row(|row| row.released_us = Some(15))
        .ask(3, "3", 0, 60, refused(SoldOut))
}

/// The same, but the second ticket is taken after the first is released.
fn held_one_after_the_other() -> Sale {
    let mut sale = held_at_once();
    let row = sale.last_row();
    (row.taken_us, row.released_us) = (21, Some(22));
    sale
}

/// Two tickets, two buyers who have them, and a third buyer who is refused.
fn sold_out() -> Sale {
    sale(2)
        .takes(1, 0, 10)
        .takes(2, 0, 10)
        .ask(3, "3", 0, 10, refused(SoldOut))
}

/// A VIP comes last and is decided first; the others in their turn.
fn with_a_vip() -> Sale {
    sale(3)
        .takes(1, 0, 10)
        .takes(2, 10, 19)
        .takes(3, 20, 29)
        .decided(3, "vip", 0)
        .decided(1, "normal", 0)
        .decided(2, "normal", 1)
}

/// One of two tickets is sold; the other buyer's outcome is unknown.
fn indeterminate() -> Sale {
    sale(2).takes(1, 0, 10).ask(2, "2", 0, 10, Indeterminate)
}

#[rstest]
// I1
#[case::one_more_than_there_are(
    sale(2).takes(1, 0, 9).takes(2, 0, 9), |s: Sale| s.takes(3, 0, 9), &[NoOversell, Conservation])]
#[case::taken_before_it_was_released(sold_again(), |s: Sale| s.with_row(|row| row.taken_us = 19), &[NoOversell])]
#[case::released_in_turn(
    sold_again().ask(3, "3", 0, 9, ends(3, 50, Some(Declined))).row(3, "3", 3).released(9, 10),
    |s: Sale| s.with_row(|row| row.released_us = Some(11)), &[NoOversell])]
#[case::indeterminate_with_a_row_holds_a_ticket(
    sale(1).takes(1, 0, 9).ask(2, "2", 0, 9, Indeterminate), |s: Sale| s.row(2, "2", 2), &[NoOversell, Conservation])]
#[case::two_told_of_one_ticket_by_a_foreign_server(
    sale(1).foreign().ask(1, "1", 0, 9, confirmed(1)).ask(2, "2", 0, 9, Indeterminate),
    |s: Sale| s.answer(ends(2, 9, None)), &[NoOversell, Conservation])]
// I2
#[case::a_ticket_came_from_nowhere(sale(3).takes(1, 0, 9).takes(2, 0, 9), |s: Sale| s.stock(2), &[Conservation])]
#[case::a_ticket_went_nowhere(sale(3).takes(1, 0, 9).takes(2, 0, 9), |s: Sale| s.stock(0), &[Conservation])]
#[case::less_than_nothing_left(sale(1).takes(1, 0, 9), |s: Sale| s.stock(-1), &[Conservation])]
#[case::still_held(sale(1).takes(1, 0, 9), |s: Sale| s.status(Held), &[Conservation])]
#[case::released_without_a_new_holder(declined(), |s: Sale| s.stock(0), &[Conservation])]
#[case::held_where_the_stock_is_unknown(sale(1).takes(1, 0, 9).no_stock(), |s: Sale| s.status(Held), &[Conservation])]
#[case::one_left_of_those_a_foreign_server_sold(
    sale(1).foreign().ask(1, "1", 0, 9, confirmed(1)).stock(0), |s: Sale| s.stock(1), &[Conservation])]
#[case::released_twice(declined(), |s: Sale| s.stock(2), &[Conservation])]
#[case::a_held_ticket_counts(
    sale(1).takes(1, 0, 9), |s: Sale| s.ask(2, "2", 0, 9, accepted(2)).row(2, "2", 2).status(Held),
    &[NoOversell, Conservation, NothingLost, Progress])]
// I3
#[case::two_clicks(
    sale(2).takes(1, 0, 9).ask(1, "other", 0, 9, Indeterminate), |s: Sale| s.row(1, "other", 2), &[NoDuplicate])]
#[case::again_before_the_first_was_released(
    sale(2).ask(1, "a", 0, 9, ends(1, 50, Some(Declined))).row(1, "a", 1).released(10, 20)
        .ask(1, "b", 0, 9, confirmed(2)).row(1, "b", 2).with_row(|row| row.taken_us = 20),
    |s: Sale| s.with_row(|row| row.taken_us = 19), &[NoDuplicate])]
#[case::a_key_that_was_released_is_used_up(
    sale(2).ask(1, "a", 0, 9, ends(1, 50, Some(Declined))).row(1, "a", 1).released(10, 20)
        .ask(1, "b", 60, 70, confirmed(2)).row(1, "b", 2).with_row(|row| row.taken_us = 20),
    |s: Sale| s.with(|request| request.key = "a".to_owned()).with_row(|row| row.key = "a".to_owned()), &[NoDuplicate])]
#[case::one_key_of_two_buyers(
    sale(2).takes(1, 0, 9).ask(2, "1", 0, 9, refused(KeyOfAnotherBuyer)),
    |s: Sale| s.answer(confirmed(2)).row(2, "1", 2), &[NoDuplicate])]
#[case::one_buyer_told_of_two_by_a_foreign_server(
    sale(2).foreign().ask(1, "a", 0, 9, confirmed(1)).ask(1, "b", 0, 9, already(1)),
    |s: Sale| s.answer(confirmed(2)), &[NoDuplicate])]
#[case::one_key_told_of_two_by_a_foreign_server(
    sale(2).foreign().ask(1, "a", 0, 9, confirmed(1)).ask(2, "a", 0, 9, refused(KeyOfAnotherBuyer)),
    |s: Sale| s.answer(confirmed(2)), &[NoDuplicate])]
// I4
#[case::confirmed_without_a_row(
    sale(2).ask(2, "2", 0, 9, Indeterminate).takes(1, 0, 10), |s: Sale| s.without_row(), &[NothingLost])]
#[case::confirmed_with_two_rows(sale(2).takes(1, 0, 9), |s: Sale| s.row(1, "1", 1), &[NoDuplicate, NothingLost])]
#[case::accepted_confirmed_and_without_a_row(
    sale(1).takes(1, 0, 9).ask(2, "2", 0, 9, ends(2, 50, Some(SoldOut))),
    |s: Sale| s.answer(ends(2, 50, None)), &[NothingLost])]
#[case::accepted_and_decided_too_late(
    sale(1).takes(1, 7, 9).answer(ends(1, 7 + DEADLINE_US, None)),
    |s: Sale| s.answer(ends(1, 8 + DEADLINE_US, None)), &[NothingLost, Progress])]
#[case::accepted_and_never_decided(
    sale(1).takes(1, 0, 9).ask(2, "2", 0, 9, ends(2, 50, Some(SoldOut))),
    |s: Sale| s.answer(accepted(2)), &[NothingLost, Progress])]
#[case::a_final_state_that_changed(
    sale(1).takes(1, 0, 9).answer(ends_twice(1, None, None)),
    |s: Sale| s.answer(ends_twice(1, None, Some(SoldOut))), &[NothingLost])]
// I5
#[case::a_row_that_nobody_asked_for(indeterminate(), |s: Sale| s.row(3, "3", 3), &[NothingInvented])]
#[case::a_row_under_another_key(
    indeterminate().row(2, "2", 2), |s: Sale| s.with_row(|row| row.key = "3".to_owned()), &[NothingInvented])]
#[case::a_row_of_another_buyer(
    indeterminate().row(2, "2", 2), |s: Sale| s.with_row(|row| row.buyer = 3), &[NothingInvented])]
#[case::confirmed_to_one_and_the_row_is_anothers(
    indeterminate().row(2, "2", 2).answer(confirmed(2)), |s: Sale| s.with_row(|row| row.buyer = 3), &[NothingInvented])]
#[case::turned_away_at_the_door_and_has_a_row(
    indeterminate().row(2, "2", 2), |s: Sale| s.answer(refused(RateLimited)), &[NothingInvented])]
#[case::refused_at_once_and_held_a_ticket(
    sold_again().ask(3, "3", 0, 60, ends(3, 60, Some(SoldOut))).row(3, "3", 3).released(1, 2),
    |s: Sale| s.answer(refused(SoldOut)), &[NothingInvented])]
#[case::refused_and_has_it_all_the_same(
    sale(2).takes(1, 0, 9).takes(2, 0, 9),
    |s: Sale| s.answer(refused(SoldOut)), &[NothingInvented, NoFalseRefusal, OneAnswer])]
#[case::expired_and_has_it_all_the_same(
    sale(1).takes(1, 0, 9).answer(ends(1, EXPIRY_US, None)),
    |s: Sale| s.answer(ends(1, EXPIRY_US, Some(Expired))), &[NothingInvented, OneAnswer])]
// I6
#[case::a_vip_who_is_none_is_told_something_else(
    sale(2).takes(1, 0, 9).ask(2, "2", 0, 9, refused(NotVip)),
    |s: Sale| s.answer(refused(SoldOut)), &[NoFalseRefusal, NoUndersell])]
#[case::sold_out_before_the_last_taker_was_sent(
    sale(2).takes(1, 0, 50).takes(2, 10, 60).ask(3, "3", 0, 10, refused(SoldOut)),
    |s: Sale| s.answered(9), &[NoFalseRefusal])]
#[case::accepted_and_sold_out_before_the_last_taker_was_sent(
    sale(2).takes(1, 0, 50).takes(2, 10, 60).ask(3, "3", 0, 1, ends(3, 10, Some(SoldOut))),
    |s: Sale| s.answer(ends(3, 9, Some(SoldOut))), &[NoFalseRefusal])]
#[case::a_repeat_takes_at_its_first_sending(
    sale(1).ask(1, "1", 0, 5, Indeterminate).takes(1, 20, 25).ask(2, "2", 8, 10, refused(SoldOut)),
    |s: Sale| s.first_answer(refused(SoldOut)), &[NoFalseRefusal])]
#[case::what_left_no_row_took_nothing(
    sale(1).ask(1, "1", 0, 5, Indeterminate).row(1, "1", 1).ask(2, "2", 0, 9, refused(SoldOut)),
    |s: Sale| s.without_row(), &[NoFalseRefusal])]
#[case::indeterminate_at_a_foreign_server_may_have_taken(
    sale(1).foreign().ask(1, "1", 10, 15, Indeterminate).ask(2, "2", 0, 10, refused(SoldOut)),
    |s: Sale| s.answered(9), &[NoFalseRefusal])]
#[case::already_reserved_by_somebody_else(
    sale(2).takes(1, 0, 9).takes(2, 0, 9).ask(1, "again", 0, 9, already(1)),
    |s: Sale| s.answer(already(2)), &[NoFalseRefusal])]
#[case::already_reserved_before_it_was_asked_for(
    sale(1).takes(1, 10, 20).ask(1, "again", 0, 10, already(1)), |s: Sale| s.answered(9), &[NoFalseRefusal])]
#[case::already_reserved_after_it_was_over(
    sale(1).ask(1, "1", 0, 9, ends(1, 50, Some(Declined))).row(1, "1", 1).released(10, 20)
        .ask(1, "again", 50, 60, already(1)),
    |s: Sale| s.sent(51), &[NoFalseRefusal])]
#[case::already_reserved_at_a_foreign_server(
    sale(1).foreign().ask(1, "1", 10, 15, Indeterminate).ask(1, "again", 0, 10, already(1)),
    |s: Sale| s.answered(9), &[NoFalseRefusal])]
#[case::a_key_that_nobody_else_had_sent(
    sale(1).takes(1, 10, 20).ask(2, "1", 0, 10, refused(KeyOfAnotherBuyer)), |s: Sale| s.answered(9), &[NoFalseRefusal])]
#[case::expired_before_its_time(
    sale(1).ask(1, "1", 7, 7 + EXPIRY_US, refused(Expired)), |s: Sale| s.answered(6 + EXPIRY_US), &[NoFalseRefusal, NoUndersell])]
#[case::a_repeat_expires_with_its_order(
    sale(1).ask(1, "1", 0, 9, Indeterminate).ask(1, "1", EXPIRY_US - 1, EXPIRY_US, refused(Expired)),
    |s: Sale| s.answered(EXPIRY_US - 1), &[NoFalseRefusal, NoUndersell])]
#[case::an_accepted_order_that_never_had_a_ticket_took_nothing(
    declined().ask(2, "2", 0, 9, refused(SoldOut)), |s: Sale| s.never_had_a_row(), &[NoFalseRefusal, NoUndersell])]
#[case::and_the_ticket_is_sold_later(
    sale(1).takes(3, 60, 70).with_row(|row| row.taken_us = 20).declines(1)
        .ask(2, "2", 0, 9, refused(SoldOut)),
    |s: Sale| s.never_had_a_row(), &[NoFalseRefusal])]
#[case::an_accepted_order_that_expired_and_never_had_a_ticket(
    declined().answer(ends(1, EXPIRY_US, Some(Expired))).ask(2, "2", 0, 9, refused(SoldOut)),
    |s: Sale| s.never_had_a_row(), &[NoFalseRefusal, NoUndersell])]
#[case::an_order_that_expired_at_once_and_never_had_a_ticket(
    declined().answer(refused(Expired)).answered(EXPIRY_US).ask(2, "2", 0, 9, refused(SoldOut)),
    |s: Sale| s.never_had_a_row(), &[NoFalseRefusal, NoUndersell])]
#[case::an_accepted_order_told_sold_out_by_one_that_never_had_a_ticket(
    declined().ask(2, "2", 0, 9, ends(2, 50, Some(SoldOut))),
    |s: Sale| s.never_had_a_row(), &[NoFalseRefusal, NoUndersell])]
#[case::declined_where_a_ticket_is_held_first_and_none_was(
    declined().paid(), |s: Sale| s.never_had_a_row(), &[NoFalseRefusal, NoUndersell])]
#[case::an_accepted_order_confirmed_without_ever_having_a_ticket(
    sale(1).takes(1, 0, 9).answer(ends(1, 50, None)).ask(2, "2", 0, 9, refused(SoldOut)),
    |s: Sale| s.without_row(), &[NothingLost, NoFalseRefusal, NoUndersell])]
#[case::an_accepted_order_never_decided_took_nothing(
    sale(1).takes(1, 0, 9).ask(2, "2", 0, 9, refused(SoldOut)),
    |s: Sale| s.first_answer(accepted(1)).without_row(), &[NothingLost, NoFalseRefusal, Progress])]
#[case::confirmed_and_lost_may_have_had_its_ticket(
    sale(1).takes(1, 0, 9).ask(2, "2", 0, 9, refused(SoldOut)),
    |s: Sale| s.without_row(), &[NothingLost, NoUndersell])]
#[case::both_were_never_held_at_once(
    held_at_once(), |s: Sale| s.with_row(|row| (row.taken_us, row.released_us) = (21, Some(22))), &[NoFalseRefusal])]
#[case::another_was_held_meanwhile(
    held_one_after_the_other().takes(4, 0, 9).with_row(|row| row.taken_us = 15),
    |s: Sale| s.with_row(|row| row.taken_us = 23), &[NoFalseRefusal])]
#[case::a_lost_ticket_may_have_been_held_meanwhile(
    held_one_after_the_other().takes(4, 0, 9).with_row(|row| row.taken_us = 15), |s: Sale| s.without_row(), &[NothingLost])]
#[case::no_such_sale(sold_out(), |s: Sale| s.answer(refused(UnknownSale)), &[NoFalseRefusal])]
// I7. Without releases, a remaining ticket also makes "sold out" or a confirmation false.
#[case::one_left_and_one_refused(
    sale(2).takes(1, 0, 9).takes(2, 0, 9),
    |s: Sale| s.without_row().answer(refused(SoldOut)), &[NoFalseRefusal, NoUndersell])]
#[case::fewer_buyers_than_tickets(
    sale(5).takes(1, 0, 9).takes(2, 0, 9),
    |s: Sale| s.without_row().answer(refused(SoldOut)), &[NoFalseRefusal, NoUndersell])]
#[case::a_sold_ticket_that_is_lost(
    sale(2).takes(1, 0, 9).takes(2, 0, 9), |s: Sale| s.without_row(), &[NothingLost, NoUndersell])]
#[case::the_last_answer_is_final(indeterminate(), |s: Sale| s.answer(refused(UnknownSale)), &[NoFalseRefusal, NoUndersell])]
#[case::who_used_anothers_key_did_not_come_for_a_ticket(
    sale(2).takes(1, 0, 9).ask(2, "1", 0, 9, refused(KeyOfAnotherBuyer)),
    |s: Sale| s.answer(refused(SoldOut)), &[NoFalseRefusal, NoUndersell])]
#[case::who_was_declined_before_holding_a_ticket_may_go_without(
    sale(2).takes(1, 0, 9).ask(2, "2", 0, 9, ends(2, 50, Some(Declined))),
    |s: Sale| s.answer(ends(2, 50, Some(SoldOut))), &[NoFalseRefusal, NoUndersell])]
#[case::who_came_too_late_may_go_without(
    sale(2).takes(1, 0, 9).ask(2, "2", 0, 9, ends(2, EXPIRY_US, Some(Expired))),
    |s: Sale| s.answer(ends(2, EXPIRY_US, Some(SoldOut))), &[NoFalseRefusal, NoUndersell])]
#[case::expired_before_its_time_is_no_excuse_for_a_ticket_that_is_left(
    sale(2).takes(1, 0, 9).ask(2, "2", 0, 9, ends(2, EXPIRY_US, Some(Expired))),
    |s: Sale| s.answer(ends(2, EXPIRY_US - 1, Some(Expired))), &[NoFalseRefusal, NoUndersell])]
#[case::expired_and_another_is_told_sold_out_while_a_ticket_is_left(
    sale(2).takes(1, 0, 9).ask(2, "2", 0, 9, ends(2, EXPIRY_US, Some(Expired))).takes(3, 0, 9),
    |s: Sale| s.without_row().answer(refused(SoldOut)), &[NoFalseRefusal, NoUndersell])]
#[case::another_key_of_the_buyer_is_still_indeterminate(
    sale(2).takes(1, 0, 9).ask(2, "a", 0, 9, Indeterminate).ask(2, "b", 0, 9, refused(SoldOut)).row(2, "a", 2),
    |s: Sale| s.without_row().sent(1), &[NoFalseRefusal, NoUndersell])]
#[case::indeterminate_at_a_foreign_server_may_be_sold(
    sale(1).foreign().ask(1, "1", 0, 5, Indeterminate).ask(1, "1", 6, 9, refused(SoldOut)),
    |s: Sale| s.first_answer(refused(RateLimited)), &[NoFalseRefusal, NoUndersell])]
#[case::more_left_than_came_back(
    sale(3).declines(1).takes(2, 0, 70).with_row(|row| row.taken_us = 10).takes(3, 0, 70).with_row(|row| row.taken_us = 10)
        .ask(4, "4", 0, 60, refused(SoldOut)),
    |s: Sale| s.without_row(), &[NothingLost, NoUndersell])]
#[case::who_cancelled_may_go_without(
    sale(2).takes(1, 0, 9).ask(2, "2", 0, 9, ends(2, 50, Some(Cancelled))),
    |s: Sale| s.answer(ends(2, 50, Some(SoldOut))), &[NoFalseRefusal, NoUndersell])]
// I8
#[case::decided_before_one_that_came_first(
    sale(2).takes(1, 0, 10).takes(2, 10, 19).decided(1, "normal", 0).decided(2, "normal", 1),
    |s: Sale| s.exchanged(), &[Order])]
#[case::a_vip_in_the_queue_of_the_others(
    with_a_vip(), |s: Sale| s.first_decided_at("normal", 2), &[Order])]
#[case::overtaken_between_its_answer_and_the_queue(
    sale(2).takes(1, 0, 10).takes(2, 10, 19).decided(2, "normal", 0).decided(1, "normal", 1),
    |s: Sale| s.sent(11), &[Order])]
#[case::one_place_for_two(
    sale(2).takes(1, 0, 10).takes(2, 10, 19).decided(1, "normal", 0).decided(2, "normal", 1),
    |s: Sale| s.first_decided_at("normal", 1), &[Order])]
// I9
#[case::refused_after_it_was_confirmed(
    sale(1).takes(1, 0, 10).ask(1, "1", 10, 20, refused(SoldOut)), |s: Sale| s.sent(11), &[OneAnswer])]
#[case::already_reserved_is_not_the_first_answer(
    sale(1).takes(1, 0, 10).ask(1, "1", 11, 20, confirmed(1)), |s: Sale| s.answer(already(1)), &[OneAnswer])]
#[case::another_reservation_under_the_same_key(
    sale(2).takes(1, 0, 10).ask(1, "1", 11, 20, confirmed(1)),
    |s: Sale| s.answer(confirmed(2)), &[NothingLost, OneAnswer])]
#[case::another_reservation_at_a_foreign_server(
    sale(2).foreign().ask(1, "1", 0, 10, confirmed(1)).ask(1, "1", 10, 20, confirmed(2)).answer(confirmed(1)).sent(11),
    |s: Sale| s.answer(confirmed(2)), &[NoDuplicate, OneAnswer])]
#[case::another_buyer_is_confirmed_under_the_key(
    sale(2).takes(1, 0, 10).ask(2, "1", 11, 20, refused(KeyOfAnotherBuyer)),
    |s: Sale| s.answer(confirmed(2)).row(2, "1", 2), &[NoDuplicate, OneAnswer])]
#[case::indeterminate_then_refused_and_has_it(
    sold_out().ask(2, "2", 11, 20, confirmed(2)).ask(2, "2", 21, 30, Indeterminate).ask(2, "2", 31, 40, confirmed(2)),
    |s: Sale| s.answer(refused(SoldOut)), &[OneAnswer])]
#[case::a_repeat_told_sold_out_while_the_row_is_there(
    sale(2).takes(1, 0, 9).ask(2, "2", 0, 5, Indeterminate).row(2, "2", 2).ask(2, "2", 0, 9, refused(SoldOut)),
    |s: Sale| s.sent(1), &[OneAnswer])]
#[case::confirmed_and_released(
    indeterminate().row(2, "2", 2).answer(confirmed(2)), |s: Sale| s.status(Released).back(1), &[OneAnswer])]
// I10
#[case::answered_too_late(
    sale(1).takes(1, 7, 7 + DEADLINE_US), |s: Sale| s.answered(8 + DEADLINE_US), &[Progress])]
#[case::refused_too_late(sold_out().answered(DEADLINE_US), |s: Sale| s.answered(1 + DEADLINE_US), &[Progress])]
#[case::an_answer_that_means_nothing(
    indeterminate(), |s: Sale| s.answer(Answer::Unexpected { what: "500 oops".to_owned() }), &[Progress])]
#[case::repeated_and_still_indeterminate(indeterminate().ask(2, "2", 10, 20, Indeterminate), |s: Sale| s.sent(11), &[Progress])]
#[case::never_told_in_the_end(
    indeterminate().ask(2, "2", 11, 20, confirmed(2)).row(2, "2", 2), |s: Sale| s.answer(Indeterminate), &[Progress])]
#[case::indeterminate_after_the_healing(indeterminate().fault(5, Some(10)).sent(10), |s: Sale| s.sent(11), &[Progress])]
#[case::indeterminate_after_the_last_healing(
    indeterminate().fault(5, Some(10)).and_fault(2, Some(3)).sent(10), |s: Sale| s.sent(11), &[Progress])]
#[case::indeterminate_after_the_last_healing_in_the_order_of_the_faults(
    indeterminate().fault(2, Some(3)).and_fault(5, Some(10)).sent(10), |s: Sale| s.sent(11), &[Progress])]
#[case::indeterminate_after_it_was_healed_after_all(
    indeterminate().fault(5, None).sent(10), |s: Sale| s.fault(5, Some(9)), &[Progress])]
#[case::no_answer_and_nothing_to_excuse_it(
    indeterminate().never_answered().fault(5, None), |s: Sale| s.no_fault(), &[Progress])]
#[case::no_answer_and_its_repeat_is_confirmed(
    indeterminate().ask(2, "2", 10, 20, confirmed(2)).row(2, "2", 2), |s: Sale| s.first_never_answered(2), &[Progress])]
#[case::no_answer_and_its_repeat_is_refused(
    sold_out().ask(3, "3", 10, 20, refused(SoldOut)),
    |s: Sale| s.first_never_answered(3), &[Progress])]
#[case::accepted_and_never_decided_and_its_repeat_is_confirmed(
    sale(1).takes(1, 0, 9).answer(ends(1, 50, None)).ask(1, "1", 60, 70, confirmed(1)),
    |s: Sale| s.first_answer(accepted(1)), &[NothingLost, Progress])]
#[case::no_answer_after_the_healing_and_its_repeat_is_confirmed(
    indeterminate().never_answered().fault(5, Some(10)).sent(10).ask(2, "2", 30, 40, confirmed(2)).row(2, "2", 2),
    |s: Sale| s.fault(5, Some(9)), &[Progress])]
// I11
#[case::a_ticket_that_nobody_paid_for(sale(2).takes(1, 0, 9).takes(2, 0, 9).paid(), |s: Sale| s.unpaid(), &[PaidOnce])]
#[case::paid_twice(sale(2).takes(1, 0, 9).paid(), |s: Sale| s.pays(1, Charge), &[PaidOnce])]
#[case::paid_twice_and_both_refunded(
    sale(2).takes(1, 0, 9).paid().pays(1, Charge).pays(1, Refund), |s: Sale| s.pays(1, Refund), &[PaidOnce])]
#[case::refunded_and_kept(sale(2).takes(1, 0, 9).paid(), |s: Sale| s.pays(1, Refund), &[PaidOnce])]
#[case::paid_after_the_release_and_not_refunded(paid_too_late(), |s: Sale| s.unpaid(), &[PaidOnce])]
#[case::refunded_twice(paid_too_late(), |s: Sale| s.pays(1, Refund), &[PaidOnce])]
#[case::refunded_what_was_never_paid(declined().paid(), |s: Sale| s.pays(1, Refund), &[PaidOnce])]
#[case::paid_by_who_never_had_a_ticket(
    sold_out().paid().pays(3, Charge).pays(3, Refund), |s: Sale| s.unpaid(), &[PaidOnce])]
#[case::charged_and_refunded_under_another_name(
    paid_too_late().unpaid().pays(1, Refund), |s: Sale| s.unpaid().pays(7, Refund), &[PaidOnce])]
#[case::held_may_be_paid_or_not(
    sale(1).takes(1, 0, 9).paid(), |s: Sale| s.status(Held), &[Conservation])]
#[case::held_and_not_yet_paid(
    sale(1).takes(1, 0, 9).paid(), |s: Sale| s.status(Held).unpaid(), &[Conservation])]
fn one_planted_change_is_caught(#[case] right: Sale, #[case] plant: fn(Sale) -> Sale, #[case] broken: &[Invariant]) {
    let changed = plant(right.clone());

    let verdict = judge(&right.0);
    assert!(verdict.findings.is_empty(), "with the change undone:\n{verdict}");
    let verdict = judge(&changed.0);
    let found: Vec<Invariant> = verdict.findings.iter().map(|finding| finding.invariant).collect();
    assert_eq!(found, broken, "{verdict}");
}

/// The numbers of a verdict: sold, oversold by, duplicates, and the number of cases of each broken
/// invariant.
#[rstest]
#[case::nothing_sold(sale(2), (0, 0, 0), &[])]
#[case::all_sold(sale(2).takes(1, 0, 9).takes(2, 0, 9), (2, 0, 0), &[])]
#[case::three_too_many(
    sale(2).takes(1, 0, 9).takes(2, 0, 9).takes(3, 0, 9).takes(4, 0, 9).takes(5, 0, 9),
    (5, 3, 0), &[(NoOversell, 3), (Conservation, 1)])]
#[case::and_the_stock_looks_right(
    sale(2).takes(1, 0, 9).takes(2, 0, 9).takes(3, 0, 9).takes(4, 0, 9).stock(0),
    (4, 2, 0), &[(NoOversell, 2), (Conservation, 2)])]
#[case::three_for_one_buyer(
    sale(9).takes(1, 0, 9).ask(1, "b", 0, 9, confirmed(2)).row(1, "b", 2).ask(1, "c", 0, 9, confirmed(3)).row(1, "c", 3),
    (3, 0, 2), &[(NoDuplicate, 2)])]
#[case::two_each_for_two_buyers(
    sale(9).takes(1, 0, 9).ask(1, "b", 0, 9, confirmed(11)).row(1, "b", 11)
        .takes(2, 0, 9).ask(2, "c", 0, 9, confirmed(12)).row(2, "c", 12),
    (4, 0, 2), &[(NoDuplicate, 2)])]
#[case::two_lost(
    sale(3).takes(1, 0, 9).ask(2, "2", 0, 9, accepted(2)).ask(3, "3", 0, 9, accepted(3)),
    (1, 0, 0), &[(NothingLost, 2), (Progress, 2)])]
#[case::two_told_no_while_there_were_tickets(
    sale(3).takes(1, 0, 9).ask(2, "2", 0, 9, refused(SoldOut)).ask(3, "3", 0, 9, refused(SoldOut)),
    (1, 0, 0), &[(NoFalseRefusal, 2), (NoUndersell, 2)])]
#[case::released_is_not_sold(sold_again(), (1, 0, 0), &[])]
#[case::told_by_a_foreign_server(
    sale(1).foreign().ask(1, "1", 0, 9, confirmed(1)).ask(2, "2", 0, 9, confirmed(2)).ask(3, "3", 0, 9, confirmed(3)),
    (3, 2, 0), &[(NoOversell, 2), (Conservation, 2)])]
fn a_verdict_counts_right(
    #[case] sale: Sale,
    #[case] (sold, oversold_by, duplicates): (u64, u64, u64),
    #[case] found: &[(Invariant, u64)],
) {
    let verdict = judge(&sale.0);
    let tally = &verdict.tally;
    assert_eq!(
        (tally.sold, tally.oversold_by, tally.duplicates),
        (sold, oversold_by, duplicates),
        "{verdict}"
    );
    let counted: Vec<_> = verdict
        .findings
        .iter()
        .map(|finding| (finding.invariant, finding.count))
        .collect();
    assert_eq!(counted, found, "{verdict}");
}

/// The cases of I11 are counted by reservation, and their evidence is what its buyer was told.
#[test]
fn a_reservation_that_is_paid_for_wrongly_is_one_case() {
    let sale = paid_too_late().unpaid().pays(1, Charge).pays(9, Charge);
    let verdict = judge(&sale.0);
    let [finding] = &verdict.findings[..] else {
        panic!("{verdict}")
    };
    assert_eq!((finding.invariant, finding.count), (PaidOnce, 2), "{verdict}");
    assert!(finding.evidence.is_some(), "{verdict}");
    assert!(
        finding.summary.contains("2 charges, 0 refunds") || finding.summary.contains("1 charges"),
        "{verdict}"
    );
}

/// How hard the system was stressed: requests, the most of them in flight at once, faults.
#[rstest]
#[case::nobody_came(sale(1), (0, 0, 0))]
#[case::one(sale(1).takes(1, 0, 9), (1, 1, 0))]
#[case::one_after_another(sale(3).takes(1, 0, 9).takes(2, 10, 19).takes(3, 20, 29), (3, 1, 0))]
#[case::one_begins_where_another_ends(sale(2).takes(1, 0, 9).takes(2, 9, 19), (2, 2, 0))]
#[case::two_and_then_one(sale(3).takes(1, 0, 9).takes(2, 5, 15).takes(3, 12, 20), (3, 2, 0))]
#[case::two_inside_a_third_and_apart(sale(3).takes(1, 0, 99).takes(2, 5, 9).takes(3, 12, 20), (3, 2, 0))]
#[case::all_at_once(sale(4).takes(1, 0, 9).takes(2, 1, 8).takes(3, 2, 7).takes(4, 3, 6), (4, 4, 0))]
#[case::sent_and_answered_in_one_microsecond(sale(2).takes(1, 3, 3).takes(2, 3, 3), (2, 2, 0))]
#[case::one_without_an_answer_overlaps_all_after_it(
    sale(3).ask(1, "1", 0, 9, Indeterminate).never_answered().takes(2, 5_000, 5_001).takes(3, 6_000, 6_001),
    (3, 2, 0))]
#[case::faults(indeterminate().fault(5, Some(10)).and_fault(2, None), (2, 2, 2))]
fn a_verdict_grades_how_hard_the_system_was_stressed(
    #[case] sale: Sale,
    #[case] (requests, greatest_overlap, faults): (u64, u64, u64),
) {
    let coverage = judge(&sale.0).coverage;
    assert_eq!(
        (coverage.requests, coverage.greatest_overlap, coverage.faults),
        (requests, greatest_overlap, faults)
    );
}

/// Findings and evidence do not depend on the order of the lines.
#[test]
fn the_order_of_the_lines_does_not_matter() {
    let late = 9 + DEADLINE_US;
    let mut sale = sold_again().takes(3, 0, 9).takes(4, 0, 9).takes(3, 20, 29);
    for buyer in 5..9 {
        let key = buyer.to_string();
        sale = sale
            .ask(buyer, &key, 0, late, accepted(100))
            .ask(buyer, &key, 0, 1, refused(UnknownSale))
            .ask(buyer, &key, 3, 9, confirmed(101))
            .ask(buyer, &key, 10, 19, refused(SoldOut))
            .row(buyer + 10, &key, 200);
    }
    let one = sale.0;
    let mut other = one.clone();
    other.requests.reverse();
    other.rows.as_mut().expect("rows").reverse();

    let shown = judge(&one).to_string();
    assert_eq!(shown, judge(&other).to_string());
    let names = |code| shown.contains(&format!("BROKEN {code} "));
    for code in ["I1", "I2", "I3", "I4", "I5", "I6", "I9", "I10"] {
        assert!(names(code), "not {code}:\n{shown}");
    }
}

/// The verdict names what it could not check.
#[rstest]
#[case::a_foreign_server(sale(1).foreign().ask(1, "1", 0, 9, confirmed(1)), &["I8", "I4", "I5", "I2"])]
#[case::released_tickets(sold_again(), &["I8", "I7", "I6"])]
#[case::released_at_an_unknown_time(
    sold_again().ask(3, "3", 0, 9, ends(3, 50, Some(Declined))).row(3, "3", 3).released(1, 2)
        .with_row(|row| row.released_us = None),
    &["I8", "I7", "I6", "I1", "I3"])]
#[case::a_buyer_who_can_not_know(indeterminate(), &["I8", "I7"])]
#[case::declined_without_ever_holding_a_ticket(declined().never_had_a_row(), &["I8"])]
#[case::the_order_of_service_is_recorded(with_a_vip(), &[])]
#[case::payments_to_a_foreign_server(
    sale(1).takes(1, 0, 9).paid().foreign(), &["I8", "I4", "I5", "I11", "I2"])]
#[case::declined_by_a_foreign_server(declined().foreign(), &["I8", "I4", "I5", "I2", "I7", "I6"])]
fn what_was_not_checked_is_said(#[case] sale: Sale, #[case] not_checked: &[&str]) {
    let verdict = judge(&sale.0);
    assert!(verdict.findings.is_empty(), "{verdict}");
    let listed: Vec<&str> = verdict.not_checked.iter().map(|part| part.invariant.code()).collect();
    assert_eq!(listed, not_checked);
}
