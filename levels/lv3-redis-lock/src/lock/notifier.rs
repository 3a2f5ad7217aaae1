//! Notifications of released locks, by Redis pub/sub.
//!
//! All subscriptions of a process share one connection, because a connection that subscribes takes
//! no other commands. A channel is subscribed while a task of this process waits for its lock, and
//! no longer. Messages are lost while the connection is down: after a reconnect every subscriber is
//! woken and has to check its lock.

use std::{
    collections::{HashMap, HashSet},
    io,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use box_office::CauseLog;
use futures_util::StreamExt;
use redis::{Client, RedisError, RedisResult, aio::PubSubSink, aio::PubSubStream};
use tokio::{
    sync::{mpsc, watch},
    time::{interval_at, timeout},
};

use super::COMMAND_TIMEOUT;

/// The shortest and the longest pause before a reconnect; the pause doubles in between.
const RECONNECT_PAUSES: [Duration; 2] = [Duration::from_millis(50), Duration::from_secs(1)];

/// How long a new subscription may take, if the notifier is just pausing before a reconnect.
pub(super) const SUBSCRIBE_TIMEOUT: Duration = Duration::from_millis(1_500);

/// How often to ping. Nothing arrives while no lock is released, so silence does not tell a quiet
/// connection from a dead one.
const PING_INTERVAL: Duration = Duration::from_secs(2);

/// All subscriptions of this process.
#[derive(Clone)]
pub(super) struct ReleaseNotifier {
    channels: Arc<Channels>,
    changed: mpsc::UnboundedSender<()>,
}

/// What the notifier's users and its task share.
#[derive(Default)]
struct Channels {
    /// A counter for each wanted channel: incremented by each message and by each new subscription.
    counters: Mutex<HashMap<String, watch::Sender<u64>>>,
    /// Why the last connection failed, until one subscribes again.
    last_error: Mutex<Option<RedisError>>,
}

/// A subscription to the releases of one lock.
pub struct ReleaseSubscription {
    messages: watch::Receiver<u64>,
    /// Reports the end of this subscription. Declared after `messages`, so it is dropped after it.
    _on_drop: ReportChange,
}

struct ReportChange(mpsc::UnboundedSender<()>);

impl Drop for ReportChange {
    fn drop(&mut self) {
        let _ = self.0.send(());
    }
}

impl ReleaseNotifier {
    pub(super) fn new(client: Client, causes: CauseLog) -> Self {
        let channels = Arc::<Channels>::default();
        let (changed, changes) = mpsc::unbounded_channel();
        // Ends when the last sender is dropped.
        tokio::spawn(keep_subscribed(client, channels.clone(), changes, causes));
        Self { channels, changed }
    }

    /// Subscribes to a channel.
    pub(super) fn subscribe(&self, channel: String) -> ReleaseSubscription {
        let messages = {
            let mut channels = self.channels.lock();
            let sender = channels.entry(channel).or_insert_with(|| watch::Sender::new(0));
            sender.subscribe()
        };
        let _ = self.changed.send(());
        ReleaseSubscription {
            messages,
            _on_drop: ReportChange(self.changed.clone()),
        }
    }

    /// Why no channel is subscribed, if the last attempt has failed.
    pub(super) fn last_error(&self) -> Option<RedisError> {
        self.channels.last_error().clone()
    }
}

impl ReleaseSubscription {
    /// Waits for the next message, or for a new subscription in Redis, before which messages may
    /// have been lost. Either way the caller has to check the lock.
    pub async fn notified(&mut self) {
        let _ = self.messages.changed().await;
    }
}

impl Channels {
    fn lock(&self) -> MutexGuard<'_, HashMap<String, watch::Sender<u64>>> {
        self.counters.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn last_error(&self) -> MutexGuard<'_, Option<RedisError>> {
        self.last_error.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The channels that have subscribers; all others are removed.
    fn wanted(&self) -> MutexGuard<'_, HashMap<String, watch::Sender<u64>>> {
        let mut channels = self.lock();
        channels.retain(|_, sender| sender.receiver_count() > 0);
        channels
    }

    fn any_wanted(&self) -> bool {
        !self.wanted().is_empty()
    }
}

/// Keeps a connection while there are subscribers, and reconnects when it breaks.
async fn keep_subscribed(
    client: Client,
    channels: Arc<Channels>,
    mut changes: mpsc::UnboundedReceiver<()>,
    causes: CauseLog,
) {
    let [shortest, longest] = RECONNECT_PAUSES;
    while changes.recv().await.is_some() {
        let mut pause = shortest;
        while channels.any_wanted() {
            match with_timeout(client.get_async_pubsub()).await {
                Ok(connection) => {
                    pause = shortest;
                    let (mut sink, mut stream) = connection.split();
                    if let Err(why) = serve(&mut sink, &mut stream, &channels, &mut changes).await {
                        causes.warn("release messages may have been lost", &why);
                        *channels.last_error() = Some(why);
                    }
                }
                Err(why) => {
                    causes.warn("no connection for release messages", &why);
                    *channels.last_error() = Some(why);
                }
            }
            if changes.is_closed() {
                return;
            }
            // The next connection starts without subscriptions.
            tokio::time::sleep(pause).await;
            pause = longest.min(pause * 2);
        }
    }
}

/// Serves one connection, until it breaks or the notifier and all subscribers are dropped.
async fn serve(
    sink: &mut PubSubSink,
    stream: &mut PubSubStream,
    channels: &Channels,
    changes: &mut mpsc::UnboundedReceiver<()>,
) -> RedisResult<()> {
    let mut subscribed: HashSet<String> = HashSet::new();
    let mut pings = interval_at((Instant::now() + PING_INTERVAL).into(), PING_INTERVAL);
    loop {
        let (missing, unused) = diff(channels, &subscribed);
        for channel in missing {
            with_timeout(sink.subscribe(&channel)).await?;
            *channels.last_error() = None;
            wake(channels, &channel);
            subscribed.insert(channel);
        }
        for channel in unused {
            with_timeout(sink.unsubscribe(&channel)).await?;
            subscribed.remove(&channel);
            // A subscriber may have come in the meantime; the next round subscribes again.
        }
        tokio::select! {
            message = stream.next() => match message {
                Some(message) => wake(channels, message.get_channel_name()),
                None => return Ok(()),
            },
            change = changes.recv() => if change.is_none() {
                return Ok(());
            },
            _ = pings.tick() => with_timeout(sink.ping()).await?,
        }
    }
}

/// Limits an answer of Redis to [`COMMAND_TIMEOUT`].
async fn with_timeout<T>(answer: impl Future<Output = RedisResult<T>>) -> RedisResult<T> {
    let answered = timeout(COMMAND_TIMEOUT, answer).await;
    answered.unwrap_or_else(|_| Err(io::Error::from(io::ErrorKind::TimedOut).into()))
}

/// The channels that are wanted and not subscribed, and those subscribed and no longer wanted.
fn diff(channels: &Channels, subscribed: &HashSet<String>) -> (Vec<String>, Vec<String>) {
    let wanted = channels.wanted();
    let missing = wanted.keys().filter(|channel| !subscribed.contains(*channel));
    let unused = subscribed.iter().filter(|channel| !wanted.contains_key(*channel));
    (missing.cloned().collect(), unused.cloned().collect())
}

fn wake(channels: &Channels, channel: &str) {
    if let Some(sender) = channels.lock().get(channel) {
        sender.send_modify(|count| *count += 1);
    }
}
