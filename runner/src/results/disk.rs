//! The disk that a measurement waits for.

use std::{
    fs::{self, File},
    os::unix::fs::FileExt,
    time::{Duration, Instant},
};

use anyhow::Context;
use harness::backends::reaper;

use crate::statistics::MedianRange;

/// Duration of an `fdatasync` of one page of Postgres's write-ahead log, which bounds the rate of durable commits: the median of a few
/// hundred writes, each with its own `fdatasync`, in the file system where a durable native Postgres has its data. (Postgres's own program
/// for this is `pg_test_fsync`.)
///
/// # Errors
/// The disk could not be written to.
pub(super) fn fdatasync() -> anyhow::Result<Duration> {
    const TIMES: u64 = 300;
    const PAGE_BYTES: u64 = 8192;
    /// On a slow disk fewer are enough.
    const MAX: Duration = Duration::from_millis(500);

    let folder = reaper::folder("fdatasync")?;
    let file = File::create_new(folder.join("pages"))?;
    let page = [b'x'; PAGE_BYTES as usize];
    // Preallocated, as the segments of a write-ahead log are.
    file.set_len(16 * PAGE_BYTES)?;
    let mut took = vec![];
    let all = Instant::now();
    for number in 0..TIMES {
        let began = Instant::now();
        file.write_all_at(&page, number % 16 * PAGE_BYTES)?;
        file.sync_data()?;
        took.push(began.elapsed().as_secs_f64());
        if all.elapsed() > MAX {
            break;
        }
    }
    fs::remove_dir_all(folder)?;
    let median = MedianRange::of(took).context("nothing was measured")?.median;
    Ok(Duration::from_secs_f64(median))
}
