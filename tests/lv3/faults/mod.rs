//! LV.3: what befalls a lock in Redis, its holders and those who wait for it. Every fault is real, and seen from outside to have struck.

mod commits;
mod holders;
mod outages;
mod waiters;

use std::{
    cell::Cell,
    panic::AssertUnwindSafe,
    time::{Duration, Instant},
};

use box_office::{
    Instrumentation,
    Invariant::{self, Conservation, NoOversell, Progress},
    Order, RequestKey, SaleId, Steps, Strategy, StrategyContext, StrategyMetrics,
};

use futures_util::FutureExt;

use harness::{
    DelayedCommits, assert_after_fault,
    backends::{self, Private, Redis, Reply, TestEnvironment},
    history::{Answer, Refused},
    history_recorder::HistoryRecorder,
    http_contract::TestServer,
    proxy::{Cut, Proxy},
    rush::{Program, Rush, SALE},
};

use lv3_redis_lock::{
    LEVEL,
    lock::{Backoff, Connections, FencingTokens, Guard, Lease, LockError, Owner, RLock, Released, SpinLock},
};

use redis::Script;
use rstest::rstest;
use tokio::time::timeout;

/// How long a lock outlives its holder in these tests. Long enough for a few looks from outside before it ends.
const LEASE: Duration = Duration::from_secs(2);

/// How long a server may take for what it does at once, on a machine that has other things to do.
const PATIENCE: Duration = Duration::from_secs(8);

/// Where a buyer holds the lock and has seen that there is a ticket.
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
    TestServer::with(stand, &program(lease), &LEVEL, strategy(name))
        .await
        .unwrap()
}

/// Starts one that freezes when a reservation comes to this point for the first time.
async fn freezes_at(point: &str, stand: &TestEnvironment, name: &str, lease: Duration) -> TestServer {
    let program = program(lease).variable("OVERSOLD_STOP_AT", format!("{point}#1"));
    TestServer::with(stand, &program, &LEVEL, strategy(name)).await.unwrap()
}

/// The lock of a sale, as Redis tells of it.
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

    /// How long it stays taken; `None` if it is free.
    async fn left(&self) -> Option<Duration> {
        match self.redis.command(&["PTTL", &self.key]).await.unwrap() {
            Reply::Int(-2) => None,
            Reply::Int(left_ms) => Some(Duration::from_millis(left_ms.try_into().expect("it has an end"))),
            other => panic!("PTTL is answered with {other:?}"),
        }
    }

    async fn is_taken(&self) -> bool {
        self.left().await.is_some()
    }

    /// Waits until it was renewed once, by whoever has it.
    async fn is_seen_renewed(&self) {
        let least = Cell::new(Duration::MAX);
        until("the fault did not strike: nobody renews the lock", async || {
            let left = self.left().await.unwrap_or(Duration::MAX);
            let before = least.replace(left.min(least.get()));
            left < Duration::MAX && left > before
        })
        .await;
    }

    /// Its lease ends here and now.
    async fn ends(&self) {
        let ended = self.redis.command(&["DEL", &self.key]).await.unwrap();
        assert_eq!(ended, Reply::Int(1), "the fault did not strike: nobody held the lock");
    }

    /// How many connections listen to its releases.
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

/// Waits until a process stands still at its point.
async fn freezes(talk: &TestServer, patience: Duration) {
    let frozen = talk.stands_still(patience).await;
    frozen.expect("the fault did not strike: the process runs on");
}

/// Kills a process that stands still.
async fn is_killed(talk: &TestServer) {
    let left = talk.kill().await.unwrap().to_string();
    assert!(left.contains("signal: 9"), "the fault did not strike: {left}");
}

/// What a proxy does to those who come through it, until it has struck somebody.
async fn strikes(proxy: &Proxy, cut: Cut) {
    proxy.cuts(cut);
    until("the fault did not strike: nobody came through the proxy", async || {
        proxy.has_struck()
    })
    .await;
}

/// Waits until a commit is on its way.
async fn strike(held: &DelayedCommits) {
    until("the fault did not strike: nobody commits", async || {
        held.have_struck().await.unwrap()
    })
    .await;
}

/// The faults above are only faults if a test can tell that they did not strike.
#[tokio::test]
async fn a_fault_that_does_not_strike_is_noticed() {
    let stand = TestEnvironment::shared(strategy("rlock")).await.unwrap();
    let redis = backends::redis().await.unwrap();
    let talk = instance(&stand, "rlock", LEASE).await;
    let lock = Lock::of(SALE, &stand, &redis);
    let proxy = Proxy::before(redis.report().address.clone()).await.unwrap();
    let held = DelayedCommits::on(&stand).await.unwrap();
    let does_not = tokio::join!(
        panic_of(lock.ends()),
        panic_of(lock.is_seen_renewed()),
        panic_of(freezes(&talk, PATIENCE)),
        panic_of(strikes(&proxy, Cut::Everything)),
        panic_of(strike(&held)),
    );
    for panic in <[String; 5]>::from(does_not) {
        assert!(panic.contains("did not strike"), "{panic}");
    }
    held.go_on().await.unwrap();
    talk.stop().await.unwrap();
}

/// What it panics with.
async fn panic_of(fault: impl Future<Output = ()>) -> String {
    let panic = AssertUnwindSafe(fault).catch_unwind().await.expect_err("it panics");
    let said = panic.downcast_ref::<String>().cloned();
    said.or_else(|| panic.downcast_ref::<&str>().map(|said| (*said).to_owned()))
        .expect("a panic says why")
}

/// A Redis that nobody else uses, and a stand on it.
async fn alone(name: &str) -> (Private<Redis>, TestEnvironment) {
    let redis = Redis::private().await.unwrap();
    let postgres = backends::postgres().await.unwrap();
    let stand = TestEnvironment::on(&postgres, Some(&*redis), strategy(name).schema)
        .await
        .unwrap();
    (redis, stand)
}

/// Looks until it is so.
async fn until(what: &str, is_so: impl AsyncFn() -> bool) {
    let gave_up = Instant::now() + PATIENCE;
    while !is_so().await {
        assert!(Instant::now() < gave_up, "after {PATIENCE:?} still not so: {what}");
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
}

const OVERSOLD: &[Invariant] = &[NoOversell, Conservation];

/// Whoever waits for the lock is never told anything.
const STUCK: &[Invariant] = &[Progress];

const SOLD_OUT: Answer = Answer::Refused(Refused::SoldOut);

fn is_confirmed(answer: &Answer) -> bool {
    matches!(answer, Answer::Confirmed { .. })
}

/// What a holder is told that was frozen for longer than its lease and then goes on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Late {
    /// It has sold, on what it read before: two buyers have the one ticket.
    Oversells,
    /// Its write came too late, and it learns that.
    IsRefused,
}

impl Late {
    fn breaks(self) -> &'static [Invariant] {
        match self {
            Self::Oversells => OVERSOLD,
            Self::IsRefused => &[],
        }
    }
}
