//! The test harness: real backends, a rush of buyers, a judge of histories, exact schedules, and
//! faults. It does not depend on any level.

pub mod backends;
mod contract;
mod delayed_commits;
mod guarantees;
pub mod history;
pub mod history_recorder;
pub mod http_contract;
pub mod instance_faults;
pub mod judge;
pub mod print;
pub mod proxy;
pub mod rows;
pub mod rush;
pub mod schedule;
pub mod slow_clients;
pub mod test_server;
mod until;

pub use contract::{RED, contract, required};
pub use delayed_commits::DelayedCommits;
pub use guarantees::{assert_after_fault, assert_declared, assert_failure_mode};
pub use until::until;
