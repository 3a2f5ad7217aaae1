//! What every strategy of a level declares, held against the suite's own table.

use box_office::{Level, Promises};

/// Holds every strategy's declared guarantee, on one instance and on several, against its line of the table: the name, and both promises.
///
/// # Panics
/// One declares something else, has no line, or has two; or there is a line without a strategy.
pub fn declares(level: &Level, table: &[(&str, Promises, Promises)]) {
    for &(name, alone, together) in table {
        let strategy = level
            .strategy(name)
            .unwrap_or_else(|| panic!("{} has no strategy {name}", level.name));
        assert_eq!(strategy.guarantee.alone, alone, "{name} on one instance");
        assert_eq!(strategy.guarantee.together, together, "{name} on several instances");
    }
    for strategy in level.strategies {
        let lines = table.iter().filter(|(name, ..)| *name == strategy.name).count();
        assert_eq!(lines, 1, "{} has {lines} lines in the table", strategy.name);
    }
}
