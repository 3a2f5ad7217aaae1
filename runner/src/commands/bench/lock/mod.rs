//! LV.3's lock on its own, without the sale that it protects: without contention, next to `redis-benchmark` with the same commands; and
//! under contention, with many waiters for the same lock.
//!
//! Redis is a private one, so that all it counts is the lock's.

mod commands;
mod contended;
mod uncontended;
pub(crate) mod waiters;

use std::time::Duration;

use anyhow::{bail, ensure};
use harness::backends::{Private, Redis, Reply};
use lv3_redis_lock::lock::{Backoff, Connections, FencingTokens, Guard, Lease, Owner, RLock, SpinLock};
use serde::Serialize;

use super::{
    BenchArgs, ONLY_LV3,
    bench_setup::{Rounds, print_void},
    redis_benchmark::RedisBenchmark,
    warn_of_debug_build,
};
use crate::{
    exit::ExitKind,
    interrupt::Signals,
    results::{ResultFile, RunMetadata, bench::BenchResults},
};

/// The default lease of a server.
const LEASE: Duration = Duration::from_secs(10);
/// Longer than any group of waiters takes: an acquire that times out is an error here.
const WAIT: Duration = Duration::from_secs(60);
/// The prefix of all keys, as a server has one.
const PREFIX: &str = "oversold:";

/// The strategies whose lock is measured.
const WITH_A_LOCK: [&str; 3] = ["spin", "rlock", "fenced"];

/// A strategy's lock.
enum Lock {
    Spin(SpinLock),
    RLock(RLock),
}

impl Lock {
    async fn open(strategy: &str, url: &str) -> anyhow::Result<Self> {
        let connections = Connections::open(url, PREFIX).await?;
        Ok(match strategy {
            "spin" => Self::Spin(SpinLock::new(connections, Lease::Fixed(LEASE), Backoff::default())?),
            "rlock" => Self::RLock(RLock::new(connections, Lease::Renewed(LEASE), FencingTokens::None)?),
            "fenced" => Self::RLock(RLock::new(
                connections,
                Lease::Renewed(LEASE),
                FencingTokens::Monotonic,
            )?),
            other => bail!("{other} has no lock that is measured"),
        })
    }

    async fn acquire(&self, name: &str) -> anyhow::Result<Guard> {
        // Each acquire has an owner of its own, as each request of a server has.
        let owner = Owner::fresh();
        Ok(match self {
            Self::Spin(lock) => lock.acquire(name, &owner, WAIT).await?,
            Self::RLock(lock) => lock.acquire(name, &owner, WAIT).await?,
        })
    }
}

/// Measures the lock of one of the level's strategies.
pub(super) async fn run(strategy: &str, args: &BenchArgs) -> anyhow::Result<ExitKind> {
    // Before anything is started; so is the file.
    ensure!(
        WITH_A_LOCK.contains(&strategy),
        "{ONLY_LV3}; lv3/{strategy} is none of them"
    );
    let benchmark = match args.waiters {
        None => Some(RedisBenchmark::find()?),
        Some(_) => None,
    };
    let json = args.json.as_deref().map(ResultFile::open).transpose()?;
    let mut signals = Signals::listen()?;
    warn_of_debug_build();
    let redis = signals.or_end(async { Ok(Redis::private().await?) }).await?;
    let bench = LockBench {
        strategy,
        metadata: RunMetadata::of_this_run(),
        redis,
    };
    match (benchmark, args.waiters) {
        (Some(benchmark), _) => uncontended::run(&bench, &benchmark, args, signals, json).await,
        (None, waiters) => contended::run(&bench, waiters.unwrap_or_default(), args, signals, json).await,
    }
}

/// The lock of one strategy, on a private Redis.
struct LockBench<'a> {
    /// The name within the level.
    strategy: &'a str,
    metadata: RunMetadata,
    redis: Private<Redis>,
}

impl LockBench<'_> {
    /// Prints what it was measured on and whether it is void, and writes the result file.
    fn finish(
        &self,
        clients: Option<u32>,
        measured: impl Serialize,
        rounds: Rounds,
        void: Vec<String>,
        json: Option<ResultFile>,
    ) -> anyhow::Result<ExitKind> {
        let report = self.redis.report();
        println!(
            "{}\nredis {} ({}), without persistence",
            self.metadata.conditions(),
            report.version,
            report.source
        );
        let exit = print_void(&void);
        rounds.check_complete()?;
        if let Some(json) = json {
            let results = BenchResults {
                metadata: RunMetadata {
                    redis: Some(report.into()),
                    void,
                    ..self.metadata.clone()
                },
                strategy: format!("lv3/{}", self.strategy),
                clients,
                seconds: None,
                measured,
            };
            json.write(&results)?;
        }
        Ok(exit)
    }
}

/// An error if Redis rejected the command.
fn check(reply: Reply) -> anyhow::Result<()> {
    match reply {
        Reply::Error(why) => bail!("Redis refuses: {why}"),
        _ => Ok(()),
    }
}
