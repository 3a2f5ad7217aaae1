//! The command line: the subcommands, their dispatch, and the exit code.

use std::{ops::RangeInclusive, path::PathBuf, process::ExitCode};

use box_office::{Settings, explain, unset_if_empty};
use clap::{CommandFactory, FromArgMatches, Parser, Subcommand, error::ErrorKind};
use harness::backends::Missing;
#[cfg(feature = "lv4")]
use lv4_kafka::payment_service::{self, PaymentServiceArgs};

#[cfg(feature = "lv4")]
use crate::commands::dead_letters;
use crate::{
    commands::{bench, doctor, exercise, judge, list, red, rush, serve, size, source, stand, tool::ToolMissing, trace},
    exit::{BACKEND_MISSING, ExitKind, USAGE},
    interrupt::Interrupted,
};

/// What happens when 1,000 buyers go for 100 tickets at the same instant?
#[derive(Parser)]
#[command(name = "oversold", version, max_term_width = 100, arg_required_else_help = true)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Send all buyers at once, and check the result against each strategy's guarantee.
    Rush(rush::RushArgs),
    /// Measure the sustained throughput of one strategy, next to the ceiling of its database, broker or lock server.
    Bench(bench::BenchArgs),
    /// Serve a level over HTTP until it receives SIGTERM or Ctrl-C.
    Serve {
        /// A level, or one strategy as LEVEL/STRATEGY.
        #[arg(value_name = "LEVEL[/STRATEGY]")]
        level: String,
        #[command(flatten)]
        settings: Box<Settings>,
    },
    /// Serve a level as a team would run it: several instances behind nginx, watched by Prometheus, all on this machine.
    Stand(stand::StandArgs),
    /// Compute what a sale takes: instances, partitions, connections and pool sizes, from the rates that were measured.
    Size(size::SizeArgs),
    /// Force one exact interleaving, and show it as a table: a column for each buyer, a row for each step.
    Trace(trace::TraceArgs),
    /// Run the contract test of a level as if every strategy had to keep every invariant, and show how it fails.
    Red {
        /// A level, or one strategy as LEVEL/STRATEGY.
        #[arg(value_name = "LEVEL[/STRATEGY]")]
        level: String,
    },
    /// Put a mistake into a strategy, for you to fix: an exercise of the book.
    Exercise(exercise::ExerciseArgs),
    /// Print the source of a strategy, or of a mutant with its mistake in place.
    Source(source::SourceArgs),
    /// Check a recorded history against all invariants.
    Judge {
        /// A history as JSON lines, as `rush --history` writes it.
        file: PathBuf,
        /// Print the verdict as JSON.
        #[arg(long)]
        json: bool,
    },
    /// List levels and strategies with their guarantees.
    List {
        /// Print JSON: an array with one object for each strategy.
        #[arg(long)]
        json: bool,
    },
    /// List, show and replay the dead letters of LV.4: messages that its consumers gave up on.
    #[cfg(feature = "lv4")]
    DeadLetters(dead_letters::DeadLettersArgs),
    /// Run a payment service that misbehaves on demand, for LV.4's held tickets.
    #[cfg(feature = "lv4")]
    PaymentService(PaymentServiceArgs),
    /// One process of `bench --waiters --instances`, which starts it.
    #[cfg(feature = "lv3")]
    #[command(hide = true)]
    BenchWaiters(bench::WaitersArgs),
    /// Report which backends are available, where they come from, and what is missing.
    Doctor,
}

/// A parser of numbers in this range. Its error names the range.
pub(crate) fn number(
    range: RangeInclusive<u32>,
) -> impl Fn(&str) -> Result<u32, String> + Clone + Send + Sync + 'static {
    move |text| match text.parse() {
        Ok(number) if range.contains(&number) => Ok(number),
        _ => Err(format!("a number, {} to {}", range.start(), range.end())),
    }
}

/// Runs the command that this process was started with, and returns its exit code.
pub fn run() -> ExitCode {
    let command = unset_if_empty(Cli::command());
    let parsed = command.try_get_matches();
    let cli = match parsed.and_then(|matches| Cli::from_arg_matches(&matches)) {
        Ok(cli) => cli,
        Err(shown) if !shown.use_stderr() => {
            print!("{shown}");
            return ExitCode::SUCCESS;
        }
        // The help, because no subcommand was given.
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
    let exit = match cli.command {
        Command::Serve { level, settings } => return serve::run(&level, &settings),
        Command::List { json } => list::run(json),
        Command::Red { level } => red::run(&level),
        Command::Exercise(args) => exercise::run(&args),
        Command::Source(args) => source::run(&args),
        Command::Judge { file, json } => judge::run(&file, json),
        Command::Rush(args) => block_on(rush::run(&args)),
        Command::Stand(args) => block_on(stand::run(&args)),
        Command::Size(args) => size::run(&args),
        Command::Trace(args) => block_on(trace::run(&args)),
        Command::Bench(args) => block_on(bench::run(&args)),
        #[cfg(feature = "lv3")]
        Command::BenchWaiters(args) => block_on(bench::run_waiters(&args)),
        #[cfg(feature = "lv4")]
        Command::DeadLetters(args) => block_on(dead_letters::run(&args)),
        #[cfg(feature = "lv4")]
        Command::PaymentService(args) => {
            block_on(async { payment_service::serve(args).await.map(|()| ExitKind::AsPromised) })
        }
        Command::Doctor => block_on(doctor::run()),
    };
    match exit {
        Ok(exit) => ExitCode::from(exit.code()),
        Err(error) => {
            eprintln!("oversold: {error:#}");
            ExitCode::from(match error.downcast_ref::<Interrupted>() {
                Some(interrupted) => interrupted.code(),
                None if is_missing(&error) => BACKEND_MISSING,
                None => USAGE,
            })
        }
    }
}

fn block_on(command: impl Future<Output = anyhow::Result<ExitKind>>) -> anyhow::Result<ExitKind> {
    let runtime = tokio::runtime::Runtime::new()?;
    let ended = runtime.block_on(command);
    // Does not wait for work that the end of the command has made pointless.
    runtime.shutdown_background();
    ended
}

/// Whether a backend or a tool that the command needs is missing.
fn is_missing(error: &anyhow::Error) -> bool {
    let missing = matches!(error.downcast_ref(), Some(Missing::Nowhere { .. })) || error.is::<ToolMissing>();
    #[cfg(feature = "lv4")]
    let missing = missing || dead_letters::is_unavailable(error);
    missing
}
