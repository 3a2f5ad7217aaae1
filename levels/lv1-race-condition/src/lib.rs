//! LV.1: race conditions without any concurrency control.
//!
//! Three strategies of a careful beginner. Each runs in a transaction and passes every
//! sequential test; each fails under concurrency. None has a data race, so the compiler accepts it.

mod check_then_decrement;
mod check_then_insert;
mod read_then_write;

use box_office::{Guarantee, Invariant, Level, Open, Promises, Schema, Strategy};

pub use check_then_decrement::CheckThenDecrement;
pub use check_then_insert::CheckThenInsert;
pub use read_then_write::ReadThenWrite;

/// The schema `bare`: no constraint that could enforce an invariant in place of the strategy.
pub const BARE: Schema = Schema {
    name: "bare",
    migrations: &sqlx::migrate!("migrations/bare"),
};

/// The level, for its server, the tests and the runner.
pub static LEVEL: Level = Level {
    name: "lv1",
    package: "lv1-race-condition",
    summary: "no lock: the sale breaks",
    lag: None,
    strategies: &[
        strategy::<ReadThenWrite>(
            "read-then-write",
            "read the stock, check it, write it back less one: updates are lost",
        )
        .guarantee(Guarantee::uniform(
            Promises::ALL_KEPT
                .breaks(&[Invariant::NoOversell, Invariant::Conservation])
                .leaves_open(&[Invariant::NoDuplicate, Invariant::OneAnswer]),
        ))
        .clicks(1),
        strategy::<CheckThenDecrement>(
            "check-then-decrement",
            "read the stock, check it, let the database subtract: the stock goes negative",
        )
        .guarantee(Guarantee::uniform(
            Promises::ALL_KEPT
                .breaks(&[Invariant::NoOversell, Invariant::Conservation])
                .leaves_open(&[Invariant::NoDuplicate, Invariant::OneAnswer]),
        ))
        .clicks(1),
        strategy::<CheckThenInsert>(
            "check-then-insert",
            "look for the buyer's reservation, then insert one: two clicks, two tickets",
        )
        .guarantee(Guarantee::uniform(
            Promises::ALL_KEPT
                .breaks(&[Invariant::NoDuplicate])
                .leaves_open(&[Invariant::OneAnswer]),
        ))
        .steps(&[
            "transaction begun",
            "earlier reservation looked up",
            "decided to sell",
            "stock written",
            "reservation written",
            "committed",
        ]),
    ],
    mutants: &[],
};

/// A strategy with the defaults of this level.
const fn strategy<S: Open>(name: &'static str, summary: &'static str) -> Strategy {
    Strategy::new::<S>(name, summary, BARE).steps(&[
        "transaction begun",
        "stock read",
        "earlier reservation looked up",
        "decided to sell",
        "stock written",
        "reservation written",
        "committed",
    ])
}
