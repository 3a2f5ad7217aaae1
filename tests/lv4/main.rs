//! LV.4: orders that are accepted first and decided later, through Kafka.
//!
//! `contract` runs whole sales. The other modules inject a fault each into the trip of an order;
//! every fault is real, and its effect is observed from outside before the test goes on.

#![allow(clippy::unwrap_used)]

mod ablation;
mod fixture;

mod contract;

mod broker;
mod circuit_breaker;
mod database;
mod dead_letters;
mod fencing;
mod lifecycle;
mod mutants;
mod offsets;
mod outages;
mod outbox_events;
mod outbox_relay;
mod payments;
mod priority;
mod rate_limit;
mod readiness;
mod rebalance;
mod redis_lock;
mod saga;
mod saga_exploration;
mod saga_faults;
mod soak;
mod ttl;
