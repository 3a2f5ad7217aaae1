//! LV.3: what a lock in Redis has to do, one behaviour a test, seen from outside: through what the lock offers, and on a connection of the
//! test's own to the same Redis.
//!
//! "A process" is here a lock with connections of its own: no two of them share anything but Redis. Where it matters that it is one,
//! this program starts itself again. Times have exact lower bounds; an upper one only tells "at once" from "at the next end of a lease".
//!
//! Behaviours of such locks that these do not have, and why there is no test of them:
//! 1. several names taken as one lock, all or nothing: a lock here has one name;
//! 2. two owners who take the same two names in opposite orders: for the same reason;
//! 3. "would deadlock" from a lock that is not reentrant: `spin` finds its own owner's lock taken, as it does anybody's. That is tested;
//! 4. order among processes, also when every turn ends by its lease: none of these locks is fair, but for the tasks of one process, and that
//!    a process whose queue never ends lets others in. Both are tested;
//! 5. a fair lock's waiter that gave up delays nobody: there is no queue in Redis that it could be left in. That nothing of it is left is tested;
//! 6. the time a fair lock's dead waiter may cost: for the same reason. A dead one is a connection that listens no more;
//! 7. a fair lock's waiter for whom Redis stops answering: for the same reason. That a wait ends with an error is tested;
//! 8. a hold that counts only once a replica has it: there is one server, without replicas;
//! 9. a majority of servers: there is one;
//! 10. a refusal for somebody who gives back a lock he never had: only a guard gives back, and only who took the lock has one;
//! 11. a lease of zero or less that means "renewed": whether a lease is renewed is a type of its own, and one of nothing is refused;
//! 12. keys of one slot on a server that is a cluster: the connections here are to a single server. That the keys share a tag is tested;
//! 13. a write that a newer token shuts out: the row refuses it, not the lock. `faults` tests it with the strategy `fenced`.

mod acquire;
mod cancellation;
mod keys;
mod leases;
mod outages;
mod processes;
mod release;
mod tokens;
mod waiting;

use std::{
    future::poll_fn,
    os::unix::process::ExitStatusExt,
    process::Stdio,
    sync::{
        Arc, Mutex,
        atomic::{AtomicU32, Ordering::Relaxed},
    },
    task::{Context, Poll, Waker},
    time::{Duration, Instant},
};

use futures_util::StreamExt;

use harness::{
    backends::{self, Prefix, Redis, keeper},
    proxy::{Cut, Proxy},
};

use lv3_redis_lock::lock::{
    Backoff, Connections, FencingTokens, Guard, Lease, LockError, MAX_LOCAL_HANDOFFS, Owner, RLock, Released, SpinLock,
};

use rand::{RngExt, SeedableRng, rngs::StdRng};
use redis::{Client, FromRedisValue, aio::MultiplexedConnection};
use rstest::rstest;
use tokio::task::{AbortHandle, JoinHandle};

/// The locks of this level.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Rlock,
    Fenced,
    Spin,
}

/// One of them, as one process has it.
#[derive(Clone)]
enum Lock {
    Reentrant(Arc<RLock>),
    Spin(Arc<SpinLock>),
}

use Kind::{Fenced, Rlock, Spin};

impl Lock {
    async fn open(url: &str, prefix: &str, kind: Kind, lease: Lease) -> Self {
        let connections = Connections::open(url, prefix).await.unwrap();
        match kind {
            Rlock => Self::Reentrant(Arc::new(RLock::new(connections, lease, FencingTokens::None).unwrap())),
            Fenced => Self::Reentrant(Arc::new(
                RLock::new(connections, lease, FencingTokens::Monotonic).unwrap(),
            )),
            Spin => Self::Spin(Arc::new(SpinLock::new(connections, lease, Backoff::default()).unwrap())),
        }
    }

    async fn try_acquire(&self, name: &str, owner: &Owner) -> Result<Option<Guard>, LockError> {
        match self {
            Self::Reentrant(lock) => lock.try_acquire(name, owner).await,
            Self::Spin(lock) => lock.try_acquire(name, owner).await,
        }
    }

    async fn acquire(&self, name: &str, owner: &Owner, wait: Duration) -> Result<Guard, LockError> {
        match self {
            Self::Reentrant(lock) => lock.acquire(name, owner, wait).await,
            Self::Spin(lock) => lock.acquire(name, owner, wait).await,
        }
    }

    /// Takes a lock that is free.
    async fn take(&self, name: &str) -> Guard {
        self.try_acquire(name, &Owner::fresh())
            .await
            .unwrap()
            .expect("the lock is free")
    }

    /// Whether somebody else than its holder finds it taken.
    async fn refuses(&self, name: &str) -> bool {
        self.try_acquire(name, &Owner::fresh()).await.unwrap().is_none()
    }

    /// Somebody waits for it from here on, in a task of its own. Tells when it got in.
    fn waits(&self, name: &str, wait: Duration) -> JoinHandle<Result<(Guard, Instant), LockError>> {
        let (lock, name) = (self.clone(), name.to_owned());
        tokio::spawn(async move {
            let guard = lock.acquire(&name, &Owner::fresh(), wait).await?;
            Ok((guard, Instant::now()))
        })
    }

    fn connections(&self) -> &Connections {
        match self {
            Self::Reentrant(lock) => lock.connections(),
            Self::Spin(lock) => lock.connections(),
        }
    }

    fn key(&self, name: &str) -> String {
        self.connections().key(name)
    }

    fn reentrant(&self) -> &RLock {
        match self {
            Self::Reentrant(lock) => lock,
            Self::Spin(_) => panic!("spin does not offer that"),
        }
    }
}

/// A Redis, and a connection to it that no lock uses.
struct Ground {
    url: String,
    prefix: String,
    raw: MultiplexedConnection,
    /// The keys go when this is dropped.
    _prefix: Option<Prefix>,
    _server: Option<Arc<Redis>>,
}

impl Ground {
    /// The Redis that all tests share.
    async fn shared() -> Self {
        let server = backends::redis().await.unwrap();
        let prefix = server.prefix();
        Self {
            url: server.url().to_owned(),
            prefix: prefix.to_string(),
            raw: raw(server.url()).await,
            _prefix: Some(prefix),
            _server: Some(server),
        }
    }

    /// One that this test may count on, cut and stop.
    async fn on(server: &Redis) -> Self {
        Self {
            url: server.url().to_owned(),
            prefix: "test:".to_owned(),
            raw: raw(server.url()).await,
            _prefix: None,
            _server: None,
        }
    }

    /// A lock as a process of its own has it.
    async fn lock(&self, kind: Kind, lease: Lease) -> Lock {
        Lock::open(&self.url, &self.prefix, kind, lease).await
    }

    async fn ask<T: FromRedisValue>(&self, words: &[&str]) -> T {
        let mut command = redis::cmd(words[0]);
        command.arg(&words[1..]);
        command.query_async(&mut self.raw.clone()).await.unwrap()
    }

    /// Milliseconds; -1 for a key without an end, -2 for none.
    async fn pttl(&self, key: &str) -> i64 {
        self.ask(&["PTTL", key]).await
    }

    /// How many connections listen to the releases of this lock.
    async fn listeners(&self, key: &str) -> i64 {
        let (_, listeners): (String, i64) = self.ask(&["PUBSUB", "NUMSUB", &format!("{key}:released")]).await;
        listeners
    }

    /// Every command that Redis carries out from here on.
    async fn monitor(&self) -> Monitor {
        let monitor = Client::open(self.url.as_str())
            .unwrap()
            .get_async_monitor()
            .await
            .unwrap();
        let lines = Arc::<Mutex<Vec<String>>>::default();
        let seen = lines.clone();
        let task = tokio::spawn(async move {
            let mut messages = Box::pin(monitor.into_on_message::<String>());
            while let Some(line) = messages.next().await {
                seen.lock().unwrap().push(line);
            }
        });
        Monitor {
            lines,
            task: task.abort_handle(),
        }
    }
}

async fn raw(url: &str) -> MultiplexedConnection {
    Client::open(url)
        .unwrap()
        .get_multiplexed_async_connection()
        .await
        .unwrap()
}

struct Monitor {
    lines: Arc<Mutex<Vec<String>>>,
    task: AbortHandle,
}

impl Drop for Monitor {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Monitor {
    /// All that was carried out so far and has to do with this text.
    async fn about(&self, ground: &Ground, text: &str) -> Vec<String> {
        let mark = Owner::fresh();
        let _: String = ground.ask(&["ECHO", mark.as_str()]).await;
        eventually("the monitor sees what was sent", async || {
            self.lines
                .lock()
                .unwrap()
                .iter()
                .any(|line| line.contains(mark.as_str()))
        })
        .await;
        let lines = self.lines.lock().unwrap();
        lines.iter().filter(|line| line.contains(text)).cloned().collect()
    }

    /// What clients sent about a lock, one line a round trip.
    async fn calls(&self, ground: &Ground, key: &str) -> Vec<String> {
        let mut lines = self.about(ground, &format!("\"{key}\"")).await;
        lines.retain(|line| !line.contains(" lua]"));
        lines
    }
}

/// Looks again and again until it is so.
async fn eventually(what: &str, mut is_so: impl AsyncFnMut() -> bool) {
    const PATIENCE: Duration = Duration::from_secs(10);
    let began = Instant::now();
    while !is_so().await {
        assert!(began.elapsed() < PATIENCE, "{what}: not within {PATIENCE:?}");
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
}

const fn ms(time: u64) -> Duration {
    Duration::from_millis(time)
}

/// A lease that no test lives to see the end of.
const LONG: Lease = Lease::Fixed(ms(20_000));

/// One whose end is what a test is about.
const SHORT: Lease = Lease::Fixed(ms(500));

/// One in which there is time to do something.
const MIDDLING: Lease = Lease::Fixed(ms(3_000));
const RENEWED: Lease = Lease::Renewed(ms(2_000));

/// More than one lease of those that are renewed: it would have ended.
const OVER: Duration = ms(2_500);

/// Longer than any wait here has to be.
const PATIENT: Duration = ms(15_000);

/// What counts as "at once" where the alternative is the end of a long lease.
const PROMPTLY: Duration = ms(1_500);

/// Redis counts in whole milliseconds.
const A_TICK: Duration = ms(2);

/// Polls a future so often, and drops it. Whether it was done by then.
async fn dropped_after<T>(polls: usize, future: impl Future<Output = T>) -> bool {
    let mut future = Box::pin(future);
    for _ in 0..polls {
        if poll_fn(|context| Poll::Ready(future.as_mut().poll(context)))
            .await
            .is_ready()
        {
            return true;
        }
        // What it waits for comes from another task.
        tokio::time::sleep(ms(1)).await;
    }
    false
}

/// A ground whose locks reach Redis through a proxy.
async fn behind_a_proxy(server: &Redis) -> (Ground, Proxy) {
    let proxy = Proxy::before(server.report().address.clone()).await.unwrap();
    let mut ground = Ground::on(server).await;
    ground.url = ground
        .url
        .replace(&server.report().address, &format!("127.0.0.1:{}", proxy.port()));
    (ground, proxy)
}
