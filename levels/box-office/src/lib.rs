//! The theatre every level plays in: what a sale is, the HTTP contract, configuration, telemetry, scheduling points.
//!
//! No lock, no retry and no queue lives here: those are what the levels teach, and each stands in its strategy's own file.

mod domain;
mod guarantee;
mod level;
mod steps;

pub use domain::{
    BuyerId, Earlier, InvalidRequestKey, No, Order, Outcome, Refusal, RequestKey, Reservation,
    SaleId, Undecided,
};
pub use guarantee::{Guarantee, Invariant, Promise, Promises};
pub use level::{Level, Place, Reserve, Schema, Stage, Strategy};
pub use steps::{Observer, Point, Sighting, Steps};
