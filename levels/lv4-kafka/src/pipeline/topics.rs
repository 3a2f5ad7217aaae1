//! The topics: their names, their settings, and the configuration that all Kafka clients share.

use std::time::Duration;

use anyhow::bail;
use box_office::KafkaConfig;
use rdkafka::{
    ClientConfig,
    admin::{AdminClient, AdminOptions, NewTopic, TopicReplication},
    client::DefaultClientContext,
    error::RDKafkaErrorCode,
};

/// The number of partitions of the orders topic, and so the maximum number of consumers that work
/// in parallel. It never changes: the partition of a sale follows from it.
pub const PARTITIONS: i32 = 6;

/// The maximum size of a message of the orders topic in bytes, and of a batch: the broker applies
/// the limit to batches.
///
/// An order has a few hundred bytes. The broker's default is one million: a message of that size
/// could not be dead-lettered, as the reason in the headers takes space as well, and would block
/// its partition for ever.
pub(super) const MAX_MESSAGE_BYTES: &str = "65536";

/// The timeout of each request to Kafka while the server starts.
const STARTUP_TIMEOUT: Duration = Duration::from_secs(10);

/// The retention of the orders topic: 30 days, in milliseconds. Kafka's default of seven days
/// deletes unread messages as well, and an order that waits for longer was accepted all the same.
/// Processed orders are kept for diagnosis only.
const ORDERS_RETENTION_MS: &str = "2592000000";

/// The retention of the dead-letter topic: unlimited, until an operator has seen the message.
const DEAD_LETTER_RETENTION_MS: &str = "-1";

/// The name of the orders topic.
pub fn orders_topic(kafka: &KafkaConfig) -> String {
    format!("{}orders", kafka.prefix)
}

/// The name of the dead-letter topic.
pub fn dead_letter_topic(kafka: &KafkaConfig) -> String {
    format!("{}orders.dead", kafka.prefix)
}

/// The name of the consumer group.
pub fn consumer_group(kafka: &KafkaConfig) -> String {
    format!("{}deciders", kafka.prefix)
}

/// The configuration that all Kafka clients share.
pub(super) fn client_config(kafka: &KafkaConfig) -> ClientConfig {
    let mut config = ClientConfig::new();
    config
        .set("bootstrap.servers", &kafka.bootstrap_servers)
        // A broker that comes back is found soon.
        .set("reconnect.backoff.ms", "50")
        .set("reconnect.backoff.max.ms", "500")
        // A connection that has fallen silent is replaced after this time, by default after 60 s.
        .set("socket.timeout.ms", "10000")
        .set("socket.keepalive.enable", "true")
        .set("socket.nagle.disable", "true");
    config
}

/// Creates the topics unless they exist. A topic that the broker creates by itself has a single
/// partition, and then only one consumer works.
///
/// # Errors
/// If Kafka does not answer or does not create a topic, or the orders topic has another number of
/// partitions.
pub(super) async fn create(kafka: &KafkaConfig) -> anyhow::Result<()> {
    let admin: AdminClient<DefaultClientContext> = client_config(kafka).create()?;
    let (orders, dead) = (orders_topic(kafka), dead_letter_topic(kafka));
    // ANCHOR: topics
    // -1: the broker's default replication factor.
    let topics = [
        NewTopic::new(&orders, PARTITIONS, TopicReplication::Fixed(-1))
            .set("max.message.bytes", MAX_MESSAGE_BYTES)
            .set("retention.ms", ORDERS_RETENTION_MS),
        NewTopic::new(&dead, 1, TopicReplication::Fixed(-1)).set("retention.ms", DEAD_LETTER_RETENTION_MS),
    ];
    // ANCHOR_END: topics
    let options = AdminOptions::new()
        .operation_timeout(Some(STARTUP_TIMEOUT))
        .request_timeout(Some(STARTUP_TIMEOUT));
    let mut already_exists = false;
    for created in admin.create_topics(&topics, &options).await? {
        match created {
            Ok(_) => {}
            Err((_, RDKafkaErrorCode::TopicAlreadyExists)) => already_exists = true,
            Err((topic, why)) => bail!("the topic {topic} cannot be created: {why}"),
        }
    }
    if already_exists {
        let topic = orders.clone();
        let partitions = tokio::task::spawn_blocking(move || {
            let metadata = admin.inner().fetch_metadata(Some(&topic), STARTUP_TIMEOUT)?;
            anyhow::Ok(metadata.topics().first().map_or(0, |topic| topic.partitions().len()))
        });
        let partitions = partitions.await??;
        if partitions != 0 && i32::try_from(partitions) != Ok(PARTITIONS) {
            bail!("the topic {orders} has {partitions} partitions, not {PARTITIONS}");
        }
    }
    Ok(())
}
