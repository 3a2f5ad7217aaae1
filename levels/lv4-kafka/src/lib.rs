//! LV.4: orders are accepted first and decided later, by way of Kafka; and nothing is lost on the way.

pub mod broken;
pub mod lock;
pub mod locked;
pub mod path;
mod reason;
pub mod single_writer;

use box_office::{FailureMode, Guarantee, Invariant, Level, Place, Promises, Schema, Service, Strategy};

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
        Strategy {
            name: "locked",
            summary: "each order alone, under a lock in Redis; the orders of a sale are spread over all consumers",
            place: Place::Trail,
            guarantee: WITHIN_THE_LEASE,
            clicks: 2,
            schema: BARE,
            needs: &[Service::Redis, Service::Kafka],
            source: "levels/lv4-kafka/src/locked.rs",
            open: |context| Box::pin(async { Ok(Box::new(locked::Locked::open(context).await?) as _) }),
        },
        Strategy {
            name: "single-writer",
            summary: "all orders of a sale in one partition; what has arrived is decided in one transaction",
            place: Place::Trail,
            guarantee: ANYWHERE,
            clicks: 2,
            schema: BARE,
            needs: &[Service::Kafka],
            source: "levels/lv4-kafka/src/single_writer.rs",
            open: |context| Box::pin(async { Ok(Box::new(single_writer::SingleWriter::open(context).await?) as _) }),
        },
        Strategy {
            name: "broken/lock-does-nothing",
            summary: "a lock named after the message, which nobody else asks for",
            place: Place::Broken,
            guarantee: OVERSELLS,
            clicks: 2,
            schema: BARE,
            needs: &[Service::Redis, Service::Kafka],
            source: "levels/lv4-kafka/src/broken/lock_does_nothing.rs",
            open: |context| Box::pin(async { Ok(Box::new(broken::lock_does_nothing::Locked::open(context).await?) as _) }),
        },
        Strategy {
            name: "broken/lock-wrong-key",
            summary: "the buyer's lock instead of the sale's",
            place: Place::Broken,
            guarantee: OVERSELLS,
            clicks: 2,
            schema: BARE,
            needs: &[Service::Redis, Service::Kafka],
            source: "levels/lv4-kafka/src/broken/lock_wrong_key.rs",
            open: |context| Box::pin(async { Ok(Box::new(broken::lock_wrong_key::Locked::open(context).await?) as _) }),
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
            needs: &[Service::Redis, Service::Kafka],
            source: "levels/lv4-kafka/src/broken/commit_not_covered.rs",
            open: |context| Box::pin(async { Ok(Box::new(broken::commit_not_covered::Locked::open(context).await?) as _) }),
        },
        Strategy {
            name: "broken/partition-by-buyer",
            summary: "the buyer's partition instead of the sale's",
            place: Place::Broken,
            guarantee: SEVERAL_WRITERS,
            clicks: 2,
            schema: BARE,
            needs: &[Service::Kafka],
            source: "levels/lv4-kafka/src/broken/partition_by_buyer.rs",
            open: |context| {
                Box::pin(async { Ok(Box::new(broken::partition_by_buyer::SingleWriter::open(context).await?) as _) })
            },
        },
        Strategy {
            name: "broken/answer-before-ack",
            summary: "202 before the broker has acknowledged the message",
            place: Place::Broken,
            guarantee: ANYWHERE.except(&[FailureMode {
                trigger: "the broker is away when an order comes, and its instance is killed",
                violates: LOST,
            }]),
            clicks: 2,
            schema: BARE,
            needs: &[Service::Kafka],
            source: "levels/lv4-kafka/src/broken/answer_before_ack.rs",
            open: |context| {
                Box::pin(async { Ok(Box::new(broken::answer_before_ack::SingleWriter::open(context).await?) as _) })
            },
        },
        Strategy {
            name: "broken/auto-commit",
            summary: "the client commits offsets by itself",
            place: Place::Broken,
            guarantee: ANYWHERE.except(&[FailureMode {
                trigger: "a consumer is killed with an order in hand",
                violates: LOST,
            }]),
            clicks: 2,
            schema: BARE,
            needs: &[Service::Redis, Service::Kafka],
            source: "levels/lv4-kafka/src/broken/auto_commit.rs",
            open: |context| Box::pin(async { Ok(Box::new(broken::auto_commit::Locked::open(context).await?) as _) }),
        },
        Strategy {
            name: "broken/highest-offset",
            summary: "commits the highest offset that is done, not the done prefix",
            place: Place::Broken,
            guarantee: ANYWHERE.except(&[FailureMode {
                trigger: "a consumer goes while an order is put off",
                violates: LOST,
            }]),
            clicks: 2,
            schema: BARE,
            needs: &[Service::Redis, Service::Kafka],
            source: "levels/lv4-kafka/src/broken/highest_offset.rs",
            open: |context| Box::pin(async { Ok(Box::new(broken::highest_offset::Locked::open(context).await?) as _) }),
        },
        Strategy {
            name: "broken/no-dedupe",
            summary: "decides every message, also one that it has decided already",
            place: Place::Broken,
            guarantee: ANYWHERE.except(&[FailureMode {
                trigger: "an order comes a second time: it has two final states, and it is luck which one its buyer is told",
                violates: &[],
            }]),
            clicks: 2,
            schema: BARE,
            needs: &[Service::Redis, Service::Kafka],
            source: "levels/lv4-kafka/src/broken/no_dedupe.rs",
            open: |context| Box::pin(async { Ok(Box::new(broken::no_dedupe::Locked::open(context).await?) as _) }),
        },
        Strategy {
            name: "broken/errors-swallowed",
            summary: "an error goes into the log, and the message with it",
            place: Place::Broken,
            guarantee: ANYWHERE.except(&[FailureMode {
                trigger: "Redis or Postgres is away for a moment",
                violates: LOST,
            }]),
            clicks: 2,
            schema: BARE,
            needs: &[Service::Redis, Service::Kafka],
            source: "levels/lv4-kafka/src/broken/errors_swallowed.rs",
            open: |context| Box::pin(async { Ok(Box::new(broken::errors_swallowed::Locked::open(context).await?) as _) }),
        },
        Strategy {
            name: "broken/dead-letter-on-fault",
            summary: "dead-letters what it could not decide, whatever the reason",
            place: Place::Broken,
            guarantee: ANYWHERE.except(&[FailureMode {
                trigger: "Postgres is away for a moment",
                violates: LOST,
            }]),
            clicks: 2,
            schema: BARE,
            needs: &[Service::Redis, Service::Kafka],
            source: "levels/lv4-kafka/src/broken/dead_letter_on_fault.rs",
            open: |context| {
                Box::pin(async { Ok(Box::new(broken::dead_letter_on_fault::Locked::open(context).await?) as _) })
            },
        },
        Strategy {
            name: "broken/endless-retry",
            summary: "tries again for ever what nobody can decide",
            place: Place::Broken,
            guarantee: ANYWHERE.except(&[FailureMode {
                trigger: "a message is no order: nobody gets past it",
                violates: &[],
            }]),
            clicks: 2,
            schema: BARE,
            needs: &[Service::Redis, Service::Kafka],
            source: "levels/lv4-kafka/src/broken/endless_retry.rs",
            open: |context| Box::pin(async { Ok(Box::new(broken::endless_retry::Locked::open(context).await?) as _) }),
        },
        Strategy {
            name: "broken/poison-skipped",
            summary: "passes what is no order, and says nothing",
            place: Place::Broken,
            guarantee: ANYWHERE.except(&[FailureMode {
                trigger: "a message is no order: nobody ever hears of it",
                violates: &[],
            }]),
            clicks: 2,
            schema: BARE,
            needs: &[Service::Redis, Service::Kafka],
            source: "levels/lv4-kafka/src/broken/poison_skipped.rs",
            open: |context| Box::pin(async { Ok(Box::new(broken::poison_skipped::Locked::open(context).await?) as _) }),
        },
        Strategy {
            name: "broken/offset-not-in-transaction",
            summary: "moves the offset beside the transaction",
            place: Place::Broken,
            guarantee: ANYWHERE.except(&[FailureMode {
                trigger: "a consumer stands still for longer than its session",
                violates: TWICE,
            }]),
            clicks: 2,
            schema: BARE,
            needs: &[Service::Kafka],
            source: "levels/lv4-kafka/src/broken/offset_not_in_transaction.rs",
            open: |context| {
                Box::pin(async {
                    Ok(Box::new(broken::offset_not_in_transaction::SingleWriter::open(context).await?) as _)
                })
            },
        },
        Strategy {
            name: "broken/notify-outside",
            summary: "puts the news into the outbox once the rows are committed",
            place: Place::Broken,
            guarantee: ANYWHERE.except(&[FailureMode {
                trigger: "a consumer is killed between its commit and the news",
                violates: LOST,
            }]),
            clicks: 2,
            schema: BARE,
            needs: &[Service::Kafka],
            source: "levels/lv4-kafka/src/broken/notify_outside.rs",
            open: |context| {
                Box::pin(async { Ok(Box::new(broken::notify_outside::SingleWriter::open(context).await?) as _) })
            },
        },
        Strategy {
            name: "broken/produce-nothing",
            summary: "202, and the order is not even sent: the ceiling of the accept path",
            place: Place::Broken,
            guarantee: KEEPS_NOTHING,
            clicks: 2,
            schema: BARE,
            needs: &[Service::Kafka],
            source: "levels/lv4-kafka/src/broken/produce_nothing.rs",
            open: |context| {
                Box::pin(async { Ok(Box::new(broken::produce_nothing::SingleWriter::open(context).await?) as _) })
            },
        },
    ],
};
