//! Domain types of a sale.
//!
//! An order ends in an [`Outcome`], a [`Refusal`] or an [`Indeterminate`] answer. These are three
//! types, so that none can be mistaken for another: "the pool was busy" is not "sold out".

use std::{fmt, num::NonZeroU32, time::Duration};

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;
use uuid::Uuid;

/// The id of a sale.
pub type SaleId = i64;

/// The id of a buyer. A buyer has at most one reservation in a sale.
pub type BuyerId = i64;

/// The client's `Idempotency-Key`: within a sale, the same key always yields the same reservation.
///
/// Source: IETF draft *The Idempotency-Key HTTP Header Field*
/// (draft-ietf-httpapi-idempotency-key-header).
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct RequestKey(String);

/// The error of parsing a [`RequestKey`]: it is empty, too long, or not visible ASCII.
#[derive(Debug, thiserror::Error)]
#[error("a request key is 1 to {max} visible ASCII characters", max = RequestKey::MAX_LENGTH)]
pub struct InvalidRequestKey;

impl RequestKey {
    /// The maximum length of a key, in characters.
    pub const MAX_LENGTH: usize = 128;

    /// A random key (UUID v4), for a request without one.
    pub fn fresh() -> Self {
        Self(Uuid::new_v4().to_string())
    }

    /// The key as the client sent it.
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

/// A request for one ticket of one sale.
#[derive(Clone, Debug)]
pub struct Order {
    /// The sale.
    pub sale: SaleId,
    /// The buyer.
    pub buyer: BuyerId,
    /// The idempotency key, the same for every retry of this order.
    pub key: RequestKey,
    /// The priority that the buyer asks for.
    pub priority: Priority,
}

/// The priority of an order: who is served first.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum Priority {
    /// The priority of everybody.
    #[default]
    Normal,
    /// Before the others. Only for buyers whom the admin has named as VIPs of the sale.
    Vip,
}

impl Priority {
    /// The name in requests, metrics and messages.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Normal => "normal",
            Self::Vip => "vip",
        }
    }

    /// Whether it is the priority of everybody.
    pub fn is_normal(&self) -> bool {
        *self == Self::Normal
    }
}

/// A reservation of one ticket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Reservation {
    /// The primary key of its row.
    pub id: Uuid,
}

/// A successful answer to an order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// The reservation's row is durable.
    Confirmed(Reservation),
    /// The order is durable and is processed asynchronously; its final state follows later.
    Accepted(Reservation),
}

/// A business refusal: a strategy has read the state of the sale, and this was true of it.
///
/// It is the only type that a strategy refuses with. Two other types carry a refusal further, and
/// are separate on purpose: [`ProblemKind`](crate::ProblemKind) is the stable `type` of every HTTP
/// problem, refusals among them, and the test harness has a type of its own for what a client
/// observed, so that its checker does not depend on the code under test.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// No ticket is left.
    #[error("every ticket of this sale is taken")]
    SoldOut,
    /// The buyer already has a reservation in this sale, made under another key.
    #[error("this buyer already has reservation {0} in this sale", earlier.id)]
    AlreadyReserved {
        /// The existing reservation.
        earlier: Reservation,
    },
    /// Another buyer of this sale has used the request key.
    #[error("this request key was used by another buyer")]
    KeyOfAnotherBuyer,
    /// The sale does not exist.
    #[error("there is no such sale")]
    UnknownSale,
    /// The order was older than its time to live when it was decided. Only an order that was
    /// accepted first can be.
    #[error("the order's time to live had passed")]
    Expired,
    /// The order asks for [`Priority::Vip`], and the admin has not named the buyer. It says nothing
    /// about the stock.
    #[error("this buyer is not named as a VIP of this sale")]
    NotVip,
}

impl Refusal {
    /// The reservation that the buyer already has, if that is the reason.
    pub fn earlier(self) -> Option<Reservation> {
        match self {
            Self::AlreadyReserved { earlier } => Some(earlier),
            Self::SoldOut | Self::KeyOfAnotherBuyer | Self::UnknownSale | Self::Expired | Self::NotVip => None,
        }
    }
}

/// An unknown outcome: the reservation may or may not exist. The client retries with the same key.
///
/// The term is Jepsen's: an operation that ends with `:info` may take effect at any later time, or
/// never.
#[derive(Debug, thiserror::Error)]
pub enum Indeterminate {
    /// No pooled connection or lock could be acquired in time.
    #[error("no connection or lock could be acquired in time")]
    Overloaded,
    /// Accepted orders wait for longer than their time to live: this one was not accepted.
    #[error("orders wait for longer than their time to live")]
    Backlogged {
        /// The time after which they may not.
        retry_after: Duration,
    },
    /// A step of the reservation ran into its timeout.
    #[error("the reservation timed out")]
    TimedOut,
    /// A backend is unreachable, or returned an error.
    #[error("a backend is unavailable")]
    BackendAway(#[source] anyhow::Error),
}

/// A request over a rate limit. Nothing was done, and it says nothing about the sale: the client
/// sends the same request later.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("over the rate limit {exceeded:?}")]
pub struct RateLimited {
    /// The name of the policy that was exceeded.
    pub exceeded: &'static str,
    /// All policies in force.
    pub policies: Vec<RateLimitPolicy>,
    /// The time until the exceeded policy lets a request pass.
    pub retry_after: Duration,
}

/// A limit on the number of requests.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RateLimitPolicy {
    /// Its name.
    pub name: &'static str,
    /// The number of requests a second, and of those that may come at once.
    pub quota: NonZeroU32,
}

/// The error of [`Reserve::reserve`](crate::Reserve::reserve). Its kinds never convert into each
/// other.
#[derive(Debug, thiserror::Error)]
pub enum ReserveError {
    /// The order was refused; the answer is final.
    #[error(transparent)]
    Refused(#[from] Refusal),
    /// The outcome is unknown; the client retries with the same key.
    #[error(transparent)]
    Indeterminate(#[from] Indeterminate),
    /// The request was not processed; the client sends it again later.
    #[error(transparent)]
    RateLimited(#[from] RateLimited),
}

impl From<sqlx::Error> for ReserveError {
    /// Maps a database error to an [`Indeterminate`] answer, never to a refusal.
    ///
    /// SQLSTATE codes: Postgres manual, Appendix A "PostgreSQL Error Codes".
    fn from(error: sqlx::Error) -> Self {
        /// `lock_not_available`: `lock_timeout` expired.
        const LOCK_NOT_AVAILABLE: &str = "55P03";
        /// `query_canceled`: `statement_timeout` expired.
        const QUERY_CANCELED: &str = "57014";

        let indeterminate = match &error {
            sqlx::Error::PoolTimedOut => Indeterminate::Overloaded,
            sqlx::Error::Database(database) => match database.code().as_deref() {
                Some(LOCK_NOT_AVAILABLE) => Indeterminate::Overloaded,
                Some(QUERY_CANCELED) => Indeterminate::TimedOut,
                _ => Indeterminate::BackendAway(error.into()),
            },
            _ => Indeterminate::BackendAway(error.into()),
        };
        Self::Indeterminate(indeterminate)
    }
}

/// A row that an order conflicts with: the buyer's own reservation, or one under the order's key.
#[derive(Clone, Debug, sqlx::FromRow)]
pub struct ExistingReservation {
    /// Its id.
    pub id: Uuid,
    /// The buyer who holds it.
    pub buyer_id: BuyerId,
    /// The key it was made under.
    pub request_key: String,
}

impl ExistingReservation {
    /// Answers `order` from this reservation: a retry of the same order gets the same answer again.
    ///
    /// # Errors
    /// [`Refusal::KeyOfAnotherBuyer`] if another buyer used the key, [`Refusal::AlreadyReserved`]
    /// if the buyer used another key.
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
