//! Fencing: a consumer that resumes after its partition was reassigned.

use box_office::{
    Invariant::{Conservation, NoDuplicate, NothingLost},
    points,
};
use harness::until;
use rstest::rstest;

use crate::fixture::{
    Expected::{self, Breaks, Kept},
    Fixture, TWICE,
};

/// Its batch has three orders. The consumer that has moved the fence has processed at most one of
/// them.
#[tokio::test]
async fn a_fenced_batch_commits_no_offset() {
    let fixture = Fixture::new("single-writer").await;
    let acceptor = fixture.start_acceptor(5).await;
    let orders = fixture.accept_all(&acceptor, 1..=3).await;
    let consumer = fixture.start_stopped_at("batch decided").await;
    let moved = sqlx::query("update partition_offset set next_offset = next_offset + 1")
        .execute(&fixture.pool)
        .await
        .unwrap();
    assert_eq!(
        (moved.rows_affected(), fixture.rows().await),
        (1, 0),
        "the fault did not strike"
    );
    consumer.resume().await.unwrap();
    fixture.wait_until_processed().await;

    fixture.assert_outcome(&consumer, &orders, Kept).await;
    consumer.stop().await.unwrap();
}

/// The consumer is frozen for longer than its session, and its partitions are reassigned. Then it
/// resumes, with its batch decided and not written.
#[rstest]
#[case::single_writer("single-writer", "batch decided", Kept)]
#[case::offset_not_in_transaction("mutants/offset-not-in-transaction", "batch decided", TWICE)]
// A lock with a lease has the failure mode that LV.3 shows.
#[case::locked("locked", "decided to sell", Breaks(&[Conservation, NoDuplicate, NothingLost]))]
#[tokio::test]
async fn a_batch_that_comes_too_late_writes_nothing(
    #[case] name: &str,
    #[case] point: &str,
    #[case] expected: Expected,
) {
    let fixture = Fixture::new(name).await.with_short_session();
    let acceptor = fixture.start_acceptor(2).await;
    let orders = fixture.accept_all(&acceptor, 1..=1).await;
    let first = fixture.start_stopped_at(point).await;
    assert_eq!(fixture.rows().await, 0, "the fault did not strike: it is committed");
    let second = fixture.start_instance(&[]).await;
    until("the other consumer has decided", async || fixture.rows().await == 1).await;
    first.resume().await.unwrap();
    first.stop().await.unwrap();

    fixture.assert_outcome(&second, &orders, expected).await;
    second.stop().await.unwrap();
}

/// The consumer is frozen with its rows written and not committed, and holds the offset's row. The
/// next owner of the partition has decided the same batch when the first commits.
#[rstest]
#[case::single_writer("single-writer", Kept)]
#[case::offset_before_the_rows("mutants/offset-before-the-rows", TWICE)]
#[case::offset_compared_apart("mutants/offset-compared-apart", TWICE)]
#[tokio::test]
async fn a_batch_that_is_committed_while_another_consumer_has_it_is_written_once(
    #[case] name: &str,
    #[case] expected: Expected,
) {
    let fixture = Fixture::new(name).await.with_short_session();
    let acceptor = fixture.start_acceptor(2).await;
    let orders = fixture.accept_all(&acceptor, 1..=1).await;
    let first = fixture.start_stopped_at(points::ROWS_WRITTEN).await;
    assert_eq!(fixture.rows().await, 0, "the fault did not strike: it is committed");
    let second = fixture.start_instance(&[]).await;
    until("the other consumer has the batch, and waits for a row", async || {
        fixture.lock_waits().await > 0
    })
    .await;
    assert_eq!(fixture.rows().await, 0, "the fault did not strike: it is committed");
    first.resume().await.unwrap();
    first.stop().await.unwrap();
    fixture.wait_until_processed().await;

    fixture.assert_outcome(&second, &orders, expected).await;
    second.stop().await.unwrap();
}
