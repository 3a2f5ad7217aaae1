//! Wrong on purpose: each differs from its twin by one mistake, and the suite must catch it. They grade the suite.

pub mod bare_evalsha;
pub mod commit_not_covered;
pub mod del_without_owner;
pub mod does_nothing;
pub mod get_then_del;
pub mod message_alone;
pub mod no_lease;
pub mod token_from_incr;
pub mod token_not_checked;
pub mod watchdog_not_tied;
pub mod wrong_key;
