//! What stands in a message: an order, on its way to be decided.

use box_office::{BuyerId, Order, RequestKey, SaleId};
use rdkafka::{
    Message as _,
    message::{BorrowedMessage, Headers, OwnedMessage},
};
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::Ids;

/// The version of the message that this level writes and reads.
const VERSION: u32 = 1;

/// The header that counts how often a message was tried before: one that was dead-lettered and is replayed carries it.
pub(crate) const ATTEMPTS: &str = "attempts";

/// An order as it is written into a message, as JSON.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct OrderMessage {
    version: u32,
    /// The reservation that it is to become.
    pub id: Uuid,
    /// The sale to buy from.
    pub sale_id: SaleId,
    /// Who buys.
    pub buyer_id: BuyerId,
    /// Under which key this and every repeat of it is known.
    pub request_key: RequestKey,
}

impl OrderMessage {
    /// The message of an order.
    pub fn new(id: Uuid, order: &Order) -> Self {
        Self {
            version: VERSION,
            id,
            sale_id: order.sale,
            buyer_id: order.buyer,
            request_key: order.key.clone(),
        }
    }

    /// As it goes over the wire.
    pub fn to_bytes(&self) -> Vec<u8> {
        serde_json::to_vec(self).expect("strings and numbers are always JSON")
    }

    fn order(&self) -> Order {
        Order {
            sale: self.sale_id,
            buyer: self.buyer_id,
            key: self.request_key.clone(),
        }
    }
}

// ANCHOR: poison
/// A message that no retry will ever make good. Its words are the reason that the dead letter carries.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Poison {
    /// Not what an order looks like.
    #[error("not an order: {0}")]
    NotAnOrder(String),
    /// From a future, or a past, that this program does not know.
    #[error("version {0} of the message, and only {VERSION} is known")]
    WrongVersion(u32),
    /// The id does not follow from the order.
    #[error("the id {0} is not that of this order")]
    WrongId(Uuid),
    /// A ticket of nothing.
    #[error("there is no sale {0}")]
    UnknownSale(SaleId),
}
// ANCHOR_END: poison

/// A message that was taken from a partition.
#[derive(Clone, Debug)]
pub struct Taken {
    /// Where it lies.
    pub partition: i32,
    /// And where in there.
    pub offset: i64,
    /// The message itself.
    pub message: OwnedMessage,
}

impl Taken {
    /// As a consumer got it.
    pub(super) fn of(message: &BorrowedMessage<'_>) -> Self {
        Self {
            partition: message.partition(),
            offset: message.offset(),
            message: message.detach(),
        }
    }

    /// The order in it.
    ///
    /// # Errors
    /// There is none, and there never will be.
    pub fn order(&self, ids: &Ids) -> Result<OrderMessage, Poison> {
        #[derive(Deserialize)]
        struct Versioned {
            version: u32,
        }
        let bytes = self.message.payload().unwrap_or_default();
        let wrong = |error: serde_json::Error| Poison::NotAnOrder(error.to_string());
        // The version first: what else stands in a message of another one is not for us to judge.
        let Versioned { version } = serde_json::from_slice(bytes).map_err(wrong)?;
        if version != VERSION {
            return Err(Poison::WrongVersion(version));
        }
        let order: OrderMessage = serde_json::from_slice(bytes).map_err(wrong)?;
        if ids.id(&order.order()) != order.id {
            return Err(Poison::WrongId(order.id));
        }
        Ok(order)
    }

    /// How often it was tried before it came here this time.
    pub(super) fn attempts(&self) -> u32 {
        attempts(&self.message)
    }
}

/// What the header [`ATTEMPTS`] says.
pub(super) fn attempts(message: &OwnedMessage) -> u32 {
    let headers = message.headers().into_iter().flat_map(|headers| headers.iter());
    headers
        .filter(|header| header.key == ATTEMPTS)
        .find_map(|header| str::from_utf8(header.value?).ok()?.parse().ok())
        .unwrap_or(0)
}
