//! The consumers of a server: graceful shutdown, readiness, and the lag that it reports.

use std::time::Duration;

use box_office::{Instrumentation, StrategyContext, StrategyMetrics};
use harness::{http_contract::TestServer, until};
use lv4_kafka::pipeline::OrderPipeline;
use rstest::rstest;
use tokio::sync::{oneshot, watch};

use crate::fixture::{Expected::Kept, Place, metric};

#[rstest]
#[case::locked("locked")]
#[case::single_writer("single-writer")]
#[tokio::test]
async fn a_server_that_is_told_to_stop_finishes_what_it_has_in_hand(#[case] name: &str) {
    let place = Place::of(name).await;
    let acceptor = place.acceptor(2).await;
    let orders = place.accepted(&acceptor, 1..=1).await;
    let decider = place.instance(&[("WORK_MS", "3000")]).await;
    place.an_order_is_in_hand().await;
    let told = std::process::Command::new("kill")
        .arg(decider.pid().await.unwrap().to_string())
        .status();
    assert!(told.unwrap().success());
    assert_eq!(place.rows().await, 0, "the fault did not strike: it was decided before");
    decider.stop().await.unwrap();

    place.hold(&acceptor, &orders, Kept).await;
    assert_eq!(place.lag().await, 0, "its offset is not committed");
}

/// Its consumers are what it is there for. One that has ended, by a panic, comes back with the process only.
#[tokio::test]
async fn a_server_is_not_ready_any_more_when_a_consumer_has_ended() {
    let place = Place::of("single-writer").await;
    let context = StrategyContext {
        database: place.stand.database().pool(2).await.unwrap(),
        work: Duration::ZERO,
        counts: StrategyMetrics::default(),
        redis: None,
        kafka: Some(place.kafka()),
        watch: Instrumentation::default(),
    };
    let path = OrderPipeline::open(context).await.unwrap();
    let (_joins, joined) = watch::channel(true);
    let (ends, end) = oneshot::channel::<()>();
    path.spawn_consumer(joined, async move { drop(end.await) });
    path.ready().await.unwrap();
    drop(ends);
    until("it is not ready", async || path.ready().await.is_err()).await;
    path.close().await;
}

/// Every server tells it, also one that decides nothing.
#[tokio::test]
async fn the_metrics_tell_how_far_the_group_is_behind() {
    let place = Place::of("single-writer").await;
    let acceptor = place.acceptor(10).await;
    let orders = place.accepted(&acceptor, 1..=5).await;
    let told = async |talk: &TestServer| metric(talk, "oversold_consumer_lag").await;
    until("five wait", async || told(&acceptor).await == Some(5)).await;
    let decider = place.instance(&[]).await;
    place.quiet().await;
    until("nothing waits any more", async || {
        told(&acceptor).await == Some(0) && told(&decider).await == Some(0)
    })
    .await;

    place.hold(&decider, &orders, Kept).await;
    acceptor.stop().await.unwrap();
    decider.stop().await.unwrap();
}
