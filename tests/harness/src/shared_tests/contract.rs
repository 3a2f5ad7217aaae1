//! The contract test: 1,000 buyers, 100 tickets, and every invariant. All levels run the same code.

use std::env;

use box_office::{Level, Promise, Promises};

use crate::{
    judge::Conclusion,
    rush::{Program, Report, Rush},
};

/// The environment variable that `make red` sets: the contract then requires all invariants of
/// every strategy, and shows how it fails.
pub const RED: &str = "OVERSOLD_RED";

/// Runs a rush against a strategy and asserts that the verdict matches `expected`, the test's own
/// table of promises.
///
/// # Panics
/// Panics with the judge's report unless the strategy declares exactly these promises, keeps all
/// that it promises to keep, and is observed to break all that it declares to break. An
/// inconclusive run also panics.
pub async fn contract(program: &Program, level: &Level, strategy: &str, rush: Rush, expected: Promises) -> Report {
    let strategy = level
        .strategy(strategy)
        .unwrap_or_else(|| panic!("{} has no strategy {strategy:?}", level.name));
    let declared = rush.improvements.promises(strategy.guarantee.on(rush.instances));
    assert!(
        declared == expected,
        "{}/{} declares another guarantee on {} instance(s) than the test's table says.\n  declared: {}\n  table:    {}",
        level.name,
        strategy.name,
        rush.instances,
        in_words(&declared),
        in_words(&expected),
    );

    // ANCHOR: heart
    let report = rush
        .traced()
        .run_alone(program, level, strategy)
        .await
        .unwrap_or_else(|error| {
            panic!(
                "the rush on {}/{} could not be run: {error:?}",
                level.name, strategy.name
            )
        });
    let conclusion = report.verdict.conclude(&required(expected));
    assert!(
        matches!(conclusion, Conclusion::AsPromised),
        "{}/{} on {} instance(s): {conclusion}\n\n{}",
        level.name,
        strategy.name,
        report.instances,
        report.verdict
    );
    report
    // ANCHOR_END: heart
}

/// The promises that a contract test requires: `expected`, or all invariants under `make red`.
pub fn required(expected: Promises) -> Promises {
    if env::var_os(RED).is_some() {
        Promises::ALL_KEPT
    } else {
        expected
    }
}

/// The promises in words, such as `keeps I5; breaks I1 I2; leaves open I3`.
fn in_words(promises: &Promises) -> String {
    let codes = |promise| {
        promises
            .those(promise)
            .map(|invariant| invariant.code())
            .collect::<Vec<_>>()
            .join(" ")
    };
    format!(
        "keeps {}; breaks {}; leaves open {}",
        codes(Promise::Keeps),
        codes(Promise::Breaks),
        codes(Promise::NotPromised)
    )
}
