//! Backends that answer and do not do what a sale needs. The server is not ready, says why, and
//! accepts no order that it cannot get decided; once the fault is gone, it goes on without a
//! restart.

use std::time::{Duration, Instant};

use harness::{
    backends::{self, Durability, Postgres, Redis},
    rush::SALE,
    test_server::TestServer,
    until,
};
use lv4_kafka::pipeline::{dead_letter_topic, orders_topic};
use rdkafka::admin::{AdminOptions, NewTopic, TopicReplication};
use rstest::rstest;

use crate::fixture::{Expected::Kept, Fixture, assert_indeterminate, metric, ok, strategy};

/// Why the server is not ready; empty if it is.
async fn unready(server: &TestServer) -> String {
    let answer = server.get("/readyz").await.unwrap();
    match answer.status.is_success() {
        true => String::new(),
        false => String::from_utf8_lossy(&answer.body).into_owned(),
    }
}

/// The fault, what is asserted while it lasts, and the same server after it.
async fn not_accepted_meanwhile(
    fixture: &Fixture,
    fault: impl AsyncFnOnce(),
    reason: &str,
    remedy: impl AsyncFnOnce(),
) {
    let server = fixture.start_instance(&[]).await;
    server.create_rush_sale(10).await.unwrap();
    let pid = server.pid().await.unwrap();
    let mut orders = fixture.accept_all(&server, 1..=2).await;
    fixture.wait_until_processed().await;

    fault().await;
    until("the server says why it is not ready", async || {
        unready(&server).await.contains(reason)
    })
    .await;
    assert_indeterminate(&server, 3).await;

    remedy().await;
    until("the server is ready again", async || unready(&server).await.is_empty()).await;
    // A buyer whose outcome is unknown repeats the request with the same key.
    until("an order is accepted again", async || {
        server.reserve(SALE, 3, Some("buyer-3")).await.unwrap().status == 202
    })
    .await;
    orders.extend(fixture.accept_all(&server, 3..=4).await);
    fixture.wait_until_processed().await;
    fixture.assert_outcome(&server, &orders, Kept).await;
    assert_eq!(server.pid().await.unwrap(), pid, "it is another process");
    server.stop().await.unwrap();
}

#[rstest]
#[case::replica(&["REPLICAOF", "127.0.0.1", "1"], &["REPLICAOF", "NO", "ONE"], "read only replica")]
#[case::out_of_memory(&["CONFIG", "SET", "maxmemory", "1"], &["CONFIG", "SET", "maxmemory", "0"], "OOM")]
#[tokio::test]
async fn without_locks_nothing_is_accepted(#[case] fault: &[&str], #[case] remedy: &[&str], #[case] reason: &str) {
    let strategy = strategy("locked");
    let (postgres, kafka) = (backends::postgres().await.unwrap(), backends::kafka().await.unwrap());
    let redis = Redis::private().await.unwrap();
    let fixture = Fixture::on(strategy, &postgres, &redis, &kafka).await;
    not_accepted_meanwhile(
        &fixture,
        async || ok(&redis, fault).await,
        reason,
        async || ok(&redis, remedy).await,
    )
    .await;
}

#[rstest]
#[case::locked("locked")]
#[case::single_writer("single-writer")]
#[tokio::test]
async fn without_writes_to_the_database_nothing_is_accepted(#[case] name: &str) {
    let strategy = strategy(name);
    let (redis, kafka) = (backends::redis().await.unwrap(), backends::kafka().await.unwrap());
    let postgres = Postgres::private(Durability::Fast).await.unwrap();
    let fixture = Fixture::on(strategy, &postgres, &redis, &kafka).await;
    let run = async |statements: [&'static str; 2]| {
        for statement in statements {
            sqlx::query(statement).execute(&fixture.pool).await.unwrap();
        }
    };
    not_accepted_meanwhile(
        &fixture,
        async || {
            run([
                "alter system set default_transaction_read_only = on",
                "select pg_reload_conf()",
            ])
            .await;
        },
        "read-only transaction",
        async || {
            run([
                "alter system reset default_transaction_read_only",
                "select pg_reload_conf()",
            ])
            .await;
        },
    )
    .await;
}

/// The dead-letter topic is deleted, and made again by an operator. (The orders topic is below.)
#[tokio::test]
async fn without_its_dead_letter_topic_nothing_is_accepted() {
    let fixture = Fixture::new("single-writer").await;
    let topic = dead_letter_topic(&fixture.kafka());
    let (admin, options) = (fixture.admin(), AdminOptions::new());
    not_accepted_meanwhile(
        &fixture,
        async || {
            let deleted = admin.delete_topics(&[&topic], &options).await.unwrap();
            assert_eq!(deleted, [Ok(topic.clone())], "the fault did not strike");
        },
        "UnknownTopicOrPartition",
        async || {
            let again = NewTopic::new(&topic, 1, TopicReplication::Fixed(1));
            // The broker may still be deleting the files of the old one.
            until("the topic is made again", async || {
                admin.create_topics([&again], &options).await.unwrap()[0].is_ok()
            })
            .await;
        },
    )
    .await;
}

/// Somebody has made the topic again with one partition, as a broker with
/// `auto.create.topics.enable` does: the orders of most sales would be for partitions that are not
/// there.
#[tokio::test]
async fn a_topic_with_other_partitions_is_not_ready_and_its_lag_is_reported() {
    let fixture = Fixture::new("single-writer").await;
    let kafka = fixture.kafka();
    let topic = orders_topic(&kafka);
    let (admin, options) = (fixture.admin(), AdminOptions::new());
    let server = fixture.start_acceptor(10).await;
    let reported = async || metric(&server, "oversold_consumer_lag").await;
    fixture.accept_all(&server, 1..=3).await;
    until("the lag is three", async || reported().await == Some(3)).await;

    admin.delete_topics(&[&topic], &options).await.unwrap()[0]
        .as_ref()
        .unwrap();
    let one = NewTopic::new(&topic, 1, TopicReplication::Fixed(1));
    until("the topic is made again", async || {
        admin.create_topics([&one], &options).await.unwrap()[0].is_ok()
    })
    .await;
    until("the server says why it is not ready", async || {
        unready(&server).await.contains("has 1 partitions, not 6")
    })
    .await;
    assert_indeterminate(&server, 4).await;
    fixture.produce(0, &[b"one", b"two"]).await.unwrap();
    until("the lag is two", async || reported().await == Some(2)).await;
    server.stop().await.unwrap();
}

/// However many messages wait, the log says once why, and says it to the end.
#[tokio::test]
async fn the_log_of_an_outage_names_the_cause_and_names_it_once() {
    /// The interval in which a cause is logged once.
    const INTERVAL: Duration = Duration::from_secs(10);
    const RETRIED: &str = "orders could not be processed and are retried";

    let strategy = strategy("locked");
    let (postgres, kafka) = (backends::postgres().await.unwrap(), backends::kafka().await.unwrap());
    let redis = Redis::private().await.unwrap();
    let fixture = Fixture::on(strategy, &postgres, &redis, &kafka).await;
    let server = fixture.start_instance(&[("NO_COLOR", "1")]).await;
    server.create_rush_sale(50).await.unwrap();
    let ids = fixture.ids().await;
    let began = Instant::now();
    ok(&redis, &["REPLICAOF", "127.0.0.1", "1"]).await;
    let mut orders = vec![];
    for buyer in 1..=20 {
        orders.push(fixture.append_order(&ids, buyer).await);
    }
    // The second line says how often the cause was left out since the first.
    until("the fault did not strike: too few attempts have failed", async || {
        let log = server.log().await.unwrap();
        let mut lines = log.lines().filter(|line| line.contains(RETRIED));
        let left_out = lines.nth(1).and_then(|line| line.split("left_out=").nth(1));
        left_out.is_some_and(|left_out| left_out.split(' ').next().unwrap().parse::<u64>().unwrap() > 5)
    })
    .await;
    ok(&redis, &["REPLICAOF", "NO", "ONE"]).await;
    fixture.wait_until_processed().await;

    let log = server.log().await.unwrap();
    let intervals = 1 + usize::try_from(began.elapsed().as_secs() / INTERVAL.as_secs()).unwrap();
    for what in [RETRIED, "not ready"] {
        let lines: Vec<&str> = log
            .lines()
            .filter(|line| line.contains(what) && line.contains("read only replica"))
            .collect();
        assert!(
            !lines.is_empty() && lines.len() <= intervals,
            "{} lines in {:?}:\n{log}",
            lines.len(),
            began.elapsed()
        );
    }
    fixture.assert_outcome(&server, &orders, Kept).await;
    server.stop().await.unwrap();
}
