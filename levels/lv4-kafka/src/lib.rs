//! LV.4: orders are accepted first and decided later, by way of Kafka; and nothing is lost on the way.

pub mod lock;
pub mod locked;
pub mod path;
mod reason;
pub mod single_writer;

pub mod mutants {
    //! Strategies with one planted mistake each, compiled from the patches in `mutants/`.

    include!(concat!(env!("OUT_DIR"), "/mutants.rs"));
}

use box_office::{FailureMode, Guarantee, Invariant, Level, Mutant, Open, Promises, Schema, Service, Strategy};

/// Tables without a constraint that could keep a guarantee in a strategy's place.
pub const BARE: Schema = Schema {
    name: "bare",
    migrations: &sqlx::migrate!("migrations/bare"),
};

/// What LV.1 broke, kept, on any number of instances.
const ANYWHERE: Guarantee = Guarantee::uniform(Promises::ALL_KEPT);

/// The same, as long as the lock lives as long as the work under it.
const WITHIN_THE_LEASE: Guarantee = ANYWHERE.except(&[
    FailureMode {
        trigger: "a lease ends under its holder, or under a commit that is still on its way",
        violates: OVERSOLD,
    },
    FailureMode {
        trigger: "a holder stands still for longer than its session, too, so that its order is given to somebody else",
        violates: &[Invariant::Conservation, Invariant::NoDuplicate, Invariant::NothingLost],
    },
]);

const OVERSOLD: &[Invariant] = &[Invariant::NoOversell, Invariant::Conservation];

/// An order is accepted and never decided.
const LOST: &[Invariant] = &[Invariant::NothingLost, Invariant::Progress];

/// A buyer has the same ticket twice.
const TWICE: &[Invariant] = &[Invariant::NoDuplicate, Invariant::NothingLost];

const OVERSELLS: Guarantee = Guarantee::uniform(
    Promises::ALL_KEPT
        .breaks(&[Invariant::NoOversell, Invariant::Conservation])
        .leaves_open(&[Invariant::NoDuplicate, Invariant::OneAnswer]),
);

/// On one instance there is one writer all the same.
const SEVERAL_WRITERS: Guarantee = Guarantee {
    single_instance: Promises::ALL_KEPT,
    multi_instance: Promises::ALL_KEPT.breaks(&[Invariant::NoOversell, Invariant::Conservation]),
    failure_modes: &[],
};

/// Nobody is ever told anything.
const KEEPS_NOTHING: Guarantee =
    Guarantee::uniform(Promises::ALL_KEPT.breaks(&[Invariant::NothingLost, Invariant::Progress]));

/// The level, as the server, the suite and the runner use it.
pub static LEVEL: Level = Level {
    name: "lv4",
    package: "lv4-kafka",
    summary: "accepted at once, decided later: orders in Kafka",
    lag: Some(path::lag),
    strategies: &[
        strategy::<locked::Locked>("locked", "each order alone, under a lock in Redis; the orders of a sale are spread over all consumers").guarantee(WITHIN_THE_LEASE),
        strategy::<single_writer::SingleWriter>("single-writer", "all orders of a sale in one partition; what has arrived is decided in one transaction").needs(&[Service::Kafka]),
    ],
    mutants: &[
        mutant(mutants::LOCK_DOES_NOTHING).guarantee(OVERSELLS),
        mutant(mutants::LOCK_WRONG_KEY).guarantee(OVERSELLS),
        mutant(mutants::COMMIT_NOT_COVERED).guarantee(ANYWHERE.except(&[FailureMode {
                trigger: "a connection breaks with a commit on its way",
                violates: OVERSOLD,
            }])),
        mutant(mutants::PARTITION_BY_BUYER).guarantee(SEVERAL_WRITERS).needs(&[Service::Kafka]),
        mutant(mutants::ANSWER_BEFORE_ACK).guarantee(ANYWHERE.except(&[FailureMode {
                trigger: "the broker is away when an order comes, and its instance is killed",
                violates: LOST,
            }])).needs(&[Service::Kafka]),
        mutant(mutants::AUTO_COMMIT).guarantee(ANYWHERE.except(&[FailureMode {
                trigger: "a consumer is killed with an order in hand",
                violates: LOST,
            }])),
        mutant(mutants::HIGHEST_OFFSET).guarantee(ANYWHERE.except(&[FailureMode {
                trigger: "a consumer goes while an order is put off",
                violates: LOST,
            }])),
        mutant(mutants::NO_DEDUPE).guarantee(ANYWHERE.except(&[FailureMode {
                trigger: "an order comes a second time: it has two final states, and it is luck which one its buyer is told",
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
                trigger: "a message is no order: nobody gets past it",
                violates: &[],
            }])),
        mutant(mutants::POISON_SKIPPED).guarantee(ANYWHERE.except(&[FailureMode {
                trigger: "a message is no order: nobody ever hears of it",
                violates: &[],
            }])),
        mutant(mutants::OFFSET_NOT_IN_TRANSACTION).guarantee(ANYWHERE.except(&[FailureMode {
                trigger: "a consumer stands still for longer than its session",
                violates: TWICE,
            }])).needs(&[Service::Kafka]),
        mutant(mutants::NOTIFY_OUTSIDE).guarantee(ANYWHERE.except(&[FailureMode {
                trigger: "a consumer is killed between its commit and the news",
                violates: LOST,
            }])).needs(&[Service::Kafka]),
        mutant(mutants::PRODUCE_NOTHING).guarantee(KEEPS_NOTHING).needs(&[Service::Kafka]),
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
