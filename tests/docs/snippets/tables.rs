//! The tables of measurements in Markdown.

use harness::rush::Latency;
use oversold::{
    results::{
        bench::{
            AcceptThroughput, BenchResults, ContendedLock, DrainThroughput, PaidThroughput, PoolCurve, Throughput,
            UncontendedLock,
        },
        rush::{RushResults, StrategyResult},
    },
    statistics::MedianRange,
};

/// A figure of the round that is shown, and the range of all rounds if there were several.
fn with_range(of_this_one: f64, of_all: Option<&MedianRange>) -> String {
    of_all.map_or_else(
        || format!("{of_this_one:.0}"),
        |all| format!("{of_this_one:.0} ({:.0} to {:.0})", all.least, all.most),
    )
}

fn requests_a_second(result: &StrategyResult) -> String {
    let of_all = result.rounds.as_ref().map(|rounds| &rounds.requests_a_second);
    with_range(result.requests_a_second, of_all)
}

fn all_answered_ms(result: &StrategyResult) -> String {
    let of_all = result.rounds.as_ref().map(|rounds| &rounds.all_answered_ms);
    with_range(result.all_answered_ms, of_all)
}

fn all_completed_ms(result: &StrategyResult) -> String {
    let of_all = result
        .rounds
        .as_ref()
        .and_then(|rounds| rounds.all_completed_ms.as_ref());
    with_range(result.all_completed_ms.unwrap_or_default(), of_all)
}

/// Until every buyer knew the result: where the answer is final, that is the last answer.
pub(super) fn all_known_ms(result: &StrategyResult) -> String {
    match result.all_completed_ms {
        Some(_) => all_completed_ms(result),
        None => all_answered_ms(result),
    }
}

pub(super) fn last_sale_ms(result: &StrategyResult) -> String {
    let of_all = result.rounds.as_ref().and_then(|rounds| rounds.last_sale_ms.as_ref());
    result
        .last_sale_ms
        .map_or_else(|| "not recorded".to_owned(), |last| with_range(last, of_all))
}

/// What a table says about its rows: the rounds behind them, and whether their times can be compared.
pub(super) fn note<'a>(rows: impl Iterator<Item = &'a StrategyResult>) -> String {
    let rows: Vec<_> = rows.collect();
    let mut note = String::new();
    if rows.iter().any(|row| row.clicks != rows[0].clicks) {
        note += "\nThe rows differ in their number of requests, so their times and rates can't be compared with one another.\n";
    }
    if let Some(rounds) = rows.iter().find_map(|row| row.rounds.as_ref()) {
        let times = rounds.times;
        note += &format!(
            "\nEach row is one of {times} rounds, the one in the middle; in brackets is the range of all {times}.\n"
        );
    }
    note
}

/// The strategies of some levels, of rushes through more.
pub(super) fn of_levels(runs: &[RushResults], levels: &[&str]) -> Vec<RushResults> {
    let mut runs = runs.to_vec();
    for run in &mut runs {
        run.strategies
            .retain(|it| levels.iter().any(|&level| it.strategy.split('/').next() == Some(level)));
    }
    runs
}

pub(super) fn rush(runs: &[RushResults]) -> String {
    let mut table = "\
| strategy | requests | sold | oversold by | duplicates | stock | req/s | p50 ms | p95 ms | p99 ms | all answered after ms | verdict |
|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|---|
"
    .to_owned();
    let rows = || runs.iter().flat_map(|run| &run.strategies);
    for it in rows() {
        let stock = it.stock.map_or_else(|| "?".to_owned(), |stock| stock.to_string());
        let Latency {
            p50_ms, p95_ms, p99_ms, ..
        } = it.answered;
        table += &format!(
            "| `{}` | {} | {} | {} | {} | {stock} | {} | {p50_ms:.0} | {p95_ms:.0} | {p99_ms:.0} | {} | {} |\n",
            it.strategy,
            it.requests,
            it.sold,
            it.oversold_by,
            it.duplicates,
            requests_a_second(it),
            all_answered_ms(it),
            it.verdict
        );
    }
    table + &note(rows())
}

/// Every strategy, once for each number of instances that it ran on.
pub(super) fn side_by_side(runs: &[RushResults]) -> String {
    let mut table = "\
| strategy | instances | requests | sold | req/s | p50 ms | p95 ms | p99 ms | all answered after ms | verdict |
|---|--:|--:|--:|--:|--:|--:|--:|--:|---|
"
    .to_owned();
    let rows = || {
        runs.iter()
            .flat_map(|run| run.strategies.iter().map(|it| (run.instances, it)))
    };
    for (instances, it) in rows() {
        let Latency {
            p50_ms, p95_ms, p99_ms, ..
        } = it.answered;
        table += &format!(
            "| `{}` | {instances} | {} | {} | {} | {p50_ms:.0} | {p95_ms:.0} | {p99_ms:.0} | {} | {} |\n",
            it.strategy,
            it.requests,
            it.sold,
            requests_a_second(it),
            all_answered_ms(it),
            it.verdict
        );
    }
    table + &note(rows().map(|(_, it)| it))
}

/// A rush whose orders are accepted first and decided later.
pub(super) fn two_clocks(runs: &[RushResults]) -> String {
    let mut table = "\
| strategy | requests | sold | answered p50 ms | p95 ms | p99 ms | all answered after ms | completed p50 ms | p95 ms | p99 ms | all completed after ms | verdict |
|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|---|
"
    .to_owned();
    let rows = || runs.iter().flat_map(|run| &run.strategies);
    for it in rows() {
        let three = |Latency {
                         p50_ms, p95_ms, p99_ms, ..
                     }: &Latency| format!("{p50_ms:.0} | {p95_ms:.0} | {p99_ms:.0}");
        table += &format!(
            "| `{}` | {} | {} | {} | {} | {} | {} | {} |\n",
            it.strategy,
            it.requests,
            it.sold,
            three(&it.answered),
            all_answered_ms(it),
            it.completed.as_ref().map_or_else(|| " | | ".to_owned(), three),
            all_completed_ms(it),
            it.verdict
        );
    }
    table + &note(rows())
}

pub(super) fn accept(runs: &[BenchResults<AcceptThroughput>]) -> String {
    let mut table = "\
| strategy | connections | accepted/s: median (range) | p95 ms | with a produce that does nothing | ratio | `kafka-producer-perf-test`, records/s |
|---|--:|--:|--:|--:|--:|--:|
"
    .to_owned();
    for it in runs {
        let measured = &it.measured;
        let produced = measured.producer_perf_test.as_ref();
        table += &format!(
            "| `{}` | {} | {} | {:.0} | {} | {:.2} | {} |\n",
            it.strategy,
            it.clients.unwrap_or_default(),
            measured.orders_a_second,
            measured.p95_ms,
            measured.without_produce.orders_a_second,
            measured.without_produce.ratio,
            produced.map_or_else(|| "not measured".to_owned(), |it| format!("{:.0}", it.records_a_second))
        );
    }
    table
}

pub(super) fn drain(runs: &[BenchResults<DrainThroughput>]) -> String {
    let mut table = "\
| strategy | orders in the backlog | decided/s: median (range) | `pgbench`, orders/s | orders in a transaction of both | `COPY` of the same rows, orders/s | ratio to `COPY` | peak memory, MiB |
|---|--:|--:|--:|--:|--:|--:|--:|
"
    .to_owned();
    for it in runs {
        let measured = &it.measured;
        let (pgbench, batch) = match &measured.pgbench {
            Some(it) => (it.orders_a_second.to_string(), it.orders_in_a_transaction.to_string()),
            None => ("not measured".to_owned(), String::new()),
        };
        let (copy, ratio) = match &measured.copy {
            Some(it) => (it.orders_a_second.to_string(), format!("{:.3}", it.ratio)),
            None => ("not recorded".to_owned(), String::new()),
        };
        table += &format!(
            "| `{}` | {} | {} | {pgbench} | {batch} | {copy} | {ratio} | {:.0} |\n",
            it.strategy, measured.orders, measured.orders_a_second, measured.most_mib
        );
    }
    table
}

pub(super) fn payments(runs: &[BenchResults<PaidThroughput>]) -> String {
    let mut table = "\
| strategy | orders in the backlog | sold and paid/s: median (range) | decided/s without payments | ratio | requests for a charge, each |
|---|--:|--:|--:|--:|--:|
"
    .to_owned();
    for it in runs {
        let measured = &it.measured;
        table += &format!(
            "| `{}` | {} | {} | {} | {:.2} | {:.2} |\n",
            it.strategy,
            measured.orders,
            measured.sales_a_second,
            measured.without_payments,
            measured.ratio,
            measured.charge_requests_each
        );
    }
    table
}

pub(super) fn bench(runs: &[BenchResults<Throughput>]) -> String {
    let mut table = "\
| strategy | reservations/s: median (range) | pgbench, transactions/s | ratio | p50 ms | p99 ms |
|---|--:|--:|--:|--:|--:|
"
    .to_owned();
    for it in runs {
        let measured = &it.measured;
        let (ceiling, ratio) = match &measured.ceiling {
            Some(ceiling) => (
                ceiling.transactions_a_second.to_string(),
                format!("{:.2}", ceiling.ratio),
            ),
            None => ("not measured".to_owned(), String::new()),
        };
        table += &format!(
            "| `{}` | {} | {ceiling} | {ratio} | {:.1} | {:.1} |\n",
            it.strategy, measured.reservations_a_second, measured.p50_ms, measured.p99_ms
        );
    }
    table
}

/// The same where pgbench has no ceiling.
pub(super) fn rates(runs: &[BenchResults<Throughput>]) -> String {
    let mut table = "\
| strategy | reservations/s: median (range) | p50 ms | p99 ms |
|---|--:|--:|--:|
"
    .to_owned();
    for it in runs {
        let measured = &it.measured;
        table += &format!(
            "| `{}` | {} | {:.1} | {:.1} |\n",
            it.strategy, measured.reservations_a_second, measured.p50_ms, measured.p99_ms
        );
    }
    table
}

pub(super) fn waiters(runs: &[BenchResults<ContendedLock>]) -> String {
    let mut table = "\
| the lock of | waiters | processes | all had it after, ms: median (range) | commands sent, each | commands in scripts, each |
|---|--:|--:|--:|--:|--:|
"
    .to_owned();
    for it in runs {
        let measured = &it.measured;
        table += &format!(
            "| `{}` | {} | {} | {} | {:.2} | {:.2} |\n",
            it.strategy,
            measured.waiters,
            measured.instances,
            measured.took_ms,
            measured.commands_sent_each,
            measured.commands_in_scripts_each
        );
    }
    table
}

pub(super) fn lock(runs: &[BenchResults<UncontendedLock>]) -> String {
    let mut table = "\
| | pairs of acquire and release/s: median (range) | ratio of the lock to it |
|---|--:|--:|
"
    .to_owned();
    for it in runs {
        let BenchResults {
            strategy,
            measured: lock,
            ..
        } = it;
        let clients = it.clients.unwrap_or_default();
        table += &format!(
            "| the lock of `{strategy}`, {clients} tasks on one connection | {} | |\n",
            lock.pairs_a_second
        );
        for (name, pairs) in [
            (format!("-c {clients}"), &lock.redis_benchmark),
            (format!("-c 1 -P {clients}"), &lock.redis_benchmark_on_one_connection),
        ] {
            table += &format!(
                "| `redis-benchmark {name}` | {} | {:.2} |\n",
                pairs.pairs_a_second, pairs.ratio
            );
        }
    }
    table
}

pub(super) fn pools(runs: &[BenchResults<PoolCurve>]) -> String {
    let mut table = "\
| strategy | connections in the pool | reservations/s: median (range) | p50 ms | p99 ms |
|---|--:|--:|--:|--:|
"
    .to_owned();
    for BenchResults { strategy, measured, .. } in runs {
        for it in &measured.pools {
            table += &format!(
                "| `{strategy}` | {} | {} | {:.1} | {:.1} |\n",
                it.pool_size, it.reservations_a_second, it.p50_ms, it.p99_ms
            );
        }
    }
    table
}
