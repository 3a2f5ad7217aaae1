//! Faults of Postgres: failed commits, lost rows, and an exhausted pool.

use box_office::Invariant::{NothingLost, Progress};
use harness::{DelayedCommits, until};
use lv4_kafka::pipeline::orders_topic;
use rdkafka::{Offset, TopicPartitionList, admin::AdminOptions};
use rstest::rstest;
use uuid::Uuid;

use crate::fixture::{Expected::Kept, PATIENCE, Place, killed};

/// Postgres takes a commit back in the very end. Whoever decided those orders decides them again.
#[rstest]
#[case::locked("locked")]
#[case::single_writer("single-writer")]
#[tokio::test]
async fn a_commit_that_fails_loses_no_order(#[case] name: &str) {
    let place = Place::of(name).await;
    let acceptor = place.acceptor(2).await;
    let orders = place.accepted(&acceptor, 1..=3).await;
    let held = DelayedCommits::on(&place.stand).await.unwrap();
    let decider = place.instance(&[]).await;
    until("the fault did not strike: nobody commits", async || {
        held.have_struck().await.unwrap()
    })
    .await;
    assert!(held.fail().await.unwrap() > 0, "the fault did not strike");
    held.go_on().await.unwrap();
    place.quiet().await;

    place.hold(&decider, &orders, Kept).await;
    acceptor.stop().await.unwrap();
    decider.stop().await.unwrap();
}

/// The database is one that was restored from a backup, or a replica that had not heard of the last orders when it took over.
#[rstest]
#[case::single_writer("single-writer", false)]
#[case::single_writer_where_the_topic_has_forgotten("single-writer", true)]
#[tokio::test]
async fn orders_that_the_database_has_lost_are_decided_again(#[case] name: &str, #[case] forgotten: bool) {
    let place = Place::of(name).await;
    let talk = place.instance(&[]).await;
    talk.opens_a_sale(10).await.unwrap();
    let mut orders = place.accepted(&talk, 1..=1).await;
    place.quiet().await;
    let backup: Vec<(i32, i64)> = sqlx::query_as("select partition, next_offset from partition_offset")
        .fetch_all(&place.pool)
        .await
        .unwrap();
    let [(partition, then)] = backup[..] else {
        panic!("{backup:?}")
    };
    orders.extend(place.accepted(&talk, 2..=4).await);
    place.quiet().await;

    let lost = sqlx::query("delete from reservation where id <> $1")
        .bind(orders[0])
        .execute(&place.pool)
        .await;
    assert_eq!(lost.unwrap().rows_affected(), 3, "the fault did not strike");
    sqlx::raw_sql(sqlx::AssertSqlSafe(format!(
        "delete from outbox where not exists (select from reservation where id = reservation_id);
         update sale set stock = 9;
         update partition_offset set next_offset = {then};"
    )))
    .execute(&place.pool)
    .await
    .unwrap();
    if forgotten {
        let mut gone = TopicPartitionList::new();
        gone.add_partition_offset(&orders_topic(&place.kafka()), partition, Offset::Offset(then + 2))
            .unwrap();
        place.admin().delete_records(&gone, &AdminOptions::new()).await.unwrap();
    }
    let nobody_has: Vec<Uuid> = if forgotten {
        orders.drain(1..3).collect()
    } else {
        vec![]
    };
    orders.extend(place.accepted(&talk, 5..=6).await);
    place.quiet().await;
    until("what was lost is decided", async || {
        place.rows().await >= orders.len() as i64
    })
    .await;

    if forgotten {
        // No strategy can decide what neither of the two has any more. All the others are as they should be.
        assert_eq!(place.not_decided_and_told_once(&orders).await, [""; 0]);
        let verdict = place.verdict(&talk, PATIENCE).await;
        let broken: Vec<_> = verdict
            .findings
            .iter()
            .map(|found| (found.invariant, found.count))
            .collect();
        assert_eq!(broken, [(NothingLost, 2), (Progress, 2)], "{nobody_has:?}\n{verdict}");
    } else {
        place.hold(&talk, &orders, Kept).await;
    }
    talk.stop().await.unwrap();
}

/// One connection for all orders in hand would be none for those who ask.
#[tokio::test]
async fn who_asks_is_answered_while_orders_take_their_time() {
    let place = Place::of("locked").await;
    let talk = place
        .instance(&[("DATABASE_POOL_SIZE", "2"), ("WORK_MS", "10000")])
        .await;
    talk.opens_a_sale(10).await.unwrap();
    let orders = place.accepted(&talk, 1..=8).await;
    let in_hand = place.an_order_is_in_hand().await;
    let state = talk.get(&format!("/api/reservations/{}", orders[0])).await.unwrap();
    let open = place.transactions("%").await;
    assert!(
        !open.is_disjoint(&in_hand),
        "the fault did not strike: {in_hand:?} are over, and {open:?} have begun"
    );
    assert_eq!(
        state.status,
        200,
        "{}, with {open:?}",
        String::from_utf8_lossy(&state.body)
    );
    killed(&talk).await;
}
