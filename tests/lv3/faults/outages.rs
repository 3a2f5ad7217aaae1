//! Faults of Redis: unreachable, restarted without its data, or without its script cache.

use super::*;

#[rstest]
#[case::spin("spin")]
#[case::rlock("rlock")]
#[case::fenced("fenced")]
#[tokio::test]
async fn an_unreachable_redis_sells_nothing_twice_and_sales_resume_by_themselves(#[case] name: &str) {
    let mut environment = TestEnvironment::shared(strategy(name)).await.unwrap();
    let redis = backends::redis().await.unwrap();
    let history = HistoryRecorder::new(strategy(name));
    let proxy = Proxy::before(redis.report().address.clone()).await.unwrap();
    environment.redirect_redis(proxy.port()).unwrap();
    let (first, second) = tokio::join!(
        instance_frozen_at(DECIDED, &environment, name, LEASE),
        instance(&environment, name, LEASE)
    );
    first.create_rush_sale(2).await.unwrap();

    let (ann, ()) = tokio::join!(history.reserve(&first, 1), async {
        wait_until_frozen(&first, TIMEOUT).await;
        inject(&proxy, Fault::CloseAll).await;
        history.record_fault("Redis is cut");
        let sent = proxy.bytes_to_server();
        let bob = history.reserve(&second, 2).await;
        assert_eq!(bob, Answer::Indeterminate);
        assert_eq!(proxy.bytes_to_server(), sent, "the fault did not strike");
        first.resume().await.unwrap();
    });
    assert!(is_confirmed(&ann) || ann == Answer::Indeterminate, "{ann:?}");
    assert_eq!(history.reserve(&second, 3).await, Answer::Indeterminate);
    proxy.inject(Fault::None);
    history.record_recovery();

    for (server, what) in [(&first, "the first is ready"), (&second, "the second is ready")] {
        until(what, async || server.get("/readyz").await.unwrap().status.is_success()).await;
    }
    for (server, buyer) in [(&first, 1), (&second, 2)] {
        let answer = history.reserve(server, buyer).await;
        assert!(is_confirmed(&answer), "buyer {buyer} gets {answer:?}");
    }
    assert_eq!(history.reserve(&second, 3).await, SOLD_OUT);
    first.stop().await.unwrap();
    second.stop().await.unwrap();
    let verdict = history.verdict(&environment).await.unwrap();
    assert_after_fault(strategy(name), &verdict, &[]);
}

/// No bytes pass on the open connections to Redis any more, and nobody closes them. Redis answers
/// new connections.
#[rstest]
#[case::spin("spin")]
#[case::rlock("rlock")]
#[case::fenced("fenced")]
#[tokio::test]
async fn connections_to_redis_that_fell_silent_are_replaced(#[case] name: &str) {
    let mut environment = TestEnvironment::shared(strategy(name)).await.unwrap();
    let redis = backends::redis().await.unwrap();
    let history = HistoryRecorder::new(strategy(name));
    let proxy = Proxy::before(redis.report().address.clone()).await.unwrap();
    environment.redirect_redis(proxy.port()).unwrap();
    let server = instance(&environment, name, LEASE).await;
    server.create_rush_sale(2).await.unwrap();
    assert!(is_confirmed(&history.reserve(&server, 1).await));

    history.record_fault("all connections to Redis fall silent");
    assert!(proxy.silence_open_connections().await > 0, "the fault did not strike");
    until("a buyer is served", async || {
        is_confirmed(&history.reserve(&server, 2).await)
    })
    .await;
    assert!(
        proxy.chunks_discarded() > 0,
        "the fault did not strike: no silent connection was tried"
    );
    history.record_recovery();
    server.stop().await.unwrap();
    assert_after_fault(strategy(name), &history.verdict(&environment).await.unwrap(), &[]);
}

#[rstest]
#[case::fenced("fenced", true)]
#[case::token_from_incr("mutants/token-from-incr", false)]
#[tokio::test]
async fn tokens_never_go_back_when_redis_starts_again_empty(#[case] name: &str, #[case] grow: bool) {
    /// The tickets sold before the fault, each with a token.
    const BEFORE: u32 = 5;

    let (redis, environment) = private_environment(name).await;
    let database = environment.database().pool(1).await.unwrap();
    let fence = async || -> i64 {
        let fence = sqlx::query_scalar("select fence from sale where id = $1").bind(SALE);
        fence.fetch_one(&database).await.unwrap()
    };
    let history = HistoryRecorder::new(strategy(name));
    let (first, second) = tokio::join!(
        instance_frozen_at(DECIDED, &environment, name, LEASE),
        instance(&environment, name, LEASE)
    );
    second.create_rush_sale(BEFORE + 1).await.unwrap();
    for buyer in 1..=BEFORE {
        assert!(is_confirmed(&history.reserve(&second, buyer.into()).await));
    }

    let (late, early) = (100, 101);
    let (told_late, ()) = tokio::join!(history.reserve(&first, late), async {
        wait_until_frozen(&first, TIMEOUT).await;
        let before = fence().await;
        history.record_fault("Redis has lost its memory");
        let pid = redis.pid().await.unwrap();
        redis.kill().await.unwrap();
        redis.start().await.unwrap();
        assert_ne!(redis.pid().await.unwrap(), pid, "the fault did not strike");
        assert_eq!(
            redis.command(&["DBSIZE"]).await.unwrap(),
            Reply::Int(0),
            "the fault did not strike"
        );
        history.record_recovery();
        until("the second is ready", async || {
            second.get("/readyz").await.unwrap().status.is_success()
        })
        .await;

        let answer = history.reserve(&second, early).await;
        let after = fence().await;
        if grow {
            assert!(is_confirmed(&answer), "{answer:?}");
            assert!(after > before, "the token went back from {before} to {after}");
        } else {
            // The tokens restart at 1, and the row has seen greater ones.
            assert_eq!(answer, Answer::Indeterminate);
            assert_eq!(history.reserve(&second, early).await, Answer::Indeterminate);
            assert_eq!(after, before);
        }
        first.resume().await.unwrap();
    });
    if grow {
        assert_eq!(told_late, Answer::Indeterminate, "the late holder's write");
        assert_eq!(history.reserve(&second, late).await, SOLD_OUT);
    } else {
        assert!(is_confirmed(&told_late), "{told_late:?}");
    }
    first.stop().await.unwrap();
    second.stop().await.unwrap();
    database.close().await;
    let verdict = history.verdict(&environment).await.unwrap();
    assert_after_fault(strategy(name), &verdict, if grow { &[] } else { STUCK });
}

/// How Redis forgets a lock while its holder works.
#[derive(Clone, Copy, Debug)]
enum Forgets {
    /// It restarts without its data.
    Restarted,
    /// It is full, and evicts keys with a TTL to make room.
    Evicted,
}

impl Forgets {
    async fn strike(self, redis: &Private<Redis>, lock: &Lock<'_>) {
        match self {
            Self::Restarted => {
                redis.kill().await.unwrap();
                redis.start().await.unwrap();
                let keys = redis.command(&["DBSIZE"]).await.unwrap();
                assert_eq!(keys, Reply::Int(0), "the fault did not strike");
            }
            Self::Evicted => {
                let set = async |setting, value| {
                    let done = redis.command(&["CONFIG", "SET", setting, value]).await.unwrap();
                    assert_eq!(done, Reply::Status("OK".to_owned()));
                };
                set("maxmemory-policy", "volatile-ttl").await;
                set("maxmemory", "1").await;
                until("the lock is evicted", async || !lock.is_held().await).await;
                let Reply::Bulk(stats) = redis.command(&["INFO", "stats"]).await.unwrap() else {
                    panic!("INFO is not answered with text")
                };
                let evicted = stats.lines().find_map(|line| line.strip_prefix("evicted_keys:"));
                assert_ne!(evicted, Some("0"), "the fault did not strike: the lock has expired");
                set("maxmemory", "0").await;
            }
        }
    }
}

/// Without a fence, both holders sell the same ticket.
#[rstest]
#[case::spin("spin", StaleHolder::Oversells)]
#[case::rlock("rlock", StaleHolder::Oversells)]
#[case::fenced("fenced", StaleHolder::IsRejected)]
#[tokio::test]
async fn a_lock_that_redis_forgets_has_two_holders(
    #[case] name: &str,
    #[case] forgotten: StaleHolder,
    #[values(Forgets::Restarted, Forgets::Evicted)] forgets: Forgets,
) {
    // So long that it does not expire.
    let lease = Duration::from_secs(60);
    let (redis, environment) = private_environment(name).await;
    let lock = Lock::of(SALE, &environment, &redis);
    let history = HistoryRecorder::new(strategy(name));
    let (first, second) = tokio::join!(
        instance_frozen_at(DECIDED, &environment, name, lease),
        instance(&environment, name, lease)
    );
    second.create_rush_sale(1).await.unwrap();

    let (ann, ()) = tokio::join!(history.reserve(&first, 1), async {
        wait_until_frozen(&first, TIMEOUT).await;
        assert!(lock.is_held().await, "the fault did not strike: the lock was free");
        forgets.strike(&redis, &lock).await;
        history.record_fault("Redis has forgotten the lock");
        until("the second is ready", async || {
            second.get("/readyz").await.unwrap().status.is_success()
        })
        .await;
        let bob = history.reserve(&second, 2).await;
        assert!(is_confirmed(&bob), "the lock is free, and Bob gets {bob:?}");
        first.resume().await.unwrap();
        history.record_recovery();
    });
    assert_stale_answer(&ann, forgotten);
    first.stop().await.unwrap();
    second.stop().await.unwrap();
    let verdict = history.verdict(&environment).await.unwrap();
    assert_after_fault(strategy(name), &verdict, forgotten.breaks());
}

#[rstest]
#[case::spin("spin", include_str!("../../../levels/lv3-redis-lock/src/lock/spin_release.lua"))]
#[case::rlock("rlock", include_str!("../../../levels/lv3-redis-lock/src/lock/release.lua"))]
#[case::fenced("fenced", include_str!("../../../levels/lv3-redis-lock/src/lock/release.lua"))]
#[case::bare_evalsha("mutants/bare-evalsha", include_str!("../../../levels/lv3-redis-lock/src/lock/spin_release.lua"))]
#[tokio::test]
async fn scripts_that_redis_has_forgotten_are_loaded_again(#[case] name: &str, #[case] release: &str) {
    // So long that only a release frees the lock.
    let lease = Duration::from_secs(60);
    let (redis, environment) = private_environment(name).await;
    let lock = Lock::of(SALE, &environment, &redis);
    let history = HistoryRecorder::new(strategy(name));
    let (first, second) = tokio::join!(
        instance_frozen_at(DECIDED, &environment, name, lease),
        instance(&environment, name, lease)
    );
    first.create_rush_sale(3).await.unwrap();
    assert!(is_confirmed(&history.reserve(&second, 1).await));
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
    assert!(is_confirmed(&history.reserve(&second, 2).await));
    if name == "mutants/bare-evalsha" {
        assert!(lock.is_held().await, "the lock was released");
        assert_eq!(history.reserve(&second, 3).await, Answer::Indeterminate);
        first.stop().await.unwrap();
        second.stop().await.unwrap();
        let verdict = history.verdict(&environment).await.unwrap();
        assert_after_fault(strategy(name), &verdict, STUCK);
        return;
    }
    // And while the lock is held.
    let (ann, ()) = tokio::join!(history.reserve(&first, 3), async {
        wait_until_frozen(&first, TIMEOUT).await;
        flush().await;
        assert!(lock.is_held().await);
        first.resume().await.unwrap();
    });
    assert!(is_confirmed(&ann));
    until("the lock is released", async || !lock.is_held().await).await;
    assert_eq!(history.reserve(&second, 4).await, SOLD_OUT);
    first.stop().await.unwrap();
    second.stop().await.unwrap();
    let verdict = history.verdict(&environment).await.unwrap();
    assert_after_fault(strategy(name), &verdict, &[]);
}

fn is_noscript(reply: &Reply) -> bool {
    matches!(reply, Reply::Error(refusal) if refusal.starts_with("NOSCRIPT"))
}
