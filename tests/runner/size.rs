//! `oversold size`: every rate has its source, and every number its formula.

use crate::{err, out, oversold};

#[test]
fn a_size_names_its_formulas_and_where_each_rate_was_measured() {
    let output = oversold(&["size", "--buyers", "5000000", "--minutes", "10"]);
    assert_eq!(output.status.code(), Some(0), "{}", err(&output));
    let printed = out(&output);
    for expected in [
        "lv4/single-writer: B = 5,000,000 buyers within M = 10 minutes",
        "results/lv4-accept-single-writer.json, commit ",
        "results/lv4-drain-single-writer.json, commit ",
        "results/road.json, commit ",
        "41,667   P × B ÷ (60 × M)",
        "connections to Postgres",
        "partitions of the orders topic",
        "clients of Kafka",
    ] {
        assert!(printed.contains(expected), "{expected} is missing in\n{printed}");
    }
}

#[test]
fn a_level_with_redis_has_its_connections_counted() {
    let arguments = ["size", "--buyers", "10000", "--minutes", "10", "--level", "lv3/fenced"];
    let output = oversold(&arguments);
    assert_eq!(output.status.code(), Some(0), "{}", err(&output));
    assert!(out(&output).contains("connections to Redis"), "{}", out(&output));
    assert!(!out(&output).contains("Kafka"), "{}", out(&output));
}
