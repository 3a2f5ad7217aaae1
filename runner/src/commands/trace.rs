//! `oversold trace LEVEL[/STRATEGY]`: one exact interleaving.

use std::fmt;

use anyhow::ensure;
use box_office::Service;
use clap::Args;
use harness::{
    judge::{Verdict, judge},
    schedule::{RequestHandle, Schedule, ScheduleRunner},
};

use crate::{cli::number, exit::ExitKind, levels::SelectedStrategy};

#[derive(Args)]
pub(crate) struct TraceArgs {
    /// A level, or one strategy as LEVEL/STRATEGY.
    #[arg(value_name = "LEVEL[/STRATEGY]")]
    level: String,
    /// The schedule, one letter for each step: A, B and C are Ann, Bob and Carol, a lower-case letter is that buyer's second click.
    /// After the last letter all requests run to an answer [default: both look before either writes].
    #[arg(long, value_name = "LETTERS", value_parser = Order::parse)]
    order: Option<Order>,
    /// Tickets on sale [default: 1, or 2 with a second click].
    #[arg(long, requires = "order", value_parser = number(1..=10))]
    capacity: Option<u32>,
    /// Print Markdown, as the book includes it.
    #[arg(long)]
    markdown: bool,
}

/// Forces one exact order of steps, and prints the table and the verdict.
pub(crate) async fn run(args: &TraceArgs) -> anyhow::Result<ExitKind> {
    let selected = SelectedStrategy::one(&args.level)?;
    ensure!(
        !selected.strategy.needs.contains(&Service::Kafka),
        "there is no trace of {}: its orders are decided by consumers, and a trace schedules the steps of requests",
        selected.name()
    );
    let runner = ScheduleRunner::of(selected.strategy).await?;
    let (schedule, title) = match &args.order {
        None => (
            runner.both_read_before_either_writes().await?,
            "both look before either writes".to_owned(),
        ),
        Some(order) => {
            let capacity = args.capacity.unwrap_or_else(|| order.default_capacity());
            let mut schedule = runner.sale(capacity).await?;
            order.run(&mut schedule).await?;
            (schedule, format!("order {order}, {capacity} on sale"))
        }
    };
    if args.markdown {
        println!("{}", schedule.trace().markdown());
    } else {
        println!("{}: {title}\n{}", selected.name(), schedule.trace());
        print_verdict(&judge(&schedule.history().await?));
    }
    Ok(ExitKind::AsPromised)
}

fn print_verdict(verdict: &Verdict) {
    let tally = &verdict.tally;
    let stock = tally.stock.map_or_else(|| "?".to_owned(), |stock| stock.to_string());
    println!("{} sold of {}, stock {stock}", tally.sold, tally.capacity);
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
}

/// A schedule as letters, one for each step: `A`, `B` and `C` are Ann, Bob and Carol, a lower-case letter is that buyer's second click.
#[derive(Clone, Debug)]
pub(crate) struct Order(String);

const NAMES: [(char, &str); 3] = [('A', "Ann"), ('B', "Bob"), ('C', "Carol")];

impl Order {
    /// Parses the value of `--order`.
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

    /// One ticket; two with a second click, which would otherwise be refused as sold out.
    fn default_capacity(&self) -> u32 {
        if self.0.contains(char::is_lowercase) { 2 } else { 1 }
    }

    /// Moves the requests letter by letter, then all of them to an answer.
    async fn run(&self, schedule: &mut Schedule<'_>) -> anyhow::Result<()> {
        let mut requests: Vec<(char, RequestHandle)> = vec![];
        for (letter, name) in NAMES {
            let again = letter.to_ascii_lowercase();
            if !self.0.contains([letter, again]) {
                continue;
            }
            let first = schedule.buyer(name);
            requests.push((letter, first));
            if self.0.contains(again) {
                requests.push((again, schedule.click(first)));
            }
        }
        for letter in self.0.chars() {
            let request = requests
                .iter()
                .find(|&&(name, _)| name == letter)
                .map(|&(_, request)| request);
            match request {
                Some(request) if schedule.movable().contains(&request) => schedule.step(request).await?,
                // It is blocked, or has its answer.
                _ => eprintln!("{letter} can't move here: its turn passes"),
            }
        }
        schedule.run_all_to_completion().await
    }
}

impl fmt::Display for Order {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}
