//! The code that all levels share: domain types, the HTTP API, settings, telemetry and scheduling
//! points.
//!
//! It has no lock, no retry and no queue. Those are the subject of the levels, and are in the
//! source file of each strategy.

pub mod api;
mod breakpoint;
mod cause_log;
mod connections;
mod database;
mod domain;
mod guarantee;
mod http;
mod improvements;
mod instrumentation;
mod level;
mod metrics;
pub mod points;
mod problem;
mod readiness;
mod run;
mod sale_states;
mod server;
mod settings;
mod steps;
mod telemetry;
pub mod trace;

pub use breakpoint::BreakpointSpec;
pub use cause_log::{CauseLog, causes};
pub use database::{Connection, Database, Transaction};
pub use domain::{
    BuyerId, ExistingReservation, Indeterminate, InvalidRequestKey, Order, Outcome, Priority, RateLimitPolicy,
    RateLimited, Refusal, RequestKey, Reservation, ReserveError, SaleId,
};
pub use guarantee::{FailureMode, Guarantee, Invariant, Promise, Promises};
pub use improvements::{Improvement, Improvements, PaymentSettings};
pub use instrumentation::Instrumentation;
pub use level::{
    Event, KafkaConfig, Level, Mutant, Open, Opening, RedisConfig, Reserve, Schema, Service, Strategy, StrategyContext,
};
pub use metrics::{
    CircuitBreakerMetrics, CircuitState, ConsumerLag, ConsumerMetrics, ExpiredOrders, LostLeases, OldestUnknownPayment,
    PaymentCalls, PriorityMetrics, RateLimitBuyers, RateLimitedRequests, RelayMetrics, StrategyMetrics,
};
pub use problem::ProblemKind;
pub use readiness::probe_new_connection;
pub use run::{main, raise_open_files_limit, serve};
pub use server::{DrainTimeout, Server, StartError};
pub use settings::{
    AdminToken, DatabaseUrl, Limits, LogFormat, Origin, RedisUrl, Settings, explain, kafka_bootstrap_servers,
    kafka_prefix, unset_if_empty,
};
pub use steps::{Observer, Point, Sighting, Steps};
