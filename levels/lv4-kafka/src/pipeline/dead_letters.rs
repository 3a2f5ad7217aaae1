//! The dead-letter topic: poison messages are written to it with the reason and their origin.

use std::{
    collections::HashSet,
    sync::{Mutex, PoisonError},
    time::Duration,
};

use box_office::{Indeterminate, KafkaConfig, StrategyMetrics};
use rdkafka::{Message as _, producer::FutureRecord};

use super::{
    ConsumedMessage, OrderPartition, OrderProducer, PoisonMessage, Undelivered,
    headers::{ATTEMPTS, LENGTH, ORIGIN_OFFSET, ORIGIN_PARTITION, ORIGIN_TOPIC, REASON, headers_of},
    topics::dead_letter_topic,
};

/// The maximum number of bytes that are copied of a key and of a payload: the topic limits the size
/// of a message. A larger payload was compressed in the orders topic.
const MAX_COPIED_BYTES: usize = 400_000;

/// The maximum number of characters that are copied of a reason.
pub(super) const MAX_REASON_CHARS: usize = 1_000;

/// Writes poison messages to the dead-letter topic.
pub struct DeadLetters {
    producer: OrderProducer,
    topic: String,
    /// The partition and offset of each message that was dead-lettered and whose offset is not yet
    /// committed: it may be redelivered.
    written: Mutex<HashSet<(OrderPartition, i64)>>,
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
    /// [`Indeterminate::BackendAway`] if the broker did not acknowledge it. The message must be
    /// retried.
    pub async fn dead_letter(&self, message: &ConsumedMessage, why: &PoisonMessage) -> Result<(), Indeterminate> {
        let origin = (message.partition, message.offset);
        if self.written().contains(&origin) {
            return Ok(());
        }
        let (key, payload) = (message.raw.key(), message.raw.payload().unwrap_or_default());
        let reason: String = why.to_string().chars().take(MAX_REASON_CHARS).collect();
        let mut headers = vec![
            (REASON, reason.clone()),
            (ORIGIN_TOPIC, message.raw.topic().to_owned()),
            (ORIGIN_PARTITION, message.partition.number.to_string()),
            (ORIGIN_OFFSET, message.offset.to_string()),
            (ATTEMPTS, message.attempts().saturating_add(1).to_string()),
        ];
        if payload.len() > MAX_COPIED_BYTES {
            headers.push((LENGTH, payload.len().to_string()));
        }
        self.producer
            .send(
                FutureRecord::to(&self.topic)
                    .key(truncated(key.unwrap_or_default()))
                    .payload(truncated(payload))
                    .headers(headers_of(&headers)),
                Duration::ZERO,
            )
            .await
            .map_err(|(why, _)| Indeterminate::BackendAway(Undelivered(why).into()))?;
        self.written().insert(origin);
        self.counts.dead_letters.inc();
        tracing::warn!(
            partition = %message.partition,
            offset = message.offset,
            why = reason,
            "dead-lettered"
        );
        Ok(())
    }
    // ANCHOR_END: dead_letter

    /// Forgets the messages of a partition below this offset, which is committed: they will not be
    /// redelivered.
    pub fn forget_below(&self, partition: OrderPartition, offset: i64) {
        self.written()
            .retain(|&(other, written)| other != partition || written >= offset);
    }

    fn written(&self) -> std::sync::MutexGuard<'_, HashSet<(OrderPartition, i64)>> {
        self.written.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn truncated(bytes: &[u8]) -> &[u8] {
    &bytes[..bytes.len().min(MAX_COPIED_BYTES)]
}
