//! Wrong on purpose: each differs from its twin by one mistake, and the suite must catch it. They grade the suite.

pub mod for_update_does_nothing;
pub mod for_update_wrong_key;
pub mod guard_before_commit;
pub mod look_up_before_lock;
pub mod mutex_does_nothing;
pub mod mutex_wrong_key;
pub mod retry_reuses_the_read;
pub mod second_connection;
pub mod transaction_left_open;
pub mod version_not_compared;
