//! An index over a history: the look-up tables that the rules need.

use std::hash::Hash;

use box_office::BuyerId;
use foldhash::{HashMap, HashMapExt};
use uuid::Uuid;

use crate::history::{Answer, Ending, Entry, History, Micros, Payment, Refused, Request, Row, Status};

/// An order: a buyer's key, and every request that carried it, in the order of sending.
pub(super) struct Order<'a> {
    pub(super) number: usize,
    /// The number of its buyer.
    pub(super) buyer: usize,
    /// The number of its key.
    pub(super) key: usize,
    pub(super) requests: &'a [&'a Request],
}

/// A history and its look-up tables.
///
/// Buyers, keys, orders and reservations are numbered in the order of their first occurrence, so
/// that each is hashed once. The tables are plain vectors, whose iteration order is deterministic.
pub(super) struct HistoryIndex<'a> {
    pub(super) history: &'a History,
    reservations: Numbers<Uuid>,
    /// The numbers of each order's buyer and key.
    buyer_and_key_of_order: Vec<(usize, usize)>,
    requests_of_order: Groups<&'a Request>,
    /// The order that was sent first comes first.
    pub(super) orders_of_key: Groups<usize>,
    pub(super) requests_of_buyer: Groups<&'a Request>,
    rows_of_order: Groups<&'a Row>,
    pub(super) rows_of_key: Groups<&'a Row>,
    pub(super) rows_of_buyer: Groups<&'a Row>,
    /// For each reservation, its rows, with the number of the order that requested them.
    pub(super) rows_of_reservation: Groups<(Option<usize>, &'a Row)>,
    /// For each reservation, its payments.
    pub(super) payments_of_reservation: Groups<&'a Payment>,
    /// For each reservation, the requests that it was answered to, with the number of their order.
    answers_of_reservation: Groups<(usize, &'a Request)>,
    /// For each order, the earliest time at which its reservation can have existed. `None`: none of
    /// its requests can have created one.
    pub(super) earliest_effect_us: Vec<Option<Micros>>,
    /// Whether a ticket was or may have been released. Some rules then check necessary conditions
    /// only.
    pub(super) has_releases: bool,
}

/// The end of a request as the client saw it.
#[derive(Clone, Copy, PartialEq)]
pub(super) enum End<'a> {
    Confirmed(Uuid),
    Refused(&'a Refused),
    /// An accepted order without a final state.
    Open,
    Indeterminate,
    Unexpected,
}

impl Request {
    /// The final answer as the client knows it.
    pub(super) fn end(&self) -> End<'_> {
        match &self.answer {
            Answer::Confirmed { reservation } => End::Confirmed(*reservation),
            Answer::Accepted {
                reservation,
                ending: Some(ending),
            } => match &ending.refused {
                None => End::Confirmed(*reservation),
                Some(refused) => End::Refused(refused),
            },
            Answer::Accepted { ending: None, .. } => End::Open,
            Answer::Refused(refused) => End::Refused(refused),
            Answer::Indeterminate => End::Indeterminate,
            Answer::Unexpected { .. } => End::Unexpected,
        }
    }

    /// When the request ended for the client: answered, or its final state observed.
    pub(super) fn ended_us(&self) -> Option<Micros> {
        match &self.answer {
            Answer::Accepted { ending, .. } => ending.as_ref().map(|ending| ending.at_us),
            _ => self.answered_us,
        }
    }

    /// Whether the request ended before this time.
    pub(super) fn ended_before(&self, at_us: Micros) -> bool {
        self.ended_us().is_some_and(|ended_us| ended_us < at_us)
    }

    /// The reservation that its answer names as its own.
    pub(super) fn reservation(&self) -> Option<Uuid> {
        match self.answer {
            Answer::Confirmed { reservation } | Answer::Accepted { reservation, .. } => Some(reservation),
            _ => None,
        }
    }

    /// Whether the answer is final, so that the buyer need not repeat. A rate-limited answer is
    /// not.
    pub(super) fn is_final(&self) -> bool {
        match self.end() {
            End::Confirmed(_) => true,
            End::Refused(refused) => *refused != Refused::RateLimited,
            _ => false,
        }
    }

    /// Whether the request was confirmed or refused, by a rate limit too.
    pub(super) fn is_settled(&self) -> bool {
        matches!(self.end(), End::Confirmed(_) | End::Refused(_))
    }

    /// Whether its outcome is unknown to the client.
    pub(super) fn is_uncertain(&self) -> bool {
        matches!(self.end(), End::Open | End::Indeterminate | End::Unexpected)
    }

    /// Every observed final state of an accepted order: at most one if the state is stable.
    fn endings(&self) -> impl Iterator<Item = &Ending> {
        let first = match &self.answer {
            Answer::Accepted { ending, .. } => ending.as_ref(),
            _ => None,
        };
        std::iter::successors(first, |ending| ending.changed_to.as_deref())
    }

    /// Whether its final state changed.
    pub(super) fn has_changed(&self) -> bool {
        let mut endings = self.endings();
        let first = endings.next();
        endings.any(|later| first.is_some_and(|first| later.refused != first.refused))
    }

    /// The refusal, if no observed state was a confirmation.
    pub(super) fn refused(&self) -> Option<&Refused> {
        match self.end() {
            End::Refused(refused) if self.endings().all(|ending| ending.refused.is_some()) => Some(refused),
            _ => None,
        }
    }

    /// Whether its order was accepted first (202), and decided later.
    fn is_accepted(&self) -> bool {
        matches!(self.answer, Answer::Accepted { .. })
    }

    /// Whether it was refused after it may have held a ticket.
    fn may_have_released(&self) -> bool {
        matches!(
            self.refused(),
            Some(Refused::Expired | Refused::Declined | Refused::Cancelled)
        )
    }

    /// Whether it may have taken a ticket. A refused request has not; but if tickets are released,
    /// an order that was decided later may have held one until its refusal.
    fn may_have_taken(&self, has_releases: bool) -> bool {
        let decided_late = self.is_accepted() || self.may_have_released();
        self.refused().is_none() || (decided_late && has_releases)
    }

    /// Whether it may have created this row. A refused request has not, unless its order was
    /// decided later and the row is released.
    pub(super) fn may_have_made(&self, row: &Row) -> bool {
        self.may_have_taken(!row.is_live())
    }
}

impl Row {
    /// Whether it holds a ticket at quiescence.
    pub(super) fn is_live(&self) -> bool {
        self.status != Status::Released
    }

    /// The interval in which it held a ticket, on the database's clock. `None`: it was released at
    /// an unknown time.
    pub(super) fn held_us(&self) -> Option<(Micros, Micros)> {
        let until_us = if self.is_live() { Micros::MAX } else { self.released_us? };
        (self.taken_us < until_us).then_some((self.taken_us, until_us))
    }
}

impl<'a> HistoryIndex<'a> {
    pub(super) fn new(history: &'a History) -> Self {
        let rows = history.rows.as_deref().unwrap_or_default();
        let mut buyers: Numbers<BuyerId> = Numbers::for_about(history.requests.len());
        let mut keys: Numbers<&str> = Numbers::for_about(history.requests.len());
        let mut orders: Numbers<(usize, usize)> = Numbers::for_about(history.requests.len());
        let mut reservations: Numbers<Uuid> = Numbers::for_about(rows.len());

        let (mut of_order, mut of_buyer, mut answers) = (vec![], vec![], vec![]);
        of_order.reserve_exact(history.requests.len());
        of_buyer.reserve_exact(history.requests.len());
        let mut buyer_and_key_of_order = vec![];
        for request in &history.requests {
            let (buyer, key) = (buyers.of(request.buyer), keys.of(&request.key));
            let order = orders.of((buyer, key));
            if order == buyer_and_key_of_order.len() {
                buyer_and_key_of_order.push((buyer, key));
            }
            of_order.push((order, request));
            of_buyer.push((buyer, request));
            if let Some(reservation) = request.reservation() {
                answers.push((reservations.of(reservation), (order, request)));
            }
        }

        let (mut of_order_row, mut rows_of_key, mut rows_of_buyer, mut of_reservation) =
            (vec![], vec![], vec![], vec![]);
        for row in rows {
            let (buyer, key) = (buyers.of(row.buyer), keys.of(&row.key));
            let order = orders.look_up((buyer, key));
            of_order_row.extend(order.map(|order| (order, row)));
            rows_of_key.push((key, row));
            rows_of_buyer.push((buyer, row));
            of_reservation.push((reservations.of(row.reservation), (order, row)));
        }

        let payments = history.payments.iter().flatten();
        let payments: Vec<(usize, &Payment)> = payments
            .map(|payment| (reservations.of(payment.reservation), payment))
            .collect();

        let by_sent = |request: &&Request| (request.sent_us, request.request);
        let by_taken = |row: &&Row| (row.taken_us, row.reservation);
        let requests_of_order = Groups::new(orders.len(), of_order, by_sent);
        let of_key = buyer_and_key_of_order.iter().enumerate();
        let of_key = of_key.map(|(order, &(_, key))| (key, order)).collect();
        let by_first_sent = |order: &usize| by_sent(&requests_of_order.of(*order)[0]);
        let has_releases = match &history.rows {
            // A reservation that released its ticket has a row.
            Some(rows) => rows.iter().any(|row| !row.is_live()),
            None => history.requests.iter().any(Request::may_have_released),
        };
        let earliest_effect_us = |requests: &[&Request]| {
            let mut requests = requests.iter();
            let first = requests.find(|request| request.may_have_taken(has_releases));
            first.map(|request| request.sent_us)
        };
        Self {
            history,
            orders_of_key: Groups::new(keys.len(), of_key, by_first_sent),
            earliest_effect_us: requests_of_order.all().map(earliest_effect_us).collect(),
            requests_of_order,
            requests_of_buyer: Groups::new(buyers.len(), of_buyer, by_sent),
            buyer_and_key_of_order,
            rows_of_order: Groups::new(orders.len(), of_order_row, by_taken),
            rows_of_key: Groups::new(keys.len(), rows_of_key, by_taken),
            rows_of_buyer: Groups::new(buyers.len(), rows_of_buyer, by_taken),
            rows_of_reservation: Groups::new(reservations.len(), of_reservation, |(_, row)| by_taken(row)),
            payments_of_reservation: Groups::new(reservations.len(), payments, |payment| {
                payment.entry == Entry::Refund
            }),
            answers_of_reservation: Groups::new(reservations.len(), answers, |(_, request)| by_sent(request)),
            reservations,
            has_releases,
        }
    }

    pub(super) fn rows(&self) -> &'a [Row] {
        self.history.rows.as_deref().unwrap_or_default()
    }

    pub(super) fn has_rows(&self) -> bool {
        self.history.rows.is_some()
    }

    pub(super) fn orders(&self) -> impl Iterator<Item = Order<'_>> {
        (0..self.buyer_and_key_of_order.len()).map(|number| self.order(number))
    }

    pub(super) fn order(&self, number: usize) -> Order<'_> {
        let (buyer, key) = self.buyer_and_key_of_order[number];
        Order {
            number,
            buyer,
            key,
            requests: self.requests_of_order.of(number),
        }
    }

    pub(super) fn rows_of(&self, order: &Order<'_>) -> &[&'a Row] {
        self.rows_of_order.of(order.number)
    }

    /// The rows of a reservation, with the number of the order that requested them.
    pub(super) fn rows_of_reservation(&self, reservation: Uuid) -> &[(Option<usize>, &'a Row)] {
        let number = self.reservations.look_up(reservation);
        number.map_or(&[], |number| self.rows_of_reservation.of(number))
    }

    /// The requests that this reservation was answered to, with the number of their order.
    pub(super) fn answers_of(&self, reservation: Uuid) -> &[(usize, &'a Request)] {
        let number = self.reservations.look_up(reservation);
        number.map_or(&[], |number| self.answers_of_reservation.of(number))
    }

    /// For each reservation that has a row, a payment or an answer: its rows and its payments.
    pub(super) fn rows_and_payments(&self) -> impl Iterator<Item = (&[(Option<usize>, &'a Row)], &[&'a Payment])> {
        self.rows_of_reservation.all().zip(self.payments_of_reservation.all())
    }

    /// The number of confirmed reservations whose row is lost: each may have held a ticket. An
    /// accepted order without a row never has.
    pub(super) fn lost_tickets(&self) -> u64 {
        let answers = self.answers_of_reservation.all().zip(self.rows_of_reservation.all());
        let lost = answers.filter(|(answers, rows)| {
            let mut answers = answers.iter();
            rows.is_empty() && answers.any(|(_, request)| matches!(request.answer, Answer::Confirmed { .. }))
        });
        lost.count() as u64
    }

    /// Whether the order of this request may have been declined or cancelled. A sale that takes
    /// payments holds a ticket before it asks for one, so with complete rows there is a row.
    pub(super) fn may_have_ended_unpaid(&self, request: &Request) -> bool {
        if !self.has_rows() || self.history.payments.is_none() {
            return true;
        }
        let reservation = request.reservation();
        reservation.is_some_and(|reservation| !self.rows_of_reservation(reservation).is_empty())
    }

    /// Whether the order was past its time to live at this time. A repeat does not extend its life.
    pub(super) fn may_have_expired(&self, order: &Order<'_>, at_us: Micros) -> bool {
        let passes_us = |expiry_us| order.requests[0].sent_us.saturating_add(expiry_us);
        let expiry_us = self.history.header.expiry_us;
        expiry_us.is_some_and(|expiry_us| passes_us(expiry_us) <= at_us)
    }

    /// For every reservation with a stable confirmation, the first request that was confirmed.
    pub(super) fn confirmed(&self) -> impl Iterator<Item = &'a Request> {
        self.answers_of_reservation.all().filter_map(|answers| {
            let mut requests = answers.iter().map(|&(_, request)| request);
            requests.find(|request| matches!(request.end(), End::Confirmed(_)) && !request.has_changed())
        })
    }

    /// The times at which tickets may have been taken, sorted: for each ticket, when its order was
    /// first sent.
    ///
    /// An order takes its ticket at its first sending, which is the earliest possible time. A
    /// refused request takes none. With rows, neither does an accepted order that has no row.
    pub(super) fn earliest_effects_us(&self) -> Vec<Micros> {
        let mut times_us = vec![];
        for order in self.orders() {
            if let Some(first_us) = self.earliest_effect_us[order.number] {
                let mut reservations: Vec<Uuid> = order
                    .requests
                    .iter()
                    .filter_map(|request| self.confirmed_without_own_row(&order, request))
                    .collect();
                reservations.sort_unstable();
                reservations.dedup();
                let mut taken = self.rows_of(&order).len() + reservations.len();
                if taken == 0 && !self.has_rows() {
                    taken = usize::from(order.requests.iter().any(|request| request.may_have_released()));
                }
                times_us.extend(std::iter::repeat_n(first_us, taken));
            }
            if !self.has_rows() {
                // Any of these may have taken a ticket.
                let uncertain = order.requests.iter().filter(|request| request.is_uncertain());
                times_us.extend(uncertain.map(|request| request.sent_us));
            }
        }
        times_us.sort_unstable();
        times_us
    }

    /// The reservation that a request of this order was confirmed with, if the order has no row of
    /// it and it may have held a ticket all the same: its row may name another order, or, after a
    /// 201, be lost (I4).
    fn confirmed_without_own_row(&self, order: &Order<'_>, request: &Request) -> Option<Uuid> {
        let End::Confirmed(reservation) = request.end() else {
            return None;
        };
        let rows = self.rows_of_reservation(reservation);
        let is_own = rows.iter().any(|(order_of_row, _)| *order_of_row == Some(order.number));
        let never_was = rows.is_empty() && self.has_rows() && request.is_accepted();
        (!is_own && !never_was).then_some(reservation)
    }
}

/// Numbers values in the order of their first occurrence.
struct Numbers<T>(HashMap<T, usize>);

impl<T: Eq + Hash> Numbers<T> {
    fn for_about(things: usize) -> Self {
        Self(HashMap::with_capacity(things))
    }

    fn of(&mut self, thing: T) -> usize {
        let next = self.0.len();
        *self.0.entry(thing).or_insert(next)
    }

    fn look_up(&self, thing: T) -> Option<usize> {
        self.0.get(&thing).copied()
    }

    fn len(&self) -> usize {
        self.0.len()
    }
}

/// Values grouped by a number.
pub(super) struct Groups<T> {
    /// The start of each group, and the end of the last.
    starts: Vec<usize>,
    members: Vec<T>,
}

impl<T: Copy> Groups<T> {
    /// Groups the members, and sorts each group by `key`.
    fn new<K: Ord>(groups: usize, mut members: Vec<(usize, T)>, key: impl Fn(&T) -> K) -> Self {
        // Groups are numbered in the order of occurrence, so the input is nearly sorted, which
        // makes the stable sort fast.
        members.sort_by_key(|(group, member)| (*group, key(member)));
        let mut starts = Vec::with_capacity(groups + 1);
        for (at, (group, _)) in members.iter().enumerate() {
            while starts.len() <= *group {
                starts.push(at);
            }
        }
        starts.resize(groups + 1, members.len());
        Self {
            starts,
            members: members.into_iter().map(|(_, member)| member).collect(),
        }
    }

    pub(super) fn of(&self, group: usize) -> &[T] {
        &self.members[self.starts[group]..self.starts[group + 1]]
    }

    /// All groups in order, empty ones included.
    pub(super) fn all(&self) -> impl Iterator<Item = &[T]> {
        self.starts.windows(2).map(|edges| &self.members[edges[0]..edges[1]])
    }
}
