//! LV.3: a lock in Redis, which every instance can take; its limit, and the token that mends it.

pub mod fenced;
pub mod lock;
pub mod rlock;
pub mod spin;

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

/// The same, with a fence in each sale.
pub const FENCED: Schema = Schema {
    name: "fenced",
    migrations: &sqlx::migrate!("migrations/fenced"),
};

/// What LV.1 broke, kept, on any number of instances.
const ANYWHERE: Guarantee = Guarantee::uniform(Promises::ALL_KEPT);

/// The same, as long as the lock lives as long as the work under it.
const WITHIN_THE_LEASE: Guarantee = ANYWHERE.except(&[LEASE_ENDS]);

const LEASE_ENDS: FailureMode = FailureMode {
    trigger: "a lease ends under its holder, or under a commit that is still on its way",
    violates: OVERSOLD,
};

const OVERSOLD: &[Invariant] = &[Invariant::NoOversell, Invariant::Conservation];

/// Nobody gets the lock any more.
const STUCK: &[Invariant] = &[Invariant::Progress];

const OVERSELLS: Guarantee = Guarantee::uniform(
    Promises::ALL_KEPT
        .breaks(&[Invariant::NoOversell, Invariant::Conservation])
        .leaves_open(&[Invariant::NoDuplicate, Invariant::OneAnswer]),
);

/// The level, as the server, the suite and the runner use it.
pub static LEVEL: Level = Level {
    name: "lv3",
    package: "lv3-redis-lock",
    summary: "a distributed lock in Redis",
    lag: None,
    strategies: &[
        strategy::<spin::Spin>("spin", "`set nx px`, asked for again and again, with a fixed lease")
            .guarantee(WITHIN_THE_LEASE),
        strategy::<rlock::Rlock>(
            "rlock",
            "a reentrant lock like Redisson's: woken by a message, renewed by a watchdog",
        )
        .guarantee(WITHIN_THE_LEASE),
        strategy::<fenced::Fenced>(
            "fenced",
            "the same lock with a token that the row checks: who comes too late is refused",
        )
        .schema(FENCED),
    ],
    mutants: &[
        mutant(mutants::DOES_NOTHING).guarantee(OVERSELLS),
        mutant(mutants::WRONG_KEY).guarantee(OVERSELLS),
        mutant(mutants::NO_LEASE).guarantee(ANYWHERE.except(&[FailureMode {
            trigger: "a holder is killed",
            violates: STUCK,
        }])),
        mutant(mutants::DEL_WITHOUT_OWNER).guarantee(ANYWHERE.except(&[FailureMode {
            trigger: "a holder gives its lock back when the lease is over and somebody else has it",
            violates: OVERSOLD,
        }])),
        mutant(mutants::GET_THEN_DEL).guarantee(ANYWHERE.except(&[FailureMode {
            trigger: "a lease ends between the comparison and the delete, and somebody else has the lock",
            violates: OVERSOLD,
        }])),
        mutant(mutants::BARE_EVALSHA).guarantee(ANYWHERE.except(&[FailureMode {
            trigger: "Redis forgets its scripts",
            violates: STUCK,
        }])),
        mutant(mutants::COMMIT_NOT_COVERED).guarantee(ANYWHERE.except(&[FailureMode {
            trigger: "a connection breaks with a commit on its way",
            violates: OVERSOLD,
        }])),
        mutant(mutants::MESSAGE_ALONE).guarantee(ANYWHERE.except(&[FailureMode {
            trigger: "the message of a release is lost, or its sender is killed",
            violates: STUCK,
        }])),
        mutant(mutants::WATCHDOG_NOT_TIED).guarantee(ANYWHERE.except(&[FailureMode {
            trigger: "a holder is killed, and its watchdog lives on",
            violates: STUCK,
        }])),
        mutant(mutants::TOKEN_NOT_CHECKED)
            .guarantee(ANYWHERE.except(&[FailureMode {
                trigger: "a lease ends under its holder",
                violates: OVERSOLD,
            }]))
            .schema(FENCED),
        mutant(mutants::TOKEN_FROM_INCR)
            .guarantee(ANYWHERE.except(&[FailureMode {
                trigger: "Redis starts again empty",
                violates: STUCK,
            }]))
            .schema(FENCED),
    ],
};

/// A strategy with the defaults of this level.
const fn strategy<S: Open>(name: &'static str, summary: &'static str) -> Strategy {
    Strategy::new::<S>(name, summary, BARE).needs(&[Service::Redis])
}

/// A mutant with the defaults of this level.
const fn mutant(mutant: Mutant) -> Strategy {
    Strategy::mutant(mutant, BARE).needs(&[Service::Redis])
}
