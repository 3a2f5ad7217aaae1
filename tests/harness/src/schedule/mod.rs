//! Exact schedules: every request is held at its scheduling points, and one moves at a time.
//!
//! A [`Schedule`] of a [`ScheduleRunner`] calls the strategy directly, in this process, on a real
//! database. Nothing depends on timing: a step ends when every request that is not held has reached
//! its next point, has answered, or is observed to be blocked by one that is held.

mod blocked;
mod cancellation;
mod disconnect;
mod explore;
mod runner;
mod settle;
mod state;
mod stepping;
mod trace;

pub use cancellation::{cancelled_after_every_poll, never_cancelled};
pub use disconnect::{disconnected_at_every_point, never_disconnected};
pub use explore::{Broken, Exploration, Scenario};
pub use runner::ScheduleRunner;
pub use stepping::{RequestHandle, Schedule};
pub use trace::{Event, EventKind, Trace};
