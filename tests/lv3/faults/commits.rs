//! Faults of the commit: its outcome is unknown, or its caller has gone.

use super::*;

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
