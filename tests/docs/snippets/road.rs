//! The table of all levels.

use std::collections::BTreeMap;

use box_office::{Promise, Promises, Strategy};
use harness::rush::Answers;
use oversold::results::{
    bench::{BenchResults, DrainThroughput, Throughput},
    rush::{RushResults, StrategyResult},
};
use serde::Deserialize;
use serde_json::{Value, json};

use super::{source, tables};
use crate::strategies;

/// A result file that the table is made of.
#[derive(Deserialize)]
#[serde(untagged)]
pub(super) enum RoadRun {
    Rush(RushResults),
    Sustained(BenchResults<Throughput>),
    Drained(BenchResults<DrainThroughput>),
}

/// All levels: the rush, sustained throughput, oversell, scope of the guarantee, and size of the code.
///
/// The times are those of the rush on one instance; rushes on several only add by how much they oversold.
pub(super) fn all_levels(runs: &[RoadRun]) -> String {
    let mut table = "\
| strategy | requests | last ticket sold after ms | every buyer knows after ms | answered p50 ms | answered p95 ms | completed p95 ms | sustained/s | oversold by | holds on | lines of its own file |
|---|--:|--:|--:|--:|--:|--:|--:|--:|---|--:|
"
    .to_owned();
    let rushes: Vec<&RushResults> = runs.iter().filter_map(RoadRun::rush).collect();
    let sustained: BTreeMap<&str, String> = runs.iter().filter_map(RoadRun::sustained).collect();
    let Some(single) = rushes.iter().find(|run| run.instances == 1) else {
        return table;
    };
    let load = single.strategies.iter().map(|it| it.clicks).max().unwrap_or_default();
    for it in &single.strategies {
        let (level, name) = it.strategy.split_once('/').expect("a name is LEVEL/STRATEGY");
        let (level, strategy) = strategies()
            .find(|(other, strategy)| other.name == level && strategy.name == name)
            .unwrap_or_else(|| panic!("{} is no main strategy: `make results`", it.strategy));
        let oversold = rushes.iter().filter_map(|run| {
            let here = run.strategies.iter().find(|other| other.strategy == it.strategy)?;
            Some(match run.instances {
                1 => here.oversold_by.to_string(),
                instances => format!("{} on {instances}", here.oversold_by),
            })
        });
        let sustained = match (holds_on(strategy), sustained.get(it.strategy.as_str())) {
            (NOWHERE, _) => "none",
            (_, Some(rate)) => rate.as_str(),
            (_, None) => "not measured",
        };
        table += &format!(
            "| `{}` | {} | {} | {sustained} | {} | {} | {} |\n",
            it.strategy,
            it.requests,
            times(it, it.clicks == load),
            oversold.collect::<Vec<_>>().join(", "),
            holds_on(strategy),
            lines_of_code(&source(&level.source(strategy))),
        );
    }
    table + LEGEND + &tables::note(single.strategies.iter().filter(|it| it.clicks == load))
}

/// What the columns mean.
const LEGEND: &str = "
*Last ticket sold after*: from the opening of the gate until the last buyer with a ticket knew of it. *Every buyer knows after*: until the last \
buyer knew the result, and most results are refusals. A sale that breaks has no time until its last ticket, and a strategy that breaks it \
sustains no sales, so no rate is shown for it: what it sells beyond its tickets is not there. *Another load*: its buyers click once, all others twice, so \
the times cannot be compared. *Sustained*: of LV.2 and LV.3 the reservations confirmed per second from a \
stock that does not run out, for 64 clients in a closed loop; of LV.4 the orders decided per second by one consumer from a backlog, up to 2,000 \
of them in one commit of `single-writer`. *Within the lease*: as long as no holder of the lock is paused for longer than its lease. The lines are \
those of the strategy's own file, without comments, and without the modules that it may use: `lock/`, `redis_lock.rs`, `decision_row.rs` and `pipeline/`.
";

/// The five columns of times. Times under another load than that of the other rows are not shown.
fn times(it: &StrategyResult, same_load: bool) -> String {
    if !same_load {
        return ["another load"; 5].join(" | ");
    }
    let last_sale = match &it.broken[..] {
        [] => tables::last_sale_ms(it),
        _ => "sale broken".to_owned(),
    };
    // Where the answer is final, both clocks are one.
    let completed = it.completed.as_ref().map_or_else(
        || "as answered".to_owned(),
        |completed| format!("{:.0}", completed.p95_ms),
    );
    format!(
        "{last_sale} | {} | {:.0} | {:.0} | {completed}",
        tables::all_known_ms(it),
        it.answered.p50_ms,
        it.answered.p95_ms
    )
}

impl RoadRun {
    fn rush(&self) -> Option<&RushResults> {
        match self {
            Self::Rush(run) => Some(run),
            Self::Sustained(_) | Self::Drained(_) => None,
        }
    }

    /// A strategy and its sustained throughput.
    fn sustained(&self) -> Option<(&str, String)> {
        match self {
            Self::Rush(_) => None,
            Self::Sustained(run) => Some((&run.strategy, run.measured.reservations_a_second.to_string())),
            Self::Drained(run) => Some((&run.strategy, run.measured.orders_a_second.to_string())),
        }
    }
}

/// Where a strategy of LV.1 keeps its guarantee.
const NOWHERE: &str = "none";

/// The number of instances on which a strategy breaks no guarantee.
fn holds_on(strategy: &Strategy) -> &'static str {
    let breaks = |promises: Promises| promises.those(Promise::Breaks).count() > 0;
    let guarantee = strategy.guarantee;
    match (breaks(guarantee.single_instance), breaks(guarantee.multi_instance)) {
        (true, _) => NOWHERE,
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

#[cfg(test)]
mod tests {
    use super::*;

    fn strategy(name: &str, clicks: u32, completed: Value, broken: &[&str]) -> Value {
        json!({
            "strategy": name, "promises": "", "clicks": clicks, "requests": 1000 * clicks, "sold": 100, "stock": 0, "oversold_by": 0,
            "duplicates": 0, "answers": Answers::default(), "requests_a_second": 1.0, "took_ms": 30.0, "answered": latency(20.0),
            "all_answered_ms": 30.0, "completed": completed, "all_completed_ms": null, "last_sale_ms": 12.0, "greatest_overlap": 1,
            "client_share": 0.1, "broken": broken, "seen": "", "verdict": "as promised",
        })
    }

    fn latency(ms: f64) -> Value {
        json!({ "p50_ms": ms, "p95_ms": ms + 0.4, "p99_ms": ms, "max_ms": ms })
    }

    fn rush(instances: u32, strategies: &[Value]) -> RoadRun {
        run(json!({ "capacity": 100, "buyers": 1000, "instances": instances, "work_ms": 0, "strategies": strategies }))
    }

    fn run(mut results: Value) -> RoadRun {
        let metadata = json!({
            "command": "oversold rush", "commit": "4b825dc642cb", "release": true,
            "machine": { "system": "linux x86_64", "processor": null, "cores": 2, "memory_mib": 4000 },
        });
        let metadata = metadata.as_object().unwrap().clone();
        results.as_object_mut().unwrap().extend(metadata);
        serde_json::from_value(results).unwrap()
    }

    fn rate(median: f64) -> Value {
        json!({ "median": median, "least": median - 10.0, "most": median + 10.0 })
    }

    #[test]
    fn it_has_both_clocks_and_says_where_each_strategy_holds() {
        let all = [
            strategy("lv2/mutex", 2, Value::Null, &[]),
            strategy("lv3/rlock", 2, Value::Null, &[]),
            strategy("lv3/fenced", 2, Value::Null, &[]),
            strategy("lv4/locked", 2, latency(300.0), &[]),
        ];
        let mut three = all.clone();
        three[0]["oversold_by"] = json!(7);
        let table = all_levels(&[rush(1, &all), rush(3, &three)]);
        for row in [
            "| `lv2/mutex` | 2000 | 12 | 30 | 20 | 20 | as answered | not measured | 0, 7 on 3 | one instance | ",
            "| `lv3/rlock` | 2000 | 12 | 30 | 20 | 20 | as answered | not measured | 0, 0 on 3 | any number, within the lease | ",
            "| `lv3/fenced` | 2000 | 12 | 30 | 20 | 20 | as answered | not measured | 0, 0 on 3 | any number | ",
            "| `lv4/locked` | 2000 | 12 | 30 | 20 | 20 | 300 | not measured | 0, 0 on 3 | any number, within the lease | ",
        ] {
            assert!(table.contains(row), "{table}");
        }
    }

    #[test]
    fn rows_under_another_load_show_no_times_and_a_broken_sale_no_rate() {
        let table = all_levels(&[rush(
            1,
            &[
                strategy("lv1/read-then-write", 1, Value::Null, &["I1", "I2"]),
                strategy("lv1/check-then-insert", 2, Value::Null, &["I3"]),
                strategy("lv2/mutex", 2, Value::Null, &[]),
            ],
        )]);
        for row in [
            "| `lv1/read-then-write` | 1000 | another load | another load | another load | another load | another load | none | 0 |",
            "| `lv1/check-then-insert` | 2000 | sale broken | 30 | 20 | 20 | as answered | none | 0 |",
            "| `lv2/mutex` | 2000 | 12 | 30 | 20 | 20 | as answered | not measured | 0 |",
        ] {
            assert!(table.contains(row), "{table}");
        }
    }

    #[test]
    fn sustained_throughput_comes_from_the_benches() {
        let rushes = [
            strategy("lv2/mutex", 2, Value::Null, &[]),
            strategy("lv4/locked", 2, latency(300.0), &[]),
        ];
        let bench = json!({
            "strategy": "lv2/mutex", "clients": 64, "seconds": 5, "pool_size": 4, "reservations_a_second": rate(1500.0),
            "p50_ms": rate(40.0), "p99_ms": rate(50.0), "refused": 0, "cut_off": 0, "ready_ms": rate(90.0), "idle_mib": 9.0,
            "mib_with_1000_connections": 20.0, "rows_judged": 1, "rounds": [],
        });
        let drain = json!({
            "strategy": "lv4/locked", "pool_size": 4, "orders": 5000, "consumers": 1, "orders_a_second": rate(570.0), "took_ms": rate(1.0),
            "ready_ms": rate(1.0), "most_mib": rate(20.0), "rows_judged": 1, "rounds": [],
        });
        let table = all_levels(&[rush(1, &rushes), run(bench), run(drain)]);
        for (name, expected) in [
            ("lv2/mutex", "| 1500 (1490 to 1510) |"),
            ("lv4/locked", "| 570 (560 to 580) |"),
        ] {
            let row = table.lines().find(|line| line.contains(name)).unwrap();
            assert!(row.contains(expected), "{row}");
        }
    }

    #[test]
    fn comments_and_empty_lines_are_no_lines_of_code() {
        assert_eq!(lines_of_code("//! Docs.\n\nuse a;\n    // why\n    sell();\n"), 2);
    }
}
