//! What an operator does with dead letters: lists, replays and skips them.

use std::{
    collections::{HashMap, HashSet},
    fmt,
    time::Duration,
};

use anyhow::{Context, bail};
use box_office::KafkaConfig;
use rdkafka::{
    Message as _, Offset, TopicPartitionList,
    consumer::{BaseConsumer, Consumer},
    error::{KafkaError, RDKafkaErrorCode},
    message::OwnedMessage,
    producer::{FutureProducer, FutureRecord},
};
use serde::Serialize;

use super::{
    Undelivered,
    dead_letters::MAX_REASON_CHARS,
    headers::{ATTEMPTS, ORIGIN_OFFSET, ORIGIN_PARTITION, ORIGIN_TOPIC, REASON, RESOLVED, attempts, headers_of, text},
    producer,
    topics::{client_config, dead_letter_topic, orders_topic, vips_topic},
};

/// The maximum number of bytes of key and payload that can be replayed: together with the overhead
/// of a batch the orders topic accepts no more.
const MAX_REPLAY_BYTES: usize = 64_000;

/// The number of consecutive timeouts after which Kafka counts as unavailable.
const MAX_TIMEOUTS: u32 = 3;

/// The reason of a dead letter that does not tell one.
const NO_REASON: &str = "no reason given: another program wrote it";

/// The place of a message.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Place {
    topic: String,
    partition: i32,
    offset: i64,
}

impl Place {
    fn of(message: &OwnedMessage) -> Self {
        Self {
            topic: message.topic().to_owned(),
            partition: message.partition(),
            offset: message.offset(),
        }
    }

    /// The place that a dead letter or a resolution marker names in its headers, if it is one in these topics.
    fn named_by(message: &OwnedMessage, topics: &[&str]) -> Option<Self> {
        let header = |name| text(message.headers(), name);
        let partition = header(ORIGIN_PARTITION)?.parse().ok()?;
        let offset = header(ORIGIN_OFFSET)?.parse().ok()?;
        let topic = header(ORIGIN_TOPIC)?;
        let named = topics.contains(&topic) && partition >= 0 && offset >= 0;
        named.then(|| Self {
            topic: topic.to_owned(),
            partition,
            offset,
        })
    }
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}/{}", self.topic, self.partition, self.offset)
    }
}

/// A message in the dead-letter topic.
#[derive(Clone, Debug, Serialize)]
pub struct DeadLetter {
    /// Its identity: the topic, partition and offset of the original message, separated by slashes.
    /// If it does not name that message, because another program wrote it: its own.
    pub origin: String,
    /// Why it was dead-lettered.
    pub reason: String,
    /// The number of attempts so far.
    pub attempts: u32,
    /// The payload as text; invalid UTF-8 is replaced.
    pub payload: String,
    #[serde(skip)]
    place: Place,
    #[serde(skip)]
    message: OwnedMessage,
}

impl DeadLetter {
    fn new(place: Place, message: OwnedMessage) -> Self {
        let reason = text(message.headers(), REASON).unwrap_or(NO_REASON);
        Self {
            origin: place.to_string(),
            reason: reason.chars().take(MAX_REASON_CHARS).collect(),
            attempts: attempts(message.headers()),
            payload: String::from_utf8_lossy(message.payload().unwrap_or_default()).into_owned(),
            place,
            message,
        }
    }

    /// Whether it can be replayed. A message that was compressed may be larger than the orders
    /// topic accepts, and its payload may be truncated here.
    pub fn is_replayable(&self) -> bool {
        let length = |bytes: Option<&[u8]>| bytes.map_or(0, <[u8]>::len);
        length(self.message.key()) + length(self.message.payload()) <= MAX_REPLAY_BYTES
    }

    /// Whether this message is a copy of it.
    fn is_copied_by(&self, message: &OwnedMessage) -> bool {
        (self.message.key(), self.message.payload()) == (message.key(), message.payload())
    }
}

/// Lists the dead letters that were neither replayed nor skipped, without duplicates, oldest first.
/// `timeout` is that of each request.
///
/// # Errors
/// If Kafka does not answer in time.
pub fn list_dead_letters(kafka: &KafkaConfig, timeout: Duration) -> anyhow::Result<Vec<DeadLetter>> {
    let orders = [orders_topic(kafka), vips_topic(kafka)];
    Ok(pending(
        read_topic(kafka, timeout)?,
        &orders.each_ref().map(String::as_str),
    ))
}

/// Reads every message of the dead-letter topic.
fn read_topic(kafka: &KafkaConfig, timeout: Duration) -> anyhow::Result<Vec<OwnedMessage>> {
    let name = dead_letter_topic(kafka);
    let consumer: BaseConsumer = client_config(kafka)
        .set("group.id", &name)
        .set("enable.auto.commit", "false")
        // Not every offset is that of a message: another program may use transactions.
        .set("enable.partition.eof", "true")
        .create()?;
    let metadata = consumer
        .fetch_metadata(Some(&name), timeout)
        .with_context(|| format!("no answer from Kafka at {}", kafka.bootstrap_servers))?;
    let topic = metadata.topics().first().context("the metadata lacks the topic")?;
    let mut unread: HashSet<i32> = topic.partitions().iter().map(|partition| partition.id()).collect();
    let mut partitions = TopicPartitionList::new();
    for &partition in &unread {
        partitions.add_partition_offset(&name, partition, Offset::Beginning)?;
    }
    consumer.assign(&partitions)?;
    let mut messages = vec![];
    while !unread.is_empty() {
        match consumer.poll(timeout) {
            Some(Ok(message)) => messages.push(message.detach()),
            Some(Err(KafkaError::PartitionEOF(partition))) => {
                unread.remove(&partition);
            }
            Some(Err(why)) => return Err(why.into()),
            None => bail!("the dead letters could not be read: no answer within {timeout:?}"),
        }
    }
    Ok(messages)
}

/// The dead letters among the messages of the dead-letter topic that have no resolution marker.
fn pending(messages: Vec<OwnedMessage>, orders: &[&str]) -> Vec<DeadLetter> {
    let mut pending: HashMap<Place, (usize, DeadLetter)> = HashMap::new();
    for (number, message) in messages.into_iter().enumerate() {
        let own = Place::of(&message);
        let origin = Place::named_by(&message, orders);
        let is_marked = text(message.headers(), RESOLVED).is_some() && message.payload().is_none_or(<[u8]>::is_empty);
        let of_foreign = || Place::named_by(&message, &[&own.topic]);
        if is_marked && let Some(done) = origin.clone().or_else(of_foreign) {
            pending.remove(&done);
            continue;
        }
        // A duplicate replaces the earlier copy. Any other message is not of this origin, whatever
        // it names.
        let origin = origin.filter(|origin| {
            let earlier = pending.get(origin);
            earlier.is_none_or(|(_, earlier)| earlier.is_copied_by(&message))
        });
        let place = origin.unwrap_or(own);
        pending.insert(place.clone(), (number, DeadLetter::new(place, message)));
    }
    let mut pending: Vec<(usize, DeadLetter)> = pending.into_values().collect();
    pending.sort_by_key(|(number, dead_letter)| (dead_letter.message.timestamp().to_millis(), *number));
    pending.into_iter().map(|(_, dead_letter)| dead_letter).collect()
}

/// Replays a dead letter: sends it to its topic of orders again, and marks it as replayed. `timeout`
/// is that of each request.
///
/// # Errors
/// If there is no such dead letter, it is too large, or Kafka does not answer or acknowledge it.
pub async fn replay(kafka: &KafkaConfig, origin: &str, timeout: Duration) -> anyhow::Result<()> {
    let dead_letter = find(kafka, origin, timeout).await?;
    if !dead_letter.is_replayable() {
        bail!(
            "the dead letter {origin} is larger than the orders topic accepts: it was compressed there; it is not replayed"
        );
    }
    republish(kafka, &producer(kafka)?, &dead_letter, timeout).await
}

/// Skips a dead letter: it is listed and replayed no more. `timeout` is that of each request.
///
/// # Errors
/// If there is no such dead letter, or Kafka does not answer or acknowledge the marker.
pub async fn skip(kafka: &KafkaConfig, origin: &str, timeout: Duration) -> anyhow::Result<()> {
    let dead_letter = find(kafka, origin, timeout).await?;
    mark_as_done(kafka, &producer(kafka)?, &dead_letter, timeout).await?;
    Ok(())
}

/// What came of [`replay_all`].
#[derive(Debug, Default)]
pub struct Replayed {
    /// The number of dead letters that were replayed.
    pub replayed: usize,
    /// The origins of those that are too large, and stay.
    pub too_large: Vec<String>,
    /// The origins of those that failed, and stay, each with its error.
    pub failed: Vec<(String, anyhow::Error)>,
    /// The number of those that were not tried any more, because Kafka stopped to answer.
    pub not_tried: usize,
}

/// Replays every dead letter that is not too large. One that fails does not stop the others.
/// `timeout` is that of each request.
///
/// # Errors
/// If the dead letters cannot be read.
pub async fn replay_all(kafka: &KafkaConfig, timeout: Duration) -> anyhow::Result<Replayed> {
    let (dead_letters, too_large): (Vec<DeadLetter>, Vec<DeadLetter>) = read_all(kafka, timeout)
        .await?
        .into_iter()
        .partition(DeadLetter::is_replayable);
    let producer = producer(kafka)?;
    let mut report = Replayed {
        too_large: too_large.into_iter().map(|dead_letter| dead_letter.origin).collect(),
        ..Replayed::default()
    };
    let mut timeouts = 0;
    // One after another: the broker accepts or rejects a batch of messages as a whole.
    for dead_letter in dead_letters {
        if timeouts == MAX_TIMEOUTS {
            report.not_tried += 1;
            continue;
        }
        match republish(kafka, &producer, &dead_letter, timeout).await {
            Ok(()) => {
                report.replayed += 1;
                timeouts = 0;
            }
            Err(why) => {
                timeouts = if is_timeout(&why) { timeouts + 1 } else { 0 };
                report.failed.push((dead_letter.origin, why));
            }
        }
    }
    Ok(report)
}

fn is_timeout(why: &anyhow::Error) -> bool {
    let undelivered = why.downcast_ref::<Undelivered>();
    undelivered.is_some_and(|Undelivered(why)| why.rdkafka_error_code() == Some(RDKafkaErrorCode::MessageTimedOut))
}

async fn read_all(kafka: &KafkaConfig, timeout: Duration) -> anyhow::Result<Vec<DeadLetter>> {
    let kafka = kafka.clone();
    tokio::task::spawn_blocking(move || list_dead_letters(&kafka, timeout)).await?
}

async fn find(kafka: &KafkaConfig, origin: &str, timeout: Duration) -> anyhow::Result<DeadLetter> {
    let mut dead_letters = read_all(kafka, timeout).await?.into_iter();
    let found = dead_letters.find(|dead_letter| dead_letter.origin == origin);
    found.with_context(|| format!("there is no dead letter {origin}, or it was replayed or skipped"))
}

async fn republish(
    kafka: &KafkaConfig,
    producer: &FutureProducer,
    dead_letter: &DeadLetter,
    timeout: Duration,
) -> anyhow::Result<()> {
    let attempts = (ATTEMPTS, dead_letter.attempts.to_string());
    // What does not name its origin is taken for an order of normal priority.
    let vips = vips_topic(kafka);
    let topic = if dead_letter.place.topic == vips {
        vips
    } else {
        orders_topic(kafka)
    };
    producer
        .send(
            FutureRecord::to(&topic)
                .key(dead_letter.message.key().unwrap_or_default())
                .payload(dead_letter.message.payload().unwrap_or_default())
                .headers(headers_of(&[attempts])),
            timeout,
        )
        .await
        .map_err(|(why, _)| Undelivered(why))?;
    // The marker comes second: if the process is killed in between, the message is replayed
    // twice, and its id identifies the duplicate.
    mark_as_done(kafka, producer, dead_letter, timeout)
        .await
        .context("it was sent, and is sent again by the next replay: it could not be marked")
}

/// Writes the resolution marker of a dead letter: into its partition, so that it is read after it.
async fn mark_as_done(
    kafka: &KafkaConfig,
    producer: &FutureProducer,
    dead_letter: &DeadLetter,
    timeout: Duration,
) -> Result<(), Undelivered> {
    let place = &dead_letter.place;
    let headers = headers_of(&[
        (ORIGIN_TOPIC, place.topic.clone()),
        (ORIGIN_PARTITION, place.partition.to_string()),
        (ORIGIN_OFFSET, place.offset.to_string()),
        (RESOLVED, "true".to_owned()),
    ]);
    let topic = dead_letter_topic(kafka);
    let marker = FutureRecord::<[u8], [u8]>::to(&topic)
        .partition(dead_letter.message.partition())
        .headers(headers);
    let sent = producer.send(marker, timeout).await;
    sent.map(drop).map_err(|(why, _)| Undelivered(why))
}

#[cfg(test)]
mod tests {
    use proptest::{collection::vec, prelude::*};
    use rdkafka::Timestamp;

    use super::*;

    const ORDERS: &str = "orders";
    const VIPS: &str = "orders.vip";
    const DEAD: &str = "orders.dead";

    fn message(offset: i64, payload: Option<&[u8]>, headers: &[(&str, &[u8])]) -> OwnedMessage {
        OwnedMessage::new(
            payload.map(<[u8]>::to_vec),
            None,
            DEAD.to_owned(),
            Timestamp::CreateTime(0),
            0,
            offset,
            Some(headers_of(headers)),
        )
    }

    /// The headers of a dead letter of this offset in partition 3.
    fn of(offset: &'static str) -> [(&'static str, &'static [u8]); 3] {
        [
            (ORIGIN_TOPIC, ORDERS.as_bytes()),
            (ORIGIN_PARTITION, b"3"),
            (ORIGIN_OFFSET, offset.as_bytes()),
        ]
    }

    fn origins(messages: Vec<OwnedMessage>) -> Vec<String> {
        let pending = pending(messages, &[ORDERS, VIPS]);
        pending.into_iter().map(|dead_letter| dead_letter.origin).collect()
    }

    #[test]
    fn a_foreign_record_is_known_by_its_own_place() {
        let elsewhere = [
            (ORIGIN_TOPIC, DEAD.as_bytes()),
            (ORIGIN_PARTITION, b"0".as_slice()),
            (ORIGIN_OFFSET, b"0"),
        ];
        let messages = vec![
            message(0, Some(b"a"), &[]),
            message(1, None, &[]),
            message(2, Some(b"b"), &of("7")[..2]),
            message(3, Some(b"c"), &of("-7")),
            message(4, Some(b"d"), &of("99999999999999999999")),
            message(5, Some(b"e"), &elsewhere),
            message(6, Some(b"f"), &of("7")),
            message(7, Some(b"another"), &of("7")),
            message(8, None, &[(RESOLVED, b"true")]),
        ];
        let foreign = |offset| format!("{DEAD}/0/{offset}");
        let mut expected: Vec<String> = (0..9).map(foreign).collect();
        expected[6] = format!("{ORDERS}/3/7");
        assert_eq!(origins(messages), expected);
    }

    #[test]
    fn duplicates_are_listed_once_and_what_is_resolved_not_at_all() {
        let marker = |mut named: Vec<(&'static str, &'static [u8])>, offset| {
            named.push((RESOLVED, b"true"));
            message(offset, None, &named)
        };
        let own = vec![
            (ORIGIN_TOPIC, DEAD.as_bytes()),
            (ORIGIN_PARTITION, b"0".as_slice()),
            (ORIGIN_OFFSET, b"1"),
        ];
        let messages = vec![
            message(0, Some(b"a"), &of("7")),
            message(1, Some(b"foreign"), &[]),
            message(2, Some(b"a"), &of("7")),
            message(3, Some(b"b"), &of("8")),
        ];
        let orders = |offset| format!("{ORDERS}/3/{offset}");
        assert_eq!(origins(messages.clone()), [format!("{DEAD}/0/1"), orders(7), orders(8)]);
        let markers = vec![marker(own, 4), marker(of("7").to_vec(), 5)];
        let with_markers = [messages.clone(), markers].concat();
        assert_eq!(origins(with_markers), [orders(8)]);
        // A record that has a payload is no marker.
        let mut named = of("8").to_vec();
        named.push((RESOLVED, b"true"));
        let foreign = [messages, vec![message(4, Some(b"b again"), &named)]].concat();
        assert_eq!(origins(foreign).len(), 4);
    }

    proptest! {
        /// Every record that is neither a copy nor a marker is listed, each under its own name.
        #[test]
        fn no_record_is_too_strange(
            records in vec((
                vec(any::<u8>(), 1..8),
                vec((
                    prop_oneof![
                        Just(ORIGIN_TOPIC), Just(ORIGIN_PARTITION), Just(ORIGIN_OFFSET), Just(ATTEMPTS), Just(REASON),
                        Just(RESOLVED), Just("")
                    ],
                    prop_oneof![
                        Just(ORDERS.as_bytes().to_vec()), Just(DEAD.as_bytes().to_vec()),
                        any::<i64>().prop_map(|number| number.to_string().into_bytes()), vec(any::<u8>(), 0..30)
                    ],
                ), 0..8),
            ), 0..6)
        ) {
            let messages: Vec<OwnedMessage> = (0..).zip(&records).map(|(offset, (payload, headers))| {
                // With its offset, no payload is a copy of another.
                let payload = [&[offset as u8], payload.as_slice()].concat();
                let headers: Vec<(&str, &[u8])> = headers.iter().map(|(name, value)| (*name, value.as_slice())).collect();
                message(offset, Some(&payload), &headers)
            }).collect();
            let names: HashSet<String> = origins(messages).into_iter().collect();
            prop_assert_eq!(names.len(), records.len());
        }
    }
}
