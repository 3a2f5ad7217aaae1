//! The command `load`: the rush, sent by two load generators that people use elsewhere, Goose and k6.
//!
//! It knows no level's code: to it a level is a server with an address. Goose runs in this process; k6 runs `load/k6/rush.js`.

mod attack;
mod outcome;
mod sale;
mod stand;

use std::{fmt, ops::RangeInclusive, path::PathBuf, process::ExitCode, time::Duration};

use anyhow::Context;
use box_office::{BuyerId, Invariant, Promises, SaleId, explain};
use clap::{Args, CommandFactory, Parser, Subcommand};
use harness::backends::Missing;
use outcome::{Ended, Outcome};

/// The rush as a Goose scenario and as a k6 script. Both fail when a guarantee that should hold broke.
///
/// Exit code: 0 what should hold held, and what should break was seen to break; 1 a guarantee broke; 2 usage, or no server there;
/// 3 a backend is missing; 4 inconclusive: what should break was not seen to.
#[derive(Parser)]
#[command(name = "load", max_term_width = 100, arg_required_else_help = true)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Send the rush with Goose to a server that runs already.
    Goose(GooseArgs),
    /// Start Postgres and a server for each strategy, send the rush with Goose and then with k6, stop everything.
    Rush(RushArgs),
}

#[derive(Args)]
struct GooseArgs {
    /// The server.
    #[arg(long, value_name = "http://HOST:PORT")]
    host: sale::Host,
    /// The token that opens sales there.
    #[arg(long, env = "OVERSOLD_ADMIN_TOKEN", hide_env_values = true, value_name = "TOKEN")]
    admin_token: String,
    /// The sale to open. It must not be open yet.
    #[arg(long, default_value_t = 1, value_name = "ID", value_parser = clap::value_parser!(SaleId).range(0..))]
    sale: SaleId,
    #[command(flatten)]
    crowd: Crowd,
    /// Requests that each buyer sends at once, each under its own key.
    #[arg(long, default_value_t = 1, value_parser = number(1..=50))]
    clicks: u32,
    /// Invariants that this server breaks, and must be seen to.
    #[arg(long, value_name = "I1,I2", value_delimiter = ',', value_parser = invariant)]
    breaks: Vec<Invariant>,
    /// Invariants that this server promises nothing about.
    #[arg(long, value_name = "I3,I9", value_delimiter = ',', value_parser = invariant)]
    leaves_open: Vec<Invariant>,
}

#[derive(Args)]
struct RushArgs {
    /// What to run: a strategy, or a level for all that are on its trail.
    #[arg(required = true, value_name = "LEVEL[/STRATEGY]")]
    levels: Vec<String>,
    #[command(flatten)]
    crowd: Crowd,
    /// The command `oversold`, whose servers are tried.
    #[arg(long, value_name = "FILE", default_value = "target/debug/oversold")]
    oversold: PathBuf,
    /// The command `k6`.
    #[arg(long, value_name = "FILE", default_value = "target/tools/bin/k6")]
    k6: PathBuf,
    /// The script that k6 runs.
    #[arg(long, value_name = "FILE", default_value = "load/k6/rush.js")]
    script: PathBuf,
}

/// Who comes for what.
#[derive(Args, Clone, Copy, Debug)]
struct Crowd {
    /// Tickets on sale.
    #[arg(long, default_value_t = 100, value_parser = number(1..=1_000_000))]
    capacity: u32,
    /// Buyers, all at once.
    #[arg(long, default_value_t = 1000, value_parser = number(1..=5_000))]
    buyers: u32,
    /// How long a buyer repeats a request that stays undecided, in seconds.
    #[arg(long, default_value_t = 20, value_name = "SECONDS", value_parser = number(1..=300))]
    patience: u32,
}

impl Crowd {
    fn patience(self) -> Duration {
        Duration::from_secs(self.patience.into())
    }
}

/// One rush against one server.
#[derive(Clone, Debug)]
struct Rush {
    /// What is sold from, for the reader: a strategy or an address.
    name: String,
    host: sale::Host,
    admin_token: String,
    sale: SaleId,
    crowd: Crowd,
    clicks: u32,
    promises: Promises,
}

impl Rush {
    /// Every click of every buyer, the clicks of one buyer side by side.
    fn clicks(&self) -> impl Iterator<Item = (BuyerId, u32)> {
        let clicks = self.clicks;
        (1..=self.crowd.buyers).flat_map(move |buyer| (1..=clicks).map(move |click| (buyer.into(), click)))
    }
}

/// What is promised, from what is not kept.
fn promises(breaks: &[Invariant], leaves_open: &[Invariant]) -> Promises {
    Promises::ALL_KEPT.breaks(breaks).leaves_open(leaves_open)
}

/// A number in this range, or words about what it takes.
fn number(range: RangeInclusive<u32>) -> impl Fn(&str) -> Result<u32, String> + Clone + Send + Sync + 'static {
    move |text| match text.parse() {
        Ok(number) if range.contains(&number) => Ok(number),
        _ => Err(format!("a number, {} to {}", range.start(), range.end())),
    }
}

fn invariant(code: &str) -> Result<Invariant, String> {
    let known = Invariant::ALL.into_iter().find(|invariant| invariant.code() == code);
    known.ok_or_else(|| "codes of invariants, I1 to I10, with commas between them".to_owned())
}

/// The exit code for a command line that can't be understood, and for a server that is not there.
const USAGE: u8 = 2;
/// The exit code for a backend that is not there.
const BACKEND_MISSING: u8 = 3;
/// The exit code after Ctrl-C, as shells have it.
const INTERRUPTED: i32 = 130;

fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(shown) if !shown.use_stderr() => {
            print!("{shown}");
            return ExitCode::SUCCESS;
        }
        Err(error) => {
            let mut command = Cli::command();
            command.build();
            return complain(&explain(&error, &command));
        }
    };
    // Before Goose sets its own, which would only make it stop early. What was started here goes with this process.
    if let Err(error) = ctrlc::set_handler(|| std::process::exit(INTERRUPTED)) {
        return complain(&error);
    }
    box_office::raise_open_files_limit();
    let ended = tokio::runtime::Runtime::new()
        .context("starting the runtime")
        .and_then(|runtime| {
            runtime.block_on(async {
                match cli.command {
                    Command::Goose(args) => goose(args).await,
                    Command::Rush(args) => stand::rush(&args).await,
                }
            })
        });
    match ended {
        Ok(ended) => ExitCode::from(ended as u8),
        Err(error) if error.is::<Missing>() => {
            eprintln!("load: {error:#}");
            ExitCode::from(BACKEND_MISSING)
        }
        Err(error) => complain(&format_args!("{error:#}")),
    }
}

fn complain(what: &dyn fmt::Display) -> ExitCode {
    eprintln!("load: {what}");
    ExitCode::from(USAGE)
}

async fn goose(args: GooseArgs) -> anyhow::Result<Ended> {
    let rush = Rush {
        name: args.host.to_string(),
        host: args.host,
        admin_token: args.admin_token,
        sale: args.sale,
        crowd: args.crowd,
        clicks: args.clicks,
        promises: promises(&args.breaks, &args.leaves_open),
    };
    let outcome = attack::run(&rush).await?;
    Ok(Outcome::print(&[outcome]))
}
