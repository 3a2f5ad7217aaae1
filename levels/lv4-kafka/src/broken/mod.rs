//! Wrong on purpose: each differs from its twin by one mistake, and the suite must catch it. They grade the suite.

pub mod answer_before_ack;
pub mod auto_commit;
pub mod commit_not_covered;
pub mod dead_letter_on_fault;
pub mod endless_retry;
pub mod errors_swallowed;
pub mod highest_offset;
pub mod lock_does_nothing;
pub mod lock_wrong_key;
pub mod no_dedupe;
pub mod notify_outside;
pub mod offset_not_in_transaction;
pub mod partition_by_buyer;
pub mod poison_skipped;
pub mod produce_nothing;
