//! LV.3: the behaviour of the locks in Redis, one behaviour per test, through their public
//! interface and through a separate connection to the same Redis.
//!
//! "A process" here is a lock with its own connections: two of them share only Redis. Tests that
//! need real processes start this program again. Lower time bounds are exact; an upper bound only
//! tells "at once" from "at the next expiry".
//!
//! Features of other distributed locks that these lack, so there is no test of them:
//! 1. multi-locks, acquired all or nothing: a lock here has one name;
//! 2. deadlock between two owners of two names: for the same reason;
//! 3. a deadlock error from a lock that is not reentrant: `spin` rejects its own owner like any
//!    other. That is tested;
//! 4. fairness among processes: there is none, but for the order of the tasks of one process, and
//!    that a process with an endless queue does not starve others. Both are tested;
//! 5. stale entries of waiters that gave up: there is no queue in Redis. That nothing is left is
//!    tested;
//! 6. the delay caused by a dead waiter: for the same reason; its subscription ends with its
//!    connection;
//! 7. a queued waiter during an outage of Redis: for the same reason. That a wait ends with an
//!    error is tested;
//! 8. acquisitions confirmed by replicas: there is one server, without replicas;
//! 9. quorums of several servers: there is one;
//! 10. an error for releasing a lock that was never acquired: only a guard releases, and only an
//!     acquisition returns one;
//! 11. a lease of zero or less that means "renewed": renewal is a variant of `Lease`, and a lease
//!     of zero is rejected;
//! 12. a cluster: the connections here are to a single server. That the keys share a hash tag is
//!     tested;
//! 13. the rejection of a stale token: that is the row's task. `faults` tests it with the strategy
//!     `fenced`.

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
    backends::{self, Prefix, Redis, reaper},
    proxy::{Fault, Proxy},
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

/// One lock, as one process has it.
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

    /// Acquires a lock that is free.
    async fn take(&self, name: &str) -> Guard {
        self.try_acquire(name, &Owner::fresh())
            .await
            .unwrap()
            .expect("the lock is free")
    }

    /// Whether another owner is rejected.
    async fn rejects_others(&self, name: &str) -> bool {
        self.try_acquire(name, &Owner::fresh()).await.unwrap().is_none()
    }

    /// Starts a waiter in a task. The task returns the guard and the time of the acquisition.
    fn spawn_waiter(&self, name: &str, wait: Duration) -> JoinHandle<Result<(Guard, Instant), LockError>> {
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
struct LockEnvironment {
    url: String,
    prefix: String,
    raw: MultiplexedConnection,
    /// Deletes its keys on drop.
    _prefix: Option<Prefix>,
    _server: Option<Arc<Redis>>,
}

impl LockEnvironment {
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

    /// A private Redis that the test may stop and whose connections it may count and cut.
    async fn on(server: &Redis) -> Self {
        Self {
            url: server.url().to_owned(),
            prefix: "test:".to_owned(),
            raw: raw(server.url()).await,
            _prefix: None,
            _server: None,
        }
    }

    /// A lock with its own connections, like another process.
    async fn lock(&self, kind: Kind, lease: Lease) -> Lock {
        Lock::open(&self.url, &self.prefix, kind, lease).await
    }

    async fn command<T: FromRedisValue>(&self, words: &[&str]) -> T {
        let mut command = redis::cmd(words[0]);
        command.arg(&words[1..]);
        command.query_async(&mut self.raw.clone()).await.unwrap()
    }

    /// The TTL in milliseconds; -1 for a key without a TTL, -2 for no key.
    async fn pttl(&self, key: &str) -> i64 {
        self.command(&["PTTL", key]).await
    }

    /// The number of connections that subscribe to the releases of this lock.
    async fn listeners(&self, key: &str) -> i64 {
        let (_, listeners): (String, i64) = self.command(&["PUBSUB", "NUMSUB", &format!("{key}:released")]).await;
        listeners
    }

    /// Records every command that Redis runs from here on.
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
    /// The commands so far that contain this text.
    async fn about(&self, env: &LockEnvironment, text: &str) -> Vec<String> {
        let mark = Owner::fresh();
        let _: String = env.command(&["ECHO", mark.as_str()]).await;
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

    /// The commands about a lock that clients sent, one per round trip.
    async fn calls(&self, env: &LockEnvironment, key: &str) -> Vec<String> {
        let mut lines = self.about(env, &format!("\"{key}\"")).await;
        lines.retain(|line| !line.contains(" lua]"));
        lines
    }
}

/// Polls until the condition holds.
async fn eventually(what: &str, mut is_so: impl AsyncFnMut() -> bool) {
    const PATIENCE: Duration = Duration::from_secs(10);
    let began = Instant::now();
    while !is_so().await {
        assert!(began.elapsed() < PATIENCE, "{what}: not within {PATIENCE:?}");
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
}

/// Waits until this process knows that the lock is lost: within its lease and some more.
async fn lost(guard: &Guard) {
    let noticed = tokio::time::timeout(LONG_WAIT, guard.lost()).await;
    noticed.expect("the loss of a lock is noticed");
}

const fn ms(time: u64) -> Duration {
    Duration::from_millis(time)
}

/// A lease longer than any test.
const LONG: Lease = Lease::Fixed(ms(20_000));

/// A lease whose expiry the test waits for.
const SHORT: Lease = Lease::Fixed(ms(500));

/// A lease with time to act before its expiry.
const MEDIUM: Lease = Lease::Fixed(ms(3_000));
const RENEWED: Lease = Lease::Renewed(ms(2_000));

/// Longer than the renewed lease: without a renewal it would have expired.
const PAST_RENEWED_LEASE: Duration = ms(2_500);

/// Longer than any wait should take.
const LONG_WAIT: Duration = ms(15_000);

/// "At once", where the alternative is the expiry of a long lease.
const AT_ONCE: Duration = ms(1_500);

/// Redis counts in whole milliseconds.
const REDIS_TICK: Duration = ms(2);

/// Polls a future this many times and drops it. Returns whether it completed.
async fn dropped_after<T>(polls: usize, future: impl Future<Output = T>) -> bool {
    let mut future = Box::pin(future);
    for _ in 0..polls {
        if poll_fn(|context| Poll::Ready(future.as_mut().poll(context)))
            .await
            .is_ready()
        {
            return true;
        }
        // Lets other tasks make progress.
        tokio::time::sleep(ms(1)).await;
    }
    false
}

/// An environment whose locks reach Redis through a proxy.
async fn behind_a_proxy(server: &Redis) -> (LockEnvironment, Proxy) {
    let proxy = Proxy::before(server.report().address.clone()).await.unwrap();
    let mut env = LockEnvironment::on(server).await;
    env.url = env
        .url
        .replace(&server.report().address, &format!("127.0.0.1:{}", proxy.port()));
    (env, proxy)
}
