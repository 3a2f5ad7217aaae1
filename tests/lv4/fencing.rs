//! Fencing: a consumer that resumes after its partition was reassigned.

use box_office::Invariant::{Conservation, NoDuplicate, NothingLost};
use harness::until;
use rstest::rstest;

use crate::fixture::{
    Expected::{self, Breaks, Kept},
    Place, TWICE,
};

/// It has three orders in hand. Whoever moved the fence has decided one of them at most.
#[tokio::test]
async fn who_comes_too_late_passes_nothing() {
    let place = Place::of("single-writer").await;
    let acceptor = place.acceptor(5).await;
    let orders = place.accepted(&acceptor, 1..=3).await;
    let decider = place.stops_at("batch decided").await;
    let moved = sqlx::query("update partition_offset set next_offset = next_offset + 1")
        .execute(&place.pool)
        .await
        .unwrap();
    assert_eq!(
        (moved.rows_affected(), place.rows().await),
        (1, 0),
        "the fault did not strike"
    );
    decider.goes_on().await.unwrap();
    place.quiet().await;

    place.hold(&decider, &orders, Kept).await;
    decider.stop().await.unwrap();
}

/// It stands still for longer than its session, and its partitions are given away. Then it wakes up, with its batch decided and not written.
#[rstest]
#[case::single_writer("single-writer", "batch decided", Kept)]
#[case::offset_not_in_transaction("mutants/offset-not-in-transaction", "batch decided", TWICE)]
// A lock with a lease has the limit that LV.3 shows.
#[case::locked("locked", "decided to sell", Breaks(&[Conservation, NoDuplicate, NothingLost]))]
#[tokio::test]
async fn a_batch_that_comes_too_late_writes_nothing(
    #[case] name: &str,
    #[case] point: &str,
    #[case] expected: Expected,
) {
    let place = Place::of(name).await.where_deaths_are_noticed();
    let acceptor = place.acceptor(2).await;
    let orders = place.accepted(&acceptor, 1..=1).await;
    let first = place.stops_at(point).await;
    assert_eq!(place.rows().await, 0, "the fault did not strike: it is committed");
    let second = place.instance(&[]).await;
    until("the other one has decided", async || place.rows().await == 1).await;
    first.goes_on().await.unwrap();
    first.stop().await.unwrap();

    place.hold(&second, &orders, expected).await;
    second.stop().await.unwrap();
}
