//! LV.3: what befalls a lock in Redis, its holders and those who wait for it. Every fault is real, and seen from outside to have struck.

#![allow(clippy::unwrap_used)]

use std::{
    future::Future,
    sync::Arc,
    time::{Duration, Instant},
};

use box_office::{
    Invariant::{Conservation, NoOversell},
    Level, SaleId, Strategy,
};
use lv3_redis_lock::LEVEL;
use rstest::rstest;
use suite::{
    backends::{self, Redis, Reply, Stand},
    history::{Answer, Refused},
    http_contract::Talk,
    judge::judge,
    ledger::Ledger,
    rush::{Program, Rush, SALE},
    schedule::Rehearsal,
};

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
async fn instance(stand: &Stand, name: &str, lease: Duration) -> Talk {
    Talk::with(stand, &program(lease), &LEVEL, strategy(name))
        .await
        .unwrap()
}

/// Starts one that freezes when a reservation comes to this point for the first time.
async fn freezes_at(point: &str, stand: &Stand, name: &str, lease: Duration) -> Talk {
    let program = program(lease).variable("OVERSOLD_STOP_AT", format!("{point}#1"));
    Talk::with(stand, &program, &LEVEL, strategy(name)).await.unwrap()
}

/// The lock of a sale, as Redis tells of it.
struct Lock<'a> {
    redis: &'a Redis,
    key: String,
}

impl<'a> Lock<'a> {
    fn of(sale: SaleId, stand: &Stand, redis: &'a Redis) -> Self {
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

/// Looks until it is so.
async fn until<F: Future<Output = bool>>(what: &str, is_so: impl Fn() -> F) {
    let gave_up = Instant::now() + PATIENCE;
    while !is_so().await {
        assert!(Instant::now() < gave_up, "after {PATIENCE:?} still not so: {what}");
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
}

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

#[rstest]
#[case::spin("spin", Late::Oversells)]
#[case::rlock("rlock", Late::Oversells)]
#[case::fenced("fenced", Late::IsRefused)]
#[case::token_not_checked("broken/token-not-checked", Late::Oversells)]
#[tokio::test]
async fn a_holder_that_was_frozen_past_its_lease_sells_unless_the_row_checks_its_token(
    #[case] name: &str,
    #[case] late: Late,
) {
    let lease = Duration::from_millis(500);
    let stand = Stand::shared(strategy(name)).await.unwrap();
    let redis = backends::redis().await.unwrap();
    let lock = Lock::of(SALE, &stand, &redis);
    let ledger = Ledger::new(strategy(name), 1);
    let (first, second) = tokio::join!(freezes_at(DECIDED, &stand, name, lease), instance(&stand, name, lease));
    first.opens_a_sale(1).await.unwrap();

    let (ann, ()) = tokio::join!(ledger.ask(&first, 1), async {
        first.stands_still(PATIENCE).await.expect("the fault did not strike");
        ledger.struck("the first instance frozen");
        until("the lease has ended", async || !lock.is_taken().await).await;
        let bob = ledger.ask(&second, 2).await.unwrap();
        assert!(is_confirmed(&bob), "nobody holds the lock, and Bob is told {bob:?}");
        first.goes_on().await.unwrap();
        ledger.healed();
    });
    let ann = ann.unwrap();
    match late {
        Late::Oversells => assert!(is_confirmed(&ann), "{ann:?}"),
        Late::IsRefused => {
            assert_eq!(ann, Answer::Undecided);
            assert_eq!(ledger.ask(&first, 1).await.unwrap(), SOLD_OUT);
        }
    }
    first.stop().await.unwrap();
    second.stop().await.unwrap();
    let verdict = ledger.verdict(&stand).await.unwrap();
    println!("{verdict}");
    match late {
        Late::Oversells => assert!(verdict.breaks(NoOversell) && verdict.breaks(Conservation), "{verdict}"),
        Late::IsRefused => assert!(verdict.findings.is_empty(), "{verdict}"),
    }
}
