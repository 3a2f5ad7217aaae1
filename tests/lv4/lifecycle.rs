//! The consumers of a server: graceful shutdown, readiness, and the lag that it reports.

use harness::{test_server::TestServer, until};
use lv4_kafka::pipeline::{OrderPipeline, PARTITIONS, Partitioning, orders_topic};
use rdkafka::{
    admin::{AdminOptions, NewTopic, TopicReplication},
    consumer::Consumer,
};
use rstest::rstest;
use tokio::sync::{oneshot, watch};

use crate::fixture::{Expected::Kept, Fixture, TIMEOUT, metric};

#[rstest]
#[case::locked("locked")]
#[case::single_writer("single-writer")]
#[tokio::test]
async fn graceful_shutdown_finishes_the_orders_in_flight(#[case] name: &str) {
    let fixture = Fixture::new(name).await;
    let acceptor = fixture.start_acceptor(2).await;
    let orders = fixture.accept_all(&acceptor, 1..=1).await;
    let consumer = fixture.start_instance(&[("WORK_MS", "3000")]).await;
    fixture.wait_for_order_in_flight().await;
    let signalled = std::process::Command::new("kill")
        .arg(consumer.pid().await.unwrap().to_string())
        .status();
    assert!(signalled.unwrap().success());
    assert_eq!(
        fixture.rows().await,
        0,
        "the fault did not strike: it was decided before"
    );
    consumer.stop().await.unwrap();

    fixture.assert_outcome(&acceptor, &orders, Kept).await;
    assert_eq!(fixture.lag().await, 0, "its offset is not committed");
}

/// The partition of a sale follows from the number of partitions.
#[rstest]
#[case::fewer(1)]
#[case::more(PARTITIONS + 1)]
#[tokio::test]
async fn a_server_does_not_start_on_a_topic_with_another_number_of_partitions(#[case] partitions: i32) {
    let fixture = Fixture::new("single-writer").await;
    let topic = orders_topic(&fixture.kafka());
    let other = NewTopic::new(&topic, partitions, TopicReplication::Fixed(1));
    let created = fixture.admin().create_topics([&other], &AdminOptions::new()).await;
    created.unwrap()[0].as_ref().unwrap();

    until("the topic has its partitions", async || {
        let topic = topic.clone();
        let asked = fixture.query_broker(move |client| client.fetch_metadata(Some(&topic), TIMEOUT));
        let metadata = asked.await.unwrap();
        i32::try_from(metadata.topics()[0].partitions().len()) == Ok(partitions)
    })
    .await;

    let opened = OrderPipeline::open(fixture.context().await, Partitioning::BySale).await;
    let why = format!("{:#}", opened.err().expect("it does not open"));
    let expected = format!("{partitions} partitions, not {PARTITIONS}");
    assert!(why.contains(&expected), "{why}");
}

/// A consumer that has ended, after a panic, comes back only with a restart of the process.
#[tokio::test]
async fn a_server_is_not_ready_any_more_when_a_consumer_has_ended() {
    let fixture = Fixture::new("single-writer").await;
    let path = OrderPipeline::open(fixture.context().await, Partitioning::BySale)
        .await
        .unwrap();
    let (_joins, joined) = watch::channel(true);
    let (ends, end) = oneshot::channel::<()>();
    path.spawn_consumer(joined, async move { drop(end.await) });
    until("the server is ready", async || path.ready().await.is_ok()).await;
    drop(ends);
    until("the server is not ready", async || path.ready().await.is_err()).await;
    path.close().await;
}

/// Every server reports it, also one without consumers.
#[tokio::test]
async fn the_metrics_report_the_consumer_lag() {
    let fixture = Fixture::new("single-writer").await;
    let acceptor = fixture.start_acceptor(10).await;
    let orders = fixture.accept_all(&acceptor, 1..=5).await;
    let reported = async |server: &TestServer| metric(server, "oversold_consumer_lag").await;
    until("the lag is five", async || reported(&acceptor).await == Some(5)).await;
    let consumer = fixture.start_instance(&[]).await;
    fixture.wait_until_processed().await;
    until("the lag is zero", async || {
        reported(&acceptor).await == Some(0) && reported(&consumer).await == Some(0)
    })
    .await;

    fixture.assert_outcome(&consumer, &orders, Kept).await;
    acceptor.stop().await.unwrap();
    consumer.stop().await.unwrap();
}
