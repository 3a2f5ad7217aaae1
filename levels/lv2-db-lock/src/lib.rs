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

/// All that LV.1 breaks, on any number of instances.
const KEPT: Guarantee = Guarantee::uniform(Promises::ALL_KEPT);

/// More tickets than there are, and a stock that does not tell.
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

/// Buyers are refused while tickets are left.
const REFUSES_FALSELY: Guarantee =
    Guarantee::uniform(Promises::ALL_KEPT.breaks(&[Invariant::NoFalseRefusal, Invariant::NoUndersell]));

/// A request that has no ticket yet never gets a final answer.
const NEVER_FINAL: Guarantee = Guarantee::uniform(Promises::ALL_KEPT.breaks(&[Invariant::Progress]));

/// The level, as the server, the suite and the runner use it.
pub static LEVEL: Level = Level {
    name: "lv2",
    package: "lv2-db-lock",
    summary: "the database keeps the guarantee",
    lag: None,
    strategies: &[
        strategy::<mutex::Mutex>("mutex", "a lock in the process: right on one instance, wrong on two")
            .guarantee(ONE_INSTANCE)
            .steps(&[
                "mutex taken",
                "transaction begun",
                "stock read",
                "earlier reservation looked up",
                "decided to sell",
                "stock written",
                "reservation written",
                "committed",
                "lock released",
            ]),
        strategy::<pessimistic::Pessimistic>(
            "pessimistic",
            "lock the row with `for update`, then decide: one buyer after another",
        )
        .steps(&[
            "transaction begun",
            "stock read",
            "earlier reservation looked up",
            "decided to sell",
            "stock written",
            "reservation written",
            "committed",
        ]),
        strategy::<optimistic::Optimistic>(
            "optimistic",
            "decide first, write only if the version is unchanged, else retry",
        )
        .steps(&[
            "transaction begun",
            "stock and version read",
            "earlier reservation looked up",
            "decided to sell",
            "overtaken",
            "stock written",
            "reservation written",
            "committed",
        ]),
        strategy::<conditional_update::ConditionalUpdate>(
            "conditional-update",
            "one statement takes the ticket and writes the reservation",
        )
        .schema(GUARDED)
        .steps(&[
            "committed",
            "no ticket taken",
            "a reservation was there first",
            "earlier reservation looked up",
        ]),
    ],
    mutants: &[
        mutant(mutants::MUTEX_DOES_NOTHING).guarantee(OVERSELLS),
        mutant(mutants::MUTEX_WRONG_KEY).guarantee(OVERSELLS),
        mutant(mutants::GUARD_BEFORE_COMMIT).guarantee(OVERSELLS),
        mutant(mutants::FOR_UPDATE_DOES_NOTHING).guarantee(OVERSELLS),
        mutant(mutants::FOR_UPDATE_WRONG_KEY).guarantee(OVERSELLS),
        mutant(mutants::LOOK_UP_BEFORE_LOCK).guarantee(DUPLICATES),
        mutant(mutants::LOOK_UP_BEFORE_VERSION).guarantee(DUPLICATES),
        mutant(mutants::NOT_EXISTS).guarantee(DUPLICATES),
        mutant(mutants::SECOND_CONNECTION).guarantee(STARVES),
        mutant(mutants::TRANSACTION_LEFT_OPEN).guarantee(ONE_INSTANCE.except(&[FailureMode {
            trigger: "a request is cancelled in mid-transaction, and the transaction stays open with its locks",
            violates: &[Invariant::Progress],
        }])),
        mutant(mutants::VERSION_NOT_COMPARED).guarantee(OVERSELLS),
        mutant(mutants::RETRY_REUSES_THE_READ).guarantee(OVERSELLS),
        mutant(mutants::READ_AND_WRITE_APART).guarantee(OVERSELLS),
        mutant(mutants::STOCK_NOT_CHECKED).guarantee(OVERSELLS),
        mutant(mutants::VERSION_NOT_RAISED).guarantee(OVERSELLS),
        mutant(mutants::BUYER_IGNORED).guarantee(DUPLICATES),
        mutant(mutants::REQUEST_KEY_IGNORED).guarantee(KEPT.except(&[FailureMode {
            trigger: "two buyers use one request key",
            violates: &[Invariant::NoDuplicate],
        }])),
        mutant(mutants::SOLD_OUT_BEFORE_THE_KEY).guarantee(KEPT.except(&[FailureMode {
            trigger: "the buyer of the last ticket repeats the request",
            violates: &[Invariant::OneAnswer],
        }])),
        mutant(mutants::FOR_SHARE).guarantee(NEVER_FINAL),
        mutant(mutants::SKIP_LOCKED).guarantee(REFUSES_FALSELY),
        mutant(mutants::MUTEX_BUSY_IS_SOLD_OUT).guarantee(REFUSES_FALSELY),
        mutant(mutants::OVERTAKEN_IS_SOLD_OUT).guarantee(REFUSES_FALSELY),
        mutant(mutants::POOL_TIME_OUT_IS_SOLD_OUT).guarantee(REFUSES_FALSELY),
        mutant(mutants::MUTEX_TIME_OUT_IS_SOLD_OUT).guarantee(REFUSES_FALSELY),
        mutant(mutants::RETRIES_EXHAUSTED_IS_SOLD_OUT).guarantee(KEPT.except(&[FailureMode {
            trigger: "a buyer is overtaken more often than it tries",
            violates: &[Invariant::NoFalseRefusal, Invariant::NoUndersell],
        }])),
        mutant(mutants::COMMIT_ERROR_IGNORED).guarantee(KEPT.except(&[FailureMode {
            trigger: "a commit fails",
            violates: &[Invariant::NothingLost],
        }])),
        mutant(mutants::CONDITION_MISSING)
            .schema(GUARDED)
            .guarantee(NEVER_FINAL),
        mutant(mutants::VIOLATION_IS_AN_ERROR)
            .schema(GUARDED)
            .guarantee(NEVER_FINAL),
        mutant(mutants::VIOLATION_IS_SOLD_OUT)
            .schema(GUARDED)
            .guarantee(Guarantee::uniform(
                Promises::ALL_KEPT.breaks(&[Invariant::NoFalseRefusal]),
            )),
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
