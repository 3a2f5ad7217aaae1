//! Assertions that the strategies' declared guarantees match the tests' own tables.

use box_office::{Invariant, Level, Promises, Strategy};

use crate::judge::Verdict;

/// Asserts that every strategy's declared guarantee matches its line of the table: name, promises
/// on one instance, promises on several.
///
/// # Panics
/// Panics if a declaration differs, a strategy has no line or several, or a line has no strategy.
pub fn assert_declared(level: &Level, table: &[(&str, Promises, Promises)]) {
    for &(name, single_instance, multi_instance) in table {
        let strategy = level
            .strategy(name)
            .unwrap_or_else(|| panic!("{} has no strategy {name}", level.name));
        assert_eq!(
            strategy.guarantee.single_instance, single_instance,
            "{name} on one instance"
        );
        assert_eq!(
            strategy.guarantee.multi_instance, multi_instance,
            "{name} on several instances"
        );
    }
    for strategy in level.strategies {
        let lines = table.iter().filter(|(name, ..)| *name == strategy.name).count();
        assert_eq!(lines, 1, "{} has {lines} lines in the table", strategy.name);
    }
}

/// Asserts that the strategy declares a failure mode that violates exactly these invariants.
///
/// # Panics
/// Panics if it does not.
pub fn assert_failure_mode(strategy: &Strategy, breaks: &[Invariant]) {
    let failure_modes = strategy.guarantee.failure_modes;
    assert!(
        failure_modes.iter().any(|mode| mode.violates == breaks),
        "{} breaks {breaks:?}, and its failure modes are {failure_modes:?}",
        strategy.name
    );
}

/// Asserts the verdict after a fault: either no invariant is broken, or at least these are, and the
/// strategy declares that failure mode.
///
/// # Panics
/// Panics if the verdict differs or the strategy does not declare the failure mode.
pub fn assert_after_fault(strategy: &Strategy, verdict: &Verdict, breaks: &[Invariant]) {
    println!("{}: {verdict}", strategy.name);
    let as_expected = match breaks {
        [] => verdict.findings.is_empty(),
        _ => breaks.iter().all(|&invariant| verdict.breaks(invariant)),
    };
    assert!(as_expected, "{} should break {breaks:?}\n{verdict}", strategy.name);
    if !breaks.is_empty() {
        assert_failure_mode(strategy, breaks);
    }
}
