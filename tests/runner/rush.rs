//! `oversold rush`: its exit codes, and the names in its JSON.

use std::{collections::BTreeSet, fs};

use serde_json::Value;
use tempfile::tempdir;

use crate::{command, err, out, oversold};

#[test]
fn the_retries_of_a_rush_are_counted() {
    let folder = tempdir().unwrap();
    let json = folder.path().join("rush.json");
    let arguments = ["rush", "lv2/optimistic", "--buyers", "100", "--json"];
    let output = command(&arguments).arg(&json).output().unwrap();
    assert_eq!(output.status.code(), Some(0), "{}", err(&output));
    let results: Value = serde_json::from_slice(&fs::read(&json).unwrap()).unwrap();
    let retries = results["strategies"][0]["retries"].as_u64().unwrap();
    assert!(retries > 0, "{results}");
    assert!(out(&output).contains(&format!("{retries} retries")), "{}", out(&output));
}

#[test]
fn a_rush_of_several_rounds_tells_their_range() {
    let folder = tempdir().unwrap();
    let json = folder.path().join("rush.json");
    let histories = folder.path().join("histories");
    let arguments = ["rush", "lv2/pessimistic", "--buyers", "20", "--rounds", "3", "--json"];
    let mut command = command(&arguments);
    command.arg(&json).arg("--history").arg(&histories);
    let output = command.output().unwrap();
    assert_eq!(output.status.code(), Some(0), "{}", err(&output));
    assert!(
        out(&output).contains("median (range) of 3 rounds: "),
        "{}",
        out(&output)
    );

    let results: Value = serde_json::from_slice(&fs::read(&json).unwrap()).unwrap();
    let shown = &results["strategies"][0];
    let rounds = &shown["rounds"];
    assert_eq!(rounds["times"], 3);
    let spread = &rounds["all_answered_ms"];
    assert_eq!(
        spread["median"], shown["all_answered_ms"],
        "the round in the middle is shown"
    );
    assert!(spread["least"].as_f64() <= spread["most"].as_f64(), "{spread}");
    assert!(rounds["all_completed_ms"].is_null(), "its answers are final");
    assert_eq!(fs::read_dir(&histories).unwrap().count(), 3);
}

/// A strategy of LV.1 breaks as promised: exit code 0, and the table says both.
#[test]
fn a_strategy_that_breaks_as_promised_ends_well_and_its_results_have_stable_names() {
    let folder = tempdir().unwrap();
    let json = folder.path().join("rush.json");
    let output = oversold(&["rush", "lv1/read-then-write", "--json", json.to_str().unwrap()]);
    assert_eq!(output.status.code(), Some(0), "{}", err(&output));
    assert!(out(&output).contains("BROKEN (I1, I2"), "{}", out(&output));
    assert!(out(&output).contains("verdict: as promised"), "{}", out(&output));
    for expected in [
        "debug build",
        "cores",
        "clients, servers and services share",
        "`fdatasync`",
    ] {
        assert!(out(&output).contains(expected), "{expected}: {}", out(&output));
    }

    let results: Value = serde_json::from_slice(&fs::read(&json).unwrap()).unwrap();
    let keys = |value: &Value| -> BTreeSet<String> { value.as_object().unwrap().keys().cloned().collect() };
    for name in [
        "command",
        "commit",
        "release",
        "machine",
        "postgres",
        "capacity",
        "buyers",
        "instances",
        "work_ms",
        "strategies",
    ] {
        assert!(
            keys(&results).contains(name),
            "{name} is not among {:?}",
            keys(&results)
        );
    }
    let strategy = &results["strategies"][0];
    for name in [
        "strategy",
        "promises",
        "clicks",
        "requests",
        "sold",
        "stock",
        "oversold_by",
        "duplicates",
        "answers",
        "requests_a_second",
        "took_ms",
        "answered",
        "all_answered_ms",
        "completed",
        "all_completed_ms",
        "last_sale_ms",
        "greatest_overlap",
        "client_share",
        "broken",
        "seen",
        "verdict",
    ] {
        assert!(
            keys(strategy).contains(name),
            "{name} is not among {:?}",
            keys(strategy)
        );
    }
    assert_eq!(strategy["verdict"], "as promised");
    assert!(strategy["sold"].as_u64() > Some(100));
    // The answer is final: there is no second clock.
    assert!(strategy["completed"].is_null() && strategy["all_completed_ms"].is_null());
    // A service elsewhere has a disk that can't be measured from here.
    let native = results["postgres"]["source"] == "native";
    assert_eq!(results["fdatasync_ms"].as_f64() > Some(0.0), native, "{results}");
    for durability in ["fsync", "synchronous_commit"] {
        assert_eq!(
            results["postgres"]["durability"][durability], "on",
            "{}",
            results["postgres"]
        );
    }
}

#[test]
fn what_is_accepted_first_and_decided_later_has_two_clocks() {
    let folder = tempdir().unwrap();
    let json = folder.path().join("rush.json");
    let arguments = ["rush", "lv4", "--buyers", "50", "--capacity", "10", "--json"];
    let output = command(&arguments).arg(&json).output().unwrap();
    assert_eq!(output.status.code(), Some(0), "{}\n{}", out(&output), err(&output));
    for expected in ["completed, ms", "all answered after", "all completed after"] {
        assert!(out(&output).contains(expected), "{}", out(&output));
    }
    let results: Value = serde_json::from_slice(&fs::read(&json).unwrap()).unwrap();
    assert_eq!(results["kafka"]["service"], "kafka", "{results}");
    for strategy in results["strategies"].as_array().unwrap() {
        let at = |clock: &str, point: &str| strategy[clock][point].as_f64().unwrap();
        assert_eq!(strategy["sold"], 10, "{strategy}");
        // The last ticket is sold before the last buyer is refused.
        assert!(strategy["last_sale_ms"].as_f64() > Some(0.0), "{strategy}");
        assert!(
            strategy["last_sale_ms"].as_f64() <= strategy["all_completed_ms"].as_f64(),
            "{strategy}"
        );
        for point in ["p50_ms", "p95_ms", "p99_ms", "max_ms"] {
            assert!(at("answered", point) <= at("completed", point), "{strategy}");
        }
        // Of the same round, in tenths of a millisecond.
        let all_completed_ms = strategy["all_completed_ms"].as_f64().unwrap();
        assert!(at("completed", "max_ms") <= all_completed_ms + 0.1, "{strategy}");
        assert!(strategy["all_answered_ms"].as_f64() <= strategy["all_completed_ms"].as_f64());
        assert!(strategy["all_completed_ms"].as_f64() <= strategy["took_ms"].as_f64());
    }
}

/// With VIPs the order of service is promised as well, and the rush tells who has a ticket.
#[test]
fn a_rush_with_vips_tells_who_has_a_ticket() {
    let folder = tempdir().unwrap();
    let json = folder.path().join("rush.json");
    let arguments = [
        "rush",
        "lv4/single-writer",
        "--vip",
        "5",
        "--buyers",
        "50",
        "--capacity",
        "10",
        "--json",
    ];
    let output = command(&arguments).arg(&json).output().unwrap();
    assert_eq!(output.status.code(), Some(0), "{}\n{}", out(&output), err(&output));
    let results: Value = serde_json::from_slice(&fs::read(&json).unwrap()).unwrap();
    let priority = &results["strategies"][0]["priority"];
    let of = |name: &str| priority[name].as_u64().unwrap();
    assert_eq!((of("vips"), of("others")), (5, 45), "{priority}");
    assert_eq!(of("vips_with_ticket") + of("others_with_ticket"), 10, "{priority}");
    let said = format!(
        "priority: {} of 5 VIPs have a ticket, and {} of 45 others",
        of("vips_with_ticket"),
        of("others_with_ticket")
    );
    for said in [&*said, "promised: keeps all; verdict: as promised"] {
        assert!(out(&output).contains(said), "{said}: {}", out(&output));
    }
}

/// The improvements in one rush: the table has columns for what came of them, and the results have the payments.
#[test]
fn a_rush_with_payments_is_followed_to_their_end() {
    let folder = tempdir().unwrap();
    let json = folder.path().join("rush.json");
    let size = ["rush", "lv4", "--buyers", "60", "--capacity", "40", "--json"];
    let mut command = command(&size);
    command.arg(&json);
    command.args(["--payments", "approve=50,decline=30,hang=20", "--hold-ms", "2000"]);
    command.args([
        "--payment-timeout-ms",
        "300",
        "--ttl-ms",
        "60000",
        "--rate-limit",
        "1000",
    ]);
    let output = command.output().unwrap();
    assert_eq!(output.status.code(), Some(0), "{}\n{}", out(&output), err(&output));
    assert!(
        !out(&output).contains("lv4/locked"),
        "it holds no tickets: {}",
        out(&output)
    );
    let columns = out(&output)
        .lines()
        .find(|line| line.contains("strategy"))
        .unwrap()
        .to_owned();
    for (column, is_used) in [("declined", true), ("expired", true), ("429", false)] {
        assert_eq!(columns.contains(column), is_used, "{column}: {columns}");
    }
    for said in ["nothing broken", "requests for a charge"] {
        assert!(out(&output).contains(said), "{said}: {}", out(&output));
    }
    let results: Value = serde_json::from_slice(&fs::read(&json).unwrap()).unwrap();
    let strategy = &results["strategies"][0];
    let payments = &strategy["payments"];
    let count = |name: &str| payments[name].as_u64().unwrap();
    assert_eq!(
        Some(count("charges") - count("refunds")),
        strategy["sold"].as_u64(),
        "{strategy}"
    );
    assert!(count("calls") > count("charges"), "{strategy}");
}

/// A rush that is too small to break anything is inconclusive and does not pass.
#[test]
fn a_rush_that_shows_nothing_is_inconclusive_and_exit_code_4() {
    let output = oversold(&["rush", "lv1/read-then-write", "--buyers", "1"]);
    assert_eq!(output.status.code(), Some(4), "{}", err(&output));
    assert!(
        out(&output).contains("inconclusive: I1, I2 was not seen to break"),
        "{}",
        out(&output)
    );
}
