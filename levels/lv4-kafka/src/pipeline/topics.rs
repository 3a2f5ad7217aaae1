//! The topics: their names, their settings, and the configuration that all Kafka clients share.

use std::{fmt, time::Duration};

use anyhow::bail;
use box_office::{KafkaConfig, Priority};
use rdkafka::{
    ClientConfig,
    admin::{AdminClient, AdminOptions, NewTopic, TopicReplication},
    client::{Client, ClientContext, DefaultClientContext},
    error::{KafkaError, RDKafkaErrorCode},
    metadata::MetadataTopic,
    types::RDKafkaRespErr,
};

/// The number of partitions of the orders topic, and so the maximum number of consumers that work
/// in parallel. It never changes: the partition of a sale follows from it. The VIP topic has as
/// many, so a sale has the same partition number in both.
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

/// The name of the topic of VIPs' orders.
pub fn vips_topic(kafka: &KafkaConfig) -> String {
    format!("{}orders.vip", kafka.prefix)
}

/// The names of the topics of orders, by their priority.
#[derive(Clone, Debug)]
pub struct OrderTopics {
    normal: String,
    vip: String,
}

impl OrderTopics {
    pub(super) fn new(kafka: &KafkaConfig) -> Self {
        Self {
            normal: orders_topic(kafka),
            vip: vips_topic(kafka),
        }
    }

    /// The topic of the orders of this priority.
    pub fn of(&self, priority: Priority) -> &str {
        match priority {
            Priority::Normal => &self.normal,
            Priority::Vip => &self.vip,
        }
    }
}

/// A partition of a topic of orders. Those of one number have the same sales and the same owner,
/// whatever their priority.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct OrderPartition {
    /// The priority of its orders.
    pub priority: Priority,
    /// Its number in its topic.
    pub number: i32,
}

impl fmt::Display for OrderPartition {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.priority {
            Priority::Normal => write!(f, "{}", self.number),
            Priority::Vip => write!(f, "{} of the VIPs", self.number),
        }
    }
}

/// The name of the dead-letter topic.
pub fn dead_letter_topic(kafka: &KafkaConfig) -> String {
    format!("{}orders.dead", kafka.prefix)
}

/// The name of the topic of the outbox relay.
pub fn decided_topic(kafka: &KafkaConfig) -> String {
    format!("{}orders.decided", kafka.prefix)
}

/// The name of the consumer group.
pub fn consumer_group(kafka: &KafkaConfig) -> String {
    format!("{}order-consumers", kafka.prefix)
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
        // A topic that was deleted is missed, and never made again by a client that only asks for it:
        // the broker would give it one partition.
        .set("allow.auto.create.topics", "false")
        // A topic that comes back is found soon: the default is five minutes.
        .set("topic.metadata.refresh.interval.ms", "5000")
        .set("socket.nagle.disable", "true");
    config
}

/// Creates the topics unless they exist: those of orders of these priorities, that of dead letters,
/// and that of the outbox relay if `relay`. A topic that the broker creates by itself has a single
/// partition, and then only one consumer works.
///
/// # Errors
/// If Kafka does not answer or does not create a topic, or a topic of orders has another number of
/// partitions.
pub(super) async fn create(kafka: &KafkaConfig, priorities: &[Priority], relay: bool) -> anyhow::Result<()> {
    let admin: AdminClient<DefaultClientContext> = client_config(kafka).create()?;
    let names = OrderTopics::new(kafka);
    let orders: Vec<String> = priorities
        .iter()
        .map(|&priority| names.of(priority).to_owned())
        .collect();
    let (dead, decided) = (dead_letter_topic(kafka), decided_topic(kafka));
    // ANCHOR: topics
    // -1: the broker's default replication factor.
    let of_orders = orders.iter().map(|orders| {
        NewTopic::new(orders, PARTITIONS, TopicReplication::Fixed(-1))
            .set("max.message.bytes", MAX_MESSAGE_BYTES)
            .set("retention.ms", ORDERS_RETENTION_MS)
    });
    let mut topics: Vec<NewTopic<'_>> = of_orders.collect();
    topics.push(NewTopic::new(&dead, 1, TopicReplication::Fixed(-1)).set("retention.ms", DEAD_LETTER_RETENTION_MS));
    // ANCHOR_END: topics
    if relay {
        // Retention as the broker has it: who reads the topic decides how long it is of use.
        topics.push(NewTopic::new(&decided, PARTITIONS, TopicReplication::Fixed(-1)));
    }
    let options = AdminOptions::new()
        .operation_timeout(Some(STARTUP_TIMEOUT))
        .request_timeout(Some(STARTUP_TIMEOUT));
    for created in admin.create_topics(&topics, &options).await? {
        match created {
            Ok(_) | Err((_, RDKafkaErrorCode::TopicAlreadyExists)) => {}
            Err((topic, why)) => bail!("the topic {topic} cannot be created: {why}"),
        }
    }
    let checked = tokio::task::spawn_blocking(move || {
        let mut orders = orders.iter();
        orders.try_for_each(|orders| check(admin.inner(), orders, Some(PARTITIONS), STARTUP_TIMEOUT))
    });
    match checked.await? {
        // Whatever else is wrong may pass: then the server is not ready.
        Err(wrong @ TopicError::WrongPartitions { .. }) => Err(wrong.into()),
        _ => Ok(()),
    }
}

/// Why orders cannot be sent to a topic.
#[derive(Debug, thiserror::Error)]
pub(super) enum TopicError {
    /// The broker does not answer.
    #[error("Kafka does not describe the topic {topic}")]
    NoAnswer {
        topic: String,
        #[source]
        why: KafkaError,
    },
    /// The topic's own error: usually it does not exist.
    #[error("the topic {topic}: {why}")]
    Topic { topic: String, why: RDKafkaErrorCode },
    /// The topic was made by somebody else, or was changed.
    #[error("the topic {topic} has {partitions} partitions, not {expected}")]
    WrongPartitions {
        topic: String,
        partitions: i32,
        expected: i32,
    },
    /// No broker leads a partition.
    #[error("the topic {topic} has no leader for partition {partition}")]
    NoLeader { topic: String, partition: i32 },
}

/// Checks that a topic exists with this number of partitions (`None`: any), and that each has a
/// leader. Blocks.
pub(super) fn check<C: ClientContext>(
    client: &Client<C>,
    topic: &str,
    expected: Option<i32>,
    timeout: Duration,
) -> Result<(), TopicError> {
    let name = || topic.to_owned();
    let metadata = client
        .fetch_metadata(Some(topic), timeout)
        .map_err(|why| TopicError::NoAnswer { topic: name(), why })?;
    let unknown = Some(RDKafkaRespErr::RD_KAFKA_RESP_ERR_UNKNOWN_TOPIC_OR_PART);
    let described = metadata.topics().first();
    if let Some(why) = described.map_or(unknown, MetadataTopic::error) {
        let why = why.into();
        return Err(TopicError::Topic { topic: name(), why });
    }
    let partitions = described.map_or(&[][..], MetadataTopic::partitions);
    let count = i32::try_from(partitions.len()).unwrap_or(i32::MAX);
    if let Some(expected) = expected
        && count != expected
    {
        return Err(TopicError::WrongPartitions {
            topic: name(),
            partitions: count,
            expected,
        });
    }
    match partitions.iter().find(|partition| partition.leader() < 0) {
        Some(partition) => Err(TopicError::NoLeader {
            topic: name(),
            partition: partition.id(),
        }),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use rdkafka::{mocking::MockCluster, producer::Producer};

    use super::*;
    use crate::pipeline::producer;

    const TIMEOUT: Duration = Duration::from_secs(5);

    /// The broker of the client library creates what a client asks for, as one with
    /// `auto.create.topics.enable` does, unless the client forbids it.
    #[test]
    fn a_topic_that_is_missing_is_reported_and_not_made() {
        let broker = MockCluster::new(1).expect("a broker of the client library");
        let kafka = KafkaConfig {
            bootstrap_servers: broker.bootstrap_servers(),
            prefix: String::new(),
            consumers: 0,
            session: TIMEOUT,
        };
        let producer = producer(&kafka).expect("a producer");
        let check = |expected| check(producer.client(), "orders", expected, TIMEOUT);
        for _ in 0..3 {
            let missing = check(None).expect_err("it is not there").to_string();
            assert!(missing.contains("UnknownTopicOrPartition"), "{missing}");
        }
        broker.create_topic("orders", 1, 1).expect("a topic");
        check(None).expect("it is there");
        let other = check(Some(6)).expect_err("it has one partition").to_string();
        assert_eq!(other, "the topic orders has 1 partitions, not 6");
        broker.partition_leader("orders", 0, None).expect("no leader");
        let leaderless = check(None).expect_err("nobody leads it").to_string();
        assert_eq!(leaderless, "the topic orders has no leader for partition 0");
    }
}
