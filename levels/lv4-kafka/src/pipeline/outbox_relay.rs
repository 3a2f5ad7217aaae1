//! The relay of the outbox: publishes the event of every decided order to the topic
//! `orders.decided`, for other services. `OUTBOX_RELAY` switches it on.
//!
//! Guarantee: at least once, and in order for each reservation. The key of a message is the id of
//! the reservation, so its events are in one partition, and at most one of them is in flight. An
//! event is marked as relayed in a transaction that commits after the broker's acknowledgement. A
//! relay that is killed in between publishes it again, with the same number: a reader skips a number
//! that is not above the last one of that reservation.
//!
//! All instances poll, and one at a time relays: it locks the row of `outbox_relay` until its marks
//! are committed. The others skip a locked row. Whoever polls next goes on, so nothing waits for the
//! restart of an instance that was killed. The events of different reservations have no order.
//!
//! An event is found by its number, and numbers become visible out of order: a transaction that has
//! drawn a number may commit after one with a higher number. So the row holds which numbers were
//! relayed, as ranges, and a poll reads the numbers that are missing there. A missing number that
//! has no event is closed once no transaction is left that could have drawn it (see [`Horizon`]).
//!
//! Buyers are not served from the topic: their events come from the outbox (`outbox_reader.rs`),
//! which the relay does not change. Nor does it delete: retention is for the operator to decide.
//!
//! Limits: one transaction of at most [`MAX_EVENTS`] events at a time. A server on which the relay
//! is off publishes nothing, not even the orders that it decides itself, but any server on which it
//! is on publishes those of all.
//!
//! Cost: one more message for each event, and for each round a transaction that is open until the
//! broker has acknowledged its events. On every instance a connection, a producer, and a query at
//! each poll, also while there is nothing to relay.
//!
//! C. Richardson, "Transactional outbox" and "Polling publisher"; Postgres manual, 9.27.8
//! "Transaction ID and Snapshot Information Functions". Book: LV.4, "The outbox relay".

use std::{collections::HashSet, time::Duration};

use box_office::{CauseLog, Database, KafkaConfig, RelayMetrics, Steps, Transaction, api};
use futures_util::future::join_all;
use rdkafka::{error::KafkaResult, producer::FutureRecord};
use serde::Serialize;
use tokio::time::sleep;
use tokio_util::sync::CancellationToken;

use super::{Backoff, OrderProducer, Undelivered, outbox_reader::Row, topics::decided_topic};

/// The interval of the polls while nothing is to be relayed.
const POLL_INTERVAL: Duration = Duration::from_millis(200);

/// The maximum number of events of a round.
const MAX_EVENTS: i64 = 1000;

/// The metric of the events that are not relayed counts no further.
const MAX_COUNTED: i64 = 100_000;

/// The version of the message format.
const VERSION: u32 = 1;

/// The payload of a message: an event as JSON.
#[derive(Serialize)]
struct EventMessage<'a> {
    version: u32,
    /// The number of the event. Within a reservation it increases.
    number: i64,
    /// The reservation, with the status that this event reports: a later one may have another.
    reservation: &'a api::Reservation,
}

/// Relays the outbox of one database.
pub(super) struct OutboxRelay {
    /// A pool of its own, with one connection: while the relay waits for an acknowledgement, no
    /// request waits for its connection.
    database: Database,
    /// A producer of its own: a backlog of events must not fill the queue of the orders.
    producer: OrderProducer,
    topic: String,
    metrics: RelayMetrics,
    steps: Steps,
    causes: CauseLog,
}

/// A number and a transaction id that were read in this order: transactions below the id are the
/// only ones that can have drawn a number up to this one.
///
/// Once all of them have ended, a later query sees every event that will ever have such a number.
/// This takes a transaction id that is older than the number. A transaction of this level has one:
/// it writes other rows before it appends to the outbox.
struct Horizon {
    number: i64,
    transaction: i64,
}

impl OutboxRelay {
    /// Creates a relay. It connects in the background.
    ///
    /// # Errors
    /// If the client rejects its configuration.
    pub(super) fn new(
        database: &Database,
        kafka: &KafkaConfig,
        metrics: RelayMetrics,
        steps: Steps,
    ) -> KafkaResult<Self> {
        let connect = database.pool().connect_options();
        Ok(Self {
            database: Database::lazy((*connect).clone(), 1),
            producer: OrderProducer::new(kafka)?,
            topic: decided_topic(kafka),
            metrics,
            steps,
            causes: CauseLog::default(),
        })
    }

    /// Relays until shutdown. A round that has begun is finished.
    pub(super) async fn run(self, stop: CancellationToken) {
        let mut backoff = Backoff::default();
        let mut horizon = None;
        while !stop.is_cancelled() {
            let delay = match self.relay(&mut horizon).await {
                Ok(true) => {
                    backoff.reset();
                    continue;
                }
                Ok(false) => POLL_INTERVAL,
                Err(why) => {
                    self.causes
                        .warn("the outbox could not be relayed and is retried", why.as_ref());
                    backoff.next_delay()
                }
            };
            stop.run_until_cancelled(sleep(delay)).await;
        }
    }

    // ANCHOR: relay
    /// One round. Returns whether it has relayed any event.
    ///
    /// # Errors
    /// If the database cannot be read or written, or the broker does not acknowledge an event. What
    /// it has acknowledged is marked all the same.
    async fn relay(&self, horizon: &mut Option<Horizon>) -> anyhow::Result<bool> {
        let unsent = self.count_unsent().await?;
        self.metrics.unsent.set(unsent);
        if unsent == 0 {
            return Ok(false);
        }
        let mut tx = self.database.begin().await?;
        let Some(oldest_running) = lock(&mut tx).await? else {
            return Ok(false); // another instance relays
        };
        let events = read(&mut tx).await?;
        self.steps.at("events read").saw(events.len()).await;
        let sent = join_all(one_of_each(&events).into_iter().map(|event| self.publish(event))).await;
        self.steps.at("events acknowledged").await;
        let acknowledged: Vec<i64> = sent.iter().filter_map(|sent| sent.as_ref().ok().copied()).collect();
        let closed = horizon.take_if(|horizon| horizon.transaction <= oldest_running);
        let closed = closed.map(|horizon| horizon.number.min(seen_without_gaps(&events, &acknowledged)));
        let next_transaction = mark(&mut tx, &acknowledged, closed).await?;
        tx.commit().await?;
        self.steps.at("events marked").await;
        self.metrics.relayed.inc_by(acknowledged.len() as u64);
        if let Some(last) = events.last() {
            horizon.get_or_insert(Horizon {
                number: last.number,
                transaction: next_transaction,
            });
        }
        match sent.into_iter().find_map(Result::err) {
            Some(why) => Err(why.into()),
            None => Ok(!acknowledged.is_empty()),
        }
    }
    // ANCHOR_END: relay

    /// Publishes an event, and returns its number once the broker has acknowledged it.
    async fn publish(&self, event: &Row) -> Result<i64, Undelivered> {
        let message = EventMessage {
            version: VERSION,
            number: event.number,
            reservation: &event.reservation,
        };
        let message = serde_json::to_vec(&message).expect("strings and numbers are always JSON");
        let record = FutureRecord::to(&self.topic)
            .key(event.reservation.id.as_bytes())
            .payload(&message);
        let sent = self.producer.send(record, Duration::ZERO).await;
        sent.map(|_| event.number).map_err(|(why, _)| Undelivered(why))
    }

    /// The number of events that are not marked as relayed, up to [`MAX_COUNTED`].
    async fn count_unsent(&self) -> sqlx::Result<i64> {
        sqlx::query_scalar(
            "select count(*)
               from (
                     select
                       from outbox_relay
                      cross join unnest('{(,)}'::int8multirange - relayed) as missing
                       join outbox
                         on number >= lower(missing)
                        and number < coalesce(upper(missing), 9223372036854775807)
                      limit $1
                    ) as unsent",
        )
        .bind(MAX_COUNTED)
        .fetch_one(&self.database)
        .await
    }
}

/// Locks the row of the relay. Returns the oldest transaction that is running, or `None` if another
/// instance holds the lock.
async fn lock(tx: &mut Transaction) -> sqlx::Result<Option<i64>> {
    sqlx::query_scalar(
        "select pg_snapshot_xmin(pg_current_snapshot())::text::bigint
           from outbox_relay
            for update skip locked",
    )
    .fetch_optional(&mut **tx)
    .await
}

// ANCHOR: read
/// Reads the first events that are not marked as relayed, by number.
async fn read(tx: &mut Transaction) -> sqlx::Result<Vec<Row>> {
    sqlx::query_as(
        "select outbox.number,
                reservation.id,
                reservation.sale_id,
                reservation.buyer_id,
                coalesce(outbox.status, reservation.status) as status,
                reservation.reason,
                reservation.earlier
           from outbox_relay
          cross join unnest('{(,)}'::int8multirange - relayed) as missing
           join outbox
             on outbox.number >= lower(missing)
            and outbox.number < coalesce(upper(missing), 9223372036854775807)
           join reservation on reservation.id = outbox.reservation_id
          order by outbox.number
          limit $1",
    )
    .bind(MAX_EVENTS)
    .fetch_all(&mut **tx)
    .await
}
// ANCHOR_END: read

/// The first event of each reservation. The next one waits for the next round: if it were
/// acknowledged and the first were not, their order would be lost.
fn one_of_each(events: &[Row]) -> Vec<&Row> {
    let mut seen = HashSet::new();
    let first = events.iter().filter(|event| seen.insert(event.reservation.id));
    first.collect()
}

/// The number up to which every event that was read is acknowledged.
fn seen_without_gaps(events: &[Row], acknowledged: &[i64]) -> i64 {
    let acknowledged: HashSet<i64> = acknowledged.iter().copied().collect();
    let gap = events.iter().find(|event| !acknowledged.contains(&event.number));
    match (gap, events.last()) {
        (Some(gap), _) => gap.number - 1,
        (None, Some(last)) => last.number,
        (None, None) => 0,
    }
}

/// Marks numbers as relayed, and every number up to `closed` as one that has no event any more.
/// Returns the id of the next transaction that will begin.
async fn mark(tx: &mut Transaction, acknowledged: &[i64], closed: Option<i64>) -> sqlx::Result<i64> {
    sqlx::query_scalar(
        "update outbox_relay
            set relayed = relayed
                        + coalesce((select range_agg(int8range(number, number, '[]')) from unnest($1::bigint[]) as number), '{}')
                        + int8multirange(int8range(null, $2, '[]'))
      returning pg_snapshot_xmax(pg_current_snapshot())::text::bigint",
    )
    .bind(acknowledged)
    .bind(closed.unwrap_or(0))
    .fetch_one(&mut **tx)
    .await
}
