//! The trace of a server: which request reached which scheduling point, and when.

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

/// One arrival at a scheduling point: a line of the trace file (JSON lines).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    /// The request id, as in `X-Request-Id`.
    pub request: String,
    /// The time in microseconds on the machine's monotonic clock. Comparable between processes of
    /// one machine.
    pub at_us: u64,
    /// The name of the scheduling point.
    pub step: String,
    /// The value that the strategy reported there.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub saw: Option<String>,
    /// The source location of the point: `levels/…/read_then_write.rs:52`.
    pub place: String,
}

/// The current time in microseconds on the monotonic clock of [`Record::at_us`]
/// (`CLOCK_MONOTONIC`).
pub fn now_monotonic_us() -> u64 {
    let now = clock_gettime(ClockId::Monotonic);
    let (seconds, nanoseconds) = (now.tv_sec.unsigned_abs(), now.tv_nsec.unsigned_abs());
    seconds * 1_000_000 + nanoseconds / 1_000
}

/// Buffers the trace in memory, so that no request waits for the disk, and writes it when the
/// server shuts down.
pub(crate) struct Recorder {
    file: Mutex<File>,
    sightings: Mutex<Vec<(Arc<str>, u64, Sighting)>>,
    dropped: AtomicU64,
}

impl Recorder {
    /// The capacity of the buffer, in records: it bounds the memory of a server that is left
    /// running with a trace.
    const MAX_RECORDS: usize = 1_000_000;

    /// Creates the file at once, so that an unwritable path fails the start and not the shutdown.
    ///
    /// # Errors
    /// The I/O error of creating the file.
    pub(crate) fn create(path: &Path) -> io::Result<Arc<Self>> {
        Ok(Arc::new(Self {
            file: Mutex::new(File::create(path)?),
            sightings: Mutex::default(),
            dropped: AtomicU64::new(0),
        }))
    }

    /// The scheduling points of one request, recorded here.
    pub(crate) fn steps_of(self: &Arc<Self>, request: Arc<str>) -> Steps {
        Steps::observed_by(Arc::new(TracedRequest {
            recorder: Arc::clone(self),
            request,
        }))
    }

    fn record(&self, request: &Arc<str>, sighting: Sighting) {
        let at_us = now_monotonic_us();
        let mut sightings = self.sightings.lock().unwrap_or_else(PoisonError::into_inner);
        if sightings.len() == Self::MAX_RECORDS {
            self.dropped.fetch_add(1, Ordering::Relaxed);
            return;
        }
        sightings.push((Arc::clone(request), at_us, sighting));
    }

    /// Writes the buffered records, and logs how many exceeded [`Self::MAX_RECORDS`].
    ///
    /// # Errors
    /// The I/O error of writing the file.
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
            dropped => tracing::warn!(
                dropped,
                "the trace was truncated to its first {} records",
                Self::MAX_RECORDS
            ),
        }
        Ok(())
    }
}

/// The observer of one request.
struct TracedRequest {
    recorder: Arc<Recorder>,
    request: Arc<str>,
}

impl Observer for TracedRequest {
    fn at(&self, sighting: Sighting) -> BoxFuture<'_, ()> {
        self.recorder.record(&self.request, sighting);
        ready(()).boxed()
    }

    fn blocked(&self, sighting: Sighting) {
        self.recorder.record(&self.request, sighting);
    }
}
