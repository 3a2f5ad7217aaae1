//! `oversold dead-letters`.

use std::time::{Duration, Instant};

use harness::rush::{Program, Rush, SALE, Servers};
use lv4_kafka::pipeline::{dead_letter_topic, orders_topic, producer};
use rdkafka::{
    message::{Header, OwnedHeaders},
    producer::FutureRecord,
};
use serde_json::Value;

use crate::{command, err, out};

#[tokio::test(flavor = "multi_thread")]
async fn a_dead_letter_is_listed_and_shown_and_gets_a_second_chance() {
    let strategy = lv4_kafka::LEVEL.strategy("single-writer").unwrap();
    let environment = harness::backends::TestEnvironment::shared(strategy).await.unwrap();
    let letters = |arguments: &[&str]| {
        let mut letters = command(&[&["dead-letters"], arguments].concat());
        letters.envs(environment.variables()).output().unwrap()
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
    let servers = Servers::start(&rush, &environment, &program, &lv4_kafka::LEVEL, strategy)
        .await
        .unwrap();
    let config = environment.kafka(0, Duration::from_secs(1)).unwrap();
    let topic = orders_topic(&config);
    // With a key, as orders have one: it determines the partition, on the replay as well.
    let key = SALE.to_be_bytes();
    let poison = FutureRecord::to(&topic).key(&key).payload("not an order\n");
    let sender = producer(&config).unwrap();
    let written = sender.send(poison, Duration::from_secs(10)).await.unwrap();
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

#[tokio::test(flavor = "multi_thread")]
async fn what_another_program_wrote_is_listed_by_its_place_and_does_not_control_the_terminal() {
    let strategy = lv4_kafka::LEVEL.strategy("single-writer").unwrap();
    let environment = harness::backends::TestEnvironment::shared(strategy).await.unwrap();
    let letters = |arguments: &[&str]| {
        let mut letters = command(&[&["dead-letters"], arguments].concat());
        let output = letters.envs(environment.variables()).output().unwrap();
        assert_eq!(output.status.code(), Some(0), "{}", err(&output));
        out(&output)
    };
    let program = Program::new(env!("CARGO_BIN_EXE_oversold"))
        .argument("serve")
        .argument("lv4")
        .variable("KAFKA_CONSUMERS", "0");
    let servers = Servers::start(&Rush::default(), &environment, &program, &lv4_kafka::LEVEL, strategy)
        .await
        .unwrap();
    let config = environment.kafka(0, Duration::from_secs(1)).unwrap();
    let (orders, dead, sender) = (
        orders_topic(&config),
        dead_letter_topic(&config),
        producer(&config).unwrap(),
    );
    let reason = OwnedHeaders::new().insert(Header {
        key: "reason",
        value: Some("\x1b[2J\u{9b}1m"),
    });
    let long = format!("\x1b]0;title\x07\u{9b}31m\u{202e}{}", "x".repeat(10_000));
    for payload in [Some(&*long), None, Some("three")] {
        let mut record = FutureRecord::<str, str>::to(&dead).headers(reason.clone());
        record.payload = payload;
        sender.send(record, Duration::from_secs(10)).await.unwrap();
    }

    let origin = |offset: u32| format!("{dead}/0/{offset}");
    let controls = |text: &str| text.chars().any(|c| c.is_control() && c != '\n');
    let listed = letters(&[]);
    let origins: Vec<&str> = listed.lines().map(|line| line.split(' ').next().unwrap()).collect();
    assert_eq!(origins, [origin(0), origin(1), origin(2)]);
    assert!(
        listed.contains("\\u{1b}[2J\\u{9b}1m (not tried)") && !controls(&listed),
        "{listed}"
    );
    let shown = letters(&["show", &origin(0)]);
    assert!(
        shown.len() < 6_000 && !controls(&shown) && !shown.contains('\u{202e}'),
        "{shown}"
    );
    let json = letters(&["list", "--json"]);
    assert!(json.is_ascii() && !controls(&json), "{json}");
    let parsed: Vec<Value> = serde_json::from_str(&json).unwrap();
    assert_eq!(parsed[0]["payload"], long);

    assert_eq!(letters(&["skip", &origin(1)]), format!("{} is skipped\n", origin(1)));
    for replayed in [2, 0, 0] {
        let output = letters(&["replay", "--all"]);
        assert!(
            output.starts_with(&format!("{replayed} are in {orders} again")),
            "{output}"
        );
    }
    assert!(letters(&[]).starts_with("no dead letters"));
    servers.stop().await.unwrap();
}
