//! LV.3: what a lock in Redis has to do, one behaviour a test, seen from outside: through what the lock offers, and on a connection of the
//! test's own to the same Redis.
//!
//! "A process" is here a lock with connections of its own: no two of them share anything but Redis. Where it matters that it is one,
//! this program starts itself again. Times have exact lower bounds; an upper one only tells "at once" from "at the next end of a lease".
//!
//! What does not apply to these locks, and is not tested:
//! - several names taken as one lock, all or nothing, in any order: a lock here has one name;
//! - order among processes (first come, first served; a waiter that gave up, died or was cut off delays nobody): none of them is fair.
//!   Within a process they are, and that is tested;
//! - "would deadlock" from a lock that is not reentrant: `spin` finds its own owner's lock taken, as it does anybody's;
//! - a hold that counts only once a replica has it, and a majority of servers: there is one server, without replicas;
//! - a refusal for somebody who gives back a lock he never had: only a guard gives back, and only who took the lock has one;
//! - keys of one slot on a server that is a cluster: the connections here are to a single server. That the keys share a tag is tested;
//! - a write that a newer token shuts out: the row refuses it, not the lock. `lv3_redis_lock` tests it with the strategy `fenced`.

#![allow(clippy::unwrap_used)]

use std::{
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use futures_util::StreamExt;
use lv3_redis_lock::lock::{Connections, Guard, Lease, LockError, Owner, Pauses, RLock, Released, SpinLock, Tokens};
use redis::{Client, FromRedisValue, aio::MultiplexedConnection};
use rstest::rstest;
use suite::backends::{self, Prefix, Redis};
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
            Rlock => Self::Reentrant(Arc::new(RLock::new(connections, lease, Tokens::None).unwrap())),
            Fenced => Self::Reentrant(Arc::new(RLock::new(connections, lease, Tokens::Growing).unwrap())),
            Spin => Self::Spin(Arc::new(
                SpinLock::new(connections, lease, Pauses::default()).unwrap(),
            )),
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
const SHORT: Lease = Lease::Fixed(ms(500));
const RENEWED: Lease = Lease::Renewed(ms(600));
/// Longer than any wait here has to be.
const PATIENT: Duration = ms(15_000);
/// What counts as "at once" where the alternative is the end of a long lease.
const PROMPTLY: Duration = ms(1_500);
/// Redis counts in whole milliseconds.
const A_TICK: Duration = ms(2);

#[rstest]
#[case::rlock(Rlock)]
#[case::fenced(Fenced)]
#[case::spin(Spin)]
#[tokio::test]
async fn others_are_refused_at_once_and_change_nothing(#[case] kind: Kind) {
    let ground = Ground::shared().await;
    let (here, there) = (ground.lock(kind, LONG).await, ground.lock(kind, LONG).await);
    let key = here.key("sale");
    let held = here.take("sale").await;
    let before: Vec<u8> = ground.ask(&["DUMP", &key]).await;

    let began = Instant::now();
    let mut left = ground.pttl(&key).await;
    for _ in 0..50 {
        assert!(here.refuses("sale").await && there.refuses("sale").await);
        let now = ground.pttl(&key).await;
        assert!(0 < now && now <= left, "{now} ms left, after {left}");
        left = now;
    }
    assert!(began.elapsed() < ms(10_000), "{:?} for 100 refusals", began.elapsed());
    assert_eq!(ground.ask::<Vec<u8>>(&["DUMP", &key]).await, before);
    assert_eq!(held.release().await.unwrap(), Released::Free);
    drop(there.take("sale").await);
}

#[rstest]
#[case::rlock(Rlock)]
#[case::fenced(Fenced)]
#[tokio::test]
async fn anybody_can_see_who_holds_it_and_for_how_long(#[case] kind: Kind) {
    let ground = Ground::shared().await;
    let (here, there) = (ground.lock(kind, SHORT).await, ground.lock(kind, SHORT).await);
    assert_eq!(there.reentrant().probe("sale").await.unwrap(), None);
    let owner = Owner::fresh();
    let held = here.try_acquire("sale", &owner).await.unwrap().unwrap();
    let seen = there.reentrant().probe("sale").await.unwrap().unwrap();
    assert_eq!((seen.owner.as_str(), seen.holds), (owner.as_str(), 1));
    assert!(Duration::ZERO < seen.left && seen.left <= SHORT.time(), "{seen:?}");
    assert_eq!(held.release().await.unwrap(), Released::Free);
    assert_eq!(there.reentrant().probe("sale").await.unwrap(), None);
}

#[rstest]
#[case::rlock(Rlock)]
#[case::fenced(Fenced)]
#[tokio::test]
async fn its_owner_takes_it_again_and_gives_it_back_as_often(#[case] kind: Kind) {
    let ground = Ground::shared().await;
    let (here, there) = (ground.lock(kind, LONG).await, ground.lock(kind, LONG).await);
    let owner = Owner::fresh();
    // By every way in, and through another handle.
    let first = here.acquire("sale", &owner, PATIENT).await.unwrap();
    let second = here.acquire("sale", &owner, Duration::ZERO).await.unwrap();
    let third = here.try_acquire("sale", &owner).await.unwrap().unwrap();
    let fourth = there.acquire("sale", &owner, PATIENT).await.unwrap();
    assert_eq!(here.reentrant().probe("sale").await.unwrap().unwrap().holds, 4);

    let elsewhere = ground.lock(kind, LONG).await;
    let waiter = elsewhere.waits("sale", PATIENT);
    eventually("the waiter listens", async || {
        ground.listeners(&here.key("sale")).await > 0
    })
    .await;
    assert_eq!(first.release().await.unwrap(), Released::StillHeld(3));
    assert_eq!(fourth.release().await.unwrap(), Released::StillHeld(2));
    assert_eq!(second.release().await.unwrap(), Released::StillHeld(1));
    assert!(elsewhere.refuses("sale").await && here.refuses("sale").await);
    assert!(!waiter.is_finished());
    let freed = Instant::now();
    assert_eq!(third.release().await.unwrap(), Released::Free);
    let (_held, at) = waiter.await.unwrap().unwrap();
    assert!(at - freed < PROMPTLY, "{:?}", at - freed);
}

/// A lock that is taken again in another task of its owner, on whatever thread.
#[rstest]
#[case::rlock(Rlock)]
#[case::fenced(Fenced)]
#[tokio::test(flavor = "multi_thread", worker_threads = 3)]
async fn its_owner_is_no_thread(#[case] kind: Kind) {
    let ground = Ground::shared().await;
    let lock = ground.lock(kind, LONG).await;
    let owner = Owner::fresh();
    let mut guards = vec![lock.acquire("sale", &owner, PATIENT).await.unwrap()];
    let tasks: Vec<_> = (0..8)
        .map(|_| {
            let (lock, owner) = (lock.clone(), owner.clone());
            tokio::spawn(async move { lock.acquire("sale", &owner, PATIENT).await.unwrap() })
        })
        .collect();
    for task in tasks {
        guards.push(task.await.unwrap());
    }
    for left in (1..guards.len()).rev() {
        let released = guards.pop().unwrap().release().await.unwrap();
        assert_eq!(released, Released::StillHeld(left as u64));
    }
    assert_eq!(guards.pop().unwrap().release().await.unwrap(), Released::Free);
}

#[rstest]
#[case::rlock(Rlock)]
#[case::fenced(Fenced)]
#[tokio::test]
async fn taken_again_its_lease_begins_afresh_and_a_part_given_back_leaves_it(#[case] kind: Kind) {
    let ground = Ground::shared().await;
    let lock = ground.lock(kind, SHORT).await;
    let (key, owner) = (lock.key("sale"), Owner::fresh());
    let began = Instant::now();
    let first = lock.try_acquire("sale", &owner).await.unwrap().unwrap();
    eventually("a part of the lease is over", async || ground.pttl(&key).await < 400).await;
    let again = Instant::now();
    let second = lock.try_acquire("sale", &owner).await.unwrap().unwrap();
    let fresh = ground.pttl(&key).await;
    let least = 500 - i64::try_from(again.elapsed().as_millis()).unwrap();
    assert!((least - 2..=500).contains(&fresh), "{fresh} ms left");
    assert_eq!(second.release().await.unwrap(), Released::StillHeld(1));
    let after = ground.pttl(&key).await;
    assert!(0 < after && after <= fresh, "{after} ms left, after {fresh}");
    // The first guard's lease is the same lock's.
    eventually("it ends", async || first.is_lost()).await;
    assert!(began.elapsed() >= ms(600), "{:?}", began.elapsed());
    assert!(again.elapsed() >= ms(500), "{:?}", again.elapsed());
    first.lost().await;
}

#[tokio::test]
async fn spin_is_not_reentrant() {
    let ground = Ground::shared().await;
    let lock = ground.lock(Spin, LONG).await;
    let owner = Owner::fresh();
    let held = lock.acquire("sale", &owner, PATIENT).await.unwrap();
    assert!(lock.try_acquire("sale", &owner).await.unwrap().is_none());
    let again = lock.acquire("sale", &owner, ms(50)).await;
    assert!(matches!(again, Err(LockError::NotAcquired(_))));
    assert_eq!(held.release().await.unwrap(), Released::Free);
    drop(lock.take("sale").await);
}
