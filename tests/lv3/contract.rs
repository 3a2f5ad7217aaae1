//! LV.3: the contract under a lock in Redis, on any number of instances, and the effect of a late
//! release.

use std::time::{Duration, Instant};

use box_office::{
    Invariant::{self, Conservation, NoDuplicate, NoOversell, OneAnswer},
    ProblemKind, Promises, Strategy,
};
use harness::{
    assert_failure_mode,
    backends::{self, Redis, TestEnvironment},
    contract,
    judge::{Conclusion, judge},
    required,
    rush::{Program, Rush, SALE},
    schedule::{Scenario, ScheduleRunner, cancelled_after_every_poll, disconnected_at_every_point},
    shared_tests::{http_contract, instance_faults, slow_clients},
    test_server::TestServer,
};
use lv3_redis_lock::{LEVEL, lock::Connections};
use redis::Cmd;
use rstest::rstest;

pub(crate) fn program() -> Program {
    Program::new(env!("CARGO_BIN_EXE_lv3-redis-lock"))
}

/// A lease long enough that no slow holder loses its lock, and short enough that a dead holder's
/// lock expires soon.
fn program_with_short_leases() -> Program {
    program().variable("LOCK_LEASE_MS", "2000")
}

pub(crate) fn strategy(name: &str) -> &'static Strategy {
    LEVEL
        .strategy(name)
        .unwrap_or_else(|| panic!("LV.3 has no strategy {name}"))
}

pub(crate) const KEEPS: Promises = Promises::ALL_KEPT;
pub(crate) const OVERSELLS: Promises = Promises::ALL_KEPT
    .breaks(&[NoOversell, Conservation])
    .leaves_open(&[NoDuplicate, OneAnswer]);

// ANCHOR: contract
#[rstest]
// ANCHOR: spin-cases
#[case::spin("spin", 1, KEEPS)]
#[case::spin_on_three("spin", 3, KEEPS)]
// ANCHOR_END: spin-cases
// ANCHOR: rlock-cases
#[case::rlock("rlock", 1, KEEPS)]
#[case::rlock_on_three("rlock", 3, KEEPS)]
// ANCHOR_END: rlock-cases
// ANCHOR: fenced-cases
#[case::fenced("fenced", 1, KEEPS)]
#[case::fenced_on_three("fenced", 3, KEEPS)]
// ANCHOR_END: fenced-cases
#[tokio::test]
async fn a_sale_keeps_its_guarantee(#[case] name: &str, #[case] instances: usize, #[case] expected: Promises) {
    let rush = Rush {
        // As slow as a commit to disk, so that a lock released before the commit is detected.
        commit: Duration::from_millis(1),
        ..Rush::for_strategy(strategy(name)).instances(instances)
    };
    contract(&program(), &LEVEL, name, rush, expected).await;
}
// ANCHOR_END: contract

/// Points without an effect that another request could see: pausing there would repeat the same
/// order.
const PASSES: &[&str] = &[
    "lock taken",
    "transaction begun",
    "decided to sell",
    "reservation written",
    "committed",
];

/// Two buyers, every feasible order.
pub(crate) const TWO_BUYERS: Scenario = Scenario {
    capacity: 1,
    clicks: &[1, 1],
    passes: PASSES,
    preemptions: None,
};
/// One buyer clicks twice, every feasible order.
const TWO_CLICKS: Scenario = Scenario {
    capacity: 2,
    clicks: &[2],
    passes: PASSES,
    preemptions: None,
};
/// Three requests, two of them of one buyer, at most two preemptions.
const THREE: Scenario = Scenario {
    capacity: 2,
    clicks: &[2, 1],
    passes: PASSES,
    preemptions: Some(2),
};

// ANCHOR: orders
#[rstest]
#[case::spin("spin")]
#[case::rlock("rlock")]
#[case::fenced("fenced")]
#[tokio::test]
async fn no_order_of_steps_breaks_it(#[case] name: &str) {
    let runner = ScheduleRunner::of(strategy(name)).await.unwrap();
    for scenario in [TWO_BUYERS, TWO_CLICKS, THREE] {
        let explored = runner.explore(scenario).await.unwrap();
        println!(
            "{name}, {scenario:?}: {} interleavings, {} with a wait",
            explored.interleavings, explored.blocked
        );
        if let Some(broken) = explored.broken.first() {
            panic!(
                "{} of {} interleavings break it, such as\n{}\n{}",
                explored.broken.len(),
                explored.interleavings,
                broken.trace,
                broken.verdict
            );
        }
    }
}
// ANCHOR_END: orders

// ANCHOR: late-release
/// Ann releases the lock after her lease, while Bob holds it; then Carl tries to acquire it.
#[rstest]
#[case::spin("spin", 1, KEEPS, "committed")]
#[case::del_without_owner("mutants/del-without-owner", 1, OVERSELLS, "committed")]
#[case::get_then_del("mutants/get-then-del", 1, OVERSELLS, "owner compared")]
#[tokio::test]
async fn a_sale_keeps_its_guarantee_if_a_lock_is_released_late(
    #[case] name: &str,
    #[case] _instances: usize,
    #[case] expected: Promises,
    #[case] late: &'static str,
) {
    let runner = ScheduleRunner::of(strategy(name)).await.unwrap();
    let redis = runner.environment().redis(Duration::ZERO).unwrap().unwrap();
    let redis = Connections::open(redis.url.expose(), &redis.prefix).await.unwrap();
    let mut schedule = runner.sale(2).await.unwrap();
    let (ann, bob, carl) = (schedule.buyer("Ann"), schedule.buyer("Bob"), schedule.buyer("Carl"));

    schedule.run_until(ann, late).await.unwrap(); // has sold the first ticket, and the lock is still hers
    let ended: i64 = redis
        .send(Cmd::del(redis.key(&format!("sale:{}", schedule.sale()))))
        .await
        .unwrap();
    assert_eq!(ended, 1, "Ann had no lock");
    schedule.run_until(bob, "decided to sell").await.unwrap();
    schedule.run_to_completion(ann).await.unwrap();
    schedule.run_towards(carl, "decided to sell").await.unwrap();
    schedule.run_all_to_completion().await.unwrap();

    let verdict = judge(&schedule.history().await.unwrap());
    let conclusion = verdict.conclude(&required(expected));
    let kept = matches!(conclusion, Conclusion::AsPromised);
    assert!(kept, "lv3/{name}: {conclusion}\n\n{}\n{verdict}", schedule.trace());
    if expected == OVERSELLS {
        assert_failure_mode(strategy(name), &[NoOversell, Conservation]);
    }
}
// ANCHOR_END: late-release

/// 50 concurrent clicks of one buyer, on any instance, are one reservation.
#[rstest]
#[case::spin("spin")]
#[case::rlock("rlock")]
#[case::fenced("fenced")]
#[tokio::test]
async fn fifty_clicks_at_once_are_one_reservation(#[case] name: &str) {
    let report = contract(&program(), &LEVEL, name, fifty_clicks(), KEEPS).await;
    assert_eq!(report.verdict.tally.sold, 4);
}

pub(crate) fn fifty_clicks() -> Rush {
    Rush {
        buyers: 4,
        clicks: 50,
        instances: 3,
        // Long enough that all other clicks read before the first one commits, unless a lock
        // prevents it.
        work: Duration::from_millis(50),
        ..Rush::default()
    }
}

#[rstest]
#[case::spin("spin")]
#[case::rlock("rlock")]
#[case::fenced("fenced")]
#[tokio::test]
async fn a_reservation_can_be_cancelled_anywhere(#[case] name: &str) {
    let cancelled = cancelled_after_every_poll(strategy(name)).await.unwrap();
    println!("{name}: cancelled {cancelled} times");
}

#[rstest]
#[case::spin("spin", "committed")]
#[case::rlock("rlock", "committed")]
#[case::fenced("fenced", "reservation written")]
#[tokio::test]
async fn a_buyer_who_hangs_up_anywhere_cuts_nothing(#[case] name: &str, #[case] last: &str) {
    let points = disconnected_at_every_point(&program(), &LEVEL, strategy(name))
        .await
        .unwrap();
    println!("{name}: hung up at {points:?}");
    assert!(points.iter().any(|point| point == last), "{points:?}");
}

#[rstest]
#[case::spin("spin")]
#[case::rlock("rlock")]
#[case::fenced("fenced")]
#[tokio::test]
async fn the_http_contract_holds(#[case] name: &str) {
    http_contract::holds(&program(), &LEVEL, strategy(name)).await.unwrap();
}

#[tokio::test]
async fn without_redis_the_outcome_is_unknown_and_the_server_recovers_by_itself() {
    let (strategy, redis) = (strategy("rlock"), Redis::private().await.unwrap());
    let postgres = backends::postgres().await.unwrap();
    let environment = TestEnvironment::on(&postgres, Some(&redis), strategy.schema)
        .await
        .unwrap();
    let server = TestServer::start(&environment, &program(), &LEVEL, strategy)
        .await
        .unwrap();
    server.create_rush_sale(1).await.unwrap();
    assert_eq!(server.get("/readyz").await.unwrap().status, 200);

    redis.stop().await.unwrap();
    let away = server.reserve(SALE, 1, Some("a")).await.unwrap();
    away.is(ProblemKind::BackendAway).unwrap();
    assert_eq!(server.get("/readyz").await.unwrap().status, 503);
    assert_eq!(server.get("/livez").await.unwrap().status, 200);

    redis.start().await.unwrap();
    // Until the server has reconnected to Redis, the outcome is unknown and the buyer retries with
    // the same key.
    let deadline = Instant::now() + Duration::from_secs(10);
    loop {
        let answered = server.reserve(SALE, 1, Some("a")).await.unwrap();
        if answered.status == 201 {
            break;
        }
        answered.is(ProblemKind::BackendAway).unwrap();
        assert!(Instant::now() < deadline, "it does not recover");
    }
    assert_eq!(server.get("/readyz").await.unwrap().status, 200);
    server.stop().await.unwrap();
}

#[tokio::test]
async fn idle_slow_and_endless_clients_keep_nobody_waiting() {
    slow_clients::keep_nobody_waiting(&program(), &LEVEL, strategy("rlock"))
        .await
        .unwrap();
}

#[rstest]
#[case::spin("spin")]
#[case::rlock("rlock")]
#[case::fenced("fenced")]
#[tokio::test]
async fn an_instance_killed_in_mid_rush_leaves_only_what_was_in_flight_on_it_undecided(#[case] name: &str) {
    let strategy = strategy(name);
    instance_faults::a_kill_leaves_only_what_was_in_flight_undecided(
        &program_with_short_leases(),
        &LEVEL,
        strategy,
        &Invariant::ALL,
    )
    .await;
}

#[tokio::test]
async fn a_rolling_restart_leaves_nobody_undecided() {
    let strategy = strategy("rlock");
    instance_faults::a_rolling_restart_leaves_nobody_undecided(
        &program_with_short_leases(),
        &LEVEL,
        strategy,
        &Invariant::ALL,
    )
    .await;
}
