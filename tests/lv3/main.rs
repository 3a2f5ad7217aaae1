//! LV.3: a distributed lock in Redis.

#![allow(clippy::unwrap_used)]

mod contract;
mod faults;
mod lock;
mod mutants;
mod schedules;
