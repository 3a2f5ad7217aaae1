//! LV.2: three strategies in which the database keeps the guarantee, and a mutex, which keeps it on
//! one instance only.

pub mod conditional_update;
pub mod mutex;
pub mod optimistic;
pub mod pessimistic;

pub mod mutants {
    //! Strategies with one planted mistake each, compiled from the patches in `mutants/`.

    include!(concat!(env!("OUT_DIR"), "/mutants.rs"));
}

use box_office::{FailureMode, Guarantee, Invariant, Level, Mutant, Open, Promises, Schema, Strategy};

/// Tables without any constraint that could keep a guarantee instead of the strategy.
pub const BARE: Schema = Schema {
    name: "bare",
    migrations: &sqlx::migrate!("migrations/bare"),
};

/// Tables whose constraints enforce the rules of a sale.
pub const GUARDED: Schema = Schema {
    name: "guarded",
    migrations: &sqlx::migrate!("migrations/guarded"),
};

/// Sells more tickets than there are, and the stock does not show it.
const OVERSOLD: Promises = Promises::ALL_KEPT
    .breaks(&[Invariant::NoOversell, Invariant::Conservation])
    .leaves_open(&[Invariant::NoDuplicate, Invariant::OneAnswer]);

/// Keeps every invariant on one instance: a lock in a process does not reach beyond it.
const ONE_INSTANCE: Guarantee = Guarantee {
    single_instance: Promises::ALL_KEPT,
    multi_instance: OVERSOLD,
    failure_modes: &[FailureMode {
        trigger: "a connection breaks with a commit in flight",
        violates: &[Invariant::NoOversell, Invariant::Conservation],
    }],
};

const OVERSELLS: Guarantee = Guarantee::uniform(OVERSOLD);

const DUPLICATES: Guarantee = Guarantee::uniform(
    Promises::ALL_KEPT
        .breaks(&[Invariant::NoDuplicate])
        .leaves_open(&[Invariant::OneAnswer]),
);

/// No progress: buyers give up while tickets are left.
const STARVES: Guarantee = Guarantee::uniform(
    Promises::ALL_KEPT
        .breaks(&[Invariant::Progress])
        .leaves_open(&[Invariant::NoUndersell]),
);

/// The level, for the server, the tests and the runner.
pub static LEVEL: Level = Level {
    name: "lv2",
    package: "lv2-db-lock",
    summary: "the database keeps the guarantee",
    lag: None,
    strategies: &[
        strategy::<mutex::Mutex>("mutex", "a lock in the process: right on one instance, wrong on two")
            .guarantee(ONE_INSTANCE),
        strategy::<pessimistic::Pessimistic>(
            "pessimistic",
            "lock the row with `for update`, then decide: one buyer after another",
        ),
        strategy::<optimistic::Optimistic>(
            "optimistic",
            "decide first, write only if the version is unchanged, else retry",
        ),
        strategy::<conditional_update::ConditionalUpdate>(
            "conditional-update",
            "one statement takes the ticket and writes the reservation",
        )
        .schema(GUARDED),
    ],
    mutants: &[
        mutant(mutants::MUTEX_DOES_NOTHING).guarantee(OVERSELLS),
        mutant(mutants::MUTEX_WRONG_KEY).guarantee(OVERSELLS),
        mutant(mutants::GUARD_BEFORE_COMMIT).guarantee(OVERSELLS),
        mutant(mutants::FOR_UPDATE_DOES_NOTHING).guarantee(OVERSELLS),
        mutant(mutants::FOR_UPDATE_WRONG_KEY).guarantee(OVERSELLS),
        mutant(mutants::LOOK_UP_BEFORE_LOCK).guarantee(DUPLICATES),
        mutant(mutants::SECOND_CONNECTION).guarantee(STARVES),
        mutant(mutants::TRANSACTION_LEFT_OPEN).guarantee(ONE_INSTANCE.except(&[FailureMode {
            trigger: "a request is cancelled in mid-transaction, and the transaction stays open with its locks",
            violates: &[Invariant::Progress],
        }])),
        mutant(mutants::VERSION_NOT_COMPARED).guarantee(OVERSELLS),
        mutant(mutants::RETRY_REUSES_THE_READ).guarantee(OVERSELLS),
    ],
};

/// A strategy with the defaults of this level.
const fn strategy<S: Open>(name: &'static str, summary: &'static str) -> Strategy {
    Strategy::new::<S>(name, summary, BARE)
}

/// A mutant with the defaults of this level.
const fn mutant(mutant: Mutant) -> Strategy {
    Strategy::mutant(mutant, BARE)
}
