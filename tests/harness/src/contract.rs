//! The one test of a sale: 1,000 buyers, 100 tickets, and everything that must be true of it. Every level is held to the same lines.

use std::env;

use box_office::{Level, Promise, Promises};

use crate::{
    judge::Conclusion,
    rush::{Program, Report, Rush},
};

/// Set by `make red`: the contract then asks of every strategy what only a right one can keep, and shows how it fails.
pub const RED: &str = "OVERSOLD_RED";

/// Runs a rush against a strategy and holds what happened against `expected`, the suite's own table of promises.
///
/// # Panics
/// With the judge's report, unless the strategy declares just these promises, kept all that it keeps, and was seen to break all that
/// it breaks. A run that did not stress the strategy enough to see that is a failure too.
pub async fn contract(program: &Program, level: &Level, strategy: &str, rush: Rush, expected: Promises) -> Report {
    let strategy = level
        .strategy(strategy)
        .unwrap_or_else(|| panic!("{} has no strategy {strategy:?}", level.name));
    let declared = strategy.guarantee.on(rush.instances);
    assert!(
        declared == expected,
        "{}/{} declares another guarantee on {} instance(s) than the suite's table says.\n  declared: {}\n  table:    {}",
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

/// What a test of the contract asks for: what it expects, or all there is under `make red`.
pub fn required(expected: Promises) -> Promises {
    if env::var_os(RED).is_some() {
        Promises::ALL_KEPT
    } else {
        expected
    }
}

/// Such as `breaks I1 I2; leaves open I3`.
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
