//! The id of a reservation, which follows from its order.

use anyhow::ensure;
use box_office::Order;
use hmac::{Hmac, KeyInit, Mac};
use sha2::Sha256;
use sqlx::PgPool;
use uuid::Uuid;

/// Makes ids, and knows its own.
///
/// The same order has the same id, on every instance and in every replay: that is what makes a repeat recognisable. And an id carries a
/// keyed checksum, so that an instance can tell one that was given out from one that was made up, long before there is a row.
pub struct Ids {
    key: Vec<u8>,
}

/// The first bytes of an id follow from the order; the rest follow from them.
const FROM_THE_ORDER: usize = 10;

impl Ids {
    /// Those of the instances that share this database.
    ///
    /// # Errors
    /// The key can't be read.
    pub async fn of(database: &PgPool) -> anyhow::Result<Self> {
        let key: Vec<u8> = sqlx::query_scalar("select key from id_key").fetch_one(database).await?;
        ensure!(key.len() == 32, "the key of the ids has {} bytes, not 32", key.len());
        Ok(Self { key })
    }

    // ANCHOR: id
    /// The id of this order. Sale, buyer and request key make it, and nothing else.
    pub fn id(&self, order: &Order) -> Uuid {
        let mut bytes = [0; 16];
        let from_order = self.mac(&[
            b"order",
            &order.sale.to_be_bytes(),
            &order.buyer.to_be_bytes(),
            order.key.as_str().as_bytes(),
        ]);
        bytes[..FROM_THE_ORDER].copy_from_slice(&from_order[..FROM_THE_ORDER]);
        self.sealed(bytes)
    }

    /// Whether an id was made here. One that was made up passes once in 2^48 times.
    pub fn made(&self, id: Uuid) -> bool {
        self.sealed(id.into_bytes()) == id
    }

    /// The id that begins with these bytes.
    fn sealed(&self, bytes: [u8; 16]) -> Uuid {
        // Version 8, "custom": four bits of it and two of its variant lie in the first bytes, and are part of what is sealed.
        let mut bytes = Uuid::new_v8(bytes).into_bytes();
        let seal = self.mac(&[b"seal", &bytes[..FROM_THE_ORDER]]);
        bytes[FROM_THE_ORDER..].copy_from_slice(&seal[..16 - FROM_THE_ORDER]);
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
    use box_office::RequestKey;

    use super::*;

    fn order(sale: i64, buyer: i64, key: &str) -> Order {
        Order {
            sale,
            buyer,
            key: RequestKey::try_from(key.to_owned()).expect("a key"),
        }
    }

    #[test]
    fn the_same_order_has_the_same_id_and_another_one_has_not() {
        let ids = Ids { key: vec![7; 32] };
        let id = ids.id(&order(1, 2, "a"));
        assert_eq!(id, ids.id(&order(1, 2, "a")));
        for other in [order(2, 2, "a"), order(1, 3, "a"), order(1, 2, "b")] {
            assert_ne!(id, ids.id(&other));
        }
        assert_eq!(id.get_version_num(), 8);
        assert_eq!(id.get_variant(), uuid::Variant::RFC4122);
    }

    #[test]
    fn an_id_that_was_made_up_is_known_as_such() {
        let ids = Ids { key: vec![7; 32] };
        let id = ids.id(&order(1, 2, "a"));
        assert!(ids.made(id));
        for bit in 0..128 {
            let other = Uuid::from_u128(id.as_u128() ^ (1 << bit));
            assert!(!ids.made(other), "{id} with bit {bit} turned over");
        }
        assert!(!ids.made(Uuid::nil()));
        assert!(!ids.made(Uuid::now_v7()));
        assert!(!Ids { key: vec![8; 32] }.made(id), "another database's");
    }
}
