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
    let (here, there) = (ground.lock(kind, LONG).await, ground.lock(kind, LONG).await);
    assert_eq!(there.reentrant().info("sale").await.unwrap(), None);
    let owner = Owner::fresh();
    let held = here.try_acquire("sale", &owner).await.unwrap().unwrap();
    let seen = there.reentrant().info("sale").await.unwrap().unwrap();
    assert_eq!((seen.owner.as_str(), seen.hold_count), (owner.as_str(), 1));
    assert!(Duration::ZERO < seen.ttl && seen.ttl <= LONG.duration(), "{seen:?}");
    assert_eq!(held.release().await.unwrap(), Released::Free);
    assert_eq!(there.reentrant().info("sale").await.unwrap(), None);
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
    assert_eq!(here.reentrant().info("sale").await.unwrap().unwrap().hold_count, 4);

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
    let lock = ground.lock(kind, MIDDLING).await;
    let (key, owner) = (lock.key("sale"), Owner::fresh());
    let began = Instant::now();
    let first = lock.try_acquire("sale", &owner).await.unwrap().unwrap();
    eventually("a part of the lease is over", async || ground.pttl(&key).await < 2_900).await;
    let again = Instant::now();
    let second = lock.try_acquire("sale", &owner).await.unwrap().unwrap();
    let fresh = ground.pttl(&key).await;
    let least = 3_000 - i64::try_from(again.elapsed().as_millis()).unwrap();
    assert!((least - 2..=3_000).contains(&fresh), "{fresh} ms left");
    assert_eq!(second.release().await.unwrap(), Released::StillHeld(1));
    let after = ground.pttl(&key).await;
    assert!(0 < after && after <= fresh, "{after} ms left, after {fresh}");
    // The first guard's lease is the same lock's.
    eventually("it ends", async || first.is_lost()).await;
    assert!(began.elapsed() >= ms(3_100), "{:?}", began.elapsed());
    assert!(again.elapsed() >= ms(3_000), "{:?}", again.elapsed());
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

#[rstest]
#[case::rlock(Rlock)]
#[case::fenced(Fenced)]
#[case::spin(Spin)]
#[tokio::test]
async fn a_wait_ends_when_its_time_is_up_and_no_sooner(#[case] kind: Kind) {
    let ground = Ground::shared().await;
    let (here, there) = (ground.lock(kind, LONG).await, ground.lock(kind, LONG).await);
    let _held = here.take("sale").await;
    for lock in [here, there] {
        let began = Instant::now();
        let waited = lock.acquire("sale", &Owner::fresh(), ms(300)).await;
        let took = began.elapsed();
        assert!(matches!(waited, Err(LockError::NotAcquired(wait)) if wait == ms(300)));
        assert!(ms(300) <= took && took < ms(300) + PROMPTLY, "{took:?}");
    }
}

#[rstest]
#[case::rlock(Rlock)]
#[case::fenced(Fenced)]
#[case::spin(Spin)]
#[tokio::test]
async fn a_wait_of_zero_is_one_attempt(#[case] kind: Kind) {
    let ground = Ground::shared().await;
    let (here, there) = (ground.lock(kind, LONG).await, ground.lock(kind, LONG).await);
    let _held = here.take("sale").await;
    let monitor = ground.monitor().await;
    let waited = there.acquire("sale", &Owner::fresh(), Duration::ZERO).await;
    assert!(matches!(waited, Err(LockError::NotAcquired(Duration::ZERO))));
    let calls = monitor.calls(&ground, &here.key("sale")).await;
    assert_eq!(calls.len(), 1, "{calls:#?}");
    assert_eq!(ground.listeners(&here.key("sale")).await, 0);
    // A lock that is free is taken.
    drop(there.acquire("free", &Owner::fresh(), Duration::ZERO).await.unwrap());
}

#[rstest]
#[case::rlock(Rlock)]
#[case::fenced(Fenced)]
#[case::spin(Spin)]
#[tokio::test]
async fn a_wait_may_be_without_end(#[case] kind: Kind) {
    let ground = Ground::shared().await;
    let (here, there) = (ground.lock(kind, SHORT).await, ground.lock(kind, SHORT).await);
    let _held = here.take("sale").await;
    let waiter = there.waits("sale", Duration::MAX);
    assert!(waiter.await.unwrap().is_ok());
}

#[rstest]
#[case::rlock(Rlock)]
#[case::fenced(Fenced)]
#[case::spin(Spin)]
#[tokio::test]
async fn a_fixed_lease_ends_by_itself_and_lets_the_next_one_in(#[case] kind: Kind) {
    let ground = Ground::shared().await;
    // One waits where the holder is, one elsewhere: the first for its turn in this process, the second for the key to end.
    let (here, there) = (ground.lock(kind, SHORT).await, ground.lock(kind, SHORT).await);
    for (name, next) in [("here", &here), ("there", &there)] {
        let sent = Instant::now();
        let held = here.take(name).await;
        let monitor = ground.monitor().await;
        let left = ground.pttl(&here.key(name)).await;
        assert!(0 < left && left <= 500, "{left} ms left");
        let (_next, at) = next.waits(name, PATIENT).await.unwrap().unwrap();
        assert!(at - sent + A_TICK >= ms(500), "{name}: after {:?}", at - sent);
        assert!(at - sent < ms(500) + PROMPTLY, "{name}: after {:?}", at - sent);
        assert!(held.is_lost());
        held.lost().await;
        // Nobody renewed it: the lease was set when it was taken, by whoever did.
        let renewed = monitor.about(&ground, "\"pexpire\"").await;
        let renewed = renewed.iter().filter(|line| line.contains(&here.key(name))).count();
        assert!(renewed <= 1, "a lease was set {renewed} times, for one more holder");
    }
}

#[rstest]
#[case::rlock(Rlock)]
#[case::fenced(Fenced)]
#[case::spin(Spin)]
#[tokio::test]
async fn a_release_after_the_lease_says_so_and_leaves_the_successor_alone(#[case] kind: Kind) {
    let ground = Ground::shared().await;
    let (here, there) = (ground.lock(kind, SHORT).await, ground.lock(kind, LONG).await);
    let late = here.take("sale").await;
    let (successor, _) = there.waits("sale", PATIENT).await.unwrap().unwrap();
    let left = ground.pttl(&here.key("sale")).await;
    assert_eq!(late.release().await.unwrap(), Released::NotOwner);
    let after = ground.pttl(&here.key("sale")).await;
    assert!(0 < after && after <= left, "{after} ms left, after {left}");
    assert!(here.refuses("sale").await && !successor.is_lost());
    assert_eq!(successor.release().await.unwrap(), Released::Free);
}

#[rstest]
#[case::rlock(Rlock)]
#[case::fenced(Fenced)]
#[case::spin(Spin)]
#[tokio::test]
async fn a_renewed_lease_lasts_as_long_as_its_holder_whoever_tries(#[case] kind: Kind) {
    let ground = Ground::shared().await;
    let (here, there) = (ground.lock(kind, RENEWED).await, ground.lock(kind, RENEWED).await);
    let key = here.key("sale");
    let held = here.take("sale").await;
    let began = Instant::now();
    let mut renewed = 0;
    let mut left = ground.pttl(&key).await;
    // Every third of it: four times is longer than it would have lasted.
    while renewed < 4 {
        assert!(here.refuses("sale").await && there.refuses("sale").await);
        let now = ground.pttl(&key).await;
        assert!(now > 0, "lost after {:?}", began.elapsed());
        renewed += u32::from(now > left);
        left = now;
        tokio::time::sleep(ms(10)).await;
    }
    assert!(began.elapsed() > RENEWED.duration() && !held.is_lost());
    assert_eq!(held.release().await.unwrap(), Released::Free);
    // Its watchdog went with it.
    let monitor = ground.monitor().await;
    let next = ground.lock(kind, SHORT).await.take("sale").await;
    next.lost().await;
    let calls = monitor.calls(&ground, &key).await;
    assert_eq!(calls.len(), 1, "{calls:#?}");
}

/// What another task does with the same name must not make this process forget whose lock it renews.
#[rstest]
#[case::rlock(Rlock)]
#[case::spin(Spin)]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn short_holds_of_others_do_not_end_a_renewal(#[case] kind: Kind) {
    let ground = Ground::shared().await;
    let lock = ground.lock(kind, RENEWED).await;
    for _ in 0..20 {
        let tries: Vec<_> = (0..16)
            .map(|_| {
                let lock = lock.clone();
                tokio::spawn(async move {
                    if let Some(guard) = lock.try_acquire("sale", &Owner::fresh()).await.unwrap() {
                        assert_eq!(guard.release().await.unwrap(), Released::Free);
                    }
                })
            })
            .collect();
        for task in tries {
            task.await.unwrap();
        }
    }
    let held = lock.take("sale").await;
    let began = Instant::now();
    while began.elapsed() < OVER {
        assert!(lock.refuses("sale").await);
        assert!(!held.is_lost());
        tokio::time::sleep(ms(5)).await;
    }
    assert_eq!(held.release().await.unwrap(), Released::Free);
}

#[rstest]
#[case::rlock(Rlock)]
#[case::spin(Spin)]
#[tokio::test]
async fn hundreds_of_locks_are_renewed(#[case] kind: Kind) {
    let ground = Ground::shared().await;
    let lock = ground.lock(kind, RENEWED).await;
    let mut held = Vec::new();
    for number in 0..250 {
        held.push(lock.take(&format!("sale {number}")).await);
    }
    let began = Instant::now();
    eventually("a lease is over", async || began.elapsed() > OVER).await;
    for guard in held {
        assert_eq!(guard.release().await.unwrap(), Released::Free);
    }
}

#[tokio::test]
async fn a_lease_that_redis_cannot_count_is_refused() {
    let ground = Ground::shared().await;
    let connections = Connections::open(&ground.url, &ground.prefix).await.unwrap();
    let nothing = [Duration::ZERO, Duration::from_micros(999)];
    for time in nothing {
        for lease in [Lease::Fixed(time), Lease::Renewed(time)] {
            let rlock = RLock::new(connections.clone(), lease, FencingTokens::None);
            assert!(matches!(rlock.err(), Some(LockError::LeaseTooShort(_))), "{lease:?}");
            let spin = SpinLock::new(connections.clone(), lease, Backoff::default());
            assert!(matches!(spin.err(), Some(LockError::LeaseTooShort(_))), "{lease:?}");
        }
    }
    for lease in [Lease::Fixed(Duration::MAX), Lease::Renewed(Duration::MAX)] {
        let rlock = RLock::new(connections.clone(), lease, FencingTokens::Monotonic);
        assert!(matches!(rlock.err(), Some(LockError::LeaseTooLong(_))), "{lease:?}");
        let spin = SpinLock::new(connections.clone(), lease, Backoff::default());
        assert!(matches!(spin.err(), Some(LockError::LeaseTooLong(_))), "{lease:?}");
    }
}

#[rstest]
#[case::rlock(Rlock, 0)]
#[case::fenced(Fenced, 1)]
#[case::spin(Spin, 0)]
#[tokio::test]
async fn after_the_last_release_nothing_is_left_but_the_last_token(#[case] kind: Kind, #[case] keys: i64) {
    let server = Redis::private().await.unwrap();
    let ground = Ground::on(&server).await;
    let (here, there) = (ground.lock(kind, LONG).await, ground.lock(kind, LONG).await);
    for _ in 0..30 {
        let held = here.take("sale").await;
        let waiting = [&here, &there, &there].map(|lock| async {
            let next = lock.acquire("sale", &Owner::fresh(), PATIENT).await.unwrap();
            assert_eq!(next.release().await.unwrap(), Released::Free);
        });
        let releasing = async { assert_eq!(held.release().await.unwrap(), Released::Free) };
        tokio::join!(releasing, futures_util::future::join_all(waiting));
    }
    eventually("nobody listens", async || {
        ground.ask::<Vec<String>>(&["PUBSUB", "CHANNELS"]).await.is_empty()
    })
    .await;
    let left: Vec<String> = ground.ask(&["KEYS", "*"]).await;
    assert_eq!(ground.ask::<i64>(&["DBSIZE"]).await, keys, "{left:?}");
    // It goes by itself: anybody can make up a name.
    for key in left {
        let left = ground.pttl(&key).await;
        assert!(0 < left && left <= 86_400_000, "{key}: {left} ms");
    }
}

#[rstest]
#[case::rlock(Rlock)]
#[case::fenced(Fenced)]
#[tokio::test]
async fn forced_open_it_is_free_and_its_holder_finds_out(#[case] kind: Kind) {
    let ground = Ground::shared().await;
    let holder = ground.lock(kind, RENEWED).await;
    let (elsewhere, anybody) = (ground.lock(kind, LONG).await, ground.lock(kind, LONG).await);
    let owner = Owner::fresh();
    let first = holder.acquire("sale", &owner, PATIENT).await.unwrap();
    let second = holder.acquire("sale", &owner, PATIENT).await.unwrap();
    let waiter = elsewhere.waits("sale", PATIENT);
    eventually("the waiter listens", async || {
        ground.listeners(&holder.key("sale")).await > 0
    })
    .await;

    let forced = Instant::now();
    assert!(anybody.reentrant().force_release("sale").await.unwrap());
    let (next, at) = waiter.await.unwrap().unwrap();
    assert!(at - forced < PROMPTLY, "{:?}", at - forced);
    // By its next renewal.
    first.lost().await;
    assert!(first.is_lost() && second.is_lost());
    let monitor = ground.monitor().await;
    assert_eq!(first.release().await.unwrap(), Released::NotOwner);
    assert_eq!(second.release().await.unwrap(), Released::NotOwner);
    assert!(!next.is_lost() && anybody.refuses("sale").await);
    let began = Instant::now();
    eventually("a lease is over", async || began.elapsed() > OVER).await;
    let mut renewals = monitor.about(&ground, "\"pexpire\"").await;
    renewals.retain(|line| line.contains(&holder.key("sale")));
    assert_eq!(renewals, [""; 0]);
    assert_eq!(next.release().await.unwrap(), Released::Free);
    assert!(!anybody.reentrant().force_release("sale").await.unwrap());
}

/// Who waits in the holder's own process waits for the holder first.
#[rstest]
#[case::rlock(Rlock)]
#[case::fenced(Fenced)]
#[tokio::test]
async fn forced_open_by_its_own_process_it_is_free_at_once_there_too(#[case] kind: Kind) {
    let ground = Ground::shared().await;
    let lock = ground.lock(kind, LONG).await;
    let held = lock.take("sale").await;
    let waiter = lock.waits("sale", PATIENT);
    eventually("the waiter listens", async || {
        ground.listeners(&lock.key("sale")).await > 0
    })
    .await;
    let forced = Instant::now();
    assert!(lock.reentrant().force_release("sale").await.unwrap());
    let (_next, at) = waiter.await.unwrap().unwrap();
    assert!(at - forced < PROMPTLY, "{:?}", at - forced);
    assert!(held.is_lost());
    assert_eq!(held.release().await.unwrap(), Released::NotOwner);
}

#[rstest]
#[case::rlock(Rlock)]
#[case::fenced(Fenced)]
#[tokio::test]
async fn tasks_of_one_process_get_in_in_the_order_in_which_they_came(#[case] kind: Kind) {
    let ground = Ground::shared().await;
    let lock = ground.lock(kind, LONG).await;
    let held = lock.take("sale").await;
    let order = Arc::<Mutex<Vec<u32>>>::default();
    let waiters: Vec<_> = (0..20)
        .map(|number| {
            let (lock, order) = (lock.clone(), order.clone());
            // On one thread, tasks begin in the order in which they were spawned.
            tokio::spawn(async move {
                let guard = lock.acquire("sale", &Owner::fresh(), PATIENT).await.unwrap();
                order.lock().unwrap().push(number);
                guard.release().await.unwrap()
            })
        })
        .collect();
    eventually("they listen", async || ground.listeners(&lock.key("sale")).await > 0).await;
    assert_eq!(held.release().await.unwrap(), Released::Free);
    for waiter in waiters {
        assert_eq!(waiter.await.unwrap(), Released::Free);
    }
    assert_eq!(*order.lock().unwrap(), (0..20).collect::<Vec<_>>());
}

#[tokio::test]
async fn every_acquisition_gets_a_greater_token_than_all_before_it() {
    let ground = Ground::shared().await;
    let mut last = 0_i64;
    for round in 0..4 {
        // New clients in each round.
        let here = ground.lock(Fenced, LONG).await;
        let there = ground.lock(Fenced, RENEWED).await;
        for _ in 0..10 {
            let held = here.take("sale").await;
            grows(&mut last, &held);
            let waiter = there.waits("sale", PATIENT);
            assert_eq!(held.release().await.unwrap(), Released::Free);
            let (held, _) = waiter.await.unwrap().unwrap();
            grows(&mut last, &held);
            assert_eq!(held.release().await.unwrap(), Released::Free);
        }
        let ends = ground.lock(Fenced, SHORT).await.take("sale").await;
        grows(&mut last, &ends);
        ends.lost().await;
        let forced = there.acquire("sale", &Owner::fresh(), PATIENT).await.unwrap();
        grows(&mut last, &forced);
        assert!(here.reentrant().force_release("sale").await.unwrap());
        drop(forced);
        let token = format!("{}:token", here.key("sale"));
        match round {
            // The last token is lost.
            0 | 2 => assert_eq!(ground.ask::<i64>(&["DEL", &token]).await, 1),
            // The clock is set back by an hour, as far as the last token can tell.
            3 => {
                last += 3_600_000_000;
                let set: String = ground.ask(&["SET", &token, &last.to_string()]).await;
                assert_eq!(set, "OK");
            }
            _ => {}
        }
        let held = here.acquire("sale", &Owner::fresh(), PATIENT).await.unwrap();
        grows(&mut last, &held);
        assert_eq!(held.release().await.unwrap(), Released::Free);
    }
}

/// Notes a token, which is greater than the last one.
fn grows(last: &mut i64, guard: &Guard) {
    let token = guard.token().expect("a token");
    assert!(token > *last, "{token} after {last}");
    *last = token;
}

#[tokio::test]
async fn a_token_stays_when_its_owner_takes_the_lock_again() {
    let ground = Ground::shared().await;
    let lock = ground.lock(Fenced, LONG).await;
    let owner = Owner::fresh();
    let first = lock.acquire("sale", &owner, PATIENT).await.unwrap();
    let second = lock.acquire("sale", &owner, PATIENT).await.unwrap();
    assert_eq!(first.token(), second.token());
    // The last token is lost under its owner: then a greater one is as good.
    let token = format!("{}:token", lock.key("sale"));
    assert_eq!(ground.ask::<i64>(&["DEL", &token]).await, 1);
    let third = lock.acquire("sale", &owner, PATIENT).await.unwrap();
    assert!(third.token() > first.token());
    for (guard, released) in [
        (third, Released::StillHeld(2)),
        (second, Released::StillHeld(1)),
        (first, Released::Free),
    ] {
        assert_eq!(guard.release().await.unwrap(), released);
    }
    for kind in [Rlock, Spin] {
        let lock = ground.lock(kind, LONG).await;
        assert_eq!(lock.take(&format!("{kind:?}")).await.token(), None);
    }
}

/// The lock is this owner's by another handle. An attempt that Redis answered with an error has taken nothing, and must give back nothing.
#[tokio::test]
async fn an_attempt_that_failed_gives_back_nothing_that_its_owner_has() {
    let ground = Ground::shared().await;
    let (here, there) = (ground.lock(Fenced, LONG).await, ground.lock(Fenced, LONG).await);
    let (key, owner) = (here.key("sale"), Owner::fresh());
    let held = here.acquire("sale", &owner, PATIENT).await.unwrap();
    // What ought to be the last token is none: the script fails before it has done anything.
    let token = format!("{key}:token");
    assert_eq!(ground.ask::<i64>(&["DEL", &token]).await, 1);
    assert_eq!(ground.ask::<i64>(&["RPUSH", &token, "no token"]).await, 1);
    let monitor = ground.monitor().await;
    let refused = there.try_acquire("sale", &owner).await;
    assert!(matches!(refused, Err(LockError::Redis(_))));
    eventually("the attempt is given back", async || {
        monitor.calls(&ground, &key).await.len() >= 2
    })
    .await;
    assert!(ground.pttl(&key).await > 0, "its owner has it no more");
    assert_eq!(held.release().await.unwrap(), Released::Free);
}

/// Whoever has the first guard has worked without a lock, and must learn of it.
#[rstest]
#[case::rlock(Rlock)]
#[case::fenced(Fenced)]
#[tokio::test]
async fn a_loss_is_not_healed_by_taking_the_lock_again(#[case] kind: Kind) {
    let ground = Ground::shared().await;
    let (here, there) = (ground.lock(kind, LONG).await, ground.lock(kind, LONG).await);
    let owner = Owner::fresh();
    for taken_by_somebody in [false, true] {
        let lost = here.acquire("sale", &owner, PATIENT).await.unwrap();
        assert_eq!(ground.ask::<i64>(&["DEL", &here.key("sale")]).await, 1);
        if taken_by_somebody {
            let theirs = there.take("sale").await;
            assert!(here.try_acquire("sale", &owner).await.unwrap().is_none());
            assert!(lost.is_lost());
            assert_eq!(theirs.release().await.unwrap(), Released::Free);
            assert_eq!(lost.release().await.unwrap(), Released::NotOwner);
        } else {
            let anew = here.acquire("sale", &owner, PATIENT).await.unwrap();
            assert!(lost.is_lost() && !anew.is_lost());
            assert_eq!(lost.release().await.unwrap(), Released::NotOwner);
            assert!(there.refuses("sale").await);
            assert_eq!(anew.release().await.unwrap(), Released::Free);
        }
    }
}

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

#[rstest]
#[case::rlock(Rlock)]
#[case::fenced(Fenced)]
#[case::spin(Spin)]
#[tokio::test]
async fn a_lock_whose_taking_is_cancelled_is_given_back(#[case] kind: Kind) {
    let ground = Ground::shared().await;
    let lock = ground.lock(kind, LONG).await;
    let mut polls = 0;
    loop {
        let done = dropped_after(polls, lock.acquire("sale", &Owner::fresh(), PATIENT)).await;
        eventually("it is free", async || ground.pttl(&lock.key("sale")).await == -2).await;
        if done {
            break;
        }
        polls += 1;
    }
    assert!(polls > 0, "it was never cancelled");
}

#[rstest]
#[case::rlock(Rlock)]
#[case::fenced(Fenced)]
#[case::spin(Spin)]
#[tokio::test]
async fn a_wait_that_is_cancelled_leaves_nothing(#[case] kind: Kind) {
    let ground = Ground::shared().await;
    let (here, there) = (ground.lock(kind, LONG).await, ground.lock(kind, LONG).await);
    let key = here.key("sale");
    let held = here.take("sale").await;
    let before: Vec<u8> = ground.ask(&["DUMP", &key]).await;
    let waits = (0..100_u64).map(|number| {
        let lock = if number % 2 == 0 { &here } else { &there };
        async move {
            let owner = Owner::fresh();
            let waiting = lock.acquire("sale", &owner, PATIENT);
            assert!(
                tokio::time::timeout(ms(rand::random_range(0..40)), waiting)
                    .await
                    .is_err()
            );
        }
    });
    futures_util::future::join_all(waits).await;
    eventually("nobody listens", async || ground.listeners(&key).await == 0).await;
    assert_eq!(ground.ask::<Vec<u8>>(&["DUMP", &key]).await, before);
    assert_eq!(held.release().await.unwrap(), Released::Free);
    for lock in [here, there] {
        assert_eq!(lock.take("sale").await.release().await.unwrap(), Released::Free);
    }
}

/// An attempt that is cancelled is given back. That must not give back what its owner has.
#[tokio::test]
async fn a_holder_who_tries_again_and_cancels_keeps_its_lock() {
    let ground = Ground::shared().await;
    let lock = ground.lock(Spin, LONG).await;
    let owner = Owner::fresh();
    let held = lock.acquire("sale", &owner, PATIENT).await.unwrap();
    let monitor = ground.monitor().await;
    assert!(!dropped_after(1, lock.try_acquire("sale", &owner)).await);
    eventually("the attempt is given back", async || {
        let calls = monitor.calls(&ground, &lock.key("sale")).await;
        calls.iter().any(|call| call.contains("EVALSHA"))
    })
    .await;
    assert!(ground.pttl(&lock.key("sale")).await > 0);
    assert_eq!(held.release().await.unwrap(), Released::Free);
}

#[rstest]
#[case::rlock(Rlock)]
#[case::fenced(Fenced)]
#[case::spin(Spin)]
#[tokio::test]
async fn a_wait_goes_on_whatever_else_its_task_does(#[case] kind: Kind) {
    let ground = Ground::shared().await;
    let (here, there) = (ground.lock(kind, LONG).await, ground.lock(kind, LONG).await);
    let held = here.take("sale").await;
    let owner = Owner::fresh();
    let mut waiting = Box::pin(there.acquire("sale", &owner, PATIENT));
    let mut ticks = tokio::time::interval(ms(2));
    for _ in 0..100 {
        tokio::select! {
            biased;
            _ = ticks.tick() => {}
            _ = &mut waiting => panic!("the lock is held"),
        }
    }
    assert_eq!(held.release().await.unwrap(), Released::Free);
    let freed = Instant::now();
    let next = waiting.await.unwrap();
    assert!(freed.elapsed() < PROMPTLY, "{:?}", freed.elapsed());
    assert_eq!(next.release().await.unwrap(), Released::Free);
}

#[rstest]
#[case::rlock(Rlock)]
#[case::fenced(Fenced)]
#[case::spin(Spin)]
#[tokio::test]
async fn a_release_happens_whether_or_not_anybody_waits_for_it(#[case] kind: Kind) {
    let ground = Ground::shared().await;
    let lock = ground.lock(kind, LONG).await;
    drop(lock.take("dropped").await);
    drop(lock.take("not polled").await.release());
    assert!(!dropped_after(1, lock.take("polled once").await.release()).await);
    for name in ["dropped", "not polled", "polled once"] {
        eventually(name, async || ground.pttl(&lock.key(name)).await == -2).await;
    }
}

/// Where there is no runtime, nobody can talk to Redis. Nothing blocks, and nobody renews.
#[rstest]
#[case::rlock(Rlock)]
#[case::fenced(Fenced)]
#[case::spin(Spin)]
#[tokio::test]
async fn a_guard_dropped_outside_of_a_runtime_leaves_the_lock_to_its_lease(#[case] kind: Kind) {
    let ground = Ground::shared().await;
    let (here, there) = (ground.lock(kind, RENEWED).await, ground.lock(kind, RENEWED).await);
    let (held, other) = (here.take("sale").await, here.take("other").await);
    std::thread::spawn(move || drop(held)).join().unwrap();
    let dropped = Instant::now();
    let released = std::thread::spawn(move || {
        let mut releasing = std::pin::pin!(other.release());
        releasing.as_mut().poll(&mut Context::from_waker(Waker::noop()))
    });
    // Nobody has asked: it may still be the owner's.
    let released = released.join().unwrap();
    assert!(matches!(released, Poll::Ready(Err(LockError::NoRuntime))));
    assert!(there.refuses("sale").await);
    let (_next, at) = there.waits("sale", PATIENT).await.unwrap().unwrap();
    assert!(at - dropped < RENEWED.duration() + PROMPTLY, "{:?}", at - dropped);
}

#[rstest]
#[case::rlock(Rlock)]
#[case::fenced(Fenced)]
#[tokio::test]
async fn a_waiter_is_woken_by_the_release_and_does_not_poll(#[case] kind: Kind) {
    let ground = Ground::shared().await;
    let (here, there) = (ground.lock(kind, LONG).await, ground.lock(kind, LONG).await);
    let held = here.take("sale").await;
    let monitor = ground.monitor().await;
    let waiter = there.waits("sale", PATIENT);
    let began = Instant::now();
    eventually("it waited for a while", async || began.elapsed() > ms(600)).await;
    // One look, one when it listens, one when it is sure that it does.
    let calls = monitor.calls(&ground, &here.key("sale")).await;
    assert!((2..=3).contains(&calls.len()), "{calls:#?}");
    let freed = Instant::now();
    assert_eq!(held.release().await.unwrap(), Released::Free);
    let (_next, at) = waiter.await.unwrap().unwrap();
    assert!(at - freed < PROMPTLY, "{:?}", at - freed);
}

#[rstest]
#[case::rlock(Rlock)]
#[case::fenced(Fenced)]
#[tokio::test]
async fn a_release_makes_one_waiter_of_each_process_try(#[case] kind: Kind) {
    let ground = Ground::shared().await;
    let key = ground.lock(kind, LONG).await.key("sale");
    let holder = ground.lock(kind, LONG).await;
    let held = holder.take("sale").await;
    let mut waiters = Vec::new();
    for _ in 0..3 {
        let lock = ground.lock(kind, LONG).await;
        waiters.extend((0..20).map(|_| lock.waits("sale", PATIENT)));
    }
    eventually("three processes listen", async || ground.listeners(&key).await == 3).await;
    let monitor = ground.monitor().await;
    let quiet = async || {
        let mut before = usize::MAX;
        eventually("nobody tries any more", async || {
            let now = monitor.calls(&ground, &key).await.len();
            std::mem::replace(&mut before, now) == now
        })
        .await;
        before
    };
    let before = quiet().await;
    assert_eq!(held.release().await.unwrap(), Released::Free);
    let in_now = async |waiters: &[JoinHandle<_>]| waiters.iter().filter(|waiter| waiter.is_finished()).count();
    eventually("one gets in", async || in_now(&waiters).await == 1).await;
    let began = Instant::now();
    eventually("it stays for a while", async || began.elapsed() > ms(200)).await;
    let calls = quiet().await - before;
    // The release, and once for each process.
    assert!((2..=4).contains(&calls), "{calls} calls");
    assert_eq!(in_now(&waiters).await, 1);
    for waiter in waiters {
        waiter.abort();
    }
}

#[rstest]
#[case::rlock(Rlock)]
#[case::fenced(Fenced)]
#[tokio::test]
async fn a_lost_message_delays_a_waiter_to_the_end_of_the_lease_it_saw(#[case] kind: Kind) {
    let ground = Ground::shared().await;
    let (here, there) = (ground.lock(kind, MIDDLING).await, ground.lock(kind, MIDDLING).await);
    let sent = Instant::now();
    let _held = here.take("sale").await;
    let waiter = there.waits("sale", PATIENT);
    eventually("the waiter listens", async || {
        ground.listeners(&here.key("sale")).await > 0
    })
    .await;
    // It is free, and nobody says so.
    assert_eq!(ground.ask::<i64>(&["DEL", &here.key("sale")]).await, 1);
    let (_next, at) = waiter.await.unwrap().unwrap();
    assert!(at - sent < MIDDLING.duration() + PROMPTLY, "{:?}", at - sent);
}

#[rstest]
#[case::rlock(Rlock)]
#[case::fenced(Fenced)]
#[tokio::test]
async fn a_waiter_whose_subscription_is_cut_looks_when_it_listens_again(#[case] kind: Kind) {
    let server = Redis::private().await.unwrap();
    let ground = Ground::on(&server).await;
    let (here, there) = (ground.lock(kind, LONG).await, ground.lock(kind, LONG).await);
    let held = here.take("sale").await;
    let waiter = there.waits("sale", PATIENT);
    eventually("the waiter listens", async || {
        ground.listeners(&here.key("sale")).await == 1
    })
    .await;
    // In one step: no message can reach it.
    let (cut, deleted): (i64, i64) = redis::pipe()
        .atomic()
        .cmd("CLIENT")
        .arg("KILL")
        .arg("TYPE")
        .arg("pubsub")
        .cmd("DEL")
        .arg(here.key("sale"))
        .query_async(&mut ground.raw.clone())
        .await
        .unwrap();
    assert_eq!((cut, deleted), (1, 1));
    let freed = Instant::now();
    let (_next, at) = waiter.await.unwrap().unwrap();
    assert!(at - freed < PROMPTLY, "{:?}", at - freed);
    assert_eq!(held.release().await.unwrap(), Released::NotOwner);
}

#[rstest]
#[case::rlock(Rlock)]
#[case::fenced(Fenced)]
#[case::spin(Spin)]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_connection_is_enough_for_many_names_and_waiters(#[case] kind: Kind) {
    let server = Redis::private().await.unwrap();
    let ground = Ground::on(&server).await;
    let lock = ground.lock(kind, LONG).await;
    let before: i64 = ground.ask::<String>(&["CLIENT", "LIST"]).await.lines().count() as i64;
    let tasks: Vec<_> = (0..32)
        .map(|task| {
            let lock = lock.clone();
            tokio::spawn(async move {
                for round in 0..10 {
                    let name = format!("sale {}", (task + round) % 5);
                    let guard = lock.acquire(&name, &Owner::fresh(), PATIENT).await.unwrap();
                    assert_eq!(guard.release().await.unwrap(), Released::Free);
                }
            })
        })
        .collect();
    for task in tasks {
        task.await.unwrap();
    }
    let after: i64 = ground.ask::<String>(&["CLIENT", "LIST"]).await.lines().count() as i64;
    assert!(after <= before + 1, "{after} connections, after {before}");
    eventually("nobody listens", async || {
        ground.ask::<Vec<String>>(&["PUBSUB", "CHANNELS"]).await.is_empty()
    })
    .await;
}

#[rstest]
#[case::rlock(Rlock)]
#[case::fenced(Fenced)]
#[case::spin(Spin)]
#[tokio::test]
async fn nobody_notices_that_redis_forgot_the_scripts(#[case] kind: Kind) {
    let server = Redis::private().await.unwrap();
    let ground = Ground::on(&server).await;
    let lock = ground.lock(kind, RENEWED).await;
    let flush = async || assert_eq!(ground.ask::<String>(&["SCRIPT", "FLUSH"]).await, "OK");
    for round in 0..10 {
        let owner = Owner::fresh();
        flush().await;
        let held = lock.acquire("sale", &owner, PATIENT).await.unwrap();
        if round == 0 {
            flush().await;
            let began = Instant::now();
            eventually("a lease is over", async || began.elapsed() > OVER).await;
            assert!(!held.is_lost());
        }
        if kind != Spin {
            flush().await;
            let again = lock.acquire("sale", &owner, PATIENT).await.unwrap();
            flush().await;
            assert_eq!(again.release().await.unwrap(), Released::StillHeld(1));
        }
        flush().await;
        assert_eq!(held.release().await.unwrap(), Released::Free);
        if kind != Spin {
            let _held = lock.take("sale").await;
            flush().await;
            assert!(lock.reentrant().force_release("sale").await.unwrap());
        }
    }
}

#[rstest]
#[case::rlock(Rlock)]
#[case::fenced(Fenced)]
#[case::spin(Spin)]
#[tokio::test]
async fn a_lock_is_never_there_without_an_end(#[case] kind: Kind) {
    let ground = Ground::shared().await;
    let lock = ground.lock(kind, LONG).await;
    let key = lock.key("sale");
    let churn = tokio::spawn(async move {
        for _ in 0..300 {
            let held = lock.take("sale").await;
            assert_eq!(held.release().await.unwrap(), Released::Free);
        }
    });
    let mut seen = 0;
    while !churn.is_finished() {
        let left = ground.pttl(&key).await;
        assert!(left == -2 || (0..=20_000).contains(&left), "{left}");
        seen += u32::from(left > 0);
    }
    churn.await.unwrap();
    assert!(seen > 0, "it was never seen held");
}

/// A key of that name that is no lock.
#[rstest]
#[case::rlock(Rlock)]
#[case::fenced(Fenced)]
#[tokio::test]
async fn what_is_no_lock_is_an_error_and_stays_as_it_is(#[case] kind: Kind) {
    let ground = Ground::shared().await;
    let lock = ground.lock(kind, LONG).await;
    let _: String = ground.ask(&["SET", &lock.key("sale"), "a text"]).await;
    for wait in [Duration::ZERO, PATIENT] {
        let refused = lock.acquire("sale", &Owner::fresh(), wait).await;
        assert!(matches!(refused, Err(LockError::Redis(_))));
    }
    assert_eq!(ground.ask::<String>(&["GET", &lock.key("sale")]).await, "a text");
    assert_eq!(ground.listeners(&lock.key("sale")).await, 0);
}

/// Such as one that another program left. Only who deletes it can free it.
#[rstest]
#[case::rlock(Rlock)]
#[case::fenced(Fenced)]
#[tokio::test]
async fn a_lock_without_an_end_does_not_make_its_waiters_poll(#[case] kind: Kind) {
    let ground = Ground::shared().await;
    let lock = ground.lock(kind, SHORT).await;
    let key = lock.key("sale");
    let _: i64 = ground.ask(&["HSET", &key, "somebody", "1"]).await;
    let monitor = ground.monitor().await;
    let waited = lock.acquire("sale", &Owner::fresh(), ms(900)).await;
    assert!(matches!(waited, Err(LockError::NotAcquired(_))));
    let calls = monitor.calls(&ground, &key).await;
    assert!(calls.len() <= 5, "{calls:#?}");
}

#[tokio::test]
async fn spin_pauses_longer_each_time_by_chance_and_listens_to_nobody() {
    let ground = Ground::shared().await;
    let (here, there) = (ground.lock(Spin, LONG).await, ground.lock(Spin, LONG).await);
    let key = here.key("sale");
    let held = here.take("sale").await;
    let monitor = ground.monitor().await;
    let waiter = there.waits("sale", PATIENT);
    let began = Instant::now();
    eventually("it waited for a while", async || began.elapsed() > ms(600)).await;
    let calls = monitor.calls(&ground, &key).await.len();
    // At most 128 ms apart, half of it on average.
    assert!((3..60).contains(&calls), "{calls} attempts");
    assert_eq!(ground.listeners(&key).await, 0);
    let freed = Instant::now();
    assert_eq!(held.release().await.unwrap(), Released::Free);
    let (_next, at) = waiter.await.unwrap().unwrap();
    assert!(at - freed < PROMPTLY, "{:?}", at - freed);

    let longest: Vec<u128> = (1..=8)
        .map(|failures| Backoff::default().pause(failures, 1.0).as_millis())
        .collect();
    assert_eq!(longest, [1, 2, 4, 8, 16, 32, 64, 128]);
    assert_eq!(Backoff::default().pause(1_000, 0.5), ms(64));
    assert_eq!(Backoff::default().pause(3, 0.0), Duration::ZERO);
}

#[rstest]
#[case::rlock(Rlock)]
#[case::fenced(Fenced)]
#[case::spin(Spin)]
#[tokio::test]
async fn another_prefix_or_another_name_is_another_lock(#[case] kind: Kind) {
    let ground = Ground::shared().await;
    let lock = ground.lock(kind, LONG).await;
    let elsewhere = format!("{}other:", ground.prefix);
    let other = Lock::open(&ground.url, &elsewhere, kind, LONG).await;
    let held = [
        lock.take("sale").await,
        lock.take("another sale").await,
        other.take("sale").await,
    ];
    let waiter = lock.waits("sale", PATIENT);
    if kind != Spin {
        eventually("it listens", async || ground.listeners(&lock.key("sale")).await == 1).await;
    }
    let mut names: Vec<String> = ground.ask(&["KEYS", "*"]).await;
    names.extend(ground.ask::<Vec<String>>(&["PUBSUB", "CHANNELS"]).await);
    names.retain(|name| name.contains(&ground.prefix));
    assert!(names.len() >= 3, "{names:?}");
    for name in names {
        assert!(name.starts_with(&ground.prefix), "{name}");
        assert_eq!(name.matches(&ground.prefix).count(), 1, "{name}");
    }
    waiter.abort();
    for guard in held {
        assert_eq!(guard.release().await.unwrap(), Released::Free);
    }
}

/// What Redis Cluster puts a key in a slot by (Redis documentation, "Redis cluster specification", hash tags).
fn hash_tag(key: &str) -> &str {
    let tag = key.split_once('{').and_then(|(_, rest)| rest.split_once('}'));
    tag.map_or(key, |(tag, _)| if tag.is_empty() { key } else { tag })
}

#[rstest]
#[case::plain("sale", "sale")]
#[case::tagged("a {sale} of tickets", "sale")]
#[case::empty_braces("a {} of tickets", "a {")]
#[case::one_brace("a {sale", "a {sale")]
#[tokio::test]
async fn all_that_belongs_to_a_lock_has_one_hash_tag(#[case] name: &str, #[case] tag: &str) {
    let server = Redis::private().await.unwrap();
    let ground = Ground::on(&server).await;
    let lock = ground.lock(Fenced, LONG).await;
    let _held = lock.take(name).await;
    let _waiter = lock.waits(name, PATIENT);
    eventually("it listens", async || ground.listeners(&lock.key(name)).await == 1).await;
    let mut names: Vec<String> = ground.ask(&["KEYS", "*"]).await;
    names.extend(ground.ask::<Vec<String>>(&["PUBSUB", "CHANNELS"]).await);
    assert_eq!(names.len(), 3, "lock, token, channel: {names:?}");
    for name in names {
        assert_eq!(hash_tag(&name), tag, "{name}");
    }
}

/// The same client works again, without being told.
async fn answers_again(lock: &Lock) {
    eventually("the client reaches Redis", async || {
        lock.connections().send::<String>(redis::cmd("PING")).await.is_ok()
    })
    .await;
}

#[rstest]
#[case::rlock(Rlock)]
#[case::fenced(Fenced)]
#[case::spin(Spin)]
#[tokio::test]
async fn without_redis_there_is_an_error_and_afterwards_a_lock_again(#[case] kind: Kind) {
    let server = Redis::private().await.unwrap();
    let ground = Ground::on(&server).await;
    let lock = ground.lock(kind, RENEWED).await;
    let held = lock.take("held").await;
    let token = held.token();
    server.kill().await.unwrap();

    for wait in [Duration::ZERO, ms(300), PATIENT] {
        let began = Instant::now();
        let error = lock.acquire("sale", &Owner::fresh(), wait).await.err();
        assert!(
            matches!(error, Some(LockError::Redis(_) | LockError::NotAcquired(_))),
            "{error:?}"
        );
        // A wait may end before the command does.
        assert!(
            wait == ms(300) || matches!(error, Some(LockError::Redis(_))),
            "{error:?}"
        );
        assert!(began.elapsed() < ms(10_000), "it hangs: {:?}", began.elapsed());
    }
    // Nobody can renew it any more, and its holder is told.
    held.lost().await;
    server.start().await.unwrap();
    answers_again(&lock).await;
    // It came back empty.
    assert_eq!(held.release().await.unwrap(), Released::NotOwner);
    let again = lock.take("held").await;
    assert!(token.is_none() || again.token() > token);
    let began = Instant::now();
    eventually("a lease is over", async || began.elapsed() > OVER).await;
    assert!(!again.is_lost());
    assert_eq!(again.release().await.unwrap(), Released::Free);
}

/// It answers nobody, and hangs up on nobody.
#[rstest]
#[case::rlock(Rlock)]
#[case::fenced(Fenced)]
#[case::spin(Spin)]
#[tokio::test]
async fn a_redis_that_stands_still_holds_up_neither_an_error_nor_the_notice_of_a_loss(#[case] kind: Kind) {
    let server = Redis::private().await.unwrap();
    let ground = Ground::on(&server).await;
    let lock = ground.lock(kind, Lease::Renewed(ms(900))).await;
    let sent = Instant::now();
    let held = lock.take("sale").await;
    assert_eq!(ground.ask::<String>(&["CLIENT", "PAUSE", "4000", "ALL"]).await, "OK");
    let waiting = async {
        let began = Instant::now();
        let error = lock.acquire("other", &Owner::fresh(), PATIENT).await.err();
        (error, began.elapsed())
    };
    let lost = async {
        held.lost().await;
        sent.elapsed()
    };
    let ((error, took), lost) = tokio::join!(waiting, lost);
    assert!(matches!(error, Some(LockError::Redis(_))), "{error:?}");
    // By themselves, and not because Redis goes on.
    assert!(took < ms(4_000), "{took:?}");
    assert!(ms(900) <= lost && lost < ms(4_000), "{lost:?}");
}

/// Nothing of what this process says reaches Redis, and nobody tells it so.
#[rstest]
#[case::rlock(Rlock)]
#[case::spin(Spin)]
#[tokio::test]
async fn one_renewal_may_fail_and_the_next_still_comes_in_time(#[case] kind: Kind) {
    let server = Redis::private().await.unwrap();
    let (ground, proxy) = behind_a_proxy(&server).await;
    // Its third is as long as a command may take: who waited for the answer first would have no time for another renewal.
    let lock = ground.lock(kind, Lease::Renewed(ms(1_500))).await;
    let held = lock.take("sale").await;
    proxy.cuts(Cut::Silence(""));
    held.lost().await;
    assert!(proxy.connections_silenced() > 0, "the fault did not strike");
    let renewals = proxy.said_in_vain();
    assert!(renewals >= 2, "{renewals} within one lease");
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

/// The queue of a process must not find out one by one, each with a time-out of its own, what the first of them knows.
#[rstest]
#[case::rlock(Rlock)]
#[case::fenced(Fenced)]
#[tokio::test]
async fn all_who_queue_in_a_process_hear_at_once_that_redis_does_not_answer(#[case] kind: Kind) {
    const WAITERS: usize = 20;

    let server = Redis::private().await.unwrap();
    let (ground, proxy) = behind_a_proxy(&server).await;
    let lock = ground.lock(kind, LONG).await;
    let key = lock.key("sale");
    // Somebody has it, for so long that all of them queue by then.
    let _: i64 = ground.ask(&["HSET", &key, "somebody", "1"]).await;
    let _: i64 = ground.ask(&["PEXPIRE", &key, "3000"]).await;
    let waiters: Vec<_> = (0..WAITERS).map(|_| lock.waits("sale", PATIENT)).collect();
    eventually("they listen", async || ground.listeners(&key).await == 1).await;
    proxy.cuts(Cut::Silence(""));
    for waiter in waiters {
        let told = waiter.await.unwrap();
        assert!(matches!(told, Err(LockError::Redis(_))), "{:?}", told.err());
    }
    assert!(proxy.connections_silenced() > 0, "the fault did not strike");
    let asked = proxy.said_in_vain();
    assert!(asked < WAITERS as u64, "Redis was asked {asked} times");
}

/// What went wrong once is no reason for those who come later: they wait, as the lock is taken, and not gone.
#[rstest]
#[case::rlock(Rlock)]
#[case::fenced(Fenced)]
#[tokio::test]
async fn after_a_failure_others_of_the_process_wait_again(#[case] kind: Kind) {
    let server = Redis::private().await.unwrap();
    let (behind, proxy) = behind_a_proxy(&server).await;
    let (lock, other) = (
        behind.lock(kind, LONG).await,
        Ground::on(&server).await.lock(kind, LONG).await,
    );
    proxy.cuts(Cut::Everything);
    let failed = lock.acquire("sale", &Owner::fresh(), PATIENT).await.err();
    assert!(
        matches!(failed, Some(LockError::Redis(_))),
        "the fault did not strike: {failed:?}"
    );
    proxy.cuts(Cut::Nothing);
    answers_again(&lock).await;

    let held = other.take("sale").await;
    let waiters = [lock.waits("sale", PATIENT), lock.waits("sale", PATIENT)];
    eventually("they listen", async || behind.listeners(&lock.key("sale")).await == 1).await;
    assert_eq!(held.release().await.unwrap(), Released::Free);
    for waiter in waiters {
        let (got, _) = waiter.await.unwrap().unwrap();
        assert_eq!(got.release().await.unwrap(), Released::Free);
    }
}

/// Nothing comes from Redis as long as nobody gives a lock back. So a connection that is dead has to be told from one that is quiet.
#[rstest]
#[case::rlock(Rlock)]
#[case::fenced(Fenced)]
#[tokio::test]
async fn a_subscription_that_went_silent_is_missed_and_made_anew(#[case] kind: Kind) {
    let server = Redis::private().await.unwrap();
    let direct = Ground::on(&server).await;
    let (ground, proxy) = behind_a_proxy(&server).await;
    let (here, there) = (direct.lock(kind, LONG).await, ground.lock(kind, LONG).await);
    let held = here.take("sale").await;
    let waiter = there.waits("sale", PATIENT);
    eventually("the waiter listens", async || {
        ground.listeners(&here.key("sale")).await == 1
    })
    .await;
    proxy.cuts(Cut::Silence("SUBSCRIBE"));
    eventually("it went silent", async || proxy.connections_silenced() == 1).await;
    assert_eq!(held.release().await.unwrap(), Released::Free);
    proxy.cuts(Cut::Nothing);
    // It would be at the end of the lease that it saw, and its patience ends before that.
    let (_next, _at) = waiter.await.unwrap().unwrap();
    assert!(proxy.said_in_vain() > 0, "nobody asked whether the connection is one");
}

/// The next one here asks right behind the release. Were that always so, others would wait for as long as anybody queues here.
#[rstest]
#[case::rlock(Rlock)]
#[case::fenced(Fenced)]
#[tokio::test]
async fn a_process_whose_queue_never_ends_lets_others_in(#[case] kind: Kind) {
    /// Each time somebody elsewhere has a chance, and no certainty.
    const CHANCES: u32 = 10;

    let server = Redis::private().await.unwrap();
    let direct = Ground::on(&server).await;
    let (ground, proxy) = behind_a_proxy(&server).await;
    let (crowd, elsewhere) = (ground.lock(kind, LONG).await, direct.lock(kind, LONG).await);
    // On a network, beside whatever else a process asks of Redis, a release and the question behind it get there together.
    proxy.cuts(Cut::Slow(ms(1)));
    let others: Vec<_> = (0..4)
        .map(|_| {
            let redis = crowd.connections().clone();
            tokio::spawn(async move { while redis.send::<String>(redis::cmd("PING")).await.is_ok() {} })
        })
        .collect();
    let turns = Arc::<AtomicU32>::default();
    let queueing: Vec<_> = (0..8)
        .map(|_| {
            let (lock, turns) = (crowd.clone(), turns.clone());
            tokio::spawn(async move {
                loop {
                    let held = lock.acquire("sale", &Owner::fresh(), PATIENT).await.unwrap();
                    turns.fetch_add(1, Relaxed);
                    assert_eq!(held.release().await.unwrap(), Released::Free);
                }
            })
        })
        .collect();
    eventually("they queue", async || turns.load(Relaxed) > 20).await;
    let before = turns.load(Relaxed);
    let waiter = elsewhere.waits("sale", PATIENT);
    let most = CHANCES * MAX_LOCAL_HANDOFFS;
    eventually("it is in, or had its chances", async || {
        waiter.is_finished() || turns.load(Relaxed) - before > most
    })
    .await;
    let passed = turns.load(Relaxed) - before;
    for task in queueing.into_iter().chain(others) {
        task.abort();
    }
    assert!(passed <= most, "{passed} were let in before it");
    println!("{passed} were let in before it");
    let (held, _) = waiter.await.unwrap().unwrap();
    assert_eq!(held.release().await.unwrap(), Released::Free);
}

const ROLE: &str = "LV3_LOCK_ROLE";

/// This program once more, as another process with a part of its own.
fn process(role: &str, kind: Kind, ground: &Ground) -> tokio::process::Command {
    let command = keeper::command(std::env::current_exe().unwrap()).unwrap();
    let mut command = tokio::process::Command::from(command);
    command
        .args(["--exact", "lock::plays_a_part_in_another_test", "--nocapture"])
        .env(ROLE, role)
        .env("LV3_LOCK_KIND", format!("{kind:?}"))
        .env("LV3_LOCK_URL", &ground.url)
        .env("LV3_LOCK_PREFIX", &ground.prefix)
        .stdout(Stdio::null());
    command
}

const OWNERS: usize = 8;
const ROUNDS: usize = 8;

/// No test: what the other processes do that tests here start. Without a part it has nothing to do.
#[tokio::test]
async fn plays_a_part_in_another_test() {
    let Ok(role) = std::env::var(ROLE) else { return };
    let told = |what: &str| std::env::var(format!("LV3_LOCK_{what}")).unwrap();
    let kind = match told("KIND").as_str() {
        "Rlock" => Rlock,
        "Fenced" => Fenced,
        _ => Spin,
    };
    let ground = Ground {
        raw: raw(&told("URL")).await,
        url: told("URL"),
        prefix: told("PREFIX"),
        _prefix: None,
        _server: None,
    };
    match role.as_str() {
        "counts" | "counts without a lock" => {
            let lock = (role == "counts").then_some(ground.lock(kind, RENEWED).await);
            let key = |name: &str| format!("{}{name}", ground.prefix);
            let counting = (0..OWNERS).map(|_| async {
                for _ in 0..ROUNDS {
                    let guard = match &lock {
                        Some(lock) => Some(lock.acquire("sale", &Owner::fresh(), PATIENT).await.unwrap()),
                        None => None,
                    };
                    let inside: i64 = ground.ask(&["INCR", &key("inside")]).await;
                    if inside > 1 {
                        let _: i64 = ground.ask(&["INCR", &key("met")]).await;
                    }
                    let number: Option<i64> = ground.ask(&["GET", &key("number")]).await;
                    tokio::time::sleep(ms(1)).await;
                    let next = (number.unwrap_or(0) + 1).to_string();
                    let _: String = ground.ask(&["SET", &key("number"), &next]).await;
                    let _: i64 = ground.ask(&["DECR", &key("inside")]).await;
                    if let Some(guard) = guard {
                        assert_eq!(guard.release().await.unwrap(), Released::Free);
                    }
                }
            });
            futures_util::future::join_all(counting).await;
        }
        "holds" => {
            let held = ground.lock(kind, RENEWED).await.take("sale").await;
            // In a task of its own: it may be frozen before it hears the answer, and then the answer is too late.
            let (mut raw, holds) = (ground.raw.clone(), format!("{}holds", ground.prefix));
            tokio::spawn(async move {
                let _: redis::RedisResult<String> =
                    redis::cmd("SET").arg(&holds).arg("yes").query_async(&mut raw).await;
            });
            held.lost().await;
            let told = format!("{:?}", held.release().await.unwrap());
            let _: String = ground.ask(&["SET", &format!("{}told", ground.prefix), &told]).await;
        }
        "takes it again and again" => {
            let lock = ground.lock(kind, SHORT).await;
            loop {
                let held = lock.acquire("sale", &Owner::fresh(), PATIENT).await.unwrap();
                let _ = held.release().await;
            }
        }
        other => panic!("there is no part {other}"),
    }
}

/// The number that many counted up together, and how often two of them met.
async fn counted(role: &str, kind: Kind) -> (usize, usize) {
    let ground = Ground::shared().await;
    let mut processes: Vec<_> = (0..3).map(|_| process(role, kind, &ground).spawn().unwrap()).collect();
    for process in &mut processes {
        assert!(process.wait().await.unwrap().success());
    }
    let number: usize = ground.ask(&["GET", &format!("{}number", ground.prefix)]).await;
    let met: Option<usize> = ground.ask(&["GET", &format!("{}met", ground.prefix)]).await;
    (number, met.unwrap_or(0))
}

#[rstest]
#[case::rlock(Rlock)]
#[case::fenced(Fenced)]
#[case::spin(Spin)]
#[tokio::test]
async fn of_many_in_three_processes_one_is_inside(#[case] kind: Kind) {
    assert_eq!(counted("counts", kind).await, (3 * OWNERS * ROUNDS, 0));
}

/// The check above would see it.
#[tokio::test]
async fn without_a_lock_they_meet_and_lose_count() {
    let (number, met) = counted("counts without a lock", Rlock).await;
    assert!(number < 3 * OWNERS * ROUNDS, "{number}");
    assert!(met > 0);
}

async fn signal(name: &str, pid: u32) {
    let sent = tokio::process::Command::new("kill")
        .args([format!("-{name}"), pid.to_string()])
        .status();
    assert!(sent.await.unwrap().success());
}

#[rstest]
#[case::rlock(Rlock)]
#[case::fenced(Fenced)]
#[case::spin(Spin)]
#[tokio::test]
async fn a_killed_holder_keeps_the_lock_for_what_is_left_of_its_lease(#[case] kind: Kind) {
    let ground = Ground::shared().await;
    let lock = ground.lock(kind, LONG).await;
    let key = lock.key("sale");
    let mut holder = process("holds", kind, &ground).spawn().unwrap();
    eventually("it holds the lock", async || ground.pttl(&key).await > 0).await;
    holder.start_kill().unwrap();
    assert_eq!(holder.wait().await.unwrap().signal(), Some(9));
    let read = Instant::now();
    let left = u64::try_from(ground.pttl(&key).await).expect("it is held");
    let (_next, at) = lock.waits("sale", PATIENT).await.unwrap().unwrap();
    assert!(at - read + A_TICK >= ms(left), "{:?} of {left} ms", at - read);
    assert!(at - read < ms(left) + PROMPTLY, "{:?} of {left} ms", at - read);
}

/// Whatever it was about to do with the lock, no part of it stays.
#[rstest]
#[case::rlock(Rlock)]
#[case::fenced(Fenced)]
#[case::spin(Spin)]
#[tokio::test]
async fn killed_at_any_moment_a_process_leaves_no_lock_without_an_end(#[case] kind: Kind) {
    let mut moments = StdRng::seed_from_u64(38);
    let (mut held, mut free) = (0, 0);
    for _ in 0..8 {
        let ground = Ground::shared().await;
        let lock = ground.lock(kind, LONG).await;
        let key = lock.key("sale");
        let mut process = process("takes it again and again", kind, &ground).spawn().unwrap();
        eventually("it has the lock", async || ground.pttl(&key).await > 0).await;
        tokio::time::sleep(Duration::from_micros(moments.random_range(0..20_000))).await;
        process.start_kill().unwrap();
        assert_eq!(
            process.wait().await.unwrap().signal(),
            Some(9),
            "the fault did not strike"
        );
        match ground.pttl(&key).await {
            -2 => free += 1,
            left => {
                assert!((0..=500).contains(&left), "{left} ms left");
                held += 1;
            }
        }
        let next = lock.acquire("sale", &Owner::fresh(), PATIENT).await.unwrap();
        assert_eq!(next.release().await.unwrap(), Released::Free);
    }
    println!("{kind:?}: killed {held} times with the lock, {free} times without");
}

/// The limit of every lock with a lease: it goes to the next one. The holder learns of it once it goes on.
#[rstest]
#[case::rlock(Rlock)]
#[case::fenced(Fenced)]
#[case::spin(Spin)]
#[tokio::test]
async fn a_frozen_holder_loses_the_lock_and_is_told_when_it_goes_on(#[case] kind: Kind) {
    let ground = Ground::shared().await;
    let lock = ground.lock(kind, LONG).await;
    let mut holder = process("holds", kind, &ground).spawn().unwrap();
    let pid = holder.id().unwrap();
    // It says so itself: a lock that is there is the holder's for Redis, and the holder may not have heard of it yet.
    let holds = format!("{}holds", ground.prefix);
    eventually("it holds the lock", async || {
        ground.ask::<bool>(&["EXISTS", &holds]).await
    })
    .await;
    signal("STOP", pid).await;
    let (next, _) = lock.waits("sale", PATIENT).await.unwrap().unwrap();
    signal("CONT", pid).await;
    assert!(holder.wait().await.unwrap().success());
    let told: String = ground.ask(&["GET", &format!("{}told", ground.prefix)]).await;
    assert_eq!(told, "NotOwner");
    assert!(!next.is_lost());
    assert_eq!(next.release().await.unwrap(), Released::Free);
}
