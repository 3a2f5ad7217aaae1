//! The pipeline of an order: what both strategies share between the buyer's request and the event
//! that reports the outcome. An order makes up to three trips, and each file is a stage of one.
//!
//! **Accept**: `POST` to 202.
//! 1. `reservation_ids.rs` derives the reservation's id from the order. If a rate limit is set,
//!    `rate_limit.rs` rejects a request over it.
//! 2. [`OrderPipeline::admit`] rejects an order for an unknown sale. If there is priority,
//!    `priority.rs` rejects one of a buyer who claims it and is not named. If a time to live is set,
//!    `ttl.rs` rejects one that would expire.
//! 3. `message.rs` encodes the order.
//! 4. `producer.rs` sends it to the orders topic (`topics.rs`). The buyer gets 202 once the broker
//!    has acknowledged the message.
//!
//! **Process**: message to rows.
//! 5. `consumer.rs` polls a batch from its partitions; `rebalance.rs` tracks which ones it owns.
//!    With priority it reads a second topic, and takes turns (`priority.rs`).
//! 6. `message.rs` validates each message; `dead_letters.rs` takes the poison messages. What a
//!    message carries in its headers (`headers.rs`) is untrusted.
//! 7. The strategy decides the orders; one that is too old has expired (`ttl.rs`). It writes the
//!    rows and appends the events to the outbox in one transaction.
//! 8. `consumer.rs` commits the offset after the transaction. After a fault it waits (`backoff.rs`)
//!    and seeks back. During an outage of Postgres it pauses its partitions, if circuit breakers
//!    (`circuit_breaker.rs`, `circuits.rs`) are switched on.
//!
//! **Observe**: stored state to the buyer and the operator.
//! 9. `outbox_reader.rs` reads the outbox and delivers events to the clients that wait for them.
//!     `outbox_relay.rs` publishes the events to other services, if it is switched on.
//! 10. `replay.rs` lists dead letters, and replays or skips them.
//! 11. `lag.rs` reports the consumer lag.
//!
//! Tickets that are held until they are paid for come back through stages 4 to 7: see
//! [`saga`](crate::saga).
//!
//! A strategy determines the message key, how orders are decided, in which transaction, and when
//! an offset is committed.
//!
//! Sources: Apache Kafka documentation, 4.6 "Message Delivery Semantics"; C. Richardson,
//! "Transactional outbox"; librdkafka, "Introduction".

mod backoff;
mod circuit_breaker;
mod circuits;
mod consumer;
mod dead_letters;
mod headers;
mod lag;
mod message;
mod outbox_reader;
mod outbox_relay;
mod priority;
mod producer;
mod rate_limit;
mod rebalance;
mod replay;
mod reservation_ids;
mod topics;
mod ttl;

use std::{
    collections::HashSet,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicUsize, Ordering::Relaxed},
    },
    time::Duration,
};

use anyhow::Context;
use box_office::{
    CauseLog, Indeterminate, KafkaConfig, Order, Priority, Refusal, ReserveError, SaleId, StrategyContext, causes,
};
use rdkafka::{
    ClientConfig,
    error::KafkaResult,
    producer::{FutureProducer, Producer},
};
use tokio::sync::watch;
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use uuid::Uuid;

use circuits::Circuits;
use outbox_relay::OutboxRelay;

pub use backoff::Backoff;
pub use consumer::{OrderConsumer, consumer_config};
pub use dead_letters::DeadLetters;
pub use lag::lag;
pub use message::{ConsumedMessage, OrderMessage, PoisonMessage, ReleaseCommand};
pub use outbox_reader::{NOTIFY_CHANNEL, OutboxReader, notify_payloads};
pub use priority::Vips;
pub use producer::{OrderProducer, Undelivered, producer};
pub use rate_limit::{Admission, MAX_ACCEPTED, MAX_BUYERS, MAX_LOOKUPS, RateLimit};
pub use replay::{DeadLetter, Replayed, list_dead_letters, replay, replay_all, skip};
pub use reservation_ids::Ids;
pub use topics::{
    OrderPartition, OrderTopics, PARTITIONS, consumer_group, dead_letter_topic, decided_topic, orders_topic, vips_topic,
};
pub use ttl::{MessageTtl, Partitioning};

/// The timeout of a metadata request of a readiness check.
const METADATA_TIMEOUT: Duration = Duration::from_secs(2);

/// The stages that both strategies of this level share, connected to their backends.
pub struct OrderPipeline {
    /// The database, and what else a strategy is opened with.
    pub context: StrategyContext,
    /// The address and settings of Kafka.
    pub kafka: KafkaConfig,
    /// The names of the topics of orders.
    pub topics: OrderTopics,
    /// Sends orders.
    pub producer: OrderProducer,
    /// Derives and verifies reservation ids.
    pub ids: Ids,
    /// Delivers the events of orders.
    pub outbox: OutboxReader,
    /// The rate limits, if any is set.
    pub rate_limit: Option<RateLimit>,
    /// The time to live of orders, if it is set.
    pub ttl: Option<Arc<MessageTtl>>,
    /// The named buyers, if there is priority.
    pub vips: Option<Vips>,
    /// Takes poison messages.
    pub dead_letters: DeadLetters,
    /// Cancelled on shutdown.
    pub stop: CancellationToken,
    /// With `CIRCUIT_BREAKER`.
    circuits: Option<Circuits>,
    causes: CauseLog,
    consumers: TaskTracker,
    /// With `OUTBOX_RELAY`.
    relay: TaskTracker,
    consumers_started: AtomicUsize,
    /// Each is `true` once its consumer has been assigned partitions.
    awaiting_assignment: Mutex<Vec<watch::Receiver<bool>>>,
    known_sales: Mutex<HashSet<SaleId>>,
}

impl OrderPipeline {
    /// Creates the topics, connects to the backends, and starts to report the consumer lag. Starts
    /// no consumer: see [`spawn_consumer`](Self::spawn_consumer).
    ///
    /// # Errors
    /// If Kafka is not configured, Kafka or the database does not answer, or the topics cannot be
    /// created.
    pub async fn open(context: StrategyContext, partitioning: Partitioning) -> anyhow::Result<Arc<Self>> {
        let kafka = context
            .kafka
            .clone()
            .context("this strategy needs KAFKA_BOOTSTRAP_SERVERS")?;
        let stop = CancellationToken::new();
        let has_priority = context.improvements.order_priority.is_some();
        let (topics, ids, outbox) = tokio::join!(
            topics::create(&kafka, priorities(has_priority), context.improvements.outbox_relay),
            Ids::load(&context.database),
            OutboxReader::open(&context.database, stop.clone())
        );
        topics.with_context(|| {
            let servers = &kafka.bootstrap_servers;
            format!(
                "KAFKA_BOOTSTRAP_SERVERS (--kafka-bootstrap-servers): Kafka at {servers} does not provide the topics"
            )
        })?;
        let producer = OrderProducer::new(&kafka)?;
        let (ids, outbox) = (ids?, outbox?);
        let ttl = context.improvements.order_ttl;
        let ttl = ttl.map(|ttl| Arc::new(MessageTtl::new(ttl, partitioning, context.metrics.expired.clone())));
        let relay = TaskTracker::new();
        if let Some(metrics) = context.metrics.relay.clone() {
            let steps = context.instrumentation.steps("relay");
            relay.spawn(OutboxRelay::new(&context.database, &kafka, metrics, steps)?.run(stop.clone()));
        }
        relay.close();
        let (lag, vips) = (context.metrics.lag.clone(), context.metrics.priority.clone());
        lag::spawn_reporter(&kafka, lag, vips, ttl.clone(), stop.clone())?;
        Ok(Arc::new(Self {
            topics: OrderTopics::new(&kafka),
            ttl,
            vips: has_priority.then(|| Vips::new(context.database.clone())),
            rate_limit: RateLimit::new(
                context.improvements.rate_limit_per_buyer,
                context.improvements.rate_limit,
                context.database.clone(),
                &context.metrics,
            ),
            dead_letters: DeadLetters::new(producer.clone(), &kafka, context.metrics.clone()),
            producer,
            ids,
            outbox,
            circuits: context
                .improvements
                .circuit_breaker
                .then(|| Circuits::new(&context.metrics.circuit_breakers)),
            causes: CauseLog::default(),
            stop,
            consumers: TaskTracker::new(),
            relay,
            consumers_started: AtomicUsize::new(0),
            awaiting_assignment: Mutex::default(),
            known_sales: Mutex::default(),
            context,
            kafka,
        }))
    }

    /// Creates a consumer of the orders topic.
    ///
    /// # Errors
    /// If the client rejects its configuration.
    pub fn subscribe(&self, config: &ClientConfig) -> KafkaResult<OrderConsumer> {
        OrderConsumer::subscribe(
            &self.kafka,
            config,
            &self.context.metrics.consumer,
            self.context.improvements.order_priority,
        )
    }

    /// Runs a consumer in a task of its own. The server is not ready until `joined` is `true`: the
    /// group has assigned partitions to the consumer.
    pub fn spawn_consumer(&self, joined: watch::Receiver<bool>, run: impl Future<Output = ()> + Send + 'static) {
        self.awaiting_assignment().push(joined);
        self.spawn_worker(run);
    }

    /// Runs other background work of the strategy in a task of its own. Orders are not decidable
    /// once it has ended.
    pub fn spawn_worker(&self, run: impl Future<Output = ()> + Send + 'static) {
        self.consumers_started.fetch_add(1, Relaxed);
        self.consumers.spawn(run);
    }

    fn awaiting_assignment(&self) -> MutexGuard<'_, Vec<watch::Receiver<bool>>> {
        self.awaiting_assignment.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether a consumer of this server has no partitions yet and is going to get some.
    async fn awaits_partitions(&self) -> anyhow::Result<bool> {
        let awaiting = {
            let mut awaiting = self.awaiting_assignment();
            awaiting.retain(|joined| !*joined.borrow());
            awaiting.len()
        };
        if awaiting == 0 {
            return Ok(false);
        }
        // With more consumers than partitions, some never get one.
        let (producer, group) = (self.producer.current(), consumer_group(&self.kafka));
        let members = tokio::task::spawn_blocking(move || {
            let known = producer.client().fetch_group_list(Some(&group), METADATA_TIMEOUT)?;
            KafkaResult::Ok(known.groups().iter().map(|group| group.members().len()).sum::<usize>())
        });
        let members = members.await??;
        Ok(members < PARTITIONS as usize + awaiting)
    }

    /// Logs why orders are retried: once for each cause and interval, and not on shutdown, when they
    /// are left to another consumer.
    pub fn log_retry(&self, why: &ReserveError) {
        if !self.stop.is_cancelled() {
            self.causes.warn("orders could not be processed and are retried", why);
            tracing::debug!(why = causes(why), "retried");
        }
    }

    /// Checks that a sale exists. A known sale is cached for good: no sale is ever deleted.
    ///
    /// # Errors
    /// [`Refusal::UnknownSale`] if it does not exist; [`Indeterminate`] if the database cannot be
    /// read.
    pub async fn ensure_sale(&self, sale: SaleId) -> Result<(), ReserveError> {
        let known = || self.known_sales.lock().unwrap_or_else(PoisonError::into_inner);
        if known().contains(&sale) {
            return Ok(());
        }
        let exists: bool = sqlx::query_scalar("select exists (select from sale where id = $1)")
            .bind(sale)
            .fetch_one(&self.context.database)
            .await?;
        if !exists {
            return Err(Refusal::UnknownSale.into());
        }
        known().insert(sale);
        Ok(())
    }

    /// Checks an order before it is sent: the rate limits, its sale, its priority, and the wait that is
    /// expected.
    ///
    /// # Errors
    /// [`ReserveError::RateLimited`] over a limit; [`Refusal::UnknownSale`]; [`Refusal::NotVip`];
    /// [`Indeterminate`] if the order would expire, or the database cannot be read.
    pub async fn admit(&self, order: &Order, id: Uuid) -> Result<Admission, ReserveError> {
        if let Some(limit) = &self.rate_limit
            && limit.admit(order, id).await? == Admission::Repeat
        {
            return Ok(Admission::Repeat);
        }
        self.ensure_sale(order.sale).await?;
        if order.priority == Priority::Vip {
            self.vips.as_ref().ok_or(Refusal::NotVip)?.check(order).await?;
        }
        if let Some(ttl) = &self.ttl {
            ttl.check_backlog(order.sale, order.priority)?;
        }
        Ok(Admission::New)
    }

    /// The priorities that orders of this server may have.
    pub fn priorities(&self) -> &'static [Priority] {
        priorities(self.vips.is_some())
    }

    /// Remembers an order that the broker has acknowledged: its repeat needs no other message.
    pub fn remember_accepted(&self, id: Uuid) {
        if let Some(limit) = &self.rate_limit {
            limit.remember(id);
        }
    }

    /// Whether the order is too old for a ticket.
    pub fn is_expired(&self, order: &OrderMessage) -> bool {
        self.ttl.as_ref().is_some_and(|ttl| ttl.is_expired(order))
    }

    /// Counts orders that were decided as expired. In `locked` a decision counts that is rolled back
    /// later.
    pub fn count_expired(&self, orders: usize) {
        if let Some(ttl) = &self.ttl {
            ttl.count_expired(orders);
        }
    }

    /// Readiness: orders are [decidable](Self::decidable), and every consumer of this server has its
    /// share of the partitions.
    ///
    /// # Errors
    /// [`Indeterminate::BackendAway`] otherwise.
    pub async fn ready(&self) -> Result<(), ReserveError> {
        self.decidable().await?;
        if self.awaits_partitions().await.map_err(away)? {
            return Err(away(anyhow::anyhow!("a consumer has no partitions yet")));
        }
        Ok(())
    }

    /// Checks that orders can be decided: the consumers of this server run, and Kafka has the topics
    /// of orders and of dead letters with their partitions.
    ///
    /// # Errors
    /// [`Indeterminate::BackendAway`] otherwise.
    pub async fn decidable(&self) -> Result<(), ReserveError> {
        if self.consumers.len() < self.consumers_started.load(Relaxed) {
            return Err(away(anyhow::anyhow!("a consumer or worker has ended")));
        }
        let orders = self
            .priorities()
            .iter()
            .map(|&priority| self.topics.of(priority).to_owned());
        let (orders, dead): (Vec<String>, String) = (orders.collect(), dead_letter_topic(&self.kafka));
        // The producer asks, so that it finds a topic that has come back.
        let producer: FutureProducer = self.producer.current();
        let checked = tokio::task::spawn_blocking(move || {
            for orders in &orders {
                topics::check(producer.client(), orders, Some(PARTITIONS), METADATA_TIMEOUT)?;
            }
            topics::check(producer.client(), &dead, None, METADATA_TIMEOUT)
        });
        match checked.await {
            Ok(Ok(())) => Ok(()),
            Ok(Err(why)) => Err(away(why.into())),
            Err(why) => Err(away(why.into())),
        }
    }

    /// Graceful shutdown: the consumers finish their in-flight messages and leave the group, and the
    /// relay finishes its round. Messages that were polled and not begun are redelivered to other
    /// consumers.
    pub async fn close(&self) {
        self.stop.cancel();
        self.consumers.close();
        self.consumers.wait().await;
        self.relay.wait().await;
    }
}

fn priorities(has_priority: bool) -> &'static [Priority] {
    match has_priority {
        false => &[Priority::Normal],
        true => &[Priority::Normal, Priority::Vip],
    }
}

fn away(why: anyhow::Error) -> ReserveError {
    Indeterminate::BackendAway(why).into()
}
