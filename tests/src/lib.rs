//! The suite: real services, a rush of buyers, a judge, and exact schedules. It knows no level's name.

pub mod backends;
pub mod history;
