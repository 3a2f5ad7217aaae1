//! Mutants of LV.2 and what catches each: a rush under the contract, an exact order of steps, or a fault.

use std::time::Duration;

use box_office::{
    FailureMode,
    Invariant::{self, NoDuplicate, NoFalseRefusal, NoOversell, NoUndersell, NothingLost, OneAnswer, Progress},
    Promises,
};
use harness::{
    DelayedCommits, assert_after_fault,
    backends::TestEnvironment,
    contract,
    history::Answer,
    history_recorder::HistoryRecorder,
    judge::judge,
    rush::Rush,
    schedule::{Scenario, ScheduleRunner},
    test_server::TestServer,
    until,
};
use lv2_db_lock::LEVEL;
use rstest::rstest;

use super::{
    DUPLICATES, KEEPS, OVERSELLS,
    contract::fifty_clicks,
    program,
    schedules::{TWO_BUYERS, TWO_CLICKS, a_transaction_is_open},
    strategy,
};

/// Buyers are refused while tickets are left.
const REFUSES_FALSELY: Promises = Promises::ALL_KEPT.breaks(&[NoFalseRefusal, NoUndersell]);
const NEVER_FINAL: Promises = Promises::ALL_KEPT.breaks(&[Progress]);
const CALLS_A_DUPLICATE_SOLD_OUT: Promises = Promises::ALL_KEPT.breaks(&[NoFalseRefusal]);

/// Ten times as many buyers as tickets, two clicks each. Smaller than the rush that a strategy has to
/// survive: the pool of connections decides how many transactions overlap, not the number of buyers.
fn rush() -> Rush {
    Rush {
        capacity: 20,
        buyers: 200,
        clicks: 2,
        commit: Duration::from_millis(1),
        ..Rush::default()
    }
}

/// As many tickets as buyers, and the critical section takes so long that some wait beyond every time-out.
fn slow() -> Rush {
    Rush {
        work: Duration::from_millis(500),
        pool_size: Some(8),
        ..Rush::one_ticket_each(24)
    }
}

/// Buyers do not repeat a request with unknown outcome for long: those that never get a final answer must be seen.
fn impatient() -> Rush {
    Rush {
        capacity: 8,
        buyers: 64,
        clicks: 2,
        timeout: Duration::from_secs(2),
        ..Rush::default()
    }
}

/// Nobody finds an empty sale: a second click finds the buyer's reservation.
fn a_ticket_for_each_click() -> Rush {
    Rush {
        capacity: 128,
        ..impatient()
    }
}

#[rstest]
#[case::mutex_does_nothing("mutants/mutex-does-nothing", rush(), OVERSELLS)]
#[case::mutex_wrong_key("mutants/mutex-wrong-key", rush(), OVERSELLS)]
#[case::guard_before_commit("mutants/guard-before-commit", rush(), OVERSELLS)]
#[case::for_update_does_nothing("mutants/for-update-does-nothing", rush(), OVERSELLS)]
#[case::for_update_wrong_key("mutants/for-update-wrong-key", rush(), OVERSELLS)]
#[case::look_up_before_lock("mutants/look-up-before-lock", rush(), DUPLICATES)]
#[case::version_not_compared("mutants/version-not-compared", rush(), OVERSELLS)]
#[case::retry_reuses_the_read("mutants/retry-reuses-the-read", rush(), OVERSELLS)]
#[case::read_and_write_apart("mutants/read-and-write-apart", rush(), OVERSELLS)]
#[case::stock_not_checked("mutants/stock-not-checked", rush(), OVERSELLS)]
#[case::version_not_raised("mutants/version-not-raised", rush(), OVERSELLS)]
#[case::buyer_ignored("mutants/buyer-ignored", rush(), DUPLICATES)]
#[case::skip_locked("mutants/skip-locked", Rush::one_ticket_each(64), REFUSES_FALSELY)]
#[case::mutex_busy_is_sold_out("mutants/mutex-busy-is-sold-out", Rush::one_ticket_each(64), REFUSES_FALSELY)]
#[case::overtaken_is_sold_out("mutants/overtaken-is-sold-out", Rush::one_ticket_each(64), REFUSES_FALSELY)]
#[case::pool_time_out_is_sold_out("mutants/pool-time-out-is-sold-out", slow(), REFUSES_FALSELY)]
#[case::mutex_time_out_is_sold_out("mutants/mutex-time-out-is-sold-out", slow(), REFUSES_FALSELY)]
#[case::for_share("mutants/for-share", a_ticket_for_each_click(), NEVER_FINAL)]
#[case::condition_missing("mutants/condition-missing", impatient(), NEVER_FINAL)]
#[case::violation_is_an_error("mutants/violation-is-an-error", a_ticket_for_each_click(), NEVER_FINAL)]
#[case::violation_is_sold_out(
    "mutants/violation-is-sold-out",
    a_ticket_for_each_click(),
    CALLS_A_DUPLICATE_SOLD_OUT
)]
#[tokio::test]
async fn a_rush_catches_it(#[case] name: &str, #[case] rush: Rush, #[case] expected: Promises) {
    let guarantee = strategy(name).guarantee;
    assert_eq!(
        (guarantee.single_instance, guarantee.multi_instance),
        (expected, expected),
        "{name}"
    );
    contract(&program(), &LEVEL, name, rush, expected).await;
}

#[rstest]
#[case::mutex_does_nothing("mutants/mutex-does-nothing", TWO_BUYERS, NoOversell)]
#[case::mutex_wrong_key("mutants/mutex-wrong-key", TWO_BUYERS, NoOversell)]
#[case::guard_before_commit("mutants/guard-before-commit", TWO_BUYERS, NoOversell)]
#[case::for_update_does_nothing("mutants/for-update-does-nothing", TWO_BUYERS, NoOversell)]
#[case::for_update_wrong_key("mutants/for-update-wrong-key", TWO_BUYERS, NoOversell)]
#[case::look_up_before_lock("mutants/look-up-before-lock", TWO_CLICKS, NoDuplicate)]
#[case::version_not_compared("mutants/version-not-compared", TWO_BUYERS, NoOversell)]
#[case::retry_reuses_the_read("mutants/retry-reuses-the-read", TWO_BUYERS, NoOversell)]
#[case::read_and_write_apart("mutants/read-and-write-apart", TWO_BUYERS, NoOversell)]
#[case::stock_not_checked("mutants/stock-not-checked", TWO_BUYERS, NoOversell)]
#[case::version_not_raised("mutants/version-not-raised", TWO_BUYERS, NoOversell)]
#[case::buyer_ignored("mutants/buyer-ignored", TWO_CLICKS, NoDuplicate)]
#[case::look_up_before_version("mutants/look-up-before-version", TWO_CLICKS, NoDuplicate)]
#[tokio::test]
async fn an_order_of_steps_catches_it(#[case] name: &str, #[case] scenario: Scenario, #[case] breaks: Invariant) {
    let runner = ScheduleRunner::of(strategy(name)).await.unwrap();
    let explored = runner.explore(scenario).await.unwrap();
    let broken = explored.broken.iter().filter(|order| order.verdict.breaks(breaks));
    assert!(
        broken.count() > 0,
        "none of {} interleavings breaks {breaks:?}",
        explored.interleavings
    );
}

/// Both requests carry the same request key.
#[rstest]
#[case::request_key_ignored("mutants/request-key-ignored", Scenario { capacity: 2, ..TWO_BUYERS }, NoDuplicate)]
#[case::sold_out_before_the_key("mutants/sold-out-before-the-key", Scenario { capacity: 1, ..TWO_CLICKS }, OneAnswer)]
#[tokio::test]
async fn two_requests_under_one_key_catch_it(
    #[case] name: &str,
    #[case] scenario: Scenario,
    #[case] breaks: Invariant,
) {
    assert_violates(name, &[breaks]);
    let runner = ScheduleRunner::of(strategy(name)).await.unwrap();
    let explored = runner.explore_under_one_key(scenario).await.unwrap();
    let broken = explored.broken.iter().filter(|order| order.verdict.breaks(breaks));
    assert!(
        broken.count() > 0,
        "none of {} interleavings breaks {breaks:?}",
        explored.interleavings
    );
}

#[tokio::test]
async fn two_requests_under_one_key_catch_a_look_up_before_the_lock() {
    let runner = ScheduleRunner::of(strategy("mutants/look-up-before-lock"))
        .await
        .unwrap();
    for scenario in [
        TWO_CLICKS,
        Scenario {
            capacity: 2,
            ..TWO_BUYERS
        },
    ] {
        let explored = runner.explore_under_one_key(scenario).await.unwrap();
        let broken = explored.broken.iter().filter(|order| order.verdict.breaks(NoDuplicate));
        assert!(
            broken.count() > 0,
            "none of {} interleavings breaks it",
            explored.interleavings
        );
    }
}

#[rstest]
#[case::on_one(1)]
#[case::on_three(3)]
#[tokio::test]
async fn fifty_clicks_at_once_catch_a_look_up_before_the_lock(#[case] instances: usize) {
    let rush = fifty_clicks(instances);
    contract(&program(), &LEVEL, "mutants/look-up-before-lock", rush, DUPLICATES).await;
}

// ANCHOR: guard
#[tokio::test]
async fn a_guard_dropped_before_the_commit_sells_the_last_ticket_twice() {
    let runner = ScheduleRunner::of(strategy("mutants/guard-before-commit"))
        .await
        .unwrap();
    let mut schedule = runner.sale(1).await.unwrap();
    let (ann, bob) = (schedule.buyer("Ann"), schedule.buyer("Bob"));

    schedule.run_until(ann, "lock released").await.unwrap();
    a_transaction_is_open(&runner).await; // Ann's
    schedule.run_until(bob, "decided to sell").await.unwrap(); // has read the stock that Ann has not committed yet
    schedule.run_to_completion(ann).await.unwrap();
    schedule.run_to_completion(bob).await.unwrap();

    let verdict = judge(&schedule.history().await.unwrap());
    assert!(verdict.breaks(NoOversell), "{}\n{verdict}", schedule.trace());
}
// ANCHOR_END: guard

#[tokio::test]
async fn a_commit_that_fails_catches_a_commit_whose_error_is_ignored() {
    let strategy = strategy("mutants/commit-error-ignored");
    let environment = TestEnvironment::shared(strategy).await.unwrap();
    let server = TestServer::start(&environment, &program(), &LEVEL, strategy)
        .await
        .unwrap();
    server.create_rush_sale(1).await.unwrap();
    let commits = DelayedCommits::on(&environment).await.unwrap();
    let history = HistoryRecorder::new(strategy);

    let (ann, ()) = tokio::join!(history.reserve(&server, 1), async {
        until("the fault did not strike: no commit is in flight", async || {
            commits.has_struck().await.unwrap()
        })
        .await;
        history.record_fault("a failed commit");
        assert_eq!(commits.fail().await.unwrap(), 1, "the fault did not strike");
        commits.release().await.unwrap();
        history.record_recovery();
    });
    assert!(matches!(ann, Answer::Confirmed { .. }), "{ann:?}");
    server.stop().await.unwrap();
    assert_after_fault(strategy, &history.verdict(&environment).await.unwrap(), &[NothingLost]);
}

#[tokio::test]
async fn a_buyer_who_is_always_overtaken_catches_retries_that_end_as_sold_out() {
    let name = "mutants/retries-exhausted-is-sold-out";
    assert_violates(name, &[NoFalseRefusal, NoUndersell]);
    let runner = ScheduleRunner::of(strategy(name)).await.unwrap();
    let pool = runner.environment().database().pool(1).await.unwrap();
    let mut schedule = runner.sale(1).await.unwrap();
    let ann = schedule.buyer("Ann");
    loop {
        schedule.run_towards(ann, "decided to sell").await.unwrap();
        if schedule.movable().is_empty() {
            break;
        }
        sqlx::query("update sale set version = version + 1 where id = $1")
            .bind(schedule.sale())
            .execute(&pool)
            .await
            .unwrap();
    }
    let verdict = judge(&schedule.history().await.unwrap());
    assert!(
        verdict.breaks(NoFalseRefusal) && verdict.breaks(NoUndersell),
        "{}\n{verdict}",
        schedule.trace()
    );
}

/// It keeps the contract in a rush, and declares one failure mode that violates just these.
#[track_caller]
fn assert_violates(name: &str, violates: &[Invariant]) {
    let guarantee = strategy(name).guarantee;
    assert_eq!(
        (guarantee.single_instance, guarantee.multi_instance),
        (KEEPS, KEEPS),
        "{name}"
    );
    let declared: Vec<_> = guarantee
        .failure_modes
        .iter()
        .map(|&FailureMode { violates, .. }| violates)
        .collect();
    assert_eq!(declared, [violates], "{name}");
}
