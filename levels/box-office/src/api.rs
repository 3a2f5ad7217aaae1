//! What goes over the wire: the bodies of the HTTP contract.

use serde::{Deserialize, Deserializer, Serialize, de};
use utoipa::ToSchema;
use uuid::Uuid;

use crate::{BuyerId, SaleId};

/// Asks for one ticket.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct NewReservation {
    /// Who buys.
    #[serde(deserialize_with = "id")]
    #[schema(minimum = 0)]
    pub buyer_id: BuyerId,
}

/// A reservation.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema, sqlx::FromRow)]
pub struct Reservation {
    /// Names it.
    pub id: Uuid,
    /// The sale it is a ticket of. Not known to every instance while the order is accepted and not decided.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sale_id: Option<SaleId>,
    /// Whose it is. Known where the sale is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub buyer_id: Option<BuyerId>,
    /// `confirmed`; where orders are accepted first and decided later, also `accepted` and `refused`.
    pub status: String,
    /// Why it was refused: the last part of a problem's `type`, such as `sold-out`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[sqlx(default)]
    pub reason: Option<String>,
    /// The reservation that the buyer had already, where that is the reason.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[sqlx(default)]
    pub earlier: Option<Uuid>,
}

impl Reservation {
    /// The status of an order that was taken and is not decided. Every other status is final.
    pub const ACCEPTED: &str = "accepted";

    /// An order that was accepted, as an instance knows it that has seen no row of it.
    pub fn accepted(id: Uuid) -> Self {
        Self {
            id,
            sale_id: None,
            buyer_id: None,
            status: Self::ACCEPTED.to_owned(),
            reason: None,
            earlier: None,
        }
    }

    /// Whether it stays as it is.
    pub fn is_final(&self) -> bool {
        self.status != Self::ACCEPTED
    }
}

/// Opens a sale.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct NewSale {
    /// What is sold, 1 to 200 characters.
    #[serde(deserialize_with = "sale_name")]
    #[schema(min_length = 1, max_length = 200)]
    pub name: String,
    /// How many tickets there are, 1 to 1,000,000.
    #[serde(deserialize_with = "capacity")]
    #[schema(minimum = 1, maximum = 1_000_000)]
    pub capacity: i64,
}

/// A sale.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema, sqlx::FromRow)]
pub struct Sale {
    /// Names it.
    pub id: SaleId,
    /// What is sold.
    pub name: String,
    /// How many tickets there are.
    pub capacity: i64,
    /// How many are left, as the sale's own counter says.
    pub stock: i64,
    /// How many reservations hold a ticket.
    pub reserved: i64,
}

/// Problem details, as in RFC 9457.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Problem {
    /// Which problem it is, such as `/problems/sold-out`: a path on this server, which explains it.
    #[serde(rename = "type")]
    pub kind: String,
    /// The problem in a few words, the same every time.
    pub title: String,
    /// The HTTP status.
    pub status: u16,
    /// What this request should know.
    pub detail: String,
    /// The id of the request, as in the header `X-Request-Id` and in the server's log.
    pub request_id: String,
    /// The reservation that the buyer has already, where that is the problem.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reservation_id: Option<Uuid>,
}

/// Reads an id that a client made up.
fn id<'de, D: Deserializer<'de>>(deserializer: D) -> Result<i64, D::Error> {
    let id = i64::deserialize(deserializer)?;
    if id < 0 {
        return Err(de::Error::custom(format_args!("{id} is negative, and an id is not")));
    }
    Ok(id)
}

fn capacity<'de, D: Deserializer<'de>>(deserializer: D) -> Result<i64, D::Error> {
    let capacity = i64::deserialize(deserializer)?;
    if !(1..=1_000_000).contains(&capacity) {
        return Err(de::Error::custom(format_args!(
            "{capacity} is not a capacity: it takes 1 to 1,000,000"
        )));
    }
    Ok(capacity)
}

/// Control characters are no part of a name; one of them, NUL, is nothing that Postgres could store.
fn sale_name<'de, D: Deserializer<'de>>(deserializer: D) -> Result<String, D::Error> {
    let name = String::deserialize(deserializer)?;
    let length = name.chars().count();
    if !(1..=200).contains(&length) || name.chars().any(char::is_control) {
        return Err(de::Error::custom(
            "a name has 1 to 200 characters, none of them a control character",
        ));
    }
    Ok(name)
}
