//! The producer: a message counts as sent once the broker has acknowledged it.

use std::time::Duration;

use box_office::{Indeterminate, KafkaConfig, ReserveError};
use rdkafka::{
    error::{KafkaError, RDKafkaErrorCode},
    producer::FutureProducer,
};

use super::topics::{MAX_MESSAGE_BYTES, client_config};

/// How long the broker may take to acknowledge a message. After that the buyer is told that the
/// outcome is unknown: the broker may have the message.
const DELIVERY_TIMEOUT: Duration = Duration::from_secs(5);

// ANCHOR: producer
/// Creates an idempotent producer that waits for all in-sync replicas.
///
/// # Errors
/// If the client rejects its configuration.
pub fn producer(kafka: &KafkaConfig) -> Result<FutureProducer, KafkaError> {
    client_config(kafka)
        .set("acks", "all") // every in-sync replica has it
        .set("enable.idempotence", "true") // and has it once, however often the client retried
        .set("linger.ms", "5") // how long a message waits for others to fill a batch
        .set("batch.size", MAX_MESSAGE_BYTES) // the topic rejects a larger batch
        .set("delivery.timeout.ms", DELIVERY_TIMEOUT.as_millis().to_string())
        .create()
}
// ANCHOR_END: producer

/// The broker did not acknowledge a message in time. It may have stored it all the same.
#[derive(Debug, thiserror::Error)]
#[error("the message was not acknowledged: {0}")]
pub struct Undelivered(#[source] pub KafkaError);

impl From<Undelivered> for ReserveError {
    fn from(undelivered: Undelivered) -> Self {
        Self::Indeterminate(match undelivered.0.rdkafka_error_code() {
            Some(RDKafkaErrorCode::QueueFull) => Indeterminate::Overloaded,
            Some(RDKafkaErrorCode::MessageTimedOut) => Indeterminate::TimedOut,
            _ => Indeterminate::BackendAway(undelivered.into()),
        })
    }
}
