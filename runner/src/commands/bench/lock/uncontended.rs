//! `oversold bench lv3/… --lock`: acquire and release without contention, next to redis-benchmark.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::{Context, ensure};
use comfy_table::{Table, presets};
use lv3_redis_lock::lock::Released;
use tokio::task::JoinSet;

use super::{
    super::{BenchArgs, bench_setup::Rounds, progress, redis_benchmark::RedisBenchmark},
    Lock, LockBench,
    commands::{LockCommands, Rates},
};
use crate::{
    exit::ExitKind,
    interrupt::Signals,
    results::{
        ResultFile,
        bench::{LockCeiling, UncontendedLock},
    },
    statistics::MedianRange,
};

/// The tasks that use the lock, and the clients of redis-benchmark.
const CLIENTS: u32 = 50;
/// The two shapes of redis-benchmark, as connections and commands in flight on each: a connection for each client, and one for all.
const SHAPES: [(u32, u32); 2] = [(CLIENTS, 1), (1, CLIENTS)];
/// Load before the first round: no script is new to Redis afterwards.
const WARM_UP: Duration = Duration::from_millis(500);

/// Measures the lock and its ceiling.
pub(super) async fn run(
    bench: &LockBench<'_>,
    benchmark: &RedisBenchmark,
    args: &BenchArgs,
    mut signals: Signals,
    json: Option<ResultFile>,
) -> anyhow::Result<ExitKind> {
    let strategy = bench.strategy;
    let commands = LockCommands::load(strategy, &bench.redis).await?;
    let duration = Duration::from_secs(args.seconds.into());
    let rounds = args.rounds.unwrap_or(5);

    let lock = Arc::new(Lock::open(strategy, bench.redis.url()).await?);
    let mut ours = vec![];
    let mut ceilings = [vec![], vec![]];
    let ended = signals
        .or_end(async {
            pairs_a_second(&lock, WARM_UP).await?;
            for number in 1..=rounds {
                progress(&format!("round {number} of {rounds}: lv3/{strategy}"));
                ours.push(pairs_a_second(&lock, duration).await?);
                for (shape, rates) in SHAPES.into_iter().zip(&mut ceilings) {
                    progress(&format!("round {number} of {rounds}: redis-benchmark"));
                    rates.push(commands.measure(&bench.redis, benchmark, shape).await?);
                }
            }
            Ok(())
        })
        .await;
    progress("");
    // A round without those that it is compared with is left out.
    let rounds = Rounds::of(rounds, ceilings[1].len(), ended)?;
    ours.truncate(rounds.measured);

    let [many, one] = SHAPES;
    let result = UncontendedLock {
        connections: 1,
        redis_benchmark: ceiling(many, &ours, &ceilings[0])?,
        redis_benchmark_on_one_connection: ceiling(one, &ours, &ceilings[1])?,
        pairs_a_second: MedianRange::of(ours).context("there was no round")?,
    };
    print(strategy, &result, rounds.measured);
    bench.finish(Some(CLIENTS), result, rounds, vec![], json)
}

fn ceiling((connections, pipeline): (u32, u32), ours: &[f64], rates: &[Rates]) -> anyhow::Result<LockCeiling> {
    let pairs = rates.iter().map(|rates| rates.pairs());
    Ok(LockCeiling {
        connections,
        pipeline,
        pairs_a_second: MedianRange::over(rates, |rates| rates.pairs())?,
        acquire_a_second: MedianRange::over(rates, |rates| rates.acquire)?,
        release_a_second: MedianRange::over(rates, |rates| rates.release)?,
        ratio: MedianRange::of_ratios(ours.iter().copied(), pairs).context("there was no round")?,
    })
}

/// Each client acquires and releases one lock after another that no other client wants. Returns pairs per second.
async fn pairs_a_second(lock: &Arc<Lock>, duration: Duration) -> anyhow::Result<f64> {
    let mut clients = JoinSet::new();
    let began = Instant::now();
    let deadline = began + duration;
    for client in 0..CLIENTS {
        let lock = lock.clone();
        clients.spawn(async move {
            let mut pairs = 0_u64;
            while Instant::now() < deadline {
                let guard = lock.acquire(&format!("{client}-{pairs}")).await?;
                let released = guard.release().await?;
                ensure!(
                    released == Released::Free,
                    "a lock was not free after its release: {released:?}"
                );
                pairs += 1;
            }
            Ok(pairs)
        });
    }
    let mut pairs = 0;
    while let Some(client) = clients.join_next().await {
        pairs += client??;
    }
    Ok(pairs as f64 / began.elapsed().as_secs_f64())
}

fn print(strategy: &str, result: &UncontendedLock, rounds: usize) {
    let mut table = Table::new();
    table.load_style(presets::UTF8_FULL_CONDENSED).set_header([
        &format!("lv3/{strategy}, {CLIENTS} clients, a lock for each"),
        &format!("pairs a second: median (range) of {rounds} rounds"),
        "acquired",
        "released",
        "ratio",
    ]);
    let none = String::new;
    table.add_row([
        "the lock, on one connection".to_owned(),
        result.pairs_a_second.to_string(),
        none(),
        none(),
        none(),
    ]);
    for ceiling in [&result.redis_benchmark, &result.redis_benchmark_on_one_connection] {
        let name = match ceiling.connections {
            1 => format!("redis-benchmark -c 1 -P {}", ceiling.pipeline),
            many => format!("redis-benchmark -c {many}"),
        };
        table.add_row([
            name,
            ceiling.pairs_a_second.to_string(),
            format!("{:.0}", ceiling.acquire_a_second.median),
            format!("{:.0}", ceiling.release_a_second.median),
            format!("{:.2}", ceiling.ratio),
        ]);
    }
    println!("{table}");
    println!(
        "A pair is one acquire and one release. The {CLIENTS} clients of the lock are tasks that share one connection, as in a server. \
         redis-benchmark sends the same commands, first all acquires, then all releases; its pairs are computed from both."
    );
}
