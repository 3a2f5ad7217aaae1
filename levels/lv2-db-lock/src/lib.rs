//! LV.2: the database keeps the guarantee, in three ways; and a lock in the process, which keeps it on one instance only.

pub mod broken;
pub mod conditional_update;
pub mod mutex;
pub mod optimistic;
pub mod pessimistic;

use box_office::{FailureMode, Guarantee, Invariant, Level, Place, Promises, Schema, Strategy};

/// Tables without a constraint that could keep a guarantee in a strategy's place.
pub const BARE: Schema = Schema {
    name: "bare",
    migrations: &sqlx::migrate!("migrations/bare"),
};

/// Tables whose constraints hold the rules of a sale.
pub const GUARDED: Schema = Schema {
    name: "guarded",
    migrations: &sqlx::migrate!("migrations/guarded"),
};

/// What LV.1 broke, kept, on any number of instances.
const ANYWHERE: Guarantee = Guarantee::uniform(Promises::ALL_KEPT);

/// More tickets than there are, and a stock that does not tell.
const OVERSOLD: Promises = Promises::ALL_KEPT
    .breaks(&[Invariant::NoOversell, Invariant::Conservation])
    .leaves_open(&[Invariant::NoDuplicate, Invariant::OneAnswer]);

/// A lock in the process ends at the process.
const ONE_INSTANCE: Guarantee = Guarantee {
    single_instance: Promises::ALL_KEPT,
    multi_instance: OVERSOLD,
    failure_modes: &[FailureMode {
        trigger: "a connection breaks with a commit on its way",
        violates: &[Invariant::NoOversell, Invariant::Conservation],
    }],
};

const OVERSELLS: Guarantee = Guarantee::uniform(OVERSOLD);

const DUPLICATES: Guarantee = Guarantee::uniform(
    Promises::ALL_KEPT
        .breaks(&[Invariant::NoDuplicate])
        .leaves_open(&[Invariant::OneAnswer]),
);

/// Nobody gets anywhere: buyers give up while tickets are left.
const STARVES: Guarantee = Guarantee::uniform(
    Promises::ALL_KEPT
        .breaks(&[Invariant::Progress])
        .leaves_open(&[Invariant::NoUndersell]),
);

/// The level, as the server, the suite and the runner use it.
pub static LEVEL: Level = Level {
    name: "lv2",
    package: "lv2-db-lock",
    summary: "the database keeps the guarantee",
    lag: None,
    strategies: &[
        Strategy {
            name: "mutex",
            summary: "a lock in the process: right on one instance, wrong on two",
            place: Place::Trail,
            guarantee: ONE_INSTANCE,
            clicks: 2,
            schema: BARE,
            needs: &[],
            source: "levels/lv2-db-lock/src/mutex.rs",
            open: |context| Box::pin(async { Ok(Box::new(mutex::Mutex::new(context)) as _) }),
        },
        Strategy {
            name: "pessimistic",
            summary: "take the row with `for update`, then decide: one buyer after another",
            place: Place::Trail,
            guarantee: ANYWHERE,
            clicks: 2,
            schema: BARE,
            needs: &[],
            source: "levels/lv2-db-lock/src/pessimistic.rs",
            open: |context| Box::pin(async { Ok(Box::new(pessimistic::Pessimistic::new(context)) as _) }),
        },
        Strategy {
            name: "optimistic",
            summary: "decide first, write only if the version has not moved: retry when it has",
            place: Place::Trail,
            guarantee: ANYWHERE,
            clicks: 2,
            schema: BARE,
            needs: &[],
            source: "levels/lv2-db-lock/src/optimistic.rs",
            open: |context| Box::pin(async { Ok(Box::new(optimistic::Optimistic::new(context)) as _) }),
        },
        Strategy {
            name: "conditional-update",
            summary: "one statement takes the ticket and writes the reservation",
            place: Place::Trail,
            guarantee: ANYWHERE,
            clicks: 2,
            schema: GUARDED,
            needs: &[],
            source: "levels/lv2-db-lock/src/conditional_update.rs",
            open: |context| Box::pin(async { Ok(Box::new(conditional_update::ConditionalUpdate::new(context)) as _) }),
        },
        Strategy {
            name: "broken/mutex-does-nothing",
            summary: "the guard is dropped in the line that takes it",
            place: Place::Broken,
            guarantee: OVERSELLS,
            clicks: 2,
            schema: BARE,
            needs: &[],
            source: "levels/lv2-db-lock/src/broken/mutex_does_nothing.rs",
            open: |context| Box::pin(async { Ok(Box::new(broken::mutex_does_nothing::Mutex::new(context)) as _) }),
        },
        Strategy {
            name: "broken/mutex-wrong-key",
            summary: "the buyer's mutex instead of the sale's",
            place: Place::Broken,
            guarantee: OVERSELLS,
            clicks: 2,
            schema: BARE,
            needs: &[],
            source: "levels/lv2-db-lock/src/broken/mutex_wrong_key.rs",
            open: |context| Box::pin(async { Ok(Box::new(broken::mutex_wrong_key::Mutex::new(context)) as _) }),
        },
        Strategy {
            name: "broken/guard-before-commit",
            summary: "the mutex is given back before the commit",
            place: Place::Broken,
            guarantee: OVERSELLS,
            clicks: 2,
            schema: BARE,
            needs: &[],
            source: "levels/lv2-db-lock/src/broken/guard_before_commit.rs",
            open: |context| Box::pin(async { Ok(Box::new(broken::guard_before_commit::Mutex::new(context)) as _) }),
        },
        Strategy {
            name: "broken/for-update-does-nothing",
            summary: "a `select` without `for update`",
            place: Place::Broken,
            guarantee: OVERSELLS,
            clicks: 2,
            schema: BARE,
            needs: &[],
            source: "levels/lv2-db-lock/src/broken/for_update_does_nothing.rs",
            open: |context| {
                Box::pin(async { Ok(Box::new(broken::for_update_does_nothing::Pessimistic::new(context)) as _) })
            },
        },
        Strategy {
            name: "broken/for-update-wrong-key",
            summary: "`for update` on the buyer's reservation instead of the sale",
            place: Place::Broken,
            guarantee: OVERSELLS,
            clicks: 2,
            schema: BARE,
            needs: &[],
            source: "levels/lv2-db-lock/src/broken/for_update_wrong_key.rs",
            open: |context| {
                Box::pin(async { Ok(Box::new(broken::for_update_wrong_key::Pessimistic::new(context)) as _) })
            },
        },
        Strategy {
            name: "broken/look-up-before-lock",
            summary: "the buyer is looked up before the row is locked",
            place: Place::Broken,
            guarantee: DUPLICATES,
            clicks: 2,
            schema: BARE,
            needs: &[],
            source: "levels/lv2-db-lock/src/broken/look_up_before_lock.rs",
            open: |context| {
                Box::pin(async { Ok(Box::new(broken::look_up_before_lock::Pessimistic::new(context)) as _) })
            },
        },
        Strategy {
            name: "broken/second-connection",
            summary: "a second connection is taken while one is held",
            place: Place::Broken,
            guarantee: STARVES,
            clicks: 2,
            schema: BARE,
            needs: &[],
            source: "levels/lv2-db-lock/src/broken/second_connection.rs",
            open: |context| Box::pin(async { Ok(Box::new(broken::second_connection::Pessimistic::new(context)) as _) }),
        },
        Strategy {
            name: "broken/transaction-left-open",
            summary: "nobody rolls back when the request is cancelled",
            place: Place::Broken,
            guarantee: ONE_INSTANCE.except(&[FailureMode {
                trigger: "a request is cancelled in mid-transaction, which stays open with its locks",
                violates: &[Invariant::Progress],
            }]),
            clicks: 2,
            schema: BARE,
            needs: &[],
            source: "levels/lv2-db-lock/src/broken/transaction_left_open.rs",
            open: |context| Box::pin(async { Ok(Box::new(broken::transaction_left_open::Mutex::new(context)) as _) }),
        },
        Strategy {
            name: "broken/version-not-compared",
            summary: "the version is raised, but not compared",
            place: Place::Broken,
            guarantee: OVERSELLS,
            clicks: 2,
            schema: BARE,
            needs: &[],
            source: "levels/lv2-db-lock/src/broken/version_not_compared.rs",
            open: |context| {
                Box::pin(async { Ok(Box::new(broken::version_not_compared::Optimistic::new(context)) as _) })
            },
        },
        Strategy {
            name: "broken/retry-reuses-the-read",
            summary: "a retry writes what it read the first time",
            place: Place::Broken,
            guarantee: OVERSELLS,
            clicks: 2,
            schema: BARE,
            needs: &[],
            source: "levels/lv2-db-lock/src/broken/retry_reuses_the_read.rs",
            open: |context| {
                Box::pin(async { Ok(Box::new(broken::retry_reuses_the_read::Optimistic::new(context)) as _) })
            },
        },
    ],
};
