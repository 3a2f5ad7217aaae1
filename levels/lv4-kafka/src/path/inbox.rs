//! A member of the group that decides: it takes messages from its partitions, and says how far it is done with them.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use box_office::{Indeterminate, KafkaConfig};
use futures_util::FutureExt;
use rdkafka::{
    ClientConfig, ClientContext, Offset, TopicPartitionList,
    consumer::{BaseConsumer, CommitMode, Consumer, ConsumerContext, Rebalance, StreamConsumer},
    error::KafkaResult,
    topic_partition_list::TopicPartitionListElem,
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

/// How long it is waited for a way back to an earlier message, each time.
const BACK_WITHIN: Duration = Duration::from_secs(1);

/// Learns which partitions the group has given this consumer.
struct Membership {
    joined: watch::Sender<bool>,
    hand: Mutex<Hand>,
}

/// What this consumer has in hand: its partitions, and how far it is done with them.
#[derive(Default)]
struct Hand {
    mine: BTreeSet<i32>,
    /// Those that were taken away since this was emptied last.
    revoked: BTreeSet<i32>,
    done: BTreeMap<i32, i64>,
    /// Where it has gone back to, and nothing is done since.
    back: BTreeMap<i32, i64>,
    /// When to look whether the group knows.
    look: Option<Instant>,
}

impl Hand {
    fn take(&mut self, partitions: impl IntoIterator<Item = i32>) {
        self.mine.extend(partitions);
    }

    /// Whoever has them next knows better how far they are done.
    fn give_away(&mut self, partitions: impl IntoIterator<Item = i32>) {
        for partition in partitions {
            self.mine.remove(&partition);
            self.done.remove(&partition);
            self.back.remove(&partition);
            self.revoked.insert(partition);
        }
    }

    /// Takes out of a batch what has been taken away since it was begun.
    fn let_go(&mut self, batch: &mut Vec<Taken>) {
        let revoked = std::mem::take(&mut self.revoked);
        if !revoked.is_empty() {
            batch.retain(|taken| !revoked.contains(&taken.partition));
        }
    }

    /// Notes how far a partition is done, and whether that is still for this consumer to say.
    fn done(&mut self, partition: i32, offset: i64) -> bool {
        let mine = self.mine.contains(&partition);
        if mine {
            self.done.insert(partition, offset);
            self.back.remove(&partition);
            self.look.get_or_insert_with(|| Instant::now() + LOOK_AFTER);
        }
        mine
    }
}

impl Membership {
    fn hand(&self) -> MutexGuard<'_, Hand> {
        self.hand.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl ClientContext for Membership {}

impl ConsumerContext for Membership {
    fn pre_rebalance(&self, _: &BaseConsumer<Self>, rebalance: &Rebalance<'_>) {
        if let Rebalance::Revoke(partitions) = rebalance {
            self.hand().give_away(numbers(partitions));
        }
    }

    fn post_rebalance(&self, _: &BaseConsumer<Self>, rebalance: &Rebalance<'_>) {
        if let Rebalance::Assign(partitions) = rebalance {
            tracing::debug!(partitions = partitions.count(), "has its part of the orders");
            self.hand().take(numbers(partitions));
            // Who joins others is given nothing at first: they have to let go of it.
            if partitions.count() > 0 {
                self.joined.send_replace(true);
            }
        }
    }
}

fn numbers(partitions: &TopicPartitionList) -> Vec<i32> {
    let partitions = partitions.elements();
    partitions.iter().map(TopicPartitionListElem::partition).collect()
}

// ANCHOR: member
/// What every member of the group has in common. Whether and when offsets are committed is for the strategy to say.
pub fn member(place: &KafkaConfig) -> ClientConfig {
    // With a heartbeat the group also tells that the partitions are divided anew: who joins waits for the next one of all others.
    let heartbeat = (place.session / 3).min(Duration::from_millis(250));
    let mut config = client(place);
    config
        .set("group.id", group(place))
        .set("session.timeout.ms", place.session.as_millis().to_string())
        .set("heartbeat.interval.ms", heartbeat.as_millis().to_string())
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
    pub fn open(place: &KafkaConfig, config: &ClientConfig) -> KafkaResult<Self> {
        let (sender, joined) = watch::channel(false);
        let consumer: StreamConsumer<Membership> = config.create_with_context(Membership {
            joined: sender,
            hand: Mutex::default(),
        })?;
        let topic = topic(place);
        consumer.subscribe(&[&topic])?;
        Ok(Self {
            consumer: Arc::new(consumer),
            topic,
            joined,
        })
    }

    /// Tells whether the group has given this consumer partitions.
    pub fn joined(&self) -> watch::Receiver<bool> {
        self.joined.clone()
    }

    // ANCHOR: batch
    /// What has arrived: at least one message, at most so many. `None` once it is time to stop.
    ///
    /// While nobody calls this, no partition changes hands: the batch in hand is finished first. (Unless that takes so long that the group
    /// believes this consumer dead.)
    pub async fn batch(&self, most: usize, stop: &CancellationToken) -> Option<Vec<Taken>> {
        loop {
            let first = self.first(stop).await?;
            self.consumer.context().hand().revoked.clear();
            let mut batch = vec![first];
            while batch.len() < most {
                let next = self.consumer.recv().now_or_never();
                // Partitions change hands in that call, too. What was taken from one that has gone is somebody else's by now.
                self.consumer.context().hand().let_go(&mut batch);
                let Some(Ok(message)) = next else { break };
                batch.push(Taken::of(&message));
            }
            if !batch.is_empty() {
                return Some(batch);
            }
        }
    }
    // ANCHOR_END: batch

    /// The next message. `None` once it is time to stop.
    async fn first(&self, stop: &CancellationToken) -> Option<Taken> {
        loop {
            let look = self.consumer.context().hand().look;
            tokio::select! {
                biased;
                () = stop.cancelled() => return None,
                () = sleep_until(look.unwrap_or_else(Instant::now)), if look.is_some() => self.look().await,
                taken = self.consumer.recv() => match taken {
                    Ok(message) => return Some(Taken::of(&message)),
                    // Most often the broker is away. The client goes on looking for it.
                    Err(why) => tracing::warn!(%why, "no message could be taken"),
                },
            }
        }
    }

    /// Says that everything before `offset` is done. Whoever takes the partition over begins there.
    ///
    /// It does not wait for the broker. While partitions change hands the group may refuse a commit, and nobody is told. So a second later
    /// this consumer looks, and commits again: the last order of a quiet partition would look undecided for ever.
    pub fn done_before(&self, partition: i32, offset: i64) {
        if self.consumer.context().hand().done(partition, offset) {
            self.commit(partition, offset);
        }
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
        let done = {
            let mut hand = self.consumer.context().hand();
            hand.look = None;
            hand.done.clone()
        };
        if done.is_empty() {
            return;
        }
        let (consumer, topic) = (Arc::clone(&self.consumer), self.topic.clone());
        let known = tokio::task::spawn_blocking(move || {
            let mut asked = TopicPartitionList::new();
            for &partition in done.keys() {
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
        let mut unknown = self.consumer.context().hand().done.clone();
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
    pub async fn again(&self, from: BTreeMap<i32, i64>, pause: Duration, stop: &CancellationToken) {
        stop.run_until_cancelled(tokio::time::sleep(pause)).await;
        for (partition, offset) in from {
            // Whoever has the partition by now begins where it is due. As long as it is this consumer's, there must be a way back:
            // to go on from where it stands would leave these messages out.
            while !stop.is_cancelled()
                && self.has(partition)
                && let Err(why) = self.seek(partition, offset).await
            {
                tracing::warn!(%why, partition, offset, "no way back yet");
                tokio::time::sleep(LOOK_AFTER / 10).await;
            }
        }
    }

    fn has(&self, partition: i32) -> bool {
        self.consumer.context().hand().mine.contains(&partition)
    }

    async fn seek(&self, partition: i32, offset: i64) -> anyhow::Result<()> {
        let (consumer, topic) = (Arc::clone(&self.consumer), self.topic.clone());
        let seek = move || consumer.seek(&topic, partition, Offset::Offset(offset), BACK_WITHIN);
        tokio::task::spawn_blocking(seek).await??;
        self.consumer.context().hand().back.insert(partition, offset);
        Ok(())
    }

    /// Whether it has just gone back to this offset: what is handed out next is the first that there is from there on.
    pub fn went_back_to(&self, partition: i32, offset: i64) -> bool {
        self.consumer.context().hand().back.get(&partition) == Some(&offset)
    }

    /// The first offset that a partition still holds.
    ///
    /// # Errors
    /// The broker does not answer.
    pub async fn earliest(&self, partition: i32) -> Result<i64, Indeterminate> {
        let (consumer, topic) = (Arc::clone(&self.consumer), self.topic.clone());
        let asked = tokio::task::spawn_blocking(move || consumer.fetch_watermarks(&topic, partition, LOOK_AFTER));
        match asked.await {
            Ok(Ok((earliest, _))) => Ok(earliest),
            Ok(Err(why)) => Err(Indeterminate::BackendAway(why.into())),
            Err(why) => Err(Indeterminate::BackendAway(why.into())),
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

#[cfg(test)]
mod tests {
    use rdkafka::{Timestamp, message::OwnedMessage};

    use super::*;

    fn taken(partition: i32, offset: i64) -> Taken {
        Taken {
            partition,
            offset,
            message: OwnedMessage::new(
                None,
                None,
                "orders".to_owned(),
                Timestamp::NotAvailable,
                partition,
                offset,
                None,
            ),
        }
    }

    fn places(batch: &[Taken]) -> Vec<(i32, i64)> {
        batch.iter().map(|taken| (taken.partition, taken.offset)).collect()
    }

    #[test]
    fn what_was_taken_from_a_partition_that_has_gone_is_let_go() {
        let mut hand = Hand::default();
        hand.take([0, 1]);
        let mut batch = vec![taken(0, 7), taken(1, 3)];
        hand.let_go(&mut batch);
        assert_eq!(places(&batch), [(0, 7), (1, 3)]);

        hand.give_away([0]);
        hand.let_go(&mut batch);
        assert_eq!(places(&batch), [(1, 3)]);

        // Back again: what is handed out from here on is this consumer's.
        hand.give_away([1]);
        hand.take([1]);
        hand.let_go(&mut batch);
        assert_eq!(places(&batch), []);
        batch.push(taken(1, 3));
        hand.let_go(&mut batch);
        assert_eq!(places(&batch), [(1, 3)]);
    }

    #[test]
    fn how_far_a_partition_is_done_is_said_by_who_has_it() {
        let mut hand = Hand::default();
        hand.take([0]);
        assert!(hand.done(0, 5));
        assert!(!hand.done(1, 5), "it never was this consumer's");
        hand.give_away([0]);
        assert!(!hand.done(0, 6), "it is somebody else's by now");
        assert!(hand.done.is_empty(), "{:?}", hand.done);
    }
}
