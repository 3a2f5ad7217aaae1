//! Mutants of LV.3 that a rush under the contract or an exact order of steps catches.

use std::time::Duration;

use box_office::{
    Invariant::{NoDuplicate, NoFalseRefusal, NoUndersell},
    Promises,
};
use harness::{contract, rush::Rush, schedule::ScheduleRunner};
use lv3_redis_lock::LEVEL;
use rstest::rstest;

use super::contract::{OVERSELLS, TWO_BUYERS, fifty_clicks, program, strategy};

/// Buyers are refused while tickets are left.
const REFUSES_FALSELY: Promises = Promises::ALL_KEPT.breaks(&[NoFalseRefusal, NoUndersell]);

/// Ten times as many buyers as tickets, two clicks each, and commits as slow as to a disk. Smaller than
/// the rush that a strategy has to survive: the pool of connections decides how many transactions
/// overlap, not the number of buyers.
fn rush() -> Rush {
    Rush {
        capacity: 20,
        buyers: 200,
        clicks: 2,
        commit: Duration::from_millis(1),
        ..Rush::default()
    }
}

/// As many tickets as buyers, and the critical section takes so long that some wait beyond the time-out of the lock.
fn slow() -> Rush {
    Rush {
        work: Duration::from_secs(1),
        ..Rush::one_ticket_each(24)
    }
}

/// The critical section takes longer than a lease that is a thousand times too short.
fn longer_than_its_lease() -> Rush {
    Rush {
        capacity: 4,
        buyers: 32,
        work: Duration::from_millis(100),
        ..Rush::one_ticket_each(64)
    }
}

#[rstest]
#[case::lock_per_request("mutants/lock-per-request", rush(), OVERSELLS)]
#[case::lock_per_request_on_three("mutants/lock-per-request", rush().instances(3), OVERSELLS)]
#[case::lock_by_buyer("mutants/lock-by-buyer", rush(), OVERSELLS)]
#[case::lock_by_buyer_on_three("mutants/lock-by-buyer", rush().instances(3), OVERSELLS)]
#[case::set_without_nx("mutants/set-without-nx", rush(), OVERSELLS)]
#[case::seconds_for_milliseconds("mutants/seconds-for-milliseconds", longer_than_its_lease(), OVERSELLS)]
#[case::released_before_commit("mutants/released-before-commit", rush(), OVERSELLS)]
#[case::lock_busy_is_sold_out("mutants/lock-busy-is-sold-out", Rush::one_ticket_each(64), REFUSES_FALSELY)]
#[case::lock_time_out_is_sold_out("mutants/lock-time-out-is-sold-out", slow(), REFUSES_FALSELY)]
#[tokio::test]
async fn a_rush_catches_it(#[case] name: &str, #[case] rush: Rush, #[case] expected: Promises) {
    assert_eq!(strategy(name).guarantee.multi_instance, expected, "{name}");
    contract(&program(), &LEVEL, name, rush, expected).await;
}

#[rstest]
#[case::lock_per_request("mutants/lock-per-request")]
#[case::lock_by_buyer("mutants/lock-by-buyer")]
#[tokio::test]
async fn an_order_of_steps_catches_it(#[case] name: &str) {
    let runner = ScheduleRunner::of(strategy(name)).await.unwrap();
    let explored = runner.explore(TWO_BUYERS).await.unwrap();
    println!(
        "{name}: {} of {} interleavings break it",
        explored.broken.len(),
        explored.interleavings
    );
    assert!(
        !explored.broken.is_empty(),
        "none of {} interleavings breaks it",
        explored.interleavings
    );
}

#[tokio::test]
async fn fifty_clicks_at_once_catch_a_lock_per_request() {
    let report = fifty_clicks()
        .run_alone(&program(), &LEVEL, strategy("mutants/lock-per-request"))
        .await
        .unwrap();
    assert!(report.verdict.breaks(NoDuplicate), "{}", report.verdict);
}
