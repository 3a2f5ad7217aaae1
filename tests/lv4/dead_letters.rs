//! Poison messages and the dead-letter topic.

use box_office::SaleId;
use harness::{assert_failure_mode, backends, rush::SALE, until};
use lv4_kafka::pipeline::{Ids, OrderMessage, PARTITIONS, list_dead_letters, orders_topic, replay, replay_all};
use rdkafka::{
    ClientConfig,
    error::RDKafkaErrorCode,
    producer::{FutureProducer, FutureRecord},
};
use rstest::rstest;
use uuid::Uuid;

use crate::fixture::{
    Expected::{self, Breaks, Kept},
    PATIENCE, Place, TIME_FOR_A_MISTAKE, killed, metric, order, seen_within,
};

/// What came compressed may be larger than anything that the dead-letter topic takes.
#[rstest]
#[case::locked("locked")]
#[case::single_writer("single-writer")]
#[tokio::test]
async fn poison_that_grew_on_its_way_is_buried_and_the_rest_flows_on(#[case] name: &str) {
    const LENGTH: usize = 2_000_000;
    let place = Place::of(name).await;
    let acceptor = place.acceptor(5).await;
    let sender: FutureProducer = ClientConfig::new()
        .set("bootstrap.servers", &place.kafka().bootstrap_servers)
        .set("message.max.bytes", "3000000")
        .set("compression.type", "gzip")
        .create()
        .unwrap();
    let (topic, bomb) = (orders_topic(&place.kafka()), vec![b'x'; LENGTH]);
    for partition in 0..PARTITIONS {
        let record = FutureRecord::to(&topic).partition(partition).key("").payload(&bomb);
        sender.send(record, PATIENCE).await.unwrap();
    }
    let orders = place.accepted(&acceptor, 1..=4).await;
    let decider = place.instance(&[]).await;
    place.quiet().await;
    place.hold(&decider, &orders, Kept).await;

    let kafka = place.kafka();
    let letters = tokio::task::spawn_blocking(move || list_dead_letters(&kafka, PATIENCE));
    let letters = letters.await.unwrap().unwrap();
    assert_eq!(letters.len(), PARTITIONS as usize);
    // None of them stands in the way of those that can be tried again.
    place.puts(0, &[b"not an order, and small"]).await.unwrap();
    place.quiet().await;
    let kafka = place.kafka();
    assert_eq!(replay_all(&kafka, PATIENCE).await.unwrap(), 1);
    let refused = replay(&kafka, &letters[0].origin, PATIENCE).await.unwrap_err();
    assert!(
        refused.to_string().contains("larger than the orders topic accepts"),
        "{refused}"
    );
    for letter in letters {
        assert!(letter.reason.contains("not an order"), "{}", letter.reason);
        assert!(bomb.starts_with(letter.payload.as_bytes()) && letter.payload.len() < LENGTH);
    }
    acceptor.stop().await.unwrap();
    decider.stop().await.unwrap();
}

#[rstest]
#[case::locked("locked", Kept)]
#[case::single_writer("single-writer", Kept)]
#[case::endless_retry("mutants/endless-retry", Breaks(&[]))]
#[case::poison_skipped("mutants/poison-skipped", Breaks(&[]))]
#[tokio::test]
async fn poison_goes_to_the_dead_letters_once_and_the_rest_flows_on(#[case] name: &str, #[case] expected: Expected) {
    const LATER: SaleId = 77;
    let place = Place::of(name).await;
    let acceptor = place.acceptor(5).await;
    let kafka = place.kafka();
    let mut orders = place.accepted(&acceptor, 1..=2).await;

    let ids = Ids::load(&place.pool).await.unwrap();
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
    // Where an order of the sale lies, others will.
    let offsets = place.offsets().await;
    let (&first, &(_, offset)) = offsets.iter().find(|(_, (_, end))| *end > 0).unwrap();
    place.puts(first, &poison.map(|(payload, _)| payload)).await.unwrap();
    // One that is as large as the broker takes by default would no longer fit with the reason beside it.
    let too_large = place.puts(first, &[&vec![b'x'; 1_048_000]]).await.unwrap_err();
    assert_eq!(
        too_large.rdkafka_error_code(),
        Some(RDKafkaErrorCode::MessageSizeTooLarge)
    );
    let behind = offset + i64::try_from(poison.len()).unwrap();
    for buyer in 3.. {
        orders.push(place.accepts(&acceptor, buyer).await);
        if place.offsets().await[&first].1 > behind {
            break;
        }
    }
    let decider = place.instance(&[]).await;
    let list = async || {
        let kafka = place.kafka();
        tokio::task::spawn_blocking(move || list_dead_letters(&kafka, PATIENCE))
            .await
            .unwrap()
            .unwrap()
    };
    if name == "mutants/endless-retry" {
        until("the other partitions are decided", async || {
            let offsets = place.offsets().await;
            offsets
                .iter()
                .all(|(&partition, (done, end))| partition == first || done == end)
        })
        .await;
        let passed = seen_within(TIME_FOR_A_MISTAKE, async || place.offsets().await[&first].0 > offset).await;
        assert!(!passed, "the mistake of {name} was not seen");
        assert_failure_mode(place.strategy, &[]);
        return killed(&decider).await;
    }
    place.quiet().await;
    place.hold(&decider, &orders, Kept).await;

    let mut letters = list().await;
    if expected != Kept {
        assert_eq!(letters.len(), 1, "the mistake of {name} was not seen");
        assert_failure_mode(place.strategy, &[]);
        return decider.stop().await.unwrap();
    }
    // Orders of one partition that are decided at the same time may be buried in any order.
    letters.sort_by(|one, other| one.origin.cmp(&other.origin));
    assert_eq!(letters.len(), poison.len());
    assert_eq!(place.written_to_dead_letters().await, 6, "each is buried once");
    assert_eq!(metric(&decider, "oversold_dead_letters_total").await, Some(6));
    for (number, (letter, (payload, reason))) in letters.iter().zip(poison).enumerate() {
        assert!(letter.reason.contains(reason), "{}", letter.reason);
        let number = offset + i64::try_from(number).unwrap();
        assert_eq!(letter.origin, format!("{}/{first}/{number}", orders_topic(&kafka)));
        assert_eq!(
            (letter.attempts, &*letter.payload),
            (1, &*String::from_utf8_lossy(payload))
        );
    }

    // What was wrong with one is mended; another one is as bad as it was.
    acceptor.opens(LATER, 1).await.unwrap();
    replay(&kafka, &letters[4].origin, PATIENCE).await.unwrap();
    replay(&kafka, &letters[0].origin, PATIENCE).await.unwrap();
    replay(&kafka, &letters[0].origin, PATIENCE).await.unwrap_err();
    place.quiet().await;
    place.hold(&decider, &[ids.for_order(&of_no_sale)], Kept).await;
    let left = list().await;
    let tried: Vec<(&str, u32)> = left.iter().map(|letter| (&*letter.payload, letter.attempts)).collect();
    assert_eq!(left.len(), 5);
    assert_eq!(tried[4], (&*String::from_utf8_lossy(poison[0].0), 2));
    // One more letter, and two notes.
    assert_eq!(place.written_to_dead_letters().await, 9);
    // All at once: each comes back, as bad as it was.
    assert_eq!(replay_all(&kafka, PATIENCE).await.unwrap(), 5);
    place.quiet().await;
    let left = list().await;
    assert_eq!(left.iter().map(|letter| letter.attempts).sum::<u32>(), 4 * 2 + 3);
    decider.stop().await.unwrap();
}

/// The message behind an order that is put off comes again with it each time. It was buried the first time.
#[tokio::test]
async fn poison_behind_an_order_that_is_put_off_is_buried_once() {
    let place = Place::of("locked").await;
    let redis = backends::redis().await.unwrap();
    let acceptor = place.acceptor(1).await;
    let orders = place.accepted(&acceptor, 1..=1).await;
    let offsets = place.offsets().await;
    let (&partition, _) = offsets.iter().find(|(_, (_, end))| *end > 0).unwrap();
    place.puts(partition, &[b"not an order"]).await.unwrap();
    let lock = format!("{}lock:sale:{SALE}", place.stand.prefix().unwrap());
    redis
        .command(&["SET", &lock, "somebody else", "PX", "60000"])
        .await
        .unwrap();
    let decider = place.instance(&[]).await;
    place.is_tried(3).await;
    assert_eq!(place.written_to_dead_letters().await, 1);
    redis.command(&["DEL", &lock]).await.unwrap();
    place.quiet().await;

    place.hold(&decider, &orders, Kept).await;
    assert_eq!(place.written_to_dead_letters().await, 1);
    assert_eq!(metric(&decider, "oversold_dead_letters_total").await, Some(1));
    acceptor.stop().await.unwrap();
    decider.stop().await.unwrap();
}
