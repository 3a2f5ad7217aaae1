//! Faults of Postgres: failed commits, lost rows, and an exhausted pool.

use box_office::Invariant::{NothingLost, Progress};
use harness::{DelayedCommits, until};
use lv4_kafka::pipeline::orders_topic;
use rdkafka::{Offset, TopicPartitionList, admin::AdminOptions};
use rstest::rstest;
use uuid::Uuid;

use crate::fixture::{Expected::Kept, Fixture, TIMEOUT, kill_instance};

/// Postgres fails a commit at the last moment. The consumer processes those orders again.
#[rstest]
#[case::locked("locked")]
#[case::single_writer("single-writer")]
#[tokio::test]
async fn a_commit_that_fails_loses_no_order(#[case] name: &str) {
    let fixture = Fixture::new(name).await;
    let acceptor = fixture.start_acceptor(2).await;
    let orders = fixture.accept_all(&acceptor, 1..=3).await;
    let held = DelayedCommits::on(&fixture.environment).await.unwrap();
    let consumer = fixture.start_instance(&[]).await;
    until("the fault did not strike: no commit is in flight", async || {
        held.has_struck().await.unwrap()
    })
    .await;
    assert!(held.fail().await.unwrap() > 0, "the fault did not strike");
    held.release().await.unwrap();
    fixture.wait_until_processed().await;

    fixture.assert_outcome(&consumer, &orders, Kept).await;
    acceptor.stop().await.unwrap();
    consumer.stop().await.unwrap();
}

/// The database was restored from a backup, or is a replica that lacked the last transactions when
/// it was promoted.
#[rstest]
#[case::single_writer("single-writer", false)]
#[case::single_writer_where_the_topic_has_forgotten("single-writer", true)]
#[tokio::test]
async fn orders_that_the_database_has_lost_are_decided_again(#[case] name: &str, #[case] forgotten: bool) {
    let fixture = Fixture::new(name).await;
    let server = fixture.start_instance(&[]).await;
    server.create_rush_sale(10).await.unwrap();
    let mut orders = fixture.accept_all(&server, 1..=1).await;
    fixture.wait_until_processed().await;
    let backup: Vec<(i32, i64)> = sqlx::query_as("select partition, next_offset from partition_offset")
        .fetch_all(&fixture.pool)
        .await
        .unwrap();
    let [(partition, then)] = backup[..] else {
        panic!("{backup:?}")
    };
    orders.extend(fixture.accept_all(&server, 2..=4).await);
    fixture.wait_until_processed().await;

    let lost = sqlx::query("delete from reservation where id <> $1")
        .bind(orders[0])
        .execute(&fixture.pool)
        .await;
    assert_eq!(lost.unwrap().rows_affected(), 3, "the fault did not strike");
    sqlx::raw_sql(sqlx::AssertSqlSafe(format!(
        "delete from outbox where not exists (select from reservation where id = reservation_id);
         update sale set stock = 9;
         update partition_offset set next_offset = {then};"
    )))
    .execute(&fixture.pool)
    .await
    .unwrap();
    if forgotten {
        let mut gone = TopicPartitionList::new();
        gone.add_partition_offset(&orders_topic(&fixture.kafka()), partition, Offset::Offset(then + 2))
            .unwrap();
        fixture
            .admin()
            .delete_records(&gone, &AdminOptions::new())
            .await
            .unwrap();
    }
    let unrecoverable: Vec<Uuid> = if forgotten {
        orders.drain(1..3).collect()
    } else {
        vec![]
    };
    orders.extend(fixture.accept_all(&server, 5..=6).await);
    fixture.wait_until_processed().await;
    until("the lost orders are decided again", async || {
        fixture.rows().await >= orders.len() as i64
    })
    .await;

    if forgotten {
        // Neither the database nor the topic has these orders any more. All other orders are
        // intact.
        assert_eq!(fixture.deviations(&orders).await, [""; 0]);
        let verdict = fixture.verdict(&server, TIMEOUT).await;
        let broken: Vec<_> = verdict
            .findings
            .iter()
            .map(|found| (found.invariant, found.count))
            .collect();
        assert_eq!(
            broken,
            [(NothingLost, 2), (Progress, 2)],
            "{unrecoverable:?}\n{verdict}"
        );
    } else {
        fixture.assert_outcome(&server, &orders, Kept).await;
    }
    server.stop().await.unwrap();
}

/// Orders in flight must not take every connection of the pool: requests need one.
#[tokio::test]
async fn requests_are_answered_while_orders_are_in_flight() {
    let fixture = Fixture::new("locked").await;
    let server = fixture
        .start_instance(&[("DATABASE_POOL_SIZE", "2"), ("WORK_MS", "10000")])
        .await;
    server.create_rush_sale(10).await.unwrap();
    let orders = fixture.accept_all(&server, 1..=8).await;
    let in_flight = fixture.wait_for_order_in_flight().await;
    let state = server.get(&format!("/api/reservations/{}", orders[0])).await.unwrap();
    let open = fixture.open_transactions("%").await;
    assert!(
        !open.is_disjoint(&in_flight),
        "the fault did not strike: {in_flight:?} have ended, and {open:?} are open"
    );
    assert_eq!(
        state.status,
        200,
        "{}, with {open:?}",
        String::from_utf8_lossy(&state.body)
    );
    kill_instance(&server).await;
}
