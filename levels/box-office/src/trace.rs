//! Writes down which request came to which scheduling point, and when.

use std::{
    fs::File,
    io::{self, BufWriter, Write},
    path::Path,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
};

use futures_util::future::{BoxFuture, FutureExt, ready};
use rustix::time::{ClockId, clock_gettime};
use serde::{Deserialize, Serialize};

use crate::{Observer, Sighting, Steps};

/// One step of one request: a line of the trace file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    /// The request's id, as in its `X-Request-Id`.
    pub request: String,
    /// When, in microseconds of the machine's monotonic clock. Comparable between processes of one machine.
    pub at_us: u64,
    /// The scheduling point.
    pub step: String,
    /// What was found there, if the strategy tells.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub saw: Option<String>,
    /// The line that marks the point: `levels/…/read_then_write.rs:52`.
    pub place: String,
}

/// Microseconds of the machine's monotonic clock, the one that [`Record::at_us`] is taken from.
pub fn now_monotonic_us() -> u64 {
    let now = clock_gettime(ClockId::Monotonic);
    let (seconds, nanoseconds) = (now.tv_sec.unsigned_abs(), now.tv_nsec.unsigned_abs());
    seconds * 1_000_000 + nanoseconds / 1_000
}

/// Keeps every step in memory, so that the disk does not slow a request down, and writes them when the server ends.
pub(crate) struct Recorder {
    file: Mutex<File>,
    sightings: Mutex<Vec<(Arc<str>, u64, Sighting)>>,
    dropped: AtomicU64,
}

impl Recorder {
    /// What is remembered at most: a server that is left running with a trace must not eat the machine's memory.
    const MAX_RECORDS: usize = 1_000_000;

    /// Opens the file at once, so that a path that can't be written is known before the first request.
    pub(crate) fn create(path: &Path) -> io::Result<Arc<Self>> {
        Ok(Arc::new(Self {
            file: Mutex::new(File::create(path)?),
            sightings: Mutex::default(),
            dropped: AtomicU64::new(0),
        }))
    }

    /// The steps of one request, each noted here.
    pub(crate) fn steps_of(self: &Arc<Self>, request: Arc<str>) -> Steps {
        Steps::observed_by(Arc::new(TracedRequest {
            recorder: Arc::clone(self),
            request,
        }))
    }

    fn note(&self, request: &Arc<str>, sighting: Sighting) {
        let at_us = now_monotonic_us();
        let mut sightings = self.sightings.lock().unwrap_or_else(PoisonError::into_inner);
        if sightings.len() == Self::MAX_RECORDS {
            self.dropped.fetch_add(1, Ordering::Relaxed);
            return;
        }
        sightings.push((Arc::clone(request), at_us, sighting));
    }

    /// Writes what was noted.
    pub(crate) fn write(&self) -> io::Result<()> {
        let sightings = std::mem::take(&mut *self.sightings.lock().unwrap_or_else(PoisonError::into_inner));
        let mut file = self.file.lock().unwrap_or_else(PoisonError::into_inner);
        let mut lines = BufWriter::new(&mut *file);
        for (request, at_us, sighting) in sightings {
            let record = Record {
                request: request.to_string(),
                at_us,
                step: sighting.step.to_owned(),
                saw: sighting.saw,
                place: format!("{}:{}", sighting.place.file(), sighting.place.line()),
            };
            serde_json::to_writer(&mut lines, &record)?;
            lines.write_all(b"\n")?;
        }
        lines.flush()?;
        match self.dropped.load(Ordering::Relaxed) {
            0 => {}
            dropped => tracing::warn!(dropped, "the trace holds the first {} steps only", Self::MAX_RECORDS),
        }
        Ok(())
    }
}

/// One request, watched.
struct TracedRequest {
    recorder: Arc<Recorder>,
    request: Arc<str>,
}

impl Observer for TracedRequest {
    fn at(&self, sighting: Sighting) -> BoxFuture<'_, ()> {
        self.recorder.note(&self.request, sighting);
        ready(()).boxed()
    }

    fn blocked(&self, sighting: Sighting) {
        self.recorder.note(&self.request, sighting);
    }
}
