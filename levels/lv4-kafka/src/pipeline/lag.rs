//! The consumer lag: how many messages the group has not processed yet.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use box_office::{ConsumerLag, KafkaConfig};
use rdkafka::{
    TopicPartitionList,
    consumer::{BaseConsumer, Consumer},
    error::KafkaResult,
};
use tokio::time::sleep;
use tokio_util::sync::CancellationToken;

use super::topics::{PARTITIONS, client_config, consumer_group, orders_topic};

/// The interval between two measurements for the metrics, and the timeout of each request.
const LAG_INTERVAL: Duration = Duration::from_secs(1);

/// The lag of the group, in messages, over all partitions.
///
/// # Errors
/// If Kafka does not answer within `timeout`.
pub fn lag(kafka: &KafkaConfig, timeout: Duration) -> anyhow::Result<u64> {
    let lags = partition_lags(&lag_consumer(kafka)?, kafka, timeout)?;
    Ok(u64::try_from(lags.values().sum::<i64>())?)
}

/// A consumer that reads the group's committed offsets without joining the group.
fn lag_consumer(kafka: &KafkaConfig) -> KafkaResult<BaseConsumer> {
    client_config(kafka).set("group.id", consumer_group(kafka)).create()
}

/// The lag of each partition, in messages.
fn partition_lags(consumer: &BaseConsumer, kafka: &KafkaConfig, timeout: Duration) -> KafkaResult<BTreeMap<i32, i64>> {
    let topic = orders_topic(kafka);
    let mut partitions = TopicPartitionList::new();
    partitions.add_partition_range(&topic, 0, PARTITIONS - 1);
    let mut lags = BTreeMap::new();
    for committed in consumer.committed_offsets(partitions, timeout)?.elements() {
        let (start, end) = consumer.fetch_watermarks(&topic, committed.partition(), timeout)?;
        let offset = committed.offset().to_raw().filter(|&offset| offset >= start);
        lags.insert(committed.partition(), end - offset.unwrap_or(start));
    }
    Ok(lags)
}

/// Starts the task that reports the lag to the metrics until `stop` is cancelled.
///
/// # Errors
/// If the client rejects its configuration.
pub(super) fn spawn_reporter(kafka: &KafkaConfig, metric: ConsumerLag, stop: CancellationToken) -> KafkaResult<()> {
    tokio::spawn(report(lag_consumer(kafka)?, kafka.clone(), metric, stop));
    Ok(())
}

/// Reports the lag at each interval. It asks the broker: a consumer that is frozen would report
/// nothing.
async fn report(consumer: BaseConsumer, kafka: KafkaConfig, lag: ConsumerLag, stop: CancellationToken) {
    let consumer = Arc::new(consumer);
    while stop.run_until_cancelled(sleep(LAG_INTERVAL)).await.is_some() {
        let (consumer, kafka) = (Arc::clone(&consumer), kafka.clone());
        match tokio::task::spawn_blocking(move || partition_lags(&consumer, &kafka, LAG_INTERVAL)).await {
            Ok(Ok(lags)) => lags
                .into_iter()
                .for_each(|(partition, messages)| lag.set(partition, messages)),
            // The broker is away, or the process is shutting down.
            _ => lag.clear(),
        }
    }
    // Dropping a client blocks for a while, and must not block a runtime thread.
    tokio::task::spawn_blocking(move || drop(consumer));
}
