//! `oversold bench LEVEL/STRATEGY --pools`: throughput by size of the server's connection pool.

use comfy_table::{Table, presets};

use super::{
    BenchArgs,
    bench_setup::{BenchEnvironment, ROWS_CHECKED, Rounds},
    progress,
    throughput::CLIENTS,
    wrk::Wrk,
};
use crate::{
    exit::ExitKind,
    interrupt::Signals,
    levels::SelectedStrategy,
    results::{
        ResultFile,
        bench::{PoolCurve, PoolThroughput, WrkReport},
    },
    statistics::MedianRange,
};

/// Measures the strategy with each size of the pool.
pub(super) async fn run(selected: SelectedStrategy, args: &BenchArgs) -> anyhow::Result<ExitKind> {
    // Tool and file first: no run is wasted on what can't be measured or written.
    let wrk = Wrk::find()?;
    let json = args.json.as_deref().map(ResultFile::open).transpose()?;
    let mut signals = Signals::listen()?;
    let bench = signals.or_end(BenchEnvironment::new(selected, args, CLIENTS)).await?;
    let wrk = Wrk::new(wrk)?;

    let rounds = args.rounds.unwrap_or(1);
    let mut void = vec![];
    let mut measured: Vec<Vec<WrkReport>> = vec![vec![]; args.pools.len()];
    let ended = signals
        .or_end(async {
            for number in 1..=rounds {
                for (&pool, loads) in args.pools.iter().zip(&mut measured) {
                    progress(&format!("round {number} of {rounds}: a pool of {pool}"));
                    let round = bench.load_round(&wrk, pool).await?;
                    void.extend(round.void);
                    loads.push(round.load);
                }
            }
            Ok(())
        })
        .await;
    progress("");
    // Each pool has rounds of its own.
    let planned = rounds * u32::try_from(args.pools.len())?;
    let rounds = Rounds::of(planned, measured.iter().map(Vec::len).sum(), ended)?;

    let pools = args.pools.iter().zip(&measured);
    let curve = PoolCurve {
        pools: pools
            .filter(|(_, loads)| !loads.is_empty())
            .map(|(&pool_size, loads)| pool_throughput(pool_size, loads))
            .collect::<anyhow::Result<_>>()?,
    };
    print(&selected.name(), &curve);
    bench.finish(curve, rounds, ROWS_CHECKED, void, json)
}

fn pool_throughput(pool_size: u32, loads: &[WrkReport]) -> anyhow::Result<PoolThroughput> {
    Ok(PoolThroughput {
        pool_size,
        reservations_a_second: MedianRange::over(loads, WrkReport::confirmed_a_second)?,
        p50_ms: MedianRange::over(loads, WrkReport::p50_ms)?,
        p99_ms: MedianRange::over(loads, WrkReport::p99_ms)?,
    })
}

fn print(strategy: &str, curve: &PoolCurve) {
    let mut table = Table::new();
    table.load_style(presets::UTF8_FULL_CONDENSED).set_header([
        &format!("{strategy}, pool"),
        "reservations a second",
        "p50 ms",
        "p99 ms",
    ]);
    for pool in &curve.pools {
        table.add_row([
            pool.pool_size.to_string(),
            pool.reservations_a_second.to_string(),
            format!("{:.1}", pool.p50_ms),
            format!("{:.1}", pool.p99_ms),
        ]);
    }
    println!("{table}");
}
