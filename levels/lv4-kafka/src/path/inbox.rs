//! A member of the group that decides: it takes messages from its partitions, and says how far it is done with them.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use box_office::KafkaPlace;
use futures_util::FutureExt;
use rdkafka::{
    ClientConfig, ClientContext, Offset, TopicPartitionList,
    consumer::{BaseConsumer, CommitMode, Consumer, ConsumerContext, Rebalance, StreamConsumer},
    error::KafkaResult,
};
use tokio::{
    sync::watch,
    time::{Instant, sleep_until},
};
use tokio_util::sync::CancellationToken;

use super::{Taken, client, group, topic};

/// A consumer in the group, and its place in it.
pub struct Inbox {
    consumer: Arc<StreamConsumer<Membership>>,
    topic: String,
    joined: watch::Receiver<bool>,
}

/// How long after a commit it is looked whether the group took it.
const LOOK_AFTER: Duration = Duration::from_secs(1);

/// Learns when the group has given this consumer its part: some partitions, or none.
struct Membership {
    joined: watch::Sender<bool>,
    done: Mutex<Done>,
}

/// How far this consumer is done with the partitions that it has.
#[derive(Default)]
struct Done {
    before: BTreeMap<i32, i64>,
    /// When to look whether the group knows.
    look: Option<Instant>,
}

impl Membership {
    fn done(&self) -> MutexGuard<'_, Done> {
        self.done.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl ClientContext for Membership {}

impl ConsumerContext for Membership {
    fn pre_rebalance(&self, _: &BaseConsumer<Self>, rebalance: &Rebalance<'_>) {
        if let Rebalance::Revoke(partitions) = rebalance {
            // Whoever has them next knows better.
            for partition in partitions.elements() {
                self.done().before.remove(&partition.partition());
            }
        }
    }

    fn post_rebalance(&self, _: &BaseConsumer<Self>, rebalance: &Rebalance<'_>) {
        if let Rebalance::Assign(partitions) = rebalance {
            tracing::debug!(partitions = partitions.count(), "has its part of the orders");
            self.joined.send_replace(true);
        }
    }
}

// ANCHOR: member
/// What every member of the group has in common. Whether and when offsets are committed is for the strategy to say.
pub fn member(place: &KafkaPlace) -> ClientConfig {
    let mut config = client(place);
    config
        .set("group.id", group(place))
        .set("session.timeout.ms", place.session.as_millis().to_string())
        .set("heartbeat.interval.ms", (place.session.as_millis() / 4).to_string())
        // A group that is new begins with the first order there is, not with the first that comes after it.
        .set("auto.offset.reset", "earliest")
        // An instance that comes or goes takes and leaves its own partitions, and the others go on meanwhile.
        .set("partition.assignment.strategy", "cooperative-sticky")
        .set("fetch.error.backoff.ms", "50")
        // A broker is asked one thing at a time. While it waits for orders in the partitions it was asked about, it hears of no others.
        .set("fetch.wait.max.ms", "50")
        // What is fetched ahead lies in this process's memory.
        .set("queued.min.messages", "5000")
        .set("queued.max.messages.kbytes", "16384")
        // And as soon as there is room again, more of it: the client's own pause would be a second.
        .set("fetch.queue.backoff.ms", "5");
    config
}
// ANCHOR_END: member

impl Inbox {
    /// Joins the group.
    ///
    /// # Errors
    /// The configuration is none that Kafka's client takes.
    pub fn open(place: &KafkaPlace, config: &ClientConfig) -> KafkaResult<Self> {
        let (sender, joined) = watch::channel(false);
        let consumer: StreamConsumer<Membership> = config.create_with_context(Membership {
            joined: sender,
            done: Mutex::default(),
        })?;
        let topic = topic(place);
        consumer.subscribe(&[&topic])?;
        Ok(Self {
            consumer: Arc::new(consumer),
            topic,
            joined,
        })
    }

    /// Tells whether the group has given this consumer its part.
    pub fn joined(&self) -> watch::Receiver<bool> {
        self.joined.clone()
    }

    // ANCHOR: batch
    /// What has arrived: at least one message, at most so many. `None` once it is time to stop.
    ///
    /// While nobody calls this, no partition changes hands: the batch in hand is finished first. (Unless that takes so long that the group
    /// believes this consumer dead.)
    pub async fn batch(&self, most: usize, stop: &CancellationToken) -> Option<Vec<Taken>> {
        let mut batch = vec![loop {
            let look = self.consumer.context().done().look;
            tokio::select! {
                biased;
                () = stop.cancelled() => return None,
                () = sleep_until(look.unwrap_or_else(Instant::now)), if look.is_some() => self.look().await,
                taken = self.consumer.recv() => match taken {
                    Ok(message) => break Taken::of(&message),
                    // Most often the broker is away. The client goes on looking for it.
                    Err(why) => tracing::warn!(%why, "no message could be taken"),
                },
            }
        }];
        while batch.len() < most
            && let Some(Ok(message)) = self.consumer.recv().now_or_never()
        {
            batch.push(Taken::of(&message));
        }
        Some(batch)
    }
    // ANCHOR_END: batch

    /// Says that everything before `offset` is done. Whoever takes the partition over begins there.
    ///
    /// It does not wait for the broker. While partitions change hands the group may refuse a commit, and nobody is told. So a second later
    /// this consumer looks, and commits again: the last order of a quiet partition would look undecided for ever.
    pub fn done_before(&self, partition: i32, offset: i64) {
        {
            let mut done = self.consumer.context().done();
            done.before.insert(partition, offset);
            done.look.get_or_insert_with(|| Instant::now() + LOOK_AFTER);
        }
        self.commit(partition, offset);
    }

    fn commit(&self, partition: i32, offset: i64) {
        let mut offsets = TopicPartitionList::new();
        let committed = offsets
            .add_partition_offset(&self.topic, partition, Offset::Offset(offset))
            .and_then(|()| self.consumer.commit(&offsets, CommitMode::Async));
        if let Err(why) = committed {
            tracing::warn!(%why, partition, offset, "the offset could not be committed");
        }
    }

    /// Looks how much of what is done the group knows, and commits the rest again.
    async fn look(&self) {
        let before = {
            let mut done = self.consumer.context().done();
            done.look = None;
            done.before.clone()
        };
        if before.is_empty() {
            return;
        }
        let (consumer, topic) = (Arc::clone(&self.consumer), self.topic.clone());
        let known = tokio::task::spawn_blocking(move || {
            let mut asked = TopicPartitionList::new();
            for &partition in before.keys() {
                asked.add_partition(&topic, partition);
            }
            consumer.committed_offsets(asked, LOOK_AFTER)
        });
        let known = match known.await {
            Ok(Ok(known)) => known,
            // The broker is away, or this process ends.
            _ => TopicPartitionList::new(),
        };
        // As it is by now: a partition may have gone, and more may be done.
        let mut unknown = self.consumer.context().done().before.clone();
        for partition in known.elements() {
            if let Offset::Offset(offset) = partition.offset() {
                unknown.retain(|&number, &mut done| number != partition.partition() || offset < done);
            }
        }
        for (partition, offset) in unknown {
            self.done_before(partition, offset);
        }
    }

    /// After a pause, hands out again what begins at each of these offsets: a fault that passes.
    pub async fn again(&self, from: BTreeMap<i32, i64>, pause: Duration) {
        tokio::time::sleep(pause).await;
        for (partition, offset) in from {
            let back = self
                .consumer
                .seek(&self.topic, partition, Offset::Offset(offset), Duration::ZERO);
            if let Err(why) = back {
                // Somebody else has the partition by now, and begins where it is due.
                tracing::debug!(%why, partition, offset, "no way back");
            }
        }
    }

    /// Leaves the group, so that others have its partitions at once.
    pub async fn close(self) {
        // Closing waits for the group's answer, and must not do that on a thread that others need.
        let consumer = self.consumer;
        let left = tokio::task::spawn_blocking(move || {
            consumer.unsubscribe();
            drop(consumer);
        });
        if tokio::time::timeout(Duration::from_secs(5), left).await.is_err() {
            tracing::warn!("the group was not left in time; it finds out by itself");
        }
    }
}
