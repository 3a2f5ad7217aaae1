//! The consumer lag: how many messages the group has not processed yet.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use box_office::{ConsumerLag, KafkaConfig, Priority, PriorityMetrics};
use rdkafka::{
    TopicPartitionList,
    consumer::{BaseConsumer, Consumer},
    error::{KafkaError, KafkaResult, RDKafkaErrorCode},
};
use tokio::time::sleep;
use tokio_util::sync::CancellationToken;

use super::{
    MessageTtl, OrderPartition,
    topics::{OrderTopics, client_config, consumer_group},
};

/// The interval between two measurements for the metrics, and the timeout of each request.
const LAG_INTERVAL: Duration = Duration::from_secs(1);

/// The offsets of a partition.
#[derive(Clone, Copy, Debug)]
pub(super) struct PartitionOffsets {
    /// The group's committed offset.
    pub(super) committed: i64,
    /// The end of the log.
    pub(super) end: i64,
}

impl PartitionOffsets {
    /// The lag, in messages.
    pub(super) fn lag(&self) -> i64 {
        self.end - self.committed
    }
}

/// The lag of the group, in messages, over all partitions; those of the VIP topic too, if there is
/// one.
///
/// # Errors
/// If Kafka does not answer within `timeout`.
pub fn lag(kafka: &KafkaConfig, timeout: Duration) -> anyhow::Result<u64> {
    let consumer = lag_consumer(kafka)?;
    let mut offsets = partition_offsets(&consumer, kafka, Priority::Normal, timeout)?;
    match partition_offsets(&consumer, kafka, Priority::Vip, timeout) {
        Ok(vips) => offsets.extend(vips),
        Err(KafkaError::MetadataFetch(RDKafkaErrorCode::UnknownTopicOrPartition)) => {}
        Err(why) => return Err(why.into()),
    }
    Ok(u64::try_from(offsets.values().map(PartitionOffsets::lag).sum::<i64>())?)
}

/// A consumer that reads the group's committed offsets without joining the group.
fn lag_consumer(kafka: &KafkaConfig) -> KafkaResult<BaseConsumer> {
    client_config(kafka).set("group.id", consumer_group(kafka)).create()
}

/// The offsets of each partition that the topic of this priority has: it may have been made with
/// another number than ours.
fn partition_offsets(
    consumer: &BaseConsumer,
    kafka: &KafkaConfig,
    priority: Priority,
    timeout: Duration,
) -> KafkaResult<BTreeMap<OrderPartition, PartitionOffsets>> {
    let topics = OrderTopics::new(kafka);
    let topic = topics.of(priority);
    let mut partitions = TopicPartitionList::new();
    for described in consumer.fetch_metadata(Some(topic), timeout)?.topics() {
        if let Some(why) = described.error() {
            return Err(KafkaError::MetadataFetch(why.into()));
        }
        for partition in described.partitions() {
            partitions.add_partition(topic, partition.id());
        }
    }
    let mut offsets = BTreeMap::new();
    for committed in consumer.committed_offsets(partitions, timeout)?.elements() {
        let (start, end) = consumer.fetch_watermarks(topic, committed.partition(), timeout)?;
        // An offset outside the log is that of another one: the topic was made again.
        let offset = committed.offset().to_raw();
        let offset = offset.filter(|offset| (start..=end).contains(offset));
        let known = PartitionOffsets {
            committed: offset.unwrap_or(start),
            end,
        };
        let number = committed.partition();
        offsets.insert(OrderPartition { priority, number }, known);
    }
    Ok(offsets)
}

/// Starts the task that reports the lag to the metrics, and to the TTL if there is one, until `stop`
/// is cancelled. `metric` is that of the orders, `vips` that of the VIPs if there are any.
///
/// # Errors
/// If the client rejects its configuration.
pub(super) fn spawn_reporter(
    kafka: &KafkaConfig,
    metric: ConsumerLag,
    vips: Option<PriorityMetrics>,
    ttl: Option<Arc<MessageTtl>>,
    stop: CancellationToken,
) -> KafkaResult<()> {
    let mut metrics = BTreeMap::from([(Priority::Normal, metric)]);
    metrics.extend(vips.map(|vips| (Priority::Vip, vips.vip_lag)));
    tokio::spawn(report(lag_consumer(kafka)?, kafka.clone(), metrics, ttl, stop));
    Ok(())
}

/// Reports the lag at each interval. It asks the broker: a consumer that is frozen would report
/// nothing.
async fn report(
    consumer: BaseConsumer,
    kafka: KafkaConfig,
    metrics: BTreeMap<Priority, ConsumerLag>,
    ttl: Option<Arc<MessageTtl>>,
    stop: CancellationToken,
) {
    let consumer = Arc::new(consumer);
    let interval = ttl
        .as_ref()
        .map_or(LAG_INTERVAL, |ttl| ttl.sample_interval().min(LAG_INTERVAL));
    let mut reported = 0;
    while stop.run_until_cancelled(sleep(interval)).await.is_some() {
        let (consumer, kafka) = (Arc::clone(&consumer), kafka.clone());
        let priorities: Vec<Priority> = metrics.keys().copied().collect();
        let read = move || {
            let mut offsets = BTreeMap::new();
            for priority in priorities {
                offsets.extend(partition_offsets(&consumer, &kafka, priority, LAG_INTERVAL)?);
            }
            KafkaResult::Ok(offsets)
        };
        match tokio::task::spawn_blocking(read).await {
            Ok(Ok(offsets)) => {
                // A partition that is gone has no lag any more.
                if offsets.len() < reported {
                    metrics.values().for_each(ConsumerLag::clear);
                }
                reported = offsets.len();
                if let Some(ttl) = &ttl {
                    ttl.sample(&offsets);
                }
                for (partition, offsets) in offsets {
                    metrics[&partition.priority].set(partition.number, offsets.lag());
                }
            }
            // The broker is away, or the process is shutting down.
            _ => metrics.values().for_each(ConsumerLag::clear),
        }
    }
    // Dropping a client blocks for a while, and must not block a runtime thread.
    tokio::task::spawn_blocking(move || drop(consumer));
}
