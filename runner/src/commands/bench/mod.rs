//! `oversold bench`: the sustained throughput of one strategy, next to the ceiling of what it runs on.
//!
//! Each round has a server and a database of its own, on one durable Postgres. Rounds of the strategy and of the ceiling take turns, so
//! that a machine that slows down for a while does so for both. The rows are checked after every round: a throughput that was reached by
//! breaking an invariant is void.

#[cfg(feature = "lv4")]
mod accept;
mod bench_setup;
#[cfg(feature = "lv4")]
mod copy;
#[cfg(feature = "lv4")]
mod drain;
#[cfg(feature = "lv4")]
mod improvements;
#[cfg(feature = "lv3")]
mod lock;
#[cfg(feature = "lv4")]
mod paid;
mod pgbench;
mod pools;
#[cfg(feature = "lv4")]
mod producer_perf_test;
#[cfg(feature = "lv3")]
mod redis_benchmark;
mod resources;
mod throughput;
mod wrk;

use std::{
    io::{IsTerminal, Write, stderr},
    path::PathBuf,
};

use anyhow::ensure;
use box_office::{Service, Settings};
use clap::Args;
use comfy_table::{Table, presets};

use super::rush::SaleArgs;
use crate::{cli::number, exit::ExitKind, levels::SelectedStrategy};
#[cfg(feature = "lv3")]
pub(crate) use lock::waiters::{WaitersArgs, run as run_waiters};

#[derive(Args)]
pub(crate) struct BenchArgs {
    /// What to measure; a level alone stands for its first strategy.
    #[arg(value_name = "LEVEL/STRATEGY")]
    strategy: String,
    /// Clients, each of which sends its next request when the last is answered (a closed loop) [default: 64; for LV.4 1000].
    #[arg(long, value_parser = number(1..=4_000))]
    clients: Option<u32>,
    /// Duration of a round, in seconds.
    #[arg(long, default_value_t = 10, value_parser = number(1..=60))]
    seconds: u32,
    /// Rounds of the strategy, each followed by one of the ceiling [default: 5; with --pools 1, with --drain 3].
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
    /// Measure with pools of these sizes, without the ceiling: 1,2,4,8,16,64.
    #[arg(long, value_name = "SIZES", value_delimiter = ',', value_parser = number(1..=400))]
    pools: Vec<u32>,
    /// Measure only LV.3's lock without contention: acquire and release, one lock for each client, next to redis-benchmark.
    #[arg(long, conflicts_with_all = ["pools", "waiters"])]
    lock: bool,
    /// Measure only LV.3's lock under contention: this many tasks wait for one lock, and the critical section is empty.
    #[arg(long, value_name = "N", conflicts_with = "pools", value_parser = number(1..=20_000))]
    waiters: Option<u32>,
    /// Processes that share the waiters of --waiters. The waiters of one process queue in it; only between processes are they woken by
    /// Redis's messages.
    #[arg(long, default_value_t = 1, requires = "waiters", value_parser = number(1..=16))]
    instances: u32,
    /// Measure how fast one consumer of LV.4 processes a backlog of this many orders [default: 100000; for lv4/locked 5000].
    #[arg(long, value_name = "ORDERS", num_args = 0..=1, conflicts_with_all = ["pools", "lock", "waiters"], value_parser = number(1..=500_000))]
    drain: Option<Option<u32>>,
    #[command(flatten)]
    sale: SaleArgs,
    /// Write the results, with machine, commit and settings, to this file as JSON.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

/// Measures one strategy.
pub(crate) async fn run(args: &BenchArgs) -> anyhow::Result<ExitKind> {
    let selected = SelectedStrategy::one(&args.strategy)?;
    ensure!(
        args.waiters.is_none_or(|waiters| waiters >= args.instances),
        "each of the --instances needs at least one of the --waiters"
    );
    if args.lock || args.waiters.is_some() {
        return bench_lock(selected, args).await;
    }
    let takes_payments = args.sale.payment_service()?.is_some();
    ensure!(!takes_payments || args.drain.is_some(), "{}", ONLY_DRAIN);
    let improved = !takes_payments && !args.sale.given().is_empty();
    ensure!(
        !improved || selected.strategy.needs.contains(&Service::Kafka) && args.drain.is_none(),
        "{}",
        ONLY_ACCEPT
    );
    args.sale.check(&selected)?;
    // Of orders that are accepted first and decided later, the two halves are measured apart.
    if selected.strategy.needs.contains(&Service::Kafka) {
        return bench_orders(selected, args).await;
    }
    ensure!(args.drain.is_none(), "{}", ONLY_LV4);
    if args.pools.is_empty() {
        throughput::run(selected, args).await
    } else {
        pools::run(selected, args).await
    }
}

#[cfg(feature = "lv4")]
async fn bench_orders(selected: SelectedStrategy, args: &BenchArgs) -> anyhow::Result<ExitKind> {
    ensure!(
        args.pools.is_empty(),
        "--pools is about answers that wait for the database, and those of LV.4 do not"
    );
    match (args.drain, args.sale.payment_service()?) {
        (Some(orders), Some(service)) => paid::run(selected, args, orders, &service).await,
        (Some(orders), None) => drain::run(selected, args, orders).await,
        (None, _) if !args.sale.given().is_empty() => improvements::run(selected, args).await,
        (None, _) => accept::run(selected, args).await,
    }
}

/// Without LV.4 in the build, no strategy needs Kafka.
#[cfg(not(feature = "lv4"))]
async fn bench_orders(_selected: SelectedStrategy, _args: &BenchArgs) -> anyhow::Result<ExitKind> {
    anyhow::bail!("{}", ONLY_LV4)
}

const ONLY_ACCEPT: &str =
    "what an improvement costs is measured where LV.4 accepts orders: lv4/locked, lv4/single-writer, without --drain";

const ONLY_DRAIN: &str = "what payments cost is measured where a backlog is processed: add --drain";

const ONLY_LV4: &str =
    "--drain measures how fast a backlog of orders is processed, and only LV.4 has one: lv4/locked, lv4/single-writer";

#[cfg(feature = "lv3")]
async fn bench_lock(selected: SelectedStrategy, args: &BenchArgs) -> anyhow::Result<ExitKind> {
    if selected.level.name != lv3_redis_lock::LEVEL.name {
        anyhow::bail!("{}", ONLY_LV3);
    }
    lock::run(selected.strategy.name, args).await
}

#[cfg(not(feature = "lv3"))]
async fn bench_lock(_selected: SelectedStrategy, _args: &BenchArgs) -> anyhow::Result<ExitKind> {
    anyhow::bail!("{}", ONLY_LV3)
}

const ONLY_LV3: &str =
    "--waiters and --lock measure a lock on its own, and only LV.3 has one: lv3/spin, lv3/rlock, lv3/fenced";

/// Warns that measurements of a debug build mean nothing.
fn warn_of_debug_build() {
    if cfg!(debug_assertions) {
        eprintln!(
            "This is a debug build: its measurements mean nothing. `cargo run --release --package oversold -- bench …`"
        );
    }
}

/// Shows on a terminal what is being measured. Each call replaces the line of the last one.
fn progress(what: &str) {
    if stderr().is_terminal() {
        let _ = write!(stderr(), "\r\x1b[K{what}");
    }
}

/// A table with one measurement in each row.
struct MeasurementTable(Table);

impl MeasurementTable {
    fn new(title: impl Into<String>, column: impl Into<String>) -> Self {
        let mut table = Table::new();
        table
            .load_style(presets::UTF8_FULL_CONDENSED)
            .set_header([title.into(), column.into()]);
        Self(table)
    }

    fn row(&mut self, what: impl Into<String>, measured: impl Into<String>) {
        self.0.add_row([what.into(), measured.into()]);
    }

    fn print(&self) {
        println!("{}", self.0);
    }
}
