//! The theatre every level plays in: what a sale is, the HTTP contract, configuration, telemetry, scheduling points.
//!
//! No lock, no retry and no queue lives here: those are what the levels teach, and each stands in its strategy's own file.

pub mod api;
mod domain;
mod guarantee;
mod http;
mod level;
mod metrics;
mod problem;
mod run;
mod server;
mod settings;
mod steps;
mod stop;
mod telemetry;
pub mod trace;
mod watch;

pub use domain::{
    BuyerId, Earlier, InvalidRequestKey, No, Order, Outcome, Refusal, RequestKey, Reservation, SaleId, Undecided,
};
pub use guarantee::{Guarantee, Invariant, Limit, Promise, Promises};
pub use level::{Event, KafkaPlace, Level, Opening, Place, RedisPlace, Reserve, Schema, Service, Stage, Strategy};
pub use metrics::{Counts, Lag};
pub use problem::ProblemKind;
pub use run::{main, raise_open_files_limit, serve};
pub use server::{CutOff, Server, StartError};
pub use settings::{
    AdminToken, DatabaseUrl, Limits, LogFormat, RedisUrl, Settings, explain, kafka_bootstrap_servers, kafka_prefix,
};
pub use steps::{Observer, Point, Sighting, Steps};
pub use stop::StopAt;
pub use watch::Watch;
