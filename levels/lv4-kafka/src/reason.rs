//! How a decision is stored in its row.

use box_office::{ProblemKind, Refusal};
use uuid::Uuid;

/// The columns of a decision in `reservation`.
///
/// `reason` is the name of the [`ProblemKind`] of the refusal, so that a stored reason is the same word as a `type`
/// in an HTTP response.
pub(crate) struct Reason {
    pub(crate) status: &'static str,
    pub(crate) reason: Option<&'static str>,
    pub(crate) earlier: Option<Uuid>,
}

impl From<Option<Refusal>> for Reason {
    fn from(refused: Option<Refusal>) -> Self {
        Self {
            status: if refused.is_some() { "refused" } else { "confirmed" },
            reason: refused.map(|refusal| ProblemKind::from(refusal).name()),
            earlier: refused.and_then(Refusal::earlier).map(|earlier| earlier.id),
        }
    }
}
