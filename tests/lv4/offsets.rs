//! Consumer offsets: redelivery after a crash, duplicates, reused offsets, and commits that must wait.

use box_office::SaleId;
use harness::{backends, rush::SALE, until};
use lv4_kafka::pipeline::{OrderMessage, orders_topic};
use rdkafka::admin::AdminOptions;
use rstest::rstest;

use crate::fixture::{
    Expected::{self, Breaks, Kept},
    LOST, PATIENCE, Place, TIME_FOR_A_MISTAKE, killed, order, seen_within,
};

#[rstest]
#[case::locked("locked", Kept)]
#[case::single_writer("single-writer", Kept)]
#[case::no_dedupe("mutants/no-dedupe", Breaks(&[]))]
#[tokio::test]
async fn a_consumer_killed_between_its_commit_and_its_offset_decides_nothing_twice(
    #[case] name: &str,
    #[case] expected: Expected,
) {
    let place = Place::of(name).await.where_deaths_are_noticed();
    let acceptor = place.acceptor(2).await;
    let orders = place.accepted(&acceptor, 1..=3).await;

    let first = place.stops_at("committed").await;
    assert!(place.rows().await > 0, "the fault did not strike: nothing is committed");
    assert_eq!(
        place.committed().await,
        0,
        "the fault did not strike: the offset is committed"
    );
    place.ledger.ask_how_they_ended(&acceptor, PATIENCE).await.unwrap();
    killed(&first).await;
    let second = place.instance(&[]).await;
    place.quiet().await;

    place.hold(&second, &orders, expected).await;
    second.stop().await.unwrap();
}

/// Whoever sends again what the broker did not confirm in time may have sent it twice.
#[rstest]
#[case::locked("locked", Kept)]
#[case::single_writer("single-writer", Kept)]
#[case::no_dedupe("mutants/no-dedupe", Breaks(&[]))]
#[tokio::test]
async fn an_order_that_lies_in_the_topic_many_times_is_decided_once(#[case] name: &str, #[case] expected: Expected) {
    let place = Place::of(name).await;
    let acceptor = place.acceptor(2).await;
    let orders = place.accepted(&acceptor, 1..=1).await;
    let message = OrderMessage::new(orders[0], &order(SALE, 1)).to_bytes();
    // Some come in one batch, and one comes later.
    let offsets = place.offsets().await;
    let (&partition, _) = offsets.iter().find(|(_, (_, end))| *end > 0).unwrap();
    place.puts(partition, &[&message, &message]).await.unwrap();
    let decider = place.instance(&[]).await;
    place.quiet().await;
    place.ledger.ask_how_they_ended(&decider, PATIENCE).await.unwrap();
    place.puts(partition, &[&message]).await.unwrap();
    place.quiet().await;

    assert_eq!(place.committed().await, 4, "the fault did not strike");
    place.hold(&decider, &orders, expected).await;
    acceptor.stop().await.unwrap();
    decider.stop().await.unwrap();
}

#[rstest]
#[case::locked("locked", "decided to sell")]
#[case::single_writer("single-writer", "rows written")]
#[tokio::test]
async fn what_a_consumer_had_in_hand_when_it_was_killed_is_decided_by_another(#[case] name: &str, #[case] point: &str) {
    let place = Place::of(name).await.where_deaths_are_noticed();
    let acceptor = place.acceptor(2).await;
    let orders = place.accepted(&acceptor, 1..=3).await;

    let first = place.stops_at(point).await;
    assert_eq!(place.rows().await, 0, "the fault did not strike: it is committed");
    killed(&first).await;
    let second = place.instance(&[]).await;
    place.quiet().await;

    place.hold(&second, &orders, Kept).await;
    second.stop().await.unwrap();
}

/// The same, killed while the business takes its time: as long as an automatic commit needs.
#[rstest]
#[case::locked("locked", Kept)]
#[case::single_writer("single-writer", Kept)]
#[case::auto_commit("mutants/auto-commit", LOST)]
#[tokio::test]
async fn an_offset_is_not_committed_while_its_order_is_in_hand(#[case] name: &str, #[case] expected: Expected) {
    let place = Place::of(name).await.where_deaths_are_noticed();
    let acceptor = place.acceptor(2).await;
    let orders = place.accepted(&acceptor, 1..=1).await;

    let first = place.instance(&[("WORK_MS", "10000")]).await;
    place.an_order_is_in_hand().await;
    let committed = async || place.committed().await > 0;
    match expected {
        // There is nothing to wait for but time. It is thirty times what the mistake needs.
        Kept => assert!(!seen_within(TIME_FOR_A_MISTAKE, committed).await),
        Breaks(_) => until("the offset is committed", committed).await,
    }
    killed(&first).await;
    let second = place.instance(&[]).await;
    place.quiet().await;

    place.hold(&second, &orders, expected).await;
    second.stop().await.unwrap();
}

/// How an instance leaves its group.
enum Leaves {
    /// The group misses it when its session is over.
    Killed,
    /// It says that it goes, after another one has joined.
    InPeace,
}

/// One order can't be decided for now, as somebody else holds its lock. One that lies behind it, of another sale, can.
#[rstest]
#[case::locked("locked", Leaves::Killed, Kept)]
#[case::locked_in_a_rebalance("locked", Leaves::InPeace, Kept)]
#[case::highest_offset("mutants/highest-offset", Leaves::Killed, LOST)]
#[case::highest_offset_in_a_rebalance("mutants/highest-offset", Leaves::InPeace, LOST)]
#[tokio::test]
async fn an_offset_does_not_pass_an_order_that_was_put_off(
    #[case] name: &str,
    #[case] leaves: Leaves,
    #[case] expected: Expected,
) {
    const OTHER: SaleId = 2;
    let place = Place::of(name).await.where_deaths_are_noticed();
    let redis = backends::redis().await.unwrap();
    let acceptor = place.acceptor(1).await;
    acceptor.opens(OTHER, 100).await.unwrap();
    let lock = format!("{}lock:sale:{SALE}", place.stand.prefix().unwrap());
    redis
        .command(&["SET", &lock, "somebody else", "PX", "60000"])
        .await
        .unwrap();

    let mut orders = vec![place.accepts(&acceptor, 1).await];
    let partition = *place.offsets().await.iter().find(|(_, (_, end))| *end > 0).unwrap().0;
    for buyer in 2.. {
        let answered = acceptor.reserve(OTHER, buyer, None).await.unwrap();
        orders.push(answered.json::<box_office::api::Reservation>().unwrap().id);
        if place.offsets().await[&partition].1 >= 2 {
            break;
        }
    }
    let first = place.instance(&[]).await;
    let others = i64::try_from(orders.len() - 1).unwrap();
    until("the others are decided", async || place.rows().await == others).await;
    let passed = async || place.offsets().await[&partition].0 > 0;
    match expected {
        // By the third time, the offsets of the first two are committed.
        Kept => {
            place.is_tried(3).await;
            assert!(!passed().await);
        }
        Breaks(_) => until("the offset has passed it", passed).await,
    }
    let second = match leaves {
        Leaves::Killed => {
            killed(&first).await;
            place.instance(&[]).await
        }
        // Partitions change hands twice: when the second joins, and when the first leaves.
        Leaves::InPeace => {
            let second = place.instance(&[]).await;
            place.shared_by(2).await;
            first.stop().await.unwrap();
            place.shared_by(1).await;
            second
        }
    };
    redis.command(&["DEL", &lock]).await.unwrap();
    place.quiet().await;

    place.hold(&second, &orders, expected).await;
    second.stop().await.unwrap();
}

/// What `next_offset` is made to say of orders that it knows nothing of.
#[derive(Clone, Copy, Debug)]
enum Again {
    /// The broker has lost the end of its log, and counts from an earlier number.
    Lost,
    /// The topic was made anew, and counts from nothing.
    Remade,
}

#[rstest]
#[case::single_writer("single-writer", Again::Lost)]
#[case::single_writer_in_a_new_topic("single-writer", Again::Remade)]
#[case::locked_in_a_new_topic("locked", Again::Remade)]
#[tokio::test]
async fn an_order_whose_offset_was_another_ones_before_is_decided(#[case] name: &str, #[case] again: Again) {
    let place = Place::of(name).await;
    let first = place.instance(&[]).await;
    first.opens_a_sale(10).await.unwrap();
    let mut orders = place.accepted(&first, 1..=3).await;
    place.quiet().await;
    first.stop().await.unwrap();

    match again {
        // Seen from here, that is the same as an offset that is ahead of the broker's.
        Again::Lost => {
            let raised = sqlx::query("update partition_offset set next_offset = next_offset + 100")
                .execute(&place.pool)
                .await
                .unwrap();
            assert!(raised.rows_affected() > 0, "the fault did not strike");
        }
        Again::Remade => {
            let topic = orders_topic(&place.kafka());
            let deleted = place.admin().delete_topics(&[&topic], &AdminOptions::new()).await;
            deleted.unwrap()[0].as_ref().unwrap();
        }
    }
    let second = place.instance(&[]).await;
    // In a topic that was just made, the broker may not lead every partition yet.
    orders.extend(place.accepted(&second, 4..=6).await);
    place.quiet().await;
    if let Again::Remade = again {
        let ends = place.offsets().await;
        assert_eq!(
            ends.values().map(|(_, end)| end).sum::<i64>(),
            3,
            "the fault did not strike"
        );
    }
    place.hold(&second, &orders, Kept).await;
    orders.extend(place.accepted(&second, 7..=8).await);
    place.quiet().await;

    place.hold(&second, &orders, Kept).await;
    second.stop().await.unwrap();
}
