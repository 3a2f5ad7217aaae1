//! `oversold rush`: every strategy through the same rush, one table, one verdict each.

use std::{
    env, fmt,
    fs::{self, File},
    io::{BufWriter, IsTerminal, Write, stderr, stdout},
    path::Path,
    time::Duration,
};

use anyhow::{Context, ensure};
use box_office::{Invariant, Limits, Promise, Promises, Service};
use comfy_table::{ColumnConstraint, ContentArrangement, Table, presets};
use harness::{
    backends::{self, Durability, Services},
    judge::Conclusion,
    rush::{Answers, Latency, Program, Report, Rush},
};
use indicatif::ProgressBar;
use serde::Serialize;

use crate::{
    Ended, RushArgs,
    bench::MedianRange,
    levels::SelectedStrategy,
    machine::{Machine, commit, this_command},
};

/// Runs the rush on every chosen strategy, and prints the table.
pub(crate) async fn rush(args: &RushArgs) -> anyhow::Result<Ended> {
    let mut chosen = vec![];
    for name in &args.levels {
        chosen.extend(SelectedStrategy::trail(name)?);
    }
    if chosen.is_empty() {
        chosen = SelectedStrategy::whole_trail();
    }
    for choice in &chosen {
        fits(args, choice)?;
    }
    if let Some(folder) = &args.history {
        fs::create_dir_all(folder).with_context(|| format!("making {}", folder.display()))?;
    }
    // Before the run: nobody should wait for figures that can't be written, and the file is no change to the commit.
    let commit = commit();
    let json = args.json.as_deref().map(create).transpose()?;
    let needs: Vec<Service> = chosen
        .iter()
        .flat_map(|choice| choice.strategy.needs)
        .copied()
        .collect();
    let services = Services::find(Durability::Durable, &needs).await?;

    println!(
        "{} buyers, {} tickets, {} instance{}",
        args.buyers,
        args.capacity,
        args.instances,
        if args.instances == 1 { "" } else { "s" }
    );
    let mut table = Table::new();
    table
        .load_style(presets::UTF8_FULL_CONDENSED)
        .set_content_arrangement(ContentArrangement::Dynamic);
    if !stdout().is_terminal() {
        table.set_width(ALL_COLUMNS);
    }
    let room = table.width().is_none_or(|width| width >= ALL_COLUMNS);
    let shown = |column: usize| room || !WHERE_THERE_IS_ROOM.contains(&COLUMNS[column]);
    table.set_header(
        COLUMNS
            .iter()
            .enumerate()
            .filter(|&(number, _)| shown(number))
            .map(|(_, name)| *name),
    );
    for number in 1..table.column_count() - 1 {
        let column = table.column_mut(number).expect("the header has it");
        column.set_constraint(ColumnConstraint::ContentWidth);
    }
    let mut results = vec![];
    // Strategy after strategy in each round: what else the machine does meanwhile meets them all.
    let mut rounds: Vec<Vec<Outcome>> = chosen.iter().map(|_| vec![]).collect();
    for round in 1..=args.rounds {
        for (choice, outcomes) in chosen.iter().zip(&mut rounds) {
            let outcome = one(args, choice, &services, round).await;
            outcomes.push(outcome.with_context(|| choice.name())?);
        }
    }
    for outcomes in rounds {
        let result = in_the_middle(outcomes).context("a rush has a round")?;
        let row = result.row().into_iter().enumerate();
        table.add_row(row.filter(|&(number, _)| shown(number)).map(|(_, cell)| cell));
        results.push(result);
    }
    println!("{table}");
    for result in &results {
        let retries = match result.retries {
            0 => String::new(),
            retries => format!(", {retries} retries"),
        };
        println!("{}: {}{retries}", result.strategy, result.seen);
        if let Some(completed_ms) = result.all_completed_ms {
            println!(
                "    all answered after {:.0} ms, all completed after {completed_ms:.0} ms",
                result.all_answered_ms
            );
        }
        if let Some(rounds) = &result.rounds {
            println!("    {rounds}");
        }
        if result.unanswered > 0 {
            println!(
                "    {} clicks never got an answer; no latency counts them",
                result.unanswered
            );
        }
        println!("    promised: {}; verdict: {}", result.promises, result.verdict);
    }
    let ended = results
        .iter()
        .map(|result| result.ended)
        .max()
        .unwrap_or(Ended::AsPromised);

    if let Some(json) = json {
        let figures = Figures {
            command: this_command(),
            commit,
            release: !cfg!(debug_assertions),
            machine: Machine::this(),
            postgres: services.postgres.report().clone(),
            redis: services.redis.as_ref().map(|redis| redis.report().clone()),
            kafka: services.kafka.as_ref().map(|kafka| kafka.report().clone()),
            capacity: args.capacity,
            buyers: args.buyers,
            instances: args.instances,
            work_ms: args.work_ms,
            strategies: &results,
        };
        let mut json = BufWriter::new(json);
        serde_json::to_writer_pretty(&mut json, &figures)?;
        writeln!(json)?;
        json.flush()?;
    }
    Ok(ended)
}

pub(crate) fn create(path: &Path) -> anyhow::Result<File> {
    File::create(path).with_context(|| format!("writing {}", path.display()))
}

/// Whether the servers take as many connections as there are requests at once. Whoever has none would wait for one, with the gate closed.
fn fits(args: &RushArgs, choice: &SelectedStrategy) -> anyhow::Result<()> {
    /// For what is asked beside the rush, such as for the metrics.
    const SPARE: usize = 8;

    let requests = u64::from(args.buyers) * u64::from(clicks(args, choice));
    let most = (Limits::default().connections - SPARE) as u64 * u64::from(args.instances);
    ensure!(
        requests <= most,
        "{} buyers with {} click(s) each on {} are {requests} connections at once; {} instance(s) take {most}: \
         fewer --buyers or --clicks, or more --instances",
        args.buyers,
        clicks(args, choice),
        choice.name(),
        args.instances,
    );
    Ok(())
}

fn clicks(args: &RushArgs, choice: &SelectedStrategy) -> u32 {
    args.clicks.unwrap_or(choice.strategy.clicks)
}

/// Of several rounds, the one that is shown: the middle one by its last answer, among those that ended worst.
fn in_the_middle(mut outcomes: Vec<Outcome>) -> Option<Outcome> {
    let rounds = Rounds::of(&outcomes);
    let worst = outcomes.iter().map(|outcome| outcome.ended).max()?;
    outcomes.retain(|outcome| outcome.ended == worst);
    outcomes.sort_by(|a, b| a.all_answered_ms.total_cmp(&b.all_answered_ms));
    let middle = outcomes.swap_remove((outcomes.len() - 1) / 2);
    Some(Outcome { rounds, ..middle })
}

async fn one(args: &RushArgs, choice: &SelectedStrategy, services: &Services, round: u32) -> anyhow::Result<Outcome> {
    let rush = Rush {
        capacity: args.capacity,
        buyers: args.buyers,
        clicks: clicks(args, choice),
        instances: args.instances as usize,
        work: Duration::from_millis(args.work_ms.into()),
        ..Rush::default()
    };
    let program = Program::new(env::current_exe()?)
        .argument("serve")
        .argument(choice.level.name);

    let progress = stderr().is_terminal().then(ProgressBar::new_spinner);
    if let Some(progress) = &progress {
        progress.set_message(format!("{}: the buyers come", choice.name()));
        progress.enable_steady_tick(Duration::from_millis(100));
    }
    let stand = services.environment(choice.strategy.schema).await?;
    let report = rush.run_on(&stand, &program, choice.level, choice.strategy).await;
    if let Some(progress) = progress {
        progress.finish_and_clear();
    }
    let report = report?;

    if let Some(folder) = &args.history {
        let name = choice.name().replace('/', "-");
        let name = match args.rounds {
            1 => name,
            _ => format!("{name}-{round}"),
        };
        let path = folder.join(format!("{name}.jsonl"));
        let mut file = BufWriter::new(create(&path)?);
        report.history.write(&mut file)?;
        file.flush()?;
    }
    Ok(Outcome::new(choice, &rush, &report))
}

/// The figures of one run of this command. The names are stable.
#[derive(Serialize)]
struct Figures<'a> {
    command: String,
    commit: Option<String>,
    release: bool,
    machine: Machine,
    postgres: backends::Report,
    #[serde(skip_serializing_if = "Option::is_none")]
    redis: Option<backends::Report>,
    #[serde(skip_serializing_if = "Option::is_none")]
    kafka: Option<backends::Report>,
    capacity: u32,
    buyers: u32,
    instances: u32,
    work_ms: u32,
    strategies: &'a [Outcome],
}

/// What came of one strategy.
#[derive(Serialize)]
struct Outcome {
    strategy: String,
    promises: String,
    clicks: u32,
    requests: usize,
    sold: u64,
    stock: Option<i64>,
    oversold_by: u64,
    duplicates: u64,
    answers: Answers,
    /// Answers in a second, until everybody had one.
    requests_a_second: f64,
    /// Tickets in a second, until nobody waited for one any more.
    sales_a_second: f64,
    took_ms: f64,
    /// The first clock: from a buyer's first click to the last answer to it.
    answered: Latency,
    /// Clicks that never got one, which are left out there.
    #[serde(skip_serializing_if = "is_zero")]
    unanswered: u64,
    /// When the last of them was answered, after the gate had opened.
    all_answered_ms: f64,
    /// The second clock: from the first click to the final state. `null` where the answer is final.
    completed: Option<Latency>,
    /// When the last order was final; `null` likewise.
    all_completed_ms: Option<f64>,
    greatest_overlap: u64,
    #[serde(skip_serializing_if = "is_zero")]
    retries: u64,
    client_share: f64,
    broken: Vec<Invariant>,
    seen: String,
    verdict: String,
    /// How far apart the rounds lie, if there were several.
    #[serde(skip_serializing_if = "Option::is_none")]
    rounds: Option<Rounds>,
    #[serde(skip)]
    ended: Ended,
}

/// Several rounds of one strategy: median and range.
#[derive(Serialize)]
struct Rounds {
    times: usize,
    requests_a_second: MedianRange,
    p99_ms: MedianRange,
    all_answered_ms: MedianRange,
    all_completed_ms: Option<MedianRange>,
}

impl Rounds {
    fn of(outcomes: &[Outcome]) -> Option<Self> {
        let spread = |figure: fn(&Outcome) -> f64| MedianRange::of(outcomes.iter().map(figure));
        (outcomes.len() > 1).then_some(())?;
        Some(Self {
            times: outcomes.len(),
            requests_a_second: spread(|outcome| outcome.requests_a_second)?,
            p99_ms: spread(|outcome| outcome.answered.p99_ms)?,
            all_answered_ms: spread(|outcome| outcome.all_answered_ms)?,
            all_completed_ms: MedianRange::of(outcomes.iter().filter_map(|outcome| outcome.all_completed_ms)),
        })
    }
}

impl fmt::Display for Rounds {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "median (range) of {} rounds: {} req/s; all answered after {} ms",
            self.times, self.requests_a_second, self.all_answered_ms
        )?;
        match &self.all_completed_ms {
            Some(completed_ms) => write!(f, ", all completed after {completed_ms} ms"),
            None => Ok(()),
        }
    }
}

const COLUMNS: [&str; 12] = [
    "strategy",
    "sold",
    "oversold\nby",
    "stock",
    "duplicates",
    "201, 202 /\n409 / 503",
    "req/s",
    "answered, ms\np50 / p95 / p99",
    "completed, ms\np50 / p95",
    "overlap",
    "client",
    "verdict",
];

/// How wide the table is with all of them. Where there is no terminal to tell, it is.
const ALL_COLUMNS: u16 = 170;

/// These are left out on a terminal that is not so wide.
const WHERE_THERE_IS_ROOM: [&str; 3] = ["stock", "overlap", "client"];

impl Outcome {
    fn new(choice: &SelectedStrategy, rush: &Rush, report: &Report) -> Self {
        let promises = choice.strategy.guarantee.on(rush.instances);
        let verdict = &report.verdict;
        let conclusion = verdict.conclude(&promises);
        let broken: Vec<Invariant> = verdict.findings.iter().map(|finding| finding.invariant).collect();
        Self {
            strategy: choice.name(),
            promises: crate::list::in_words(&promises),
            clicks: rush.clicks,
            requests: report.history.requests.len(),
            sold: verdict.tally.sold,
            stock: verdict.tally.stock,
            oversold_by: verdict.tally.oversold_by,
            duplicates: verdict.tally.duplicates,
            answers: report.answers,
            requests_a_second: report.requests_a_second().round(),
            sales_a_second: (report.sales_a_second() * 10.0).round() / 10.0,
            took_ms: in_ms(report.took),
            answered: report.answered,
            unanswered: report.unanswered as u64,
            all_answered_ms: in_ms(report.all_answered),
            completed: report.completed,
            all_completed_ms: report.all_completed.map(in_ms),
            greatest_overlap: verdict.coverage.greatest_overlap,
            retries: report.retries,
            client_share: (report.client_share * 1000.0).round() / 1000.0,
            seen: seen(&broken, &promises, report, rush),
            broken,
            verdict: conclusion.to_string(),
            rounds: None,
            ended: match conclusion {
                Conclusion::AsPromised => Ended::AsPromised,
                Conclusion::Broken(_) => Ended::Broken,
                Conclusion::Inconclusive(_) => Ended::Inconclusive,
            },
        }
    }

    fn row(&self) -> [String; COLUMNS.len()] {
        let Answers {
            confirmed,
            accepted,
            sold_out,
            already_reserved,
            otherwise_refused,
            undecided,
            ..
        } = self.answers;
        let Latency {
            p50_ms, p95_ms, p99_ms, ..
        } = self.answered;
        [
            self.strategy.clone(),
            self.sold.to_string(),
            self.oversold_by.to_string(),
            self.stock.map_or_else(|| "?".to_owned(), |stock| stock.to_string()),
            self.duplicates.to_string(),
            format!(
                "{} / {} / {undecided}",
                confirmed + accepted,
                sold_out + already_reserved + otherwise_refused
            ),
            format!("{:.0}", self.requests_a_second),
            format!("{p50_ms:.0} / {p95_ms:.0} / {p99_ms:.0}"),
            // Where there is no later state, who has the answer has it all.
            self.completed.map_or_else(
                || "as answered".to_owned(),
                |Latency { p50_ms, p95_ms, .. }| format!("{p50_ms:.0} / {p95_ms:.0}"),
            ),
            self.greatest_overlap.to_string(),
            format!("{:.0} %", self.client_share * 100.0),
            self.verdict.clone(),
        ]
    }
}

/// To a tenth of a millisecond.
fn in_ms(time: Duration) -> f64 {
    (time.as_secs_f64() * 1e4).round() / 10.0
}

fn is_zero(number: &u64) -> bool {
    *number == 0
}

/// One line on what the rush brought to light.
fn seen(broken: &[Invariant], promises: &Promises, report: &Report, rush: &Rush) -> String {
    let tally = &report.verdict.tally;
    let Some(first) = broken.first() else {
        return format!("{} sold of {}, nothing broken", tally.sold, rush.capacity);
    };
    let codes: Vec<&str> = broken.iter().map(|invariant| invariant.code()).collect();
    let what = match first {
        Invariant::NoDuplicate => format!("{} duplicate reservations", tally.duplicates),
        _ => format!("{} sold of {}", tally.sold, rush.capacity),
    };
    let on_purpose = broken
        .iter()
        .all(|&invariant| promises.about(invariant) != Promise::Keeps);
    let comment = if on_purpose {
        " This strategy exists to show it."
    } else {
        ""
    };
    format!("BROKEN ({}): {what}.{comment}", codes.join(", "))
}
