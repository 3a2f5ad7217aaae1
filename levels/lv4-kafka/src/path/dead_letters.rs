//! The dead-letter topic: where a message goes that no retry will ever make good, with the reason and with where it came from.

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

use super::{Poison, Taken, Undelivered, client, dead_letter_topic, message, producer, topic};

/// So many bytes of a key and of a payload are kept, and so many characters of a reason: the topic has a limit on messages. What is larger came
/// compressed, and few bytes of the topic of orders can be any number here.
const KEPT: usize = 400_000;
const REASON_KEPT: usize = 1_000;

/// So many bytes can be sent back: with what travels around them the topic of orders takes no more.
const SENT_BACK: usize = 64_000;

const REASON: &str = "reason";
const ORIGIN_TOPIC: &str = "origin-topic";
const ORIGIN_PARTITION: &str = "origin-partition";
const ORIGIN_OFFSET: &str = "origin-offset";
/// How long the payload was, in bytes, before it was cut short.
const LENGTH: &str = "length";
/// Stands on a note that a dead letter was replayed: such a note is no dead letter itself.
const REPLAYED: &str = "replayed";

/// Buries messages.
pub struct DeadLetters {
    producer: FutureProducer,
    topic: String,
    /// What is buried, and may be handed out again before its offset is committed.
    buried: Mutex<HashSet<(i32, i64)>>,
    counts: StrategyMetrics,
}

impl DeadLetters {
    pub(super) fn new(producer: FutureProducer, place: &KafkaConfig, counts: StrategyMetrics) -> Self {
        Self {
            producer,
            topic: dead_letter_topic(place),
            buried: Mutex::default(),
            counts,
        }
    }

    // ANCHOR: bury
    /// Writes a message to the dead-letter topic, and returns once the broker has it: only then may its offset be passed.
    ///
    /// A consumer that is killed just then buries it a second time after its restart; who reads the topic knows it by its origin.
    ///
    /// # Errors
    /// The broker did not take it. It is still where it was.
    pub async fn bury(&self, taken: &Taken, why: &Poison) -> Result<(), Undelivered> {
        let origin = (taken.partition, taken.offset);
        if self.buried().contains(&origin) {
            return Ok(());
        }
        let (key, payload) = (taken.message.key(), taken.message.payload().unwrap_or_default());
        let mut headers = vec![
            (REASON, why.to_string().chars().take(REASON_KEPT).collect()),
            (ORIGIN_TOPIC, taken.message.topic().to_owned()),
            (ORIGIN_PARTITION, taken.partition.to_string()),
            (ORIGIN_OFFSET, taken.offset.to_string()),
            (message::ATTEMPTS, (taken.attempts() + 1).to_string()),
        ];
        if payload.len() > KEPT {
            headers.push((LENGTH, payload.len().to_string()));
        }
        self.producer
            .send(
                FutureRecord::to(&self.topic)
                    .key(kept(key.unwrap_or_default()))
                    .payload(kept(payload))
                    .headers(with(&headers)),
                Duration::ZERO,
            )
            .await
            .map_err(|(why, _)| Undelivered(why))?;
        self.buried().insert(origin);
        self.counts.dead_letters.inc();
        tracing::warn!(partition = taken.partition, offset = taken.offset, %why, "dead-lettered");
        Ok(())
    }
    // ANCHOR_END: bury

    /// Forgets what lies before this offset: it will not be handed out again.
    pub fn passed(&self, partition: i32, offset: i64) {
        self.buried()
            .retain(|&(other, buried)| other != partition || buried >= offset);
    }

    fn buried(&self) -> std::sync::MutexGuard<'_, HashSet<(i32, i64)>> {
        self.buried.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn kept(bytes: &[u8]) -> &[u8] {
    &bytes[..bytes.len().min(KEPT)]
}

fn with(headers: &[(&str, String)]) -> OwnedHeaders {
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
    /// Names it: the topic, partition and offset that it came from.
    pub origin: String,
    /// Why it was given up.
    pub reason: String,
    /// How often it has been tried.
    pub attempts: u32,
    /// What stands in it, as far as it is text.
    pub payload: String,
    #[serde(skip)]
    message: OwnedMessage,
}

impl DeadLetter {
    /// Whether it can be sent back. What came compressed may be larger than the topic of orders takes, and is perhaps not all here.
    pub fn can_be_sent_back(&self) -> bool {
        let length = |bytes: Option<&[u8]>| bytes.map_or(0, <[u8]>::len);
        length(self.message.key()) + length(self.message.payload()) <= SENT_BACK
    }
}

/// The dead letters that were not replayed, each once, in the order in which they came.
///
/// # Errors
/// Kafka does not answer.
pub fn list(place: &KafkaConfig, patience: Duration) -> anyhow::Result<Vec<DeadLetter>> {
    let name = dead_letter_topic(place);
    let consumer: BaseConsumer = client(place)
        .set("group.id", &name)
        .set("enable.auto.commit", "false")
        .create()?;
    let metadata = consumer
        .fetch_metadata(Some(&name), patience)
        .with_context(|| format!("no answer from Kafka at {}", place.bootstrap_servers))?;
    let known = metadata.topics().first().context("a topic was asked for")?;
    let mut partitions = TopicPartitionList::new();
    let mut left = 0;
    for partition in known.partitions() {
        let (low, high) = consumer.fetch_watermarks(&name, partition.id(), patience)?;
        left += high - low;
        partitions.add_partition_offset(&name, partition.id(), Offset::Beginning)?;
    }
    consumer.assign(&partitions)?;
    let mut letters: BTreeMap<(i64, i64), DeadLetter> = BTreeMap::new();
    let mut places: HashMap<String, (i64, i64)> = HashMap::new();
    while left > 0 {
        let Some(read) = consumer.poll(patience) else {
            bail!("{left} dead letters could not be read within {patience:?}");
        };
        let read = read?.detach();
        left -= 1;
        let header = |key: &str| {
            let headers = read.headers().into_iter().flat_map(|headers| headers.iter());
            let mut found = headers.filter(|header| header.key == key);
            found
                .next()
                .and_then(|header| Some(str::from_utf8(header.value?).ok()?.to_owned()))
        };
        let place = |key| header(key).unwrap_or_else(|| "?".to_owned());
        let origin = format!(
            "{}/{}/{}",
            place(ORIGIN_TOPIC),
            place(ORIGIN_PARTITION),
            place(ORIGIN_OFFSET)
        );
        // One that was buried twice is one letter; one that was replayed is none.
        if let Some(earlier) = places.remove(&origin) {
            letters.remove(&earlier);
        }
        if header(REPLAYED).is_some() {
            continue;
        }
        let came = (read.timestamp().to_millis().unwrap_or(0), -left);
        places.insert(origin.clone(), came);
        let letter = DeadLetter {
            origin,
            reason: place(REASON),
            attempts: message::attempts(&read),
            payload: String::from_utf8_lossy(read.payload().unwrap_or_default()).into_owned(),
            message: read,
        };
        letters.insert(came, letter);
    }
    Ok(letters.into_values().collect())
}

/// Sends a dead letter back to where it came from, to be tried once more, and notes that it was.
///
/// # Errors
/// There is no such letter, or the broker does not take it.
pub async fn replay(place: &KafkaConfig, origin: &str, patience: Duration) -> anyhow::Result<()> {
    let looked = place.clone();
    let letters = tokio::task::spawn_blocking(move || list(&looked, patience)).await??;
    let letter = letters
        .into_iter()
        .find(|letter| letter.origin == origin)
        .with_context(|| format!("there is no dead letter {origin}, or it was replayed"))?;
    if !letter.can_be_sent_back() {
        bail!(
            "the dead letter {origin} is larger than the topic of orders takes: it came compressed, and it stays where it is"
        );
    }
    send_back(place, &producer(place)?, &letter, patience).await?;
    Ok(())
}

/// The same with every letter that can be sent back. Returns how many.
///
/// # Errors
/// Kafka does not answer, or does not take one: those before it are replayed.
pub async fn replay_all(place: &KafkaConfig, patience: Duration) -> anyhow::Result<usize> {
    let looked = place.clone();
    let letters = tokio::task::spawn_blocking(move || list(&looked, patience)).await??;
    let producer = producer(place)?;
    let mut replayed = 0;
    for letter in letters.iter().filter(|letter| letter.can_be_sent_back()) {
        send_back(place, &producer, letter, patience).await?;
        replayed += 1;
    }
    Ok(replayed)
}

async fn send_back(
    place: &KafkaConfig,
    producer: &FutureProducer,
    letter: &DeadLetter,
    patience: Duration,
) -> anyhow::Result<()> {
    let key = letter.message.key().unwrap_or_default();
    let payload = letter.message.payload().unwrap_or_default();
    let attempts = (message::ATTEMPTS, letter.attempts.to_string());
    let undelivered = |(why, _)| Undelivered(why);
    producer
        .send(
            FutureRecord::to(&topic(place))
                .key(key)
                .payload(payload)
                .headers(with(&[attempts])),
            patience,
        )
        .await
        .map_err(undelivered)?;
    // Only then the note: killed in between, it is replayed twice, and the second time is recognised by its id.
    let mut headers = letter.message.headers().context("a dead letter has headers")?.clone();
    headers = headers.insert(Header {
        key: REPLAYED,
        value: Some("true"),
    });
    producer
        .send(
            FutureRecord::<[u8], [u8]>::to(&dead_letter_topic(place))
                .key(key)
                .headers(headers),
            patience,
        )
        .await
        .map_err(undelivered)?;
    Ok(())
}
