//! `oversold rush`: every strategy through the same rush, one table, one verdict each.

mod table;

use std::{
    fs::{self, File},
    io::{BufWriter, IsTerminal, Write, stderr},
    num::NonZeroU32,
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context, ensure};
use box_office::{Improvement, Improvements, Invariant, Limits, Promise, Promises, Service};
use clap::Args;
use harness::{
    backends::{Durability, Services},
    rush::{Program, Report, Rush},
};
use indicatif::ProgressBar;
#[cfg(feature = "lv4")]
use lv4_kafka::payment_service::Mix;

use crate::{
    cli::number,
    commands::list,
    exit::ExitKind,
    interrupt::Signals,
    levels::SelectedStrategy,
    results::{
        ResultFile, RunMetadata,
        rush::{ByPriority, Payments, Rounds, RushResults, StrategyResult},
    },
};

#[derive(Args)]
pub(crate) struct RushArgs {
    /// Levels or strategies to run [default: the main strategies of all levels].
    #[arg(value_name = "LEVEL[/STRATEGY]")]
    levels: Vec<String>,
    /// Tickets on sale.
    #[arg(long, default_value_t = 100, value_parser = number(1..=1_000_000))]
    capacity: u32,
    /// Buyers, all at once.
    #[arg(long, default_value_t = 1000, value_parser = number(1..=20_000))]
    buyers: u32,
    /// Requests that each buyer sends at once, each under its own key [default: as many as put the strategy's guarantee to the test].
    #[arg(long, value_parser = number(1..=50))]
    clicks: Option<u32>,
    /// Server processes that share the buyers.
    #[arg(long, default_value_t = 1, value_parser = number(1..=16))]
    instances: u32,
    /// Simulated work inside the critical section, in milliseconds.
    #[arg(long, default_value_t = 0, value_parser = number(0..=10_000))]
    work_ms: u32,
    #[command(flatten)]
    sale: SaleArgs,
    /// Buyers whom the admin has named as VIPs, and who ask for priority: the last of all. With --order-priority, by default 4.
    #[arg(long, value_name = "N", value_parser = number(1..=20_000))]
    vip: Option<u32>,
    /// Repetitions, each on a fresh sale. The round in the middle is shown, with the range of all rounds next to it; a round that did
    /// not end as promised takes precedence.
    #[arg(long, default_value_t = 1, value_parser = number(1..=100))]
    rounds: u32,
    /// Write the results, with machine, commit and settings, to this file as JSON.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Write every request and row to this folder, one file of JSON lines for each strategy.
    #[arg(long, value_name = "FOLDER")]
    history: Option<PathBuf>,
}

/// How many VIPs are decided for each other order, unless a rush says so.
const VIPS_IN_A_ROW: Option<NonZeroU32> = NonZeroU32::new(4);

impl RushArgs {
    /// What the servers are started with.
    fn improvements(&self) -> Improvements {
        let mut improvements = self.sale.improvements();
        if self.vip.is_some() {
            improvements.order_priority = improvements.order_priority.or(VIPS_IN_A_ROW);
        }
        improvements
    }
}

/// What the servers of a sale are started with.
#[derive(Args)]
pub(crate) struct SaleArgs {
    #[command(flatten)]
    improvements: Improvements,
    /// Let a payment service run beside the sale, and hold each ticket until it is paid for: how often a charge is treated how, such as
    /// approve=90,decline=8,hang=2.
    #[cfg(feature = "lv4")]
    #[arg(long, value_name = "NAME=WEIGHT,…", conflicts_with = "payment_url")]
    payments: Option<Mix>,
}

impl SaleArgs {
    /// How the payment service is started, if one runs beside the sale.
    pub(crate) fn payment_service(&self) -> anyhow::Result<Option<Program>> {
        #[cfg(feature = "lv4")]
        if let Some(mix) = &self.payments {
            let program = Program::new(std::env::current_exe()?).argument("payment-service");
            return Ok(Some(program.argument("--behave").argument(&mix.to_string())));
        }
        Ok(None)
    }

    /// What was given besides the payment service: the servers' variables and their values.
    pub(crate) fn given(&self) -> Vec<(&'static str, String)> {
        self.improvements.variables()
    }

    /// How the payment service treats its buyers, if one runs beside the sale.
    #[cfg(feature = "lv4")]
    pub(crate) fn payments(&self) -> Option<String> {
        self.payments.as_ref().map(Mix::to_string)
    }

    /// What the servers are started with. The address of a payment service beside the rush is known once it runs.
    pub(crate) fn improvements(&self) -> Improvements {
        let improvements = self.improvements.clone();
        #[cfg(feature = "lv4")]
        if self.payments.is_some() {
            return harness::payments::with_short_holds(Improvements {
                payment_url: "http://127.0.0.1".parse().ok(),
                ..improvements
            });
        }
        improvements
    }

    /// Checks that a strategy supports all of it.
    ///
    /// # Errors
    /// Names the first that it does not support.
    pub(crate) fn check(&self, selected: &SelectedStrategy) -> anyhow::Result<()> {
        ensure!(
            self.payment_service()?.is_none() || holds_tickets(selected),
            no_tickets_are_held(&selected.name()),
        );
        Ok(self.improvements().check(selected.level, selected.strategy)?)
    }
}

/// Runs the rush on every selected strategy, and prints the table.
pub(crate) async fn run(args: &RushArgs) -> anyhow::Result<ExitKind> {
    let selected = select(args)?;
    for strategy in &selected {
        check_connections(args, strategy)?;
        let has_priority = strategy.strategy.improvements.contains(&Improvement::Priority);
        ensure!(
            args.vip.is_none() || has_priority,
            "--vip is given, but {} has no priority; lv4/single-writer does",
            strategy.name(),
        );
        args.sale.check(strategy)?;
    }
    if let Some(vips) = args.vip {
        let buyers = args.buyers;
        ensure!(vips <= buyers, "--vip is {vips}, but there are only {buyers} --buyers");
    }
    if let Some(folder) = &args.history {
        fs::create_dir_all(folder).with_context(|| format!("making {}", folder.display()))?;
    }
    let metadata = RunMetadata::of_this_run();
    let json = args.json.as_deref().map(ResultFile::open).transpose()?;
    let mut signals = Signals::listen()?;
    let mut rounds: Vec<Vec<JudgedRound>> = selected.iter().map(|_| vec![]).collect();
    let ended = signals.or_end(run_rounds(args, &selected, metadata, &mut rounds)).await;
    let counts: Vec<usize> = rounds.iter().map(Vec::len).collect();

    let (strategies, exits): (Vec<StrategyResult>, Vec<ExitKind>) = rounds
        .into_iter()
        .filter_map(middle_round)
        .map(|middle| (middle.result, middle.exit))
        .unzip();
    if !strategies.is_empty() {
        table::print(&strategies);
        table::print_verdicts(&strategies);
        if ended.is_err() {
            print_incomplete(args.rounds, &selected, &counts);
        }
    }
    let metadata = ended?;
    if let Some(json) = json {
        let results = RushResults {
            metadata,
            capacity: args.capacity,
            buyers: args.buyers,
            instances: args.instances,
            work_ms: args.work_ms,
            strategies,
        };
        json.write(&results)?;
    }
    Ok(exits.into_iter().max().unwrap_or(ExitKind::AsPromised))
}

fn holds_tickets(selected: &SelectedStrategy) -> bool {
    selected.strategy.improvements.contains(&Improvement::Saga)
}

fn no_tickets_are_held(name: &str) -> String {
    format!("--payments is given, but {name} holds no tickets; lv4/single-writer does")
}

/// The strategies to run. Where payments are taken, those of a level that hold tickets.
fn select(args: &RushArgs) -> anyhow::Result<Vec<SelectedStrategy>> {
    let takes_payments = args.sale.payment_service()?.is_some();
    if args.levels.is_empty() {
        let mut selected = SelectedStrategy::all_main_strategies();
        selected.retain(|strategy| !takes_payments || holds_tickets(strategy));
        return Ok(selected);
    }
    let mut selected = vec![];
    for name in &args.levels {
        let mut named = SelectedStrategy::main_strategies(name)?;
        named.retain(|strategy| !takes_payments || holds_tickets(strategy));
        ensure!(!named.is_empty(), no_tickets_are_held(name));
        selected.append(&mut named);
    }
    Ok(selected)
}

/// Runs all rounds of all strategies. `rounds` has those of each strategy, also after an error. Returns the metadata with what they ran on.
async fn run_rounds(
    args: &RushArgs,
    selected: &[SelectedStrategy],
    metadata: RunMetadata,
    rounds: &mut [Vec<JudgedRound>],
) -> anyhow::Result<RunMetadata> {
    let needs = selected.iter().flat_map(|it| it.strategy.needs).copied();
    let services = Services::find(Durability::Durable, &needs.collect::<Vec<Service>>()).await?;
    let metadata = metadata.with_services(&services)?;
    println!(
        "{} buyers, {} tickets, {} instance{}",
        args.buyers,
        args.capacity,
        args.instances,
        if args.instances == 1 { "" } else { "s" }
    );
    println!("{}", metadata.conditions());
    // In each round one strategy after another: other load on the machine affects them alike.
    for number in 1..=args.rounds {
        for (strategy, rounds) in selected.iter().zip(rounds.iter_mut()) {
            let round = run_round(args, strategy, &services, number).await;
            rounds.push(round.with_context(|| strategy.name())?);
        }
    }
    Ok(metadata)
}

/// Says that the rush ended early, and how many rounds of each strategy the table shows.
fn print_incomplete(rounds: u32, selected: &[SelectedStrategy], counts: &[usize]) {
    let counts = selected.iter().zip(counts);
    let counts: Vec<String> = counts.map(|(it, count)| format!("{} {count}", it.name())).collect();
    println!(
        "INCOMPLETE: the run ended early, and writes no results. Rounds, of {rounds}: {}",
        counts.join(", ")
    );
}

/// Checks that the servers accept as many connections as there are requests at once. A request without one would wait for it while the
/// gate stays closed.
fn check_connections(args: &RushArgs, selected: &SelectedStrategy) -> anyhow::Result<()> {
    /// For requests beside the rush, such as those for the metrics.
    const SPARE: usize = 8;

    let requests = u64::from(args.buyers) * u64::from(clicks(args, selected));
    let most = (Limits::default().connections - SPARE) as u64 * u64::from(args.instances);
    ensure!(
        requests <= most,
        "{} buyers with {} click(s) each on {} are {requests} connections at once; {} instance(s) take {most}: \
         fewer --buyers or --clicks, or more --instances",
        args.buyers,
        clicks(args, selected),
        selected.name(),
        args.instances,
    );
    Ok(())
}

fn clicks(args: &RushArgs, selected: &SelectedStrategy) -> u32 {
    args.clicks.unwrap_or(selected.strategy.clicks)
}

/// One round of one strategy, and how it ended.
struct JudgedRound {
    result: StrategyResult,
    exit: ExitKind,
}

/// Of several rounds, the one to show: the middle one by when every buyer knew the result, among those with the worst end.
fn middle_round(mut judged: Vec<JudgedRound>) -> Option<JudgedRound> {
    let rounds = Rounds::of(judged.iter().map(|round| &round.result));
    let worst = judged.iter().map(|round| round.exit).max()?;
    judged.retain(|round| round.exit == worst);
    judged.sort_by(|a, b| a.result.all_known_ms().total_cmp(&b.result.all_known_ms()));
    let mut middle = judged.swap_remove((judged.len() - 1) / 2);
    middle.result.rounds = rounds;
    Some(middle)
}

async fn run_round(
    args: &RushArgs,
    selected: &SelectedStrategy,
    services: &Services,
    number: u32,
) -> anyhow::Result<JudgedRound> {
    let rush = Rush {
        capacity: args.capacity,
        buyers: args.buyers,
        clicks: clicks(args, selected),
        instances: args.instances as usize,
        work: Duration::from_millis(args.work_ms.into()),
        improvements: args.improvements(),
        vips: args.vip.unwrap_or(0),
        payments: args.sale.payment_service()?,
        ..Rush::default()
    };
    let report = run_rush(&rush, selected, services).await?;
    if let Some(folder) = &args.history {
        let name = selected.name().replace('/', "-");
        let name = match args.rounds {
            1 => name,
            _ => format!("{name}-{number}"),
        };
        write_history(&folder.join(format!("{name}.jsonl")), &report)?;
    }
    Ok(JudgedRound::new(selected, &rush, &report))
}

/// Runs one rush, with a spinner on a terminal.
async fn run_rush(rush: &Rush, selected: &SelectedStrategy, services: &Services) -> anyhow::Result<Report> {
    let progress = stderr().is_terminal().then(ProgressBar::new_spinner);
    if let Some(progress) = &progress {
        progress.set_message(format!("{}: the rush is on", selected.name()));
        progress.enable_steady_tick(Duration::from_millis(100));
    }
    let environment = services.environment(selected.strategy.schema).await?;
    let report = rush
        .run_on(&environment, &selected.program()?, selected.level, selected.strategy)
        .await;
    if let Some(progress) = progress {
        progress.finish_and_clear();
    }
    report
}

/// Runs one rush, and prints its row of the table and its verdict.
///
/// # Errors
/// The rush could not be run.
pub(crate) async fn run_and_print(
    rush: &Rush,
    selected: &SelectedStrategy,
    services: &Services,
) -> anyhow::Result<ExitKind> {
    let report = run_rush(rush, selected, services).await?;
    let JudgedRound { result, exit } = JudgedRound::new(selected, rush, &report);
    table::print(std::slice::from_ref(&result));
    table::print_verdicts(&[result]);
    Ok(exit)
}

fn write_history(path: &Path, report: &Report) -> anyhow::Result<()> {
    let file = File::create(path).with_context(|| format!("writing {}", path.display()))?;
    let mut file = BufWriter::new(file);
    report.history.write(&mut file)?;
    file.flush()?;
    Ok(())
}

impl JudgedRound {
    fn new(selected: &SelectedStrategy, rush: &Rush, report: &Report) -> Self {
        let promises = rush
            .improvements
            .promises(selected.strategy.guarantee.on(rush.instances));
        let verdict = &report.verdict;
        let conclusion = verdict.conclude(&promises);
        let broken: Vec<Invariant> = verdict.findings.iter().map(|finding| finding.invariant).collect();
        let result = StrategyResult {
            strategy: selected.name(),
            promises: list::summary(&promises),
            clicks: rush.clicks,
            requests: report.history.requests.len(),
            sold: verdict.tally.sold,
            stock: verdict.tally.stock,
            oversold_by: verdict.tally.oversold_by,
            duplicates: verdict.tally.duplicates,
            answers: report.answers,
            requests_a_second: report.requests_a_second().round(),
            took_ms: in_ms(report.took),
            answered: report.answered,
            unanswered: report.unanswered as u64,
            all_answered_ms: in_ms(report.all_answered),
            completed: report.completed,
            all_completed_ms: report.all_completed.map(in_ms),
            last_sale_ms: report.last_sale.map(in_ms),
            greatest_overlap: verdict.coverage.greatest_overlap,
            retries: report.retries,
            payments: Payments::of(report),
            priority: ByPriority::of(rush, report),
            client_share: (report.client_share * 1000.0).round() / 1000.0,
            seen: observation(&broken, &promises, report, rush),
            broken,
            verdict: conclusion.to_string(),
            rounds: None,
        };
        Self {
            result,
            exit: ExitKind::from(&conclusion),
        }
    }
}

/// In milliseconds, to a tenth of one.
fn in_ms(time: Duration) -> f64 {
    (time.as_secs_f64() * 1e4).round() / 10.0
}

/// What the rush showed, in one line.
fn observation(broken: &[Invariant], promises: &Promises, report: &Report, rush: &Rush) -> String {
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
