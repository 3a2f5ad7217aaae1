//! Priority: the orders of named buyers are decided before the others, and the others are not
//! starved.
//!
//! Kafka has no priorities, so there are two topics, and `ORDER_PRIORITY` = *n* switches them on.
//! The orders of VIPs are in a topic of their own, with as many partitions and the same key: a sale
//! has the same partition number in both. A consumer decides at most *n* VIPs for each other order
//! that waits.
//!
//! **Who is a VIP** is what the admin has said of a sale (`POST /api/sales/{id}/vips`), and never
//! what the request says: a request is checked against that table before it is accepted.
//!
//! **One writer.** The two topics of a sale must not have two writers: each would decide on a stock
//! that the other one changes. Two things see to that.
//! - *The VIP topic has no assignment of its own.* A consumer joins the group with the orders topic
//!   alone, as without priority. A second client, which is in no group, follows it
//!   ([`VipReader`]): in the callback of a rebalance it is given the VIP partitions of the same
//!   numbers, and loses them there. An assignor that puts partitions of one number together exists
//!   (`range`), but it only does so while all members subscribe to both topics and know the
//!   partitions of both. It also is eager: each rebalance would stop all consumers. And it cannot be
//!   in one group with `cooperative-sticky`.
//! - *Both offsets are the fence.* A batch moves the rows of both topics from the offsets that it
//!   has read, also that of a topic from which it has no message. So a consumer that resumes too
//!   late with VIPs is rejected if its successor has decided anything at all.
//!
//! **Why a second client.** A client has one queue for all of its partitions, and it fetches ahead:
//! a VIP would wait behind thousands of fetched orders. Pausing the other partitions throws away
//! what is fetched of them. The queues can be split by partition (`rd_kafka_queue_get_partition`),
//! anew after each rebalance, with a queue for each of the partitions to wait for.
//!
//! Guarantee: between two of the other orders that a consumer has fetched, at most *n* VIPs are
//! decided. Of the other orders, a VIP that is fetched waits for at most a batch that has been begun,
//! which is short with priority, and one for each *n* VIPs before it. Within each priority, orders
//! of a sale are decided in the order in which they were accepted (I8).
//!
//! Limits:
//! - Who comes first is no longer who gets a ticket: that is what it is for. A VIP whose order is
//!   accepted a moment later than the last batch is as late as anybody.
//! - The bound is one for the sales of a partition number, which are decided together: a VIP of one
//!   sale may wait for an order of another. Between partition numbers there is no turn within a
//!   batch, of at most 200 messages: those of one number are decided before those of the next.
//! - The group loses the offset of a VIP partition that had no order for a week, as it does not
//!   subscribe to that topic. What is read is found by the database's offset; until the next VIP, the
//!   lag is shown as the length of the partition, and with `ORDER_TTL_MS` a restart may be needed.
//! - An instance without the setting decides no VIPs. If it owns the partition, they wait until one
//!   with the setting does. And it compares the offset of the orders topic alone: if it is frozen,
//!   VIPs that its successor decides do not fence it. So change the setting of all instances at
//!   once, and switch it off only when `orders.vip` is empty.
//! - A release command has no priority: it is with the other orders.
//! - Whoever can write to Kafka can copy an order into the VIP topic. ACLs are Kafka's.
//!
//! Cost: a second client with its connections for each consumer; the offset of the VIP topic, read
//! and moved for each batch; the place of each order, for the judge; small batches; and a look-up of
//! each buyer who claims to be a VIP, once.
//!
//! Sources: Apache Kafka documentation, `partition.assignment.strategy`; librdkafka, "Introduction",
//! "Consumer groups"; M. Shreedhar, G. Varghese, *Efficient Fair Queuing Using Deficit Round-Robin*
//! (1996). Book: LV.4, "Priority".

use std::{
    collections::{BTreeSet, HashSet},
    num::NonZeroU32,
    sync::{
        Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU32, Ordering::Relaxed},
    },
};

use box_office::{BuyerId, CauseLog, Database, KafkaConfig, Order, Priority, Refusal, ReserveError, SaleId};
use rdkafka::{
    ClientConfig, Offset, TopicPartitionList,
    consumer::{Consumer, StreamConsumer},
    error::KafkaResult,
};

use super::topics::vips_topic;

/// The VIPs that the admin has named.
pub struct Vips {
    database: Database,
    /// Those who are known to be named: for good, as nobody is struck off.
    known: Mutex<HashSet<(SaleId, BuyerId)>>,
}

impl Vips {
    pub(super) fn new(database: Database) -> Self {
        Self {
            database,
            known: Mutex::default(),
        }
    }

    /// Names buyers as VIPs of a sale.
    ///
    /// # Errors
    /// The error of the database.
    pub async fn name(&self, sale: SaleId, buyers: &[BuyerId]) -> Result<(), ReserveError> {
        sqlx::query(
            "insert into vip (sale_id, buyer_id)
                select $1, buyer_id
                  from unnest($2::bigint[]) as buyer_id
                 order by buyer_id
                 on conflict do nothing",
        )
        .bind(sale)
        .bind(buyers)
        .execute(&self.database)
        .await?;
        Ok(())
    }

    // ANCHOR: check
    /// Checks that the buyer of an order is named.
    ///
    /// # Errors
    /// [`Refusal::NotVip`] if not; [`ReserveError::Indeterminate`] if that could not be read.
    pub async fn check(&self, order: &Order) -> Result<(), ReserveError> {
        let vip = (order.sale, order.buyer);
        if self.known().contains(&vip) {
            return Ok(());
        }
        let named: bool = sqlx::query_scalar("select exists (select from vip where sale_id = $1 and buyer_id = $2)")
            .bind(order.sale)
            .bind(order.buyer)
            .fetch_one(&self.database)
            .await?;
        if !named {
            return Err(Refusal::NotVip.into());
        }
        self.known().insert(vip);
        Ok(())
    }
    // ANCHOR_END: check

    fn known(&self) -> MutexGuard<'_, HashSet<(SaleId, BuyerId)>> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Reads the VIP partitions of the numbers that a consumer owns. It is in no group: it follows the
/// consumer, which also commits its offsets.
pub(super) struct VipReader {
    pub(super) consumer: StreamConsumer,
    pub(super) turns: Turns,
    topic: String,
    causes: CauseLog,
}

impl VipReader {
    /// Creates the reader. `config` is that of the consumer: the offsets are those of its group.
    ///
    /// # Errors
    /// If the client rejects its configuration.
    pub(super) fn new(kafka: &KafkaConfig, config: &ClientConfig, vips_in_a_row: NonZeroU32) -> KafkaResult<Self> {
        Ok(Self {
            consumer: config.create()?,
            turns: Turns::new(vips_in_a_row),
            topic: vips_topic(kafka),
            causes: CauseLog::default(),
        })
    }

    // ANCHOR: follow
    /// Begins to read the partitions of these numbers, at the offsets that the group has committed.
    pub(super) fn assign(&self, numbers: &[i32]) {
        self.warn(
            self.consumer
                .incremental_assign(&self.partitions(numbers.iter().copied())),
        );
    }

    /// Stops to read the partitions of these numbers. What was fetched of them is dropped.
    pub(super) fn revoke(&self, numbers: &[i32]) {
        self.warn(
            self.consumer
                .incremental_unassign(&self.partitions(numbers.iter().copied())),
        );
    }
    // ANCHOR_END: follow

    /// Pauses the partitions of these numbers.
    pub(super) fn pause(&self, numbers: &BTreeSet<i32>) {
        self.warn(self.consumer.pause(&self.partitions(numbers.iter().copied())));
    }

    /// Resumes the partitions of these numbers.
    pub(super) fn resume(&self, numbers: &BTreeSet<i32>) {
        self.warn(self.consumer.resume(&self.partitions(numbers.iter().copied())));
    }

    fn partitions(&self, numbers: impl Iterator<Item = i32>) -> TopicPartitionList {
        let mut partitions = TopicPartitionList::new();
        for number in numbers {
            partitions
                .add_partition_offset(&self.topic, number, Offset::Stored)
                .expect("a stored offset can always be asked for");
        }
        partitions
    }

    fn warn(&self, result: KafkaResult<()>) {
        if let Err(why) = result {
            self.causes
                .warn("the partitions of the VIPs could not be changed", &why);
        }
    }
}

// ANCHOR: turns
/// Whose turn it is: a weighted round robin, in which a turn that nobody wants goes to the other.
pub(super) struct Turns {
    max_vips: u32,
    /// The VIPs since the last other order.
    vips: AtomicU32,
}

impl Turns {
    fn new(max_vips: NonZeroU32) -> Self {
        Self {
            max_vips: max_vips.get(),
            vips: AtomicU32::new(0),
        }
    }

    /// The priorities in the order in which to look for the next message.
    pub(super) fn next(&self) -> [Priority; 2] {
        if self.vips.load(Relaxed) < self.max_vips {
            [Priority::Vip, Priority::Normal]
        } else {
            [Priority::Normal, Priority::Vip]
        }
    }

    /// Counts a message that was taken.
    pub(super) fn count(&self, taken: Priority) {
        match taken {
            Priority::Vip => self.vips.fetch_add(1, Relaxed),
            Priority::Normal => self.vips.swap(0, Relaxed),
        };
    }
}
// ANCHOR_END: turns

#[cfg(test)]
mod tests {
    use proptest::{collection::vec, prelude::*};

    use super::*;

    /// Takes all messages: of each, whether it is a VIP and after how many others it arrives.
    fn taken(max_vips: u32, arrivals: &[(bool, usize)]) -> Vec<Priority> {
        let turns = Turns::new(NonZeroU32::new(max_vips).expect("not 0"));
        let (mut waiting, mut taken) = (arrivals.to_vec(), vec![]);
        while !waiting.is_empty() {
            let ready = |priority: Priority, waiting: &[(bool, usize)]| {
                let of_it = |&(is_vip, after): &(bool, usize)| is_vip != priority.is_normal() && after <= taken.len();
                waiting.iter().position(of_it)
            };
            let next = turns.next().into_iter();
            let found = next
                .filter_map(|priority| Some((priority, ready(priority, &waiting)?)))
                .next();
            // Nothing has arrived: time passes until the first does.
            let (priority, at) = found.unwrap_or_else(|| {
                let first = (0..waiting.len()).min_by_key(|&at| waiting[at].1).expect("some wait");
                let priority = if waiting[first].0 {
                    Priority::Vip
                } else {
                    Priority::Normal
                };
                (priority, first)
            });
            waiting.remove(at);
            turns.count(priority);
            taken.push(priority);
        }
        taken
    }

    #[test]
    fn of_a_mixed_load_each_other_order_has_its_turn_after_so_many_vips() {
        let arrivals = [vec![(false, 0); 3], vec![(true, 0); 7]].concat();
        let order: String = taken(3, &arrivals)
            .into_iter()
            .map(|one| if one.is_normal() { 'n' } else { 'v' })
            .collect();
        assert_eq!(order, "vvvnvvvnvn");
    }

    proptest! {
        /// Whatever comes when: no more VIPs than the bound are taken in a row while another order
        /// waits, and no other order while VIPs wait and it is their turn.
        #[test]
        fn nobody_waits_for_longer_than_the_bound(
            max_vips in 1_u32..5,
            arrivals in vec((any::<bool>(), 0_usize..30), 1..40),
        ) {
            let order = taken(max_vips, &arrivals);
            let arrived = |is_vip: bool, by: usize| {
                arrivals.iter().filter(|&&(vip, after)| vip == is_vip && after <= by).count()
            };
            let mut taken_of = [0_usize; 2];
            let mut vips_in_a_row = 0;
            for (at, &priority) in order.iter().enumerate() {
                let [normal, vips] = taken_of;
                let (normal_waits, vips_wait) = (arrived(false, at) > normal, arrived(true, at) > vips);
                if priority.is_normal() {
                    prop_assert!(!vips_wait || vips_in_a_row >= max_vips, "VIPs waited for no reason: {order:?}");
                    vips_in_a_row = 0;
                } else {
                    prop_assert!(!normal_waits || vips_in_a_row < max_vips, "another order is starved: {order:?}");
                    vips_in_a_row += 1;
                }
                taken_of[usize::from(!priority.is_normal())] += 1;
            }
        }
    }
}
