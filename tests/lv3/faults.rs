//! LV.3: what befalls a lock in Redis, its holders and those who wait for it. Every fault is real, and seen from outside to have struck.

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

/// One number of what `INFO` tells, such as the calls of `cmdstat_evalsha`; 0 where it tells nothing of it.
async fn told(redis: &Redis, section: &str, line: &str, field: &str) -> u64 {
    let Reply::Bulk(info) = redis.command(&["INFO", section]).await.unwrap() else {
        panic!("INFO tells nothing")
    };
    let line = info.lines().find_map(|told| told.strip_prefix(line)?.strip_prefix(':'));
    let mut fields = line.into_iter().flat_map(|line| line.split(','));
    let value = fields.find_map(|told| told.strip_prefix(field)?.strip_prefix('='));
    value.map_or(0, |value| value.parse().unwrap())
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

#[rstest]
#[case::spin("spin", Late::Oversells)]
#[case::rlock("rlock", Late::Oversells)]
#[case::fenced("fenced", Late::IsRefused)]
#[case::token_not_checked("mutants/token-not-checked", Late::Oversells)]
#[tokio::test]
async fn a_holder_that_was_frozen_past_its_lease_sells_unless_the_row_checks_its_token(
    #[case] name: &str,
    #[case] late: Late,
) {
    let lease = Duration::from_millis(500);
    let stand = TestEnvironment::shared(strategy(name)).await.unwrap();
    let redis = backends::redis().await.unwrap();
    let lock = Lock::of(SALE, &stand, &redis);
    let ledger = HistoryRecorder::new(strategy(name));
    let (first, second) = tokio::join!(freezes_at(DECIDED, &stand, name, lease), instance(&stand, name, lease));
    first.opens_a_sale(1).await.unwrap();

    let (ann, ()) = tokio::join!(ledger.ask(&first, 1), async {
        freezes(&first, PATIENCE).await;
        ledger.struck("the first instance frozen");
        until("the lease has ended", async || !lock.is_taken().await).await;
        let bob = ledger.ask(&second, 2).await;
        assert!(is_confirmed(&bob), "nobody holds the lock, and Bob is told {bob:?}");
        first.goes_on().await.unwrap();
        ledger.healed();
    });
    match late {
        Late::Oversells => assert!(is_confirmed(&ann), "{ann:?}"),
        Late::IsRefused => {
            assert_eq!(ann, Answer::Indeterminate);
            assert_eq!(ledger.ask(&first, 1).await, SOLD_OUT);
        }
    }
    first.stop().await.unwrap();
    second.stop().await.unwrap();
    let verdict = ledger.verdict(&stand).await.unwrap();
    assert_after_fault(strategy(name), &verdict, late.breaks());
}

/// Others get in within a lease, and so much time as a busy machine takes for it. The mistakes of the broken ones cost them at least as much more.
#[rstest]
#[case::spin("spin", true)]
#[case::rlock("rlock", true)]
#[case::fenced("fenced", true)]
#[case::no_lease("mutants/no-lease", false)]
#[case::message_alone("mutants/message-alone", false)]
#[case::watchdog_not_tied("mutants/watchdog-not-tied", false)]
#[tokio::test]
async fn a_killed_holder_is_outlived_by_its_lock_for_one_lease(#[case] name: &str, #[case] others_get_in: bool) {
    // Time to freeze, to kill and to look twice.
    let lease = LEASE * 2;
    let stand = TestEnvironment::shared(strategy(name)).await.unwrap();
    let redis = backends::redis().await.unwrap();
    let lock = Lock::of(SALE, &stand, &redis);
    let ledger = HistoryRecorder::new(strategy(name));
    let (first, second) = tokio::join!(freezes_at(DECIDED, &stand, name, lease), instance(&stand, name, lease));
    first.opens_a_sale(3).await.unwrap();
    // Somebody has had the lock before, on the instance that lives on.
    assert!(is_confirmed(&ledger.ask(&second, 1).await));

    let (ann, ()) = tokio::join!(ledger.ask(&first, 2), async {
        freezes(&first, PATIENCE).await;
        assert!(lock.is_taken().await, "the fault did not strike: the lock was free");
        is_killed(&first).await;
        ledger.struck("the first instance killed");
        assert!(
            lock.is_taken().await,
            "the fault did not strike: the lock went before its holder did"
        );
        ledger.healed();
    });
    assert_eq!(ann, Answer::Indeterminate);

    // Where it is right, the wait is over when the lease is: long before a buyer gives up.
    let bob = timeout(lease + Duration::from_secs(5), ledger.ask(&second, 3)).await;
    if !others_get_in {
        assert!(bob.is_err(), "Bob is told {bob:?}, though the lock's holder is dead");
        if name != "mutants/message-alone" {
            assert!(lock.is_taken().await, "nobody holds the lock, and yet Bob waits");
        }
        is_killed(&second).await;
        let verdict = ledger.verdict(&stand).await.unwrap();
        assert_after_fault(strategy(name), &verdict, STUCK);
        return;
    }
    let bob = bob.expect("the lock outlived its holder by more than a lease");
    assert!(is_confirmed(&bob), "{bob:?}");
    assert!(
        is_confirmed(&ledger.ask(&second, 2).await),
        "nothing was sold to her before"
    );
    assert_eq!(ledger.ask(&second, 4).await, SOLD_OUT);
    second.stop().await.unwrap();
    let verdict = ledger.verdict(&stand).await.unwrap();
    assert_after_fault(strategy(name), &verdict, &[]);
}

/// Either of the two locks, through connections of its own, as another process would have them.
enum Any {
    Spin(SpinLock),
    RLock(RLock),
}

impl Any {
    async fn on(stand: &TestEnvironment, name: &str, lease: Duration) -> Self {
        let place = stand.redis(lease).unwrap().unwrap();
        let connections = Connections::open(place.url.expose(), &place.prefix).await.unwrap();
        match name {
            "spin" => Self::Spin(SpinLock::new(connections, Lease::Fixed(lease), Backoff::default()).unwrap()),
            _ => Self::RLock(RLock::new(connections, Lease::Renewed(lease), FencingTokens::None).unwrap()),
        }
    }

    async fn acquire(&self, wait: Duration) -> Result<Guard, LockError> {
        let name = format!("sale:{SALE}");
        match self {
            Self::Spin(lock) => lock.acquire(&name, &Owner::fresh(), wait).await,
            Self::RLock(lock) => lock.acquire(&name, &Owner::fresh(), wait).await,
        }
    }
}

#[rstest]
#[case::spin("spin")]
#[case::rlock("rlock")]
#[tokio::test]
async fn a_release_by_one_who_is_not_the_owner_is_refused_and_the_owner_keeps_the_lock(#[case] name: &str) {
    let stand = TestEnvironment::shared(strategy(name)).await.unwrap();
    let redis = backends::redis().await.unwrap();
    let lock = Lock::of(SALE, &stand, &redis);
    let lease = Duration::from_secs(60);
    let (here, there) = tokio::join!(Any::on(&stand, name, lease), Any::on(&stand, name, lease));

    let late = here.acquire(PATIENCE).await.unwrap();
    lock.ends().await;
    let owner = there.acquire(PATIENCE).await.unwrap();
    assert_eq!(late.release().await.unwrap(), Released::NotOwner);
    assert!(lock.is_taken().await, "it opened the owner's lock");
    assert_eq!(owner.release().await.unwrap(), Released::Free);
    assert!(!lock.is_taken().await);
}

/// The holder is on an instance of its own; the one that waits loses its subscription before the lock is given back.
#[rstest]
#[case::rlock("rlock", true)]
#[case::fenced("fenced", true)]
#[case::message_alone("mutants/message-alone", false)]
#[tokio::test]
async fn a_waiter_whose_message_is_lost_gets_in_when_the_lease_has_run_out(#[case] name: &str, #[case] gets_in: bool) {
    // So long that the lock is surely given back before.
    let lease = Duration::from_secs(4);
    let mut stand = TestEnvironment::shared(strategy(name)).await.unwrap();
    let redis = backends::redis().await.unwrap();
    let lock = Lock::of(SALE, &stand, &redis);
    let ledger = HistoryRecorder::new(strategy(name));
    let first = freezes_at(DECIDED, &stand, name, lease).await;
    let proxy = Proxy::before(redis.report().address.clone()).await.unwrap();
    stand.redis_at(proxy.port()).unwrap();
    let second = instance(&stand, name, lease).await;
    first.opens_a_sale(2).await.unwrap();

    let holds = async {
        let ann = ledger.ask(&first, 1).await;
        assert!(is_confirmed(&ann), "{ann:?}");
    };
    let waits = async {
        freezes(&first, PATIENCE).await;
        let mut bob = Box::pin(ledger.ask(&second, 2));
        let strikes = async {
            until("Bob listens", async || lock.listeners().await == 1).await;
            strikes(&proxy, Cut::Saying("SUBSCRIBE")).await;
            ledger.struck("the messages of releases are lost");
            until("nobody listens", async || lock.listeners().await == 0).await;
            assert!(
                lock.is_taken().await,
                "the fault did not strike: the lease ended before the lock was given back"
            );
            first.goes_on().await.unwrap();
            until("the lock is given back", async || !lock.is_taken().await).await;
            assert_eq!(
                lock.listeners().await,
                0,
                "the fault did not strike: somebody heard of the release"
            );
        };
        tokio::select! {
            told = &mut bob => panic!("Bob is told {told:?}, before the lock is given back and without a message"),
            () = strikes => {}
        }
        let told = timeout(lease + Duration::from_secs(3), &mut bob).await;
        assert_eq!(told.is_ok(), gets_in, "Bob, whose message is lost, is told {told:?}");
        let told = match told {
            Ok(told) => told,
            Err(_) => {
                assert!(!lock.is_taken().await, "somebody holds the lock");
                // It was the message that he waited for, and nothing else.
                proxy.cuts(Cut::Nothing);
                timeout(PATIENCE, bob).await.expect("he still waits")
            }
        };
        assert!(is_confirmed(&told));
        proxy.cuts(Cut::Nothing);
        ledger.healed();
    };
    tokio::join!(holds, waits);
    first.stop().await.unwrap();
    second.stop().await.unwrap();
    let verdict = ledger.verdict(&stand).await.unwrap();
    assert_after_fault(strategy(name), &verdict, &[]);
}

#[rstest]
#[case::spin("spin")]
#[case::rlock("rlock")]
#[case::fenced("fenced")]
#[tokio::test]
async fn a_cut_redis_sells_nothing_twice_and_all_goes_on_by_itself_after(#[case] name: &str) {
    let mut stand = TestEnvironment::shared(strategy(name)).await.unwrap();
    let redis = backends::redis().await.unwrap();
    let ledger = HistoryRecorder::new(strategy(name));
    let proxy = Proxy::before(redis.report().address.clone()).await.unwrap();
    stand.redis_at(proxy.port()).unwrap();
    let (first, second) = tokio::join!(freezes_at(DECIDED, &stand, name, LEASE), instance(&stand, name, LEASE));
    first.opens_a_sale(2).await.unwrap();

    let (ann, ()) = tokio::join!(ledger.ask(&first, 1), async {
        freezes(&first, PATIENCE).await;
        strikes(&proxy, Cut::Everything).await;
        ledger.struck("Redis is cut");
        let sent = proxy.bytes_to_server();
        let bob = ledger.ask(&second, 2).await;
        assert_eq!(bob, Answer::Indeterminate);
        assert_eq!(proxy.bytes_to_server(), sent, "the fault did not strike");
        first.goes_on().await.unwrap();
    });
    assert!(is_confirmed(&ann) || ann == Answer::Indeterminate, "{ann:?}");
    assert_eq!(ledger.ask(&second, 3).await, Answer::Indeterminate);
    proxy.cuts(Cut::Nothing);
    ledger.healed();

    for (talk, what) in [(&first, "the first is ready"), (&second, "the second is ready")] {
        until(what, async || talk.get("/readyz").await.unwrap().status.is_success()).await;
    }
    for (talk, buyer) in [(&first, 1), (&second, 2)] {
        let told = ledger.ask(talk, buyer).await;
        assert!(is_confirmed(&told), "buyer {buyer} is told {told:?}");
    }
    assert_eq!(ledger.ask(&second, 3).await, SOLD_OUT);
    first.stop().await.unwrap();
    second.stop().await.unwrap();
    let verdict = ledger.verdict(&stand).await.unwrap();
    assert_after_fault(strategy(name), &verdict, &[]);
}

#[rstest]
#[case::fenced("fenced", true)]
#[case::token_from_incr("mutants/token-from-incr", false)]
#[tokio::test]
async fn tokens_never_go_back_when_redis_starts_again_empty(#[case] name: &str, #[case] grow: bool) {
    /// Sold before: as many tokens were handed out.
    const BEFORE: u32 = 5;

    let (redis, stand) = alone(name).await;
    let database = stand.database().pool(1).await.unwrap();
    let fence = async || -> i64 {
        let fence = sqlx::query_scalar("select fence from sale where id = $1").bind(SALE);
        fence.fetch_one(&database).await.unwrap()
    };
    let ledger = HistoryRecorder::new(strategy(name));
    let (first, second) = tokio::join!(freezes_at(DECIDED, &stand, name, LEASE), instance(&stand, name, LEASE));
    second.opens_a_sale(BEFORE + 1).await.unwrap();
    for buyer in 1..=BEFORE {
        assert!(is_confirmed(&ledger.ask(&second, buyer.into()).await));
    }

    let (late, early) = (100, 101);
    let (told_late, ()) = tokio::join!(ledger.ask(&first, late), async {
        freezes(&first, PATIENCE).await;
        let before = fence().await;
        ledger.struck("Redis has lost its memory");
        let pid = redis.pid().await.unwrap();
        redis.kill().await.unwrap();
        redis.start().await.unwrap();
        assert_ne!(redis.pid().await.unwrap(), pid, "the fault did not strike");
        assert_eq!(
            redis.command(&["DBSIZE"]).await.unwrap(),
            Reply::Int(0),
            "the fault did not strike"
        );
        ledger.healed();
        until("the second is ready", async || {
            second.get("/readyz").await.unwrap().status.is_success()
        })
        .await;

        let told = ledger.ask(&second, early).await;
        let after = fence().await;
        if grow {
            assert!(is_confirmed(&told), "{told:?}");
            assert!(after > before, "the token went back from {before} to {after}");
        } else {
            // The tokens begin again at 1, and the row has seen greater ones.
            assert_eq!(told, Answer::Indeterminate);
            assert_eq!(ledger.ask(&second, early).await, Answer::Indeterminate);
            assert_eq!(after, before);
        }
        first.goes_on().await.unwrap();
    });
    if grow {
        assert_eq!(told_late, Answer::Indeterminate, "the late holder's write");
        assert_eq!(ledger.ask(&second, late).await, SOLD_OUT);
    } else {
        assert!(is_confirmed(&told_late), "{told_late:?}");
    }
    first.stop().await.unwrap();
    second.stop().await.unwrap();
    database.close().await;
    let verdict = ledger.verdict(&stand).await.unwrap();
    assert_after_fault(strategy(name), &verdict, if grow { &[] } else { STUCK });
}

#[rstest]
#[case::spin("spin", include_str!("../../levels/lv3-redis-lock/src/lock/spin_release.lua"))]
#[case::rlock("rlock", include_str!("../../levels/lv3-redis-lock/src/lock/release.lua"))]
#[case::fenced("fenced", include_str!("../../levels/lv3-redis-lock/src/lock/release.lua"))]
#[case::bare_evalsha("mutants/bare-evalsha", include_str!("../../levels/lv3-redis-lock/src/lock/spin_release.lua"))]
#[tokio::test]
async fn scripts_that_redis_has_forgotten_are_loaded_again(#[case] name: &str, #[case] release: &str) {
    // So long that only a release opens the lock.
    let lease = Duration::from_secs(60);
    let (redis, stand) = alone(name).await;
    let lock = Lock::of(SALE, &stand, &redis);
    let ledger = HistoryRecorder::new(strategy(name));
    let (first, second) = tokio::join!(freezes_at(DECIDED, &stand, name, lease), instance(&stand, name, lease));
    first.opens_a_sale(3).await.unwrap();
    assert!(is_confirmed(&ledger.ask(&second, 1).await));
    let release = Script::new(release);
    let bare = ["EVALSHA", release.get_hash(), "1", "nothing", "nobody"];
    let flush = async || {
        let knows = redis.command(&bare).await.unwrap();
        assert!(!is_noscript(&knows), "it has never been asked for: {knows:?}");
        let flushed = redis.command(&["SCRIPT", "FLUSH"]).await.unwrap();
        assert_eq!(flushed, Reply::Status("OK".to_owned()));
        let forgot = redis.command(&bare).await.unwrap();
        assert!(is_noscript(&forgot), "the fault did not strike: {forgot:?}");
    };

    flush().await;
    assert!(is_confirmed(&ledger.ask(&second, 2).await));
    if name == "mutants/bare-evalsha" {
        assert!(lock.is_taken().await, "it was given back all the same");
        assert_eq!(ledger.ask(&second, 3).await, Answer::Indeterminate);
        first.stop().await.unwrap();
        second.stop().await.unwrap();
        let verdict = ledger.verdict(&stand).await.unwrap();
        assert_after_fault(strategy(name), &verdict, STUCK);
        return;
    }
    // While somebody holds the lock, too.
    let (ann, ()) = tokio::join!(ledger.ask(&first, 3), async {
        freezes(&first, PATIENCE).await;
        flush().await;
        assert!(lock.is_taken().await);
        first.goes_on().await.unwrap();
    });
    assert!(is_confirmed(&ann));
    until("the lock is given back", async || !lock.is_taken().await).await;
    assert_eq!(ledger.ask(&second, 4).await, SOLD_OUT);
    first.stop().await.unwrap();
    second.stop().await.unwrap();
    let verdict = ledger.verdict(&stand).await.unwrap();
    assert_after_fault(strategy(name), &verdict, &[]);
}

fn is_noscript(reply: &Reply) -> bool {
    matches!(reply, Reply::Error(refusal) if refusal.starts_with("NOSCRIPT"))
}

#[rstest]
#[case::spin("spin", false)]
#[case::rlock("rlock", true)]
#[case::fenced("fenced", true)]
#[case::watchdog_not_tied("mutants/watchdog-not-tied", true)]
#[tokio::test]
async fn a_holder_slower_than_its_lease_keeps_the_lock_where_a_watchdog_renews_it(
    #[case] name: &str,
    #[case] renewed: bool,
) {
    let (lease, outlives) = (LEASE, name == "mutants/watchdog-not-tied");
    let (redis, stand) = alone(name).await;
    let lock = Lock::of(SALE, &stand, &redis);
    let ledger = HistoryRecorder::new(strategy(name));
    let rush = Rush {
        work: lease * 2,
        ..Rush::default()
    };
    let (program, strategy) = (program(lease), strategy(name));
    let slow = async || {
        TestServer::during(&rush, &stand, &program, &LEVEL, strategy)
            .await
            .unwrap()
    };
    let (first, second) = tokio::join!(slow(), slow());
    first.opens_a_sale(1).await.unwrap();

    let began = Instant::now();
    let (ann, bob) = tokio::join!(ledger.ask(&first, 1), async {
        until("Ann has the lock", async || lock.is_taken().await).await;
        ledger.ask(&second, 2).await
    });
    assert!(began.elapsed() > lease * 2, "the fault did not strike: she was quick");
    assert!(is_confirmed(&ann));
    match renewed {
        true => assert_eq!(bob, SOLD_OUT),
        false => assert!(is_confirmed(&bob), "{bob:?}"),
    }
    let verdict = ledger.verdict(&stand).await.unwrap();
    assert_after_fault(strategy, &verdict, if renewed { &[] } else { OVERSOLD });

    // Both are done, and so is their watchdog: somebody else's lock lives for its lease, and nobody asks Redis for anything.
    until("the lock is given back", async || !lock.is_taken().await).await;
    let calls = async || told(&redis, "commandstats", "cmdstat_evalsha", "calls").await;
    let before = calls().await;
    assert!(before > 0, "INFO does not tell of the scripts");
    let lease_ms = lease.as_millis().to_string();
    for command in [
        ["HSET", &lock.key, "somebody", "1"].as_slice(),
        &["PEXPIRE", &lock.key, &lease_ms],
    ] {
        assert_eq!(redis.command(command).await.unwrap(), Reply::Int(1));
    }
    if outlives {
        // By somebody who has no business with it.
        lock.is_seen_renewed().await;
        is_killed(&first).await;
        is_killed(&second).await;
        return;
    }
    until("somebody's lease has ended", async || !lock.is_taken().await).await;
    assert_eq!(calls().await, before, "something is still renewed");
    first.stop().await.unwrap();
    second.stop().await.unwrap();
}

/// What somebody is told whose work Redis or Postgres goes on with too late.
fn is_told(told: &Answer, late: Late) {
    match late {
        Late::Oversells => assert!(is_confirmed(told), "{told:?}"),
        Late::IsRefused => assert_eq!(*told, Answer::Indeterminate),
    }
}

/// The holder lives and works, and none of its renewals gets through.
#[rstest]
#[case::rlock("rlock", Late::Oversells)]
#[case::fenced("fenced", Late::IsRefused)]
#[tokio::test]
async fn a_live_holder_that_cannot_renew_sells_unless_the_row_checks_its_token(#[case] name: &str, #[case] late: Late) {
    let stand = TestEnvironment::shared(strategy(name)).await.unwrap();
    let redis = backends::redis().await.unwrap();
    let lock = Lock::of(SALE, &stand, &redis);
    let ledger = HistoryRecorder::new(strategy(name));
    let proxy = Proxy::before(redis.report().address.clone()).await.unwrap();
    let slow = Rush {
        work: LEASE * 3,
        ..Rush::default()
    };
    let behind = program(LEASE).variable("REDIS_URL", proxy.instead_of(redis.url()));
    let (first, second) = tokio::join!(
        async {
            let first = TestServer::during(&slow, &stand, &behind, &LEVEL, strategy(name));
            first.await.unwrap()
        },
        instance(&stand, name, LEASE)
    );
    second.opens_a_sale(1).await.unwrap();

    let began = Instant::now();
    let ann = async {
        let ann = ledger.ask(&first, 1).await;
        (ann, began.elapsed())
    };
    let bob = async {
        lock.is_seen_renewed().await;
        strikes(&proxy, Cut::Everything).await;
        ledger.struck("the holder is cut off from Redis");
        until("the lease has ended", async || !lock.is_taken().await).await;
        let bob = ledger.ask(&second, 2).await;
        (bob, began.elapsed())
    };
    let ((ann, worked), (bob, by)) = tokio::join!(ann, bob);
    assert!(
        by < worked,
        "the fault did not strike: she had written before he was there"
    );
    assert!(is_confirmed(&bob), "{bob:?}");
    is_told(&ann, late);
    proxy.cuts(Cut::Nothing);
    ledger.healed();
    if late == Late::IsRefused {
        assert_eq!(ledger.ask(&second, 1).await, SOLD_OUT);
    }
    first.stop().await.unwrap();
    second.stop().await.unwrap();
    let verdict = ledger.verdict(&stand).await.unwrap();
    assert_after_fault(strategy(name), &verdict, late.breaks());
}

/// When Postgres carries out the commit whose connection broke.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Carried {
    /// While the lock still lives that covers it.
    Out,
    /// When the lease has ended and somebody else has decided.
    OutTooLate,
}

/// Ann's connection to Postgres breaks with her commit on its way. She is undecided, and her lock is not given back.
#[rstest]
#[case::spin("spin", Carried::Out, true)]
#[case::rlock("rlock", Carried::Out, true)]
#[case::fenced("fenced", Carried::Out, true)]
#[case::commit_not_covered("mutants/commit-not-covered", Carried::Out, false)]
#[case::spin_and_too_late("spin", Carried::OutTooLate, false)]
#[case::rlock_and_too_late("rlock", Carried::OutTooLate, false)]
#[case::fenced_and_too_late("fenced", Carried::OutTooLate, true)]
#[tokio::test]
async fn a_commit_that_nobody_knows_the_end_of_is_covered_by_its_lock_for_a_lease(
    #[case] name: &str,
    #[case] carried: Carried,
    #[case] keeps: bool,
) {
    let stand = TestEnvironment::shared(strategy(name)).await.unwrap();
    let (redis, postgres) = tokio::join!(backends::redis(), backends::postgres());
    let (redis, postgres) = (redis.unwrap(), postgres.unwrap());
    let lock = Lock::of(SALE, &stand, &redis);
    let ledger = HistoryRecorder::new(strategy(name));
    let proxy = Proxy::before(postgres.report().address.clone()).await.unwrap();
    let lease = match carried {
        // Bob waits for it to end, and hears of nothing before that.
        Carried::Out => LEASE * 2,
        Carried::OutTooLate => LEASE,
    };
    let behind = program(lease).variable("DATABASE_URL", proxy.instead_of(&stand.database().url()));
    let (first, second) = tokio::join!(
        async {
            let first = TestServer::with(&stand, &behind, &LEVEL, strategy(name));
            first.await.unwrap()
        },
        instance(&stand, name, lease)
    );
    second.opens_a_sale(1).await.unwrap();
    let held = DelayedCommits::on(&stand).await.unwrap();

    let (ann, ()) = tokio::join!(ledger.ask(&first, 1), async {
        strike(&held).await;
        strikes(&proxy, Cut::Everything).await;
        ledger.struck("a commit has lost its connection");
    });
    assert_eq!(ann, Answer::Indeterminate);
    let (bob, ()) = tokio::join!(ledger.ask(&second, 2), async {
        let at_the_row = async || held.waiting("transactionid tuple").await.unwrap() > 0;
        if carried == Carried::Out && keeps && name != "fenced" {
            // Nobody renews the lock, and nobody gives it back.
            until("half of the lease is over", async || {
                lock.left().await.is_none_or(|left| left < lease / 2)
            })
            .await;
            assert!(
                lock.is_taken().await && !at_the_row().await,
                "her lock is not hers any more"
            );
        } else {
            // He has the lock, and comes as far as the row.
            until("Bob waits for the row", at_the_row).await;
        }
        held.go_on().await.unwrap();
    });
    proxy.cuts(Cut::Nothing);
    ledger.healed();
    match keeps {
        true => assert_eq!(bob, SOLD_OUT),
        false => assert!(is_confirmed(&bob), "{bob:?}"),
    }
    assert!(
        is_confirmed(&ledger.ask(&second, 1).await),
        "her commit was carried out"
    );
    first.stop().await.unwrap();
    second.stop().await.unwrap();
    let verdict = ledger.verdict(&stand).await.unwrap();
    assert_after_fault(strategy(name), &verdict, if keeps { &[] } else { OVERSOLD });
}

/// Her first request has lost its lock, and its write is still being committed when she asks again, elsewhere. What is behind the fence is looked at
/// behind the fence.
#[tokio::test]
async fn a_buyer_who_repeats_while_her_write_is_being_committed_has_one_reservation() {
    let name = "fenced";
    let stand = TestEnvironment::shared(strategy(name)).await.unwrap();
    let redis = backends::redis().await.unwrap();
    let lock = Lock::of(SALE, &stand, &redis);
    let ledger = HistoryRecorder::new(strategy(name));
    let (first, second) = tokio::join!(instance(&stand, name, LEASE), instance(&stand, name, LEASE));
    first.opens_a_sale(2).await.unwrap();
    let held = DelayedCommits::on(&stand).await.unwrap();

    let (once, again) = tokio::join!(ledger.ask(&first, 1), async {
        strike(&held).await;
        lock.ends().await;
        let (again, ()) = tokio::join!(ledger.ask(&second, 1), async {
            until("she waits for the row", async || {
                held.waiting("transactionid tuple").await.unwrap() > 0
            })
            .await;
            held.go_on().await.unwrap();
        });
        again
    });
    assert!(is_confirmed(&once), "{once:?}");
    assert_eq!(again, once);
    first.stop().await.unwrap();
    second.stop().await.unwrap();
    assert_after_fault(strategy(name), &ledger.verdict(&stand).await.unwrap(), &[]);
}

/// She has a token and has not shown it to the row. By the time that she does, somebody with a later one has been there.
#[tokio::test]
async fn a_fence_is_not_lowered_by_who_comes_to_it_too_late() {
    let (name, lease) = ("fenced", Duration::from_millis(500));
    let stand = TestEnvironment::shared(strategy(name)).await.unwrap();
    let redis = backends::redis().await.unwrap();
    let lock = Lock::of(SALE, &stand, &redis);
    let database = stand.database().pool(1).await.unwrap();
    let fence = async || -> i64 {
        let fence = sqlx::query_scalar("select fence from sale where id = $1").bind(SALE);
        fence.fetch_one(&database).await.unwrap()
    };
    let ledger = HistoryRecorder::new(strategy(name));
    let (first, second) = tokio::join!(
        freezes_at("lock taken", &stand, name, lease),
        instance(&stand, name, lease)
    );
    first.opens_a_sale(2).await.unwrap();

    let (ann, raised) = tokio::join!(ledger.ask(&first, 1), async {
        freezes(&first, PATIENCE).await;
        ledger.struck("the first instance frozen");
        until("the lease has ended", async || !lock.is_taken().await).await;
        assert!(is_confirmed(&ledger.ask(&second, 2).await));
        let raised = fence().await;
        first.goes_on().await.unwrap();
        ledger.healed();
        raised
    });
    assert_eq!(ann, Answer::Indeterminate);
    assert_eq!(fence().await, raised);
    assert!(is_confirmed(&ledger.ask(&first, 1).await));
    first.stop().await.unwrap();
    second.stop().await.unwrap();
    database.close().await;
    assert_after_fault(strategy(name), &ledger.verdict(&stand).await.unwrap(), &[]);
}

/// The commit is under way, and nobody awaits it any more. Its lock stays until it is carried out.
#[rstest]
#[case::spin("spin")]
#[case::rlock("rlock")]
#[tokio::test]
async fn a_commit_whose_caller_has_left_keeps_its_lock(#[case] name: &str) {
    let strategy = strategy(name);
    let stand = TestEnvironment::shared(strategy).await.unwrap();
    let redis = backends::redis().await.unwrap();
    let lock = Lock::of(SALE, &stand, &redis);
    let second = instance(&stand, name, LEASE * 10).await;
    second.opens_a_sale(1).await.unwrap();
    let held = DelayedCommits::on(&stand).await.unwrap();
    let context = StrategyContext {
        database: StrategyContext::pool_options(1)
            .connect(&stand.database().url())
            .await
            .unwrap(),
        work: Duration::ZERO,
        counts: StrategyMetrics::default(),
        redis: stand.redis(LEASE * 10).unwrap(),
        kafka: None,
        watch: Instrumentation::default(),
    };
    let here = (strategy.open)(context).await.unwrap();
    let order = Order {
        sale: SALE,
        buyer: 1,
        key: RequestKey::try_from("ann".to_owned()).unwrap(),
    };

    {
        let unobserved = Steps::unobserved();
        let mut reserving = here.reserve(&order, &unobserved);
        tokio::select! {
            answer = &mut reserving => panic!("the fault did not strike: {:?}", answer.is_ok()),
            () = strike(&held) => {}
        }
    }
    let ledger = HistoryRecorder::new(strategy);
    let (bob, ()) = tokio::join!(ledger.ask(&second, 2), async {
        // Far longer than it takes to come as far as the row, where the lock lets him.
        tokio::time::sleep(Duration::from_millis(500)).await;
        let at_the_row = held.waiting("transactionid tuple").await.unwrap();
        assert!(
            lock.is_taken().await && at_the_row == 0,
            "her lock is not hers any more"
        );
        held.go_on().await.unwrap();
    });
    assert_eq!(bob, SOLD_OUT);
    second.stop().await.unwrap();
}

#[rstest]
#[case::spin("spin", 0)]
#[case::rlock("rlock", 1)]
#[tokio::test]
async fn who_gives_up_or_is_dropped_in_the_queue_stands_in_nobodys_way(#[case] name: &str, #[case] listens: i64) {
    let stand = TestEnvironment::shared(strategy(name)).await.unwrap();
    let redis = backends::redis().await.unwrap();
    let lock = Lock::of(SALE, &stand, &redis);
    // Nobody gets in because a lease has ended.
    let lease = Duration::from_secs(60);
    let (here, there) = tokio::join!(Any::on(&stand, name, lease), Any::on(&stand, name, lease));
    let held = here.acquire(PATIENCE).await.unwrap();

    // One gives up, at the head of its process's queue; one is dropped behind it.
    let short = Duration::from_millis(300);
    let (gives_up, dropped) = tokio::join!(there.acquire(short), timeout(short, there.acquire(PATIENCE)));
    assert!(matches!(gives_up, Err(LockError::NotAcquired(_))));
    assert!(dropped.is_err());
    until("nobody listens any more", async || lock.listeners().await == 0).await;

    // One is dropped at the head, with another behind it.
    {
        let mut head = Box::pin(there.acquire(PATIENCE));
        let queued = async {
            let what = "the fault did not strike: it is not in the queue";
            until(what, async || lock.listeners().await == listens).await;
        };
        tokio::select! {
            _ = &mut head => panic!("the lock is held"),
            () = queued => {}
        }
        let mut next = Box::pin(there.acquire(lease));
        assert!(timeout(Duration::from_millis(50), &mut next).await.is_err());
        drop(head);
        assert!(timeout(Duration::from_millis(50), &mut next).await.is_err());
        assert_eq!(held.release().await.unwrap(), Released::Free);
        let got = timeout(PATIENCE, next)
            .await
            .expect("the queue does not move on")
            .unwrap();
        assert_eq!(got.release().await.unwrap(), Released::Free);
    }
    until("nobody listens any more", async || lock.listeners().await == 0).await;
    assert!(!lock.is_taken().await, "somebody who is gone has the lock");
}

/// The test above would see it: a wait in a task of its own goes on when whoever began it has left.
#[tokio::test]
async fn a_waiter_that_outlives_its_caller_is_noticed() {
    let stand = TestEnvironment::shared(strategy("rlock")).await.unwrap();
    let redis = backends::redis().await.unwrap();
    let lock = Lock::of(SALE, &stand, &redis);
    let (here, there) = tokio::join!(Any::on(&stand, "rlock", LEASE), Any::on(&stand, "rlock", LEASE));
    let _held = here.acquire(PATIENCE).await.unwrap();
    drop(tokio::spawn(async move { there.acquire(Duration::MAX).await }));
    until("it is in the queue", async || lock.listeners().await == 1).await;
    let nobody = "nobody listens any more";
    let noticed = panic_of(until(nobody, async || lock.listeners().await == 0)).await;
    assert!(noticed.contains(nobody), "{noticed}");
}
