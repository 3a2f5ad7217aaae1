//! `oversold dead-letters`: lists, shows, replays and skips the messages in LV.4's dead-letter topic.
//!
//! Any client of the broker can write to that topic. What is printed of a message can't control the
//! terminal.

use std::time::Duration;

use anyhow::Context;
use box_office::{KafkaConfig, kafka_bootstrap_servers, kafka_prefix};
use clap::{Args, Subcommand};
use lv4_kafka::pipeline::{
    DeadLetter, Undelivered, dead_letter_topic, list_dead_letters, orders_topic, replay, replay_all, skip,
};
use rdkafka::error::KafkaError;

use crate::exit::ExitKind;

/// Time-out of each request to Kafka.
const TIMEOUT: Duration = Duration::from_secs(5);

/// The maximum number of characters of a payload that `show` prints.
const MAX_SHOWN_CHARS: usize = 4_000;

#[derive(Args)]
pub(crate) struct DeadLettersArgs {
    #[command(subcommand)]
    action: Option<Action>,
    /// The bootstrap servers of Kafka.
    #[arg(long, global = true, env = "KAFKA_BOOTSTRAP_SERVERS", value_name = "HOST:PORT,…", value_parser = kafka_bootstrap_servers)]
    kafka_bootstrap_servers: Option<String>,
    /// The prefix of all topic names, as the servers have it.
    #[arg(long, global = true, env = "KAFKA_PREFIX", value_name = "TEXT", default_value = "oversold.", value_parser = kafka_prefix)]
    kafka_prefix: String,
}

#[derive(Subcommand)]
enum Action {
    /// List all dead letters with origin and reason. The default.
    List {
        /// Print JSON: an array with one object for each dead letter.
        #[arg(long)]
        json: bool,
    },
    /// Show one dead letter with its payload.
    Show {
        /// The origin, as `list` shows it: TOPIC/PARTITION/OFFSET.
        origin: String,
    },
    /// Produce one dead letter to its original topic again, or all of them, so that it is processed once more.
    Replay {
        /// The origin, as `list` shows it: TOPIC/PARTITION/OFFSET.
        #[arg(required_unless_present = "all", conflicts_with = "all")]
        origin: Option<String>,
        /// All dead letters.
        #[arg(long)]
        all: bool,
    },
    /// Mark one dead letter as done: it is listed and replayed no more.
    Skip {
        /// The origin, as `list` shows it: TOPIC/PARTITION/OFFSET.
        origin: String,
    },
}

/// Whether Kafka is configured and does not answer, or rejects a request.
pub(crate) fn is_unavailable(error: &anyhow::Error) -> bool {
    error.is::<KafkaError>() || error.is::<Undelivered>()
}

/// Lists, shows or replays dead letters.
pub(crate) async fn run(args: &DeadLettersArgs) -> anyhow::Result<ExitKind> {
    let kafka = KafkaConfig {
        bootstrap_servers: args
            .kafka_bootstrap_servers
            .clone()
            .context("KAFKA_BOOTSTRAP_SERVERS (--kafka-bootstrap-servers) is not set; expected the addresses of Kafka brokers, such as localhost:9092,localhost:9093")?,
        prefix: args.kafka_prefix.clone(),
        consumers: 0,
        session: TIMEOUT,
    };
    let config = kafka.clone();
    let letters = tokio::task::spawn_blocking(move || list_dead_letters(&config, TIMEOUT)).await?;
    let letters = letters.context("KAFKA_BOOTSTRAP_SERVERS (--kafka-bootstrap-servers)")?;
    match &args.action {
        None => list(&letters, &kafka, false)?,
        Some(Action::List { json }) => list(&letters, &kafka, *json)?,
        Some(Action::Show { origin }) => show(find(&letters, origin)?),
        Some(Action::Replay { origin: None, .. }) => replay_each(&kafka).await?,
        Some(Action::Replay {
            origin: Some(origin), ..
        }) => {
            find(&letters, origin)?;
            replay(&kafka, origin, TIMEOUT).await?;
            println!(
                "{origin} is in {} again: it is processed, or becomes a dead letter again",
                orders_topic(&kafka)
            );
        }
        Some(Action::Skip { origin }) => {
            find(&letters, origin)?;
            skip(&kafka, origin, TIMEOUT).await?;
            println!("{origin} is skipped");
        }
    }
    Ok(ExitKind::AsPromised)
}

async fn replay_each(kafka: &KafkaConfig) -> anyhow::Result<()> {
    let report = replay_all(kafka, TIMEOUT).await?;
    println!(
        "{} are in {} again: each is processed, or becomes a dead letter again",
        report.replayed,
        orders_topic(kafka)
    );
    for origin in &report.too_large {
        println!("{origin} is larger than that topic accepts, and stays");
    }
    for (origin, why) in &report.failed {
        println!("{origin} was not replayed, and stays: {why:#}");
    }
    let left = report.failed.len() + report.not_tried;
    match report.failed.into_iter().next() {
        None => Ok(()),
        Some((origin, why)) => Err(why.context(format!("{left} were not replayed, the first of them {origin}"))),
    }
}

fn find<'a>(letters: &'a [DeadLetter], origin: &str) -> anyhow::Result<&'a DeadLetter> {
    letters.iter().find(|letter| letter.origin == origin).with_context(|| {
        format!("there is no dead letter {origin}, or it was replayed or skipped; `oversold dead-letters` lists them")
    })
}

fn list(letters: &[DeadLetter], kafka: &KafkaConfig, json: bool) -> anyhow::Result<()> {
    if json {
        println!("{}", ascii(&serde_json::to_string_pretty(letters)?));
        return Ok(());
    }
    if letters.is_empty() {
        println!("no dead letters in {}", dead_letter_topic(kafka));
    }
    for letter in letters {
        println!(
            "{}  {} ({})",
            letter.origin,
            printable(&letter.reason),
            attempts(letter)
        );
    }
    Ok(())
}

fn show(letter: &DeadLetter) {
    println!("origin    {}", letter.origin);
    println!("reason    {}", printable(&letter.reason));
    println!("attempts  {}", letter.attempts);
    let mut rest = letter.payload.chars();
    let shown: String = rest.by_ref().take(MAX_SHOWN_CHARS).collect();
    println!("payload   {}", shown.escape_debug());
    let left = rest.as_str().len();
    if left > 0 {
        println!("          and {left} more bytes; `list --json` has them");
    }
}

fn attempts(letter: &DeadLetter) -> String {
    match letter.attempts {
        0 => "not tried".to_owned(),
        1 => "tried once".to_owned(),
        attempts => format!("tried {attempts} times"),
    }
}

/// The text with its control characters and other invisible ones escaped.
fn printable(text: &str) -> String {
    let mut printable = String::with_capacity(text.len());
    for character in text.chars() {
        match character {
            '"' | '\'' => printable.push(character),
            _ => printable.extend(character.escape_debug()),
        }
    }
    printable
}

/// JSON with everything but ASCII escaped, and DEL: JSON itself escapes only the control characters
/// below it.
fn ascii(json: &str) -> String {
    let mut ascii = String::with_capacity(json.len());
    for character in json.chars() {
        if character.is_ascii() && character != '\x7f' {
            ascii.push(character);
        } else {
            let mut units = [0; 2];
            let units = character.encode_utf16(&mut units);
            ascii.extend(units.iter().map(|unit| format!("\\u{unit:04x}")));
        }
    }
    ascii
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn what_is_printed_stays_readable() {
        assert_eq!(printable("expected `,` or \"é\" at 1"), "expected `,` or \"é\" at 1");
        assert_eq!(
            printable("\u{1b}[2J\u{9b}1m\n\u{202e}"),
            "\\u{1b}[2J\\u{9b}1m\\n\\u{202e}"
        );
    }

    proptest! {
        #[test]
        fn nothing_controls_the_terminal(text in any::<String>()) {
            prop_assert!(!printable(&text).contains(char::is_control));
            let json = ascii(&serde_json::to_string(&text).expect("a string"));
            prop_assert!(json.bytes().all(|byte| (b' '..=b'~').contains(&byte)));
            prop_assert_eq!(serde_json::from_str::<String>(&json).expect("JSON"), text);
        }
    }
}
