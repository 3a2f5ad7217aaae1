//! Exponential backoff with jitter.

use std::time::Duration;

/// The delay before a batch is retried after a fault. It doubles with each attempt, so that a
/// backend that comes back is not overloaded at once.
#[derive(Default)]
pub struct Backoff {
    attempts: u32,
}

impl Backoff {
    /// The next delay: 50 ms doubled with each attempt, at most 1 s, with jitter.
    pub fn next_delay(&mut self) -> Duration {
        const MIN: Duration = Duration::from_millis(50);
        const MAX: Duration = Duration::from_secs(1);
        let delay = (MIN * 2_u32.pow(self.attempts.min(10))).min(MAX);
        self.attempts += 1;
        delay.mul_f64(rand::random_range(0.5..1.0))
    }

    /// Starts again with the shortest delay, after a success.
    pub fn reset(&mut self) {
        self.attempts = 0;
    }
}
