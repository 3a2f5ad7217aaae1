//! A history: every request of a rush as its client saw it, and the rows once all was quiet.
//!
//! As a file it is JSON lines, one `Line` each: a header, then requests, rows and faults in any order. The judge believes nothing else.
//! All times of requests and faults are microseconds on one monotonic clock of the client, counted from the start of the rush:
//! *sent* before the first byte of the request, *answered* after the last byte of the answer. Times of rows are microseconds on the
//! database's own clock. The two are never compared.

use std::io::{self, BufRead, Write};

use box_office::{BuyerId, ProblemKind, Refusal, SaleId};
use serde::{Deserialize, Serialize};
use uuid::Uuid;

/// The version of the format that this suite writes and reads.
pub const FORMAT_VERSION: u32 = 1;

/// Microseconds on the clock of whoever wrote them down.
pub type Micros = u64;

/// A rush, as its clients and its rows tell it.
#[derive(Clone, Debug, PartialEq)]
pub struct History {
    /// What was sold, and how.
    pub header: Header,
    /// Every request.
    pub requests: Vec<Request>,
    /// The reservations at quiescence. `None`: the rows could not be read, as with a foreign server.
    pub rows: Option<Vec<Row>>,
    /// What the suite did to the system.
    pub faults: Vec<Fault>,
}

/// The first line: what was sold, and how.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Header {
    /// [`FORMAT_VERSION`].
    pub version: u32,
    /// The strategy and its level, such as `lv1/read-then-write`; free text for the reader.
    pub strategy: String,
    /// The sale that all requests are about.
    pub sale: SaleId,
    /// How many tickets it had.
    pub capacity: u64,
    /// How long a request may take, from sent to its end.
    pub deadline_us: Micros,
    /// How long an order lives, from sent, before it may be answered "expired". `None`: orders do not expire.
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
    /// Names the request within its history, and in its `X-Request-Id`.
    pub request: u64,
    /// Who asked.
    pub buyer: BuyerId,
    /// The request key it carried. Repeats carry the same one.
    pub key: String,
    /// Before the first byte went out.
    pub sent_us: Micros,
    /// After the last byte of the answer came in. `None`: no answer ever came.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub answered_us: Option<Micros>,
    /// What came back.
    pub answer: Answer,
    /// The steps it took inside the server, where they were traced.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub steps: Vec<Step>,
}

/// What a client was told.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Answer {
    /// 201: the reservation is durable.
    Confirmed {
        /// Its id.
        reservation: Uuid,
    },
    /// 202: the order is taken; its final state comes later.
    Accepted {
        /// Its id.
        reservation: Uuid,
        /// The final state as the client observed it. `None`: it never came.
        ending: Option<Ending>,
    },
    /// A correct no, if the judge finds it true.
    Refused(Refused),
    /// 503, a dead connection, or no answer at all: it may or may not have happened.
    Indeterminate,
    /// An answer that the HTTP contract does not know.
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
        /// The one that the answer named.
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
    /// Too many requests from this client.
    RateLimited,
}

impl Refused {
    /// The reason of this name: the last segment of a problem's `type`, or the `reason` of a reservation. `None` if the
    /// name is no reason of a refusal, or if the existing reservation is missing from `already-reserved`.
    pub fn from_name(name: &str, earlier: Option<Uuid>) -> Option<Self> {
        match name {
            "expired" => return Some(Self::Expired),
            "declined" => return Some(Self::Declined),
            _ => {}
        }
        match ProblemKind::from_name(name)? {
            ProblemKind::SoldOut => Some(Self::SoldOut),
            ProblemKind::AlreadyReserved => earlier.map(|earlier| Self::AlreadyReserved { earlier }),
            ProblemKind::KeyOfAnotherBuyer => Some(Self::KeyOfAnotherBuyer),
            ProblemKind::UnknownSale => Some(Self::UnknownSale),
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
        }
    }
}

/// The final state of an accepted order, as its client observed it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Ending {
    /// When it was observed.
    pub at_us: Micros,
    /// `None`: confirmed. Otherwise why not.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub refused: Option<Refused>,
    /// Another final state, observed after this one: that breaks the promise that a final state never changes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub changed_to: Option<Box<Ending>>,
}

/// A step that a request took inside the server.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Step {
    /// When, on the client's clock: a trace is taken on the client's own machine only.
    pub at_us: Micros,
    /// The scheduling point.
    pub step: String,
    /// What was found there.
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
    /// Whose it is.
    pub buyer: BuyerId,
    /// The request key it was made under.
    pub key: String,
    /// What it is at quiescence.
    pub status: Status,
    /// When the ticket was taken, on the database's clock.
    pub taken_us: Micros,
    /// When the ticket was given back, on the database's clock.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub released_us: Option<Micros>,
}

/// What a reservation is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Status {
    /// It holds a ticket, and may still give it back.
    Held,
    /// It holds a ticket for good.
    Confirmed,
    /// It held a ticket and gave it back.
    Released,
}

/// What the suite did to the system.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Fault {
    /// In words: `instance 2 killed`.
    pub fault: String,
    /// When it was seen to have struck.
    pub struck_us: Micros,
    /// When it was mended. `None`: it was not.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub healed_us: Option<Micros>,
}

/// One line of a history file.
#[derive(Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Line {
    Header(Header),
    Request(Request),
    Row(Row),
    Fault(Fault),
    /// Says that the rows that stand in the file are all there were.
    RowsComplete,
}

/// Why a history file can't be read.
#[derive(Debug, thiserror::Error)]
pub enum Unreadable {
    /// A line is not what it should be.
    #[error("line {line}: {problem}")]
    Line {
        /// Counted from 1.
        line: usize,
        /// What is wrong with it.
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
    /// Whatever writing to `out` fails with.
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
        Ok(())
    }

    /// Reads what [`write`](Self::write) wrote.
    ///
    /// # Errors
    /// [`Unreadable`], naming the line.
    pub fn read(input: impl BufRead) -> Result<Self, Unreadable> {
        let mut header: Option<Header> = None;
        let mut rows_complete = false;
        let (mut requests, mut rows, mut faults) = (vec![], vec![], vec![]);
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
                (Line::RowsComplete, _) => rows_complete = true,
            }
        }
        let header = header.ok_or(Unreadable::Line {
            line: 1,
            problem: "the file is empty".into(),
        })?;
        if !rows_complete && !rows.is_empty() {
            return Err(Unreadable::Line {
                line: 1 + requests.len() + faults.len() + rows.len(),
                problem: "the file ends before the line `rows_complete`".into(),
            });
        }
        Ok(Self {
            header,
            requests,
            rows: rows_complete.then_some(rows),
            faults,
        })
    }
}
