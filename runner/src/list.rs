//! `oversold list`.

use box_office::{Invariant, Promise, Promises};

use crate::levels::LEVELS;

/// Prints every strategy, what it is, and what it promises.
pub(crate) fn print() {
    for level in LEVELS {
        println!("{}  {}", level.name, level.summary);
        for strategy in level.strategies {
            println!("  {}/{}: {}", level.name, strategy.name, strategy.summary);
            let (alone, together) = (strategy.guarantee.alone, strategy.guarantee.together);
            if alone == together {
                println!("      on any number of instances: {}", in_words(&alone));
            } else {
                println!("      on one instance: {}", in_words(&alone));
                println!("      on several:      {}", in_words(&together));
            }
        }
    }
    println!();
    for invariant in Invariant::ALL {
        println!("{:>4}  {}", invariant.code(), invariant.title());
    }
}

/// What a strategy keeps and breaks, as short as it can be said.
pub(crate) fn in_words(promises: &Promises) -> String {
    let codes = |promise| {
        promises
            .those(promise)
            .map(Invariant::code)
            .collect::<Vec<_>>()
            .join(", ")
    };
    let (broken, open) = (codes(Promise::Breaks), codes(Promise::NotPromised));
    match (broken.as_str(), promises.about(Invariant::Order)) {
        ("", _) => format!("keeps all but {open}"),
        _ => format!("breaks {broken}; promises nothing about {open}"),
    }
}
