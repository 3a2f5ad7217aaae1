//! The columns in which a decision is stored.

use box_office::Refusal;
use uuid::Uuid;

/// The columns `status`, `reason` and `earlier` of a reservation.
pub(crate) struct DecisionRow {
    pub(crate) status: &'static str,
    pub(crate) reason: Option<&'static str>,
    pub(crate) earlier: Option<Uuid>,
}

impl From<Option<Refusal>> for DecisionRow {
    fn from(refused: Option<Refusal>) -> Self {
        let Some(refusal) = refused else {
            return Self {
                status: "confirmed",
                reason: None,
                earlier: None,
            };
        };
        let (reason, earlier) = match refusal {
            Refusal::SoldOut => ("sold-out", None),
            Refusal::AlreadyReserved { earlier } => ("already-reserved", Some(earlier.id)),
            Refusal::KeyOfAnotherBuyer => ("key-of-another-buyer", None),
            Refusal::UnknownSale => ("unknown-sale", None),
        };
        Self {
            status: "refused",
            reason: Some(reason),
            earlier,
        }
    }
}
