//! `oversold dead-letters`.

use std::time::{Duration, Instant};

use harness::rush::{Program, Rush, SALE, Servers};
use rdkafka::producer::FutureRecord;
use serde_json::Value;

use crate::{command, err, out};

#[tokio::test(flavor = "multi_thread")]
async fn a_dead_letter_is_listed_and_shown_and_gets_a_second_chance() {
    let strategy = lv4_kafka::LEVEL.strategy("single-writer").unwrap();
    let stand = harness::backends::TestEnvironment::shared(strategy).await.unwrap();
    let letters = |arguments: &[&str]| {
        let mut letters = command(&[&["dead-letters"], arguments].concat());
        letters.envs(stand.variables()).output().unwrap()
    };
    let listed = || -> Vec<Value> { serde_json::from_str(&out(&letters(&["list", "--json"]))).unwrap() };

    // Before there is a topic.
    let output = letters(&[]);
    assert_eq!(output.status.code(), Some(0), "{}", err(&output));
    assert!(
        out(&output).starts_with("no dead letters in oversold-"),
        "{}",
        out(&output)
    );
    assert!(listed().is_empty());
    for word in ["show", "replay"] {
        let output = letters(&[word, "orders/0/7"]);
        assert_eq!(output.status.code(), Some(2), "{}", err(&output));
        assert!(
            err(&output).starts_with("oversold: there is no dead letter orders/0/7"),
            "{}",
            err(&output)
        );
        assert_eq!(err(&output).trim_end().lines().count(), 1, "{}", err(&output));
    }

    let program = Program::new(env!("CARGO_BIN_EXE_oversold"))
        .argument("serve")
        .argument("lv4");
    let rush = Rush::default();
    let servers = Servers::start(&rush, &stand, &program, &lv4_kafka::LEVEL, strategy)
        .await
        .unwrap();
    let place = stand.kafka(0, Duration::from_secs(1)).unwrap();
    let topic = lv4_kafka::pipeline::orders_topic(&place);
    // With a key, as orders have one: it determines the partition, on the replay as well.
    let key = SALE.to_be_bytes();
    let poison = FutureRecord::to(&topic).key(&key).payload("not an order\n");
    let producer = lv4_kafka::pipeline::producer(&place).unwrap();
    let written = producer.send(poison, Duration::from_secs(10)).await.unwrap();
    let (partition, offset) = (written.partition, written.offset);
    let origin = format!("{topic}/{partition}/{offset}");
    let one = |attempts: u64| {
        let began = Instant::now();
        loop {
            match listed().as_slice() {
                [letter] if letter["attempts"] == attempts => return letter.clone(),
                other => assert!(began.elapsed() < Duration::from_secs(20), "{other:?}"),
            }
        }
    };
    let letter = one(1);
    assert_eq!(letter["origin"], origin, "{letter}");
    assert_eq!(letter["payload"], "not an order\n");
    let reason = letter["reason"].as_str().unwrap().to_owned();
    let output = letters(&["list"]);
    assert_eq!(out(&output), format!("{origin}  {reason} (tried once)\n"));
    let output = letters(&["show", &origin]);
    assert_eq!(
        out(&output),
        format!("origin    {origin}\nreason    {reason}\nattempts  1\npayload   not an order\\n\n")
    );

    // The replay fails like the first attempt.
    let output = letters(&["replay", &origin]);
    assert_eq!(output.status.code(), Some(0), "{}", err(&output));
    assert!(
        out(&output).contains(&format!("{origin} is in {topic} again")),
        "{}",
        out(&output)
    );
    assert_eq!(one(2)["origin"], format!("{topic}/{partition}/{}", offset + 1));
    let again = letters(&["replay", &origin]);
    assert_eq!(again.status.code(), Some(2), "{}", out(&again));
    servers.stop().await.unwrap();
}
