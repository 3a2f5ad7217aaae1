//! Reservation ids: derived from the order, with a keyed checksum.

use anyhow::ensure;
use box_office::{Database, Order};
use hmac::{Hmac, KeyInit, Mac};
use sha2::Sha256;
use uuid::Uuid;

/// Derives and verifies the ids of reservations.
///
/// The same order has the same id on every instance and in every replay, so a repeat is recognised
/// by its id. The keyed checksum (HMAC-SHA-256, RFC 2104) tells an id that was issued from a forged
/// one before the reservation has a row.
pub struct Ids {
    key: Vec<u8>,
}

/// The number of bytes that are derived from the order. The other six are the checksum of these.
const DERIVED_BYTES: usize = 10;

impl Ids {
    /// Loads the secret key, which all instances of a database share.
    ///
    /// # Errors
    /// If the key cannot be read or does not have 32 bytes.
    pub async fn load(database: &Database) -> anyhow::Result<Self> {
        let key: Vec<u8> = sqlx::query_scalar("select key from id_key").fetch_one(database).await?;
        ensure!(key.len() == 32, "the key of the ids has {} bytes, not 32", key.len());
        Ok(Self { key })
    }

    #[cfg(test)]
    pub(super) fn with_key(key: Vec<u8>) -> Self {
        Self { key }
    }

    // ANCHOR: id
    /// Derives the id of an order, from nothing but its sale, buyer and request key.
    pub fn for_order(&self, order: &Order) -> Uuid {
        let mut bytes = [0; 16];
        let derived = self.mac(&[
            b"order",
            &order.sale.to_be_bytes(),
            &order.buyer.to_be_bytes(),
            order.key.as_str().as_bytes(),
        ]);
        bytes[..DERIVED_BYTES].copy_from_slice(&derived[..DERIVED_BYTES]);
        self.with_checksum(bytes)
    }

    /// Whether an id was issued with this key. A random id passes with a probability of 2^-48.
    pub fn verify(&self, id: Uuid) -> bool {
        self.with_checksum(id.into_bytes()) == id
    }

    /// Makes the id that begins with these bytes.
    fn with_checksum(&self, bytes: [u8; 16]) -> Uuid {
        // UUID version 8, "custom" (RFC 9562). The bits of version and variant are set before the
        // checksum is taken.
        let mut bytes = Uuid::new_v8(bytes).into_bytes();
        let checksum = self.mac(&[b"seal", &bytes[..DERIVED_BYTES]]);
        bytes[DERIVED_BYTES..].copy_from_slice(&checksum[..16 - DERIVED_BYTES]);
        Uuid::from_bytes(bytes)
    }
    // ANCHOR_END: id

    fn mac(&self, parts: &[&[u8]]) -> [u8; 32] {
        let mut mac = Hmac::<Sha256>::new_from_slice(&self.key).expect("HMAC takes a key of any length");
        for part in parts {
            mac.update(part);
        }
        mac.finalize().into_bytes().into()
    }
}

#[cfg(test)]
mod tests {
    use box_office::{Priority, RequestKey};

    use super::*;

    fn order(sale: i64, buyer: i64, key: &str) -> Order {
        Order {
            sale,
            buyer,
            key: RequestKey::try_from(key.to_owned()).expect("a key"),
            priority: Priority::Normal,
        }
    }

    #[test]
    fn equal_orders_have_equal_ids_and_different_orders_do_not() {
        let ids = Ids { key: vec![7; 32] };
        let id = ids.for_order(&order(1, 2, "a"));
        assert_eq!(id, ids.for_order(&order(1, 2, "a")));
        let as_a_vip = Order {
            priority: Priority::Vip,
            ..order(1, 2, "a")
        };
        assert_eq!(id, ids.for_order(&as_a_vip), "whatever its priority, it is one order");
        for other in [order(2, 2, "a"), order(1, 3, "a"), order(1, 2, "b")] {
            assert_ne!(id, ids.for_order(&other));
        }
        assert_eq!(id.get_version_num(), 8);
        assert_eq!(id.get_variant(), uuid::Variant::RFC4122);
    }

    #[test]
    fn a_forged_id_is_rejected() {
        let ids = Ids { key: vec![7; 32] };
        let id = ids.for_order(&order(1, 2, "a"));
        assert!(ids.verify(id));
        for bit in 0..128 {
            let other = Uuid::from_u128(id.as_u128() ^ (1 << bit));
            assert!(!ids.verify(other), "{id} with bit {bit} flipped");
        }
        assert!(!ids.verify(Uuid::nil()));
        assert!(!ids.verify(Uuid::now_v7()));
        assert!(!Ids { key: vec![8; 32] }.verify(id), "the key of another database");
    }
}
