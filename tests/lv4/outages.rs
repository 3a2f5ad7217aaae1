//! A backend that is away for a while.

use harness::{
    backends::{self, Durability, Postgres, Redis, TestEnvironment},
    until,
};
use lv4_kafka::pipeline::list_dead_letters;
use rstest::rstest;
use uuid::Uuid;

use crate::fixture::{
    Expected::{self, Breaks, Kept},
    LOST, PATIENCE, Place, TIME_FOR_A_MISTAKE, address_in, is_away, seen_within, strategy,
};

/// A fault that strikes one order strikes the next one as well. Only those that were begun together find it out.
#[tokio::test]
async fn an_outage_is_not_tried_with_every_order_of_a_batch() {
    const AT_ONCE: usize = 4;
    let strategy = strategy("locked");
    let (postgres, kafka) = (backends::postgres().await.unwrap(), backends::kafka().await.unwrap());
    let redis = Redis::private().await.unwrap();
    let stand = TestEnvironment::on(&postgres, Some(&redis), strategy.schema)
        .await
        .unwrap()
        .and_kafka(Some(&kafka));
    let place = Place::on(strategy, stand).await;
    let acceptor = place.acceptor(100).await;
    let orders = place.accepted(&acceptor, 1..=60).await;
    let trace = std::env::temp_dir().join(format!("oversold-trace-{}", Uuid::new_v4()));
    let decider = place
        .instance(&[("OVERSOLD_TRACE_FILE", trace.to_str().unwrap()), ("WORK_MS", "50")])
        .await;
    until("some are decided", async || place.rows().await > 0).await;
    redis.stop().await.unwrap();
    is_away(&address_in(redis.url())).await;
    let decided = place.rows().await;
    assert!(decided < 60, "the fault did not strike: all are decided");
    place.is_tried(2 * AT_ONCE).await;
    redis.start().await.unwrap();
    place.quiet().await;
    place.hold(&decider, &orders, Kept).await;
    decider.stop().await.unwrap();

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
    let in_vain: Vec<usize> = steps
        .split(|step| step == "batch decided")
        .map(|batch| count(batch, "message taken") - count(batch, "lock taken"))
        .filter(|&in_vain| in_vain > 0)
        .collect();
    assert!(!in_vain.is_empty(), "the fault did not strike: {steps:?}");
    assert!(in_vain.iter().all(|&in_vain| in_vain <= AT_ONCE), "{in_vain:?}");
}

/// What goes away for a while.
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
async fn a_fault_that_passes_loses_no_order_and_buries_none(
    #[case] name: &str,
    #[case] away: Away,
    #[case] expected: Expected,
) {
    let strategy = strategy(name);
    let kafka = backends::kafka().await.unwrap();
    let redis = Redis::private().await.unwrap();
    let postgres = Postgres::private(Durability::Fast).await.unwrap();
    let stand = TestEnvironment::on(&postgres, Some(&redis), strategy.schema)
        .await
        .unwrap()
        .and_kafka(Some(&kafka));
    let place = Place::on(strategy, stand).await;
    let talk = place.instance(&[]).await;
    talk.opens_a_sale(10).await.unwrap();
    let mut orders = place.accepted(&talk, 1..=2).await;
    place.quiet().await;

    match away {
        Away::Database => {
            postgres.stop().await.unwrap();
            is_away(&address_in(&place.stand.database().url())).await;
        }
        Away::Locks => {
            redis.stop().await.unwrap();
            is_away(&address_in(redis.url())).await;
        }
    }
    // An instance that knows the sale goes on to accept.
    orders.extend(place.accepted(&talk, 3..=6).await);
    match expected {
        // Longer than anybody waits for a connection: each order was put off at least once.
        Kept => assert!(!seen_within(2 * TIME_FOR_A_MISTAKE, async || place.lag().await == 0).await),
        Breaks(_) => place.quiet().await,
    }
    match away {
        Away::Database => postgres.start().await.unwrap(),
        Away::Locks => redis.start().await.unwrap(),
    }
    place.quiet().await;

    place.hold(&talk, &orders, expected).await;
    let kafka = place.kafka();
    let buried = tokio::task::spawn_blocking(move || list_dead_letters(&kafka, PATIENCE));
    assert_eq!(
        !buried.await.unwrap().unwrap().is_empty(),
        name == "mutants/dead-letter-on-fault"
    );
    talk.stop().await.unwrap();
}
