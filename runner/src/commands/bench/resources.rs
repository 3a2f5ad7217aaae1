//! What is measured besides the throughput: the memory of a server.

use std::{net::SocketAddr, process::Command};

use anyhow::{Context, ensure};
use harness::rush::Connection;

/// Resident memory of a process, in MiB.
pub(super) fn resident_mib(pid: u32) -> anyhow::Result<f64> {
    let shown = Command::new("ps")
        .args(["-o", "rss=", "-p", &pid.to_string()])
        .output()?;
    let kib = String::from_utf8(shown.stdout)?;
    let kib: f64 = kib
        .trim()
        .parse()
        .context("ps does not report the memory of the server")?;
    Ok(kib / 1024.0)
}

/// Peak resident memory of a process, in MiB; where the system does not report it, the current one.
#[cfg(feature = "lv4")]
pub(super) fn peak_mib(pid: u32) -> anyhow::Result<f64> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let most = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    let kib = most.and_then(|most| most.split_whitespace().next()?.parse::<f64>().ok());
    kib.map_or_else(|| resident_mib(pid), |kib| Ok(kib / 1024.0))
}

/// Opens this many connections, each of which has sent one request and stays open.
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
