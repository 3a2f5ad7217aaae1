//! The columns in which a decision is stored.

use box_office::{ProblemKind, Refusal};
use uuid::Uuid;

/// The columns `status`, `reason` and `earlier` of a reservation.
pub(crate) struct DecisionRow {
    pub(crate) status: &'static str,
    pub(crate) reason: Option<&'static str>,
    pub(crate) earlier: Option<Uuid>,
}

impl DecisionRow {
    /// The columns of a refusal, or of a ticket with the status `granted`.
    pub(crate) fn new(refused: Option<Refusal>, granted: &'static str) -> Self {
        Self {
            status: match refused {
                None => granted,
                Some(Refusal::Expired) => "expired",
                Some(_) => "refused",
            },
            reason: refused.map(|refusal| ProblemKind::from(refusal).name()),
            earlier: refused.and_then(Refusal::earlier).map(|earlier| earlier.id),
        }
    }
}

impl From<Option<Refusal>> for DecisionRow {
    fn from(refused: Option<Refusal>) -> Self {
        Self::new(refused, "confirmed")
    }
}
