//! Waiting for something that nobody announces.

use std::time::Duration;

use tokio::time::{Instant, sleep};

/// How long it may take on a slow machine.
const PATIENCE: Duration = Duration::from_secs(20);

/// How often it is looked for.
const LOOK_EVERY: Duration = Duration::from_millis(5);

/// Looks until it is so.
///
/// # Panics
/// After 20 seconds it is still not so.
pub async fn until(what: &str, mut is_so: impl AsyncFnMut() -> bool) {
    let gave_up = Instant::now() + PATIENCE;
    while !is_so().await {
        assert!(Instant::now() < gave_up, "waited {PATIENCE:?} for {what}");
        sleep(LOOK_EVERY).await;
    }
}
