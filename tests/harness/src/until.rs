//! Polling for a condition.

use std::time::Duration;

use tokio::time::{Instant, sleep};

/// Time limit, generous for a slow machine.
const TIMEOUT: Duration = Duration::from_secs(20);

/// Interval between two checks.
const POLL_INTERVAL: Duration = Duration::from_millis(5);

/// Waits until the condition holds.
///
/// # Panics
/// Panics if the condition does not hold within 20 seconds.
pub async fn until(what: &str, mut holds: impl AsyncFnMut() -> bool) {
    let deadline = Instant::now() + TIMEOUT;
    while !holds().await {
        assert!(Instant::now() < deadline, "waited {TIMEOUT:?} for {what}");
        sleep(POLL_INTERVAL).await;
    }
}
