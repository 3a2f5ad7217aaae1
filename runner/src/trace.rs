//! `oversold trace LEVEL[/STRATEGY]`.

use std::fmt;

use anyhow::ensure;
use box_office::Service;
use harness::{
    judge::judge,
    schedule::{RequestHandle, Schedule, ScheduleRunner},
};

use crate::{Ended, TraceArgs, levels::SelectedStrategy};

/// Forces one exact order of steps, and prints it and what came of it.
pub(crate) async fn trace(args: &TraceArgs) -> anyhow::Result<Ended> {
    let chosen = SelectedStrategy::one(&args.level)?;
    ensure!(
        !chosen.strategy.needs.contains(&Service::Kafka),
        "there is no trace of {}: its orders are decided by consumers, beside the requests whose steps a trace puts in order",
        chosen.name()
    );
    let rehearsal = ScheduleRunner::of(chosen.strategy).await?;
    let (script, title) = match &args.order {
        None => (
            rehearsal.both_read_before_either_writes().await?,
            "both look before either writes".to_owned(),
        ),
        Some(order) => {
            let capacity = args.capacity.unwrap_or_else(|| order.default_capacity());
            let mut script = rehearsal.sale(capacity).await?;
            order.run(&mut script).await?;
            (script, format!("order {order}, {capacity} on sale"))
        }
    };
    if args.markdown {
        println!("{}", script.trace().markdown());
        return Ok(Ended::AsPromised);
    }
    println!("{}: {title}\n{}", chosen.name(), script.trace());
    let verdict = judge(&script.history().await?);
    println!(
        "{} sold of {}, stock {}",
        verdict.tally.sold,
        verdict.tally.capacity,
        verdict
            .tally
            .stock
            .map_or_else(|| "?".to_owned(), |stock| stock.to_string())
    );
    if verdict.findings.is_empty() {
        println!("nothing broken");
    }
    for finding in &verdict.findings {
        println!(
            "BROKEN {} ({}): {}",
            finding.invariant.code(),
            finding.invariant.title(),
            finding.summary
        );
    }
    Ok(Ended::AsPromised)
}

/// Whose turn it is, letter by letter: `A`, `B` and `C` are Ann, Bob and Carol, a small letter is that buyer's second click.
#[derive(Clone, Debug)]
pub(crate) struct Order(String);

const NAMES: [(char, &str); 3] = [('A', "Ann"), ('B', "Bob"), ('C', "Carol")];

impl Order {
    /// For the command line.
    pub(crate) fn parse(text: &str) -> Result<Self, String> {
        const TAKES: &str =
            "letters A, B, C for the buyers, and a, b, c for a second click of theirs, at most 60, such as ABAB";
        let known = |letter: char| NAMES.iter().any(|&(name, _)| name == letter.to_ascii_uppercase());
        if text.is_empty() || text.len() > 60 || !text.chars().all(known) {
            return Err(TAKES.to_owned());
        }
        if text.chars().all(|letter| text.starts_with(letter)) {
            return Err("the letters of at least two requests, such as ABAB".to_owned());
        }
        Ok(Self(text.to_owned()))
    }

    /// One ticket for all buyers; but a second click needs another ticket to be more than a refusal.
    fn default_capacity(&self) -> u32 {
        if self.0.contains(char::is_lowercase) { 2 } else { 1 }
    }

    /// Moves the requests letter by letter, then everybody to an answer.
    async fn run(&self, script: &mut Schedule<'_>) -> anyhow::Result<()> {
        let mut lanes: Vec<(char, RequestHandle)> = vec![];
        for (letter, name) in NAMES {
            let again = letter.to_ascii_lowercase();
            if !self.0.contains([letter, again]) {
                continue;
            }
            let first = script.buyer(name);
            lanes.push((letter, first));
            if self.0.contains(again) {
                lanes.push((again, script.click(first)));
            }
        }
        for letter in self.0.chars() {
            let lane = lanes.iter().find(|&&(name, _)| name == letter).map(|&(_, lane)| lane);
            match lane {
                Some(lane) if script.movable().contains(&lane) => script.step(lane).await?,
                // It waits for somebody, or has its answer: its turn passes.
                _ => eprintln!("{letter} can't move here: its turn passes"),
            }
        }
        script.run_all_to_completion().await
    }
}

impl fmt::Display for Order {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}
