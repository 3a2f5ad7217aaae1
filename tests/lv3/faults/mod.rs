//! LV.3: fault injection against the lock in Redis, its holders and its waiters. Every fault is
//! real, and each test checks that it took effect.

mod commits;
mod holders;
mod outages;
mod readiness;
mod waiters;

use std::{
    cell::Cell,
    panic::AssertUnwindSafe,
    time::{Duration, Instant},
};

use box_office::{
    Database, Improvements, Instrumentation,
    Invariant::{self, Conservation, NoOversell, Progress},
    Order, RequestKey, SaleId, Steps, Strategy, StrategyContext, StrategyMetrics,
};

use futures_util::FutureExt;

use harness::{
    DelayedCommits, assert_after_fault, assert_failure_mode,
    backends::{self, Private, Redis, Reply, TestEnvironment},
    history::{Answer, Refused},
    history_recorder::HistoryRecorder,
    proxy::{Fault, Proxy},
    rush::{Program, Rush, SALE},
    test_server::TestServer,
};

use lv3_redis_lock::{
    LEVEL,
    lock::{Backoff, Connections, FencingTokens, Guard, Lease, LockError, Owner, RLock, Released, SpinLock},
};

use redis::Script;
use rstest::rstest;
use tokio::time::timeout;

/// The lease in most of these tests: long enough for a few checks before it expires.
const LEASE: Duration = Duration::from_secs(2);

/// The time limit for anything that should happen at once, on a busy machine.
const PATIENCE: Duration = Duration::from_secs(8);

/// The scheduling point at which a request holds the lock and has read that a ticket is left.
const DECIDED: &str = "decided to sell";

fn strategy(name: &str) -> &'static Strategy {
    LEVEL
        .strategy(name)
        .unwrap_or_else(|| panic!("LV.3 has no strategy {name}"))
}

fn program(lease: Duration) -> Program {
    Program::new(env!("CARGO_BIN_EXE_lv3-redis-lock")).variable("LOCK_LEASE_MS", lease.as_millis().to_string())
}

/// Starts one instance.
async fn instance(stand: &TestEnvironment, name: &str, lease: Duration) -> TestServer {
    TestServer::start(stand, &program(lease), &LEVEL, strategy(name))
        .await
        .unwrap()
}

/// Starts an instance that freezes when the first reservation reaches this point.
async fn instance_frozen_at(point: &str, stand: &TestEnvironment, name: &str, lease: Duration) -> TestServer {
    let program = program(lease).variable("OVERSOLD_STOP_AT", format!("{point}#1"));
    TestServer::start(stand, &program, &LEVEL, strategy(name))
        .await
        .unwrap()
}

/// The lock of a sale, read from Redis directly.
struct Lock<'a> {
    redis: &'a Redis,
    key: String,
}

impl<'a> Lock<'a> {
    fn of(sale: SaleId, stand: &TestEnvironment, redis: &'a Redis) -> Self {
        let prefix = stand.prefix().expect("a strategy of this level has a place in Redis");
        Self {
            redis,
            key: format!("{prefix}lock:{{sale:{sale}}}"),
        }
    }

    /// The remaining lease; `None` if the lock is free.
    async fn ttl(&self) -> Option<Duration> {
        match self.redis.command(&["PTTL", &self.key]).await.unwrap() {
            Reply::Int(-2) => None,
            Reply::Int(left_ms) => Some(Duration::from_millis(left_ms.try_into().expect("it has an end"))),
            other => panic!("PTTL is answered with {other:?}"),
        }
    }

    async fn is_held(&self) -> bool {
        self.ttl().await.is_some()
    }

    /// Waits for one renewal.
    async fn wait_for_renewal(&self) {
        let least = Cell::new(Duration::MAX);
        until("the fault did not strike: the lock is not renewed", async || {
            let left = self.ttl().await.unwrap_or(Duration::MAX);
            let before = least.replace(left.min(least.get()));
            left < Duration::MAX && left > before
        })
        .await;
    }

    /// Ends the lease at once, by deleting the key.
    async fn expire(&self) {
        let ended = self.redis.command(&["DEL", &self.key]).await.unwrap();
        assert_eq!(ended, Reply::Int(1), "the fault did not strike: the lock was free");
    }

    /// The number of connections that subscribe to its releases.
    async fn listeners(&self) -> i64 {
        let channel = format!("{}:released", self.key);
        match self.redis.command(&["PUBSUB", "NUMSUB", &channel]).await.unwrap() {
            Reply::Array(told) => match told[..] {
                [_, Reply::Int(listeners)] => listeners,
                _ => panic!("NUMSUB is answered with {told:?}"),
            },
            other => panic!("NUMSUB is answered with {other:?}"),
        }
    }
}

/// Waits until the process is frozen at its point.
async fn wait_until_frozen(talk: &TestServer, patience: Duration) {
    let frozen = talk.wait_until_stopped(patience).await;
    frozen.expect("the fault did not strike: the process runs on");
}

/// Kills a frozen process.
async fn kill_frozen(talk: &TestServer) {
    let left = talk.kill().await.unwrap().to_string();
    assert!(left.contains("signal: 9"), "the fault did not strike: {left}");
}

/// Injects a fault at the proxy, and waits until it has affected a connection.
async fn inject(proxy: &Proxy, cut: Fault) {
    proxy.inject(cut);
    until("the fault did not strike: no connection passed the proxy", async || {
        proxy.has_struck()
    })
    .await;
}

/// Waits until a commit is in flight.
async fn wait_for_commit(held: &DelayedCommits) {
    until("the fault did not strike: no commit is in flight", async || {
        held.has_struck().await.unwrap()
    })
    .await;
}

/// Each helper above must fail if its fault takes no effect.
#[tokio::test]
async fn a_fault_that_does_not_strike_is_noticed() {
    let stand = TestEnvironment::shared(strategy("rlock")).await.unwrap();
    let redis = backends::redis().await.unwrap();
    let talk = instance(&stand, "rlock", LEASE).await;
    let lock = Lock::of(SALE, &stand, &redis);
    let proxy = Proxy::before(redis.report().address.clone()).await.unwrap();
    let held = DelayedCommits::on(&stand).await.unwrap();
    let does_not = tokio::join!(
        panic_of(lock.expire()),
        panic_of(lock.wait_for_renewal()),
        panic_of(wait_until_frozen(&talk, PATIENCE)),
        panic_of(inject(&proxy, Fault::CloseAll)),
        panic_of(wait_for_commit(&held)),
    );
    for panic in <[String; 5]>::from(does_not) {
        assert!(panic.contains("did not strike"), "{panic}");
    }
    held.release().await.unwrap();
    talk.stop().await.unwrap();
}

/// The panic message of a future.
async fn panic_of(fault: impl Future<Output = ()>) -> String {
    let panic = AssertUnwindSafe(fault).catch_unwind().await.expect_err("it panics");
    let said = panic.downcast_ref::<String>().cloned();
    said.or_else(|| panic.downcast_ref::<&str>().map(|said| (*said).to_owned()))
        .expect("a panic says why")
}

/// A private Redis, and a test environment on it.
async fn private_environment(name: &str) -> (Private<Redis>, TestEnvironment) {
    let redis = Redis::private().await.unwrap();
    let postgres = backends::postgres().await.unwrap();
    let stand = TestEnvironment::on(&postgres, Some(&*redis), strategy(name).schema)
        .await
        .unwrap();
    (redis, stand)
}

/// Polls until the condition holds.
async fn until(what: &str, is_so: impl AsyncFn() -> bool) {
    let gave_up = Instant::now() + PATIENCE;
    while !is_so().await {
        assert!(Instant::now() < gave_up, "after {PATIENCE:?} still not so: {what}");
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
}

const OVERSOLD: &[Invariant] = &[NoOversell, Conservation];

/// Waiters for the lock get no answer.
const STUCK: &[Invariant] = &[Progress];

const SOLD_OUT: Answer = Answer::Refused(Refused::SoldOut);

fn is_confirmed(answer: &Answer) -> bool {
    matches!(answer, Answer::Confirmed { .. })
}

/// The answer to a holder that was frozen for longer than its lease and then resumes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum StaleHolder {
    /// It sells on a stale read: two buyers have one ticket.
    Oversells,
    /// The row rejects its write.
    IsRejected,
}

impl StaleHolder {
    fn breaks(self) -> &'static [Invariant] {
        match self {
            Self::Oversells => OVERSOLD,
            Self::IsRejected => &[],
        }
    }
}

/// Asserts the answer to a holder that resumes without its lock.
fn assert_stale_answer(told: &Answer, late: StaleHolder) {
    match late {
        StaleHolder::Oversells => assert!(is_confirmed(told), "{told:?}"),
        StaleHolder::IsRejected => assert_eq!(*told, Answer::Indeterminate),
    }
}
