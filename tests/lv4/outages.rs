//! A backend that is away for a while.

use harness::{
    backends::{self, Durability, Postgres, Redis},
    until,
};
use lv4_kafka::pipeline::list_dead_letters;
use rstest::rstest;
use uuid::Uuid;

use crate::fixture::{
    Expected::{self, Breaks, Kept},
    Fixture, LOST, OBSERVATION_TIME, TIMEOUT, assert_unreachable, happens_within, host_and_port, strategy,
};

/// Once an outage has failed one order of a batch, only those already in flight fail as well.
#[tokio::test]
async fn an_outage_fails_only_the_orders_in_flight_of_a_batch() {
    const MAX_IN_FLIGHT: usize = 4;
    let strategy = strategy("locked");
    let (postgres, kafka) = (backends::postgres().await.unwrap(), backends::kafka().await.unwrap());
    let redis = Redis::private().await.unwrap();
    let fixture = Fixture::on(strategy, &postgres, &redis, &kafka).await;
    let acceptor = fixture.start_acceptor(100).await;
    let orders = fixture.accept_all(&acceptor, 1..=60).await;
    let trace = std::env::temp_dir().join(format!("oversold-trace-{}", Uuid::new_v4()));
    let consumer = fixture
        .start_instance(&[("OVERSOLD_TRACE_FILE", trace.to_str().unwrap()), ("WORK_MS", "50")])
        .await;
    until("some are decided", async || fixture.rows().await > 0).await;
    redis.stop().await.unwrap();
    assert_unreachable(&host_and_port(redis.url())).await;
    let decided = fixture.rows().await;
    assert!(decided < 60, "the fault did not strike: all are decided");
    fixture.wait_for_attempts(2 * MAX_IN_FLIGHT).await;
    redis.start().await.unwrap();
    fixture.wait_until_processed().await;
    fixture.assert_outcome(&consumer, &orders, Kept).await;
    consumer.stop().await.unwrap();

    let steps = std::fs::read_to_string(&trace).unwrap();
    std::fs::remove_file(trace).unwrap();
    let steps: Vec<String> = steps
        .lines()
        .map(|line| {
            serde_json::from_str::<serde_json::Value>(line).unwrap()["step"]
                .as_str()
                .unwrap()
                .to_owned()
        })
        .collect();
    let count = |batch: &[String], step: &str| batch.iter().filter(|other| *other == step).count();
    let without_lock: Vec<usize> = steps
        .split(|step| step == "batch decided")
        .map(|batch| count(batch, "message taken") - count(batch, "lock taken"))
        .filter(|&without_lock| without_lock > 0)
        .collect();
    assert!(!without_lock.is_empty(), "the fault did not strike: {steps:?}");
    assert!(
        without_lock.iter().all(|&without_lock| without_lock <= MAX_IN_FLIGHT),
        "{without_lock:?}"
    );
}

/// The backend that is away.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Away {
    Database,
    Locks,
}

#[rstest]
#[case::locked("locked", Away::Database, Kept)]
#[case::locked_without_redis("locked", Away::Locks, Kept)]
#[case::single_writer("single-writer", Away::Database, Kept)]
#[case::dead_letter_on_fault("mutants/dead-letter-on-fault", Away::Database, LOST)]
#[case::errors_swallowed("mutants/errors-swallowed", Away::Locks, LOST)]
#[case::errors_swallowed_without_postgres("mutants/errors-swallowed", Away::Database, LOST)]
#[tokio::test]
async fn a_fault_that_passes_loses_no_order_and_dead_letters_none(
    #[case] name: &str,
    #[case] away: Away,
    #[case] expected: Expected,
) {
    let strategy = strategy(name);
    let kafka = backends::kafka().await.unwrap();
    let redis = Redis::private().await.unwrap();
    let postgres = Postgres::private(Durability::Fast).await.unwrap();
    let fixture = Fixture::on(strategy, &postgres, &redis, &kafka).await;
    let server = fixture.start_instance(&[]).await;
    server.create_rush_sale(10).await.unwrap();
    let mut orders = fixture.accept_all(&server, 1..=2).await;
    fixture.wait_until_processed().await;
    let ids = fixture.ids().await;

    match away {
        Away::Database => {
            postgres.stop().await.unwrap();
            assert_unreachable(&host_and_port(&fixture.environment.database().url())).await;
        }
        Away::Locks => {
            redis.stop().await.unwrap();
            assert_unreachable(&host_and_port(redis.url())).await;
        }
    }
    for buyer in 3..=6 {
        orders.push(fixture.append_order(&ids, buyer).await);
    }
    match expected {
        // Longer than the timeout of a connection: each order was retried at least once.
        Kept => assert!(!happens_within(2 * OBSERVATION_TIME, async || fixture.lag().await == 0).await),
        Breaks(_) => fixture.wait_until_processed().await,
    }
    match away {
        Away::Database => postgres.start().await.unwrap(),
        Away::Locks => redis.start().await.unwrap(),
    }
    fixture.wait_until_processed().await;

    fixture.assert_outcome(&server, &orders, expected).await;
    let kafka = fixture.kafka();
    let dead_letters = tokio::task::spawn_blocking(move || list_dead_letters(&kafka, TIMEOUT));
    assert_eq!(
        !dead_letters.await.unwrap().unwrap().is_empty(),
        name == "mutants/dead-letter-on-fault"
    );
    server.stop().await.unwrap();
}
