//! Tests that every level runs, with their assertions: the contract of a sale and what else does not
//! depend on the strategy.

mod contract;
mod declared_guarantees;
pub mod http_contract;
pub mod instance_faults;
pub mod slow_clients;

pub use contract::{RED, contract, required};
pub use declared_guarantees::{assert_after_fault, assert_declared, assert_failure_mode};
