//! Faults of the Kafka broker, and what the producer makes of them.

use std::time::Duration;

use futures_util::future::join_all;
use harness::{
    backends::{self, Kafka, TestEnvironment},
    rush::SALE,
    until,
};
use lv4_kafka::pipeline::{orders_topic, producer};
use rdkafka::producer::FutureRecord;
use rstest::rstest;

use crate::fixture::{
    Expected::{self, Breaks, Kept},
    LOST, Place, is_away, is_told_undecided, killed, strategy,
};

/// While the broker is away nobody is told that an order is accepted. Then the instance dies, and the broker comes back.
#[rstest]
#[case::locked("locked", Kept)]
#[case::single_writer("single-writer", Kept)]
#[case::answer_before_ack("mutants/answer-before-ack", LOST)]
#[tokio::test]
async fn an_order_is_accepted_only_when_the_broker_has_it(#[case] name: &str, #[case] expected: Expected) {
    let strategy = strategy(name);
    let kafka = Kafka::private().await.unwrap();
    let (postgres, redis) = (backends::postgres().await.unwrap(), backends::redis().await.unwrap());
    let stand = TestEnvironment::on(&postgres, Some(&redis), strategy.schema)
        .await
        .unwrap()
        .and_kafka(Some(&kafka));
    let place = Place::on(strategy, stand).await;
    let acceptor = place.acceptor(3).await;
    let mut orders = place.accepted(&acceptor, 1..=1).await;

    kafka.kill().await.unwrap();
    is_away(kafka.bootstrap_servers()).await;
    match expected {
        Kept => is_told_undecided(&acceptor, 2).await,
        Breaks(_) => orders.push(place.accepts(&acceptor, 2).await),
    }
    killed(&acceptor).await;
    kafka.start().await.unwrap();
    let second = place.instance(&[]).await;
    if expected == Kept {
        // Whether or not the broker has the first message: the same key is the same order.
        orders.push(place.accepts(&second, 2).await);
    }
    orders.push(place.accepts(&second, 3).await);
    place.quiet().await;

    place.hold(&second, &orders, expected).await;
    second.stop().await.unwrap();
}

/// A broker that is there and says nothing has acknowledged nothing.
#[rstest]
#[case::locked("locked")]
#[case::single_writer("single-writer")]
#[tokio::test]
async fn an_order_that_a_broker_took_and_did_not_acknowledge_is_not_accepted(#[case] name: &str) {
    let strategy = strategy(name);
    let kafka = Kafka::private().await.unwrap();
    let (postgres, redis) = (backends::postgres().await.unwrap(), backends::redis().await.unwrap());
    let stand = TestEnvironment::on(&postgres, Some(&redis), strategy.schema)
        .await
        .unwrap()
        .and_kafka(Some(&kafka));
    let place = Place::on(strategy, stand).await;
    let acceptor = place.acceptor(3).await;
    let mut orders = place.accepted(&acceptor, 1..=1).await;

    kafka.freeze().await.unwrap();
    is_told_undecided(&acceptor, 2).await;
    killed(&acceptor).await;
    // What it was sent is lost with it.
    kafka.kill().await.unwrap();
    is_away(kafka.bootstrap_servers()).await;
    kafka.start().await.unwrap();
    let second = place.instance(&[]).await;
    orders.extend(place.accepted(&second, 2..=3).await);
    place.quiet().await;

    place.hold(&second, &orders, Kept).await;
    second.stop().await.unwrap();
}

/// The topic's limit is one on what travels together: a batch that is larger is refused, with every order in it.
#[tokio::test]
async fn orders_that_come_at_once_travel_in_batches_that_the_topic_takes() {
    const ORDERS: usize = 2_000;
    let place = Place::of("single-writer").await;
    let acceptor = place.acceptor(1).await;
    let sender = producer(&place.kafka()).unwrap();
    let (topic, order) = (orders_topic(&place.kafka()), [b' '; 200]);
    let sent = (0..ORDERS).map(|_| sender.send(FutureRecord::to(&topic).key("").payload(&order), Duration::ZERO));
    let refused: Vec<String> = join_all(sent)
        .await
        .into_iter()
        .filter_map(|sent| sent.err().map(|(why, _)| why.to_string()))
        .collect();
    assert!(
        refused.is_empty(),
        "{} of {ORDERS} were refused: {}",
        refused.len(),
        refused[0]
    );
    acceptor.stop().await.unwrap();
}

/// The broker goes, with nobody else: the same instance accepts and decides again once it is back.
#[rstest]
#[case::locked("locked")]
#[case::single_writer("single-writer")]
#[tokio::test]
async fn an_instance_finds_the_broker_again(#[case] name: &str) {
    let strategy = strategy(name);
    let kafka = Kafka::private().await.unwrap();
    let (postgres, redis) = (backends::postgres().await.unwrap(), backends::redis().await.unwrap());
    let stand = TestEnvironment::on(&postgres, Some(&redis), strategy.schema)
        .await
        .unwrap()
        .and_kafka(Some(&kafka));
    let place = Place::on(strategy, stand).await;
    let talk = place.instance(&[]).await;
    talk.opens_a_sale(10).await.unwrap();
    let mut orders = place.accepted(&talk, 1..=2).await;
    place.quiet().await;
    let pid = talk.pid().await.unwrap();

    kafka.stop().await.unwrap();
    is_away(kafka.bootstrap_servers()).await;
    is_told_undecided(&talk, 3).await;
    assert_eq!(talk.get("/readyz").await.unwrap().status, 503);
    kafka.start().await.unwrap();
    // A buyer who was told "undecided" repeats, with the same key.
    until("an order is accepted again", async || {
        talk.reserve(SALE, 3, Some("buyer-3")).await.unwrap().status == 202
    })
    .await;
    orders.extend(place.accepted(&talk, 3..=5).await);
    place.quiet().await;

    place.hold(&talk, &orders, Kept).await;
    assert_eq!(talk.get("/readyz").await.unwrap().status, 200);
    assert_eq!(talk.pid().await.unwrap(), pid, "it is another process");
    talk.stop().await.unwrap();
}
