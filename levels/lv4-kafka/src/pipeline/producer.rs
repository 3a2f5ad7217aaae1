//! The producer: a message counts as sent once the broker has acknowledged it.

use std::{
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use box_office::{Indeterminate, KafkaConfig, ReserveError};
use rdkafka::{
    error::{KafkaError, RDKafkaErrorCode},
    message::ToBytes,
    producer::{FutureProducer, FutureRecord, Producer, future_producer::OwnedDeliveryResult},
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

/// The producer of this server.
///
/// An idempotent producer that loses step with the broker, because the broker has lost the end of
/// its log, fails for good: it sends nothing more. A new one begins anew, so this one is replaced.
/// The messages in flight fail; their buyers are told that the outcome is unknown, and the ids of
/// the orders make a repeat harmless.
#[derive(Clone)]
pub struct OrderProducer {
    kafka: KafkaConfig,
    current: Arc<Mutex<FutureProducer>>,
}

impl OrderProducer {
    /// Creates a producer. It connects in the background.
    ///
    /// # Errors
    /// If the client rejects its configuration.
    pub fn new(kafka: &KafkaConfig) -> Result<Self, KafkaError> {
        Ok(Self {
            kafka: kafka.clone(),
            current: Arc::new(Mutex::new(producer(kafka)?)),
        })
    }

    /// The producer that works. Replaces one that has failed for good.
    pub fn current(&self) -> FutureProducer {
        let mut current = self.current.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((code, why)) = current.client().fatal_error() {
            match producer(&self.kafka) {
                Ok(new) => {
                    tracing::error!(%code, why, "the producer has failed for good, and is replaced");
                    let failed = std::mem::replace(&mut *current, new);
                    // Dropping a producer blocks for a while.
                    std::thread::spawn(move || drop(failed));
                }
                Err(error) => tracing::error!(%code, why, %error, "the producer has failed for good"),
            }
        }
        current.clone()
    }

    /// Sends a message, and waits for its acknowledgement. See [`FutureProducer::send`].
    ///
    /// # Errors
    /// As [`FutureProducer::send`].
    pub async fn send<K, P>(&self, record: FutureRecord<'_, K, P>, queue_timeout: Duration) -> OwnedDeliveryResult
    where
        K: ToBytes + ?Sized,
        P: ToBytes + ?Sized,
    {
        self.current().send(record, queue_timeout).await
    }
}

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

#[cfg(test)]
mod tests {
    use rdkafka::{mocking::MockCluster, types::RDKafkaApiKey, types::RDKafkaRespErr};

    use super::*;

    /// An error of the broker that loses the producer its place in the sequence, as when the broker
    /// has lost the end of its log.
    const OUT_OF_SEQUENCE: RDKafkaRespErr = RDKafkaRespErr::RD_KAFKA_RESP_ERR_OUT_OF_ORDER_SEQUENCE_NUMBER;

    #[tokio::test]
    async fn a_producer_that_has_failed_for_good_is_replaced() {
        let broker = MockCluster::new(1).expect("a broker of the client library");
        broker.create_topic("orders", 1, 1).expect("a topic");
        let kafka = KafkaConfig {
            bootstrap_servers: broker.bootstrap_servers(),
            prefix: String::new(),
            consumers: 0,
            session: Duration::from_secs(10),
        };
        let producer = OrderProducer::new(&kafka).expect("a producer");
        let send = async || {
            let record = FutureRecord::to("orders").key("").payload("order");
            producer.send(record, Duration::ZERO).await
        };
        send().await.expect("it is acknowledged");
        let first = producer.current();

        broker.request_errors(RDKafkaApiKey::Produce, &[OUT_OF_SEQUENCE]);
        send().await.expect_err("the fault did not strike");
        assert!(first.client().fatal_error().is_some(), "the fault did not strike");
        let (why, _) = first
            .send(FutureRecord::to("orders").key("").payload("order"), Duration::ZERO)
            .await
            .expect_err("it sends nothing more");
        println!("{why}");

        send().await.expect("a new producer sends");
        assert!(producer.current().client().fatal_error().is_none());
    }
}
