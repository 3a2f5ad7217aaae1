//! The columns in which a decision is stored.

use box_office::{ProblemKind, Refusal};
use uuid::Uuid;

/// The columns `status`, `reason` and `earlier` of a reservation.
pub(crate) struct DecisionRow {
    pub(crate) status: &'static str,
    pub(crate) reason: Option<&'static str>,
    pub(crate) earlier: Option<Uuid>,
}

impl From<Option<Refusal>> for DecisionRow {
    fn from(refused: Option<Refusal>) -> Self {
        Self {
            status: if refused.is_some() { "refused" } else { "confirmed" },
            reason: refused.map(|refusal| ProblemKind::from(refusal).name()),
            earlier: refused.and_then(Refusal::earlier).map(|earlier| earlier.id),
        }
    }
}
