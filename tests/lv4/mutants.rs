//! Mutants of LV.4 that a rush under the contract catches.

use std::time::Duration;

use box_office::{
    Invariant::{NothingLost, Progress},
    Promises,
};
use harness::{contract, rush::Rush};
use lv4_kafka::LEVEL;
use rstest::rstest;

use super::contract::{OVERSELLS, program, strategy};

/// Orders that never get a final answer.
const NEVER_ANSWERED: Promises = Promises::ALL_KEPT.breaks(&[NothingLost, Progress]);

/// More buyers than tickets, two clicks each.
fn rush() -> Rush {
    Rush {
        capacity: 20,
        buyers: 100,
        clicks: 2,
        ..Rush::default()
    }
}

/// The same; buyers do not wait for long.
fn short() -> Rush {
    Rush {
        timeout: Duration::from_secs(2),
        ..rush()
    }
}

#[rstest]
#[case::stock_ignored("mutants/stock-ignored", rush(), OVERSELLS)]
#[case::refusals_stored_as_confirmed("mutants/refusals-stored-as-confirmed", rush(), OVERSELLS)]
#[case::dedupe_by_buyer("mutants/dedupe-by-buyer", short(), NEVER_ANSWERED)]
#[case::accepted_is_unknown("mutants/accepted-is-unknown", short(), NEVER_ANSWERED)]
#[tokio::test]
async fn a_rush_catches_it(#[case] name: &str, #[case] rush: Rush, #[case] expected: Promises) {
    assert_eq!(strategy(name).guarantee.multi_instance, expected, "{name}");
    contract(&program(), &LEVEL, name, rush, expected).await;
}
