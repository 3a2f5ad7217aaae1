//! The scheduling points whose names the harness and the levels' tests rely on.
//!
//! A strategy marks each with [`Steps::at`](crate::Steps::at). A name is also what
//! `OVERSOLD_STOP_AT` takes and what a trace shows.

/// The transaction of the reservation is open.
pub const TRANSACTION_BEGUN: &str = "transaction begun";
/// The strategy's own lock is held: in Redis, or in the process.
pub const LOCK_TAKEN: &str = "lock taken";
/// The mutex of this process is held.
pub const MUTEX_TAKEN: &str = "mutex taken";
/// The strategy has read the stock and chosen to sell; nothing is written yet.
pub const DECIDED_TO_SELL: &str = "decided to sell";
/// The new stock is written; the transaction is still open.
pub const STOCK_WRITTEN: &str = "stock written";
/// The reservation is written; the transaction is still open.
pub const RESERVATION_WRITTEN: &str = "reservation written";
/// The transaction of the reservation is committed.
pub const COMMITTED: &str = "committed";
/// The strategy has released a lock that it reports waiting for with
/// [`Steps::blocked`](crate::Steps::blocked).
///
/// A schedule that sees it waits for the next holder to report the lock taken.
pub const LOCK_RELEASED: &str = "lock released";
/// Another transaction changed the row first, and the reservation starts again.
pub const OVERTAKEN: &str = "overtaken";
/// A consumer has decided every order of its batch; nothing is committed yet.
pub const BATCH_DECIDED: &str = "batch decided";
/// A consumer has written the rows of its batch; the transaction is still open.
pub const ROWS_WRITTEN: &str = "rows written";
/// A consumer has taken a message from its batch.
pub const MESSAGE_TAKEN: &str = "message taken";
