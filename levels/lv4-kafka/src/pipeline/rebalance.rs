//! The partition assignment of a consumer, and how it changes in a rebalance.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use box_office::ConsumerMetrics;
use rdkafka::{
    ClientContext, TopicPartitionList,
    consumer::{BaseConsumer, ConsumerContext, Rebalance},
    topic_partition_list::TopicPartitionListElem,
};
use tokio::{sync::watch, time::Instant};

use super::{ConsumedMessage, OrderPartition, priority::VipReader};

/// How long after a commit the consumer checks that the group has the offset.
const COMMIT_CHECK_DELAY: Duration = Duration::from_secs(1);

/// How long a committed offset is left alone. A group that does not subscribe to a topic, as to that
/// of the VIPs, loses its offsets there, a week after the last commit (`offsets.retention.minutes`).
const COMMITS_KEPT_FOR: Duration = Duration::from_secs(60 * 60);

/// Receives the group's rebalances, and keeps the assignment up to date.
pub(super) struct RebalanceListener {
    joined: watch::Sender<bool>,
    metrics: ConsumerMetrics,
    assignment: Mutex<Assignment>,
    /// Follows the assignment.
    vips: Option<Arc<VipReader>>,
}

impl RebalanceListener {
    /// A listener without an assignment. It sends `true` to `joined` once it is assigned
    /// partitions.
    pub(super) fn new(joined: watch::Sender<bool>, vips: Option<Arc<VipReader>>, metrics: ConsumerMetrics) -> Self {
        Self {
            joined,
            vips,
            metrics,
            assignment: Mutex::default(),
        }
    }

    pub(super) fn assignment(&self) -> MutexGuard<'_, Assignment> {
        self.assignment.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl ClientContext for RebalanceListener {}

impl ConsumerContext for RebalanceListener {
    fn pre_rebalance(&self, _: &BaseConsumer<Self>, rebalance: &Rebalance<'_>) {
        if let Rebalance::Revoke(partitions) = rebalance {
            self.metrics.rebalanced();
            let numbers = numbers(partitions);
            self.vips.iter().for_each(|vips| vips.revoke(&numbers));
            self.assignment().revoke(numbers);
        }
    }

    fn post_rebalance(&self, _: &BaseConsumer<Self>, rebalance: &Rebalance<'_>) {
        if let Rebalance::Assign(partitions) = rebalance {
            tracing::debug!(partitions = partitions.count(), "partitions assigned");
            let numbers = numbers(partitions);
            self.vips.iter().for_each(|vips| vips.assign(&numbers));
            self.assignment().assign(numbers);
            // A consumer that joins others is assigned nothing at first: they have to revoke first.
            if partitions.count() > 0 {
                self.metrics.rebalanced();
                self.joined.send_replace(true);
            }
        }
    }
}

fn numbers(partitions: &TopicPartitionList) -> Vec<i32> {
    let partitions = partitions.elements();
    partitions.iter().map(TopicPartitionListElem::partition).collect()
}

/// The partitions that a consumer owns, by their numbers, and its progress in each.
#[derive(Default)]
pub(super) struct Assignment {
    owned: BTreeSet<i32>,
    /// The numbers of the partitions revoked since this set was last emptied.
    revoked: BTreeSet<i32>,
    /// Every offset below this one is processed.
    processed: BTreeMap<OrderPartition, i64>,
    /// The offset to which the consumer has seeked back, until it has processed something there.
    rewound: BTreeMap<OrderPartition, i64>,
    /// When to check that the group has the committed offsets.
    check_commits_at: Option<Instant>,
}

impl Assignment {
    fn assign(&mut self, partitions: impl IntoIterator<Item = i32>) {
        self.owned.extend(partitions);
    }

    /// Removes partitions with their progress: from here on their next owner knows it better.
    fn revoke(&mut self, partitions: impl IntoIterator<Item = i32>) {
        for number in partitions {
            self.owned.remove(&number);
            self.processed.retain(|partition, _| partition.number != number);
            self.rewound.retain(|partition, _| partition.number != number);
            self.revoked.insert(number);
        }
    }

    /// Starts a batch: partitions revoked before it do not concern it.
    pub(super) fn begin_batch(&mut self) {
        self.revoked.clear();
    }

    /// Drops the messages of partitions revoked since the batch was begun or this was last called.
    pub(super) fn drop_revoked(&mut self, batch: &mut Vec<ConsumedMessage>) {
        let revoked = std::mem::take(&mut self.revoked);
        if !revoked.is_empty() {
            batch.retain(|message| !revoked.contains(&message.partition.number));
        }
    }

    pub(super) fn owned(&self) -> BTreeSet<i32> {
        self.owned.clone()
    }

    pub(super) fn owns(&self, partition: OrderPartition) -> bool {
        self.owned.contains(&partition.number)
    }

    /// Notes that every offset below `offset` is processed. Returns whether this consumer owns the
    /// partition: only then may it commit.
    pub(super) fn mark_processed(&mut self, partition: OrderPartition, offset: i64) -> bool {
        let owned = self.owns(partition);
        if owned {
            self.processed.insert(partition, offset);
            self.rewound.remove(&partition);
            let soon = Instant::now() + COMMIT_CHECK_DELAY;
            self.check_commits_at = Some(self.check_commits_at.map_or(soon, |due| due.min(soon)));
        }
        owned
    }

    /// For each owned partition with progress, the offset below which everything is processed.
    pub(super) fn processed(&self) -> BTreeMap<OrderPartition, i64> {
        self.processed.clone()
    }

    pub(super) fn mark_rewound(&mut self, partition: OrderPartition, offset: i64) {
        self.rewound.insert(partition, offset);
    }

    pub(super) fn has_rewound_to(&self, partition: OrderPartition, offset: i64) -> bool {
        self.rewound.get(&partition) == Some(&offset)
    }

    /// When the next check of the commits is due, if one is.
    pub(super) fn check_commits_at(&self) -> Option<Instant> {
        self.check_commits_at
    }

    /// Begins a check of the commits: the next one is due soon after the next commit, or in an hour.
    pub(super) fn begin_commit_check(&mut self) {
        self.check_commits_at = (!self.processed.is_empty()).then(|| Instant::now() + COMMITS_KEPT_FOR);
    }
}

#[cfg(test)]
mod tests {
    use box_office::Priority;
    use rdkafka::{Timestamp, message::OwnedMessage};

    use super::*;

    const NORMAL: OrderPartition = normal(0);

    const VIPS: OrderPartition = OrderPartition {
        priority: Priority::Vip,
        number: 0,
    };

    const fn normal(number: i32) -> OrderPartition {
        OrderPartition {
            priority: Priority::Normal,
            number,
        }
    }

    fn message(number: i32, offset: i64) -> ConsumedMessage {
        ConsumedMessage {
            partition: normal(number),
            offset,
            raw: OwnedMessage::new(
                None,
                None,
                "orders".to_owned(),
                Timestamp::NotAvailable,
                number,
                offset,
                None,
            ),
        }
    }

    fn positions(batch: &[ConsumedMessage]) -> Vec<(i32, i64)> {
        batch
            .iter()
            .map(|message| (message.partition.number, message.offset))
            .collect()
    }

    #[test]
    fn messages_of_a_revoked_partition_are_dropped() {
        let mut assignment = Assignment::default();
        assignment.assign([0, 1]);
        let mut batch = vec![message(0, 7), message(1, 3)];
        assignment.drop_revoked(&mut batch);
        assert_eq!(positions(&batch), [(0, 7), (1, 3)]);

        assignment.revoke([0]);
        assignment.drop_revoked(&mut batch);
        assert_eq!(positions(&batch), [(1, 3)]);

        // Revoked and assigned again: only what is polled from here on counts.
        assignment.revoke([1]);
        assignment.assign([1]);
        assignment.drop_revoked(&mut batch);
        assert_eq!(positions(&batch), []);
        batch.push(message(1, 3));
        assignment.drop_revoked(&mut batch);
        assert_eq!(positions(&batch), [(1, 3)]);
    }

    #[test]
    fn only_the_owner_of_a_partition_marks_offsets_as_processed() {
        let mut assignment = Assignment::default();
        assignment.assign([0]);
        assert!(assignment.mark_processed(NORMAL, 5));
        assert!(
            !assignment.mark_processed(normal(1), 5),
            "the partition was never assigned to this consumer"
        );
        assignment.revoke([0]);
        assert!(!assignment.mark_processed(NORMAL, 6), "the partition was revoked");
        assert!(assignment.processed.is_empty(), "{:?}", assignment.processed);
    }

    #[test]
    fn the_vips_of_a_partition_go_with_it_and_their_progress_is_their_own() {
        let mut assignment = Assignment::default();
        assignment.assign([0]);
        assert!(assignment.mark_processed(NORMAL, 5) && assignment.mark_processed(VIPS, 2));
        assignment.mark_rewound(VIPS, 1);
        assert_eq!(assignment.processed(), BTreeMap::from([(NORMAL, 5), (VIPS, 2)]));
        assert!(!assignment.has_rewound_to(NORMAL, 1));
        assert!(assignment.mark_processed(NORMAL, 6) && assignment.has_rewound_to(VIPS, 1));

        let mut batch = vec![message(0, 7)];
        batch[0].partition = VIPS;
        assignment.revoke([0]);
        assignment.drop_revoked(&mut batch);
        assert!(batch.is_empty() && assignment.processed().is_empty());
        assert!(!assignment.mark_processed(VIPS, 3));
    }
}
