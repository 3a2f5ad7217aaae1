//! Clients that hold a server up: idle, slow, or endless. Seen on the level's own process, from outside.

use std::{fs, net::SocketAddr, process::Command, time::Duration};

use anyhow::{Context, ensure};
use box_office::raise_open_files_limit;
use futures_util::future::try_join_all;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    time::timeout,
};

use crate::{http_contract::TestServer, rush::SALE};

/// Clients that connect and say nothing, or half of what they should.
const IDLE: usize = 2_000;

/// Clients whose body comes to a halt after one byte.
const SLOW: usize = 50;

/// Clients whose body does not end.
const ENDLESS: usize = 10;

/// What an endless body has sent at most when it is given up.
const ENDLESS_BYTES: usize = 8 * 1024 * 1024;

/// What a server may take for one client, in KiB, all of them taken together: less than the endless bodies would be if it kept them.
const MOST_KIB_EACH: u64 = 32;

/// How long anything may take.
const TIMEOUT: Duration = Duration::from_secs(10);

/// Holds 2,000 idle connections and 50 slow bodies open, sends endless ones, and sells: everybody else is served, and the memory of the process
/// stays within a bound. The server cuts such clients off in the end, which is not waited for here.
///
/// Returns how many KiB the process took for them.
///
/// # Errors
/// Somebody was not served, or too much memory was taken.
pub async fn withstands_idle_and_slow_clients(server: &TestServer) -> anyhow::Result<u64> {
    raise_open_files_limit();
    let address = server.address();
    server.create_rush_sale(20).await?;
    sells(server, 1..=10).await.context("before anybody came")?;
    let before_kib = memory_kib(server.pid().await?, "VmRSS:")?;

    let mut held = vec![];
    for client in 0..IDLE {
        let says: &[u8] = if client % 2 == 0 {
            b""
        } else {
            b"GET /livez HTTP/1.1\r\nX-"
        };
        held.push(connect(address, says).await?);
    }
    for _ in 0..SLOW {
        let head = head("Content-Length: 16") + "{";
        held.push(connect(address, head.as_bytes()).await?);
    }
    let endless = (0..ENDLESS).map(|_| endless(address));
    timeout(TIMEOUT, try_join_all(endless))
        .await
        .context("an endless body was neither refused nor cut off")??;
    sells(server, 11..=20).await.context("beside them")?;

    let grown_kib = memory_kib(server.pid().await?, "VmHWM:")?.saturating_sub(before_kib);
    let clients = (IDLE + SLOW + ENDLESS) as u64;
    ensure!(
        grown_kib <= clients * MOST_KIB_EACH,
        "{clients} clients cost {grown_kib} KiB"
    );
    drop(held);
    ensure!(server.get("/livez").await?.status == 200);
    Ok(grown_kib)
}

async fn sells(server: &TestServer, buyers: impl Iterator<Item = i64>) -> anyhow::Result<()> {
    for buyer in buyers {
        let answered = server.reserve(SALE, buyer, None).await?;
        server
            .expect_confirmed(&answered)
            .await
            .with_context(|| format!("buyer {buyer}"))?;
    }
    Ok(())
}

async fn connect(address: SocketAddr, says: &[u8]) -> anyhow::Result<TcpStream> {
    let mut stream = timeout(TIMEOUT, TcpStream::connect(address))
        .await
        .context("not accepted in time")??;
    stream.write_all(says).await?;
    Ok(stream)
}

fn head(length: &str) -> String {
    format!(
        "POST /api/sales/{SALE}/reservations HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n{length}\r\n\r\n"
    )
}

/// Sends a body without end, until the server has had enough of it.
async fn endless(address: SocketAddr) -> anyhow::Result<()> {
    let mut stream = connect(address, head("Transfer-Encoding: chunked").as_bytes()).await?;
    let chunk = format!("4000\r\n{}\r\n", " ".repeat(0x4000));
    for _ in 0..ENDLESS_BYTES / chunk.len() {
        if stream.write_all(chunk.as_bytes()).await.is_err() {
            return Ok(());
        }
    }
    let mut answer = vec![];
    // A reset is an end as well.
    let _ = stream.read_to_end(&mut answer).await;
    ensure!(
        answer.is_empty() || answer.starts_with(b"HTTP/1.1 413"),
        "it is answered with {}",
        answer.escape_ascii()
    );
    Ok(())
}

/// The memory of a process, in KiB: what it has in use (`VmRSS:`), or has ever had (`VmHWM:`).
fn memory_kib(pid: u32, field: &str) -> anyhow::Result<u64> {
    // Where there is no /proc there is ps, which knows the first of them only.
    let status = fs::read_to_string(format!("/proc/{pid}/status")).ok();
    let resident = match status.as_deref().and_then(|status| status.split_once(field)) {
        Some((_, rest)) => rest.split_whitespace().next().unwrap_or_default().to_owned(),
        None => {
            let told = Command::new("ps")
                .args(["-o", "rss=", "-p", &pid.to_string()])
                .output()?;
            String::from_utf8_lossy(&told.stdout).trim().to_owned()
        }
    };
    resident
        .parse()
        .with_context(|| format!("process {pid} takes {resident:?} KiB"))
}
