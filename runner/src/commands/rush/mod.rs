//! `oversold rush`: every strategy through the same rush, one table, one verdict each.

mod table;

use std::{
    env,
    fs::{self, File},
    io::{BufWriter, IsTerminal, Write, stderr},
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
        rush::{Payments, Rounds, RushResults, StrategyResult},
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
    improvements: Improvements,
    /// Let a payment service run beside the rush, and hold each ticket until it is paid for: how often a charge is treated how, such as
    /// approve=90,decline=8,hang=2.
    #[cfg(feature = "lv4")]
    #[arg(long, value_name = "NAME=WEIGHT,…", conflicts_with = "payment_url")]
    payments: Option<Mix>,
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

impl RushArgs {
    /// How the payment service is started, if one runs beside the rush.
    fn payment_service(&self) -> anyhow::Result<Option<Program>> {
        #[cfg(feature = "lv4")]
        if let Some(mix) = &self.payments {
            let program = Program::new(env::current_exe()?).argument("payment-service");
            return Ok(Some(program.argument("--behave").argument(&mix.to_string())));
        }
        Ok(None)
    }

    /// What the servers are started with. With a payment service beside the rush, holds and payments are short: a rush waits for their
    /// end. The service's address is known once it runs.
    fn improvements(&self) -> Improvements {
        let improvements = self.improvements.clone();
        #[cfg(feature = "lv4")]
        if self.payments.is_some() {
            return Improvements {
                payment_url: "http://127.0.0.1".parse().ok(),
                hold: improvements.hold.or(Some(Duration::from_secs(5))),
                payment_timeout: improvements.payment_timeout.or(Some(Duration::from_secs(1))),
                ..improvements
            };
        }
        improvements
    }
}

/// Runs the rush on every selected strategy, and prints the table.
pub(crate) async fn run(args: &RushArgs) -> anyhow::Result<ExitKind> {
    let mut selected = vec![];
    for name in &args.levels {
        selected.extend(SelectedStrategy::main_strategies(name)?);
    }
    if selected.is_empty() {
        selected = SelectedStrategy::all_main_strategies();
    }
    let (takes_payments, improvements) = (args.payment_service()?.is_some(), args.improvements());
    for strategy in &selected {
        check_connections(args, strategy)?;
        let holds_tickets = strategy.strategy.improvements.contains(&Improvement::Saga);
        ensure!(
            !takes_payments || holds_tickets,
            "--payments is given, but {} holds no tickets; lv4/single-writer does",
            strategy.name(),
        );
        improvements.check(strategy.level, strategy.strategy)?;
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
        payments: args.payment_service()?,
        ..Rush::default()
    };
    let program = Program::new(env::current_exe()?)
        .argument("serve")
        .argument(selected.level.name);

    let progress = stderr().is_terminal().then(ProgressBar::new_spinner);
    if let Some(progress) = &progress {
        progress.set_message(format!("{}: the rush is on", selected.name()));
        progress.enable_steady_tick(Duration::from_millis(100));
    }
    let environment = services.environment(selected.strategy.schema).await?;
    let report = rush
        .run_on(&environment, &program, selected.level, selected.strategy)
        .await;
    if let Some(progress) = progress {
        progress.finish_and_clear();
    }
    let report = report?;
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

fn write_history(path: &Path, report: &Report) -> anyhow::Result<()> {
    let file = File::create(path).with_context(|| format!("writing {}", path.display()))?;
    let mut file = BufWriter::new(file);
    report.history.write(&mut file)?;
    file.flush()?;
    Ok(())
}

impl JudgedRound {
    fn new(selected: &SelectedStrategy, rush: &Rush, report: &Report) -> Self {
        let promises = selected.strategy.guarantee.on(rush.instances);
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
