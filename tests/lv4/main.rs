//! LV.4: orders that are accepted first and decided later, through Kafka.

#![allow(clippy::unwrap_used)]

mod contract;
mod faults;
