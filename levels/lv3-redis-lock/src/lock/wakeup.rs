//! Messages about locks that were given back.
//!
//! One connection for all of them, as Redis takes no other commands on a connection that listens. A channel is listened to while somebody
//! of this process waits for its lock, and no longer. If the connection breaks, messages are lost: every listener is woken when it
//! stands again, to look for itself.

use std::{
    collections::{HashMap, HashSet},
    io,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use futures_util::StreamExt;
use redis::{Client, RedisResult, aio::PubSubSink, aio::PubSubStream};
use tokio::{
    sync::{mpsc, watch},
    time::{interval_at, timeout},
};

use super::COMMAND_TIMEOUT;

/// How long to leave Redis alone after it could not be reached: longer each time, up to the second one.
const RECONNECT_AFTER: [Duration; 2] = [Duration::from_millis(50), Duration::from_secs(1)];

/// How often to ask whether the connection is still one. Nothing comes on it as long as nobody gives a lock back: so silence tells nothing.
const ASK_EVERY: Duration = Duration::from_secs(2);

/// All listening of this process.
#[derive(Clone)]
pub(super) struct Wakeups {
    channels: Arc<Channels>,
    changed: mpsc::UnboundedSender<()>,
}

/// For each channel that somebody listens to, a count that grows with every message, and with every new subscription.
#[derive(Default)]
struct Channels(Mutex<HashMap<String, watch::Sender<u64>>>);

/// Listens to the releases of one lock.
pub struct Releases {
    messages: watch::Receiver<u64>,
    /// Told when this one listens no more: so it has to go after the messages.
    _leaving: Leaving,
}

struct Leaving(mpsc::UnboundedSender<()>);

impl Drop for Leaving {
    fn drop(&mut self) {
        let _ = self.0.send(());
    }
}

impl Wakeups {
    pub(super) fn new(client: Client) -> Self {
        let channels = Arc::<Channels>::default();
        let (changed, changes) = mpsc::unbounded_channel();
        // Ends when the last sender is gone.
        tokio::spawn(listen(client, channels.clone(), changes));
        Self { channels, changed }
    }

    /// Begins to listen to a channel.
    pub(super) fn listen(&self, channel: String) -> Releases {
        let messages = {
            let mut channels = self.channels.lock();
            let sender = channels.entry(channel).or_insert_with(|| watch::Sender::new(0));
            sender.subscribe()
        };
        let _ = self.changed.send(());
        Releases {
            messages,
            _leaving: Leaving(self.changed.clone()),
        }
    }
}

impl Releases {
    /// Ends with the next message; and when Redis begins to listen, or does so again after messages may have been lost: time to look.
    pub async fn next(&mut self) {
        let _ = self.messages.changed().await;
    }
}

impl Channels {
    fn lock(&self) -> MutexGuard<'_, HashMap<String, watch::Sender<u64>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Those that nobody listens to any more are forgotten.
    fn listened_to(&self) -> MutexGuard<'_, HashMap<String, watch::Sender<u64>>> {
        let mut channels = self.lock();
        channels.retain(|_, sender| sender.receiver_count() > 0);
        channels
    }

    fn are_listened_to(&self) -> bool {
        !self.listened_to().is_empty()
    }
}

/// Keeps the subscriptions as the listeners want them, over one connection after another.
async fn listen(client: Client, channels: Arc<Channels>, mut changes: mpsc::UnboundedReceiver<()>) {
    let [shortest, longest] = RECONNECT_AFTER;
    while changes.recv().await.is_some() {
        let mut pause = shortest;
        while channels.are_listened_to() {
            match in_time(client.get_async_pubsub()).await {
                Ok(connection) => {
                    pause = shortest;
                    let (mut sink, mut stream) = connection.split();
                    if let Err(why) = serve(&mut sink, &mut stream, &channels, &mut changes).await {
                        tracing::warn!(%why, "messages about locks may have been lost");
                    }
                }
                Err(why) => tracing::warn!(%why, "nobody can tell of locks that were given back"),
            }
            if changes.is_closed() {
                return;
            }
            // A new connection subscribes anew: until then nobody's subscription is there.
            tokio::time::sleep(pause).await;
            pause = longest.min(pause * 2);
        }
    }
}

/// One connection, until it breaks or nobody is left.
async fn serve(
    sink: &mut PubSubSink,
    stream: &mut PubSubStream,
    channels: &Channels,
    changes: &mut mpsc::UnboundedReceiver<()>,
) -> RedisResult<()> {
    let mut subscribed: HashSet<String> = HashSet::new();
    let mut asking = interval_at((Instant::now() + ASK_EVERY).into(), ASK_EVERY);
    loop {
        let (missing, unused) = compare(channels, &subscribed);
        for channel in missing {
            in_time(sink.subscribe(&channel)).await?;
            wake(channels, &channel);
            subscribed.insert(channel);
        }
        for channel in unused {
            in_time(sink.unsubscribe(&channel)).await?;
            subscribed.remove(&channel);
            // Somebody may have begun to listen in the meantime; then it is subscribed anew, in the next round.
        }
        tokio::select! {
            message = stream.next() => match message {
                Some(message) => wake(channels, message.get_channel_name()),
                None => return Ok(()),
            },
            change = changes.recv() => if change.is_none() {
                return Ok(());
            },
            _ = asking.tick() => in_time(sink.ping()).await?,
        }
    }
}

/// A connection that answers nothing is none.
async fn in_time<T>(answer: impl Future<Output = RedisResult<T>>) -> RedisResult<T> {
    let in_time = timeout(COMMAND_TIMEOUT, answer).await;
    in_time.unwrap_or_else(|_| Err(io::Error::from(io::ErrorKind::TimedOut).into()))
}

/// The channels that are listened to and not subscribed, and the other way round.
fn compare(channels: &Channels, subscribed: &HashSet<String>) -> (Vec<String>, Vec<String>) {
    let wanted = channels.listened_to();
    let missing = wanted.keys().filter(|channel| !subscribed.contains(*channel));
    let unused = subscribed.iter().filter(|channel| !wanted.contains_key(*channel));
    (missing.cloned().collect(), unused.cloned().collect())
}

fn wake(channels: &Channels, channel: &str) {
    if let Some(sender) = channels.lock().get(channel) {
        sender.send_modify(|count| *count += 1);
    }
}
