//! The judge: reads a history, and says which of the invariants it breaks.
//!
//! It asks nobody and knows no strategy. A doubtful case never accuses: an undecided request may have taken effect at any time after it was
//! sent, requests whose times are equal count as concurrent, and times of rows are never compared with times of requests.

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
