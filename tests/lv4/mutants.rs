//! Mutants of LV.4 and what catches each.

use std::time::Duration;

use box_office::{
    Invariant::{NoDuplicate, NothingLost, Progress},
    ProblemKind, Promises,
};
use harness::{assert_failure_mode, contract, rush::Rush};
use lv4_kafka::LEVEL;
use rstest::rstest;

use super::{
    contract::{OVERSELLS, fifty_clicks, program, strategy},
    fixture::{Fixture, kill_instance},
};

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
#[case::lock_per_message("mutants/lock-per-message", rush(), OVERSELLS)]
#[case::lock_per_message_on_three("mutants/lock-per-message", rush().instances(3), OVERSELLS)]
#[case::lock_per_buyer("mutants/lock-per-buyer", rush(), OVERSELLS)]
#[case::lock_per_buyer_on_three("mutants/lock-per-buyer", rush().instances(3), OVERSELLS)]
#[case::stock_ignored("mutants/stock-ignored", rush(), OVERSELLS)]
#[case::refusals_stored_as_confirmed("mutants/refusals-stored-as-confirmed", rush(), OVERSELLS)]
#[case::dedupe_by_buyer("mutants/dedupe-by-buyer", short(), NEVER_ANSWERED)]
#[tokio::test]
async fn a_rush_catches_it(#[case] name: &str, #[case] rush: Rush, #[case] expected: Promises) {
    assert_eq!(strategy(name).guarantee.multi_instance, expected, "{name}");
    contract(&program(), &LEVEL, name, rush, expected).await;
}

#[tokio::test]
async fn fifty_clicks_at_once_catch_a_lock_per_message() {
    let report = fifty_clicks()
        .run_alone(&program(), &LEVEL, strategy("mutants/lock-per-message"))
        .await
        .unwrap();
    assert!(report.verdict.breaks(NoDuplicate), "{}", report.verdict);
}

/// An accepted order has an answer before it has a row.
#[tokio::test]
async fn an_order_that_is_not_yet_decided_catches_a_status_that_is_read_from_rows_only() {
    let strategy = strategy("mutants/accepted-is-unknown");
    let fixture = Fixture::new(strategy.name).await;
    let acceptor = fixture.start_acceptor(1).await;
    let order = fixture.accept(&acceptor, 1).await;
    let answer = acceptor.get(&format!("/api/reservations/{order}")).await.unwrap();
    answer.is(ProblemKind::UnknownReservation).unwrap();
    assert_failure_mode(strategy, &[NothingLost]);
    kill_instance(&acceptor).await;
}
