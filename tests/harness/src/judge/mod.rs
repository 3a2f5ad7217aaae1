//! The judge: reads a history, and says which of the invariants it breaks.
//!
//! It asks nobody and knows no strategy. A doubtful case never accuses: an undecided request may have taken effect at any time after it was
//! sent, requests whose times are equal count as concurrent, and times of rows are never compared with times of requests.
//!
//! Each invariant is judged by itself, so that one mistake may break several. Where their words leave room:
//!
//! - Where there are rows, they say who has a ticket. Without them, a confirmation does: it is final. Whatever is undecided then may be a ticket.
//! - A row that was given back nobody knows when (no release time) is not held against I1 and I3.
//! - A 202 that is decided after its deadline breaks I4 and I10. Final states observed twice alike are one.
//! - Only an order that was decided late, expired or declined may have held a ticket and have a released row. Others that were refused have none (I5).
//! - "Expired" counts from the first sending of the order. "Already reserved" is false once an answer said that the reservation was over.
//! - Buyers who only ever used another buyer's key are no buyers for I7. A rate-limited request is no final answer there, nor for I9.
//! - A refused order with a live row breaks I9, unless a request that is undecided was sent at the same time or later, or tickets were given back.
//!   A confirmed one with no row at all is I4's.
//! - An answer that the HTTP contract does not know breaks I10, and may have taken a ticket. I10 is also broken, where no fault struck, by an
//!   undecided repeat or an unanswered request that no final answer follows. With faults, only what was sent after the last healing counts.

mod evidence;
mod index;
mod rules;
mod verdict;

pub use evidence::Evidence;
pub(crate) use evidence::in_words;
pub use verdict::{Conclusion, Coverage, Finding, NotChecked, Tally, Verdict};

use crate::history::History;

/// Judges a history, in a time that grows with its length and hardly more.
pub fn judge(history: &History) -> Verdict {
    rules::judge(&index::Index::new(history))
}
