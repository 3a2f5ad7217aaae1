//! The consumers of a server: graceful shutdown, readiness, and the lag that it reports.

use std::time::Duration;

use box_office::{Instrumentation, StrategyContext, StrategyMetrics};
use harness::{test_server::TestServer, until};
use lv4_kafka::pipeline::OrderPipeline;
use rstest::rstest;
use tokio::sync::{oneshot, watch};

use crate::fixture::{Expected::Kept, Fixture, metric};

#[rstest]
#[case::locked("locked")]
#[case::single_writer("single-writer")]
#[tokio::test]
async fn graceful_shutdown_finishes_the_orders_in_flight(#[case] name: &str) {
    let fixture = Fixture::new(name).await;
    let acceptor = fixture.start_acceptor(2).await;
    let orders = fixture.accept_all(&acceptor, 1..=1).await;
    let decider = fixture.start_instance(&[("WORK_MS", "3000")]).await;
    fixture.wait_for_order_in_flight().await;
    let signalled = std::process::Command::new("kill")
        .arg(decider.pid().await.unwrap().to_string())
        .status();
    assert!(signalled.unwrap().success());
    assert_eq!(
        fixture.rows().await,
        0,
        "the fault did not strike: it was decided before"
    );
    decider.stop().await.unwrap();

    fixture.assert_outcome(&acceptor, &orders, Kept).await;
    assert_eq!(fixture.lag().await, 0, "its offset is not committed");
}

/// A consumer that has ended, after a panic, comes back only with a restart of the process.
#[tokio::test]
async fn a_server_is_not_ready_any_more_when_a_consumer_has_ended() {
    let fixture = Fixture::new("single-writer").await;
    let context = StrategyContext {
        database: fixture.stand.database().pool(2).await.unwrap().into(),
        work: Duration::ZERO,
        metrics: StrategyMetrics::default(),
        redis: None,
        kafka: Some(fixture.kafka()),
        instrumentation: Instrumentation::default(),
    };
    let path = OrderPipeline::open(context).await.unwrap();
    let (_joins, joined) = watch::channel(true);
    let (ends, end) = oneshot::channel::<()>();
    path.spawn_consumer(joined, async move { drop(end.await) });
    path.ready().await.unwrap();
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
    let decider = fixture.start_instance(&[]).await;
    fixture.wait_until_processed().await;
    until("the lag is zero", async || {
        reported(&acceptor).await == Some(0) && reported(&decider).await == Some(0)
    })
    .await;

    fixture.assert_outcome(&decider, &orders, Kept).await;
    acceptor.stop().await.unwrap();
    decider.stop().await.unwrap();
}
