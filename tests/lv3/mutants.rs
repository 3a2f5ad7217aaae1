//! Mutants of LV.3 that a rush under the contract catches.

use std::time::Duration;

use box_office::{
    Invariant::{NoFalseRefusal, NoUndersell},
    Promises,
};
use harness::{contract, rush::Rush};
use lv3_redis_lock::LEVEL;
use rstest::rstest;

use super::contract::{OVERSELLS, program, strategy};

/// Buyers are refused while tickets are left.
const REFUSES_FALSELY: Promises = Promises::ALL_KEPT.breaks(&[NoFalseRefusal, NoUndersell]);

/// 1,000 buyers, 100 tickets, two clicks each, and commits as slow as to a disk.
fn rush() -> Rush {
    Rush {
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
