//! `oversold bench` with the shortest rounds: what it measures, and the names in its JSON, from which the tables of the book are made.
//!
//! It needs programs that no other test needs. Where one is missing, its tests show as ignored, with the reason.

#![allow(clippy::unwrap_used)]

use std::{fs, process::Command};

use harness::backends::{on_path, postgres_program};
use libtest_mimic::{Arguments, Completion, Trial};
use serde_json::Value;
use tempfile::tempdir;

fn main() {
    let tests = [
        test(
            "the_lock_on_its_own_is_measured_beside_redis_benchmark",
            &[Tool::RedisBenchmark],
            lock,
        ),
        test(
            "sustained_reservations_are_measured_beside_pgbench",
            &[Tool::Wrk, Tool::Pgbench],
            rate,
        ),
        test(
            "accepting_is_measured_beside_a_produce_that_does_nothing",
            &[Tool::Wrk],
            accept,
        ),
        test("a_backlog_is_decided_beside_pgbench::locked", &[Tool::Pgbench], || {
            drain("lv4/locked", 1)
        }),
        test(
            "a_backlog_is_decided_beside_pgbench::single_writer",
            &[Tool::Pgbench],
            || drain("lv4/single-writer", 2000),
        ),
        test("paid_sales_are_measured_beside_sales_without_payments", &[], paid),
    ];
    let mut arguments = Arguments::from_args();
    // A measurement takes all processors; the server of another one in parallel would not answer in time.
    arguments.test_threads.get_or_insert(1);
    libtest_mimic::run(&arguments, tests.into()).exit();
}

/// A program that measures.
#[derive(Clone, Copy)]
enum Tool {
    Wrk,
    Pgbench,
    RedisBenchmark,
}

impl Tool {
    /// The reason for an ignored test where it is missing.
    fn missing(self) -> Option<&'static str> {
        let (found, missing) = match self {
            Self::Wrk => (on_path("wrk"), "no wrk: infra/bench-tools.sh installs it"),
            Self::RedisBenchmark => (
                on_path("redis-benchmark"),
                "no redis-benchmark: infra/bench-tools.sh installs it",
            ),
            Self::Pgbench => (postgres_program("pgbench"), "no pgbench: it comes with Postgres"),
        };
        found.is_none().then_some(missing)
    }
}

fn test(name: &str, tools: &'static [Tool], run: fn()) -> Trial {
    Trial::ignorable_test(name, move || {
        if let Some(missing) = tools.iter().find_map(|tool| tool.missing()) {
            return Ok(Completion::ignored_with(missing));
        }
        run();
        Ok(Completion::Completed)
    })
}

/// Runs `oversold bench`. Returns its results, and what it printed.
fn bench(arguments: &[&str]) -> (Value, String) {
    let folder = tempdir().unwrap();
    let json = folder.path().join("results.json");
    let output = Command::new(env!("CARGO_BIN_EXE_oversold"))
        .arg("bench")
        .args(arguments)
        .args(["--rounds", "1", "--json"])
        .arg(&json)
        .output()
        .unwrap();
    let [out, err] = [&output.stdout, &output.stderr].map(|bytes| String::from_utf8_lossy(bytes));
    assert_eq!(output.status.code(), Some(0), "{out}\n{err}");
    (
        serde_json::from_slice(&fs::read(&json).unwrap()).unwrap(),
        out.into_owned(),
    )
}

#[track_caller]
fn assert_positive(measured: &[&Value], results: &Value) {
    for measured in measured {
        assert!(measured["median"].as_f64() > Some(0.0), "{results}");
    }
}

fn lock() {
    let (results, _) = bench(&["lv3/rlock", "--lock", "--seconds", "1"]);
    assert_positive(&[&results["pairs_a_second"]], &results);
    for (ceiling, connections) in [("redis_benchmark", 50), ("redis_benchmark_on_one_connection", 1)] {
        let ceiling = &results[ceiling];
        assert_eq!(ceiling["connections"], connections, "{results}");
        let measured = ["pairs_a_second", "acquire_a_second", "release_a_second", "ratio"].map(|name| &ceiling[name]);
        assert_positive(&measured, &results);
    }
}

fn rate() {
    let (results, _) = bench(&["lv2/pessimistic", "--seconds", "1"]);
    assert_eq!(results["strategy"], "lv2/pessimistic");
    assert_eq!((&results["clients"], &results["seconds"]), (&64.into(), &1.into()));
    let ceiling = &results["ceiling"];
    assert_positive(
        &[
            &results["reservations_a_second"],
            &results["p50_ms"],
            &results["p99_ms"],
            &results["ready_ms"],
            &ceiling["transactions_a_second"],
            &ceiling["ratio"],
        ],
        &results,
    );
    assert_eq!(
        (&results["refused"], &results["cut_off"]),
        (&0.into(), &0.into()),
        "{results}"
    );
    // Those of the warm-up are checked as well.
    assert!(
        results["rows_judged"].as_u64() >= results["rounds"][0]["answers"].as_u64(),
        "{results}"
    );
    assert!(
        results["mib_with_1000_connections"].as_f64() >= results["idle_mib"].as_f64(),
        "{results}"
    );
    assert_eq!(results["void"], Value::Array(vec![]));
}

fn accept() {
    let (results, out) = bench(&["lv4/single-writer", "--clients", "20", "--seconds", "1"]);
    let other = &results["without_produce"];
    assert!(
        other["strategy"].as_str().unwrap().starts_with("lv4/mutants/"),
        "{other}"
    );
    assert_positive(
        &[
            &results["orders_a_second"],
            &results["p95_ms"],
            &other["orders_a_second"],
            &other["ratio"],
        ],
        &results,
    );
    let perf_test = &results["producer_perf_test"];
    let left_out = out.contains("kafka-producer-perf-test is left out: ");
    assert_eq!(perf_test.is_null(), left_out, "{results}\n{out}");
    assert!(left_out || perf_test["partitions"] == 1, "{results}");
}

/// The tables of the book on the two halves of an order's path use these names.
fn drain(strategy: &str, batch: u32) {
    let (results, _) = bench(&[strategy, "--drain", "200"]);
    assert_eq!(results["strategy"], strategy);
    assert_eq!(results["kafka"]["service"], "kafka");
    assert_eq!(
        (&results["orders"], &results["rows_judged"]),
        (&200.into(), &200.into())
    );
    let (pgbench, copy) = (&results["pgbench"], &results["copy"]);
    assert_eq!(pgbench["orders_in_a_transaction"], batch);
    assert_positive(
        &[
            &results["orders_a_second"],
            &results["took_ms"],
            &results["ready_ms"],
            &results["most_mib"],
            &pgbench["orders_a_second"],
            &pgbench["ratio"],
            &copy["orders_a_second"],
            &copy["ratio"],
        ],
        &results,
    );
    // The same rows without a decision are the ceiling.
    assert!(copy["ratio"]["most"].as_f64() < Some(1.0), "{results}");
}

/// Half of the buyers are declined: their tickets come back, and their orders end, too.
fn paid() {
    let mix = "approve=50,decline=50";
    let (results, out) = bench(&["lv4/single-writer", "--drain", "200", "--payments", mix]);
    assert_eq!(results["payments"], mix);
    assert_eq!(
        (&results["orders"], &results["rows_judged"]),
        (&200.into(), &200.into())
    );
    // The payment service answers at once, so nobody is asked twice.
    assert_eq!(results["charge_requests_each"]["median"], 1.0, "{results}");
    assert_positive(
        &[
            &results["sales_a_second"],
            &results["without_payments"],
            &results["ratio"],
        ],
        &results,
    );
    assert!(out.contains("I11"), "{out}");
}
