//! Consumer offsets: redelivery after a crash, duplicates, reused offsets, and commits that must
//! wait.

use box_office::{SaleId, points};
use harness::{backends, rush::SALE, until};
use lv4_kafka::pipeline::{OrderMessage, orders_topic};
use rdkafka::admin::AdminOptions;
use rstest::rstest;

use crate::fixture::{
    Expected::{self, Breaks, Kept},
    Fixture, LOST, OBSERVATION_TIME, TIMEOUT, happens_within, kill_instance, order,
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
    let fixture = Fixture::new(name).await.with_short_session();
    let acceptor = fixture.start_acceptor(2).await;
    let orders = fixture.accept_all(&acceptor, 1..=3).await;

    let first = fixture.start_stopped_at("committed").await;
    assert!(
        fixture.rows().await > 0,
        "the fault did not strike: nothing is committed"
    );
    assert_eq!(
        fixture.total_committed().await,
        0,
        "the fault did not strike: the offset is committed"
    );
    fixture.history.record_outcomes(&acceptor, TIMEOUT).await.unwrap();
    kill_instance(&first).await;
    let second = fixture.start_instance(&[]).await;
    fixture.wait_until_processed().await;

    fixture.assert_outcome(&second, &orders, expected).await;
    second.stop().await.unwrap();
}

/// A producer that retries after a missing acknowledgement may send a message twice.
#[rstest]
#[case::locked("locked", Kept)]
#[case::single_writer("single-writer", Kept)]
#[case::no_dedupe("mutants/no-dedupe", Breaks(&[]))]
#[tokio::test]
async fn a_duplicated_message_is_decided_once(#[case] name: &str, #[case] expected: Expected) {
    let fixture = Fixture::new(name).await;
    let acceptor = fixture.start_acceptor(2).await;
    let orders = fixture.accept_all(&acceptor, 1..=1).await;
    let message = OrderMessage::new(orders[0], &order(SALE, 1)).to_bytes();
    // Some duplicates arrive in one batch, and one later.
    let offsets = fixture.offsets().await;
    let (&partition, _) = offsets.iter().find(|(_, (_, end))| *end > 0).unwrap();
    fixture.produce(partition, &[&message, &message]).await.unwrap();
    let consumer = fixture.start_instance(&[]).await;
    fixture.wait_until_processed().await;
    fixture.history.record_outcomes(&consumer, TIMEOUT).await.unwrap();
    fixture.produce(partition, &[&message]).await.unwrap();
    fixture.wait_until_processed().await;

    assert_eq!(fixture.total_committed().await, 4, "the fault did not strike");
    fixture.assert_outcome(&consumer, &orders, expected).await;
    acceptor.stop().await.unwrap();
    consumer.stop().await.unwrap();
}

#[rstest]
#[case::locked("locked", "decided to sell")]
#[case::single_writer("single-writer", points::ROWS_WRITTEN)]
#[tokio::test]
async fn orders_in_flight_on_a_killed_consumer_are_decided_by_another(#[case] name: &str, #[case] point: &str) {
    let fixture = Fixture::new(name).await.with_short_session();
    let acceptor = fixture.start_acceptor(2).await;
    let orders = fixture.accept_all(&acceptor, 1..=3).await;

    let first = fixture.start_stopped_at(point).await;
    assert_eq!(fixture.rows().await, 0, "the fault did not strike: it is committed");
    kill_instance(&first).await;
    let second = fixture.start_instance(&[]).await;
    fixture.wait_until_processed().await;

    fixture.assert_outcome(&second, &orders, Kept).await;
    second.stop().await.unwrap();
}

/// The consumer is killed during the simulated work, which takes longer than the interval of
/// automatic commits.
#[rstest]
#[case::locked("locked", Kept)]
#[case::single_writer("single-writer", Kept)]
#[case::auto_commit("mutants/auto-commit", LOST)]
#[tokio::test]
async fn an_offset_is_not_committed_while_its_order_is_in_flight(#[case] name: &str, #[case] expected: Expected) {
    let fixture = Fixture::new(name).await.with_short_session();
    let acceptor = fixture.start_acceptor(2).await;
    let orders = fixture.accept_all(&acceptor, 1..=1).await;

    let first = fixture.start_instance(&[("WORK_MS", "10000")]).await;
    fixture.wait_for_order_in_flight().await;
    let committed = async || fixture.total_committed().await > 0;
    match expected {
        // Only time can show this. It is thirty times the interval of automatic commits.
        Kept => assert!(!happens_within(OBSERVATION_TIME, committed).await),
        Breaks(_) => until("the offset is committed", committed).await,
    }
    kill_instance(&first).await;
    let second = fixture.start_instance(&[]).await;
    fixture.wait_until_processed().await;

    fixture.assert_outcome(&second, &orders, expected).await;
    second.stop().await.unwrap();
}

/// A new group has committed no offset. It must begin with the oldest order, not with the first that
/// arrives after it.
#[rstest]
#[case::locked("locked", Kept)]
#[case::single_writer("single-writer", Kept)]
#[case::offset_reset_latest("mutants/offset-reset-latest", LOST)]
#[tokio::test]
async fn orders_accepted_before_the_first_consumer_are_decided(#[case] name: &str, #[case] expected: Expected) {
    let fixture = Fixture::new(name).await;
    let acceptor = fixture.start_acceptor(100).await;
    let mut orders = fixture.accept_all(&acceptor, 1..=1).await;
    let offsets = fixture.offsets().await;
    let (&partition, _) = offsets.iter().find(|(_, (_, end))| *end > 0).unwrap();

    let consumer = fixture.start_instance(&[]).await;
    // Once a later order of the partition is processed, no consumer comes back to the first.
    let mut buyers = 2..;
    until("a later order is processed", async || {
        orders.push(fixture.accept(&acceptor, buyers.next().unwrap()).await);
        fixture.offsets().await[&partition].0 > 0
    })
    .await;
    until("the later orders are processed", async || {
        let (processed, end) = fixture.offsets().await[&partition];
        processed == end
    })
    .await;
    if let Kept = expected {
        fixture.wait_until_processed().await;
    }

    fixture.assert_outcome(&consumer, &orders, expected).await;
    acceptor.stop().await.unwrap();
    consumer.stop().await.unwrap();
}

/// How an instance leaves the group.
enum Leaves {
    /// The group expels it when its session expires.
    Killed,
    /// It shuts down gracefully after another one has joined.
    Gracefully,
}

/// One order must be retried, as another owner holds its lock. A later one of another sale
/// succeeds.
#[rstest]
#[case::locked("locked", Leaves::Killed, Kept)]
#[case::locked_in_a_rebalance("locked", Leaves::Gracefully, Kept)]
#[case::highest_offset("mutants/highest-offset", Leaves::Killed, LOST)]
#[case::highest_offset_in_a_rebalance("mutants/highest-offset", Leaves::Gracefully, LOST)]
#[tokio::test]
async fn an_offset_does_not_pass_an_order_that_must_be_retried(
    #[case] name: &str,
    #[case] leaves: Leaves,
    #[case] expected: Expected,
) {
    const OTHER: SaleId = 2;
    let fixture = Fixture::new(name).await.with_short_session();
    let redis = backends::redis().await.unwrap();
    let acceptor = fixture.start_acceptor(1).await;
    acceptor.create_sale(OTHER, 100).await.unwrap();
    let lock = format!("{}lock:sale:{SALE}", fixture.environment.prefix().unwrap());
    redis
        .command(&["SET", &lock, "another owner", "PX", "60000"])
        .await
        .unwrap();

    let mut orders = vec![fixture.accept(&acceptor, 1).await];
    let partition = *fixture.offsets().await.iter().find(|(_, (_, end))| *end > 0).unwrap().0;
    for buyer in 2.. {
        let answered = acceptor.reserve(OTHER, buyer, None).await.unwrap();
        orders.push(answered.json::<box_office::api::Reservation>().unwrap().id);
        if fixture.offsets().await[&partition].1 >= 2 {
            break;
        }
    }
    let first = fixture.start_instance(&[]).await;
    let others = i64::try_from(orders.len() - 1).unwrap();
    until("the other orders are decided", async || fixture.rows().await == others).await;
    let passed = async || fixture.offsets().await[&partition].0 > 0;
    match expected {
        // By the third attempt, the commits of the first two batches are done.
        Kept => {
            fixture.wait_for_attempts(3).await;
            assert!(!passed().await);
        }
        Breaks(_) => until("the offset above it is committed", passed).await,
    }
    let second = match leaves {
        Leaves::Killed => {
            kill_instance(&first).await;
            fixture.start_instance(&[]).await
        }
        // Two rebalances: the second joins, and the first leaves.
        Leaves::Gracefully => {
            let second = fixture.start_instance(&[]).await;
            fixture.wait_until_shared_by(2).await;
            first.stop().await.unwrap();
            fixture.wait_until_shared_by(1).await;
            second
        }
    };
    redis.command(&["DEL", &lock]).await.unwrap();
    fixture.wait_until_processed().await;

    fixture.assert_outcome(&second, &orders, expected).await;
    second.stop().await.unwrap();
}

/// Why offsets that the database has seen are used again for other orders.
#[derive(Clone, Copy, Debug)]
enum Reuse {
    /// The broker has lost the end of its log.
    LogTruncated,
    /// The topic was recreated and counts from zero.
    TopicRecreated,
}

#[rstest]
#[case::single_writer("single-writer", Reuse::LogTruncated)]
#[case::single_writer_in_a_new_topic("single-writer", Reuse::TopicRecreated)]
#[case::locked_in_a_new_topic("locked", Reuse::TopicRecreated)]
#[tokio::test]
async fn an_order_at_a_reused_offset_is_decided(#[case] name: &str, #[case] reuse: Reuse) {
    let fixture = Fixture::new(name).await;
    let first = fixture.start_instance(&[]).await;
    first.create_rush_sale(10).await.unwrap();
    let mut orders = fixture.accept_all(&first, 1..=3).await;
    fixture.wait_until_processed().await;
    first.stop().await.unwrap();

    match reuse {
        // To the consumer it is the same as a database offset above the end of the log.
        Reuse::LogTruncated => {
            let raised = sqlx::query("update partition_offset set next_offset = next_offset + 100")
                .execute(&fixture.pool)
                .await
                .unwrap();
            assert!(raised.rows_affected() > 0, "the fault did not strike");
        }
        Reuse::TopicRecreated => {
            let topic = orders_topic(&fixture.kafka());
            let deleted = fixture.admin().delete_topics(&[&topic], &AdminOptions::new()).await;
            deleted.unwrap()[0].as_ref().unwrap();
        }
    }
    let second = fixture.start_instance(&[]).await;
    // A new topic may not have a leader for every partition yet.
    orders.extend(fixture.accept_all(&second, 4..=6).await);
    fixture.wait_until_processed().await;
    if let Reuse::TopicRecreated = reuse {
        let ends = fixture.offsets().await;
        assert_eq!(
            ends.values().map(|(_, end)| end).sum::<i64>(),
            3,
            "the fault did not strike"
        );
    }
    fixture.assert_outcome(&second, &orders, Kept).await;
    orders.extend(fixture.accept_all(&second, 7..=8).await);
    fixture.wait_until_processed().await;

    fixture.assert_outcome(&second, &orders, Kept).await;
    second.stop().await.unwrap();
}
