//! Faults of the holder: frozen, killed, slow, or unable to renew its lease.

use super::*;

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
