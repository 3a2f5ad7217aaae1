//! The message of an order: its encoding, and the validation of what was consumed.

use box_office::{BuyerId, Order, Priority, RequestKey, SaleId};
use rdkafka::{
    Message as _,
    message::{BorrowedMessage, OwnedHeaders, OwnedMessage},
};
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::{
    Ids, OrderPartition,
    headers::{COMMAND, attempts, headers_of, text},
};

/// The version of the message format that this level writes and reads.
const VERSION: u32 = 1;

/// The payload of a message: an order as JSON.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct OrderMessage {
    version: u32,
    /// The id of the reservation.
    pub id: Uuid,
    /// The sale to buy from.
    pub sale_id: SaleId,
    /// The buyer.
    pub buyer_id: BuyerId,
    /// The idempotency key: the same in every repeat of the order.
    pub request_key: RequestKey,
    /// The timestamp of the message that it was read from, in milliseconds since 1970. Not in the
    /// payload.
    #[serde(skip)]
    pub sent_ms: Option<i64>,
    /// The partition and offset of the message that it was read from. Not in the payload.
    #[serde(skip)]
    pub read_from: Option<(OrderPartition, i64)>,
}

impl OrderMessage {
    /// The message of an order whose reservation has this id.
    pub fn new(id: Uuid, order: &Order) -> Self {
        Self {
            version: VERSION,
            id,
            sale_id: order.sale,
            buyer_id: order.buyer,
            request_key: order.key.clone(),
            sent_ms: None,
            read_from: None,
        }
    }

    /// The payload as it is sent.
    pub fn to_bytes(&self) -> Vec<u8> {
        serde_json::to_vec(self).expect("strings and numbers are always JSON")
    }

    fn order(&self) -> Order {
        Order {
            sale: self.sale_id,
            buyer: self.buyer_id,
            key: self.request_key.clone(),
            // No part of what an id is derived from.
            priority: Priority::default(),
        }
    }
}

/// The payload of a release command: the writer of the sale is to take the ticket of a reservation
/// back. It has no authority: the writer looks whether that is due. A header tells it
/// from an order.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct ReleaseCommand {
    version: u32,
    /// The id of the reservation.
    pub id: Uuid,
    /// Its sale.
    pub sale_id: SaleId,
}

impl ReleaseCommand {
    const NAME: &str = "release";

    /// The command to release the ticket of this reservation.
    pub fn new(id: Uuid, sale_id: SaleId) -> Self {
        Self {
            version: VERSION,
            id,
            sale_id,
        }
    }

    /// The headers that tell it from an order.
    pub fn headers() -> OwnedHeaders {
        headers_of(&[(COMMAND, Self::NAME)])
    }

    /// The payload as it is sent.
    pub fn to_bytes(&self) -> Vec<u8> {
        serde_json::to_vec(self).expect("strings and numbers are always JSON")
    }
}

// ANCHOR: poison
/// Why a message is poison: no retry can ever process it. The text is the dead letter's reason.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PoisonMessage {
    /// The payload is not the JSON of an order.
    #[error("not an order: {0}")]
    NotAnOrder(String),
    /// The format is newer or older than this program.
    #[error("version {0} of the message, but only {VERSION} is supported")]
    WrongVersion(u32),
    /// The id is not the one derived from the order.
    #[error("the id {0} is not that of this order")]
    WrongId(Uuid),
    /// The sale does not exist.
    #[error("there is no sale {0}")]
    UnknownSale(SaleId),
}
// ANCHOR_END: poison

/// A message that was polled from a partition.
#[derive(Clone, Debug)]
pub struct ConsumedMessage {
    /// The partition it was polled from.
    pub partition: OrderPartition,
    /// Its offset in the partition.
    pub offset: i64,
    /// The message as the client delivered it.
    pub raw: OwnedMessage,
}

impl ConsumedMessage {
    /// Copies a message of the topic of this priority out of the client's buffer.
    pub(super) fn new(priority: Priority, message: &BorrowedMessage<'_>) -> Self {
        Self {
            partition: OrderPartition {
                priority,
                number: message.partition(),
            },
            offset: message.offset(),
            raw: message.detach(),
        }
    }

    /// Decodes a release command. `None`: it is none of this version and database, so it is an order
    /// or poison.
    pub fn release(&self, ids: &Ids) -> Option<ReleaseCommand> {
        if text(self.raw.headers(), COMMAND)? != ReleaseCommand::NAME {
            return None;
        }
        let command: ReleaseCommand = serde_json::from_slice(self.raw.payload()?).ok()?;
        (command.version == VERSION && ids.verify(command.id)).then_some(command)
    }

    /// Decodes and validates the order.
    ///
    /// # Errors
    /// [`NotAnOrder`](PoisonMessage::NotAnOrder), [`WrongVersion`](PoisonMessage::WrongVersion) or
    /// [`WrongId`](PoisonMessage::WrongId). Whether the sale exists is not checked here.
    pub fn order(&self, ids: &Ids) -> Result<OrderMessage, PoisonMessage> {
        #[derive(Deserialize)]
        struct Versioned {
            version: u32,
        }
        let bytes = self.raw.payload().unwrap_or_default();
        let not_an_order = |error: serde_json::Error| PoisonMessage::NotAnOrder(error.to_string());
        // The version first: the other fields of another version are unknown.
        let Versioned { version } = serde_json::from_slice(bytes).map_err(not_an_order)?;
        if version != VERSION {
            return Err(PoisonMessage::WrongVersion(version));
        }
        let mut order: OrderMessage = serde_json::from_slice(bytes).map_err(not_an_order)?;
        if ids.for_order(&order.order()) != order.id {
            return Err(PoisonMessage::WrongId(order.id));
        }
        order.sent_ms = self.raw.timestamp().to_millis();
        order.read_from = Some((self.partition, self.offset));
        Ok(order)
    }

    /// The number of attempts before this one.
    pub(super) fn attempts(&self) -> u32 {
        attempts(self.raw.headers())
    }
}

#[cfg(test)]
mod tests {
    use proptest::{collection::vec, prelude::*};
    use rdkafka::Timestamp;

    use super::{
        super::headers::{ATTEMPTS, headers_of},
        *,
    };

    fn consumed(payload: Option<Vec<u8>>, key: Option<Vec<u8>>, attempts: &[Vec<u8>]) -> ConsumedMessage {
        let headers: Vec<_> = attempts.iter().map(|value| (ATTEMPTS, value)).collect();
        let (topic, number, offset) = ("orders".to_owned(), 0, 0);
        ConsumedMessage {
            partition: OrderPartition {
                priority: Priority::Normal,
                number,
            },
            offset,
            raw: OwnedMessage::new(
                payload,
                key,
                topic,
                Timestamp::NotAvailable,
                number,
                offset,
                Some(headers_of(&headers)),
            ),
        }
    }

    fn order_message(ids: &Ids) -> OrderMessage {
        let order = Order {
            sale: 1,
            buyer: 2,
            key: RequestKey::try_from("a".to_owned()).expect("a key"),
            priority: Priority::Normal,
        };
        OrderMessage::new(ids.for_order(&order), &order)
    }

    proptest! {
        /// Whatever a client of the broker has written is an order that was accepted, or poison.
        #[test]
        fn no_message_is_too_strange(
            noise in prop::option::of(vec(any::<u8>(), 0..60)),
            (at, overwrite) in (any::<prop::sample::Index>(), vec(any::<u8>(), 0..4)),
            key in prop::option::of(vec(any::<u8>(), 0..10)),
            attempts in vec(prop_oneof![
                any::<u64>().prop_map(|number| number.to_string().into_bytes()), vec(any::<u8>(), 0..20)
            ], 0..3),
        ) {
            let ids = Ids::with_key(vec![7; 32]);
            let whole = order_message(&ids);
            let mut damaged = whole.to_bytes();
            let at = at.index(damaged.len());
            let until = damaged.len().min(at + overwrite.len());
            damaged.splice(at..until, overwrite);
            for payload in [noise, Some(damaged)] {
                let message = consumed(payload, key.clone(), &attempts);
                let _ = message.attempts();
                match message.order(&ids) {
                    Ok(order) => prop_assert_eq!(order.to_bytes(), whole.to_bytes()),
                    Err(poison) => prop_assert!(!poison.to_string().is_empty()),
                }
            }
        }
    }
}
