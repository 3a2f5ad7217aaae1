//! The test harness: real backends, a rush of buyers, a judge of histories, exact schedules, and
//! faults. It does not depend on any level.

pub mod backends;
pub mod broken_pipe;
mod delayed_commits;
pub mod final_state;
pub mod history;
pub mod history_recorder;
pub mod judge;
pub mod payments;
pub mod proxy;
pub mod rush;
pub mod schedule;
pub mod shared_tests;
pub mod test_server;
mod until;

pub use delayed_commits::DelayedCommits;
pub use shared_tests::{RED, assert_after_fault, assert_declared, assert_failure_mode, contract, required};
pub use until::until;
