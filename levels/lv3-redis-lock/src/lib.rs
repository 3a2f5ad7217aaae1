//! LV.3: a lock in Redis, which every instance can take; its limit, and the token that mends it.

pub mod broken;
pub mod fenced;
pub mod lock;
pub mod rlock;
pub mod spin;

use box_office::{FailureMode, Guarantee, Invariant, Level, Place, Promises, Schema, Service, Strategy};

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
        Strategy {
            name: "spin",
            summary: "`set nx px`, asked for again and again, with a fixed lease",
            place: Place::Trail,
            guarantee: WITHIN_THE_LEASE,
            clicks: 2,
            schema: BARE,
            needs: &[Service::Redis],
            source: "levels/lv3-redis-lock/src/spin.rs",
            open: |context| Box::pin(async { Ok(Box::new(spin::Spin::open(context).await?) as _) }),
        },
        Strategy {
            name: "rlock",
            summary: "a reentrant lock like Redisson's: woken by a message, renewed by a watchdog",
            place: Place::Trail,
            guarantee: WITHIN_THE_LEASE,
            clicks: 2,
            schema: BARE,
            needs: &[Service::Redis],
            source: "levels/lv3-redis-lock/src/rlock.rs",
            open: |context| Box::pin(async { Ok(Box::new(rlock::Rlock::open(context).await?) as _) }),
        },
        Strategy {
            name: "fenced",
            summary: "the same lock with a token that the row checks: who comes too late is refused",
            place: Place::Trail,
            guarantee: ANYWHERE,
            clicks: 2,
            schema: FENCED,
            needs: &[Service::Redis],
            source: "levels/lv3-redis-lock/src/fenced.rs",
            open: |context| Box::pin(async { Ok(Box::new(fenced::Fenced::open(context).await?) as _) }),
        },
        Strategy {
            name: "broken/does-nothing",
            summary: "a lock named after the request, which nobody else asks for",
            place: Place::Broken,
            guarantee: OVERSELLS,
            clicks: 2,
            schema: BARE,
            needs: &[Service::Redis],
            source: "levels/lv3-redis-lock/src/broken/does_nothing.rs",
            open: |context| Box::pin(async { Ok(Box::new(broken::does_nothing::Rlock::open(context).await?) as _) }),
        },
        Strategy {
            name: "broken/wrong-key",
            summary: "the buyer's lock instead of the sale's",
            place: Place::Broken,
            guarantee: OVERSELLS,
            clicks: 2,
            schema: BARE,
            needs: &[Service::Redis],
            source: "levels/lv3-redis-lock/src/broken/wrong_key.rs",
            open: |context| Box::pin(async { Ok(Box::new(broken::wrong_key::Rlock::open(context).await?) as _) }),
        },
        Strategy {
            name: "broken/no-lease",
            summary: "a lock that does not end by itself",
            place: Place::Broken,
            guarantee: ANYWHERE.except(&[FailureMode {
                trigger: "a holder is killed",
                violates: STUCK,
            }]),
            clicks: 2,
            schema: BARE,
            needs: &[Service::Redis],
            source: "levels/lv3-redis-lock/src/broken/no_lease.rs",
            open: |context| Box::pin(async { Ok(Box::new(broken::no_lease::Spin::open(context).await?) as _) }),
        },
        Strategy {
            name: "broken/del-without-owner",
            summary: "given back with `del`, whoever has it by now",
            place: Place::Broken,
            guarantee: ANYWHERE.except(&[FailureMode {
                trigger: "a holder gives its lock back when the lease is over and somebody else has it",
                violates: OVERSOLD,
            }]),
            clicks: 2,
            schema: BARE,
            needs: &[Service::Redis],
            source: "levels/lv3-redis-lock/src/broken/del_without_owner.rs",
            open: |context| {
                Box::pin(async { Ok(Box::new(broken::del_without_owner::Spin::open(context).await?) as _) })
            },
        },
        Strategy {
            name: "broken/get-then-del",
            summary: "the owner is compared in one command, the lock deleted in the next",
            place: Place::Broken,
            guarantee: ANYWHERE.except(&[FailureMode {
                trigger: "a lease ends between the comparison and the delete, and somebody else has the lock",
                violates: OVERSOLD,
            }]),
            clicks: 2,
            schema: BARE,
            needs: &[Service::Redis],
            source: "levels/lv3-redis-lock/src/broken/get_then_del.rs",
            open: |context| Box::pin(async { Ok(Box::new(broken::get_then_del::Spin::open(context).await?) as _) }),
        },
        Strategy {
            name: "broken/bare-evalsha",
            summary: "given back by a script's hash, which Redis may have forgotten",
            place: Place::Broken,
            guarantee: ANYWHERE.except(&[FailureMode {
                trigger: "Redis forgets its scripts",
                violates: STUCK,
            }]),
            clicks: 2,
            schema: BARE,
            needs: &[Service::Redis],
            source: "levels/lv3-redis-lock/src/broken/bare_evalsha.rs",
            open: |context| Box::pin(async { Ok(Box::new(broken::bare_evalsha::Spin::open(context).await?) as _) }),
        },
        Strategy {
            name: "broken/commit-not-covered",
            summary: "given back while the commit may still be on its way",
            place: Place::Broken,
            guarantee: ANYWHERE.except(&[FailureMode {
                trigger: "a connection breaks with a commit on its way",
                violates: OVERSOLD,
            }]),
            clicks: 2,
            schema: BARE,
            needs: &[Service::Redis],
            source: "levels/lv3-redis-lock/src/broken/commit_not_covered.rs",
            open: |context| {
                Box::pin(async { Ok(Box::new(broken::commit_not_covered::Rlock::open(context).await?) as _) })
            },
        },
        Strategy {
            name: "broken/message-alone",
            summary: "waits for the message of a release, and for nothing else",
            place: Place::Broken,
            guarantee: ANYWHERE.except(&[FailureMode {
                trigger: "the message of a release is lost, or its sender is killed",
                violates: STUCK,
            }]),
            clicks: 2,
            schema: BARE,
            needs: &[Service::Redis],
            source: "levels/lv3-redis-lock/src/broken/message_alone.rs",
            open: |context| Box::pin(async { Ok(Box::new(broken::message_alone::Rlock::open(context).await?) as _) }),
        },
        Strategy {
            name: "broken/watchdog-not-tied",
            summary: "a watchdog that outlives the holder",
            place: Place::Broken,
            guarantee: ANYWHERE.except(&[FailureMode {
                trigger: "a holder is killed, and its watchdog lives on",
                violates: STUCK,
            }]),
            clicks: 2,
            schema: BARE,
            needs: &[Service::Redis],
            source: "levels/lv3-redis-lock/src/broken/watchdog_not_tied.rs",
            open: |context| {
                Box::pin(async { Ok(Box::new(broken::watchdog_not_tied::Rlock::open(context).await?) as _) })
            },
        },
        Strategy {
            name: "broken/token-not-checked",
            summary: "the row does not compare the token",
            place: Place::Broken,
            guarantee: ANYWHERE.except(&[FailureMode {
                trigger: "a lease ends under its holder",
                violates: OVERSOLD,
            }]),
            clicks: 2,
            schema: FENCED,
            needs: &[Service::Redis],
            source: "levels/lv3-redis-lock/src/broken/token_not_checked.rs",
            open: |context| {
                Box::pin(async { Ok(Box::new(broken::token_not_checked::Fenced::open(context).await?) as _) })
            },
        },
        Strategy {
            name: "broken/token-from-incr",
            summary: "the token comes from a counter alone",
            place: Place::Broken,
            guarantee: ANYWHERE.except(&[FailureMode {
                trigger: "Redis starts again empty",
                violates: STUCK,
            }]),
            clicks: 2,
            schema: FENCED,
            needs: &[Service::Redis],
            source: "levels/lv3-redis-lock/src/broken/token_from_incr.rs",
            open: |context| {
                Box::pin(async { Ok(Box::new(broken::token_from_incr::Fenced::open(context).await?) as _) })
            },
        },
    ],
};
