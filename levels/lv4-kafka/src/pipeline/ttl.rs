//! Message TTL: an order that is decided too late takes no ticket, and ends as expired.
//!
//! `ORDER_TTL_MS` is checked where the ticket would be taken, in the transaction that decides the
//! order. A check when the order is accepted would say nothing: it is always young then, and it is
//! the queue that makes it old. Kafka's retention is no substitute: it deletes the message, and the
//! buyer waits for ever.
//!
//! The age is that of the message: from its timestamp, which the accepting instance's producer sets
//! when it is handed the message (`CreateTime`), to the clock of the instance that decides it. The
//! broker's own time (`LogAppendTime`) would leave out how long the producer waited for the broker,
//! and is a setting of the topic, which exists already.
//!
//! Guarantee: no order takes a ticket that is older than the TTL when it is decided; it has a row
//! with the status `expired` and its event like every other order, is never a dead letter, and an
//! order is decided once: one that is redelivered when it is old stays what it was.
//!
//! Limits:
//! - The clocks of two instances differ: by as much an order expires too early or too late. Choose
//!   a TTL many times that.
//! - The age is taken before the batch is written: with a commit that hangs, an order may be
//!   confirmed later than its TTL.
//! - A repeat by the buyer makes the order no younger, as long as its first message is decided
//!   first. A replayed dead letter begins anew: that is what the operator asked for.
//!
//! Backpressure: an instance accepts nothing that is going to expire. It estimates how long an order
//! waits from the consumer lag and the rate at which the group commits offsets, and answers 503 with
//! `Retry-After` while that is longer than the TTL. A rate is only measured while there is a backlog,
//! as an idle consumer shows none. While nothing is committed at all, the wait is at least as long
//! as that has lasted. The estimate is that of the last sample, so the first instant of a rush is
//! always accepted; what expires of it says so. The orders of a sale wait in its partition, if all of
//! them are in one. The broker's acknowledgement of the first tells the instance which, so until then
//! they are accepted, too: refused because of another sale's backlog, they would never tell it. If they
//! are spread over all partitions, the longest wait counts.
//!
//! Cost: one comparison for each order. The samples are those of the lag, about four within the TTL,
//! and at most ten a second.
//!
//! Sources: Apache Kafka documentation, topic configuration `message.timestamp.type`; J. Little,
//! *A proof for the queuing formula L = λW* (1961). Book: LV.4, "Message TTL".

use std::{
    collections::{BTreeMap, HashMap},
    sync::{Mutex, MutexGuard, PoisonError},
    time::{Duration, SystemTime},
};

use box_office::{ExpiredOrders, Indeterminate, Priority, SaleId};
use tokio::time::Instant;

use super::{OrderMessage, OrderPartition, lag::PartitionOffsets};

/// The weight of a new sample of the rate, against all earlier ones.
const SAMPLE_WEIGHT: f64 = 0.5;

/// The shortest interval of the samples: each is a few requests to the broker.
const MIN_SAMPLE_INTERVAL: Duration = Duration::from_millis(100);

/// The longest `Retry-After`: the estimate of a longer wait is worth little.
const MAX_RETRY_AFTER: Duration = Duration::from_secs(60);

/// By what a strategy keys its messages: where the orders of a sale are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Partitioning {
    /// By the sale: all its orders are in one partition.
    BySale,
    /// By the order: those of a sale are spread over all partitions.
    ByOrder,
}

/// The time to live of orders, and the backpressure that follows from it.
pub struct MessageTtl {
    ttl: Duration,
    expired: ExpiredOrders,
    backlog: Mutex<Backlog>,
}

impl MessageTtl {
    /// A time to live of orders that are partitioned like this.
    pub fn new(ttl: Duration, partitioning: Partitioning, expired: ExpiredOrders) -> Self {
        Self {
            ttl,
            expired,
            backlog: Mutex::new(Backlog::new(partitioning)),
        }
    }

    // ANCHOR: expired
    /// Whether an order is older than the TTL now. One without a timestamp is not.
    pub fn is_expired(&self, order: &OrderMessage) -> bool {
        let Some(sent_ms) = order.sent_ms else { return false };
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
        let now_ms = now.map_or(0, |now| now.as_millis().try_into().unwrap_or(i64::MAX));
        now_ms.saturating_sub(sent_ms) > self.ttl.as_millis().try_into().unwrap_or(i64::MAX)
    }
    // ANCHOR_END: expired

    /// Counts orders that have ended as expired.
    pub fn count_expired(&self, orders: usize) {
        self.expired.count(orders as u64);
    }

    /// Checks that an order of this sale and priority is going to be decided within its TTL.
    ///
    /// # Errors
    /// [`Indeterminate::Backlogged`] if not, with the time after which it may be.
    pub fn check_backlog(&self, sale: SaleId, priority: Priority) -> Result<(), Indeterminate> {
        let expected = self.backlog().expected_wait(sale, priority, Instant::now());
        match expected.checked_sub(self.ttl) {
            None | Some(Duration::ZERO) => Ok(()),
            Some(too_long) => Err(Indeterminate::Backlogged {
                retry_after: too_long.min(MAX_RETRY_AFTER),
            }),
        }
    }

    /// Remembers the number of the partition of a sale whose orders are all in one.
    pub fn remember_partition(&self, sale: SaleId, number: i32) {
        self.backlog().partition_of.insert(sale, number);
    }

    /// The interval of the samples.
    pub(super) fn sample_interval(&self) -> Duration {
        (self.ttl / 4).max(MIN_SAMPLE_INTERVAL)
    }

    /// Takes a sample of the group's offsets.
    pub(super) fn sample(&self, offsets: &BTreeMap<OrderPartition, PartitionOffsets>) {
        self.backlog().sample(offsets, Instant::now());
    }

    fn backlog(&self) -> MutexGuard<'_, Backlog> {
        self.backlog.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The backlog of the topics of orders, as the broker has last told it. VIPs wait for their own: what
/// the others cost them shows in the rate.
struct Backlog {
    partitions: BTreeMap<OrderPartition, PartitionBacklog>,
    partitioning: Partitioning,
    /// The number of the partition of each sale, if all its orders are in one and the broker has told which:
    /// when it acknowledged the first. A sale is opened by the admin, so there are only so many.
    partition_of: HashMap<SaleId, i32>,
}

struct PartitionBacklog {
    lag: i64,
    committed: i64,
    /// Offsets committed a second while there was a backlog. `None`: there was none yet.
    rate: Option<f64>,
    sampled_at: Instant,
    /// When an offset was last committed; or, since nothing has been, when the backlog was first
    /// seen.
    progress_at: Instant,
}

impl Backlog {
    fn new(partitioning: Partitioning) -> Self {
        Self {
            partitions: BTreeMap::new(),
            partitioning,
            partition_of: HashMap::new(),
        }
    }

    fn sample(&mut self, offsets: &BTreeMap<OrderPartition, PartitionOffsets>, now: Instant) {
        self.partitions.retain(|partition, _| offsets.contains_key(partition));
        for (&partition, offsets) in offsets {
            let lag = offsets.lag();
            match self.partitions.get_mut(&partition) {
                // A topic that was made again counts from 0.
                Some(known) if known.committed <= offsets.committed => known.update(offsets, now),
                _ => {
                    let new = PartitionBacklog {
                        lag,
                        committed: offsets.committed,
                        rate: None,
                        sampled_at: now,
                        progress_at: now,
                    };
                    self.partitions.insert(partition, new);
                }
            }
        }
    }

    // ANCHOR: wait
    /// How long an order that is accepted now is expected to wait for its decision.
    fn expected_wait(&self, sale: SaleId, priority: Priority, now: Instant) -> Duration {
        let may_be_in = |partition: &OrderPartition| {
            partition.priority == priority
                && match self.partitioning {
                    // Not known until the broker has acknowledged an order of the sale: the first is accepted.
                    Partitioning::BySale => self.partition_of.get(&sale) == Some(&partition.number),
                    Partitioning::ByOrder => true,
                }
        };
        let partitions = self.partitions.iter().filter(|(partition, _)| may_be_in(partition));
        let waits = partitions.map(|(_, backlog)| backlog.wait(now));
        waits.max().unwrap_or_default()
    }
    // ANCHOR_END: wait
}

impl PartitionBacklog {
    fn update(&mut self, offsets: &PartitionOffsets, now: Instant) {
        let committed = offsets.committed - self.committed;
        let lag = offsets.lag();
        let seconds = (now - self.sampled_at).as_secs_f64();
        if committed > 0 && self.lag > 0 && seconds > 0.0 {
            let rate = committed as f64 / seconds;
            self.rate = match self.rate {
                // Busy from one sample to the next, as far as can be seen.
                earlier if lag > 0 => {
                    let earlier = earlier.unwrap_or(rate);
                    Some(earlier + SAMPLE_WEIGHT * (rate - earlier))
                }
                // A backlog that has drained shows that it is at least as fast as this.
                earlier => earlier.map(|earlier| earlier.max(rate)),
            };
        }
        if committed > 0 || self.lag == 0 {
            self.progress_at = now;
        }
        (self.lag, self.committed, self.sampled_at) = (lag, offsets.committed, now);
    }

    fn wait(&self, now: Instant) -> Duration {
        if self.lag == 0 {
            return Duration::ZERO;
        }
        let queue = self.rate.map_or(0.0, |rate| self.lag as f64 / rate);
        let queue = Duration::try_from_secs_f64(queue).unwrap_or(Duration::MAX);
        queue.max(now - self.progress_at)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SALE: SaleId = 1;

    const NORMAL: OrderPartition = OrderPartition {
        priority: Priority::Normal,
        number: 0,
    };

    /// A backlog after samples of one partition, one a second: committed offset and end.
    fn after(samples: &[(i64, i64)]) -> (Backlog, Instant) {
        let mut backlog = Backlog::new(Partitioning::ByOrder);
        let mut now = Instant::now();
        for &(committed, end) in samples {
            now += Duration::from_secs(1);
            let offsets = BTreeMap::from([(NORMAL, PartitionOffsets { committed, end })]);
            backlog.sample(&offsets, now);
        }
        (backlog, now)
    }

    fn wait(samples: &[(i64, i64)]) -> f64 {
        let (backlog, now) = after(samples);
        backlog.expected_wait(SALE, Priority::Normal, now).as_secs_f64()
    }

    #[test]
    fn the_wait_is_the_lag_divided_by_the_rate() {
        assert_eq!(wait(&[]), 0.0, "nothing is known");
        assert_eq!(wait(&[(0, 1000)]), 0.0, "no rate is known");
        assert_eq!(wait(&[(0, 1000), (100, 1000)]), 9.0);
        assert_eq!(wait(&[(0, 1000), (100, 1000), (200, 1000)]), 8.0);
    }

    /// An idle consumer commits as few offsets as orders come: that is not how fast it can be.
    #[test]
    fn the_rate_of_an_idle_consumer_is_not_its_rate() {
        assert_eq!(wait(&[(0, 0), (1, 1), (2, 2), (2, 1000)]), 0.0);
        // What was measured under load is still known.
        assert_eq!(
            wait(&[(0, 1000), (500, 1000), (1000, 1000), (1001, 1001), (1001, 1501)]),
            1.0
        );
    }

    /// One slow moment must not be believed for ever: refused orders leave no backlog to measure by.
    #[test]
    fn a_backlog_that_drains_corrects_a_rate_that_was_too_low() {
        assert_eq!(wait(&[(0, 100), (1, 100), (100, 100), (100, 199)]), 1.0);
    }

    #[test]
    fn while_nothing_is_decided_the_wait_is_as_long_as_that_has_lasted() {
        assert_eq!(wait(&[(5, 5), (5, 6), (5, 7), (5, 8)]), 2.0);
        assert_eq!(wait(&[(5, 5), (5, 6), (5, 7), (7, 7)]), 0.0, "and it is over at once");
        let (backlog, now) = after(&[(5, 5), (5, 6)]);
        let later = backlog.expected_wait(SALE, Priority::Normal, now + Duration::from_secs(10));
        assert_eq!(later.as_secs(), 10, "a broker that does not answer is no progress");
    }

    /// Two partitions of two topics: in the first, the others wait 99 seconds, and VIPs one; in the second,
    /// nothing waits.
    fn busy_beside_idle(partitioning: Partitioning) -> (Backlog, Instant) {
        let vip = OrderPartition {
            priority: Priority::Vip,
            ..NORMAL
        };
        let idle = OrderPartition { number: 1, ..NORMAL };
        let mut backlog = Backlog::new(partitioning);
        let mut now = Instant::now();
        for samples in [[(0, 1000), (0, 200), (7, 7)], [(10, 1000), (100, 200), (7, 7)]] {
            now += Duration::from_secs(1);
            let offsets = [NORMAL, vip, idle].into_iter().zip(samples);
            let offsets = offsets.map(|(partition, (committed, end))| (partition, PartitionOffsets { committed, end }));
            backlog.sample(&offsets.collect(), now);
        }
        (backlog, now)
    }

    #[test]
    fn an_order_that_may_come_into_any_partition_is_expected_to_wait_for_the_longest() {
        let (backlog, now) = busy_beside_idle(Partitioning::ByOrder);
        let wait = |priority| backlog.expected_wait(SALE, priority, now).as_secs();
        assert_eq!(wait(Priority::Normal), 99);
        assert_eq!(wait(Priority::Vip), 1, "a VIP does not wait with the others");
    }

    #[test]
    fn a_sale_waits_for_its_own_partition_only() {
        let (mut backlog, now) = busy_beside_idle(Partitioning::BySale);
        backlog.partition_of.extend([(SALE, 1), (2, 0)]);
        let wait = |sale, priority| backlog.expected_wait(sale, priority, now).as_secs();
        assert_eq!(wait(SALE, Priority::Normal), 0);
        assert_eq!(wait(2, Priority::Normal), 99);
        assert_eq!(wait(2, Priority::Vip), 1, "a VIP does not wait with the others");
    }

    /// Only an order that is accepted shows where those of its sale are: refused for the sake of another
    /// sale's backlog, none would be, for as long as that lasts.
    #[test]
    fn a_sale_whose_partition_is_not_known_yet_does_not_wait_for_another_sale() {
        let (mut backlog, now) = busy_beside_idle(Partitioning::BySale);
        backlog.partition_of.insert(2, 0);
        for priority in [Priority::Normal, Priority::Vip] {
            assert_eq!(backlog.expected_wait(SALE, priority, now), Duration::ZERO);
        }
    }

    #[test]
    fn a_topic_that_was_made_again_begins_anew() {
        assert_eq!(wait(&[(0, 1000), (10, 1000), (0, 5)]), 0.0);
    }
}
