//! The relay of the outbox: what other services read from the topic `orders.decided`.

use std::{
    collections::{BTreeMap, BTreeSet},
    thread::sleep,
    time::{Duration, Instant},
};

use harness::{
    assert_failure_mode,
    backends::{self, Kafka},
    until,
};
use lv4_kafka::pipeline::{PARTITIONS, decided_topic};
use rdkafka::{
    ClientConfig, Message, Offset, TopicPartitionList,
    consumer::{BaseConsumer, Consumer},
};
use rstest::rstest;
use serde_json::Value;
use sqlx::PgPool;
use uuid::Uuid;

use crate::{
    ablation::{
        Improvement::{Off, On},
        record,
    },
    fixture::{
        Expected::{self, Breaks, Kept},
        Fixture, OBSERVATION_TIME, TIMEOUT, assert_unreachable, happens_within, kill_instance, metric, strategy,
    },
};

const RELAY: (&str, &str) = ("OUTBOX_RELAY", "true");
const NO_CONSUMERS: (&str, &str) = ("KAFKA_CONSUMERS", "0");

/// A message of the topic.
#[derive(Clone, Debug)]
pub(crate) struct Published {
    partition: i32,
    key: Vec<u8>,
    number: i64,
    reservation: Uuid,
    pub(crate) status: String,
}

/// Every message of the topic, each partition in its order. A broker may know a topic a moment after
/// it was created.
pub(crate) async fn published(fixture: &Fixture) -> Vec<Published> {
    let kafka = fixture.kafka();
    let reading = tokio::task::spawn_blocking(move || {
        let topic = decided_topic(&kafka);
        let reader: BaseConsumer = ClientConfig::new()
            .set("bootstrap.servers", &kafka.bootstrap_servers)
            .set("group.id", "nobody")
            .set("enable.auto.commit", "false")
            .set("allow.auto.create.topics", "false")
            .create()
            .unwrap();
        let (mut partitions, mut messages) = (TopicPartitionList::new(), 0);
        let deadline = Instant::now() + TIMEOUT;
        for partition in 0..PARTITIONS {
            let (start, end) = loop {
                match reader.fetch_watermarks(&topic, partition, TIMEOUT) {
                    Ok(watermarks) => break watermarks,
                    Err(why) => assert!(Instant::now() < deadline, "{topic}/{partition}: {why}"),
                }
                sleep(Duration::from_millis(20));
            };
            messages += end - start;
            partitions
                .add_partition_offset(&topic, partition, Offset::Beginning)
                .unwrap();
        }
        reader.assign(&partitions).unwrap();
        let mut published = vec![];
        while (published.len() as i64) < messages {
            let message = reader.poll(TIMEOUT).expect("the topic has more messages").unwrap();
            let event: Value = serde_json::from_slice(message.payload().unwrap()).unwrap();
            let reservation: Uuid = event["reservation"]["id"].as_str().unwrap().parse().unwrap();
            assert_eq!(event["version"], 1);
            published.push(Published {
                partition: message.partition(),
                key: message.key().unwrap_or_default().to_vec(),
                number: event["number"].as_i64().unwrap(),
                reservation,
                status: event["reservation"]["status"].as_str().unwrap().to_owned(),
            });
        }
        published
    });
    reading.await.unwrap()
}

async fn topic_exists(fixture: &Fixture) -> bool {
    let kafka = fixture.kafka();
    let looking = tokio::task::spawn_blocking(move || {
        let mut config = ClientConfig::new();
        config.set("bootstrap.servers", &kafka.bootstrap_servers);
        let reader: BaseConsumer = config.create().unwrap();
        let known = reader.fetch_metadata(None, TIMEOUT).unwrap();
        known.topics().iter().any(|topic| topic.name() == decided_topic(&kafka))
    });
    looking.await.unwrap()
}

/// The numbers of the topic, each once.
async fn numbers(fixture: &Fixture) -> BTreeSet<i64> {
    published(fixture).await.into_iter().map(|event| event.number).collect()
}

/// Whether the relay has marked this number.
async fn is_marked(fixture: &Fixture, number: i64) -> bool {
    sqlx::query_scalar("select relayed @> $1 from outbox_relay")
        .bind(number)
        .fetch_one(&fixture.pool)
        .await
        .unwrap()
}

/// Waits until every event of the outbox is marked as relayed. Returns their numbers.
async fn wait_until_relayed(fixture: &Fixture) -> BTreeSet<i64> {
    until("every event is relayed", async || {
        sqlx::query_scalar("select not exists (select from outbox, outbox_relay where not relayed @> number)")
            .fetch_one(&fixture.pool)
            .await
            .unwrap()
    })
    .await;
    let numbers: Vec<i64> = sqlx::query_scalar("select number from outbox")
        .fetch_all(&fixture.pool)
        .await
        .unwrap();
    numbers.into_iter().collect()
}

/// Waits until every event of the outbox is relayed. Asserts that a reader of the topic sees all of
/// them, those of each reservation in their order: it skips a number that is not above the last one
/// of its reservation.
pub(crate) async fn assert_all_published(fixture: &Fixture) {
    wait_until_relayed(fixture).await;
    let stored: Vec<(Uuid, i64)> = sqlx::query_as("select reservation_id, number from outbox order by number")
        .fetch_all(&fixture.pool)
        .await
        .unwrap();
    let mut expected: BTreeMap<Uuid, Vec<i64>> = BTreeMap::new();
    for (reservation, number) in stored {
        expected.entry(reservation).or_default().push(number);
    }
    let mut seen: BTreeMap<Uuid, Vec<i64>> = BTreeMap::new();
    for event in published(fixture).await {
        let of_one = seen.entry(event.reservation).or_default();
        if of_one.last() < Some(&event.number) {
            of_one.push(event.number);
        }
    }
    for (reservation, numbers) in &expected {
        let seen = seen.remove(reservation).unwrap_or_default();
        assert_eq!(seen, *numbers, "the events of {reservation} that a reader sees");
    }
    assert!(seen.is_empty(), "published and not in the outbox: {seen:?}");
}

/// Stores an event of this reservation as a strategy does: the row first, then the event. Returns
/// its number.
async fn append_event(connection: &mut sqlx::PgConnection, reservation: Uuid) -> i64 {
    sqlx::query(
        "insert into reservation (id, sale_id, buyer_id, request_key)
         select $1, 1, 1, 'a'
          where not exists (select from reservation where id = $1)",
    )
    .bind(reservation)
    .execute(&mut *connection)
    .await
    .unwrap();
    sqlx::query_scalar("insert into outbox (reservation_id) values ($1) returning number")
        .bind(reservation)
        .fetch_one(&mut *connection)
        .await
        .unwrap()
}

/// Stores an event of a new reservation.
async fn append(pool: &PgPool) -> i64 {
    let mut tx = pool.begin().await.unwrap();
    let number = append_event(&mut tx, Uuid::new_v4()).await;
    tx.commit().await.unwrap();
    number
}

// ANCHOR: ablation
/// Without the relay nobody outside of this server learns of an order. A relay that is switched on
/// later publishes what was decided before, and does not disturb the buyers' events.
#[rstest]
#[case::single_writer("single-writer")]
#[case::locked("locked")]
#[tokio::test]
async fn without_the_relay_nothing_is_published_and_with_it_everything(#[case] name: &str) {
    let fixture = Fixture::new(name).await;
    let server = fixture.start_instance(&[]).await;
    server.create_rush_sale(2).await.unwrap();
    let mut orders = fixture.accept_all(&server, 1..=3).await;
    fixture.wait_until_processed().await;
    assert!(!topic_exists(&fixture).await);
    assert_eq!(metric(&server, "oversold_outbox_unsent").await, None);

    let relay = fixture.start_instance(&[RELAY]).await;
    orders.extend(fixture.accept_all(&relay, 4..=5).await);
    fixture.wait_until_processed().await;
    let stored = wait_until_relayed(&fixture).await;
    let events = published(&fixture).await;
    let statuses: BTreeMap<Uuid, &str> = events.iter().map(|event| (event.reservation, &*event.status)).collect();
    assert_eq!(events.len(), 5, "{events:?}");
    record("relay", Off, name, "0 of 3 decisions published");
    record(
        "relay",
        On,
        name,
        format!("{} of {} decisions published", events.len(), orders.len()),
    );
    assert!(events.iter().all(|event| event.key == event.reservation.as_bytes()));
    assert_eq!(events.iter().map(|event| event.number).collect::<BTreeSet<_>>(), stored);
    assert_eq!(
        statuses.values().filter(|status| **status == "confirmed").count(),
        2,
        "{statuses:?}"
    );
    assert_eq!(
        orders.iter().copied().collect::<BTreeSet<_>>(),
        statuses.keys().copied().collect()
    );
    assert_eq!(metric(&relay, "oversold_outbox_relayed_total").await, Some(5));
    until("the metric is zero", async || {
        metric(&relay, "oversold_outbox_unsent").await == Some(0)
    })
    .await;
    fixture.assert_outcome(&server, &orders, Kept).await;
    server.stop().await.unwrap();
    relay.stop().await.unwrap();
}
// ANCHOR_END: ablation

/// A relay is killed before its marks are committed, or just after. Its successor publishes again
/// what is not marked: the numbers tell the duplicates.
#[rstest]
#[case::before_the_mark("single-writer", "events acknowledged", 2, Kept)]
#[case::after_the_mark("single-writer", "events marked", 1, Kept)]
#[case::relay_marks_before_ack("mutants/relay-marks-before-ack", "events marked", 0, Breaks(&[]))]
#[tokio::test]
async fn a_relay_that_is_killed_loses_no_event(
    #[case] name: &str,
    #[case] killed_at: &str,
    #[case] times: usize,
    #[case] expected: Expected,
) {
    let fixture = Fixture::new(name).await;
    let point = format!("{killed_at}#1");
    let first = fixture
        .start_instance(&[RELAY, NO_CONSUMERS, ("OVERSOLD_STOP_AT", &point)])
        .await;
    // All three become visible at once.
    let mut stored = BTreeSet::new();
    let mut tx = fixture.pool.begin().await.unwrap();
    for _ in 0..3 {
        stored.insert(append_event(&mut tx, Uuid::new_v4()).await);
    }
    tx.commit().await.unwrap();
    first
        .wait_until_stopped(TIMEOUT)
        .await
        .expect("the fault did not strike");
    let before = published(&fixture).await.len();
    assert_eq!(before, if expected == Kept { 3 } else { 0 }, "the fault did not strike");
    assert_eq!(is_marked(&fixture, 1).await, killed_at == "events marked");
    kill_instance(&first).await;

    let second = fixture.start_instance(&[RELAY, NO_CONSUMERS]).await;
    assert_eq!(wait_until_relayed(&fixture).await, stored);
    let events = published(&fixture).await;
    assert_eq!(events.len(), 3 * times, "{events:?}");
    match expected {
        Kept => assert_eq!(numbers(&fixture).await, stored),
        Breaks(_) => assert_failure_mode(fixture.strategy, &[]),
    }
    kill_instance(&second).await;
}

/// A transaction that has drawn a number commits after one that has drawn a higher number, and one
/// is rolled back.
#[rstest]
#[case::single_writer("single-writer", Kept)]
#[case::relay_skips_late_numbers("mutants/relay-skips-late-numbers", Breaks(&[]))]
#[tokio::test]
async fn an_event_that_becomes_visible_late_is_not_skipped(#[case] name: &str, #[case] expected: Expected) {
    let fixture = Fixture::new(name).await;
    let relay = fixture.start_instance(&[RELAY, NO_CONSUMERS]).await;
    let pool = fixture.environment.database().pool(3).await.unwrap();
    let mut late = pool.begin().await.unwrap();
    let late_number = append_event(&mut late, Uuid::new_v4()).await;
    let mut rolled_back = pool.begin().await.unwrap();
    let lost_number = append_event(&mut rolled_back, Uuid::new_v4()).await;
    rolled_back.rollback().await.unwrap();
    // Each in a round of its own.
    for _ in 0..4 {
        let number = append(&pool).await;
        assert!(late_number < number, "the fault did not strike");
        until("the event is marked", async || is_marked(&fixture, number).await).await;
        assert!(numbers(&fixture).await.contains(&number));
    }
    if expected == Kept {
        assert!(!is_marked(&fixture, late_number).await, "it is not even visible");
        assert!(!is_marked(&fixture, lost_number).await, "an older transaction is open");
    }
    late.commit().await.unwrap();
    let is_published = async || numbers(&fixture).await.contains(&late_number);
    match expected {
        Kept => until("the late event is published", is_published).await,
        Breaks(_) => {
            assert!(!happens_within(OBSERVATION_TIME, is_published).await);
            assert_failure_mode(fixture.strategy, &[]);
        }
    }
    if expected == Kept {
        // No transaction is left that could have drawn the other number.
        until("the number without an event is closed", async || {
            append(&pool).await;
            is_marked(&fixture, lost_number).await
        })
        .await;
        let stored = wait_until_relayed(&fixture).await;
        let events = published(&fixture).await;
        assert_eq!(events.len(), stored.len(), "{events:?}");
        assert_eq!(numbers(&fixture).await, stored);
    }
    kill_instance(&relay).await;
}

/// Several instances relay; each event is published once, and the events of a reservation in order.
#[rstest]
#[case::single_writer("single-writer", Kept)]
#[case::relay_keyed_by_number("mutants/relay-keyed-by-number", Breaks(&[]))]
#[tokio::test]
async fn the_events_of_a_reservation_are_published_in_order(#[case] name: &str, #[case] expected: Expected) {
    const RESERVATIONS: usize = 20;
    const EVENTS_EACH: usize = 10;

    let fixture = Fixture::new(name).await;
    let mut relays = vec![];
    for _ in 0..3 {
        relays.push(fixture.start_instance(&[RELAY, NO_CONSUMERS]).await);
    }
    let reservations: Vec<Uuid> = (0..RESERVATIONS).map(|_| Uuid::new_v4()).collect();
    for _ in 0..EVENTS_EACH {
        let mut tx = fixture.pool.begin().await.unwrap();
        for &reservation in &reservations {
            append_event(&mut tx, reservation).await;
        }
        tx.commit().await.unwrap();
    }
    let stored = wait_until_relayed(&fixture).await;
    let events = published(&fixture).await;
    assert_eq!(events.len(), RESERVATIONS * EVENTS_EACH);
    assert_eq!(numbers(&fixture).await, stored);
    let mut by_reservation: BTreeMap<Uuid, Vec<(i32, i64)>> = BTreeMap::new();
    for event in &events {
        let of_one = by_reservation.entry(event.reservation).or_default();
        of_one.push((event.partition, event.number));
    }
    let in_order = by_reservation
        .values()
        .all(|events| events.is_sorted() && events.first().map(|first| first.0) == events.last().map(|last| last.0));
    match expected {
        Kept => assert!(in_order, "{by_reservation:?}"),
        Breaks(_) => {
            assert!(!in_order, "the mistake of {name} was not seen");
            assert_failure_mode(fixture.strategy, &[]);
        }
    }
    for relay in relays {
        kill_instance(&relay).await;
    }
}

/// A reservation has two events, and the first is larger than a message may be. The second waits for
/// it, and other reservations wait for neither. Once the first can be sent, both are published.
#[rstest]
#[case::single_writer("single-writer", Kept)]
#[case::relay_sends_all_at_once("mutants/relay-sends-all-at-once", Breaks(&[]))]
#[tokio::test]
async fn no_event_overtakes_one_of_its_reservation_that_cannot_be_sent(#[case] name: &str, #[case] expected: Expected) {
    let fixture = Fixture::new(name).await;
    let relay = fixture.start_instance(&[RELAY, NO_CONSUMERS]).await;
    let reservation = Uuid::new_v4();
    let set_status = "update outbox set status = repeat('x', $2) where number = $1";
    // All three become visible at once.
    let mut tx = fixture.pool.begin().await.unwrap();
    let first = append_event(&mut tx, reservation).await;
    sqlx::query(set_status)
        .bind(first)
        .bind(2_000_000)
        .execute(&mut *tx)
        .await
        .unwrap();
    let second = append_event(&mut tx, reservation).await;
    let other = append_event(&mut tx, Uuid::new_v4()).await;
    tx.commit().await.unwrap();
    until("the other event is marked", async || is_marked(&fixture, other).await).await;
    // Each in a round of its own.
    for _ in 0..2 {
        let number = append(&fixture.pool).await;
        until("the event is marked", async || is_marked(&fixture, number).await).await;
    }
    let published_by_now = numbers(&fixture).await;
    let marked = (is_marked(&fixture, first).await, is_marked(&fixture, second).await);
    assert!(!published_by_now.contains(&first), "the fault did not strike");
    if let Breaks(_) = expected {
        assert!(published_by_now.contains(&second), "the mistake of {name} was not seen");
        assert_eq!(marked, (false, true));
        assert_failure_mode(fixture.strategy, &[]);
        kill_instance(&relay).await;
        return;
    }
    assert!(!published_by_now.contains(&second), "{second} has overtaken {first}");
    assert_eq!(marked, (false, false));

    sqlx::query(set_status)
        .bind(first)
        .bind(9)
        .execute(&fixture.pool)
        .await
        .unwrap();
    let stored = wait_until_relayed(&fixture).await;
    let events = published(&fixture).await;
    let of_reservation = events.iter().filter(|event| event.reservation == reservation);
    let of_reservation: Vec<i64> = of_reservation.map(|event| event.number).collect();
    assert_eq!(of_reservation, [first, second]);
    assert_eq!(numbers(&fixture).await, stored);
    relay.stop().await.unwrap();
}

#[tokio::test]
async fn a_relay_whose_broker_was_away_catches_up() {
    let strategy = strategy("single-writer");
    let kafka = Kafka::private().await.unwrap();
    let (postgres, redis) = (backends::postgres().await.unwrap(), backends::redis().await.unwrap());
    let fixture = Fixture::on(strategy, &postgres, &redis, &kafka).await;
    let relay = fixture.start_instance(&[RELAY, NO_CONSUMERS]).await;
    let pid = relay.pid().await.unwrap();
    append(&fixture.pool).await;
    wait_until_relayed(&fixture).await;

    kafka.kill().await.unwrap();
    assert_unreachable(kafka.bootstrap_servers()).await;
    for _ in 0..5 {
        append(&fixture.pool).await;
    }
    until("the fault did not strike: no attempt has failed", async || {
        relay.log().await.unwrap().contains("the outbox could not be relayed")
    })
    .await;
    assert!(!is_marked(&fixture, 2).await);
    until("the metric counts them", async || {
        metric(&relay, "oversold_outbox_unsent").await == Some(5)
    })
    .await;
    kafka.start().await.unwrap();
    let stored = wait_until_relayed(&fixture).await;
    assert_eq!(numbers(&fixture).await, stored);
    assert_eq!(relay.pid().await.unwrap(), pid, "it is another process");
    until("the metric is zero", async || {
        metric(&relay, "oversold_outbox_unsent").await == Some(0)
    })
    .await;
    relay.stop().await.unwrap();
}
