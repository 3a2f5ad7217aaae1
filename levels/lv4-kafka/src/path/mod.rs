//! The subject of this level: the path of an order, from the buyer's request to the event that tells how it ended.
//!
//! `POST` → a message in the topic of orders, acknowledged → 202 → a consumer takes it → rows and outbox in one transaction → the offset is
//! passed → status and events, from what is stored. What a strategy decides, in which transaction, and when it passes an offset stands in
//! its own file; here is what all of them stand on.
//!
//! Sources: Apache Kafka documentation, 4.6 "Message Delivery Semantics"; C. Richardson, "Transactional outbox"; librdkafka, "Introduction".

mod dead_letters;
mod events;
mod id;
mod inbox;
mod message;

use std::{
    collections::{BTreeMap, HashSet},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicUsize, Ordering::Relaxed},
    },
    time::Duration,
};

use anyhow::{Context, bail};
use box_office::{ConsumerLag, Indeterminate, KafkaConfig, Refusal, ReserveError, SaleId, StrategyContext};
use rdkafka::{
    ClientConfig, TopicPartitionList,
    admin::{AdminClient, AdminOptions, NewTopic, TopicReplication},
    client::DefaultClientContext,
    consumer::{BaseConsumer, Consumer},
    error::{KafkaError, KafkaResult, RDKafkaErrorCode},
    producer::{FutureProducer, Producer},
};
use tokio::{sync::watch, time::sleep};
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use uuid::Uuid;

pub use dead_letters::{DeadLetter, DeadLetters, list as dead_letters, replay, replay_all};
pub use events::{DECIDED, Events};
pub use id::Ids;
pub use inbox::{Inbox, member};
pub use message::{OrderMessage, Poison, Taken};

/// Into how many partitions the orders are divided: so many consumers can work at once. It stays what it is, as the partition of a sale
/// follows from it.
pub const PARTITIONS: i32 = 6;

/// How large a message of that topic may be, in bytes, and so a batch of messages that travel together: the broker's limit is one on batches. An
/// order has a few hundred. The broker's own limit is a million: a message of that size could not be dead-lettered, as the reason beside it takes
/// room as well, and would lie in its partition's way for ever.
const LARGEST: &str = "65536";

/// How long the broker may take for one message. The buyer hears "undecided" then, although the message may be there.
const DELIVERY: Duration = Duration::from_secs(5);

/// How long Kafka may take to answer while a server starts.
const START: Duration = Duration::from_secs(10);

/// How long it may take to answer a server that asks whether it is there.
const ANSWER: Duration = Duration::from_secs(2);

/// How long it is waited between two looks at how far the group is behind, for the metrics, and for each answer.
const LAG_EVERY: Duration = Duration::from_secs(1);

/// How long a topic keeps an order at least. By default Kafka forgets after seven days what nobody has read, and an order that waits for longer
/// was accepted all the same. What is decided need not be kept: thirty days are for who looks back.
const ORDERS_ARE_KEPT_MS: &str = "2592000000";

/// And how long a dead letter: until somebody has looked.
const FOR_EVER: &str = "-1";

/// The topic of the orders.
pub fn topic(place: &KafkaConfig) -> String {
    format!("{}orders", place.prefix)
}

/// The topic of the messages that nobody can decide.
pub fn dead_letter_topic(place: &KafkaConfig) -> String {
    format!("{}orders.dead", place.prefix)
}

/// The group of those who decide.
pub fn group(place: &KafkaConfig) -> String {
    format!("{}deciders", place.prefix)
}

/// What every client of Kafka has in common.
fn client(place: &KafkaConfig) -> ClientConfig {
    let mut config = ClientConfig::new();
    config
        .set("bootstrap.servers", &place.bootstrap_servers)
        // A broker that comes back is found soon.
        .set("reconnect.backoff.ms", "50")
        .set("reconnect.backoff.max.ms", "500")
        .set("socket.nagle.disable", "true");
    config
}

// ANCHOR: producer
/// A producer that takes nothing for sent which the broker has not written.
pub fn producer(place: &KafkaConfig) -> Result<FutureProducer, KafkaError> {
    client(place)
        .set("acks", "all") // every replica in sync has it
        .set("enable.idempotence", "true") // and has it once, however often the client had to send it
        .set("linger.ms", "5") // so long a message waits for others to travel with
        .set("batch.size", LARGEST) // no more of them than the topic takes at once
        .set("delivery.timeout.ms", DELIVERY.as_millis().to_string())
        .create()
}
// ANCHOR_END: producer

/// The broker did not take a message in time. It may have it all the same.
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

/// What all strategies of this level stand on.
pub struct Path {
    /// The database, and what else a strategy is opened with.
    pub context: StrategyContext,
    /// Where Kafka is.
    pub place: KafkaConfig,
    /// The topic of the orders.
    pub topic: String,
    /// Sends orders.
    pub producer: FutureProducer,
    /// Makes the ids of reservations.
    pub ids: Ids,
    /// Tells what became of orders.
    pub events: Events,
    /// Takes what nobody can decide.
    pub dead_letters: DeadLetters,
    /// Told when it is time to stop.
    pub stop: CancellationToken,
    workers: TaskTracker,
    begun: AtomicUsize,
    not_joined: Mutex<Vec<watch::Receiver<bool>>>,
    known_sales: Mutex<HashSet<SaleId>>,
}

impl Path {
    /// Makes the topics, and connects.
    ///
    /// # Errors
    /// Kafka or the database does not answer.
    pub async fn open(context: StrategyContext) -> anyhow::Result<Arc<Self>> {
        let place = context
            .kafka
            .clone()
            .context("this strategy needs KAFKA_BOOTSTRAP_SERVERS")?;
        let stop = CancellationToken::new();
        let (topics, ids, events) = tokio::join!(
            make_topics(&place),
            Ids::of(&context.database),
            Events::open(&context.database, stop.clone())
        );
        topics.with_context(|| {
            let servers = &place.bootstrap_servers;
            format!("KAFKA_BOOTSTRAP_SERVERS (--kafka-bootstrap-servers): Kafka at {servers} does not do as asked")
        })?;
        let producer = producer(&place)?;
        let (ids, events) = (ids?, events?);
        tokio::spawn(tell_lag(
            onlooker(&place)?,
            place.clone(),
            context.metrics.lag.clone(),
            stop.clone(),
        ));
        Ok(Arc::new(Self {
            topic: topic(&place),
            dead_letters: DeadLetters::new(producer.clone(), &place, context.metrics.clone()),
            producer,
            ids,
            events,
            stop,
            workers: TaskTracker::new(),
            begun: AtomicUsize::new(0),
            not_joined: Mutex::default(),
            known_sales: Mutex::default(),
            context,
            place,
        }))
    }

    /// Lets a consumer of this server work, in a task of its own. The server is not ready before it has joined its group.
    pub fn work(&self, joined: watch::Receiver<bool>, work: impl Future<Output = ()> + Send + 'static) {
        self.not_joined().push(joined);
        self.begun.fetch_add(1, Relaxed);
        self.workers.spawn(work);
    }

    fn not_joined(&self) -> MutexGuard<'_, Vec<watch::Receiver<bool>>> {
        self.not_joined.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether a consumer of this server still waits for partitions that it will get.
    async fn waits_for_partitions(&self) -> anyhow::Result<bool> {
        let waiting = {
            let mut waiting = self.not_joined();
            waiting.retain(|joined| !*joined.borrow());
            waiting.len()
        };
        if waiting == 0 {
            return Ok(false);
        }
        // Where there are more consumers than partitions, some never get one.
        let (producer, group) = (self.producer.clone(), group(&self.place));
        let members = tokio::task::spawn_blocking(move || {
            let known = producer.client().fetch_group_list(Some(&group), ANSWER)?;
            KafkaResult::Ok(known.groups().iter().map(|group| group.members().len()).sum::<usize>())
        });
        let members = members.await??;
        Ok(members < PARTITIONS as usize + waiting)
    }

    /// Whether there is such a sale. A sale that is known stays known: none is ever taken away.
    ///
    /// # Errors
    /// There is none, or nobody can say.
    pub async fn knows(&self, sale: SaleId) -> Result<(), ReserveError> {
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

    /// Whether orders can be taken: Kafka answers, and every consumer lives and has its part of the partitions.
    ///
    /// # Errors
    /// They can't.
    pub async fn ready(&self) -> Result<(), ReserveError> {
        let away = |why: anyhow::Error| ReserveError::from(Indeterminate::BackendAway(why));
        if self.workers.len() < self.begun.load(Relaxed) {
            return Err(away(anyhow::anyhow!("a consumer has ended")));
        }
        if self.waits_for_partitions().await.map_err(away)? {
            return Err(away(anyhow::anyhow!("a consumer has no part of the partitions yet")));
        }
        if let Some((code, why)) = self.producer.client().fatal_error() {
            return Err(away(anyhow::anyhow!("the producer has given up: {code}: {why}")));
        }
        let (producer, topic) = (self.producer.clone(), self.topic.clone());
        let asked =
            tokio::task::spawn_blocking(move || producer.client().fetch_metadata(Some(&topic), ANSWER).map(drop));
        match asked.await {
            Ok(Ok(())) => Ok(()),
            Ok(Err(why)) => Err(away(why.into())),
            Err(why) => Err(away(why.into())),
        }
    }

    /// Finishes the orders in work, and leaves the group: what was taken and not begun is for others.
    pub async fn close(&self) {
        self.stop.cancel();
        self.workers.close();
        self.workers.wait().await;
    }
}

/// Makes the topics with their partitions. One that a broker makes by itself has a single partition, and then all instances are one worker.
async fn make_topics(place: &KafkaConfig) -> anyhow::Result<()> {
    let admin: AdminClient<DefaultClientContext> = client(place).create()?;
    let (orders, dead) = (topic(place), dead_letter_topic(place));
    // ANCHOR: topics
    // -1: as many replicas as the brokers are set to keep.
    let topics = [
        NewTopic::new(&orders, PARTITIONS, TopicReplication::Fixed(-1))
            .set("max.message.bytes", LARGEST)
            .set("retention.ms", ORDERS_ARE_KEPT_MS),
        NewTopic::new(&dead, 1, TopicReplication::Fixed(-1)).set("retention.ms", FOR_EVER),
    ];
    // ANCHOR_END: topics
    let options = AdminOptions::new()
        .operation_timeout(Some(START))
        .request_timeout(Some(START));
    let mut there_already = false;
    for made in admin.create_topics(&topics, &options).await? {
        match made {
            Ok(_) => {}
            Err((_, RDKafkaErrorCode::TopicAlreadyExists)) => there_already = true,
            Err((topic, why)) => bail!("the topic {topic} can't be made: {why}"),
        }
    }
    if there_already {
        let topic = orders.clone();
        let partitions = tokio::task::spawn_blocking(move || {
            let metadata = admin.inner().fetch_metadata(Some(&topic), START)?;
            anyhow::Ok(metadata.topics().first().map_or(0, |topic| topic.partitions().len()))
        });
        let partitions = partitions.await??;
        if partitions != 0 && i32::try_from(partitions) != Ok(PARTITIONS) {
            bail!("the topic {orders} has {partitions} partitions, and not {PARTITIONS}");
        }
    }
    Ok(())
}

/// How many messages there are that the group has not passed: its lag.
///
/// # Errors
/// Kafka does not answer.
pub fn lag(place: &KafkaConfig, patience: Duration) -> anyhow::Result<u64> {
    let behind = behind(&onlooker(place)?, place, patience)?;
    Ok(u64::try_from(behind.values().sum::<i64>())?)
}

/// Somebody who knows of the group, and is none of it.
fn onlooker(place: &KafkaConfig) -> KafkaResult<BaseConsumer> {
    client(place).set("group.id", group(place)).create()
}

/// The same for each partition.
fn behind(onlooker: &BaseConsumer, place: &KafkaConfig, patience: Duration) -> KafkaResult<BTreeMap<i32, i64>> {
    let topic = topic(place);
    let mut partitions = TopicPartitionList::new();
    partitions.add_partition_range(&topic, 0, PARTITIONS - 1);
    let mut behind = BTreeMap::new();
    for passed in onlooker.committed_offsets(partitions, patience)?.elements() {
        let (first, end) = onlooker.fetch_watermarks(&topic, passed.partition(), patience)?;
        let passed_before = passed.offset().to_raw().filter(|&passed| passed >= first);
        behind.insert(passed.partition(), end - passed_before.unwrap_or(first));
    }
    Ok(behind)
}

/// Tells the metrics how far the group is behind, again and again. It asks the broker: a consumer that stands still would tell nothing.
async fn tell_lag(onlooker: BaseConsumer, place: KafkaConfig, lag: ConsumerLag, stop: CancellationToken) {
    let onlooker = Arc::new(onlooker);
    while stop.run_until_cancelled(sleep(LAG_EVERY)).await.is_some() {
        let (onlooker, place) = (Arc::clone(&onlooker), place.clone());
        match tokio::task::spawn_blocking(move || behind(&onlooker, &place, LAG_EVERY)).await {
            Ok(Ok(behind)) => behind
                .into_iter()
                .for_each(|(partition, behind)| lag.set(partition, behind)),
            // The broker is away, or this process ends.
            _ => lag.clear(),
        }
    }
    // To drop a client takes a while, and must not take it on a thread that others need.
    tokio::task::spawn_blocking(move || drop(onlooker));
}

/// The pause before a batch is tried again after a fault: longer each time, so that what comes back is not trampled down.
#[derive(Default)]
pub struct Backoff {
    times: u32,
}

impl Backoff {
    /// The next pause, with jitter.
    pub fn pause(&mut self) -> Duration {
        const FIRST: Duration = Duration::from_millis(50);
        const LONGEST: Duration = Duration::from_secs(1);
        let longest = (FIRST * 2_u32.pow(self.times.min(10))).min(LONGEST);
        self.times += 1;
        longest.mul_f64(rand::random_range(0.5..1.0))
    }

    /// All went well: begin anew.
    pub fn reset(&mut self) {
        self.times = 0;
    }
}

/// The ids, cut into messages that Postgres passes on: one may have up to 8,000 bytes.
pub fn announcements(ids: &[Uuid]) -> Vec<String> {
    const IN_ONE: usize = 200;
    let text = |ids: &[Uuid]| ids.iter().map(Uuid::to_string).collect::<Vec<_>>().join(",");
    ids.chunks(IN_ONE).map(text).collect()
}
