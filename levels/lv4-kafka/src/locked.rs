//! Each order in a transaction of its own, under the distributed lock of its sale.
//!
//! Orders are spread over the partitions, so all instances process orders of the same sale
//! concurrently. A lock in Redis, acquired for each message, serialises them; under it runs LV.1's
//! `read_then_write`. It is LV.3 behind a queue: a queue in front, a lock behind.
//!
//! Guarantee: keeps every invariant except the order of arrival, on any number of instances, as
//! long as no holder keeps the lock beyond its lease.
//!
//! Limits: the lease, as in LV.3. Throughput: a lock, a transaction and a durable commit for each
//! order, one after another, whatever the number of consumers. Orders are accepted faster than they
//! are processed, so buyers wait for longer than in LV.3. Recovery: only Kafka has the offsets, so
//! a database restored from a backup does not get the later orders back.
//!
//! Apache Kafka documentation, 4.6 "Message Delivery Semantics". Book: LV.4, "locked".

use std::{
    collections::BTreeMap,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    time::Duration,
};

use async_trait::async_trait;
use box_office::{
    Event, Indeterminate, Open, Order, Outcome, Refusal, Reservation, Reserve, ReserveError, Steps, StrategyContext,
    Transaction,
};
use futures_util::{StreamExt, stream};
use rdkafka::producer::FutureRecord;
use uuid::Uuid;

use crate::{
    decision_row::DecisionRow,
    pipeline::{
        Admission, Backoff, ConsumedMessage, NOTIFY_CHANNEL, OrderConsumer, OrderMessage, OrderPipeline, Partitioning,
        PoisonMessage, consumer_config,
    },
    redis_lock::LockClient,
};

/// The maximum number of messages of a batch.
const MAX_BATCH: usize = 64;

/// The maximum number of messages that a consumer processes concurrently.
const MAX_IN_FLIGHT: u32 = 4;

/// How long a message waits for its lock before it is retried later.
const LOCK_TIMEOUT: Duration = Duration::from_secs(2);

/// Processes each order under the lock of its sale.
#[derive(Clone)]
pub struct Locked {
    pipeline: Arc<OrderPipeline>,
    locks: LockClient,
}

impl Open for Locked {
    async fn open(context: StrategyContext) -> anyhow::Result<Self> {
        let locks = LockClient::connect(&context).await?;
        let pipeline = OrderPipeline::open(context, Partitioning::ByOrder).await?;
        let locked = Self { pipeline, locks };
        locked.start_consumers()?;
        Ok(locked)
    }
}

impl Locked {
    fn start_consumers(&self) -> anyhow::Result<()> {
        for number in 1..=self.pipeline.kafka.consumers {
            // ANCHOR: consumer
            // Offsets are committed manually, once the rows are durable.
            let mut config = consumer_config(&self.pipeline.kafka);
            config.set("enable.auto.commit", "false");
            // ANCHOR_END: consumer
            let consumer = self.pipeline.subscribe(&config)?;
            let steps = self
                .pipeline
                .context
                .instrumentation
                .steps(&format!("consumer {number}"));
            self.pipeline
                .spawn_consumer(consumer.joined(), self.clone().run_consumer(consumer, steps));
        }
        Ok(())
    }

    // ANCHOR: loop
    /// Processes batches until shutdown.
    async fn run_consumer(self, consumer: OrderConsumer, steps: Steps) {
        let mut backoff = Backoff::default();
        while let Some(batch) = consumer.poll_batch(MAX_BATCH, &self.pipeline.stop).await {
            let outage = AtomicBool::new(false);
            let in_flight: Vec<_> = batch
                .iter()
                .map(|message| self.process(message, &outage, &steps))
                .collect();
            let results: Vec<Result<(), ReserveError>> =
                stream::iter(in_flight).buffered(self.max_in_flight()).collect().await;

            // Only the contiguous prefix: in each partition, up to the first message that failed.
            let (mut processed, mut retry_from) = (BTreeMap::new(), BTreeMap::new());
            for (&ConsumedMessage { partition, offset, .. }, result) in batch.iter().zip(results) {
                match result {
                    Ok(()) if !retry_from.contains_key(&partition) => {
                        processed.insert(partition, offset + 1);
                    }
                    Ok(()) => {} // redelivered with the message before it, and recognised by its id
                    Err(why) => {
                        // Log only the first failure; later messages may simply not have been started.
                        if retry_from.is_empty() {
                            self.pipeline.log_retry(&why);
                        }
                        retry_from.entry(partition).or_insert(offset);
                    }
                }
            }
            steps.at("batch decided").await;
            for (partition, offset) in processed {
                consumer.commit_offset(partition, offset);
                self.pipeline.dead_letters.forget_below(partition, offset);
            }
            steps.at("offsets committed").await;
            if retry_from.is_empty() {
                backoff.reset();
            } else if self.pipeline.postgres_is_away() {
                let back = self.pipeline.postgres_is_back();
                consumer.pause_until(retry_from, back, &self.pipeline.stop).await;
            } else {
                consumer
                    .seek_back(retry_from, backoff.next_delay(), &self.pipeline.stop)
                    .await;
            }
        }
        consumer.close().await;
    }
    // ANCHOR_END: loop

    /// How many orders a consumer processes concurrently. Each holds a connection of the pool, and
    /// one is left for the requests that read the outcome of an order.
    fn max_in_flight(&self) -> usize {
        let spare = self
            .pipeline
            .context
            .database
            .pool()
            .options()
            .get_max_connections()
            .saturating_sub(1);
        (spare / self.pipeline.kafka.consumers.max(1)).clamp(1, MAX_IN_FLIGHT) as usize
    }

    // ANCHOR: process
    /// Processes one message. A poison message is dead-lettered.
    ///
    /// After an outage of the database or of Redis the rest of the batch is not begun: each message
    /// would wait for its own timeout.
    ///
    /// # Errors
    /// [`Indeterminate`] if the message must be retried.
    async fn process(&self, message: &ConsumedMessage, outage: &AtomicBool, steps: &Steps) -> Result<(), ReserveError> {
        if outage.load(Relaxed) || self.pipeline.stop.is_cancelled() {
            return Err(Indeterminate::Overloaded.into());
        }
        let order = match message.order(&self.pipeline.ids) {
            Ok(order) => order,
            Err(poison) => return Ok(self.pipeline.dead_letters.dead_letter(message, &poison).await?),
        };
        steps.at("message taken").await;
        let decided = self.pipeline.on_postgres(self.process_locked(&order, steps)).await;
        // A lock timeout is no outage: the next order may be of another sale.
        if let Err(ReserveError::Indeterminate(Indeterminate::BackendAway(_) | Indeterminate::TimedOut)) = decided {
            outage.store(true, Relaxed);
        }
        match decided {
            Err(ReserveError::Refused(Refusal::UnknownSale)) => {
                let poison = PoisonMessage::UnknownSale(order.sale_id);
                Ok(self.pipeline.dead_letters.dead_letter(message, &poison).await?)
            }
            decided => decided,
        }
    }

    /// Acquires the lock of the sale, and releases it after the commit.
    ///
    /// If the commit fails, its outcome is unknown: Postgres may still carry it out, and the next
    /// holder would read the stock from before it. So the lock is not released then, and expires
    /// with its lease.
    async fn process_locked(&self, order: &OrderMessage, steps: &Steps) -> Result<(), ReserveError> {
        // The connection first: the lease would expire while the holder of the lock waits for one.
        let begun = self.pipeline.context.begin().await;
        let mut tx = begun.map_err(|why| Indeterminate::BackendAway(why.into()))?;
        let lock = format!("sale:{}", order.sale_id);
        let held = self.locks.acquire(&lock, LOCK_TIMEOUT).await?;
        steps.at("lock taken").await;
        let written = self.process_in_tx(&mut tx, order, steps).await;
        if let Ok(true) = written {
            tx.commit().await?;
            steps.at("committed").await;
        }
        self.locks.release(held).await;
        written.map(drop)
    }

    /// LV.1's `read_then_write` and the outbox in one transaction: correct as long as no other
    /// transaction processes orders of the sale. Returns whether it has written anything.
    async fn process_in_tx(
        &self,
        tx: &mut Transaction,
        order: &OrderMessage,
        steps: &Steps,
    ) -> Result<bool, ReserveError> {
        let known: bool = sqlx::query_scalar("select exists (select from reservation where id = $1)")
            .bind(order.id)
            .fetch_one(&mut **tx)
            .await?;
        if known {
            return Ok(false); // redelivered, replayed or repeated by the buyer: an order is decided once
        }
        let refused = self.decide(tx, order, steps).await?;
        write(tx, order, refused).await?;
        append_to_outbox(tx, order.id).await?;
        Ok(true)
    }
    // ANCHOR_END: process

    /// Decides an order: takes a ticket, or returns the refusal.
    async fn decide(
        &self,
        tx: &mut Transaction,
        order: &OrderMessage,
        steps: &Steps,
    ) -> Result<Option<Refusal>, ReserveError> {
        let stock: i64 = sqlx::query_scalar(
            "select stock
               from sale
              where id = $1",
        )
        .bind(order.sale_id)
        .fetch_optional(&mut **tx)
        .await?
        .ok_or(Refusal::UnknownSale)?;
        steps.at("stock read").saw(stock).await;
        if self.pipeline.is_expired(order) {
            self.pipeline.count_expired(1);
            return Ok(Some(Refusal::Expired));
        }

        let earlier: Option<(Uuid, bool)> = sqlx::query_as(
            "select id, buyer_id = $2
               from reservation
              where sale_id = $1
                and (buyer_id = $2 and status = 'confirmed' or buyer_id <> $2 and request_key = $3)
              order by request_key = $3 desc
              limit 1",
        )
        .bind(order.sale_id)
        .bind(order.buyer_id)
        .bind(order.request_key.as_str())
        .fetch_optional(&mut **tx)
        .await?;
        steps
            .at("earlier reservation looked up")
            .saw(if earlier.is_some() { "one" } else { "none" })
            .await;
        let refused = match earlier {
            Some((_, false)) => Refusal::KeyOfAnotherBuyer,
            Some((id, true)) => Refusal::AlreadyReserved {
                earlier: Reservation { id },
            },
            None if stock <= 0 => Refusal::SoldOut,
            None => {
                steps.at("decided to sell").await;
                self.pipeline.context.simulate_work().await;
                sqlx::query(
                    "update sale
                        set stock = $2
                      where id = $1",
                )
                .bind(order.sale_id)
                .bind(stock - 1)
                .execute(&mut **tx)
                .await?;
                return Ok(None);
            }
        };
        Ok(Some(refused))
    }
}

/// Writes the decision: the row from which every later request is answered.
async fn write(tx: &mut Transaction, order: &OrderMessage, refused: Option<Refusal>) -> Result<(), ReserveError> {
    let DecisionRow {
        status,
        reason,
        earlier,
    } = refused.into();
    sqlx::query(
        "insert into reservation (id, sale_id, buyer_id, request_key, status, reason, earlier)
         values ($1, $2, $3, $4, $5, $6, $7)",
    )
    .bind(order.id)
    .bind(order.sale_id)
    .bind(order.buyer_id)
    .bind(order.request_key.as_str())
    .bind(status)
    .bind(reason)
    .bind(earlier)
    .execute(&mut **tx)
    .await?;
    Ok(())
}

// ANCHOR: outbox
/// Appends the event to the outbox, in the transaction of the row: both are stored, or neither is.
async fn append_to_outbox(tx: &mut Transaction, id: Uuid) -> Result<(), ReserveError> {
    sqlx::query("insert into outbox (reservation_id) values ($1)")
        .bind(id)
        .execute(&mut **tx)
        .await?;
    sqlx::query("select pg_notify($1, $2)")
        .bind(NOTIFY_CHANNEL)
        .bind(id.to_string())
        .execute(&mut **tx)
        .await?;
    Ok(())
}
// ANCHOR_END: outbox

#[async_trait]
impl Reserve for Locked {
    async fn reserve(&self, order: &Order, steps: &Steps) -> Result<Outcome, ReserveError> {
        // ANCHOR: accept
        let id = self.pipeline.ids.for_order(order);
        let accepted = Outcome::Accepted(Reservation { id });
        if self.pipeline.admit(order, id).await? == Admission::Repeat {
            return Ok(accepted);
        }
        let message = OrderMessage::new(id, order).to_bytes();
        steps.at("order checked").await;

        // Keyed by its own id: the orders of a sale are spread over all partitions.
        let record = FutureRecord::to(self.pipeline.topics.of(order.priority))
            .key(id.as_bytes())
            .payload(&message);
        self.pipeline.send(record).await?;
        steps.at("acknowledged").await;
        self.pipeline.remember_accepted(id);
        Ok(accepted)
        // ANCHOR_END: accept
    }

    async fn ready(&self) -> Result<(), ReserveError> {
        self.locks.ready().await?;
        self.pipeline.ready().await
    }

    fn accepted(&self, id: Uuid) -> bool {
        self.pipeline.ids.verify(id)
    }

    async fn events(&self, id: Uuid, after: i64, timeout: Duration) -> Result<Option<Vec<Event>>, ReserveError> {
        self.pipeline.outbox.events_after(id, after, timeout).await.map(Some)
    }

    async fn close(&self) {
        self.pipeline.close().await;
    }

    async fn decidable(&self) -> Result<(), ReserveError> {
        self.locks.ready().await?;
        self.pipeline.decidable().await
    }
}
