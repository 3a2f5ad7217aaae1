//! LV.1: what happens when nobody keeps the guarantee.
//!
//! Three strategies that a careful beginner would write, each in a transaction, each right when tried alone. None is right when
//! two buyers come at once. Nothing here is a data race: the compiler has nothing to object to.

mod check_then_decrement;
mod check_then_insert;
mod read_then_write;

use box_office::{Guarantee, Invariant, Level, Open, Promises, Schema, Strategy};

pub use check_then_decrement::CheckThenDecrement;
pub use check_then_insert::CheckThenInsert;
pub use read_then_write::ReadThenWrite;

/// Tables without a constraint that could keep a guarantee in a strategy's place.
pub const BARE: Schema = Schema {
    name: "bare",
    migrations: &sqlx::migrate!("migrations/bare"),
};

/// The level, as the server, the suite and the runner use it.
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
        )),
    ],
    mutants: &[],
};

/// A strategy with the defaults of this level.
const fn strategy<S: Open>(name: &'static str, summary: &'static str) -> Strategy {
    Strategy::new::<S>(name, summary, BARE)
}
