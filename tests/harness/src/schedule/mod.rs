//! Exact schedules: hold every request at its scheduling points, and let one move at a time.
//!
//! A [`Script`] of a [`ScheduleRunner`] calls the strategy itself, in this process, on a real database. Nothing is timed: a step ends when every request that
//! is not held has reached its next point, has answered, or is seen to be blocked by one that is held.

mod blocked;
mod cancel;
mod explore;
mod hang_up;
mod runner;
mod settle;
mod state;
mod stepping;
mod trace;

pub use cancel::{cancelled_after_every_poll, never_cancelled};
pub use explore::{Broken, Explored, Scenario};
pub use hang_up::{hung_up_at_every_point, never_hung_up};
pub use runner::ScheduleRunner;
pub use stepping::{RequestHandle, Script};
pub use trace::{Event, Happened, Trace};
