//! Faults of Redis: unreachable, restarted without its data, or without its script cache.

use super::*;

#[rstest]
#[case::spin("spin")]
#[case::rlock("rlock")]
#[case::fenced("fenced")]
#[tokio::test]
async fn an_unreachable_redis_sells_nothing_twice_and_sales_resume_by_themselves(#[case] name: &str) {
    let mut stand = TestEnvironment::shared(strategy(name)).await.unwrap();
    let redis = backends::redis().await.unwrap();
    let ledger = HistoryRecorder::new(strategy(name));
    let proxy = Proxy::before(redis.report().address.clone()).await.unwrap();
    stand.redirect_redis(proxy.port()).unwrap();
    let (first, second) = tokio::join!(
        instance_frozen_at(DECIDED, &stand, name, LEASE),
        instance(&stand, name, LEASE)
    );
    first.create_rush_sale(2).await.unwrap();

    let (ann, ()) = tokio::join!(ledger.reserve(&first, 1), async {
        wait_until_frozen(&first, PATIENCE).await;
        inject(&proxy, Fault::CloseAll).await;
        ledger.record_fault("Redis is cut");
        let sent = proxy.bytes_to_server();
        let bob = ledger.reserve(&second, 2).await;
        assert_eq!(bob, Answer::Indeterminate);
        assert_eq!(proxy.bytes_to_server(), sent, "the fault did not strike");
        first.resume().await.unwrap();
    });
    assert!(is_confirmed(&ann) || ann == Answer::Indeterminate, "{ann:?}");
    assert_eq!(ledger.reserve(&second, 3).await, Answer::Indeterminate);
    proxy.inject(Fault::None);
    ledger.record_recovery();

    for (talk, what) in [(&first, "the first is ready"), (&second, "the second is ready")] {
        until(what, async || talk.get("/readyz").await.unwrap().status.is_success()).await;
    }
    for (talk, buyer) in [(&first, 1), (&second, 2)] {
        let told = ledger.reserve(talk, buyer).await;
        assert!(is_confirmed(&told), "buyer {buyer} gets {told:?}");
    }
    assert_eq!(ledger.reserve(&second, 3).await, SOLD_OUT);
    first.stop().await.unwrap();
    second.stop().await.unwrap();
    let verdict = ledger.verdict(&stand).await.unwrap();
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
    let mut stand = TestEnvironment::shared(strategy(name)).await.unwrap();
    let redis = backends::redis().await.unwrap();
    let ledger = HistoryRecorder::new(strategy(name));
    let proxy = Proxy::before(redis.report().address.clone()).await.unwrap();
    stand.redirect_redis(proxy.port()).unwrap();
    let talk = instance(&stand, name, LEASE).await;
    talk.create_rush_sale(2).await.unwrap();
    assert!(is_confirmed(&ledger.reserve(&talk, 1).await));

    ledger.record_fault("all connections to Redis fall silent");
    assert!(proxy.silence_open_connections().await > 0, "the fault did not strike");
    until("a buyer is served", async || {
        is_confirmed(&ledger.reserve(&talk, 2).await)
    })
    .await;
    assert!(
        proxy.chunks_discarded() > 0,
        "the fault did not strike: no silent connection was tried"
    );
    ledger.record_recovery();
    talk.stop().await.unwrap();
    assert_after_fault(strategy(name), &ledger.verdict(&stand).await.unwrap(), &[]);
}

#[rstest]
#[case::fenced("fenced", true)]
#[case::token_from_incr("mutants/token-from-incr", false)]
#[tokio::test]
async fn tokens_never_go_back_when_redis_starts_again_empty(#[case] name: &str, #[case] grow: bool) {
    /// The tickets sold before the fault, each with a token.
    const BEFORE: u32 = 5;

    let (redis, stand) = private_environment(name).await;
    let database = stand.database().pool(1).await.unwrap();
    let fence = async || -> i64 {
        let fence = sqlx::query_scalar("select fence from sale where id = $1").bind(SALE);
        fence.fetch_one(&database).await.unwrap()
    };
    let ledger = HistoryRecorder::new(strategy(name));
    let (first, second) = tokio::join!(
        instance_frozen_at(DECIDED, &stand, name, LEASE),
        instance(&stand, name, LEASE)
    );
    second.create_rush_sale(BEFORE + 1).await.unwrap();
    for buyer in 1..=BEFORE {
        assert!(is_confirmed(&ledger.reserve(&second, buyer.into()).await));
    }

    let (late, early) = (100, 101);
    let (told_late, ()) = tokio::join!(ledger.reserve(&first, late), async {
        wait_until_frozen(&first, PATIENCE).await;
        let before = fence().await;
        ledger.record_fault("Redis has lost its memory");
        let pid = redis.pid().await.unwrap();
        redis.kill().await.unwrap();
        redis.start().await.unwrap();
        assert_ne!(redis.pid().await.unwrap(), pid, "the fault did not strike");
        assert_eq!(
            redis.command(&["DBSIZE"]).await.unwrap(),
            Reply::Int(0),
            "the fault did not strike"
        );
        ledger.record_recovery();
        until("the second is ready", async || {
            second.get("/readyz").await.unwrap().status.is_success()
        })
        .await;

        let told = ledger.reserve(&second, early).await;
        let after = fence().await;
        if grow {
            assert!(is_confirmed(&told), "{told:?}");
            assert!(after > before, "the token went back from {before} to {after}");
        } else {
            // The tokens restart at 1, and the row has seen greater ones.
            assert_eq!(told, Answer::Indeterminate);
            assert_eq!(ledger.reserve(&second, early).await, Answer::Indeterminate);
            assert_eq!(after, before);
        }
        first.resume().await.unwrap();
    });
    if grow {
        assert_eq!(told_late, Answer::Indeterminate, "the late holder's write");
        assert_eq!(ledger.reserve(&second, late).await, SOLD_OUT);
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
#[case::spin("spin", include_str!("../../../levels/lv3-redis-lock/src/lock/spin_release.lua"))]
#[case::rlock("rlock", include_str!("../../../levels/lv3-redis-lock/src/lock/release.lua"))]
#[case::fenced("fenced", include_str!("../../../levels/lv3-redis-lock/src/lock/release.lua"))]
#[case::bare_evalsha("mutants/bare-evalsha", include_str!("../../../levels/lv3-redis-lock/src/lock/spin_release.lua"))]
#[tokio::test]
async fn scripts_that_redis_has_forgotten_are_loaded_again(#[case] name: &str, #[case] release: &str) {
    // So long that only a release frees the lock.
    let lease = Duration::from_secs(60);
    let (redis, stand) = private_environment(name).await;
    let lock = Lock::of(SALE, &stand, &redis);
    let ledger = HistoryRecorder::new(strategy(name));
    let (first, second) = tokio::join!(
        instance_frozen_at(DECIDED, &stand, name, lease),
        instance(&stand, name, lease)
    );
    first.create_rush_sale(3).await.unwrap();
    assert!(is_confirmed(&ledger.reserve(&second, 1).await));
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
    assert!(is_confirmed(&ledger.reserve(&second, 2).await));
    if name == "mutants/bare-evalsha" {
        assert!(lock.is_held().await, "the lock was released");
        assert_eq!(ledger.reserve(&second, 3).await, Answer::Indeterminate);
        first.stop().await.unwrap();
        second.stop().await.unwrap();
        let verdict = ledger.verdict(&stand).await.unwrap();
        assert_after_fault(strategy(name), &verdict, STUCK);
        return;
    }
    // And while the lock is held.
    let (ann, ()) = tokio::join!(ledger.reserve(&first, 3), async {
        wait_until_frozen(&first, PATIENCE).await;
        flush().await;
        assert!(lock.is_held().await);
        first.resume().await.unwrap();
    });
    assert!(is_confirmed(&ann));
    until("the lock is released", async || !lock.is_held().await).await;
    assert_eq!(ledger.reserve(&second, 4).await, SOLD_OUT);
    first.stop().await.unwrap();
    second.stop().await.unwrap();
    let verdict = ledger.verdict(&stand).await.unwrap();
    assert_after_fault(strategy(name), &verdict, &[]);
}

fn is_noscript(reply: &Reply) -> bool {
    matches!(reply, Reply::Error(refusal) if refusal.starts_with("NOSCRIPT"))
}
