//! The judge: an independent checker that reads a history and reports which invariants it breaks.
//!
//! It has no other input and depends on no strategy. A doubtful case is never a finding: a request
//! with unknown outcome may have taken effect at any time after it was sent, requests with equal
//! times are concurrent, and times of rows are never compared with times of requests.
//!
//! Each invariant is checked separately, so one mistake may break several. Where the definitions
//! leave room:
//!
//! - With rows, the rows show who has a ticket. Without rows, a confirmation does, and any unknown
//!   outcome may be a ticket.
//! - A released row without release time does not count for I1 and I3.
//! - A 202 that is decided after its deadline breaks I4 and I10. Two equal observations of a final
//!   state count as one.
//! - Only an order that was accepted first, expired, declined or cancelled may have held a ticket and have a
//!   released row. Other refused orders have no row (I5). With rows, an order of either kind that
//!   has no row has never held a ticket (I6, I7). Only a 201 without a row may have had one, which
//!   was lost (I4).
//! - With releases, "sold out" also needs a moment, on the database's clock, at which all tickets
//!   were held (I6), and no more tickets are left than were released (I7): each may have come back
//!   after the last buyer had sent a request. A double release shows as a stock that does not add up (I2).
//! - The charges of a reservation minus its refunds are 1 if it is confirmed, 0 if it is not. While
//!   it is held, either is right (I11). A charge of a reservation without a row must be refunded.
//! - "Expired" counts from the first sending of the order. "Already reserved" is false once an
//!   answer has reported the reservation as over.
//! - The order of service (I8) is that of each queue, as the record of offsets tells it: orders are
//!   decided in the order of their offsets, and an order that was accepted before another one was
//!   sent has the lower offset. The second is checked of orders that were sent once: a repeat may
//!   have been accepted in another queue. Without a record nothing is checked.
//! - A refusal of priority is believed: a history does not tell who is named. Its buyer does not
//!   count for I7.
//! - Buyers who only used another buyer's key, or whose orders only expired, were declined or
//!   cancelled, do not count for I7; an order that is said to have expired before its time is no
//!   excuse. A rate-limited answer is not final, neither for I7 nor for I9.
//! - A refused order with a live row breaks I9, unless a request with unknown outcome was sent at
//!   the same time or later, or tickets were released. A confirmed order without a row breaks I4.
//! - An answer outside the HTTP contract breaks I10, and may have taken a ticket. So does a request
//!   that never ends, also if a repeat of it got a final answer, and a repeat with unknown outcome
//!   that no final answer follows. With faults, of these two only requests sent after the last
//!   healing count.

mod evidence;
mod history_index;
mod rules;
mod verdict;

pub use evidence::Evidence;
pub(crate) use evidence::in_words;
pub use verdict::{Conclusion, Coverage, Finding, NotChecked, Tally, Verdict};

use crate::history::History;

/// Judges a history, in time that is nearly linear in its length.
pub fn judge(history: &History) -> Verdict {
    rules::judge(&history_index::HistoryIndex::new(history))
}
