//! Poison messages and the dead-letter topic.

use box_office::SaleId;
use harness::{assert_failure_mode, backends, rush::SALE, until};
use lv4_kafka::pipeline::{
    DeadLetter, OrderMessage, PARTITIONS, dead_letter_topic, list_dead_letters, orders_topic, replay, replay_all, skip,
};
use rdkafka::{
    ClientConfig,
    admin::{AdminOptions, AlterConfig, ResourceSpecifier},
    error::RDKafkaErrorCode,
    message::{Header, OwnedHeaders},
    producer::{FutureProducer, FutureRecord},
};
use rstest::rstest;
use uuid::Uuid;

use crate::fixture::{
    Expected::{self, Breaks, Kept},
    Fixture, OBSERVATION_TIME, TIMEOUT, happens_within, kill_instance, metric, order,
};

async fn list(fixture: &Fixture) -> Vec<DeadLetter> {
    let kafka = fixture.kafka();
    let listing = tokio::task::spawn_blocking(move || list_dead_letters(&kafka, TIMEOUT));
    listing.await.unwrap().unwrap()
}

fn origins(dead_letters: &[DeadLetter]) -> Vec<&str> {
    dead_letters.iter().map(|dead_letter| &*dead_letter.origin).collect()
}

/// The names and values of headers.
type Headers<'a> = &'a [(&'a str, &'a [u8])];

/// A record as any client of the broker can write it.
struct Foreign<'a> {
    topic: &'a str,
    partition: i32,
    key: Option<&'a [u8]>,
    payload: Option<&'a [u8]>,
    headers: Headers<'a>,
}

impl Foreign<'_> {
    async fn write(&self, fixture: &Fixture) {
        let sender: FutureProducer = ClientConfig::new()
            .set("bootstrap.servers", &fixture.kafka().bootstrap_servers)
            .create()
            .unwrap();
        let headers = self.headers.iter().fold(OwnedHeaders::new(), |all, &(key, value)| {
            all.insert(Header {
                key,
                value: Some(value),
            })
        });
        let mut record = FutureRecord::to(self.topic).partition(self.partition).headers(headers);
        record.key = self.key;
        record.payload = self.payload;
        sender.send(record, TIMEOUT).await.unwrap();
    }
}

#[rstest]
#[case::locked("locked")]
#[case::single_writer("single-writer")]
#[tokio::test]
async fn no_header_and_no_key_stops_a_consumer(#[case] name: &str) {
    let huge = [b'9'; 50_000];
    let attempts: [(Headers<'_>, u32); 7] = [
        (&[("attempts", b"4294967295")], u32::MAX),
        (&[("attempts", b"4294967294")], u32::MAX),
        (&[("attempts", &huge)], u32::MAX),
        (&[("attempts", b"\xff\xfe")], 1),
        (&[("attempts", b"-3")], 1),
        (&[("attempts", b"2"), ("attempts", b"7")], 3),
        (
            &[
                ("", b""),
                ("reason", b"\x1b[2J"),
                ("resolved", b"true"),
                ("origin-offset", b"0"),
            ],
            1,
        ),
    ];
    let fixture = Fixture::new(name).await;
    let acceptor = fixture.start_acceptor(5).await;
    let topic = orders_topic(&fixture.kafka());
    for partition in 0..PARTITIONS {
        for (headers, _) in attempts {
            let record = Foreign {
                topic: &topic,
                partition,
                key: Some(b"\x00\xff not text"),
                payload: None,
                headers,
            };
            record.write(&fixture).await;
        }
    }
    let orders = fixture.accept_all(&acceptor, 1..=4).await;
    let consumer = fixture.start_instance(&[]).await;
    fixture.wait_until_processed().await;
    fixture.assert_outcome(&consumer, &orders, Kept).await;

    let dead_letters = list(&fixture).await;
    assert_eq!(dead_letters.len(), PARTITIONS as usize * attempts.len());
    for (offset, (headers, expected)) in attempts.iter().enumerate() {
        let of = format!("{topic}/0/{offset}");
        let dead_letter = dead_letters
            .iter()
            .find(|dead_letter| dead_letter.origin == of)
            .unwrap();
        assert_eq!(dead_letter.attempts, *expected, "{:?}", headers[0].0);
        assert!(dead_letter.reason.starts_with("not an order"), "{}", dead_letter.reason);
    }
    // Their replay counts no further.
    assert_eq!(
        replay_all(&fixture.kafka(), TIMEOUT).await.unwrap().replayed,
        dead_letters.len()
    );
    fixture.wait_until_processed().await;
    let most = list(&fixture)
        .await
        .into_iter()
        .map(|dead_letter| dead_letter.attempts)
        .max();
    assert_eq!(most, Some(u32::MAX));
    acceptor.stop().await.unwrap();
    consumer.stop().await.unwrap();
}

/// Another program has written to the dead-letter topic.
#[tokio::test]
async fn foreign_records_are_replayed_and_skipped_one_by_one_and_never_twice() {
    const LARGE: usize = 2_000;
    let fixture = Fixture::new("single-writer").await;
    let acceptor = fixture.start_acceptor(1).await;
    let (kafka, large) = (fixture.kafka(), [b'x'; LARGE]);
    let (orders, dead) = (orders_topic(&kafka), dead_letter_topic(&kafka));
    let sent = async || -> i64 { fixture.offsets().await.values().map(|(_, end)| end).sum() };
    let payloads: [Option<&[u8]>; 6] = [
        Some(b"first"),
        Some(&large),
        None,
        Some(b"last"),
        Some(b""),
        Some(&[b'y'; 70_000]),
    ];
    for payload in payloads {
        let record = Foreign {
            topic: &dead,
            partition: 0,
            key: None,
            payload,
            headers: &[],
        };
        record.write(&fixture).await;
    }
    let place = |offset| format!("{dead}/0/{offset}");
    assert_eq!(origins(&list(&fixture).await), [0, 1, 2, 3, 4, 5].map(place));
    skip(&kafka, &place(4), TIMEOUT).await.unwrap();
    skip(&kafka, &place(4), TIMEOUT).await.unwrap_err();
    replay(&kafka, &place(3), TIMEOUT).await.unwrap();
    replay(&kafka, &place(3), TIMEOUT).await.unwrap_err();
    assert_eq!(sent().await, 1);

    // One is rejected. It stops no other.
    let limit = async |bytes: &str| {
        let change = AlterConfig::new(ResourceSpecifier::Topic(&orders)).set("max.message.bytes", bytes);
        let changed = fixture.admin().alter_configs([&change], &AdminOptions::new()).await;
        changed.unwrap().remove(0).unwrap();
    };
    limit("1000").await;
    until("the topic rejects large messages", async || {
        fixture.produce(0, &[&large]).await.is_err()
    })
    .await;
    let before = sent().await;
    let report = replay_all(&kafka, TIMEOUT).await.unwrap();
    assert_eq!((report.replayed, report.not_tried), (2, 0), "{report:?}");
    assert_eq!(report.too_large, [place(5)]);
    assert_eq!(report.failed.len(), 1, "{report:?}");
    assert_eq!(report.failed[0].0, place(1));
    for _ in 0..2 {
        assert_eq!(replay_all(&kafka, TIMEOUT).await.unwrap().replayed, 0);
    }
    assert_eq!(sent().await, before + 2, "what was sent is not sent again");
    limit("65536").await;
    until("the topic accepts them again", async || {
        replay_all(&kafka, TIMEOUT).await.unwrap().replayed == 1
    })
    .await;
    assert_eq!(origins(&list(&fixture).await), [place(5)]);
    assert_eq!(sent().await, before + 3, "what was sent is not sent again");
    acceptor.stop().await.unwrap();
}

/// A compressed message may be larger, uncompressed, than the dead-letter topic accepts.
#[rstest]
#[case::locked("locked")]
#[case::single_writer("single-writer")]
#[tokio::test]
async fn poison_larger_than_the_topic_accepts_is_truncated_and_the_partition_continues(#[case] name: &str) {
    const LENGTH: usize = 2_000_000;
    let fixture = Fixture::new(name).await;
    let acceptor = fixture.start_acceptor(5).await;
    let sender: FutureProducer = ClientConfig::new()
        .set("bootstrap.servers", &fixture.kafka().bootstrap_servers)
        .set("message.max.bytes", "3000000")
        .set("compression.type", "gzip")
        .create()
        .unwrap();
    let (topic, bomb) = (orders_topic(&fixture.kafka()), vec![b'x'; LENGTH]);
    for partition in 0..PARTITIONS {
        let record = FutureRecord::to(&topic).partition(partition).key("").payload(&bomb);
        sender.send(record, TIMEOUT).await.unwrap();
    }
    let orders = fixture.accept_all(&acceptor, 1..=4).await;
    let consumer = fixture.start_instance(&[]).await;
    fixture.wait_until_processed().await;
    fixture.assert_outcome(&consumer, &orders, Kept).await;

    let dead_letters = list(&fixture).await;
    assert_eq!(dead_letters.len(), PARTITIONS as usize);
    // They do not block the replay of smaller ones.
    fixture.produce(0, &[b"not an order, and small"]).await.unwrap();
    fixture.wait_until_processed().await;
    let kafka = fixture.kafka();
    assert_eq!(replay_all(&kafka, TIMEOUT).await.unwrap().replayed, 1);
    let refused = replay(&kafka, &dead_letters[0].origin, TIMEOUT).await.unwrap_err();
    assert!(
        refused.to_string().contains("larger than the orders topic accepts"),
        "{refused}"
    );
    for dead_letter in dead_letters {
        assert!(dead_letter.reason.contains("not an order"), "{}", dead_letter.reason);
        assert!(bomb.starts_with(dead_letter.payload.as_bytes()) && dead_letter.payload.len() < LENGTH);
    }
    acceptor.stop().await.unwrap();
    consumer.stop().await.unwrap();
}

#[rstest]
#[case::locked("locked", Kept)]
#[case::single_writer("single-writer", Kept)]
#[case::endless_retry("mutants/endless-retry", Breaks(&[]))]
#[case::poison_skipped("mutants/poison-skipped", Breaks(&[]))]
#[tokio::test]
async fn poison_is_dead_lettered_once_and_the_partition_continues(#[case] name: &str, #[case] expected: Expected) {
    const LATER: SaleId = 77;
    let fixture = Fixture::new(name).await;
    let acceptor = fixture.start_acceptor(5).await;
    let kafka = fixture.kafka();
    let mut orders = fixture.accept_all(&acceptor, 1..=2).await;

    let ids = fixture.ids().await;
    let of_no_sale = order(LATER, 9);
    let good = OrderMessage::new(ids.for_order(&order(SALE, 3)), &order(SALE, 3)).to_bytes();
    let later = OrderMessage::new(ids.for_order(&of_no_sale), &of_no_sale).to_bytes();
    let wrong_id = OrderMessage::new(Uuid::new_v4(), &order(SALE, 4)).to_bytes();
    let wrong_version = String::from_utf8(good.clone())
        .unwrap()
        .replace("\"version\":1", "\"version\":2");
    let key_with_nul = String::from_utf8(good.clone())
        .unwrap()
        .replace("buyer-3", "buyer\\u0000");
    let large = vec![b'x'; 60_000];
    let poison: [(&[u8], &str); 6] = [
        (b"\xff\x00 not JSON", "not an order"),
        (wrong_version.as_bytes(), "version 2"),
        (key_with_nul.as_bytes(), "not an order"),
        (&wrong_id, "is not that of this order"),
        (&later, "there is no sale 77"),
        (&large, "not an order"),
    ];
    // A partition with an order of the sale will get more of them.
    let offsets = fixture.offsets().await;
    let (&first, &(_, offset)) = offsets.iter().find(|(_, (_, end))| *end > 0).unwrap();
    fixture
        .produce(first, &poison.map(|(payload, _)| payload))
        .await
        .unwrap();
    // A message of the broker's default limit could not be dead-lettered with the reason in its
    // headers.
    let too_large = fixture.produce(first, &[&vec![b'x'; 1_048_000]]).await.unwrap_err();
    assert_eq!(
        too_large.rdkafka_error_code(),
        Some(RDKafkaErrorCode::MessageSizeTooLarge)
    );
    let last_poison = offset + i64::try_from(poison.len()).unwrap();
    for buyer in 3.. {
        orders.push(fixture.accept(&acceptor, buyer).await);
        if fixture.offsets().await[&first].1 > last_poison {
            break;
        }
    }
    let consumer = fixture.start_instance(&[]).await;
    let list = async || list(&fixture).await;
    if name == "mutants/endless-retry" {
        until("the other partitions are decided", async || {
            let offsets = fixture.offsets().await;
            offsets
                .iter()
                .all(|(&partition, (done, end))| partition == first || done == end)
        })
        .await;
        let passed = happens_within(OBSERVATION_TIME, async || fixture.offsets().await[&first].0 > offset).await;
        assert!(!passed, "the mistake of {name} was not seen");
        assert_failure_mode(fixture.strategy, &[]);
        return kill_instance(&consumer).await;
    }
    fixture.wait_until_processed().await;
    fixture.assert_outcome(&consumer, &orders, Kept).await;

    let mut dead_letters = list().await;
    if expected != Kept {
        assert_eq!(dead_letters.len(), 1, "the mistake of {name} was not seen");
        assert_failure_mode(fixture.strategy, &[]);
        return consumer.stop().await.unwrap();
    }
    // Messages of one partition that are processed concurrently may be dead-lettered in any order.
    dead_letters.sort_by(|one, other| one.origin.cmp(&other.origin));
    assert_eq!(dead_letters.len(), poison.len());
    assert_eq!(fixture.dead_letter_topic_size().await, 6, "each is dead-lettered once");
    assert_eq!(metric(&consumer, "oversold_dead_letters_total").await, Some(6));
    for (number, (dead_letter, (payload, reason))) in dead_letters.iter().zip(poison).enumerate() {
        assert!(dead_letter.reason.contains(reason), "{}", dead_letter.reason);
        let number = offset + i64::try_from(number).unwrap();
        assert_eq!(dead_letter.origin, format!("{}/{first}/{number}", orders_topic(&kafka)));
        assert_eq!(
            (dead_letter.attempts, &*dead_letter.payload),
            (1, &*String::from_utf8_lossy(payload))
        );
    }

    // The cause of one is fixed; another one is still poison.
    acceptor.create_sale(LATER, 1).await.unwrap();
    replay(&kafka, &dead_letters[4].origin, TIMEOUT).await.unwrap();
    replay(&kafka, &dead_letters[0].origin, TIMEOUT).await.unwrap();
    replay(&kafka, &dead_letters[0].origin, TIMEOUT).await.unwrap_err();
    fixture.wait_until_processed().await;
    fixture
        .assert_outcome(&consumer, &[ids.for_order(&of_no_sale)], Kept)
        .await;
    let left = list().await;
    let tried: Vec<(&str, u32)> = left
        .iter()
        .map(|dead_letter| (&*dead_letter.payload, dead_letter.attempts))
        .collect();
    assert_eq!(left.len(), 5);
    assert_eq!(tried[4], (&*String::from_utf8_lossy(poison[0].0), 2));
    // One more dead letter, and two resolution markers.
    assert_eq!(fixture.dead_letter_topic_size().await, 9);
    // All at once: each is dead-lettered again.
    assert_eq!(replay_all(&kafka, TIMEOUT).await.unwrap().replayed, 5);
    fixture.wait_until_processed().await;
    let left = list().await;
    assert_eq!(
        left.iter().map(|dead_letter| dead_letter.attempts).sum::<u32>(),
        4 * 2 + 3
    );
    consumer.stop().await.unwrap();
}

/// The message behind a retried order is redelivered with it each time. It was dead-lettered the
/// first time.
#[tokio::test]
async fn poison_behind_a_retried_order_is_dead_lettered_once() {
    let fixture = Fixture::new("locked").await;
    let redis = backends::redis().await.unwrap();
    let acceptor = fixture.start_acceptor(1).await;
    let orders = fixture.accept_all(&acceptor, 1..=1).await;
    let offsets = fixture.offsets().await;
    let (&partition, _) = offsets.iter().find(|(_, (_, end))| *end > 0).unwrap();
    fixture.produce(partition, &[b"not an order"]).await.unwrap();
    let lock = format!("{}lock:sale:{SALE}", fixture.environment.prefix().unwrap());
    redis
        .command(&["SET", &lock, "another owner", "PX", "60000"])
        .await
        .unwrap();
    let consumer = fixture.start_instance(&[]).await;
    fixture.wait_for_attempts(3).await;
    assert_eq!(fixture.dead_letter_topic_size().await, 1);
    redis.command(&["DEL", &lock]).await.unwrap();
    fixture.wait_until_processed().await;

    fixture.assert_outcome(&consumer, &orders, Kept).await;
    assert_eq!(fixture.dead_letter_topic_size().await, 1);
    assert_eq!(metric(&consumer, "oversold_dead_letters_total").await, Some(1));
    acceptor.stop().await.unwrap();
    consumer.stop().await.unwrap();
}

/// The dead-letter topic accepts nothing for a while. Each poison message is alone in its
/// partition.
#[rstest]
#[case::locked("locked", Kept)]
#[case::single_writer("single-writer", Kept)]
#[case::dead_letter_error_logged("mutants/dead-letter-error-logged", Breaks(&[]))]
#[tokio::test]
async fn an_offset_does_not_pass_poison_that_could_not_be_dead_lettered(
    #[case] name: &str,
    #[case] expected: Expected,
) {
    const LATER: SaleId = 77;
    let fixture = Fixture::new(name).await;
    let acceptor = fixture.start_acceptor(5).await;
    let orders = fixture.accept_all(&acceptor, 1..=1).await;
    let of_no_sale = order(LATER, 9);
    let ids = fixture.ids().await;
    let of_no_sale = OrderMessage::new(ids.for_order(&of_no_sale), &of_no_sale).to_bytes();
    let offsets = fixture.offsets().await;
    let mut empty = offsets.iter().filter(|(_, (_, end))| *end == 0);
    let poisoned = [&b"not an order"[..], &of_no_sale].map(|payload| (*empty.next().unwrap().0, payload));
    for (partition, payload) in poisoned {
        fixture.produce(partition, &[payload]).await.unwrap();
    }
    fixture.limit_dead_letters(Some("1")).await;
    let dead_letter_topic = dead_letter_topic(&fixture.kafka());
    until("the dead-letter topic accepts nothing", async || {
        let refused = fixture.produce_to(&dead_letter_topic, 0, &[b"x"]).await.err();
        refused.and_then(|why| why.rdkafka_error_code()) == Some(RDKafkaErrorCode::MessageSizeTooLarge)
    })
    .await;
    let before = fixture.dead_letter_topic_size().await;

    let consumer = fixture.start_instance(&[]).await;
    until("the order is decided", async || fixture.rows().await == 1).await;
    let passed = async |times: usize| {
        let offsets = fixture.offsets().await;
        poisoned
            .iter()
            .filter(|(partition, _)| offsets[partition].0 > 0)
            .count()
            >= times
    };
    match expected {
        // Only time can show this.
        Kept => assert!(!happens_within(OBSERVATION_TIME, async || passed(1).await).await),
        Breaks(_) => until("the offsets pass them", async || passed(2).await).await,
    }
    fixture.limit_dead_letters(None).await;
    fixture.wait_until_processed().await;

    fixture.assert_outcome(&consumer, &orders, Kept).await;
    let written = fixture.dead_letter_topic_size().await - before;
    match expected {
        Kept => assert_eq!(written, 2, "each is dead-lettered once"),
        Breaks(_) => {
            assert_eq!(written, 0, "the mistake of {name} was not seen");
            assert_failure_mode(fixture.strategy, &[]);
        }
    }
    consumer.stop().await.unwrap();
}
