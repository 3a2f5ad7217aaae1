//! LV.3: a lock in Redis, shared by all instances; its limit, and the fencing token that removes
//! it.

pub mod fenced;
pub mod lock;
pub mod rlock;
pub mod spin;

pub mod mutants {
    //! Strategies with one planted mistake each, compiled from the patches in `mutants/`.

    include!(concat!(env!("OUT_DIR"), "/mutants.rs"));
}

use box_office::{FailureMode, Guarantee, Invariant, Level, Mutant, Open, Promises, Schema, Service, Strategy};

/// Tables without any constraint that could keep a guarantee instead of the strategy.
pub const BARE: Schema = Schema {
    name: "bare",
    migrations: &sqlx::migrate!("migrations/bare"),
};

/// The tables of `bare`, with a fence in each sale.
pub const FENCED: Schema = Schema {
    name: "fenced",
    migrations: &sqlx::migrate!("migrations/fenced"),
};

/// Keeps every invariant, on any number of instances.
const ANYWHERE: Guarantee = Guarantee::uniform(Promises::ALL_KEPT);

/// The same, as long as the lease outlives the work under the lock.
const WITHIN_THE_LEASE: Guarantee = ANYWHERE.except(&[LEASE_ENDS]);

const LEASE_ENDS: FailureMode = FailureMode {
    trigger: "a lease expires under its holder, or under a commit in flight",
    violates: OVERSOLD,
};

const OVERSOLD: &[Invariant] = &[Invariant::NoOversell, Invariant::Conservation];

/// No client can acquire the lock any more.
const STUCK: &[Invariant] = &[Invariant::Progress];

const OVERSELLS: Guarantee = Guarantee::uniform(
    Promises::ALL_KEPT
        .breaks(&[Invariant::NoOversell, Invariant::Conservation])
        .leaves_open(&[Invariant::NoDuplicate, Invariant::OneAnswer]),
);

/// Buyers are refused while tickets are left.
const REFUSES_FALSELY: Guarantee =
    Guarantee::uniform(Promises::ALL_KEPT.breaks(&[Invariant::NoFalseRefusal, Invariant::NoUndersell]));

/// The level, for the server, the tests and the runner.
pub static LEVEL: Level = Level {
    name: "lv3",
    package: "lv3-redis-lock",
    summary: "a distributed lock in Redis",
    lag: None,
    strategies: &[
        strategy::<spin::Spin>("spin", "`SET NX PX` in a loop with backoff, with a fixed lease")
            .guarantee(WITHIN_THE_LEASE),
        strategy::<rlock::Rlock>(
            "rlock",
            "a reentrant lock like Redisson's: pub/sub wakes waiters, a watchdog renews the lease",
        )
        .guarantee(WITHIN_THE_LEASE),
        strategy::<fenced::Fenced>(
            "fenced",
            "the same lock with a fencing token: the row rejects a stale holder",
        )
        .schema(FENCED)
        .steps(&[
            "lock taken",
            "stock read",
            "earlier reservation looked up",
            "decided to sell",
            "write refused",
            "reservation written",
            "lock released",
        ]),
    ],
    mutants: &[
        mutant(mutants::LOCK_PER_REQUEST).guarantee(OVERSELLS),
        mutant(mutants::LOCK_BY_BUYER).guarantee(OVERSELLS),
        mutant(mutants::LEASE_TOO_LONG).guarantee(ANYWHERE.except(&[FailureMode {
            trigger: "a holder is killed",
            violates: STUCK,
        }])),
        mutant(mutants::DEL_WITHOUT_OWNER).guarantee(ANYWHERE.except(&[FailureMode {
            trigger: "a holder releases the lock after its lease, when another owner holds it",
            violates: OVERSOLD,
        }])),
        mutant(mutants::GET_THEN_DEL).guarantee(ANYWHERE.except(&[FailureMode {
            trigger: "a lease expires between the comparison and the delete, and another owner holds the lock",
            violates: OVERSOLD,
        }])),
        mutant(mutants::BARE_EVALSHA).guarantee(ANYWHERE.except(&[FailureMode {
            trigger: "Redis loses its script cache",
            violates: STUCK,
        }])),
        mutant(mutants::UNLOCK_ON_UNKNOWN_COMMIT).guarantee(ANYWHERE.except(&[FailureMode {
            trigger: "a connection breaks with a commit in flight",
            violates: OVERSOLD,
        }])),
        mutant(mutants::MESSAGE_ALONE).guarantee(ANYWHERE.except(&[FailureMode {
            trigger: "the message of a release is lost, or the holder is killed",
            violates: STUCK,
        }])),
        mutant(mutants::WATCHDOG_NOT_TIED).guarantee(ANYWHERE.except(&[FailureMode {
            trigger: "a holder is killed while another process still renews its lock",
            violates: STUCK,
        }])),
        mutant(mutants::READY_IS_A_PING).guarantee(ANYWHERE.except(&[FailureMode {
            trigger: "Redis answers and takes no writes: the server says that it is ready",
            violates: &[],
        }])),
        mutant(mutants::TOKEN_NOT_CHECKED)
            .guarantee(ANYWHERE.except(&[FailureMode {
                trigger: "a lease expires under its holder",
                violates: OVERSOLD,
            }]))
            .schema(FENCED),
        mutant(mutants::FENCE_COMPARED_APART)
            .guarantee(ANYWHERE.except(&[FailureMode {
                trigger: "a lease expires under its holder, and the next holder raises the fence while the write waits for the row",
                violates: OVERSOLD,
            }]))
            .schema(FENCED),
        mutant(mutants::TOKEN_FROM_INCR)
            .guarantee(ANYWHERE.except(&[FailureMode {
                trigger: "Redis restarts without its data",
                violates: STUCK,
            }]))
            .schema(FENCED),
        mutant(mutants::SET_WITHOUT_NX).guarantee(OVERSELLS),
        mutant(mutants::SECONDS_FOR_MILLISECONDS).guarantee(OVERSELLS),
        mutant(mutants::RELEASED_BEFORE_COMMIT).guarantee(OVERSELLS),
        mutant(mutants::LOCK_BUSY_IS_SOLD_OUT).guarantee(REFUSES_FALSELY),
        mutant(mutants::LOCK_TIME_OUT_IS_SOLD_OUT).guarantee(REFUSES_FALSELY),
    ],
};

/// A strategy with the defaults of this level.
const fn strategy<S: Open>(name: &'static str, summary: &'static str) -> Strategy {
    Strategy::new::<S>(name, summary, BARE)
        .needs(&[Service::Redis])
        .steps(&[
            "lock taken",
            "transaction begun",
            "stock read",
            "earlier reservation looked up",
            "decided to sell",
            "stock written",
            "reservation written",
            "committed",
            "lock released",
        ])
}

/// A mutant with the defaults of this level.
const fn mutant(mutant: Mutant) -> Strategy {
    Strategy::mutant(mutant, BARE).needs(&[Service::Redis])
}
