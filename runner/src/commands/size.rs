//! `oversold size`: what a sale takes, computed from the rates that were measured.

use anyhow::ensure;
use clap::Args;

use crate::{
    checkout::root,
    cli::number,
    exit::ExitKind,
    sizing::{Demand, Measured},
};

/// The default of `--peak`.
const PEAK: u32 = 5;

#[derive(Args)]
pub(crate) struct SizeArgs {
    /// Buyers of all sales together.
    #[arg(long, value_parser = number(1..=1_000_000_000))]
    buyers: u32,
    /// Minutes within which they come.
    #[arg(long, value_parser = number(1..=1_440))]
    minutes: u32,
    /// Arrivals in the busiest minute, as a multiple of the mean minute [default: 5, or the number of minutes if that is less].
    #[arg(long, value_parser = number(1..=1_440))]
    peak: Option<u32>,
    /// Sales that are open at the same time, with as many buyers each.
    #[arg(long, default_value_t = 1, value_parser = number(1..=10_000))]
    sales: u32,
    /// A level, for its first strategy, or one strategy as LEVEL/STRATEGY.
    #[arg(long, value_name = "LEVEL[/STRATEGY]", default_value = "lv4/single-writer")]
    level: String,
}

/// Prints the size of the sale, with each formula and where each rate was measured.
///
/// # Errors
/// The peak is more than all buyers, the strategy oversells, or a result file is missing.
pub(crate) fn run(args: &SizeArgs) -> anyhow::Result<ExitKind> {
    let peak = args.peak.unwrap_or(PEAK.min(args.minutes));
    ensure!(
        peak <= args.minutes,
        "--peak {peak}: the busiest of {0} minutes brings at most {0} times the mean, which is all buyers",
        args.minutes
    );
    let measured = Measured::read(&args.level, &root().join("results"))?;
    let demand = Demand {
        buyers: args.buyers,
        minutes: args.minutes,
        peak,
        sales: args.sales,
    };
    print!("{}", measured.size(&demand));
    Ok(ExitKind::AsPromised)
}
