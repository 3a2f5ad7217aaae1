//! The tables of measurements in Markdown.

use box_office::{Promise, Promises, Strategy};
use harness::rush::{Answers, Latency};
use oversold::{
    results::{
        bench::{
            AcceptThroughput, BenchResults, ContendedLock, DrainThroughput, PoolCurve, Throughput, UncontendedLock,
        },
        rush::{Rounds, RushResults, StrategyResult},
    },
    statistics::MedianRange,
};

use serde_json::{Value, json};

use super::source;
use crate::strategies;

/// A figure of the round that is shown; or of all rounds with their range, if there were several.
fn with_range(result: &StrategyResult, of_this_one: f64, of_all: fn(&Rounds) -> Option<&MedianRange>) -> String {
    let of_all = result.rounds.as_ref().and_then(of_all);
    of_all.map_or_else(|| format!("{of_this_one:.0}"), MedianRange::to_string)
}

fn requests_a_second(result: &StrategyResult) -> String {
    with_range(result, result.requests_a_second, |rounds| {
        Some(&rounds.requests_a_second)
    })
}

fn all_answered_ms(result: &StrategyResult) -> String {
    with_range(result, result.all_answered_ms, |rounds| Some(&rounds.all_answered_ms))
}

fn all_completed_ms(result: &StrategyResult) -> String {
    with_range(result, result.all_completed_ms.unwrap_or_default(), |rounds| {
        rounds.all_completed_ms.as_ref()
    })
}

/// What a table says about the rounds behind it.
fn rounds_note(runs: &[RushResults]) -> String {
    let mut all = runs.iter().flat_map(|run| &run.strategies);
    all.find_map(|it| it.rounds.as_ref())
        .map_or_else(String::new, |rounds| {
            format!(
                "\nWith a range: the median of {} rounds. Without: the round in the middle.\n",
                rounds.times
            )
        })
}

pub(super) fn rush(runs: &[RushResults]) -> String {
    let mut table = "\
| strategy | sold | oversold by | duplicates | stock | req/s | p50 ms | p95 ms | p99 ms | all answered after ms | verdict |
|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|---|
"
    .to_owned();
    for it in runs.iter().flat_map(|run| &run.strategies) {
        let stock = it.stock.map_or_else(|| "?".to_owned(), |stock| stock.to_string());
        let Latency {
            p50_ms, p95_ms, p99_ms, ..
        } = it.answered;
        table += &format!(
            "| `{}` | {} | {} | {} | {stock} | {} | {p50_ms:.0} | {p95_ms:.0} | {p99_ms:.0} | {} | {} |\n",
            it.strategy,
            it.sold,
            it.oversold_by,
            it.duplicates,
            requests_a_second(it),
            all_answered_ms(it),
            it.verdict
        );
    }
    table + &rounds_note(runs)
}

/// Every strategy, once for each number of instances that it ran on.
pub(super) fn side_by_side(runs: &[RushResults]) -> String {
    let mut table = "\
| strategy | instances | sold | req/s | p50 ms | p95 ms | p99 ms | all answered after ms | verdict |
|---|--:|--:|--:|--:|--:|--:|--:|---|
"
    .to_owned();
    let rows = runs
        .iter()
        .flat_map(|run| run.strategies.iter().map(|it| (run.instances, it)));
    for (instances, it) in rows {
        let Latency {
            p50_ms, p95_ms, p99_ms, ..
        } = it.answered;
        table += &format!(
            "| `{}` | {instances} | {} | {} | {p50_ms:.0} | {p95_ms:.0} | {p99_ms:.0} | {} | {} |\n",
            it.strategy,
            it.sold,
            requests_a_second(it),
            all_answered_ms(it),
            it.verdict
        );
    }
    table + &rounds_note(runs)
}

/// All levels: latency, sales, oversell, scope of the guarantee, and size of the code.
///
/// The figures are those of the run on one instance; runs on several only add by how much they oversold.
pub(super) fn all_levels(runs: &[RushResults]) -> String {
    let mut table = "\
| strategy | answered p50 ms | answered p95 ms | completed p95 ms | sales/s | oversold by | holds on | lines of its own file |
|---|--:|--:|--:|--:|--:|---|--:|
"
    .to_owned();
    let Some(single) = runs.iter().find(|run| run.instances == 1) else {
        return table;
    };
    for it in &single.strategies {
        let (level, name) = it.strategy.split_once('/').expect("a name is LEVEL/STRATEGY");
        let (level, strategy) = strategies()
            .find(|(other, strategy)| other.name == level && strategy.name == name)
            .unwrap_or_else(|| panic!("{} is no main strategy: `make results`", it.strategy));
        let oversold = runs.iter().filter_map(|run| {
            let here = run.strategies.iter().find(|other| other.strategy == it.strategy)?;
            Some(match run.instances {
                1 => here.oversold_by.to_string(),
                instances => format!("{} on {instances}", here.oversold_by),
            })
        });
        // Where the answer is final, both clocks are one.
        let completed = it.completed.as_ref().map_or_else(
            || "as answered".to_owned(),
            |completed| format!("{:.0}", completed.p95_ms),
        );
        table += &format!(
            "| `{}` | {:.0} | {:.0} | {completed} | {:.0} | {} | {} | {} |\n",
            it.strategy,
            it.answered.p50_ms,
            it.answered.p95_ms,
            it.sales_a_second,
            oversold.collect::<Vec<_>>().join(", "),
            holds_on(strategy),
            lines_of_code(&source(&level.source(strategy))),
        );
    }
    table += "
*Within the lease*: as long as no holder of the lock is paused for longer than its lease. The lines are those of the strategy's own file, \
without comments, and without the modules that it may use: `lock/`, `redis_lock.rs` and `pipeline/`.
";
    table + &rounds_note(runs)
}

/// The number of instances on which a strategy breaks no guarantee.
fn holds_on(strategy: &Strategy) -> &'static str {
    let breaks = |promises: Promises| promises.those(Promise::Breaks).count() > 0;
    let guarantee = strategy.guarantee;
    match (breaks(guarantee.single_instance), breaks(guarantee.multi_instance)) {
        (true, _) => "none",
        (false, true) => "one instance",
        // The failure modes of the main strategies are all ends of a lease.
        (false, false) if !guarantee.failure_modes.is_empty() => "any number, within the lease",
        (false, false) => "any number",
    }
}

/// Lines of a file that are neither empty nor a comment.
fn lines_of_code(source: &str) -> usize {
    let is_code = |line: &&str| !line.is_empty() && !line.starts_with("//");
    source.lines().map(str::trim).filter(is_code).count()
}

/// A rush whose orders are accepted first and decided later.
pub(super) fn two_clocks(runs: &[RushResults]) -> String {
    let mut table = "\
| strategy | sold | answered p50 ms | p95 ms | p99 ms | all answered after ms | completed p50 ms | p95 ms | p99 ms | all completed after ms | verdict |
|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|---|
"
    .to_owned();
    for it in runs.iter().flat_map(|run| &run.strategies) {
        let three = |Latency {
                         p50_ms, p95_ms, p99_ms, ..
                     }: &Latency| format!("{p50_ms:.0} | {p95_ms:.0} | {p99_ms:.0}");
        table += &format!(
            "| `{}` | {} | {} | {} | {} | {} | {} |\n",
            it.strategy,
            it.sold,
            three(&it.answered),
            all_answered_ms(it),
            it.completed.as_ref().map_or_else(|| " | | ".to_owned(), three),
            all_completed_ms(it),
            it.verdict
        );
    }
    table + &rounds_note(runs)
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
| strategy | orders in the backlog | decided/s: median (range) | pgbench, orders/s | orders in a transaction | ratio | peak memory, MiB |
|---|--:|--:|--:|--:|--:|--:|
"
    .to_owned();
    for it in runs {
        let measured = &it.measured;
        let (ceiling, batch, ratio) = match &measured.ceiling {
            Some(it) => (
                it.orders_a_second.to_string(),
                it.orders_in_a_transaction.to_string(),
                format!("{:.2}", it.ratio),
            ),
            None => ("not measured".to_owned(), String::new(), String::new()),
        };
        table += &format!(
            "| `{}` | {} | {} | {ceiling} | {batch} | {ratio} | {:.0} |\n",
            it.strategy, measured.orders, measured.orders_a_second, measured.most_mib
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
| the lock of | waiters | all had it after, ms: median (range) | commands sent, each | commands in scripts, each |
|---|--:|--:|--:|--:|
"
    .to_owned();
    for it in runs {
        let measured = &it.measured;
        table += &format!(
            "| `{}` | {} | {} | {:.2} | {:.2} |\n",
            it.strategy,
            measured.waiters,
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

#[test]
fn the_table_of_all_levels_has_both_clocks_and_says_where_each_strategy_holds() {
    let run = |instances: u32, oversold_by: u64| -> RushResults {
        let latency = |ms: f64| json!({ "p50_ms": ms, "p95_ms": ms + 0.4, "p99_ms": ms, "max_ms": ms });
        let strategy = |name: &str, completed: Value| {
            json!({
                "strategy": name, "promises": "", "clicks": 1, "requests": 1000, "sold": 100, "stock": 0, "oversold_by": oversold_by,
                "duplicates": 0, "answers": Answers::default(), "requests_a_second": 1.0, "sales_a_second": 250.0, "took_ms": 30.0,
                "answered": latency(20.0), "all_answered_ms": 30.0, "completed": completed, "all_completed_ms": null,
                "greatest_overlap": 1, "client_share": 0.1, "broken": [], "seen": "", "verdict": "as promised",
            })
        };
        let json = json!({
            "command": "oversold rush", "commit": "4b825dc642cb", "release": true,
            "machine": { "system": "linux x86_64", "processor": null, "cores": 2, "memory_mib": 4000 },
            "capacity": 100, "buyers": 1000, "instances": instances, "work_ms": 0,
            "strategies": [
                strategy("lv2/mutex", Value::Null),
                strategy("lv3/spin", Value::Null),
                strategy("lv3/rlock", Value::Null),
                strategy("lv3/fenced", Value::Null),
                strategy("lv4/locked", latency(300.0)),
                strategy("lv4/single-writer", latency(300.0)),
            ],
        });
        serde_json::from_value(json).unwrap()
    };
    let table = all_levels(&[run(1, 0), run(3, 7)]);
    for row in [
        "| `lv2/mutex` | 20 | 20 | as answered | 250 | 0, 7 on 3 | one instance | ",
        "| `lv3/spin` | 20 | 20 | as answered | 250 | 0, 7 on 3 | any number, within the lease | ",
        "| `lv3/rlock` | 20 | 20 | as answered | 250 | 0, 7 on 3 | any number, within the lease | ",
        "| `lv3/fenced` | 20 | 20 | as answered | 250 | 0, 7 on 3 | any number | ",
        "| `lv4/locked` | 20 | 20 | 300 | 250 | 0, 7 on 3 | any number, within the lease | ",
        "| `lv4/single-writer` | 20 | 20 | 300 | 250 | 0, 7 on 3 | any number | ",
    ] {
        assert!(table.contains(row), "{table}");
    }
    assert_eq!(lines_of_code("//! Docs.\n\nuse a;\n    // why\n    sell();\n"), 2);
}
