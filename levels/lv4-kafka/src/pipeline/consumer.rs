//! A Kafka consumer: polls batches, commits offsets, and seeks back after a fault.

use std::{
    collections::{BTreeMap, BTreeSet},
    num::NonZeroU32,
    pin::pin,
    sync::Arc,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use box_office::{CauseLog, ConsumerMetrics, Indeterminate, KafkaConfig, Priority};
use futures_util::FutureExt;
use rdkafka::{
    ClientConfig, Message as _, Offset, TopicPartitionList,
    consumer::{CommitMode, Consumer, StreamConsumer},
    error::KafkaResult,
};
use tokio::{
    sync::watch,
    time::{Instant, sleep, sleep_until},
};
use tokio_util::sync::CancellationToken;

use super::{
    ConsumedMessage, OrderPartition, OrderTopics,
    priority::VipReader,
    rebalance::RebalanceListener,
    topics::{client_config, consumer_group},
};

/// The timeout of a request for offsets.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(1);

/// The timeout of a seek.
const SEEK_TIMEOUT: Duration = Duration::from_secs(1);

/// The delay before a failed seek is retried.
const SEEK_RETRY_DELAY: Duration = Duration::from_millis(100);

/// How long a consumer may take to leave the group on shutdown.
const LEAVE_TIMEOUT: Duration = Duration::from_secs(5);

/// A member of the consumer group that reads the orders topic; with priority also the VIP topic.
pub struct OrderConsumer {
    consumer: Arc<StreamConsumer<RebalanceListener>>,
    vips: Option<Arc<VipReader>>,
    topics: OrderTopics,
    joined: watch::Receiver<bool>,
    metrics: ConsumerMetrics,
    causes: CauseLog,
}

// ANCHOR: consumer_config
/// The configuration that all consumers of the group share. The strategy adds whether and when
/// offsets are committed.
pub fn consumer_config(kafka: &KafkaConfig) -> ClientConfig {
    // A heartbeat's answer announces a rebalance, so a new consumer waits for the next heartbeat of
    // all others.
    let heartbeat = (kafka.session / 3).min(Duration::from_millis(250));
    let mut config = client_config(kafka);
    config
        .set("group.id", consumer_group(kafka))
        .set("session.timeout.ms", kafka.session.as_millis().to_string())
        .set("heartbeat.interval.ms", heartbeat.as_millis().to_string())
        // A new group begins with the oldest order, not with the first that arrives after it.
        .set("auto.offset.reset", "earliest")
        // A rebalance moves only the partitions that change owner; the other ones are consumed
        // meanwhile.
        .set("partition.assignment.strategy", "cooperative-sticky")
        .set("fetch.error.backoff.ms", "50")
        // The client has one fetch in flight per broker. While that waits for messages, no other
        // partition is fetched.
        .set("fetch.wait.max.ms", "50")
        // Prefetched messages take up this process's memory.
        .set("queued.min.messages", "5000")
        .set("queued.max.messages.kbytes", "16384")
        // Fetch again as soon as there is room in the queue: the default delay is a second.
        .set("fetch.queue.backoff.ms", "5");
    config
}
// ANCHOR_END: consumer_config

impl OrderConsumer {
    /// Creates a consumer and subscribes it to the orders topic. It joins the group in the
    /// background. With `vips_in_a_row` it reads the VIP topic as well, and returns at most so many
    /// VIPs for each other order.
    ///
    /// # Errors
    /// If the client rejects its configuration.
    pub fn subscribe(
        kafka: &KafkaConfig,
        config: &ClientConfig,
        metrics: &ConsumerMetrics,
        vips_in_a_row: Option<NonZeroU32>,
    ) -> KafkaResult<Self> {
        let (sender, joined) = watch::channel(false);
        let vips = vips_in_a_row.map(|vips_in_a_row| VipReader::new(kafka, config, vips_in_a_row));
        let vips = vips.transpose()?.map(Arc::new);
        let listener = RebalanceListener::new(sender, vips.clone(), metrics.clone());
        let consumer: StreamConsumer<RebalanceListener> = config.create_with_context(listener)?;
        let topics = OrderTopics::new(kafka);
        consumer.subscribe(&[topics.of(Priority::Normal)])?;
        Ok(Self {
            consumer: Arc::new(consumer),
            vips,
            topics,
            joined,
            metrics: metrics.clone(),
            causes: CauseLog::default(),
        })
    }

    /// Becomes `true` once the group has assigned partitions to this consumer.
    pub fn joined(&self) -> watch::Receiver<bool> {
        self.joined.clone()
    }

    // ANCHOR: poll_batch
    /// Polls a batch: at least one message and at most `max`, without waiting for more than one.
    /// `None` on shutdown.
    ///
    /// Between two calls no partition is revoked: the consumer finishes its batch first. There are
    /// two exceptions: a batch that takes longer than `max.poll.interval.ms`, and a process that is
    /// paused for longer than its session. In both the group considers the consumer dead.
    pub async fn poll_batch(&self, max: usize, stop: &CancellationToken) -> Option<Vec<ConsumedMessage>> {
        loop {
            let first = self.next_message(stop).await?;
            self.consumer.context().assignment().begin_batch();
            let mut batch = vec![first];
            while batch.len() < max {
                let next = self.next_fetched();
                // That call may run a rebalance. The messages of a revoked partition belong to its
                // next owner.
                self.consumer.context().assignment().drop_revoked(&mut batch);
                let Some(message) = next else { break };
                batch.push(message);
            }
            if !batch.is_empty() {
                self.measure(&batch);
                return Some(batch);
            }
        }
    }
    // ANCHOR_END: poll_batch

    /// Records the size of a batch, and how long each message has waited. One that is delivered again
    /// has waited since it was sent, too.
    fn measure(&self, batch: &[ConsumedMessage]) {
        self.metrics.polled(batch.len());
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        for message in batch {
            if let Some(sent_ms) = message.raw.timestamp().to_millis() {
                let sent = Duration::from_millis(sent_ms.try_into().unwrap_or(0));
                self.metrics.queued(now.saturating_sub(sent));
            }
        }
    }

    /// Waits for the next message. `None` on shutdown.
    async fn next_message(&self, stop: &CancellationToken) -> Option<ConsumedMessage> {
        loop {
            let check_at = self.consumer.context().assignment().check_commits_at();
            tokio::select! {
                biased;
                () = stop.cancelled() => return None,
                () = sleep_until(check_at.unwrap_or_else(Instant::now)), if check_at.is_some() => {
                    self.check_commits().await;
                }
                received = self.receive() => match received {
                    Ok(message) => return Some(message),
                    // Usually the broker is away. The client reconnects by itself.
                    Err(why) => self.causes.warn("polling failed", &why),
                },
            }
        }
    }

    // ANCHOR: weighted
    /// Waits for the next message, of whichever priority.
    async fn receive(&self) -> KafkaResult<ConsumedMessage> {
        let Some(vips) = &self.vips else {
            return self.receive_of(Priority::Normal).await;
        };
        let [first, second] = vips.turns.next();
        let message = tokio::select! {
            biased;
            message = self.receive_of(first) => message?,
            message = self.receive_of(second) => message?,
        };
        vips.turns.count(message.partition.priority);
        Ok(message)
    }

    /// The next message that is fetched already, if one is.
    fn next_fetched(&self) -> Option<ConsumedMessage> {
        let fetched = |priority| self.receive_of(priority).now_or_never()?.ok();
        let Some(vips) = &self.vips else {
            return fetched(Priority::Normal);
        };
        let message = vips.turns.next().into_iter().find_map(fetched)?;
        vips.turns.count(message.partition.priority);
        Some(message)
    }
    // ANCHOR_END: weighted

    /// Waits for the next message of this priority.
    async fn receive_of(&self, priority: Priority) -> KafkaResult<ConsumedMessage> {
        let received = match (priority, &self.vips) {
            (Priority::Vip, Some(vips)) => vips.consumer.recv().await,
            _ => self.consumer.recv().await,
        };
        Ok(ConsumedMessage::new(priority, &received?))
    }

    /// Commits `offset`: everything below it is processed, and the partition's next owner begins
    /// there. Does nothing if the partition was revoked.
    ///
    /// The commit is asynchronous. During a rebalance the group may reject it without an error
    /// here. So a second later the consumer checks the committed offsets and commits again:
    /// otherwise the last order of a quiet partition would count as lag for ever.
    pub fn commit_offset(&self, partition: OrderPartition, offset: i64) {
        let owned = self.consumer.context().assignment().mark_processed(partition, offset);
        if owned {
            self.commit_async(partition, offset);
        }
    }

    fn commit_async(&self, partition: OrderPartition, offset: i64) {
        let mut offsets = TopicPartitionList::new();
        let topic = self.topics.of(partition.priority);
        let committed = offsets
            .add_partition_offset(topic, partition.number, Offset::Offset(offset))
            .and_then(|()| self.consumer.commit(&offsets, CommitMode::Async));
        if let Err(why) = committed {
            self.causes.warn("an offset could not be committed", &why);
        }
    }

    /// Reads the group's committed offsets, and commits again those that it does not have.
    ///
    /// An offset beyond the end of the log is not one of them: the topic was deleted and made again,
    /// and its first messages would be skipped.
    async fn check_commits(&self) {
        let processed = {
            let mut assignment = self.consumer.context().assignment();
            assignment.begin_commit_check();
            assignment.processed()
        };
        if processed.is_empty() {
            return;
        }
        let (consumer, topics) = (Arc::clone(&self.consumer), self.topics.clone());
        let settled = tokio::task::spawn_blocking(move || {
            let mut partitions = TopicPartitionList::new();
            for partition in processed.keys() {
                partitions.add_partition(topics.of(partition.priority), partition.number);
            }
            let committed = consumer.committed_offsets(partitions, REQUEST_TIMEOUT)?;
            let mut settled = BTreeMap::new();
            for (partition, processed) in processed {
                let (topic, number) = (topics.of(partition.priority), partition.number);
                let committed = committed
                    .find_partition(topic, number)
                    .map(|committed| committed.offset());
                let has_it = matches!(committed, Some(Offset::Offset(offset)) if offset >= processed);
                if has_it || consumer.fetch_watermarks(topic, number, REQUEST_TIMEOUT)?.1 < processed {
                    settled.insert(partition, processed);
                }
            }
            KafkaResult::Ok(settled)
        });
        let settled = match settled.await {
            Ok(Ok(settled)) => settled,
            // The broker is away, or the process is shutting down.
            _ => BTreeMap::new(),
        };
        // Read again: meanwhile a partition may have been revoked, or more may have been processed.
        let mut missing = self.consumer.context().assignment().processed();
        missing.retain(|partition, offset| settled.get(partition) != Some(&*offset));
        for (partition, offset) in missing {
            self.commit_offset(partition, offset);
        }
    }

    /// After `delay`, seeks each partition back to its offset, so that the messages from there on
    /// are delivered again. Skips partitions that were revoked.
    pub async fn seek_back(&self, offsets: BTreeMap<OrderPartition, i64>, delay: Duration, stop: &CancellationToken) {
        stop.run_until_cancelled(sleep(delay)).await;
        for (partition, offset) in offsets {
            // A partition's next owner begins at the committed offset. As long as this consumer
            // owns the partition, the seek must succeed: to continue at the current position would
            // skip these messages.
            while !stop.is_cancelled()
                && self.owns(partition)
                && let Err(why) = self.seek(partition, offset).await
            {
                self.causes
                    .warn("seeking back failed and will be retried", why.as_ref());
                sleep(SEEK_RETRY_DELAY).await;
            }
        }
    }

    // ANCHOR: pause_until
    /// Pauses all partitions until `resumed` ends, and then seeks back as
    /// [`seek_back`](Self::seek_back) does. Polls meanwhile: the consumer stays in the group, and
    /// holds up no rebalance.
    pub async fn pause_until(
        &self,
        mut offsets: BTreeMap<OrderPartition, i64>,
        resumed: impl Future<Output = ()>,
        stop: &CancellationToken,
    ) {
        let mut resumed = pin!(resumed);
        let mut paused: BTreeSet<i32> = BTreeSet::new();
        loop {
            let owned = self.pause();
            paused.extend(&owned);
            offsets.retain(|partition, _| owned.contains(&partition.number));
            tokio::select! {
                biased;
                () = &mut resumed => break,
                polled = self.next_message(stop) => match polled {
                    // The first message of a partition that was assigned meanwhile.
                    Some(message) => offsets.entry(message.partition).or_insert(message.offset),
                    None => return,
                },
            };
        }
        // Also those that were revoked meanwhile: a client that is assigned one of them again would
        // find it paused, and nothing would resume it.
        let result = self.consumer.resume(&self.partitions(&paused));
        if let Err(why) = result {
            self.causes.warn("partitions could not be resumed", &why);
        }
        self.vips.iter().for_each(|vips| vips.resume(&paused));
        // Now and not before: the seek also wakes the client, which may be idle for up to a second.
        self.seek_back(offsets, Duration::ZERO, stop).await;
    }
    // ANCHOR_END: pause_until

    /// Pauses the partitions that this consumer owns, and returns them.
    fn pause(&self) -> BTreeSet<i32> {
        let owned = self.consumer.context().assignment().owned();
        // Only a partition that was just revoked cannot be paused.
        if let Err(why) = self.consumer.pause(&self.partitions(&owned)) {
            self.causes.warn("partitions could not be paused", &why);
        }
        self.vips.iter().for_each(|vips| vips.pause(&owned));
        owned
    }

    fn partitions(&self, numbers: &BTreeSet<i32>) -> TopicPartitionList {
        let mut partitions = TopicPartitionList::new();
        for &number in numbers {
            partitions.add_partition(self.topics.of(Priority::Normal), number);
        }
        partitions
    }

    fn owns(&self, partition: OrderPartition) -> bool {
        self.consumer.context().assignment().owns(partition)
    }

    async fn seek(&self, partition: OrderPartition, offset: i64) -> anyhow::Result<()> {
        let (consumer, vips) = (Arc::clone(&self.consumer), self.vips.clone());
        let topic = self.topics.of(partition.priority).to_owned();
        let seek = move || match vips.filter(|_| partition.priority == Priority::Vip) {
            Some(vips) => vips
                .consumer
                .seek(&topic, partition.number, Offset::Offset(offset), SEEK_TIMEOUT),
            None => consumer.seek(&topic, partition.number, Offset::Offset(offset), SEEK_TIMEOUT),
        };
        tokio::task::spawn_blocking(seek).await??;
        self.consumer.context().assignment().mark_rewound(partition, offset);
        Ok(())
    }

    /// Whether the consumer has just seeked back to this offset: the next message is the first that
    /// the partition still holds from there on.
    pub fn has_rewound_to(&self, partition: OrderPartition, offset: i64) -> bool {
        self.consumer.context().assignment().has_rewound_to(partition, offset)
    }

    /// The offset of the oldest message that a partition still holds.
    ///
    /// # Errors
    /// [`Indeterminate::BackendAway`] if the broker does not answer.
    pub async fn log_start_offset(&self, partition: OrderPartition) -> Result<i64, Indeterminate> {
        let consumer = Arc::clone(&self.consumer);
        let topic = self.topics.of(partition.priority).to_owned();
        let watermarks =
            tokio::task::spawn_blocking(move || consumer.fetch_watermarks(&topic, partition.number, REQUEST_TIMEOUT));
        match watermarks.await {
            Ok(Ok((start, _))) => Ok(start),
            Ok(Err(why)) => Err(Indeterminate::BackendAway(why.into())),
            Err(why) => Err(Indeterminate::BackendAway(why.into())),
        }
    }

    /// Leaves the group, so that its partitions are reassigned at once.
    pub async fn close(self) {
        // Dropping a consumer blocks until the group answers, and must not block a runtime thread.
        let (consumer, vips) = (self.consumer, self.vips);
        let left = tokio::task::spawn_blocking(move || {
            consumer.unsubscribe();
            drop(consumer);
            drop(vips);
        });
        if tokio::time::timeout(LEAVE_TIMEOUT, left).await.is_err() {
            tracing::warn!("leaving the group timed out; its partitions are reassigned after the session timeout");
        }
    }
}
