//! LV.4: orders are accepted first and processed asynchronously through Kafka, and none is lost.
//!
//! [`pipeline`] is what both strategies share; its documentation has the map.

mod decision_row;
pub mod locked;
pub mod pipeline;
pub mod redis_lock;
pub mod single_writer;

pub mod mutants {
    //! Strategies with one planted mistake each, compiled from the patches in `mutants/`.

    include!(concat!(env!("OUT_DIR"), "/mutants.rs"));
}

use box_office::{FailureMode, Guarantee, Invariant, Level, Mutant, Open, Promises, Schema, Service, Strategy};

/// The schema without constraints: a guarantee is kept by the strategy or not at all.
pub const BARE: Schema = Schema {
    name: "bare",
    migrations: &sqlx::migrate!("migrations/bare"),
};

/// Every invariant, on any number of instances.
const ANYWHERE: Guarantee = Guarantee::uniform(Promises::ALL_KEPT);

/// Every invariant, as long as the lock's lease outlives the work under it.
const WITHIN_THE_LEASE: Guarantee = ANYWHERE.except(&[
    FailureMode {
        trigger: "a lease expires while its holder works, or while its commit is in flight",
        violates: OVERSOLD,
    },
    FailureMode {
        trigger: "a holder is frozen for longer than its session as well, so its order is redelivered to another consumer",
        violates: &[Invariant::Conservation, Invariant::NoDuplicate, Invariant::NothingLost],
    },
]);

const OVERSOLD: &[Invariant] = &[Invariant::NoOversell, Invariant::Conservation];

/// Broken when an order is accepted and never decided.
const LOST: &[Invariant] = &[Invariant::NothingLost, Invariant::Progress];

/// Broken when an order takes two tickets.
const TWICE: &[Invariant] = &[Invariant::NoDuplicate, Invariant::NothingLost];

const OVERSELLS: Guarantee = Guarantee::uniform(
    Promises::ALL_KEPT
        .breaks(&[Invariant::NoOversell, Invariant::Conservation])
        .leaves_open(&[Invariant::NoDuplicate, Invariant::OneAnswer]),
);

/// Oversells on several instances. On one there is a single writer all the same.
const SEVERAL_WRITERS: Guarantee = Guarantee {
    single_instance: Promises::ALL_KEPT,
    multi_instance: Promises::ALL_KEPT.breaks(&[Invariant::NoOversell, Invariant::Conservation]),
    failure_modes: &[],
};

/// Loses every order.
const KEEPS_NOTHING: Guarantee =
    Guarantee::uniform(Promises::ALL_KEPT.breaks(&[Invariant::NothingLost, Invariant::Progress]));

/// The level, as the server, the tests and the runner use it.
pub static LEVEL: Level = Level {
    name: "lv4",
    package: "lv4-kafka",
    summary: "accepted at once, decided later: orders in Kafka",
    lag: Some(pipeline::lag),
    strategies: &[
        strategy::<locked::Locked>(
            "locked",
            "each order alone, under a lock in Redis; the orders of a sale are spread over all consumers",
        )
        .guarantee(WITHIN_THE_LEASE),
        strategy::<single_writer::SingleWriter>(
            "single-writer",
            "all orders of a sale in one partition; what has arrived is decided in one transaction",
        )
        .needs(&[Service::Kafka]),
    ],
    mutants: &[
        mutant(mutants::LOCK_PER_MESSAGE).guarantee(OVERSELLS),
        mutant(mutants::LOCK_PER_BUYER).guarantee(OVERSELLS),
        mutant(mutants::UNLOCK_AFTER_UNKNOWN_COMMIT).guarantee(ANYWHERE.except(&[FailureMode {
            trigger: "a connection breaks with a commit on its way",
            violates: OVERSOLD,
        }])),
        mutant(mutants::PARTITION_BY_BUYER)
            .guarantee(SEVERAL_WRITERS)
            .needs(&[Service::Kafka]),
        mutant(mutants::ANSWER_BEFORE_ACK)
            .guarantee(ANYWHERE.except(&[FailureMode {
                trigger: "the broker is away when an order arrives, and the instance is killed",
                violates: LOST,
            }]))
            .needs(&[Service::Kafka]),
        mutant(mutants::AUTO_COMMIT).guarantee(ANYWHERE.except(&[FailureMode {
            trigger: "a consumer is killed with an order in flight",
            violates: LOST,
        }])),
        mutant(mutants::OFFSET_RESET_LATEST).guarantee(ANYWHERE.except(&[FailureMode {
            trigger: "orders are accepted before the group's first consumer has joined",
            violates: LOST,
        }])),
        mutant(mutants::HIGHEST_OFFSET).guarantee(ANYWHERE.except(&[FailureMode {
            trigger: "a consumer leaves while an order is to be retried",
            violates: LOST,
        }])),
        mutant(mutants::NO_DEDUPE).guarantee(ANYWHERE.except(&[FailureMode {
            trigger: "an order is redelivered: it has two final states, and its buyer sees either",
            violates: &[],
        }])),
        mutant(mutants::ERRORS_SWALLOWED).guarantee(ANYWHERE.except(&[FailureMode {
            trigger: "Redis or Postgres is away for a moment",
            violates: LOST,
        }])),
        mutant(mutants::DEAD_LETTER_ON_FAULT).guarantee(ANYWHERE.except(&[FailureMode {
            trigger: "Postgres is away for a moment",
            violates: LOST,
        }])),
        mutant(mutants::ENDLESS_RETRY).guarantee(ANYWHERE.except(&[FailureMode {
            trigger: "a message is no order: it blocks its partition",
            violates: &[],
        }])),
        mutant(mutants::POISON_SKIPPED).guarantee(ANYWHERE.except(&[FailureMode {
            trigger: "a message is no order: it is dropped without a trace",
            violates: &[],
        }])),
        mutant(mutants::OFFSET_NOT_IN_TRANSACTION)
            .guarantee(ANYWHERE.except(&[FailureMode {
                trigger: "a consumer is frozen for longer than its session",
                violates: TWICE,
            }]))
            .needs(&[Service::Kafka]),
        mutant(mutants::OFFSET_BEFORE_THE_ROWS)
            .guarantee(ANYWHERE.except(&[FailureMode {
                trigger: "a consumer is frozen for longer than its session, between the offset and its commit",
                violates: TWICE,
            }]))
            .needs(&[Service::Kafka]),
        mutant(mutants::OFFSET_COMPARED_APART)
            .guarantee(ANYWHERE.except(&[FailureMode {
                trigger: "a consumer is frozen for longer than its session, between its rows and its commit",
                violates: TWICE,
            }]))
            .needs(&[Service::Kafka]),
        mutant(mutants::DEAD_LETTER_ERROR_LOGGED)
            .guarantee(ANYWHERE.except(&[FailureMode {
                trigger: "the dead-letter topic refuses a message: it is dropped, and its offset committed",
                violates: &[],
            }]))
            .needs(&[Service::Kafka]),
        mutant(mutants::OUTBOX_AFTER_COMMIT)
            .guarantee(ANYWHERE.except(&[FailureMode {
                trigger: "a consumer is killed between its commit and the event",
                violates: LOST,
            }]))
            .needs(&[Service::Kafka]),
        mutant(mutants::PRODUCE_NOTHING)
            .guarantee(KEEPS_NOTHING)
            .needs(&[Service::Kafka]),
        mutant(mutants::STOCK_IGNORED).guarantee(OVERSELLS),
        mutant(mutants::REFUSALS_STORED_AS_CONFIRMED).guarantee(OVERSELLS),
        mutant(mutants::DEDUPE_BY_BUYER).guarantee(KEEPS_NOTHING),
        mutant(mutants::ACCEPTED_IS_UNKNOWN).guarantee(ANYWHERE.except(&[FailureMode {
            trigger: "a buyer asks about an order that is not yet decided",
            violates: &[Invariant::NothingLost],
        }])),
    ],
};

/// A strategy with the defaults of this level.
const fn strategy<S: Open>(name: &'static str, summary: &'static str) -> Strategy {
    Strategy::new::<S>(name, summary, BARE).needs(&[Service::Redis, Service::Kafka])
}

/// A mutant with the defaults of this level.
const fn mutant(mutant: Mutant) -> Strategy {
    Strategy::mutant(mutant, BARE).needs(&[Service::Redis, Service::Kafka])
}
