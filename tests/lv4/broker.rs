//! Faults of the Kafka broker, and what the producer makes of them.

use std::time::Duration;

use futures_util::future::join_all;
use harness::{
    backends::{self, Kafka},
    rush::SALE,
    until,
};
use lv4_kafka::pipeline::{orders_topic, producer};
use rdkafka::producer::FutureRecord;
use rstest::rstest;

use crate::fixture::{
    Expected::{self, Breaks, Kept},
    Fixture, LOST, assert_indeterminate, assert_unreachable, kill_instance, strategy,
};

/// While the broker is away no order is accepted. Then the instance is killed, and the broker comes
/// back.
#[rstest]
#[case::locked("locked", Kept)]
#[case::single_writer("single-writer", Kept)]
#[case::answer_before_ack("mutants/answer-before-ack", LOST)]
#[tokio::test]
async fn an_order_is_accepted_only_when_the_broker_has_it(#[case] name: &str, #[case] expected: Expected) {
    let strategy = strategy(name);
    let kafka = Kafka::private().await.unwrap();
    let (postgres, redis) = (backends::postgres().await.unwrap(), backends::redis().await.unwrap());
    let fixture = Fixture::on(strategy, &postgres, &redis, &kafka).await;
    let acceptor = fixture.start_acceptor(3).await;
    let mut orders = fixture.accept_all(&acceptor, 1..=1).await;

    match expected {
        Kept => {
            kafka.kill().await.unwrap();
            assert_unreachable(kafka.bootstrap_servers()).await;
            assert_indeterminate(&acceptor, 2).await;
        }
        // Frozen first: a server that has noticed that its broker is away accepts nothing.
        Breaks(_) => {
            kafka.freeze().await.unwrap();
            orders.push(fixture.accept(&acceptor, 2).await);
            kafka.kill().await.unwrap();
            assert_unreachable(kafka.bootstrap_servers()).await;
        }
    }
    kill_instance(&acceptor).await;
    kafka.start().await.unwrap();
    let second = fixture.start_instance(&[]).await;
    if expected == Kept {
        // Whether or not the broker has the first message: the same request key is the same order.
        orders.push(fixture.accept(&second, 2).await);
    }
    orders.push(fixture.accept(&second, 3).await);
    fixture.wait_until_processed().await;

    fixture.assert_outcome(&second, &orders, expected).await;
    second.stop().await.unwrap();
}

/// A frozen broker accepts connections and acknowledges nothing.
#[rstest]
#[case::locked("locked")]
#[case::single_writer("single-writer")]
#[tokio::test]
async fn an_order_without_an_acknowledgement_is_not_accepted(#[case] name: &str) {
    let strategy = strategy(name);
    let kafka = Kafka::private().await.unwrap();
    let (postgres, redis) = (backends::postgres().await.unwrap(), backends::redis().await.unwrap());
    let fixture = Fixture::on(strategy, &postgres, &redis, &kafka).await;
    let acceptor = fixture.start_acceptor(3).await;
    let mut orders = fixture.accept_all(&acceptor, 1..=1).await;

    kafka.freeze().await.unwrap();
    assert_indeterminate(&acceptor, 2).await;
    kill_instance(&acceptor).await;
    // The messages in its buffers are lost.
    kafka.kill().await.unwrap();
    assert_unreachable(kafka.bootstrap_servers()).await;
    kafka.start().await.unwrap();
    let second = fixture.start_instance(&[]).await;
    orders.extend(fixture.accept_all(&second, 2..=3).await);
    fixture.wait_until_processed().await;

    fixture.assert_outcome(&second, &orders, Kept).await;
    second.stop().await.unwrap();
}

/// The topic limits the size of a batch: a larger one is rejected, with every order in it.
#[tokio::test]
async fn concurrent_orders_are_sent_in_batches_that_the_topic_accepts() {
    const ORDERS: usize = 2_000;
    let fixture = Fixture::new("single-writer").await;
    let acceptor = fixture.start_acceptor(1).await;
    let sender = producer(&fixture.kafka()).unwrap();
    let (topic, order) = (orders_topic(&fixture.kafka()), [b' '; 200]);
    let sent = (0..ORDERS).map(|_| sender.send(FutureRecord::to(&topic).key("").payload(&order), Duration::ZERO));
    let refused: Vec<String> = join_all(sent)
        .await
        .into_iter()
        .filter_map(|sent| sent.err().map(|(why, _)| why.to_string()))
        .collect();
    assert!(
        refused.is_empty(),
        "{} of {ORDERS} were rejected: {}",
        refused.len(),
        refused[0]
    );
    acceptor.stop().await.unwrap();
}

/// Only the broker restarts: the same instance accepts and processes orders once it is back.
#[rstest]
#[case::locked("locked")]
#[case::single_writer("single-writer")]
#[tokio::test]
async fn an_instance_finds_the_broker_again(#[case] name: &str) {
    let strategy = strategy(name);
    let kafka = Kafka::private().await.unwrap();
    let (postgres, redis) = (backends::postgres().await.unwrap(), backends::redis().await.unwrap());
    let fixture = Fixture::on(strategy, &postgres, &redis, &kafka).await;
    let server = fixture.start_instance(&[]).await;
    server.create_rush_sale(10).await.unwrap();
    let mut orders = fixture.accept_all(&server, 1..=2).await;
    fixture.wait_until_processed().await;
    let pid = server.pid().await.unwrap();

    kafka.stop().await.unwrap();
    assert_unreachable(kafka.bootstrap_servers()).await;
    assert_indeterminate(&server, 3).await;
    assert_eq!(server.get("/readyz").await.unwrap().status, 503);
    kafka.start().await.unwrap();
    // A buyer whose outcome is unknown repeats the request with the same key.
    until("an order is accepted again", async || {
        server.reserve(SALE, 3, Some("buyer-3")).await.unwrap().status == 202
    })
    .await;
    orders.extend(fixture.accept_all(&server, 3..=5).await);
    fixture.wait_until_processed().await;

    fixture.assert_outcome(&server, &orders, Kept).await;
    assert_eq!(server.get("/readyz").await.unwrap().status, 200);
    assert_eq!(server.pid().await.unwrap(), pid, "it is another process");
    server.stop().await.unwrap();
}
