//! The sizing model: what a sale takes, from the rates in the result files.
//!
//! It is a fluid model in steady state, and says so: rates are medians of one machine, and that they add up over instances and sales is an
//! assumption. Every formula is printed with its result.

use std::{fmt, fs, path::Path};

use anyhow::{Context, ensure};
use box_office::{Limits, Promise, Service};
use serde::de::DeserializeOwned;

use crate::{
    levels::SelectedStrategy,
    results::{
        bench::{AcceptThroughput, BenchResults, DrainThroughput, PoolCurve, PoolThroughput, Throughput},
        rush::RushResults,
    },
};

/// The share of a measured rate that is planned with. The rest is for bursts within a second, and for the loss of an instance.
const UTILISATION: f64 = 0.6;
/// One instance may be drained and one be lost at the same time.
const LEAST_INSTANCES: f64 = 3.0;
/// Besides the pool, an instance has a connection that its metrics are read on.
const CONNECTIONS_BESIDE_THE_POOL: f64 = 1.0;
/// The same for LV.4, where one more listens for decided orders, and one is for the readiness probe.
const CONNECTIONS_BESIDE_THE_POOL_OF_LV4: f64 = 3.0;
/// The Kafka clients of an instance: the producer, a consumer, and the one that reads the lag.
const KAFKA_CLIENTS: f64 = 3.0;

/// A sale to size.
#[derive(Clone, Copy, Debug)]
pub struct Demand {
    /// Buyers of all sales together.
    pub buyers: u32,
    /// Minutes within which they come.
    pub minutes: u32,
    /// Arrivals in the busiest minute, as a multiple of the mean minute; at most `minutes`.
    pub peak: u32,
    /// Sales that are open at the same time, with as many buyers each.
    pub sales: u32,
}

/// A measured number.
#[derive(Clone, Debug)]
struct Input {
    symbol: &'static str,
    what: &'static str,
    value: f64,
    /// The file and the commit.
    source: String,
}

/// A computed number.
#[derive(Clone, Debug)]
struct Row {
    symbol: &'static str,
    what: &'static str,
    formula: &'static str,
    value: String,
}

/// What a strategy was measured with.
pub struct Measured {
    selected: SelectedStrategy,
    /// Requests per second that an instance accepts; `None` where an answer is the decision.
    accepted: Option<Input>,
    /// Requests per second that are decided in one sale.
    decided: Input,
    /// Seconds until a buyer knows.
    latency: Input,
    /// The pool with the highest rate.
    pool: Input,
    idle_mib: Input,
    mib_with_1000_connections: Input,
}

/// The size of a sale.
pub struct Sizing {
    title: String,
    inputs: Vec<Input>,
    rows: Vec<Row>,
    advice: Option<String>,
}

impl Measured {
    /// Reads what was measured about a strategy, `LEVEL/STRATEGY`, from a folder of result files.
    ///
    /// # Errors
    /// The strategy oversells on several instances, or a file is missing or no result.
    pub fn read(strategy: &str, results: &Path) -> anyhow::Result<Self> {
        let selected = SelectedStrategy::one(strategy)?;
        let name = selected.name();
        let promises = selected.strategy.guarantee.multi_instance;
        let broken: Vec<&str> = promises.those(Promise::Breaks).map(|it| it.code()).collect();
        ensure!(
            broken.is_empty(),
            "{name} breaks {} on several instances: there is no size at which it sells right",
            broken.join(", ")
        );
        let (level, short) = (selected.level.name, selected.strategy.name);
        let (accepted, decided, latency, pool, idle, loaded) = match level {
            "lv4" => {
                let (accept, cited): (BenchResults<AcceptThroughput>, _) =
                    read(results, &format!("lv4-accept-{short}"))?;
                let (drain, drained): (BenchResults<DrainThroughput>, _) =
                    read(results, &format!("lv4-drain-{short}"))?;
                let (rush, rushed): (RushResults, _) = read(results, "road")?;
                let completed = rush.strategies.iter().find(|it| it.strategy == name);
                let completed = completed.and_then(|it| it.completed.as_ref());
                let seconds = completed.with_context(|| format!("road.json has no {name}"))?.p95_ms / 1e3;
                let accept = accept.measured;
                (
                    Some((accept.orders_a_second.median, cited.clone())),
                    (drain.measured.orders_a_second.median, drained),
                    (seconds, rushed),
                    (f64::from(accept.pool_size), cited.clone()),
                    (accept.idle_mib, cited.clone()),
                    (accept.mib_with_1000_connections, cited),
                )
            }
            _ => {
                let (bench, cited): (BenchResults<Throughput>, _) = read(results, &format!("{level}-bench-{short}"))?;
                let bench = bench.measured;
                let curve: Option<(BenchResults<PoolCurve>, String)> =
                    read(results, &format!("{level}-pools-{short}")).ok();
                let best = curve.and_then(|(curve, cited)| {
                    let rate = |it: &&PoolThroughput| it.reservations_a_second.median;
                    let best = curve.measured.pools.iter().max_by(|a, b| rate(a).total_cmp(&rate(b)))?;
                    Some((f64::from(best.pool_size), cited))
                });
                (
                    None,
                    (bench.reservations_a_second.median, cited.clone()),
                    (bench.p99_ms.median / 1e3, cited.clone()),
                    best.unwrap_or_else(|| (f64::from(bench.pool_size), cited.clone())),
                    (bench.idle_mib, cited.clone()),
                    (bench.mib_with_1000_connections, cited),
                )
            }
        };
        let input = |symbol, what, (value, source)| Input {
            symbol,
            what,
            value,
            source,
        };
        Ok(Self {
            selected,
            accepted: accepted.map(|it| input("a", "requests accepted per second by one instance", it)),
            decided: input("d", "requests decided per second in one sale", decided),
            latency: input("W", "seconds until a buyer knows the result", latency),
            pool: input("k", "connections in the pool", pool),
            idle_mib: input("i", "memory of an idle instance, MiB", idle),
            mib_with_1000_connections: input("j", "its memory with 1,000 connections, MiB", loaded),
        })
    }

    /// The size of a sale.
    pub fn size(&self, demand: &Demand) -> Sizing {
        let [buyers, minutes, peak, sales] = [demand.buyers, demand.minutes, demand.peak, demand.sales].map(f64::from);
        let Self {
            decided, latency, pool, ..
        } = self;
        let needs = self.selected.strategy.needs;
        let asynchronous = needs.contains(&Service::Kafka);
        let connections_each = Limits::default().connections as f64;

        let arrivals = peak * buyers / (60.0 * minutes);
        let capacity = UTILISATION * sales * decided.value;
        let admitted = arrivals.min(capacity);
        let waiting = [0.0, 60.0 * (arrivals - admitted), buyers - 60.0 * minutes * admitted];
        let waiting = waiting.into_iter().fold(0.0, f64::max);
        let in_flight = admitted * latency.value;
        let by_rate = self
            .accepted
            .as_ref()
            .map_or(0.0, |a| admitted / (UTILISATION * a.value))
            .ceil();
        let by_connections = (in_flight / (UTILISATION * connections_each)).ceil();
        let instances = LEAST_INSTANCES.max(by_rate).max(by_connections);
        // LV.4 shares no row between requests: its pool is not what buyers wait for.
        let pool_each = if asynchronous {
            pool.value
        } else {
            (pool.value * sales / instances).ceil().min(pool.value)
        };
        let beside = if asynchronous {
            CONNECTIONS_BESIDE_THE_POOL_OF_LV4
        } else {
            CONNECTIONS_BESIDE_THE_POOL
        };
        let [idle, loaded] = [self.idle_mib.value, self.mib_with_1000_connections.value];
        let memory = idle + (loaded - idle) * in_flight / instances / 1000.0;

        let row = |symbol, what, formula, value: f64| Row {
            symbol,
            what,
            formula,
            value: with_commas(value.round()),
        };
        let mut rows = vec![
            row(
                "λ",
                "arrivals per second in the busiest minute",
                "P × B ÷ (60 × M)",
                arrivals,
            ),
            row("α", "of these, admitted per second", "min(λ, u × S × d)", admitted),
            row(
                "Q",
                "buyers who wait to be admitted, at most",
                "max(0, 60 × (λ − α), B − 60 × M × α)",
                waiting,
            ),
            row(
                "",
                "for how many seconds, at most",
                "Q ÷ α",
                (waiting / admitted).ceil(),
            ),
            row(
                "C",
                "requests and event streams that are open at once",
                "α × W",
                in_flight.ceil(),
            ),
        ];
        rows.push(match self.accepted {
            Some(_) => row(
                "n",
                "instances",
                "max(3, α ÷ (u × a), C ÷ (u × 8192)), rounded up",
                instances,
            ),
            None => row("n", "instances", "max(3, C ÷ (u × 8192)), rounded up", instances),
        });
        rows.push(row(
            "",
            "memory of an instance, MiB",
            "i + (j − i) × C ÷ n ÷ 1000",
            memory.ceil(),
        ));
        if asynchronous {
            let partitions = instances.max((admitted / (UTILISATION * decided.value)).ceil());
            rows.push(row(
                "",
                "partitions of the orders topic, at least",
                "max(n, α ÷ (u × d)), rounded up",
                partitions,
            ));
            rows.push(row(
                "",
                "consumers that have a sale to decide, at most",
                "min(S, n)",
                sales.min(instances),
            ));
        }
        rows.push(match asynchronous {
            true => row("p", "pool of an instance (DATABASE_POOL_SIZE)", "k", pool_each),
            false => row(
                "p",
                "pool of an instance (DATABASE_POOL_SIZE)",
                "min(k, k × S ÷ n), rounded up",
                pool_each,
            ),
        });
        let postgres = (instances + 1.0) * (pool_each + beside) + 1.0;
        rows.push(match asynchronous {
            true => row("", "connections to Postgres", "(n + 1) × (p + 3) + 1", postgres),
            false => row("", "connections to Postgres", "(n + 1) × (p + 1) + 1", postgres),
        });
        if needs.contains(&Service::Redis) {
            // Commands, and where waiters are woken, notifications.
            rows.push(match self.selected.strategy.name {
                "rlock" | "fenced" => row("", "connections to Redis", "(n + 1) × 2", (instances + 1.0) * 2.0),
                _ => row("", "connections to Redis", "n + 1", instances + 1.0),
            });
        }
        if asynchronous {
            rows.push(row(
                "",
                "clients of Kafka",
                "(n + 1) × 3",
                (instances + 1.0) * KAFKA_CLIENTS,
            ));
        }

        Sizing {
            title: format!(
                "{}: B = {} buyers within M = {} minutes; the busiest minute brings P = {} times the mean; S = {} sale(s); u = {UTILISATION}",
                self.selected.name(),
                with_commas(buyers),
                demand.minutes,
                demand.peak,
                demand.sales,
            ),
            inputs: self.inputs().cloned().collect(),
            rows,
            advice: (admitted < arrivals).then(|| {
                let limit = (admitted / instances).floor();
                let how = match asynchronous {
                    true => format!("RATE_LIMIT={limit:.0} for each instance"),
                    false => "a waiting room in front of the instances".to_owned(),
                };
                format!(
                    "The sale's {} can't take the busiest minute, and more instances would not change that: admit α a second with {how}.",
                    if asynchronous { "partition" } else { "row" }
                )
            }),
        }
    }

    fn inputs(&self) -> impl Iterator<Item = &Input> {
        self.accepted.iter().chain([
            &self.decided,
            &self.latency,
            &self.pool,
            &self.idle_mib,
            &self.mib_with_1000_connections,
        ])
    }

    /// The sizes of several sales as a table in Markdown, and the measured rates under it.
    pub fn markdown(&self, demands: &[Demand]) -> String {
        let sizes: Vec<Sizing> = demands.iter().map(|demand| self.size(demand)).collect();
        let mut text = format!("| `{}` | |", self.selected.name());
        for demand in demands {
            text += &format!(" {} buyers |", with_commas(demand.buyers.into()));
        }
        text += &format!("\n|---|---|{}\n", "--:|".repeat(demands.len()));
        for (number, row) in sizes.first().map_or(&[][..], |first| &first.rows).iter().enumerate() {
            text += &format!("| {} | {} |", named(row.what, row.symbol), row.formula);
            for size in &sizes {
                text += &format!(" {} |", size.rows[number].value);
            }
            text += "\n";
        }
        text += "\n";
        for Input {
            symbol,
            what,
            value,
            source,
        } in self.inputs()
        {
            text += &format!("- *{symbol}* = {}: {what} ({source})\n", significant(*value));
        }
        text
    }
}

impl fmt::Display for Sizing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "{}\n\nmeasured, by one instance on the machine of these files",
            self.title
        )?;
        for Input {
            symbol,
            what,
            value,
            source,
        } in &self.inputs
        {
            writeln!(f, "  {symbol:1} {what:<50} {:>10}   {source}", significant(*value))?;
        }
        writeln!(f, "\ncomputed")?;
        for Row {
            symbol,
            what,
            formula,
            value,
        } in &self.rows
        {
            writeln!(f, "  {symbol:1} {what:<50} {value:>10}   {formula}")?;
        }
        if let Some(advice) = &self.advice {
            writeln!(f, "\n{advice}")?;
        }
        f.write_str(LIMITS)
    }
}

/// What the model does not know.
const LIMITS: &str = "
what this rests on
  The rates are those of one machine, whose cores instance, clients and services shared. Measure yours: oversold bench.
  That n instances accept n times as much, and S sales are decided S times as fast, is assumed: no measurement here has more than one
  machine. A sale is decided in one row or one partition: more instances do not decide it faster.
  u, P and the three instances are conventions. n + 1: a rolling update starts an instance before it stops one. + 1: the migration.
  An instance whose live page is watched has one more connection to Postgres.
";

/// Reads a result file. Also returns how to cite it.
fn read<R: DeserializeOwned>(results: &Path, name: &str) -> anyhow::Result<(R, String)> {
    #[derive(serde::Deserialize)]
    struct Measured {
        commit: Option<String>,
    }

    let shown = format!("results/{name}.json");
    let text = fs::read_to_string(results.join(format!("{name}.json")))
        .with_context(|| format!("{shown} is missing: make results measures it"))?;
    let context = || format!("{shown} is no result of this version: make results measures it anew");
    let run = serde_json::from_str(&text).with_context(context)?;
    let Measured { commit } = serde_json::from_str(&text).with_context(context)?;
    let commit = commit.as_deref().unwrap_or("unknown");
    Ok((run, format!("{shown}, commit {commit}")))
}

fn named(what: &str, symbol: &str) -> String {
    match symbol {
        "" => what.to_owned(),
        _ => format!("*{symbol}*: {what}"),
    }
}

/// A whole number from 100 on, else with two digits behind the point where it has any.
fn significant(value: f64) -> String {
    match value {
        _ if value.fract() == 0.0 || value >= 100.0 => with_commas(value.round()),
        _ => format!("{value:.2}"),
    }
}

/// `1,234,567`.
fn with_commas(value: f64) -> String {
    let digits = format!("{value:.0}");
    let groups: Vec<&str> = digits
        .as_bytes()
        .rchunks(3)
        .rev()
        .map(|group| str::from_utf8(group).unwrap_or_default())
        .collect();
    groups.join(",")
}

#[cfg(all(test, feature = "lv2", feature = "lv4"))]
mod tests {
    use super::*;

    /// A strategy with round numbers.
    fn measured(strategy: &str, accepted: Option<f64>, decided: f64, latency: f64, pool: f64) -> Measured {
        let input = |value| Input {
            symbol: "",
            what: "",
            value,
            source: String::new(),
        };
        Measured {
            selected: SelectedStrategy::one(strategy).expect("it exists"),
            accepted: accepted.map(input),
            decided: input(decided),
            latency: input(latency),
            pool: input(pool),
            idle_mib: input(20.0),
            mib_with_1000_connections: input(30.0),
        }
    }

    fn demand(buyers: u32, sales: u32) -> Demand {
        Demand {
            buyers,
            minutes: 10,
            peak: 5,
            sales,
        }
    }

    fn values(size: &Sizing) -> Vec<&str> {
        size.rows.iter().map(|row| row.value.as_str()).collect()
    }

    #[test]
    fn a_partition_that_cannot_take_the_peak_needs_a_rate_limit() {
        let measured = measured("lv4/single-writer", Some(40_000.0), 50_000.0, 0.4, 4.0);
        let size = measured.size(&demand(5_000_000, 1));
        let expected = [
            "41,667", "30,000", "700,000", "24", "12,000", "3", "60", "3", "1", "4", "29", "12",
        ];
        assert_eq!(values(&size), expected);
        let advice = size.advice.expect("it can't take the peak");
        assert!(advice.contains("RATE_LIMIT=10000 for each instance"), "{advice}");
    }

    #[test]
    fn buyers_of_two_sales_are_all_admitted_and_wait_for_no_rate_limit() {
        let measured = measured("lv4/single-writer", Some(40_000.0), 50_000.0, 0.4, 4.0);
        let size = measured.size(&demand(5_000_000, 2));
        let expected = [
            "41,667", "41,667", "0", "0", "16,667", "4", "62", "4", "2", "4", "36", "15",
        ];
        assert_eq!(values(&size), expected);
        assert!(size.advice.is_none());
    }

    #[test]
    fn instances_share_the_pool_of_a_hot_row() {
        let measured = measured("lv2/conditional-update", None, 3000.0, 0.025, 8.0);
        let size = measured.size(&demand(10_000, 1));
        assert_eq!(values(&size), ["83", "83", "0", "0", "3", "3", "21", "3", "17"]);
    }

    #[test]
    fn thousands_are_separated() {
        for (value, shown) in [
            (0.0, "0"),
            (999.0, "999"),
            (1000.0, "1,000"),
            (41_666.7, "41,667"),
            (5e6, "5,000,000"),
        ] {
            assert_eq!(with_commas(value), shown);
        }
        assert_eq!(significant(0.3686), "0.37");
    }
}
