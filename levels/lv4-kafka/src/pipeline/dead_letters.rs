//! The dead-letter topic: poison messages are written to it with the reason and their origin, and
//! an operator lists and replays them.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    sync::{Mutex, PoisonError},
    time::Duration,
};

use anyhow::{Context, bail};
use box_office::{KafkaConfig, StrategyMetrics};
use rdkafka::{
    Message as _, Offset, TopicPartitionList,
    consumer::{BaseConsumer, Consumer},
    message::{Header, Headers, OwnedHeaders, OwnedMessage},
    producer::{FutureProducer, FutureRecord},
};
use serde::Serialize;

use super::{
    ConsumedMessage, OrderProducer, PoisonMessage, Undelivered,
    message::{ATTEMPTS, attempts},
    producer,
    topics::{client_config, dead_letter_topic, orders_topic},
};

/// The maximum number of bytes that are copied of a key and of a payload: the topic limits the size
/// of a message. A larger payload was compressed in the orders topic.
const MAX_COPIED_BYTES: usize = 400_000;

/// The maximum number of characters that are copied of a reason.
const MAX_REASON_CHARS: usize = 1_000;

/// The maximum number of bytes of key and payload that can be replayed: together with the overhead
/// of a batch the orders topic accepts no more.
const MAX_REPLAY_BYTES: usize = 64_000;

const REASON: &str = "reason";
const ORIGIN_TOPIC: &str = "origin-topic";
const ORIGIN_PARTITION: &str = "origin-partition";
const ORIGIN_OFFSET: &str = "origin-offset";
/// The length of the payload in bytes, if it was truncated.
const LENGTH: &str = "length";
/// Marks a tombstone: the dead letter of this origin was replayed.
const REPLAYED: &str = "replayed";

/// Writes poison messages to the dead-letter topic.
pub struct DeadLetters {
    producer: OrderProducer,
    topic: String,
    /// The partition and offset of each message that was dead-lettered and whose offset is not yet
    /// committed: it may be redelivered.
    written: Mutex<HashSet<(i32, i64)>>,
    counts: StrategyMetrics,
}

impl DeadLetters {
    pub(super) fn new(producer: OrderProducer, kafka: &KafkaConfig, counts: StrategyMetrics) -> Self {
        Self {
            producer,
            topic: dead_letter_topic(kafka),
            written: Mutex::default(),
            counts,
        }
    }

    // ANCHOR: dead_letter
    /// Writes a message to the dead-letter topic. Returns once the broker has acknowledged it: only
    /// then may its offset be committed.
    ///
    /// A consumer that is killed before the commit writes it a second time after its restart.
    /// Readers of the topic recognise the duplicate by its origin.
    ///
    /// # Errors
    /// [`Undelivered`] if the broker did not acknowledge it. The message must be retried.
    pub async fn dead_letter(&self, message: &ConsumedMessage, why: &PoisonMessage) -> Result<(), Undelivered> {
        let origin = (message.partition, message.offset);
        if self.written().contains(&origin) {
            return Ok(());
        }
        let (key, payload) = (message.raw.key(), message.raw.payload().unwrap_or_default());
        let mut headers = vec![
            (REASON, why.to_string().chars().take(MAX_REASON_CHARS).collect()),
            (ORIGIN_TOPIC, message.raw.topic().to_owned()),
            (ORIGIN_PARTITION, message.partition.to_string()),
            (ORIGIN_OFFSET, message.offset.to_string()),
            (ATTEMPTS, (message.attempts() + 1).to_string()),
        ];
        if payload.len() > MAX_COPIED_BYTES {
            headers.push((LENGTH, payload.len().to_string()));
        }
        self.producer
            .send(
                FutureRecord::to(&self.topic)
                    .key(truncated(key.unwrap_or_default()))
                    .payload(truncated(payload))
                    .headers(to_headers(&headers)),
                Duration::ZERO,
            )
            .await
            .map_err(|(why, _)| Undelivered(why))?;
        self.written().insert(origin);
        self.counts.dead_letters.inc();
        tracing::warn!(partition = message.partition, offset = message.offset, %why, "dead-lettered");
        Ok(())
    }
    // ANCHOR_END: dead_letter

    /// Forgets the messages of a partition below this offset, which is committed: they will not be
    /// redelivered.
    pub fn forget_below(&self, partition: i32, offset: i64) {
        self.written()
            .retain(|&(other, written)| other != partition || written >= offset);
    }

    fn written(&self) -> std::sync::MutexGuard<'_, HashSet<(i32, i64)>> {
        self.written.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn truncated(bytes: &[u8]) -> &[u8] {
    &bytes[..bytes.len().min(MAX_COPIED_BYTES)]
}

fn to_headers(headers: &[(&str, String)]) -> OwnedHeaders {
    headers.iter().fold(OwnedHeaders::new(), |all, (key, value)| {
        all.insert(Header {
            key,
            value: Some(value),
        })
    })
}

/// A message in the dead-letter topic.
#[derive(Clone, Debug, Serialize)]
pub struct DeadLetter {
    /// Its identity: the topic, partition and offset of the original message, separated by slashes.
    pub origin: String,
    /// Why it was dead-lettered.
    pub reason: String,
    /// The number of attempts so far.
    pub attempts: u32,
    /// The payload as text; invalid UTF-8 is replaced.
    pub payload: String,
    #[serde(skip)]
    message: OwnedMessage,
}

impl DeadLetter {
    /// Whether it can be replayed. A message that was compressed may be larger than the orders
    /// topic accepts, and its payload may be truncated here.
    pub fn is_replayable(&self) -> bool {
        let length = |bytes: Option<&[u8]>| bytes.map_or(0, <[u8]>::len);
        length(self.message.key()) + length(self.message.payload()) <= MAX_REPLAY_BYTES
    }
}

/// Lists the dead letters that were not replayed, without duplicates, oldest first. `timeout` is
/// that of each request.
///
/// # Errors
/// If Kafka does not answer in time.
pub fn list_dead_letters(kafka: &KafkaConfig, timeout: Duration) -> anyhow::Result<Vec<DeadLetter>> {
    let name = dead_letter_topic(kafka);
    let consumer: BaseConsumer = client_config(kafka)
        .set("group.id", &name)
        .set("enable.auto.commit", "false")
        .create()?;
    let metadata = consumer
        .fetch_metadata(Some(&name), timeout)
        .with_context(|| format!("no answer from Kafka at {}", kafka.bootstrap_servers))?;
    let topic = metadata.topics().first().context("the metadata lacks the topic")?;
    let mut partitions = TopicPartitionList::new();
    let mut left = 0;
    for partition in topic.partitions() {
        let (low, high) = consumer.fetch_watermarks(&name, partition.id(), timeout)?;
        left += high - low;
        partitions.add_partition_offset(&name, partition.id(), Offset::Beginning)?;
    }
    consumer.assign(&partitions)?;
    let mut dead_letters: BTreeMap<(i64, i64), DeadLetter> = BTreeMap::new();
    let mut positions: HashMap<String, (i64, i64)> = HashMap::new();
    while left > 0 {
        let Some(polled) = consumer.poll(timeout) else {
            bail!("{left} dead letters could not be read within {timeout:?}");
        };
        let message = polled?.detach();
        left -= 1;
        let header = |key: &str| {
            let headers = message.headers().into_iter().flat_map(|headers| headers.iter());
            let mut found = headers.filter(|header| header.key == key);
            found
                .next()
                .and_then(|header| Some(str::from_utf8(header.value?).ok()?.to_owned()))
        };
        let header_or_unknown = |key| header(key).unwrap_or_else(|| "?".to_owned());
        let origin = format!(
            "{}/{}/{}",
            header_or_unknown(ORIGIN_TOPIC),
            header_or_unknown(ORIGIN_PARTITION),
            header_or_unknown(ORIGIN_OFFSET)
        );
        // A duplicate replaces the earlier copy; a tombstone removes it.
        if let Some(earlier) = positions.remove(&origin) {
            dead_letters.remove(&earlier);
        }
        if header(REPLAYED).is_some() {
            continue;
        }
        let position = (message.timestamp().to_millis().unwrap_or(0), -left);
        positions.insert(origin.clone(), position);
        let dead_letter = DeadLetter {
            origin,
            reason: header_or_unknown(REASON),
            attempts: attempts(&message),
            payload: String::from_utf8_lossy(message.payload().unwrap_or_default()).into_owned(),
            message,
        };
        dead_letters.insert(position, dead_letter);
    }
    Ok(dead_letters.into_values().collect())
}

/// Replays a dead letter: sends it to the orders topic again, and marks it as replayed. `timeout`
/// is that of each request.
///
/// # Errors
/// If there is no such dead letter, it is too large, or Kafka does not answer or acknowledge it.
pub async fn replay(kafka: &KafkaConfig, origin: &str, timeout: Duration) -> anyhow::Result<()> {
    let dead_letter = read_all(kafka, timeout)
        .await?
        .into_iter()
        .find(|dead_letter| dead_letter.origin == origin)
        .with_context(|| format!("there is no dead letter {origin}, or it was replayed"))?;
    if !dead_letter.is_replayable() {
        bail!(
            "the dead letter {origin} is larger than the orders topic accepts: it was compressed there; it is not replayed"
        );
    }
    republish(kafka, &producer(kafka)?, &dead_letter, timeout).await?;
    Ok(())
}

/// Replays every dead letter that is not too large. Returns their number.
///
/// # Errors
/// If Kafka does not answer, or does not acknowledge one: those before it are replayed.
pub async fn replay_all(kafka: &KafkaConfig, timeout: Duration) -> anyhow::Result<usize> {
    let dead_letters = read_all(kafka, timeout).await?;
    let producer = producer(kafka)?;
    let mut replayed = 0;
    for dead_letter in dead_letters.iter().filter(|dead_letter| dead_letter.is_replayable()) {
        republish(kafka, &producer, dead_letter, timeout).await?;
        replayed += 1;
    }
    Ok(replayed)
}

async fn read_all(kafka: &KafkaConfig, timeout: Duration) -> anyhow::Result<Vec<DeadLetter>> {
    let kafka = kafka.clone();
    tokio::task::spawn_blocking(move || list_dead_letters(&kafka, timeout)).await?
}

async fn republish(
    kafka: &KafkaConfig,
    producer: &FutureProducer,
    dead_letter: &DeadLetter,
    timeout: Duration,
) -> anyhow::Result<()> {
    let key = dead_letter.message.key().unwrap_or_default();
    let payload = dead_letter.message.payload().unwrap_or_default();
    let attempts = (ATTEMPTS, dead_letter.attempts.to_string());
    let undelivered = |(why, _)| Undelivered(why);
    producer
        .send(
            FutureRecord::to(&orders_topic(kafka))
                .key(key)
                .payload(payload)
                .headers(to_headers(&[attempts])),
            timeout,
        )
        .await
        .map_err(undelivered)?;
    // The tombstone comes second: if the process is killed in between, the message is replayed
    // twice, and its id identifies the duplicate.
    let mut headers = dead_letter
        .message
        .headers()
        .context("a dead letter has headers")?
        .clone();
    headers = headers.insert(Header {
        key: REPLAYED,
        value: Some("true"),
    });
    producer
        .send(
            FutureRecord::<[u8], [u8]>::to(&dead_letter_topic(kafka))
                .key(key)
                .headers(headers),
            timeout,
        )
        .await
        .map_err(undelivered)?;
    Ok(())
}
