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
    Order, Priority, RequestKey, SaleId, Steps, Strategy, StrategyContext, StrategyMetrics,
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
const TIMEOUT: Duration = Duration::from_secs(8);

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
async fn instance(environment: &TestEnvironment, name: &str, lease: Duration) -> TestServer {
    TestServer::start(environment, &program(lease), &LEVEL, strategy(name))
        .await
        .unwrap()
}

/// Starts an instance that freezes when the first reservation reaches this point.
async fn instance_frozen_at(point: &str, environment: &TestEnvironment, name: &str, lease: Duration) -> TestServer {
    let program = program(lease).variable("OVERSOLD_STOP_AT", format!("{point}#1"));
    TestServer::start(environment, &program, &LEVEL, strategy(name))
        .await
        .unwrap()
}

/// The lock of a sale, read from Redis directly.
struct Lock<'a> {
    redis: &'a Redis,
    key: String,
}

impl<'a> Lock<'a> {
    fn of(sale: SaleId, environment: &TestEnvironment, redis: &'a Redis) -> Self {
        let prefix = environment
            .prefix()
            .expect("a strategy of this level has a prefix in Redis");
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
            Reply::Array(reply) => match reply[..] {
                [_, Reply::Int(listeners)] => listeners,
                _ => panic!("NUMSUB is answered with {reply:?}"),
            },
            other => panic!("NUMSUB is answered with {other:?}"),
        }
    }
}

/// Waits until the process is frozen at its point.
async fn wait_until_frozen(server: &TestServer, timeout: Duration) {
    let frozen = server.wait_until_stopped(timeout).await;
    frozen.expect("the fault did not strike: the process runs on");
}

/// Kills a frozen process.
async fn kill_frozen(server: &TestServer) {
    let exit = server.kill().await.unwrap().to_string();
    assert!(exit.contains("signal: 9"), "the fault did not strike: {exit}");
}

/// Injects a fault at the proxy, and waits until it has affected a connection.
async fn inject(proxy: &Proxy, fault: Fault) {
    proxy.inject(fault);
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
    let environment = TestEnvironment::shared(strategy("rlock")).await.unwrap();
    let redis = backends::redis().await.unwrap();
    let server = instance(&environment, "rlock", LEASE).await;
    let lock = Lock::of(SALE, &environment, &redis);
    let proxy = Proxy::before(redis.report().address.clone()).await.unwrap();
    let held = DelayedCommits::on(&environment).await.unwrap();
    let does_not = tokio::join!(
        panic_of(lock.expire()),
        panic_of(lock.wait_for_renewal()),
        panic_of(wait_until_frozen(&server, TIMEOUT)),
        panic_of(inject(&proxy, Fault::CloseAll)),
        panic_of(wait_for_commit(&held)),
    );
    for panic in <[String; 5]>::from(does_not) {
        assert!(panic.contains("did not strike"), "{panic}");
    }
    held.release().await.unwrap();
    server.stop().await.unwrap();
}

/// The panic message of a future.
async fn panic_of(fault: impl Future<Output = ()>) -> String {
    let panic = AssertUnwindSafe(fault).catch_unwind().await.expect_err("it panics");
    let message = panic.downcast_ref::<String>().cloned();
    message
        .or_else(|| panic.downcast_ref::<&str>().map(|message| (*message).to_owned()))
        .expect("a panic has a message")
}

/// A private Redis, and a test environment on it.
async fn private_environment(name: &str) -> (Private<Redis>, TestEnvironment) {
    let redis = Redis::private().await.unwrap();
    let postgres = backends::postgres().await.unwrap();
    let environment = TestEnvironment::on(&postgres, Some(&*redis), strategy(name).schema)
        .await
        .unwrap();
    (redis, environment)
}

/// Polls until the condition holds.
async fn until(what: &str, is_so: impl AsyncFn() -> bool) {
    let deadline = Instant::now() + TIMEOUT;
    while !is_so().await {
        assert!(Instant::now() < deadline, "after {TIMEOUT:?} still not so: {what}");
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
fn assert_stale_answer(answer: &Answer, late: StaleHolder) {
    match late {
        StaleHolder::Oversells => assert!(is_confirmed(answer), "{answer:?}"),
        StaleHolder::IsRejected => assert_eq!(*answer, Answer::Indeterminate),
    }
}
