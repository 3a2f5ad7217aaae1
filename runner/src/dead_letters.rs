//! `oversold dead-letters`: what LV.4 gave up, and a second chance for it.

use std::time::Duration;

use anyhow::Context;
use box_office::{KafkaConfig, kafka_bootstrap_servers, kafka_prefix};
use clap::{Args, Subcommand};
use lv4_kafka::pipeline::{
    DeadLetter, Undelivered, dead_letter_topic, list_dead_letters, orders_topic, replay, replay_all,
};
use rdkafka::error::KafkaError;

use crate::Ended;

/// How long Kafka may take for an answer.
const PATIENCE: Duration = Duration::from_secs(5);

#[derive(Args)]
pub(crate) struct DeadLettersArgs {
    #[command(subcommand)]
    what: Option<What>,
    /// The Kafka brokers to begin with.
    #[arg(long, global = true, env = "KAFKA_BOOTSTRAP_SERVERS", value_name = "HOST:PORT,…", value_parser = kafka_bootstrap_servers)]
    kafka_bootstrap_servers: Option<String>,
    /// What the name of every topic begins with, as the servers are told.
    #[arg(long, global = true, env = "KAFKA_PREFIX", value_name = "TEXT", default_value = "oversold.", value_parser = kafka_prefix)]
    kafka_prefix: String,
}

#[derive(Subcommand)]
enum What {
    /// List what waits there, each with its origin and the reason. This is what happens without a word, too.
    List {
        /// Print JSON: an array with an object for each letter.
        #[arg(long)]
        json: bool,
    },
    /// Show one letter with all that stands in it.
    Show {
        /// Where it came from, as `list` shows it: TOPIC/PARTITION/OFFSET.
        origin: String,
    },
    /// Send one back to where it came from, to be tried once more; or all of them.
    Replay {
        /// Where it came from, as `list` shows it: TOPIC/PARTITION/OFFSET.
        #[arg(required_unless_present = "all", conflicts_with = "all")]
        origin: Option<String>,
        /// All that `list` shows.
        #[arg(long)]
        all: bool,
    },
}

/// Kafka is named, and does not do as asked.
pub(crate) fn is_away(error: &anyhow::Error) -> bool {
    error.is::<KafkaError>() || error.is::<Undelivered>()
}

/// Does what is asked of the dead letters.
pub(crate) async fn run(args: &DeadLettersArgs) -> anyhow::Result<Ended> {
    let place = KafkaConfig {
        bootstrap_servers: args
            .kafka_bootstrap_servers
            .clone()
            .context("KAFKA_BOOTSTRAP_SERVERS (--kafka-bootstrap-servers) is not set; it takes the addresses of Kafka brokers, such as localhost:9092,localhost:9093")?,
        prefix: args.kafka_prefix.clone(),
        consumers: 0,
        session: PATIENCE,
    };
    let asked = place.clone();
    let letters = tokio::task::spawn_blocking(move || list_dead_letters(&asked, PATIENCE)).await??;
    match &args.what {
        None => list(&letters, &place, false)?,
        Some(What::List { json }) => list(&letters, &place, *json)?,
        Some(What::Show { origin }) => show(find(&letters, origin)?),
        Some(What::Replay { origin: None, .. }) => {
            let replayed = replay_all(&place, PATIENCE).await?;
            println!(
                "{replayed} are in {} again: each is decided, or it comes back here",
                orders_topic(&place)
            );
            for letter in letters.iter().filter(|letter| !letter.is_replayable()) {
                println!("{} is larger than that topic takes, and stays", letter.origin);
            }
        }
        Some(What::Replay {
            origin: Some(origin), ..
        }) => {
            find(&letters, origin)?;
            replay(&place, origin, PATIENCE).await?;
            println!(
                "{origin} is in {} again: it is decided, or it comes back here",
                orders_topic(&place)
            );
        }
    }
    Ok(Ended::AsPromised)
}

fn find<'a>(letters: &'a [DeadLetter], origin: &str) -> anyhow::Result<&'a DeadLetter> {
    letters.iter().find(|letter| letter.origin == origin).with_context(|| {
        format!("there is no dead letter {origin}, or it was replayed; `oversold dead-letters` lists them")
    })
}

fn list(letters: &[DeadLetter], place: &KafkaConfig, json: bool) -> anyhow::Result<()> {
    if json {
        println!("{}", serde_json::to_string_pretty(letters)?);
        return Ok(());
    }
    if letters.is_empty() {
        println!("no dead letters in {}", dead_letter_topic(place));
    }
    for letter in letters {
        println!("{}  {} ({})", letter.origin, letter.reason, tried(letter));
    }
    Ok(())
}

fn show(letter: &DeadLetter) {
    println!("origin    {}", letter.origin);
    println!("reason    {}", letter.reason);
    println!("attempts  {}", letter.attempts);
    // What stands in a message that nobody understands may be anything: on a terminal it must not act.
    println!("payload   {}", letter.payload.escape_debug());
}

fn tried(letter: &DeadLetter) -> String {
    match letter.attempts {
        1 => "tried once".to_owned(),
        attempts => format!("tried {attempts} times"),
    }
}
