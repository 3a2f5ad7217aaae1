//! The command `oversold`: run the sale, look at it step by step, judge what was recorded.

mod doctor;
mod judge;
mod levels;
mod list;
mod machine;
mod rush;
mod trace;

use std::{ops::RangeInclusive, path::PathBuf, process::ExitCode};

use box_office::{Settings, explain};
use clap::{Args, CommandFactory, Parser, Subcommand, error::ErrorKind};
use levels::Choice;
use suite::backends::Missing;

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
    /// Serve a level over HTTP until it is told to stop.
    Serve {
        /// The level, or the strategy as LEVEL/STRATEGY.
        #[arg(value_name = "LEVEL[/STRATEGY]")]
        level: String,
        #[command(flatten)]
        settings: Settings,
    },
    /// Show one exact interleaving as a table: a lane for each buyer, a row for each step.
    Trace {
        /// The level, or the strategy as LEVEL/STRATEGY.
        #[arg(value_name = "LEVEL[/STRATEGY]")]
        level: String,
        /// Print Markdown, as the book includes it.
        #[arg(long)]
        markdown: bool,
    },
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
    hold_ms: u32,
    /// Write the figures, with machine, commit and settings, to this file.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Write every request and row to this folder, a file of JSON lines for each strategy.
    #[arg(long, value_name = "FOLDER")]
    history: Option<PathBuf>,
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
    AsPromised = 0,
    /// The run did not stress a strategy enough to tell.
    Inconclusive = 4,
    /// A guarantee was broken.
    Broken = 1,
}

/// The exit code for a command line that can't be understood, or a file that can't be read.
const USAGE: u8 = 2;
/// The exit code for a backend that is not there.
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
        Command::Trace { level, markdown } => in_runtime(trace::trace(&level, markdown)),
        Command::Doctor => in_runtime(doctor::doctor()),
    };
    match ended {
        Ok(ended) => ExitCode::from(ended as u8),
        Err(error) => {
            eprintln!("oversold: {error:#}");
            ExitCode::from(if error.is::<Missing>() { BACKEND_MISSING } else { USAGE })
        }
    }
}

fn in_runtime(command: impl Future<Output = anyhow::Result<Ended>>) -> anyhow::Result<Ended> {
    tokio::runtime::Runtime::new()?.block_on(command)
}

/// Serves what the name says; a level alone leaves the choice to `STRATEGY`.
fn serve(name: &str, settings: &Settings) -> ExitCode {
    let chosen = match (name.contains('/'), &settings.strategy) {
        (false, Some(strategy)) => Choice::one(&format!("{name}/{strategy}")),
        _ => Choice::one(name),
    };
    match chosen {
        Ok(chosen) => box_office::serve(chosen.level, chosen.strategy, settings),
        Err(error) => {
            eprintln!("oversold: {error:#}");
            ExitCode::from(USAGE)
        }
    }
}
