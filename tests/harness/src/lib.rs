//! The suite: real services, a rush of buyers, a judge, and exact schedules. It knows no level's name.

pub mod backends;
mod contract;
pub mod crowd;
mod declares;
mod held_commits;
pub mod history;
pub mod http_contract;
pub mod judge;
pub mod ledger;
pub mod proxy;
pub mod restarts;
pub mod rows;
pub mod rush;
pub mod schedule;
pub mod twins;
mod until;

pub use contract::{RED, contract, held_to};
pub use declares::{after_its_fault, declares, declares_limit};
pub use held_commits::HeldCommits;
pub use until::until;
