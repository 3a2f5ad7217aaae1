//! `oversold bench`, as short as can be: that it measures what it says, and the names in its JSON, from which the book's tables come.
//!
//! It takes programs that the suite does without. Where one is not here, its tests show as ignored, with the reason.

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
    ];
    let mut arguments = Arguments::from_args();
    // What is measured takes all processors; beside it, another's server would not answer in time.
    arguments.test_threads.get_or_insert(1);
    libtest_mimic::run(&arguments, tests.into()).exit();
}

/// A program that is measured with.
#[derive(Clone, Copy)]
enum Tool {
    Wrk,
    Pgbench,
    RedisBenchmark,
}

impl Tool {
    /// What to say where it is not here.
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

/// What it wrote, and what it printed.
fn bench(arguments: &[&str]) -> (Value, String) {
    let folder = tempdir().unwrap();
    let json = folder.path().join("figures.json");
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
fn are_more_than_nothing(spreads: &[&Value], figures: &Value) {
    for spread in spreads {
        assert!(spread["median"].as_f64() > Some(0.0), "{figures}");
    }
}

fn lock() {
    let (figures, _) = bench(&["lv3/rlock", "--lock", "--seconds", "1"]);
    are_more_than_nothing(&[&figures["pairs_a_second"]], &figures);
    for (ceiling, connections) in [("redis_benchmark", 50), ("redis_benchmark_on_one_connection", 1)] {
        let ceiling = &figures[ceiling];
        assert_eq!(ceiling["connections"], connections, "{figures}");
        let spreads = ["pairs_a_second", "acquire_a_second", "release_a_second", "ratio"].map(|name| &ceiling[name]);
        are_more_than_nothing(&spreads, &figures);
    }
}

fn rate() {
    let (figures, _) = bench(&["lv2/pessimistic", "--seconds", "1"]);
    assert_eq!(figures["strategy"], "lv2/pessimistic");
    assert_eq!((&figures["clients"], &figures["seconds"]), (&64.into(), &1.into()));
    let ceiling = &figures["ceiling"];
    are_more_than_nothing(
        &[
            &figures["reservations_a_second"],
            &figures["p50_ms"],
            &figures["p99_ms"],
            &figures["ready_ms"],
            &ceiling["transactions_a_second"],
            &ceiling["ratio"],
        ],
        &figures,
    );
    assert_eq!(
        (&figures["refused"], &figures["cut_off"]),
        (&0.into(), &0.into()),
        "{figures}"
    );
    // Those of the warm-up are judged as well.
    assert!(
        figures["rows_judged"].as_u64() >= figures["rounds"][0]["answers"].as_u64(),
        "{figures}"
    );
    assert!(
        figures["mib_with_1000_connections"].as_f64() >= figures["idle_mib"].as_f64(),
        "{figures}"
    );
    assert_eq!(figures["void"], Value::Array(vec![]));
}

fn accept() {
    let (figures, out) = bench(&["lv4/single-writer", "--clients", "20", "--seconds", "1"]);
    let other = &figures["without_produce"];
    assert_eq!(other["strategy"], "lv4/mutants/produce-nothing");
    are_more_than_nothing(
        &[
            &figures["orders_a_second"],
            &figures["p95_ms"],
            &other["orders_a_second"],
            &other["ratio"],
        ],
        &figures,
    );
    let perf_test = &figures["producer_perf_test"];
    let left_out = out.contains("kafka-producer-perf-test is left out: ");
    assert_eq!(perf_test.is_null(), left_out, "{figures}\n{out}");
    assert!(left_out || perf_test["partitions"] == 1, "{figures}");
}

/// What the book says of the two halves of an order's path comes from these names.
fn drain(strategy: &str, batch: u32) {
    let (figures, _) = bench(&[strategy, "--drain", "200"]);
    assert_eq!(figures["strategy"], strategy);
    assert_eq!(figures["kafka"]["service"], "kafka");
    assert_eq!(
        (&figures["orders"], &figures["rows_judged"]),
        (&200.into(), &200.into())
    );
    let ceiling = &figures["ceiling"];
    assert_eq!(ceiling["orders_in_a_transaction"], batch);
    are_more_than_nothing(
        &[
            &figures["orders_a_second"],
            &figures["took_ms"],
            &figures["ready_ms"],
            &figures["most_mib"],
            &ceiling["orders_a_second"],
            &ceiling["ratio"],
        ],
        &figures,
    );
}
