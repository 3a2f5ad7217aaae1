//! The words of a sale. An outcome, a refusal and an undecided answer are three types, so that none can pass for another.

use std::fmt;

use serde::{Deserialize, Serialize};
use uuid::Uuid;

/// Names a sale.
pub type SaleId = i64;

/// Names a buyer. A buyer has at most one reservation in a sale.
pub type BuyerId = i64;

/// The client's `Idempotency-Key`: the same key in the same sale always leads to the same reservation.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct RequestKey(String);

/// A request key is 1 to 128 visible ASCII characters.
#[derive(Debug, thiserror::Error)]
#[error("a request key is 1 to {max} visible ASCII characters", max = RequestKey::MAX_LENGTH)]
pub struct InvalidRequestKey;

impl RequestKey {
    /// The longest key that is accepted, in characters.
    pub const MAX_LENGTH: usize = 128;

    /// A key nobody else has, for a buyer who sent none.
    pub fn fresh() -> Self {
        Self(Uuid::new_v4().to_string())
    }

    /// The key as the client wrote it.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl TryFrom<String> for RequestKey {
    type Error = InvalidRequestKey;

    fn try_from(text: String) -> Result<Self, InvalidRequestKey> {
        let visible = text.bytes().all(|byte| byte.is_ascii_graphic());
        if text.is_empty() || text.len() > Self::MAX_LENGTH || !visible {
            return Err(InvalidRequestKey);
        }
        Ok(Self(text))
    }
}

impl From<RequestKey> for String {
    fn from(key: RequestKey) -> Self {
        key.0
    }
}

impl fmt::Display for RequestKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// What one buyer asks for: one ticket of one sale.
#[derive(Clone, Debug)]
pub struct Order {
    /// The sale to buy from.
    pub sale: SaleId,
    /// Who buys.
    pub buyer: BuyerId,
    /// Under which key this and every repeat of it is known.
    pub key: RequestKey,
}

/// A ticket taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Reservation {
    /// Names the reservation, and its row.
    pub id: Uuid,
}

/// A yes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// The reservation's row is durable.
    Confirmed(Reservation),
    /// The order is durable, and will be decided; its final state comes later.
    Accepted(Reservation),
}

/// A correct no: the state of the sale was looked at, and this was true.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// Every ticket is taken.
    #[error("every ticket of this sale is taken")]
    SoldOut,
    /// The buyer has a reservation in this sale under another key.
    #[error("this buyer already has reservation {0} in this sale", earlier.id)]
    AlreadyReserved {
        /// The reservation the buyer has.
        earlier: Reservation,
    },
    /// The key belongs to another buyer of this sale.
    #[error("this request key was used by another buyer")]
    KeyOfAnotherBuyer,
    /// There is no such sale.
    #[error("there is no such sale")]
    UnknownSale,
}

/// The system can't say: it may or may not have happened. The buyer repeats with the same key.
#[derive(Debug, thiserror::Error)]
pub enum Indeterminate {
    /// No connection or lock could be had in time.
    #[error("too many requests are waiting")]
    Overloaded,
    /// A step of the reservation took too long and was given up.
    #[error("the reservation was given up after too long")]
    TimedOut,
    /// A backend can't be reached, or answered with an error of its own.
    #[error("a backend is away")]
    BackendAway(#[source] anyhow::Error),
}

/// Every answer that is not a yes. The two kinds never turn into each other.
#[derive(Debug, thiserror::Error)]
pub enum ReserveError {
    /// A correct no.
    #[error(transparent)]
    Refused(#[from] Refusal),
    /// Nobody can say yet.
    #[error(transparent)]
    Indeterminate(#[from] Indeterminate),
}

impl From<sqlx::Error> for ReserveError {
    /// A database error never refuses anybody: whatever went wrong, the answer is "undecided".
    fn from(error: sqlx::Error) -> Self {
        /// Postgres: the lock could not be had within `lock_timeout`.
        const LOCK_NOT_AVAILABLE: &str = "55P03";
        /// Postgres: `statement_timeout` ended the statement.
        const QUERY_CANCELED: &str = "57014";

        let undecided = match &error {
            sqlx::Error::PoolTimedOut => Indeterminate::Overloaded,
            sqlx::Error::Database(refused) => match refused.code().as_deref() {
                Some(LOCK_NOT_AVAILABLE) => Indeterminate::Overloaded,
                Some(QUERY_CANCELED) => Indeterminate::TimedOut,
                _ => Indeterminate::BackendAway(error.into()),
            },
            _ => Indeterminate::BackendAway(error.into()),
        };
        Self::Indeterminate(undecided)
    }
}

/// A reservation that was there before the order came: the buyer's own, or one under the order's key.
#[derive(Clone, Debug, sqlx::FromRow)]
pub struct ExistingReservation {
    /// The reservation.
    pub id: Uuid,
    /// Whose it is.
    pub buyer_id: BuyerId,
    /// The key it was made under.
    pub request_key: String,
}

impl ExistingReservation {
    /// What to tell the buyer of `order`: a repeat is answered as the first time, anything else is refused.
    pub fn resolve(&self, order: &Order) -> Result<Outcome, Refusal> {
        let reservation = Reservation { id: self.id };
        let same_key = self.request_key == order.key.as_str();
        match (same_key, self.buyer_id == order.buyer) {
            (true, true) => Ok(Outcome::Confirmed(reservation)),
            (true, false) => Err(Refusal::KeyOfAnotherBuyer),
            (false, _) => Err(Refusal::AlreadyReserved { earlier: reservation }),
        }
    }
}
