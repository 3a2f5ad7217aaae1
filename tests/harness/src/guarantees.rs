//! What every strategy of a level declares, held against the suite's own tables.

use box_office::{Invariant, Level, Promises, Strategy};

use crate::judge::Verdict;

/// Holds every strategy's declared guarantee, on one instance and on several, against its line of the table: the name, and both promises.
///
/// # Panics
/// One declares something else, has no line, or has two; or there is a line without a strategy.
pub fn assert_declared(level: &Level, table: &[(&str, Promises, Promises)]) {
    for &(name, alone, together) in table {
        let strategy = level
            .strategy(name)
            .unwrap_or_else(|| panic!("{} has no strategy {name}", level.name));
        assert_eq!(strategy.guarantee.single_instance, alone, "{name} on one instance");
        assert_eq!(
            strategy.guarantee.multi_instance, together,
            "{name} on several instances"
        );
    }
    for strategy in level.strategies {
        let lines = table.iter().filter(|(name, ..)| *name == strategy.name).count();
        assert_eq!(lines, 1, "{} has {lines} lines in the table", strategy.name);
    }
}

/// Holds what the suite expects a fault to break against the limits that the strategy declares.
///
/// # Panics
/// It declares no limit that breaks just this.
pub fn assert_failure_mode(strategy: &Strategy, breaks: &[Invariant]) {
    let limits = strategy.guarantee.failure_modes;
    assert!(
        limits.iter().any(|limit| limit.violates == breaks),
        "{} breaks {breaks:?}, and its limits are {limits:?}",
        strategy.name
    );
}

/// Holds what a fault left behind against what the suite expects: nothing broken, or at least this, as the strategy declares it.
///
/// # Panics
/// Something is broken and nothing should be, or not all of it is; or the strategy does not declare it.
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
