//! LV.1: race conditions without any concurrency control.
//!
//! Three strategies of a careful beginner. Each runs in a transaction and passes every
//! sequential test; each fails under concurrency. None has a data race, so the compiler accepts it.

mod check_then_decrement;
mod check_then_insert;
mod read_then_write;

use box_office::{Guarantee, Invariant, Level, Place, Promises, Schema, Strategy};

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
        Strategy {
            name: "read-then-write",
            summary: "read the stock, check it, write it back less one: updates are lost",
            place: Place::Trail,
            guarantee: Guarantee::uniform(
                Promises::ALL_KEPT
                    .breaks(&[Invariant::NoOversell, Invariant::Conservation])
                    .leaves_open(&[Invariant::NoDuplicate, Invariant::OneAnswer]),
            ),
            clicks: 1,
            schema: BARE,
            needs: &[],
            source: "levels/lv1-race-condition/src/read_then_write.rs",
            open: |context| Box::pin(async { Ok(Box::new(ReadThenWrite::new(context)) as _) }),
        },
        Strategy {
            name: "check-then-decrement",
            summary: "read the stock, check it, let the database subtract: the stock goes negative",
            place: Place::Trail,
            guarantee: Guarantee::uniform(
                Promises::ALL_KEPT
                    .breaks(&[Invariant::NoOversell, Invariant::Conservation])
                    .leaves_open(&[Invariant::NoDuplicate, Invariant::OneAnswer]),
            ),
            clicks: 1,
            schema: BARE,
            needs: &[],
            source: "levels/lv1-race-condition/src/check_then_decrement.rs",
            open: |context| Box::pin(async { Ok(Box::new(CheckThenDecrement::new(context)) as _) }),
        },
        Strategy {
            name: "check-then-insert",
            summary: "look for the buyer's reservation, then insert one: two clicks, two tickets",
            place: Place::Trail,
            guarantee: Guarantee::uniform(
                Promises::ALL_KEPT
                    .breaks(&[Invariant::NoDuplicate])
                    .leaves_open(&[Invariant::OneAnswer]),
            ),
            clicks: 2,
            schema: BARE,
            needs: &[],
            source: "levels/lv1-race-condition/src/check_then_insert.rs",
            open: |context| Box::pin(async { Ok(Box::new(CheckThenInsert::new(context)) as _) }),
        },
    ],
};
