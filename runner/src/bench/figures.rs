//! What is measured beside the rate: the disk and the memory. And how several rounds become one figure.

use std::{
    fmt,
    fs::File,
    net::SocketAddr,
    os::unix::fs::FileExt,
    process::Command,
    time::{Duration, Instant},
};

use anyhow::{Context, ensure};
use harness::{backends::reaper, rush::Connection};
use serde::Serialize;

/// The middle of several measurements, and how far they lie apart.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub(crate) struct MedianRange {
    pub(super) median: f64,
    pub(super) least: f64,
    pub(super) most: f64,
}

impl MedianRange {
    /// `None` without a measurement.
    pub(crate) fn of(measured: impl IntoIterator<Item = f64>) -> Option<Self> {
        let mut sorted: Vec<f64> = measured.into_iter().collect();
        sorted.sort_by(f64::total_cmp);
        let (least, most) = (*sorted.first()?, *sorted.last()?);
        let middle = sorted.len() / 2;
        let median = if sorted.len() % 2 == 1 {
            sorted[middle]
        } else {
            f64::midpoint(sorted[middle - 1], sorted[middle])
        };
        Some(Self { median, least, most })
    }
}

impl fmt::Display for MedianRange {
    /// With as many digits as were asked for: `{:.2}`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let digits = f.precision().unwrap_or(0);
        let Self { median, least, most } = self;
        write!(f, "{median:.digits$} ({least:.digits$} to {most:.digits$})")
    }
}

/// How long the disk takes to keep 4 KiB: the median of a few hundred writes, each with its `fdatasync`, in the folder where the data of a
/// native Postgres lies.
pub(super) fn fdatasync() -> anyhow::Result<Duration> {
    const TIMES: u64 = 300;
    const PAGE_BYTES: u64 = 4096;

    let folder = reaper::folder("fdatasync")?;
    let file = File::create_new(folder.join("pages"))?;
    let page = [b'x'; PAGE_BYTES as usize];
    // Room first, as a log that is written over again has it.
    file.set_len(16 * PAGE_BYTES)?;
    let mut took = vec![];
    for number in 0..TIMES {
        let began = Instant::now();
        file.write_all_at(&page, number % 16 * PAGE_BYTES)?;
        file.sync_data()?;
        took.push(began.elapsed().as_secs_f64());
    }
    std::fs::remove_dir_all(folder)?;
    let median = MedianRange::of(took).context("nothing was measured")?.median;
    Ok(Duration::from_secs_f64(median))
}

/// The memory that a process holds, in MiB.
pub(super) fn resident_mib(pid: u32) -> anyhow::Result<f64> {
    let shown = Command::new("ps")
        .args(["-o", "rss=", "-p", &pid.to_string()])
        .output()?;
    let kib = String::from_utf8(shown.stdout)?;
    let kib: f64 = kib
        .trim()
        .parse()
        .context("ps does not tell the memory of the server")?;
    Ok(kib / 1024.0)
}

/// The most memory that a process has held, in MiB; where the system does not tell, what it holds now.
#[cfg(feature = "lv4")]
pub(super) fn most_mib(pid: u32) -> anyhow::Result<f64> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let most = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    let kib = most.and_then(|most| most.split_whitespace().next()?.parse::<f64>().ok());
    kib.map_or_else(|| resident_mib(pid), |kib| Ok(kib / 1024.0))
}

/// So many connections, each of which has asked once and stays.
pub(super) async fn connect(address: SocketAddr, connections: usize) -> anyhow::Result<Vec<Connection>> {
    let mut open = vec![];
    for _ in 0..connections {
        let mut connection = Connection::open(address).await?;
        let request = hyper::Request::get("/livez").body(Default::default())?;
        let answered = connection.send(request).await?;
        ensure!(
            answered.status.is_success(),
            "/livez was answered with {}",
            answered.status
        );
        open.push(connection);
    }
    Ok(open)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_spread_is_the_middle_and_both_ends() {
        let of = |measured: &[f64]| MedianRange::of(measured.iter().copied());
        assert_eq!(of(&[]), None);
        assert_eq!(
            format!("{:.1}", of(&[3.0, 1.0, 2.0]).expect("three")),
            "2.0 (1.0 to 3.0)"
        );
        assert_eq!(of(&[4.0, 1.0, 2.0, 3.0]).expect("four").median, 2.5);
    }
}
