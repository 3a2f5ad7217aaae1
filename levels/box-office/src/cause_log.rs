//! A log of causes: what goes wrong a thousand times in an outage is said once.

use std::{
    collections::HashMap,
    error::Error,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

/// A cause is logged again after this time, if it is still there.
const INTERVAL: Duration = Duration::from_secs(10);

/// The maximum number of warnings that are remembered: the text of an error may differ each time.
const MAX_WARNINGS: usize = 64;

/// Logs each warning, of what failed and why, once per interval of 10 seconds, with the number of
/// times that it was left out.
///
/// Without it an outage writes a line for every message and every request, and the one line that
/// names the cause is lost among them. Clones share what they remember.
#[derive(Clone, Debug, Default)]
pub struct CauseLog(Arc<Mutex<HashMap<String, Logged>>>);

#[derive(Debug)]
struct Logged {
    at: Instant,
    left_out: u64,
}

impl CauseLog {
    /// Logs a warning with the whole chain of causes, unless the same was logged within the interval.
    pub fn warn(&self, what: &str, why: &(dyn Error + 'static)) {
        self.warn_text(what, &causes(why));
    }

    /// The same for a cause that is text already.
    pub fn warn_text(&self, what: &str, cause: &str) {
        if let Some(left_out) = self.due(&format!("{what}: {cause}"), Instant::now()) {
            tracing::warn!(cause, left_out, "{what}");
        }
    }

    /// Whether a warning is to be logged, and how often it was left out since it last was.
    fn due(&self, warning: &str, now: Instant) -> Option<u64> {
        let mut warnings = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(logged) = warnings.get_mut(warning) {
            if now.duration_since(logged.at) < INTERVAL {
                logged.left_out += 1;
                return None;
            }
            let left_out = logged.left_out;
            *logged = Logged { at: now, left_out: 0 };
            return Some(left_out);
        }
        if warnings.len() >= MAX_WARNINGS {
            warnings.clear();
        }
        warnings.insert(warning.to_owned(), Logged { at: now, left_out: 0 });
        Some(0)
    }
}

/// An error with all its sources, separated by colons. A source whose text the error repeats is left
/// out.
pub fn causes(error: &(dyn Error + 'static)) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        let cause = error.to_string();
        if !text.contains(&cause) {
            text = format!("{text}: {cause}");
        }
        source = error.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use anyhow::anyhow;

    use super::*;
    use crate::{Indeterminate, ReserveError};

    #[test]
    fn a_cause_is_logged_once_per_interval_and_another_at_once() {
        let (log, start) = (CauseLog::default(), Instant::now());
        assert_eq!(log.due("read-only", start), Some(0));
        for _ in 0..1_000 {
            assert_eq!(log.due("read-only", start + INTERVAL / 2), None);
        }
        assert_eq!(log.due("out of memory", start + INTERVAL / 2), Some(0));
        assert_eq!(log.clone().due("read-only", start + INTERVAL), Some(1_000));
        assert_eq!(log.due("read-only", start + 2 * INTERVAL), Some(0));
    }

    #[test]
    fn endless_new_causes_take_no_endless_memory() {
        let (log, now) = (CauseLog::default(), Instant::now());
        for number in 0..10 * MAX_WARNINGS {
            assert_eq!(log.due(&number.to_string(), now), Some(0));
        }
        assert!(log.0.lock().expect("no test panics with it").len() <= MAX_WARNINGS);
    }

    #[test]
    fn the_whole_chain_of_causes_is_named() {
        let disk = anyhow!("No space left on device").context("could not extend file");
        let error = ReserveError::from(Indeterminate::BackendAway(disk));
        assert_eq!(
            causes(&error),
            "a backend is unavailable: could not extend file: No space left on device"
        );
    }
}
