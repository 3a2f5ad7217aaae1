//! The command `load`: the rush, sent by two widely used load generators, Goose and k6.
//!
//! It depends on no level: to it, a level is a server with an address. Goose runs in this process; k6 runs `load/k6/rush.js`.

#[macro_use(print, println, eprintln)]
extern crate harness;

mod goose;
mod k6;
mod outcome;
mod payments;
mod sale;
mod strategies;

use std::{fmt, ops::RangeInclusive, path::PathBuf, process::ExitCode, time::Duration};

use anyhow::Context;
use box_office::{BuyerId, Invariant, Promises, SaleId, explain};
use clap::{Args, CommandFactory, Parser, Subcommand};
use harness::backends::Missing;
use outcome::{ExitKind, Outcome};

/// The rush as a Goose scenario and as a k6 script. Both fail when a guarantee is broken.
///
/// Exit code: 0 every guarantee held, and every expected break was observed; 1 a guarantee was broken; 2 usage, or no server answers;
/// 3 a backend is missing; 4 inconclusive: an expected break was not observed, or the run is void, as requests could not be sent.
#[derive(Parser)]
#[command(name = "load", max_term_width = 100, arg_required_else_help = true)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Send the rush with Goose to a running server.
    Goose(GooseArgs),
    /// Start the backends and a server for each strategy, and send the rush with Goose, then with k6.
    Rush(RushArgs),
}

#[derive(Args)]
struct GooseArgs {
    /// The address of the server.
    #[arg(long, value_name = "http://HOST:PORT")]
    host: sale::Host,
    /// The admin token of the server.
    #[arg(long, env = "OVERSOLD_ADMIN_TOKEN", hide_env_values = true, value_name = "TOKEN")]
    admin_token: String,
    /// The sale to create. It must not exist yet.
    #[arg(long, default_value_t = 1, value_name = "ID", value_parser = clap::value_parser!(SaleId).range(0..))]
    sale: SaleId,
    #[command(flatten)]
    size: RushSize,
    /// Requests that each buyer sends at once, each under its own key.
    #[arg(long, default_value_t = 1, value_parser = number(1..=50))]
    clicks: u32,
    /// The payment service of the server: its ledger must agree with how the orders ended.
    #[arg(long, env = "PAYMENT_URL", value_name = "http://HOST:PORT")]
    payment_url: Option<sale::Host>,
    /// An order may be answered "expired" this long after it was sent, in milliseconds: the server's HOLD_MS or ORDER_TTL_MS, whichever is
    /// shorter. Without it no order may.
    #[arg(long, value_name = "MS", value_parser = number(1..=86_400_000))]
    expiry_ms: Option<u32>,
    /// Invariants that this server is expected to break.
    #[arg(long, value_name = "I1,I2", value_delimiter = ',', value_parser = invariant)]
    breaks: Vec<Invariant>,
    /// Invariants that this server gives no guarantee for.
    #[arg(long, value_name = "I3,I9", value_delimiter = ',', value_parser = invariant)]
    leaves_open: Vec<Invariant>,
}

#[derive(Args)]
struct RushArgs {
    /// What to run: a strategy, or a level for all of its main strategies.
    #[arg(required = true, value_name = "LEVEL[/STRATEGY]")]
    levels: Vec<String>,
    #[command(flatten)]
    size: RushSize,
    /// Start a payment service as well, and hold each ticket until it is paid for: how often a charge is treated how, such as
    /// approve=90,decline=8,hang=2. Of a level, the strategies that hold tickets.
    #[arg(long, value_name = "NAME=WEIGHT,…")]
    payments: Option<String>,
    /// The command `oversold`, which serves the strategies [default: the one beside this program].
    #[arg(long, value_name = "FILE")]
    oversold: Option<PathBuf>,
    /// The command `k6`.
    #[arg(long, value_name = "FILE", default_value = "target/tools/bin/k6")]
    k6: PathBuf,
    /// The script that k6 runs.
    #[arg(long, value_name = "FILE", default_value = "load/k6/rush.js")]
    script: PathBuf,
}

/// The size of a rush.
#[derive(Args, Clone, Copy, Debug)]
struct RushSize {
    /// Tickets on sale.
    #[arg(long, default_value_t = 100, value_parser = number(1..=1_000_000))]
    capacity: u32,
    /// Buyers, all at once.
    #[arg(long, default_value_t = 1000, value_parser = number(1..=5_000))]
    buyers: u32,
    /// How long a buyer repeats a request whose outcome is unknown, in seconds.
    #[arg(long, default_value_t = 20, value_name = "SECONDS", value_parser = number(1..=300))]
    patience: u32,
}

impl RushSize {
    fn patience(self) -> Duration {
        Duration::from_secs(self.patience.into())
    }
}

/// One rush against one server.
#[derive(Clone, Debug)]
struct Rush {
    /// The name of the server in the table: a strategy or an address.
    name: String,
    host: sale::Host,
    admin_token: String,
    sale: SaleId,
    size: RushSize,
    clicks: u32,
    /// The payment service whose ledger is compared with the orders.
    payments: Option<sale::Host>,
    /// How long after it was sent an order may be answered "expired". `None`: none may.
    expiry: Option<Duration>,
    promises: Promises,
}

impl Rush {
    /// Every click of every buyer, the clicks of one buyer next to each other.
    fn clicks(&self) -> impl Iterator<Item = (BuyerId, u32)> {
        let clicks = self.clicks;
        (1..=self.size.buyers).flat_map(move |buyer| (1..=clicks).map(move |click| (buyer.into(), click)))
    }
}

/// A guarantee that keeps all other invariants.
fn promises(breaks: &[Invariant], leaves_open: &[Invariant]) -> Promises {
    Promises::ALL_KEPT.breaks(breaks).leaves_open(leaves_open)
}

/// A parser of numbers in this range. Its error names the range.
fn number(range: RangeInclusive<u32>) -> impl Fn(&str) -> Result<u32, String> + Clone + Send + Sync + 'static {
    move |text| match text.parse() {
        Ok(number) if range.contains(&number) => Ok(number),
        _ => Err(format!("a number, {} to {}", range.start(), range.end())),
    }
}

fn invariant(code: &str) -> Result<Invariant, String> {
    let known = Invariant::ALL.into_iter().find(|invariant| invariant.code() == code);
    known.ok_or_else(|| "codes of invariants, I1 to I11, with commas between them".to_owned())
}

/// The exit code for an invalid command line, and for a server that does not answer.
const USAGE: u8 = 2;
/// The exit code for a backend that is missing.
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
            return usage_error(&explain(&error, &command));
        }
    };
    // Before Goose sets its own handler, which would only stop the load early. Processes started here end with this one.
    if let Err(error) = ctrlc::set_handler(|| std::process::exit(INTERRUPTED)) {
        return usage_error(&error);
    }
    box_office::raise_open_files_limit();
    let exit = tokio::runtime::Runtime::new()
        .context("starting the runtime")
        .and_then(|runtime| {
            runtime.block_on(async {
                match cli.command {
                    Command::Goose(args) => run_goose(args).await,
                    Command::Rush(args) => strategies::run(&args).await,
                }
            })
        });
    match exit {
        Ok(exit) => ExitCode::from(exit as u8),
        Err(error) if error.is::<Missing>() => {
            eprintln!("load: {error:#}");
            ExitCode::from(BACKEND_MISSING)
        }
        Err(error) => usage_error(&format_args!("{error:#}")),
    }
}

fn usage_error(what: &dyn fmt::Display) -> ExitCode {
    eprintln!("load: {what}");
    ExitCode::from(USAGE)
}

async fn run_goose(args: GooseArgs) -> anyhow::Result<ExitKind> {
    let rush = Rush {
        name: args.host.to_string(),
        host: args.host,
        admin_token: args.admin_token,
        sale: args.sale,
        size: args.size,
        clicks: args.clicks,
        payments: args.payment_url,
        expiry: args.expiry_ms.map(|ms| Duration::from_millis(ms.into())),
        promises: promises(&args.breaks, &args.leaves_open),
    };
    let outcome = goose::run(&rush).await?;
    Ok(Outcome::print(&[outcome]))
}
