//! `oversold list`.

use serde_json::Value;

use crate::{out, oversold};

#[test]
fn list_names_every_strategy_with_its_promises() {
    let output = oversold(&["list"]);
    assert_eq!(output.status.code(), Some(0));
    let listed = out(&output);
    for name in [
        "lv1/read-then-write",
        "lv2/mutex",
        "lv2/mutants/mutex-wrong-key",
        "lv4/locked",
        "lv4/single-writer",
    ] {
        assert!(listed.contains(name), "{listed}");
    }
    assert!(listed.contains("I10"), "{listed}");
}

/// Every mutant declares what it breaks: in a rush, or in a failure mode.
#[test]
fn every_mutant_declares_what_it_breaks() {
    let output = oversold(&["list", "--json"]);
    let listed: Value = serde_json::from_slice(&output.stdout).unwrap();
    let is_empty = |value: &Value| value.as_array().unwrap().is_empty();
    for strategy in listed.as_array().unwrap() {
        let says = ["single_instance", "multi_instance"]
            .into_iter()
            .any(|instances| !is_empty(&strategy[instances]["breaks"]))
            || !is_empty(&strategy["failure_modes"]);
        assert!(strategy["mutant"] == false || says, "{strategy}");
    }
}
