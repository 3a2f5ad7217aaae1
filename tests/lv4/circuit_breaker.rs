//! The circuit breakers: what an outage costs with and without them, and that they end with it.

use std::{
    ops::RangeInclusive,
    time::{Duration, Instant},
};

use box_office::{
    Invariant::{NoFalseRefusal, NoUndersell},
    ProblemKind,
};
use futures_util::future::join_all;
use harness::{
    assert_failure_mode,
    backends::{self, Durability, Kafka, Postgres},
    history::Answer,
    rush::{HttpResponse, SALE},
    test_server::TestServer,
    until,
};
use lv4_kafka::pipeline::{OrderMessage, PARTITIONS, consumer_config, list_dead_letters, orders_topic};
use rdkafka::{
    admin::{AdminOptions, AlterConfig, ResourceSpecifier},
    consumer::{Consumer, StreamConsumer},
};
use rstest::rstest;

use crate::{
    ablation::{
        Improvement::{Off, On},
        record,
    },
    fixture::{
        Expected::{self, Breaks, Kept},
        Fixture, LOST, OBSERVATION_TIME, TIMEOUT, assert_unreachable, happens_within, host_and_port, kill_instance,
        metric, order, strategy,
    },
};

const ON: (&str, &str) = ("CIRCUIT_BREAKER", "true");
const OFF: (&str, &str) = ("CIRCUIT_BREAKER", "false");

/// Each attempt that failed is a line of the log.
const LOG: (&str, &str) = ("RUST_LOG", "info,lv4_kafka=debug");

/// How often a consumer has tried in vain to process its orders.
async fn failed_attempts(server: &TestServer) -> usize {
    let log = server.log().await.unwrap();
    let failed =
        |line: &&str| line.contains("retried") && line.contains("DEBUG") && !line.contains("circuit breaker of");
    log.lines().filter(failed).count()
}

async fn transitions(server: &TestServer, backend: &str, to: &str) -> i64 {
    let name = format!("oversold_circuit_breaker_transitions_total{{backend=\"{backend}\",to=\"{to}\"}}");
    metric(server, &name).await.unwrap_or(0)
}

/// 0 closed, 1 half-open, 2 open. `None`: the circuit breaker is switched off.
async fn state(server: &TestServer, backend: &str) -> Option<i64> {
    metric(
        server,
        &format!("oversold_circuit_breaker_state{{backend=\"{backend}\"}}"),
    )
    .await
}

async fn assert_no_dead_letters(fixture: &Fixture) {
    let kafka = fixture.kafka();
    let dead_letters = tokio::task::spawn_blocking(move || list_dead_letters(&kafka, TIMEOUT));
    assert!(dead_letters.await.unwrap().unwrap().is_empty());
}

// ANCHOR: ablation
/// Postgres is away while messages flow. Without a circuit breaker the consumer tries again
/// and again. With it there is one attempt; then the partitions are paused, and small probes find
/// the end of the outage.
#[rstest]
#[case::single_writer("single-writer", ON, Kept)]
#[case::single_writer_without("single-writer", OFF, Kept)]
#[case::locked("locked", ON, Kept)]
#[case::locked_without("locked", OFF, Kept)]
#[case::circuit_never_closes("mutants/circuit-never-closes", ON, LOST)]
#[case::paused_for_good("mutants/paused-for-good", ON, LOST)]
#[tokio::test]
async fn while_postgres_is_away_a_consumer_pauses_after_one_attempt(
    #[case] name: &str,
    #[case] breaker: (&'static str, &str),
    #[case] expected: Expected,
) {
    const PROBES: i64 = 5;

    let strategy = strategy(name);
    let (redis, kafka) = (backends::redis().await.unwrap(), backends::kafka().await.unwrap());
    let postgres = Postgres::private(Durability::Fast).await.unwrap();
    let fixture = Fixture::on(strategy, &postgres, &redis, &kafka).await;
    let server = fixture.start_instance(&[breaker, LOG]).await;
    server.create_rush_sale(10).await.unwrap();
    let mut orders = fixture.accept_all(&server, 1..=2).await;
    fixture.wait_until_processed().await;
    let ids = fixture.ids().await;

    postgres.stop().await.unwrap();
    assert_unreachable(&host_and_port(&fixture.environment.database().url())).await;
    for buyer in 3..=6 {
        orders.push(fixture.append_order(&ids, buyer).await);
    }
    if breaker == ON {
        until("the circuit breaker probes the database", async || {
            transitions(&server, "postgres", "half-open").await >= PROBES
        })
        .await;
        assert_eq!(failed_attempts(&server).await, 1, "{}", server.log().await.unwrap());
        assert_ne!(state(&server, "postgres").await, Some(0));
        record("circuit-breaker", On, name, "1 attempt, then probes");
    } else {
        until("the fault did not strike: the orders are not tried again", async || {
            failed_attempts(&server).await >= 2
        })
        .await;
        assert_eq!(state(&server, "postgres").await, None);
        record("circuit-breaker", Off, name, "tried again and again");
    }
    postgres.start().await.unwrap();
    let returned = Instant::now();

    if expected == Kept {
        until("an order is decided", async || fixture.rows().await > 2).await;
        println!(
            "{name}, {breaker:?}: the first order {:?} after Postgres' return",
            returned.elapsed()
        );
        fixture.wait_until_processed().await;
        if breaker == ON {
            assert_eq!(failed_attempts(&server).await, 1, "{}", server.log().await.unwrap());
            assert_eq!(state(&server, "postgres").await, Some(0));
            assert_eq!(state(&server, "kafka").await, Some(0));
        }
    } else {
        assert!(!happens_within(OBSERVATION_TIME, async || fixture.lag().await == 0).await);
    }
    fixture.assert_outcome(&server, &orders, expected).await;
    assert_no_dead_letters(&fixture).await;
    match expected {
        Kept => server.stop().await.unwrap(),
        Breaks(_) => kill_instance(&server).await,
    }
}
// ANCHOR_END: ablation

/// A consumer that is paused takes part in a rebalance. What it gives away then, and gets back after
/// the outage, is not paused any more.
#[rstest]
#[case::single_writer("single-writer", Kept)]
#[case::locked("locked", Kept)]
#[case::moved_partition_stays_paused("mutants/moved-partition-stays-paused", LOST)]
#[tokio::test]
async fn a_partition_that_moved_while_it_was_paused_is_consumed_again(#[case] name: &str, #[case] expected: Expected) {
    let strategy = strategy(name);
    let (redis, kafka) = (backends::redis().await.unwrap(), backends::kafka().await.unwrap());
    let postgres = Postgres::private(Durability::Fast).await.unwrap();
    let fixture = Fixture::on(strategy, &postgres, &redis, &kafka).await;
    let server = fixture.start_instance(&[ON]).await;
    server.create_rush_sale(10).await.unwrap();
    let mut orders = fixture.accept_all(&server, 1..=1).await;
    fixture.wait_until_processed().await;
    let ids = fixture.ids().await;
    postgres.stop().await.unwrap();
    assert_unreachable(&host_and_port(&fixture.environment.database().url())).await;
    orders.push(fixture.append_order(&ids, 2).await);
    until("the circuit breaker is open", async || {
        state(&server, "postgres").await != Some(0)
    })
    .await;

    // A member of the group that commits nothing.
    let config = consumer_config(&fixture.kafka())
        .set("enable.auto.commit", "false")
        .clone();
    let guest: StreamConsumer = config.create().unwrap();
    guest.subscribe(&[&orders_topic(&fixture.kafka())]).unwrap();
    let polling = tokio::spawn(async move {
        loop {
            let _ = guest.recv().await;
        }
    });
    fixture.wait_until_shared_by(2).await;
    postgres.start().await.unwrap();
    until("the circuit breaker is closed", async || {
        state(&server, "postgres").await == Some(0)
    })
    .await;
    polling.abort();
    let _ = polling.await; // the guest is dropped, and leaves the group
    fixture.wait_until_shared_by(1).await;
    for (partition, buyer) in (0..PARTITIONS).zip(3..) {
        let order = order(SALE, buyer);
        let id = ids.for_order(&order);
        fixture.history.record_accepted(buyer, id);
        fixture
            .produce(partition, &[&OrderMessage::new(id, &order).to_bytes()])
            .await
            .unwrap();
        orders.push(id);
    }
    match expected {
        Kept => fixture.wait_until_processed().await,
        Breaks(_) => assert!(!happens_within(OBSERVATION_TIME, async || fixture.lag().await == 0).await),
    }
    fixture.assert_outcome(&server, &orders, expected).await;
    kill_instance(&server).await;
}

/// Whatever the number of orders that cannot be fulfilled: the backends have answered.
#[rstest]
#[case::single_writer("single-writer", Kept)]
#[case::locked("locked", Kept)]
#[case::refusals_are_failures("mutants/refusals-are-failures", Breaks(&[]))]
#[tokio::test]
async fn a_refusal_opens_no_circuit_breaker(#[case] name: &str, #[case] expected: Expected) {
    let fixture = Fixture::new(name).await;
    let server = fixture.start_instance(&[ON]).await;
    server.create_rush_sale(1).await.unwrap();
    let orders = fixture.accept_all(&server, 1..=4).await;
    let (ids, unknown) = (fixture.ids().await, SALE + 1);
    for buyer in 5..=8 {
        let answered = server.reserve(unknown, buyer, None).await.unwrap();
        answered.is(ProblemKind::UnknownSale).unwrap();
        let order = order(unknown, buyer);
        let message = OrderMessage::new(ids.for_order(&order), &order).to_bytes();
        fixture.produce(0, &[&message]).await.unwrap();
    }
    fixture.wait_until_processed().await;
    assert_eq!(fixture.dead_letter_topic_size().await, 4);

    let transitions = metric(&server, "oversold_circuit_breaker_transitions_total").await;
    match expected {
        Kept => {
            assert_eq!(transitions, None);
            fixture.assert_outcome(&server, &orders, expected).await;
        }
        Breaks(_) => {
            assert!(transitions.is_some(), "the mistake of {name} was not seen");
            assert_failure_mode(fixture.strategy, &[]);
        }
    }
    server.stop().await.unwrap();
}

/// Orders of these buyers, all at once, with the time that each answer took.
async fn wave(server: &TestServer, buyers: RangeInclusive<i64>) -> Vec<(Duration, HttpResponse)> {
    let orders = buyers.map(async |buyer| {
        let sent = Instant::now();
        let answered = server.reserve(SALE, buyer, Some(&format!("buyer-{buyer}"))).await;
        (sent.elapsed(), answered.unwrap())
    });
    join_all(orders).await
}

fn statuses(answers: &[(Duration, HttpResponse)]) -> Vec<(Duration, u16)> {
    let statuses = answers.iter().map(|(took, answered)| (*took, answered.status.as_u16()));
    statuses.collect()
}

/// How many of these orders have waited for the broker in vain.
fn timed_out(answers: &[(Duration, HttpResponse)]) -> usize {
    let timed_out = answers
        .iter()
        .filter(|(_, answered)| answered.is(ProblemKind::TimedOut).is_ok());
    timed_out.count()
}

/// How many orders were not sent to Kafka.
async fn rejected(server: &TestServer) -> i64 {
    metric(server, "oversold_circuit_breaker_rejected_total{backend=\"kafka\"}")
        .await
        .unwrap_or(0)
}

/// The broker answers, and stores no order: somebody has given the topic a limit that every message
/// exceeds. The probes of readiness succeed. Without a circuit breaker every order is sent.
#[rstest]
#[case::single_writer("single-writer", ON, Kept)]
#[case::locked("locked", ON, Kept)]
#[case::single_writer_without("single-writer", OFF, Kept)]
#[case::half_open_admits_all("mutants/half-open-admits-all", ON, Breaks(&[]))]
#[case::open_is_sold_out("mutants/open-is-sold-out", ON, Breaks(&[NoFalseRefusal, NoUndersell]))]
#[tokio::test]
async fn while_kafka_stores_nothing_one_order_at_a_time_is_sent(
    #[case] name: &str,
    #[case] breaker: (&'static str, &str),
    #[case] expected: Expected,
) {
    const WAVE: RangeInclusive<i64> = 11..=20;

    let fixture = Fixture::new(name).await;
    let server = fixture.start_instance(&[breaker]).await;
    server.create_rush_sale(50).await.unwrap();
    let mut orders = fixture.accept_all(&server, 1..=1).await;
    let limit_messages = async |bytes: &str| {
        let (topic, admin) = (orders_topic(&fixture.kafka()), fixture.admin());
        let config = AlterConfig::new(ResourceSpecifier::Topic(&topic)).set("max.message.bytes", bytes);
        let altered = admin.alter_configs([&config], &AdminOptions::new()).await.unwrap();
        altered[0].as_ref().unwrap();
    };
    limit_messages("1").await;
    // The broker needs a moment to apply it.
    let mut buyer = 2;
    while let Answer::Accepted { reservation, .. } = fixture.history.reserve(&server, buyer).await {
        orders.push(reservation);
        buyer += 1;
        assert!(buyer < 10, "the fault did not strike: the topic still takes orders");
    }
    let first = wave(&server, 21..=23).await;
    let accepted = first.iter().any(|(_, answered)| answered.status == 202);
    assert!(!accepted, "the fault did not strike: {:?}", statuses(&first));
    assert_eq!(server.get("/readyz").await.unwrap().status, 200, "readiness sees it");

    // Of a wave of ten, how many were sent.
    let sent_of_wave = async || {
        let before = rejected(&server).await;
        let answers = wave(&server, WAVE).await;
        for (_, answered) in &answers {
            if !matches!(expected, Breaks([_, ..])) {
                answered.is(ProblemKind::BackendAway).unwrap();
                assert_eq!(answered.headers["retry-after"], "1");
            }
        }
        (10 - (rejected(&server).await - before), statuses(&answers))
    };
    if breaker == OFF {
        let (sent, answers) = sent_of_wave().await;
        assert_eq!(sent, 10);
        println!("{name}: all ten orders are sent: {answers:?}");
    } else {
        assert_eq!(state(&server, "kafka").await, Some(2));
        // At most one of them is the probe.
        let answers = join_all((8..=10).map(|buyer| fixture.history.reserve(&server, buyer))).await;
        match expected {
            Breaks([_, ..]) => {}
            _ => assert!(
                answers.iter().all(|answer| matches!(answer, Answer::Indeterminate)),
                "{answers:?}"
            ),
        }
        let mut seen = false;
        for _ in 0..20 {
            let probes = async || transitions(&server, "kafka", "half-open").await;
            let before = probes().await;
            let (mut sent, mut answers) = (0, vec![]);
            while probes().await == before {
                (sent, answers) = sent_of_wave().await;
            }
            println!("{name}: {sent} of ten orders sent: {answers:?}");
            if expected == Breaks(&[]) {
                seen |= sent > probes().await - before;
            } else {
                assert_eq!(sent, probes().await - before);
            }
            if seen || expected != Breaks(&[]) {
                break;
            }
        }
        assert_eq!(seen, expected == Breaks(&[]), "the mistake of {name} was not seen");
    }
    limit_messages("65536").await;
    until("an order is accepted again", async || {
        server.reserve(SALE, 21, Some("buyer-21")).await.unwrap().status == 202
    })
    .await;
    // Buyers whose outcome is unknown repeat the request with the same key.
    let refused = matches!(expected, Breaks([_, ..]));
    let repeated = WAVE.chain(21..=23).chain((8..=10).filter(|_| !refused));
    orders.extend(fixture.accept_all(&server, repeated.chain(buyer..=buyer)).await);
    fixture.wait_until_processed().await;
    match expected {
        Breaks([]) => assert_failure_mode(fixture.strategy, &[]),
        _ => {
            assert!(breaker == OFF || state(&server, "kafka").await == Some(0));
            fixture.assert_outcome(&server, &orders, expected).await;
        }
    }
    server.stop().await.unwrap();
}

/// The broker is frozen, then gone, and comes back. Both the circuit breaker and readiness notice,
/// and both let the same instance go on.
#[tokio::test]
async fn an_instance_with_an_open_circuit_breaker_finds_the_broker_again() {
    let strategy = strategy("single-writer");
    let kafka = Kafka::private().await.unwrap();
    let (postgres, redis) = (backends::postgres().await.unwrap(), backends::redis().await.unwrap());
    let fixture = Fixture::on(strategy, &postgres, &redis, &kafka).await;
    let server = fixture.start_instance(&[ON]).await;
    server.create_rush_sale(10).await.unwrap();
    let mut orders = fixture.accept_all(&server, 1..=1).await;
    kafka.freeze().await.unwrap();
    let first = wave(&server, 2..=4).await;
    assert_eq!(timed_out(&first), 3, "the fault did not strike: {:?}", statuses(&first));
    assert_eq!(state(&server, "kafka").await, Some(2));
    kafka.kill().await.unwrap();
    assert_unreachable(kafka.bootstrap_servers()).await;
    let (took, answered) = wave(&server, 5..=5).await.remove(0);
    answered.is(ProblemKind::BackendAway).unwrap();
    println!("with the broker away the answer takes {took:?}");

    kafka.start().await.unwrap();
    until("an order is accepted again", async || {
        server.reserve(SALE, 2, Some("buyer-2")).await.unwrap().status == 202
    })
    .await;
    assert_eq!(state(&server, "kafka").await, Some(0));
    orders.extend(fixture.accept_all(&server, 2..=5).await);
    fixture.wait_until_processed().await;
    fixture.assert_outcome(&server, &orders, Kept).await;
    server.stop().await.unwrap();
}
