//! `oversold dead-letters`: lists, shows and replays the messages in LV.4's dead-letter topic.

use std::time::Duration;

use anyhow::Context;
use box_office::{KafkaConfig, kafka_bootstrap_servers, kafka_prefix};
use clap::{Args, Subcommand};
use lv4_kafka::pipeline::{
    DeadLetter, Undelivered, dead_letter_topic, list_dead_letters, orders_topic, replay, replay_all,
};
use rdkafka::error::KafkaError;

use crate::exit::ExitKind;

/// Time-out of each request to Kafka.
const TIMEOUT: Duration = Duration::from_secs(5);

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
        Some(Action::Replay { origin: None, .. }) => {
            let replayed = replay_all(&kafka, TIMEOUT).await?;
            println!(
                "{replayed} are in {} again: each is processed, or becomes a dead letter again",
                orders_topic(&kafka)
            );
            for letter in letters.iter().filter(|letter| !letter.is_replayable()) {
                println!("{} is larger than that topic accepts, and stays", letter.origin);
            }
        }
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
    }
    Ok(ExitKind::AsPromised)
}

fn find<'a>(letters: &'a [DeadLetter], origin: &str) -> anyhow::Result<&'a DeadLetter> {
    letters.iter().find(|letter| letter.origin == origin).with_context(|| {
        format!("there is no dead letter {origin}, or it was replayed; `oversold dead-letters` lists them")
    })
}

fn list(letters: &[DeadLetter], kafka: &KafkaConfig, json: bool) -> anyhow::Result<()> {
    if json {
        println!("{}", serde_json::to_string_pretty(letters)?);
        return Ok(());
    }
    if letters.is_empty() {
        println!("no dead letters in {}", dead_letter_topic(kafka));
    }
    for letter in letters {
        println!("{}  {} ({})", letter.origin, letter.reason, attempts(letter));
    }
    Ok(())
}

fn show(letter: &DeadLetter) {
    println!("origin    {}", letter.origin);
    println!("reason    {}", letter.reason);
    println!("attempts  {}", letter.attempts);
    // A payload may be anything: escaped, it can't control the terminal.
    println!("payload   {}", letter.payload.escape_debug());
}

fn attempts(letter: &DeadLetter) -> String {
    match letter.attempts {
        1 => "tried once".to_owned(),
        attempts => format!("tried {attempts} times"),
    }
}
