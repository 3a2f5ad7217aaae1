//! Request and response bodies of the HTTP API.

use std::ops::RangeInclusive;

use serde::{Deserialize, Deserializer, Serialize, de};
use utoipa::ToSchema;
use uuid::Uuid;

use crate::{BuyerId, Priority, SaleId};

/// The request body of a reservation.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct NewReservation {
    /// The buyer.
    #[serde(deserialize_with = "id")]
    #[schema(minimum = 0)]
    pub buyer_id: BuyerId,
    /// `vip`: before the others. Only for buyers whom the admin has named as VIPs of the sale, on
    /// servers that have priority
    #[serde(default, skip_serializing_if = "Priority::is_normal")]
    pub priority: Priority,
}

/// The request body that names VIPs of a sale.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct NewVips {
    /// The buyers. Those who are named already stay named.
    #[serde(deserialize_with = "ids")]
    pub buyer_ids: Vec<BuyerId>,
}

/// The representation of a reservation.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema, sqlx::FromRow)]
pub struct Reservation {
    /// Its id.
    pub id: Uuid,
    /// The sale. Absent while an order is accepted, on instances that have no row of it yet.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sale_id: Option<SaleId>,
    /// The buyer. Present whenever `sale_id` is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub buyer_id: Option<BuyerId>,
    /// `confirmed`; for orders that are processed asynchronously also `accepted`, `refused`, and
    /// `expired`: older than its time to live when it was decided; for tickets that are held until
    /// they are paid for also `held`, `declined`, `expired` and `cancelled`.
    pub status: String,
    /// The reason of a refusal or of an expiry: the last segment of a problem's `type`, such as `sold-out`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[sqlx(default)]
    pub reason: Option<String>,
    /// The reservation that the buyer already has, if that is the reason.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[sqlx(default)]
    pub earlier: Option<Uuid>,
}

impl Reservation {
    /// The status of an order that is not processed yet.
    pub const ACCEPTED: &str = "accepted";

    /// The status of an order whose ticket is held until it is paid for. Every status but this and
    /// [`ACCEPTED`](Self::ACCEPTED) is final.
    pub const HELD: &str = "held";

    /// An accepted order, as seen by an instance that has no row of it.
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

    /// Whether the status is final.
    pub fn is_final(&self) -> bool {
        ![Self::ACCEPTED, Self::HELD].contains(&self.status.as_str())
    }
}

/// The request body that opens a sale.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct NewSale {
    /// The name of the sale, 1 to 200 characters.
    #[serde(deserialize_with = "sale_name")]
    #[schema(min_length = 1, max_length = 200)]
    pub name: String,
    /// The number of tickets, 1 to 1,000,000.
    #[serde(deserialize_with = "capacity")]
    #[schema(minimum = 1, maximum = 1_000_000)]
    pub capacity: i64,
}

/// The representation of a sale.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema, sqlx::FromRow)]
pub struct Sale {
    /// Its id.
    pub id: SaleId,
    /// The name of the sale.
    pub name: String,
    /// The number of tickets.
    pub capacity: i64,
    /// The number of tickets left, from the sale's counter.
    pub stock: i64,
    /// The number of reservations that hold a ticket, counted from their rows.
    pub reserved: i64,
}

/// The request body of a rush from the live page. Its limits bound what one page can cause.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct NewRush {
    /// The number of buyers, 1 to 2,000.
    #[serde(deserialize_with = "buyers")]
    #[schema(minimum = 1, maximum = 2_000)]
    pub buyers: u32,
    /// The number of concurrent requests of each buyer, each with its own request key, 1 or 2.
    #[serde(deserialize_with = "clicks")]
    #[schema(minimum = 1, maximum = 2)]
    pub clicks: u32,
    /// The number of tickets, 1 to 1,000.
    #[serde(deserialize_with = "rush_capacity")]
    #[schema(minimum = 1, maximum = 1_000)]
    pub capacity: i64,
}

/// Problem details (RFC 9457).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Problem {
    /// The problem type, such as `/problems/sold-out`: a path on this server, which documents it.
    #[serde(rename = "type")]
    pub kind: String,
    /// A short summary, the same for every occurrence.
    pub title: String,
    /// The HTTP status code.
    pub status: u16,
    /// An explanation of this occurrence.
    pub detail: String,
    /// The request id, as in the header `X-Request-Id` and in the server's log.
    pub request_id: String,
    /// The reservation that the buyer already has, if that is the problem.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reservation_id: Option<Uuid>,
}

/// Deserializes an id that a client chose: not negative.
fn id<'de, D: Deserializer<'de>>(deserializer: D) -> Result<i64, D::Error> {
    let id = i64::deserialize(deserializer)?;
    if id < 0 {
        return Err(de::Error::custom(format_args!(
            "{id} is negative; expected a number from 0"
        )));
    }
    Ok(id)
}

/// Deserializes ids, none of which is negative.
fn ids<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<i64>, D::Error> {
    #[derive(Deserialize)]
    struct Id(#[serde(deserialize_with = "id")] i64);

    Vec::<Id>::deserialize(deserializer).map(|ids| ids.into_iter().map(|Id(id)| id).collect())
}

fn capacity<'de, D: Deserializer<'de>>(deserializer: D) -> Result<i64, D::Error> {
    in_range(deserializer, 1..=1_000_000, "capacity; expected 1 to 1,000,000")
}

fn rush_capacity<'de, D: Deserializer<'de>>(deserializer: D) -> Result<i64, D::Error> {
    in_range(deserializer, 1..=1_000, "capacity of a rush; expected 1 to 1,000")
}

fn buyers<'de, D: Deserializer<'de>>(deserializer: D) -> Result<u32, D::Error> {
    in_range(deserializer, 1..=2_000, "number of buyers; expected 1 to 2,000")
}

fn clicks<'de, D: Deserializer<'de>>(deserializer: D) -> Result<u32, D::Error> {
    in_range(deserializer, 1..=2, "number of clicks; expected 1 or 2")
}

/// Deserializes a number of this range. `expected` says what it is, and its range.
fn in_range<'de, D, T>(deserializer: D, range: RangeInclusive<T>, expected: &str) -> Result<T, D::Error>
where
    D: Deserializer<'de>,
    T: TryFrom<i64> + PartialOrd,
{
    let number = i64::deserialize(deserializer)?;
    let valid = T::try_from(number).ok().filter(|number| range.contains(number));
    valid.ok_or_else(|| de::Error::custom(format_args!("{number} is no valid {expected}")))
}

/// Rejects control characters: Postgres cannot store NUL in `text`, and no other has a use in a
/// name.
fn sale_name<'de, D: Deserializer<'de>>(deserializer: D) -> Result<String, D::Error> {
    let name = String::deserialize(deserializer)?;
    let length = name.chars().count();
    if !(1..=200).contains(&length) || name.chars().any(char::is_control) {
        return Err(de::Error::custom(
            "expected a name of 1 to 200 characters without control characters",
        ));
    }
    Ok(name)
}
