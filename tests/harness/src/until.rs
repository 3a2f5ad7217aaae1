//! Waiting for something that nobody announces.

use std::time::Duration;

use tokio::time::{Instant, sleep};

/// How long it may take on a slow machine.
const TIMEOUT: Duration = Duration::from_secs(20);

/// How often it is looked for.
const POLL_INTERVAL: Duration = Duration::from_millis(5);

/// Looks until it is so.
///
/// # Panics
/// After 20 seconds it is still not so.
pub async fn until(what: &str, mut is_so: impl AsyncFnMut() -> bool) {
    let gave_up = Instant::now() + TIMEOUT;
    while !is_so().await {
        assert!(Instant::now() < gave_up, "waited {TIMEOUT:?} for {what}");
        sleep(POLL_INTERVAL).await;
    }
}
