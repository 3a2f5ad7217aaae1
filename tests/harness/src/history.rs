//! A history: every request of a rush as its client saw it, and the rows at quiescence.
//!
//! A history file is JSON lines: a header, then requests, rows and faults in any order. It is the
//! judge's only input. All times of requests and faults are microseconds on one monotonic clock of
//! the client, counted from the start of the rush: *sent* before the first byte of the request,
//! *answered* after the last byte of the answer. Times of rows are microseconds on the database's
//! own clock. The two are never compared.

use std::io::{self, BufRead, Write};

use box_office::{BuyerId, ProblemKind, Refusal, SaleId};
use serde::{Deserialize, Serialize};
use uuid::Uuid;

/// The version of the format that this crate writes and reads.
pub const FORMAT_VERSION: u32 = 1;

/// Microseconds, on the clock of the recording process or of the database.
pub type Micros = u64;

/// The record of a rush.
#[derive(Clone, Debug, PartialEq)]
pub struct History {
    /// The sale and the limits of the run.
    pub header: Header,
    /// Every request.
    pub requests: Vec<Request>,
    /// The reservations at quiescence. `None`: the rows could not be read, as with a third-party
    /// server.
    pub rows: Option<Vec<Row>>,
    /// The injected faults.
    pub faults: Vec<Fault>,
    /// The ledger of the payment service at quiescence. `None`: the sale takes no payments.
    pub payments: Option<Vec<Payment>>,
    /// Where each decided order stood in its queue. `None`: the strategy keeps no record of it.
    pub decisions: Option<Vec<Decision>>,
}

/// The first line: the sale and the limits of the run.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Header {
    /// [`FORMAT_VERSION`].
    pub version: u32,
    /// The strategy and its level, such as `lv1/read-then-write`. Informative only.
    pub strategy: String,
    /// The sale of all requests.
    pub sale: SaleId,
    /// The number of tickets on sale.
    pub capacity: u64,
    /// The deadline of a request, from sent to its end.
    pub deadline_us: Micros,
    /// The time from sent after which an order may be answered "expired". `None`: orders do not
    /// expire.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub expiry_us: Option<Micros>,
    /// The stock at quiescence. `None`: it could not be read.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stock: Option<i64>,
}

/// One request, as its client saw it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Request {
    /// The id of the request in its history, and its `X-Request-Id`.
    pub request: u64,
    /// The buyer.
    pub buyer: BuyerId,
    /// The idempotency key. Repeats carry the same key.
    pub key: String,
    /// The time before the first byte was sent.
    pub sent_us: Micros,
    /// The time after the last byte of the answer was received. `None`: there was no answer.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub answered_us: Option<Micros>,
    /// The answer.
    pub answer: Answer,
    /// The steps inside the server, if they were traced.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub steps: Vec<Step>,
}

/// The answer to a request.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Answer {
    /// 201: the reservation is durable.
    Confirmed {
        /// Its id.
        reservation: Uuid,
    },
    /// 202: the order is accepted; its final state follows later.
    Accepted {
        /// Its id.
        reservation: Uuid,
        /// The final state as the client observed it. `None`: none was observed.
        ending: Option<Ending>,
    },
    /// A refusal, which is correct if the judge finds it true.
    Refused(Refused),
    /// 503, a broken connection, or no answer: the outcome is unknown.
    Indeterminate,
    /// An answer outside the HTTP contract.
    Unexpected {
        /// The HTTP status, and the start of the body.
        what: String,
    },
}

/// The reason of a refusal, as the client observed it.
///
/// It is separate from [`Refusal`], the reason that a strategy gives. It is part of the format of history files, which
/// must stay readable when box-office changes; it covers servers other than the levels', with reasons that no level
/// gives; and the judge must not depend on the code that it judges.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Refused {
    /// Every ticket is taken.
    SoldOut,
    /// The buyer already has this reservation.
    AlreadyReserved {
        /// The reservation that the answer named.
        earlier: Uuid,
    },
    /// The key was used by another buyer.
    KeyOfAnotherBuyer,
    /// There is no such sale.
    UnknownSale,
    /// The order's time to live had passed.
    Expired,
    /// The payment was declined.
    Declined,
    /// The buyer cancelled the order before it was confirmed.
    Cancelled,
    /// Too many requests from this client.
    RateLimited,
    /// The request claimed a priority that the buyer does not have.
    NotVip,
}

impl Refused {
    /// The reason of this name: the last segment of a problem's `type`, or the `reason` of a reservation. `None` if the
    /// name is no reason of a refusal, or if the existing reservation is missing from `already-reserved`.
    pub fn from_name(name: &str, earlier: Option<Uuid>) -> Option<Self> {
        match name {
            "declined" => return Some(Self::Declined),
            "cancelled" => return Some(Self::Cancelled),
            _ => {}
        }
        match ProblemKind::from_name(name)? {
            ProblemKind::SoldOut => Some(Self::SoldOut),
            ProblemKind::AlreadyReserved => earlier.map(|earlier| Self::AlreadyReserved { earlier }),
            ProblemKind::KeyOfAnotherBuyer => Some(Self::KeyOfAnotherBuyer),
            ProblemKind::UnknownSale => Some(Self::UnknownSale),
            ProblemKind::Expired => Some(Self::Expired),
            ProblemKind::NotVip => Some(Self::NotVip),
            _ => None,
        }
    }
}

impl From<Refusal> for Refused {
    fn from(refusal: Refusal) -> Self {
        match refusal {
            Refusal::SoldOut => Self::SoldOut,
            Refusal::AlreadyReserved { earlier } => Self::AlreadyReserved { earlier: earlier.id },
            Refusal::KeyOfAnotherBuyer => Self::KeyOfAnotherBuyer,
            Refusal::UnknownSale => Self::UnknownSale,
            Refusal::Expired => Self::Expired,
            Refusal::NotVip => Self::NotVip,
        }
    }
}

/// The final state of an accepted order, as its client observed it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Ending {
    /// When it was observed.
    pub at_us: Micros,
    /// The reason of a refusal; `None`: confirmed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub refused: Option<Refused>,
    /// Another final state, observed after this one: that breaks the promise that a final state
    /// never changes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub changed_to: Option<Box<Ending>>,
}

/// A step that a request took inside the server.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Step {
    /// The time on the client's clock, as a trace is only taken on the client's machine.
    pub at_us: Micros,
    /// The scheduling point.
    pub step: String,
    /// The value that the strategy reported there.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub saw: Option<String>,
    /// The source line that marks it: `levels/…/read_then_write.rs:52`.
    pub place: String,
}

/// A reservation as its row says it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Row {
    /// Its id.
    pub reservation: Uuid,
    /// The buyer.
    pub buyer: BuyerId,
    /// The idempotency key of the reservation.
    pub key: String,
    /// The status at quiescence.
    pub status: Status,
    /// When the ticket was taken, on the database's clock.
    pub taken_us: Micros,
    /// When the ticket was released, on the database's clock.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub released_us: Option<Micros>,
}

/// The status of a reservation.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Status {
    /// It holds a ticket, and may still release it.
    Held,
    /// It holds a ticket for good.
    Confirmed,
    /// It held a ticket and has released it.
    Released,
}

/// An injected fault.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Fault {
    /// In words: `instance 2 killed`.
    pub fault: String,
    /// When it was seen to have struck.
    pub struck_us: Micros,
    /// When it was healed. `None`: it was not.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub healed_us: Option<Micros>,
}

/// An entry of the payment service's ledger.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Payment {
    /// The reservation that was paid for.
    pub reservation: Uuid,
    /// Whether money was taken or returned.
    pub entry: Entry,
}

/// The kind of an entry of the ledger.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Entry {
    /// The price of one ticket was taken.
    Charge,
    /// It was returned.
    Refund,
}

/// The place of a decided order in its queue: a partition of a topic. Offsets count the orders of a
/// queue as they were accepted.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Decision {
    /// Numbers the decisions of a queue as they were taken.
    pub number: u64,
    /// The reservation.
    pub reservation: Uuid,
    /// The topic.
    pub topic: String,
    /// The partition of the topic.
    pub partition: i32,
    /// The offset in the partition.
    pub offset: u64,
}

/// One line of a history file.
#[derive(Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Line {
    Header(Header),
    Request(Request),
    Row(Row),
    Fault(Fault),
    Payment(Payment),
    Decision(Decision),
    /// Marks the rows in the file as complete.
    RowsComplete,
    /// Marks the payments in the file as complete.
    PaymentsComplete,
    /// Marks the decisions in the file as complete.
    DecisionsComplete,
}

/// Why a history file can't be read.
#[derive(Debug, thiserror::Error)]
pub enum Unreadable {
    /// A line is invalid.
    #[error("line {line}: {problem}")]
    Line {
        /// Counted from 1.
        line: usize,
        /// The reason.
        problem: String,
    },
    /// The file can't be read at all.
    #[error(transparent)]
    Io(#[from] io::Error),
}

impl History {
    /// Writes the history as JSON lines.
    ///
    /// # Errors
    /// The error of writing to `out`.
    pub fn write(&self, mut out: impl Write) -> io::Result<()> {
        let mut line = |line: &Line| -> io::Result<()> {
            serde_json::to_writer(&mut out, line)?;
            out.write_all(b"\n")
        };
        line(&Line::Header(self.header.clone()))?;
        for request in &self.requests {
            line(&Line::Request(request.clone()))?;
        }
        for fault in &self.faults {
            line(&Line::Fault(fault.clone()))?;
        }
        if let Some(rows) = &self.rows {
            for row in rows {
                line(&Line::Row(row.clone()))?;
            }
            line(&Line::RowsComplete)?;
        }
        if let Some(payments) = &self.payments {
            for payment in payments {
                line(&Line::Payment(payment.clone()))?;
            }
            line(&Line::PaymentsComplete)?;
        }
        if let Some(decisions) = &self.decisions {
            for decision in decisions {
                line(&Line::Decision(decision.clone()))?;
            }
            line(&Line::DecisionsComplete)?;
        }
        Ok(())
    }

    /// Reads what [`write`](Self::write) wrote.
    ///
    /// # Errors
    /// [`Unreadable::Line`] if a line is invalid, [`Unreadable::Io`] if reading fails.
    pub fn read(input: impl BufRead) -> Result<Self, Unreadable> {
        let mut header: Option<Header> = None;
        let (mut rows_complete, mut payments_complete, mut decisions_complete) = (false, false, false);
        let (mut requests, mut rows, mut faults) = (vec![], vec![], vec![]);
        let (mut payments, mut decisions) = (vec![], vec![]);
        for (index, text) in input.lines().enumerate() {
            let wrong = |problem: String| Unreadable::Line {
                line: index + 1,
                problem,
            };
            let line = serde_json::from_str(&text?).map_err(|error| wrong(error.to_string()))?;
            match (line, &header) {
                (Line::Header(first), None) if first.version == FORMAT_VERSION => {
                    header = Some(first);
                }
                (Line::Header(first), None) => {
                    return Err(wrong(format!(
                        "format version {}, but this is a reader of version {FORMAT_VERSION}",
                        first.version
                    )));
                }
                (Line::Header(_), Some(_)) => return Err(wrong("a second header".into())),
                (_, None) => return Err(wrong("the first line must be the header".into())),
                (Line::Request(request), _) => requests.push(request),
                (Line::Row(row), _) => rows.push(row),
                (Line::Fault(fault), _) => faults.push(fault),
                (Line::Payment(payment), _) => payments.push(payment),
                (Line::Decision(decision), _) => decisions.push(decision),
                (Line::RowsComplete, _) => rows_complete = true,
                (Line::PaymentsComplete, _) => payments_complete = true,
                (Line::DecisionsComplete, _) => decisions_complete = true,
            }
        }
        let header = header.ok_or(Unreadable::Line {
            line: 1,
            problem: "the file is empty".into(),
        })?;
        let ends_before = |marker| Unreadable::Line {
            line: 1 + requests.len() + faults.len() + rows.len() + payments.len() + decisions.len(),
            problem: format!("the file ends before the line `{marker}`"),
        };
        if !rows_complete && !rows.is_empty() {
            return Err(ends_before("rows_complete"));
        }
        if !payments_complete && !payments.is_empty() {
            return Err(ends_before("payments_complete"));
        }
        if !decisions_complete && !decisions.is_empty() {
            return Err(ends_before("decisions_complete"));
        }
        Ok(Self {
            header,
            requests,
            rows: rows_complete.then_some(rows),
            faults,
            payments: payments_complete.then_some(payments),
            decisions: decisions_complete.then_some(decisions),
        })
    }
}
