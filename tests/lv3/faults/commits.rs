//! Faults of the commit: its outcome is unknown, or its caller has gone.

use super::*;

/// When Postgres carries out the commit whose connection broke.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum CarriedOut {
    /// While the lock that covers it is still held.
    InTime,
    /// After the lease has expired and another buyer has decided.
    TooLate,
}

/// Ann's connection to Postgres breaks with her commit in flight. Her outcome is unknown, and her
/// lock is not released.
#[rstest]
#[case::spin("spin", CarriedOut::InTime, true)]
#[case::rlock("rlock", CarriedOut::InTime, true)]
#[case::fenced("fenced", CarriedOut::InTime, true)]
#[case::unlock_on_unknown_commit("mutants/unlock-on-unknown-commit", CarriedOut::InTime, false)]
#[case::spin_and_too_late("spin", CarriedOut::TooLate, false)]
#[case::rlock_and_too_late("rlock", CarriedOut::TooLate, false)]
#[case::fenced_and_too_late("fenced", CarriedOut::TooLate, true)]
#[tokio::test]
async fn a_commit_that_nobody_knows_the_end_of_is_covered_by_its_lock_for_a_lease(
    #[case] name: &str,
    #[case] carried: CarriedOut,
    #[case] keeps: bool,
) {
    let environment = TestEnvironment::shared(strategy(name)).await.unwrap();
    let (redis, postgres) = tokio::join!(backends::redis(), backends::postgres());
    let (redis, postgres) = (redis.unwrap(), postgres.unwrap());
    let lock = Lock::of(SALE, &environment, &redis);
    let history = HistoryRecorder::new(strategy(name));
    let proxy = Proxy::before(postgres.report().address.clone()).await.unwrap();
    let lease = match carried {
        // Bob waits for it to expire.
        CarriedOut::InTime => LEASE * 2,
        CarriedOut::TooLate => LEASE,
    };
    let behind = program(lease).variable("DATABASE_URL", proxy.url_through(&environment.database().url()));
    let (first, second) = tokio::join!(
        async {
            let first = TestServer::start(&environment, &behind, &LEVEL, strategy(name));
            first.await.unwrap()
        },
        instance(&environment, name, lease)
    );
    second.create_rush_sale(1).await.unwrap();
    let held = DelayedCommits::on(&environment).await.unwrap();

    let (ann, ()) = tokio::join!(history.reserve(&first, 1), async {
        wait_for_commit(&held).await;
        inject(&proxy, Fault::CloseAll).await;
        history.record_fault("a commit has lost its connection");
    });
    assert_eq!(ann, Answer::Indeterminate);
    let (bob, ()) = tokio::join!(history.reserve(&second, 2), async {
        let at_the_row = async || held.waiting("transactionid tuple").await.unwrap() > 0;
        if carried == CarriedOut::InTime && keeps && name != "fenced" {
            // The lock is neither renewed nor released.
            until("half of the lease is over", async || {
                lock.ttl().await.is_none_or(|left| left < lease / 2)
            })
            .await;
            assert!(
                lock.is_held().await && !at_the_row().await,
                "her lock is not hers any more"
            );
        } else {
            // He acquires the lock, and waits for the row lock.
            until("Bob waits for the row", at_the_row).await;
        }
        held.release().await.unwrap();
    });
    proxy.inject(Fault::None);
    history.record_recovery();
    match keeps {
        true => assert_eq!(bob, SOLD_OUT),
        false => assert!(is_confirmed(&bob), "{bob:?}"),
    }
    assert!(
        is_confirmed(&history.reserve(&second, 1).await),
        "her commit was carried out"
    );
    first.stop().await.unwrap();
    second.stop().await.unwrap();
    let verdict = history.verdict(&environment).await.unwrap();
    assert_after_fault(strategy(name), &verdict, if keeps { &[] } else { OVERSOLD });
}

/// The first request has lost its lock, and its commit is in flight when she retries on another
/// instance. The retry must read behind the fence.
#[tokio::test]
async fn a_buyer_who_retries_while_her_commit_is_in_flight_has_one_reservation() {
    let name = "fenced";
    let environment = TestEnvironment::shared(strategy(name)).await.unwrap();
    let redis = backends::redis().await.unwrap();
    let lock = Lock::of(SALE, &environment, &redis);
    let history = HistoryRecorder::new(strategy(name));
    let (first, second) = tokio::join!(instance(&environment, name, LEASE), instance(&environment, name, LEASE));
    first.create_rush_sale(2).await.unwrap();
    let held = DelayedCommits::on(&environment).await.unwrap();

    let (once, again) = tokio::join!(history.reserve(&first, 1), async {
        wait_for_commit(&held).await;
        lock.expire().await;
        let (again, ()) = tokio::join!(history.reserve(&second, 1), async {
            until("she waits for the row", async || {
                held.waiting("transactionid tuple").await.unwrap() > 0
            })
            .await;
            held.release().await.unwrap();
        });
        again
    });
    assert!(is_confirmed(&once), "{once:?}");
    assert_eq!(again, once);
    first.stop().await.unwrap();
    second.stop().await.unwrap();
    assert_after_fault(strategy(name), &history.verdict(&environment).await.unwrap(), &[]);
}

/// The caller of a commit in flight is dropped. The lock is held until the commit is carried out.
#[rstest]
#[case::spin("spin")]
#[case::rlock("rlock")]
#[tokio::test]
async fn a_commit_whose_caller_is_dropped_keeps_its_lock(#[case] name: &str) {
    let strategy = strategy(name);
    let environment = TestEnvironment::shared(strategy).await.unwrap();
    let redis = backends::redis().await.unwrap();
    let lock = Lock::of(SALE, &environment, &redis);
    let second = instance(&environment, name, LEASE * 10).await;
    second.create_rush_sale(1).await.unwrap();
    let held = DelayedCommits::on(&environment).await.unwrap();
    let context = StrategyContext {
        database: Database::lazy(environment.database().url().parse().unwrap(), 1),
        work: Duration::ZERO,
        metrics: StrategyMetrics::default(),
        redis: environment.redis(LEASE * 10).unwrap(),
        kafka: None,
        improvements: Improvements::default(),
        instrumentation: Instrumentation::default(),
    };
    let here = (strategy.open)(context).await.unwrap();
    let order = Order {
        sale: SALE,
        buyer: 1,
        key: RequestKey::try_from("ann".to_owned()).unwrap(),
        priority: Priority::Normal,
    };

    {
        let unobserved = Steps::unobserved();
        let mut reserving = here.reserve(&order, &unobserved);
        tokio::select! {
            answer = &mut reserving => panic!("the fault did not strike: {:?}", answer.is_ok()),
            () = wait_for_commit(&held) => {}
        }
    }
    let history = HistoryRecorder::new(strategy);
    let (bob, ()) = tokio::join!(history.reserve(&second, 2), async {
        // Far longer than he needs to reach the row, if the lock does not stop him.
        tokio::time::sleep(Duration::from_millis(500)).await;
        let at_the_row = held.waiting("transactionid tuple").await.unwrap();
        assert!(lock.is_held().await && at_the_row == 0, "her lock is not hers any more");
        held.release().await.unwrap();
    });
    assert_eq!(bob, SOLD_OUT);
    second.stop().await.unwrap();
}
