//! A history, looked up by what the rules ask for.

use std::collections::HashMap;

use box_office::BuyerId;
use uuid::Uuid;

use crate::history::{Answer, History, Micros, Refused, Request, Row, Status};

/// One order: a buyer's key, and every request that carried it.
pub(super) struct Order<'a> {
    pub(super) requests: Vec<&'a Request>,
}

/// A history and its look-up tables.
pub(super) struct Index<'a> {
    pub(super) history: &'a History,
    pub(super) orders: HashMap<(BuyerId, &'a str), Order<'a>>,
    /// For each key, the buyers that used it, with the first time each sent it.
    pub(super) buyers_of_key: HashMap<&'a str, Vec<(BuyerId, Micros)>>,
    pub(super) rows_by_id: HashMap<Uuid, Vec<&'a Row>>,
    pub(super) rows_by_key: HashMap<&'a str, Vec<&'a Row>>,
    pub(super) rows_by_buyer: HashMap<BuyerId, Vec<&'a Row>>,
    /// What buyers were told they have, with the request that says so.
    pub(super) told: HashMap<Uuid, &'a Request>,
}

/// The end of a request, as far as the client saw one.
#[derive(Clone, Copy)]
pub(super) enum End<'a> {
    Confirmed(Uuid),
    Refused(&'a Refused),
    /// An accepted order without a final state.
    Open,
    Undecided,
    Unexpected,
}

impl Request {
    /// What the client knows in the end.
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
            Answer::Undecided => End::Undecided,
            Answer::Unexpected { .. } => End::Unexpected,
        }
    }

    /// When it ended for the client: answered, or its final state observed.
    pub(super) fn ended_us(&self) -> Option<Micros> {
        match &self.answer {
            Answer::Accepted { ending, .. } => ending.as_ref().map(|ending| ending.at_us),
            _ => self.answered_us,
        }
    }

    /// Whether nothing can come after it: the buyer need not ask again.
    pub(super) fn is_final(&self) -> bool {
        matches!(self.end(), End::Confirmed(_) | End::Refused(_)) && !self.is_refused_by_the_door()
    }

    /// Rate limiting says nothing about the order.
    pub(super) fn is_refused_by_the_door(&self) -> bool {
        matches!(self.end(), End::Refused(Refused::RateLimited))
    }
}

impl Row {
    /// Whether it holds a ticket at quiescence.
    pub(super) fn is_live(&self) -> bool {
        self.status != Status::Released
    }

    /// The end of its time with a ticket, on the database's clock.
    pub(super) fn until_us(&self) -> Micros {
        self.released_us.unwrap_or(Micros::MAX)
    }
}

impl<'a> Index<'a> {
    pub(super) fn new(history: &'a History) -> Self {
        let mut index = Self {
            history,
            orders: HashMap::with_capacity(history.requests.len()),
            buyers_of_key: HashMap::with_capacity(history.requests.len()),
            rows_by_id: HashMap::new(),
            rows_by_key: HashMap::new(),
            rows_by_buyer: HashMap::new(),
            told: HashMap::new(),
        };
        for request in &history.requests {
            let key = request.key.as_str();
            let order = index
                .orders
                .entry((request.buyer, key))
                .or_insert(Order { requests: vec![] });
            order.requests.push(request);
            let buyers = index.buyers_of_key.entry(key).or_default();
            match buyers.iter_mut().find(|(buyer, _)| *buyer == request.buyer) {
                Some((_, first_us)) => *first_us = request.sent_us.min(*first_us),
                None => buyers.push((request.buyer, request.sent_us)),
            }
            if let End::Confirmed(reservation) = request.end() {
                index.told.entry(reservation).or_insert(request);
            }
        }
        for row in history.rows.iter().flatten() {
            index.rows_by_id.entry(row.reservation).or_default().push(row);
            index.rows_by_key.entry(&row.key).or_default().push(row);
            index.rows_by_buyer.entry(row.buyer).or_default().push(row);
        }
        index
    }

    pub(super) fn rows(&self) -> &'a [Row] {
        self.history.rows.as_deref().unwrap_or_default()
    }

    /// Whether a ticket was ever given back, or may have been: then some rules can only check what is necessary.
    pub(super) fn has_releases(&self) -> bool {
        let in_rows = self.rows().iter().any(|row| !row.is_live());
        let in_answers = self
            .history
            .requests
            .iter()
            .any(|request| matches!(request.end(), End::Refused(Refused::Expired | Refused::Declined)));
        in_rows || in_answers
    }

    /// For every reservation that took a ticket, as far as anybody can know, when its order was first sent; in the order of time.
    ///
    /// A repeated key takes at its first sending, so that nobody is accused for having been quick.
    pub(super) fn takers_us(&self) -> Vec<Micros> {
        let mut takers = vec![];
        for (&(buyer, key), order) in &self.orders {
            let Some(first_us) = order.requests.iter().map(|request| request.sent_us).min() else {
                continue;
            };
            let rows = self.rows_by_key.get(key).into_iter().flatten();
            let rows = rows.filter(|row| row.buyer == buyer).count();
            let only_refused = order
                .requests
                .iter()
                .all(|request| matches!(request.end(), End::Refused(_)));
            let told = order
                .requests
                .iter()
                .any(|request| matches!(request.end(), End::Confirmed(_)));
            let taken = match rows {
                0 => usize::from(told),
                _ if only_refused => 0,
                rows => rows,
            };
            takers.extend(std::iter::repeat_n(first_us, taken));
        }
        takers.sort_unstable();
        takers
    }
}
