//! The command `oversold`: run the sale, look at it step by step, judge what was recorded.

mod bench;
#[cfg(feature = "lv4")]
mod dead_letters;
mod doctor;
mod judge;
mod levels;
mod list;
mod machine;
mod rush;
mod trace;

use std::{ops::RangeInclusive, path::PathBuf, process::ExitCode};

use bench::ToolMissing;
use box_office::{Settings, explain};
use clap::{Args, CommandFactory, Parser, Subcommand, error::ErrorKind};
use harness::backends::Missing;
use levels::SelectedStrategy;

/// What happens when 1,000 buyers go for 100 tickets in the same instant?
#[derive(Parser)]
#[command(name = "oversold", version, max_term_width = 100, arg_required_else_help = true)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Let all buyers in at once, and judge what came of it.
    Rush(RushArgs),
    /// Measure what one strategy sells in a second, beside what the database could do at most.
    Bench(BenchArgs),
    /// Serve a level over HTTP until it is told to stop.
    Serve {
        /// The level, or the strategy as LEVEL/STRATEGY.
        #[arg(value_name = "LEVEL[/STRATEGY]")]
        level: String,
        #[command(flatten)]
        settings: Box<Settings>,
    },
    /// Show one exact interleaving as a table: a lane for each buyer, a row for each step.
    Trace(TraceArgs),
    /// Judge a recorded history.
    Judge {
        /// A history as JSON lines, such as `rush --history` writes.
        file: PathBuf,
        /// Print the verdict as JSON.
        #[arg(long)]
        json: bool,
    },
    /// List levels and strategies with what they promise.
    List {
        /// Print JSON: an array with an object for each strategy.
        #[arg(long)]
        json: bool,
    },
    /// Look at the orders that LV.4 gave up, and try one of them once more.
    #[cfg(feature = "lv4")]
    DeadLetters(dead_letters::DeadLettersArgs),
    /// Tell which backends there are, where they come from, and what is missing.
    Doctor,
}

#[derive(Args)]
pub(crate) struct RushArgs {
    /// What to run; without any, the trail through all levels.
    #[arg(value_name = "LEVEL[/STRATEGY]")]
    levels: Vec<String>,
    /// Tickets on sale.
    #[arg(long, default_value_t = 100, value_parser = number(1..=1_000_000))]
    capacity: u32,
    /// Buyers, all at once.
    #[arg(long, default_value_t = 1000, value_parser = number(1..=20_000))]
    buyers: u32,
    /// Requests that each buyer sends at once, each under its own key [default: what the strategy's guarantee needs to be tried].
    #[arg(long, value_parser = number(1..=50))]
    clicks: Option<u32>,
    /// Server processes that the buyers are spread over.
    #[arg(long, default_value_t = 1, value_parser = number(1..=16))]
    instances: u32,
    /// Business time inside the critical section, in milliseconds.
    #[arg(long, default_value_t = 0, value_parser = number(0..=10_000))]
    work_ms: u32,
    /// How often it is repeated, each time on a fresh sale. What is shown is then the round in the middle, with the range of all beside it;
    /// a round that did not end as promised goes before.
    #[arg(long, default_value_t = 1, value_parser = number(1..=100))]
    rounds: u32,
    /// Write the figures, with machine, commit and settings, to this file.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Write every request and row to this folder, a file of JSON lines for each strategy.
    #[arg(long, value_name = "FOLDER")]
    history: Option<PathBuf>,
}

#[derive(Args)]
pub(crate) struct TraceArgs {
    /// The level, or the strategy as LEVEL/STRATEGY.
    #[arg(value_name = "LEVEL[/STRATEGY]")]
    level: String,
    /// Whose turn it is, a letter for each step: A, B and C are Ann, Bob and Carol, a small letter is that buyer's second click.
    /// After the last letter everybody runs on to an answer [default: both look before either writes].
    #[arg(long, value_name = "LETTERS", value_parser = trace::Order::parse)]
    order: Option<trace::Order>,
    /// Tickets on sale [default: 1, or 2 with a second click].
    #[arg(long, requires = "order", value_parser = number(1..=10))]
    capacity: Option<u32>,
    /// Print Markdown, as the book includes it.
    #[arg(long)]
    markdown: bool,
}

#[derive(Args)]
pub(crate) struct BenchArgs {
    /// What to measure; a level alone stands for its first strategy.
    #[arg(value_name = "LEVEL/STRATEGY")]
    strategy: String,
    /// Connections that buy one ticket after another [default: 64; where orders are accepted first, 1000].
    #[arg(long, value_parser = number(1..=4_000))]
    clients: Option<u32>,
    /// How long a round takes.
    #[arg(long, default_value_t = 10, value_parser = number(1..=60))]
    seconds: u32,
    /// Rounds of ours, each beside one of the ceiling [default: 5; with --pools 1, with --drain 3].
    #[arg(long, value_parser = number(1..=100))]
    rounds: Option<u32>,
    /// Connections in the server's pool.
    #[arg(
        long = "pool",
        env = "DATABASE_POOL_SIZE",
        default_value_t = Settings::default().database_pool_size,
        value_parser = number(1..=400)
    )]
    pool: u32,
    /// Show what pools of these sizes make of it, and leave the ceiling out: 1,2,4,8,16,64.
    #[arg(long, value_name = "SIZES", value_delimiter = ',', value_parser = number(1..=400))]
    pools: Vec<u32>,
    /// Measure LV.3's lock alone: taken and given back, a lock for each client, beside redis-benchmark.
    #[arg(long, conflicts_with_all = ["pools", "waiters"])]
    lock: bool,
    /// Measure LV.3's lock alone: so many wait for the same one, and do nothing with it.
    #[arg(long, value_name = "N", conflicts_with = "pools", value_parser = number(1..=20_000))]
    waiters: Option<u32>,
    /// Let so many orders of LV.4 wait, then measure how fast one consumer decides them [default: 100000; of lv4/locked 5000].
    #[arg(long, value_name = "ORDERS", num_args = 0..=1, conflicts_with_all = ["pools", "lock", "waiters"], value_parser = number(1..=500_000))]
    drain: Option<Option<u32>>,
    /// Write the figures, with machine, commit and settings, to this file.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

/// A number in this range, or words about what it takes.
fn number(range: RangeInclusive<u32>) -> impl Fn(&str) -> Result<u32, String> + Clone + Send + Sync + 'static {
    move |text| match text.parse() {
        Ok(number) if range.contains(&number) => Ok(number),
        _ => Err(format!("a number, {} to {}", range.start(), range.end())),
    }
}

/// How a command ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Ended {
    /// Everything did what it promises.
    AsPromised,
    /// The run did not stress a strategy enough to tell.
    Inconclusive,
    /// A guarantee was broken.
    Broken,
}

impl Ended {
    /// The exit code. It is no measure of how bad the end is; the order of the variants is.
    fn code(self) -> u8 {
        match self {
            Self::AsPromised => 0,
            Self::Broken => 1,
            Self::Inconclusive => 4,
        }
    }
}

/// The exit code for a command line that can't be understood, a file that can't be read, or a run that could not be carried out.
const USAGE: u8 = 2;
/// The exit code for a backend or a tool that is not there.
const BACKEND_MISSING: u8 = 3;

fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(shown) if !shown.use_stderr() => {
            print!("{shown}");
            return ExitCode::SUCCESS;
        }
        // Help, because nothing was asked for.
        Err(shown) if shown.kind() == ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand => {
            eprint!("{shown}");
            return ExitCode::from(USAGE);
        }
        Err(error) => {
            let mut command = Cli::command();
            command.build();
            eprintln!("oversold: {}", explain(&error, &command));
            return ExitCode::from(USAGE);
        }
    };
    box_office::raise_open_files_limit();
    let ended = match cli.command {
        Command::Serve { level, settings } => return serve(&level, &settings),
        Command::List { json } => list::print(json),
        Command::Judge { file, json } => judge::judge_file(&file, json),
        Command::Rush(args) => in_runtime(rush::rush(&args)),
        Command::Trace(args) => in_runtime(trace::trace(&args)),
        Command::Bench(args) => in_runtime(bench::bench(&args)),
        #[cfg(feature = "lv4")]
        Command::DeadLetters(args) => in_runtime(dead_letters::run(&args)),
        Command::Doctor => in_runtime(doctor::doctor()),
    };
    match ended {
        Ok(ended) => ExitCode::from(ended.code()),
        Err(error) => {
            eprintln!("oversold: {error:#}");
            let missing = matches!(error.downcast_ref(), Some(Missing::Nowhere { .. })) || error.is::<ToolMissing>();
            #[cfg(feature = "lv4")]
            let missing = missing || dead_letters::is_away(&error);
            ExitCode::from(if missing { BACKEND_MISSING } else { USAGE })
        }
    }
}

fn in_runtime(command: impl Future<Output = anyhow::Result<Ended>>) -> anyhow::Result<Ended> {
    tokio::runtime::Runtime::new()?.block_on(command)
}

/// Serves what the name says; a level alone leaves the choice to `STRATEGY`.
fn serve(name: &str, settings: &Settings) -> ExitCode {
    let chosen = match (name.contains('/'), &settings.strategy) {
        (false, Some(strategy)) => SelectedStrategy::one(&format!("{name}/{strategy}")),
        _ => SelectedStrategy::one(name),
    };
    match chosen {
        Ok(chosen) => box_office::serve(chosen.level, chosen.strategy, settings),
        Err(error) => {
            eprintln!("oversold: {error:#}");
            ExitCode::from(USAGE)
        }
    }
}
