//! LV.4: orders are accepted first and processed asynchronously through Kafka, and none is lost.
//!
//! [`pipeline`] is what both strategies share; its documentation has the map.

mod decision_row;
pub mod locked;
pub mod payment_service;
pub mod pipeline;
pub mod redis_lock;
pub mod saga;
pub mod single_writer;

pub mod mutants {
    //! Strategies with one planted mistake each, compiled from the patches in `mutants/`.

    include!(concat!(env!("OUT_DIR"), "/mutants.rs"));
}

use box_office::{
    FailureMode, Guarantee, Improvement, Invariant, Level, Mutant, Open, Promises, Schema, Service, Strategy,
};

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
        .needs(&[Service::Kafka])
        .improvements(SINGLE_WRITER_IMPROVEMENTS),
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
        mutant(mutants::RATE_LIMITED_IS_SOLD_OUT)
            .guarantee(ANYWHERE.except(&[FailureMode {
                trigger: "a buyer is over the rate limit, and is told that it is sold out",
                violates: &[Invariant::NoFalseRefusal],
            }]))
            .needs(&[Service::Kafka]),
        mutant(mutants::RATE_LIMIT_AFTER_PRODUCE)
            .guarantee(ANYWHERE.except(&[FailureMode {
                trigger: "a buyer is over the rate limit, and the order is decided all the same",
                violates: &[Invariant::NothingInvented],
            }]))
            .needs(&[Service::Kafka]),
        mutant(mutants::REPEAT_IS_RATE_LIMITED)
            .guarantee(ANYWHERE.except(&[FailureMode {
                trigger: "a buyer over the rate limit repeats an accepted order, and is answered 429",
                violates: &[],
            }]))
            .needs(&[Service::Kafka]),
        mutant(mutants::UNBOUNDED_BUYERS)
            .guarantee(ANYWHERE.except(&[FailureMode {
                trigger: "a million distinct buyers: each takes memory for good",
                violates: &[],
            }]))
            .needs(&[Service::Kafka]),
        mutant(mutants::ROW_READ_FOR_EACH_REFUSAL)
            .guarantee(ANYWHERE.except(&[FailureMode {
                trigger: "a flood over the rate limit: each request is a query",
                violates: &[],
            }]))
            .needs(&[Service::Kafka]),
        mutant(mutants::TTL_AT_PRODUCE_ONLY)
            .guarantee(ANYWHERE.except(&[FailureMode {
                trigger: "an order is older than its time to live when it is decided, and takes a ticket",
                violates: &[],
            }]))
            .needs(&[Service::Kafka]),
        mutant(mutants::EXPIRED_TAKES_A_TICKET)
            .guarantee(ANYWHERE.except(&[FailureMode {
                trigger: "an order expires",
                violates: &[Invariant::Conservation],
            }]))
            .needs(&[Service::Kafka]),
        mutant(mutants::EXPIRED_WITHOUT_EVENT)
            .guarantee(ANYWHERE.except(&[FailureMode {
                trigger: "an order expires",
                violates: LOST,
            }]))
            .needs(&[Service::Kafka]),
        mutant(mutants::EXPIRED_IS_SOLD_OUT)
            .guarantee(ANYWHERE.except(&[FailureMode {
                trigger: "an order expires, and there are tickets left",
                violates: &[Invariant::NoFalseRefusal, Invariant::NoUndersell],
            }]))
            .needs(&[Service::Kafka]),
        mutant(mutants::EXPIRED_BEFORE_DEDUPLICATED)
            .guarantee(ANYWHERE.except(&[FailureMode {
                trigger: "an order that was decided is redelivered when it is old: it has two final states",
                violates: &[],
            }]))
            .needs(&[Service::Kafka]),
        mutant(mutants::BACKLOG_NOT_CHECKED)
            .guarantee(ANYWHERE.except(&[FailureMode {
                trigger: "no order is decided for as long as one may wait",
                violates: &[],
            }]))
            .needs(&[Service::Kafka]),
        mutant(mutants::PRODUCE_NOTHING)
            .guarantee(KEEPS_NOTHING)
            .needs(&[Service::Kafka]),
        mutant(mutants::STOCK_IGNORED).guarantee(OVERSELLS),
        mutant(mutants::REFUSALS_STORED_AS_CONFIRMED).guarantee(OVERSELLS),
        mutant(mutants::DEDUPE_BY_BUYER).guarantee(KEEPS_NOTHING),
        mutant(mutants::CIRCUIT_NEVER_CLOSES)
            .guarantee(ANYWHERE.except(&[FailureMode {
                trigger: "with circuit breakers: Postgres is away for a moment, and nothing is decided after it",
                violates: LOST,
            }]))
            .needs(&[Service::Kafka]),
        mutant(mutants::PAUSED_FOR_GOOD).guarantee(ANYWHERE.except(&[FailureMode {
            trigger: "with circuit breakers: Postgres is away for a moment, and nothing is decided after it",
            violates: LOST,
        }])),
        mutant(mutants::MOVED_PARTITION_STAYS_PAUSED)
            .guarantee(ANYWHERE.except(&[FailureMode {
                trigger: "with circuit breakers: a partition changes hands while it is paused, and comes back",
                violates: LOST,
            }]))
            .needs(&[Service::Kafka]),
        mutant(mutants::REFUSALS_ARE_FAILURES).guarantee(ANYWHERE.except(&[FailureMode {
            trigger: "with circuit breakers: an order is for a sale that does not exist, and the consumers pause",
            violates: &[],
        }])),
        mutant(mutants::HALF_OPEN_ADMITS_ALL)
            .guarantee(ANYWHERE.except(&[FailureMode {
                trigger: "with circuit breakers: Kafka stores nothing, and all buyers wait with each probe",
                violates: &[],
            }]))
            .needs(&[Service::Kafka]),
        mutant(mutants::OPEN_IS_SOLD_OUT)
            .guarantee(ANYWHERE.except(&[FailureMode {
                trigger: "with circuit breakers: Kafka stores nothing, and buyers are refused",
                violates: &[Invariant::NoFalseRefusal, Invariant::NoUndersell],
            }]))
            .needs(&[Service::Kafka]),
        mutant(mutants::RELAY_MARKS_BEFORE_ACK)
            .guarantee(ANYWHERE.except(&[FailureMode {
                trigger: "with the outbox relay: it is killed between the mark and the broker's acknowledgement",
                violates: &[],
            }]))
            .needs(&[Service::Kafka]),
        mutant(mutants::RELAY_SKIPS_LATE_NUMBERS)
            .guarantee(ANYWHERE.except(&[FailureMode {
                trigger: "with the outbox relay: a transaction commits after one with a higher number",
                violates: &[],
            }]))
            .needs(&[Service::Kafka]),
        mutant(mutants::RELAY_KEYED_BY_NUMBER)
            .guarantee(ANYWHERE.except(&[FailureMode {
                trigger: "with the outbox relay: a reservation has several events",
                violates: &[],
            }]))
            .needs(&[Service::Kafka]),
        mutant(mutants::RELAY_SENDS_ALL_AT_ONCE)
            .guarantee(ANYWHERE.except(&[FailureMode {
                trigger: "with the outbox relay: an event cannot be sent, and its reservation has another one",
                violates: &[],
            }]))
            .needs(&[Service::Kafka]),
        single_writer_mutant(
            mutants::RELEASE_REPEATED,
            &[FailureMode {
                trigger: "a release command is delivered again",
                violates: &[Invariant::Conservation],
            }],
        ),
        single_writer_mutant(
            mutants::TIMEOUT_IS_A_NO,
            &[FailureMode {
                trigger: "the payment service takes the money and answers late",
                violates: &[Invariant::PaidOnce],
            }],
        ),
        single_writer_mutant(
            mutants::NO_IDEMPOTENCY_KEY,
            &[FailureMode {
                trigger: "the answer to a charge is lost",
                violates: &[Invariant::PaidOnce],
            }],
        ),
        single_writer_mutant(
            mutants::HOLD_WITHOUT_END,
            &[FailureMode {
                trigger: "the payment service never answers",
                violates: &[Invariant::Conservation, Invariant::NothingLost, Invariant::Progress],
            }],
        ),
        single_writer_mutant(
            mutants::LATE_PAYMENT_KEPT,
            &[FailureMode {
                trigger: "the payment service takes the money and never says so",
                violates: &[Invariant::PaidOnce],
            }],
        ),
        single_writer_mutant(
            mutants::VIP_BY_REQUEST,
            &[FailureMode {
                trigger: "with priority: a buyer who is not named asks for it, and is served first",
                violates: &[],
            }],
        ),
        single_writer_mutant(
            mutants::VIPS_WITHOUT_BOUND,
            &[FailureMode {
                trigger: "with priority: VIPs come as fast as they are decided, and nobody else's order is",
                violates: &[],
            }],
        ),
        single_writer_mutant(
            mutants::NEWEST_FIRST,
            &[FailureMode {
                trigger: "with priority, which promises the order of service: a batch has several orders",
                violates: &[Invariant::Order],
            }],
        ),
        single_writer_mutant(
            mutants::OFFSET_OF_BOTH_TOPICS,
            &[FailureMode {
                trigger: "with priority: no order is ever decided",
                violates: LOST,
            }],
        ),
        single_writer_mutant(
            mutants::VIPS_FENCED_ALONE,
            &[FailureMode {
                trigger: "with priority: a consumer with VIPs is frozen for longer than its session",
                violates: OVERSOLD,
            }],
        ),
        single_writer_mutant(
            mutants::ORDERS_FENCED_ALONE,
            &[FailureMode {
                trigger: "with priority: a consumer without VIPs is frozen for longer than its session",
                violates: OVERSOLD,
            }],
        ),
        single_writer_mutant(
            mutants::VIPS_NEVER_REVOKED,
            &[FailureMode {
                trigger: "with priority: a partition changes hands, and two instances read its VIPs",
                violates: &[],
            }],
        ),
        single_writer_mutant(
            mutants::RELEASE_BYPASSES_WRITER,
            &[FailureMode {
                trigger: "a ticket comes back while the sale's writer sells another",
                violates: OVERSOLD,
            }],
        ),
        single_writer_mutant(
            mutants::CLAIM_CLAIMS_NOTHING,
            &[FailureMode {
                trigger: "a payment takes a moment: every instance asks for it again and again",
                violates: &[],
            }],
        ),
        single_writer_mutant(
            mutants::RELEASE_COMMANDED_ONCE,
            &[FailureMode {
                trigger: "Kafka is away when a ticket is to be released",
                violates: &[Invariant::Conservation, Invariant::NothingLost, Invariant::Progress],
            }],
        ),
        single_writer_mutant(
            mutants::REFUND_ASKED_ONCE,
            &[FailureMode {
                trigger: "the charge is still being processed when its refund is asked for",
                violates: &[Invariant::PaidOnce],
            }],
        ),
        single_writer_mutant(
            mutants::CANCELLED_WITHOUT_REFUND,
            &[FailureMode {
                trigger: "a buyer cancels after the money was taken, and the payment service never says so",
                violates: &[Invariant::PaidOnce],
            }],
        ),
        single_writer_mutant(
            mutants::LATE_APPROVAL_CONFIRMS,
            &[FailureMode {
                trigger: "a payment is approved after its ticket was released and sold again",
                violates: &[Invariant::NoOversell, Invariant::Conservation, Invariant::PaidOnce],
            }],
        ),
        mutant(mutants::ACCEPTED_IS_UNKNOWN).guarantee(ANYWHERE.except(&[FailureMode {
            trigger: "a buyer asks about an order that is not yet decided",
            violates: &[Invariant::NothingLost],
        }])),
    ],
};

/// The improvements that both strategies support. `single-writer` has two more.
const IMPROVEMENTS: &[Improvement] = &[
    Improvement::RateLimiting,
    Improvement::MessageTtl,
    Improvement::CircuitBreaker,
    Improvement::OutboxRelay,
];

/// A ticket can come back only where one writer changes the stock, and only where the orders of a sale
/// are in a queue has anybody a place in it.
const SINGLE_WRITER_IMPROVEMENTS: &[Improvement] = &[
    Improvement::RateLimiting,
    Improvement::MessageTtl,
    Improvement::CircuitBreaker,
    Improvement::OutboxRelay,
    Improvement::Priority,
    Improvement::Saga,
];

/// A strategy with the defaults of this level.
const fn strategy<S: Open>(name: &'static str, summary: &'static str) -> Strategy {
    Strategy::new::<S>(name, summary, BARE)
        .needs(&[Service::Redis, Service::Kafka])
        .improvements(IMPROVEMENTS)
        .steps(&["order checked", "acknowledged"])
}

/// A mutant of `single-writer` with a mistake in an improvement that only this strategy has.
const fn single_writer_mutant(mutant: Mutant, failure_modes: &'static [FailureMode]) -> Strategy {
    Strategy::mutant(mutant, BARE)
        .guarantee(ANYWHERE.except(failure_modes))
        .needs(&[Service::Kafka])
        .improvements(SINGLE_WRITER_IMPROVEMENTS)
}

/// A mutant with the defaults of this level.
const fn mutant(mutant: Mutant) -> Strategy {
    Strategy::mutant(mutant, BARE)
        .needs(&[Service::Redis, Service::Kafka])
        .improvements(IMPROVEMENTS)
}
