//! The circuit breakers of a server: `postgres`, around the transactions of its consumers, and
//! `kafka`, around the producer that accepts orders. `CIRCUIT_BREAKER` switches them on.
//!
//! **postgres.** A consumer whose batch fails because Postgres is away pauses its partitions and
//! seeks back. It polls on, so it stays in the group and takes part in rebalances, and it processes
//! nothing until the breaker closes. The probes of the half-open state are small: a connection of
//! their own that tests whether a sale could be written. No order is dead-lettered for a fault that
//! passes; the offset stays where it is.
//!
//! **kafka.** While it is open, an order is answered 503 with `Retry-After` before anything is sent.
//! The probe is the next order of a buyer, since only a message that is acknowledged shows that
//! messages are.
//!
//! A failure is an outcome that is unknown because the backend was away or did not answer in time.
//! A refusal is not one, nor is a wait for a lock, a full queue of the producer, or a statement that
//! Postgres rejects: the backend has answered.
//!
//! **Readiness** is separate from both, and on without them. Its probes run once a second whether or
//! not there are orders, and find a backend that is away as a whole. A breaker counts real calls: it
//! also opens where a probe of readiness succeeds and an order does not, such as a topic that refuses
//! it. In a complete outage readiness is usually first. An open breaker does not make a server unready: a balancer would send it no
//! more orders, so there would be no probe to close it.
//!
//! Limit: the first attempt of an outage takes as long as its own timeout, up to five seconds for a
//! connection or an acknowledgement.

use std::{sync::Arc, time::Duration};

use anyhow::anyhow;
use box_office::{CircuitBreakerMetrics, Indeterminate, ReserveError, probe_new_connection};
use rdkafka::{
    message::ToBytes,
    producer::{FutureRecord, future_producer::Delivery},
};
use tokio::time::{sleep, timeout};

use super::{
    OrderPipeline, Undelivered,
    circuit_breaker::{CircuitBreaker, Permit, Policy},
};

/// A batch of a consumer is many orders, and the next batch waits for it: one failure is enough. A
/// probe is cheap, so it follows soon.
const POSTGRES: Policy = Policy {
    failures: 1,
    open_for: Duration::from_millis(100),
};

/// A single message may be lost to a leader that is being replaced. A probe is an order of a buyer
/// who waits for it.
const KAFKA: Policy = Policy {
    failures: 3,
    open_for: Duration::from_millis(500),
};

/// The timeout of a probe of Postgres.
const PROBE_TIMEOUT: Duration = Duration::from_secs(2);

/// The circuit breakers of one server. Clones share them.
#[derive(Clone)]
pub(super) struct Circuits {
    postgres: Arc<CircuitBreaker>,
    kafka: Arc<CircuitBreaker>,
}

impl Circuits {
    pub(super) fn new(metrics: &CircuitBreakerMetrics) -> Self {
        let breaker = |backend, policy| Arc::new(CircuitBreaker::new(backend, policy, metrics.clone()));
        Self {
            postgres: breaker("postgres", POSTGRES),
            kafka: breaker("kafka", KAFKA),
        }
    }
}

impl OrderPipeline {
    // ANCHOR: send
    /// Sends an order, and waits for the broker's acknowledgement. Returns its place.
    ///
    /// # Errors
    /// [`Indeterminate`] if there is none, or if the circuit breaker rejects the call.
    pub async fn send<K, P>(&self, record: FutureRecord<'_, K, P>) -> Result<Delivery, ReserveError>
    where
        K: ToBytes + ?Sized,
        P: ToBytes + ?Sized,
    {
        let permit = match &self.circuits {
            Some(circuits) => Some(circuits.kafka.try_acquire().map_err(Indeterminate::from)?),
            None => None,
        };
        let sent = self.producer.send(record, Duration::ZERO).await;
        let sent = sent.map_err(|(why, _)| Undelivered(why).into());
        if let Some(permit) = permit {
            record_result(permit, &sent, |why| !matches!(why, Indeterminate::Overloaded));
        }
        sent
    }
    // ANCHOR_END: send

    /// Runs a consumer's work on the database, unless the circuit breaker is not closed: then the
    /// consumer has to wait until [`postgres_is_back`](Self::postgres_is_back).
    ///
    /// # Errors
    /// Those of `work`, and [`Indeterminate::BackendAway`] if the circuit breaker is not closed.
    pub async fn on_postgres<T>(&self, work: impl Future<Output = Result<T, ReserveError>>) -> Result<T, ReserveError> {
        let Some(circuits) = &self.circuits else {
            return work.await;
        };
        if self.postgres_is_away() {
            return Err(Indeterminate::BackendAway(anyhow!("the circuit breaker of postgres is open")).into());
        }
        let permit = circuits.postgres.try_acquire().map_err(Indeterminate::from)?;
        let result = work.await;
        record_result(permit, &result, is_outage_of_postgres);
        result
    }

    /// Whether consumers have to pause.
    pub fn postgres_is_away(&self) -> bool {
        let circuits = self.circuits.as_ref();
        circuits.is_some_and(|circuits| !circuits.postgres.is_closed())
    }

    // ANCHOR: back
    /// Waits until the circuit breaker of Postgres is closed. Of all consumers of this server that
    /// wait, one at a time probes the database.
    pub async fn postgres_is_back(&self) {
        let Some(circuits) = &self.circuits else { return };
        let connect = self.context.database.pool().connect_options();
        while !circuits.postgres.is_closed() {
            match circuits.postgres.try_acquire() {
                Ok(probe) => match timeout(PROBE_TIMEOUT, probe_new_connection(&connect)).await {
                    Ok(Ok(())) => probe.succeeded(),
                    Ok(Err(_)) | Err(_) => probe.failed(),
                },
                Err(rejected) => sleep(rejected.retry_after).await,
            }
        }
    }
    // ANCHOR_END: back
}

// ANCHOR: failure
/// Ends a permit with the result of its call. An error that is no failure says nothing about the
/// backend.
fn record_result<T>(permit: Permit<'_>, result: &Result<T, ReserveError>, is_failure: fn(&Indeterminate) -> bool) {
    match result {
        // A refusal is an answer.
        Ok(_) | Err(ReserveError::Refused(_)) => permit.succeeded(),
        Err(ReserveError::Indeterminate(why)) if is_failure(why) => permit.failed(),
        Err(ReserveError::Indeterminate(_) | ReserveError::RateLimited(_)) => drop(permit),
    }
}

/// Whether Postgres is away or cannot do its work, and not Redis or Kafka, on which a consumer's
/// work may fail as well. A statement that it rejects is no outage.
///
/// SQLSTATE codes: Postgres manual, Appendix A "PostgreSQL Error Codes".
fn is_outage_of_postgres(why: &Indeterminate) -> bool {
    /// Connection exception, insufficient resources, operator intervention, system error; and a
    /// server that is read-only, as after a failover.
    const OUTAGES: [&str; 5] = ["08", "53", "57", "58", "25006"];

    let cause = match why {
        Indeterminate::Overloaded | Indeterminate::Backlogged { .. } => return false,
        Indeterminate::TimedOut => return true,
        Indeterminate::BackendAway(cause) => cause.downcast_ref(),
    };
    match cause {
        Some(sqlx::Error::Database(why)) => {
            let code = why.code().unwrap_or_default();
            OUTAGES.iter().any(|outage| code.starts_with(outage))
        }
        Some(sqlx::Error::Io(_) | sqlx::Error::Tls(_) | sqlx::Error::Protocol(_)) => true,
        Some(sqlx::Error::PoolTimedOut | sqlx::Error::PoolClosed | sqlx::Error::WorkerCrashed) => true,
        _ => false,
    }
}
// ANCHOR_END: failure
