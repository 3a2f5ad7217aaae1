//! Slow clients: idle connections, slow bodies and endless bodies, against a level's own server
//! process (the Slowloris attack).

use std::{fs, net::SocketAddr, process::Command, time::Duration};

use anyhow::{Context, ensure};
use box_office::{Level, Strategy, raise_open_files_limit};
use futures_util::future::try_join_all;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    time::timeout,
};

use crate::{
    backends::TestEnvironment,
    rush::{Program, SALE},
    test_server::TestServer,
};

/// Number of clients that connect and send nothing, or half of a request head.
const IDLE: usize = 2_000;

/// Number of clients whose body stalls after one byte.
const SLOW: usize = 50;

/// Number of clients whose body does not end.
const ENDLESS: usize = 10;

/// Maximum number of bytes that an endless body sends.
const ENDLESS_BYTES: usize = 8 * 1024 * 1024;

/// Memory limit per client on average, in KiB: less than the endless bodies would take if the
/// server buffered them.
const MOST_KIB_EACH: u64 = 32;

/// Time limit of each operation.
const TIMEOUT: Duration = Duration::from_secs(10);

/// Checks that idle, slow and endless clients of a server of this strategy keep nobody waiting, and
/// prints what they cost.
///
/// # Errors
/// Another client was not served, the memory exceeds its bound, or the server did not start or stop.
pub async fn keep_nobody_waiting(program: &Program, level: &Level, strategy: &Strategy) -> anyhow::Result<()> {
    let environment = TestEnvironment::shared(strategy).await?;
    let server = TestServer::start(&environment, program, level, strategy).await?;
    let kib = withstands_idle_and_slow_clients(&server).await?;
    println!("they cost {kib} KiB");
    server.stop().await
}

/// Keeps 2,000 idle connections and 50 slow bodies open, sends endless bodies, and buys tickets:
/// other clients are served, and the memory of the process stays within a bound. The server
/// eventually disconnects such clients; this check does not wait for that.
///
/// Returns the memory that the process took for these clients, in KiB.
///
/// # Errors
/// Fails if a client is not served or the process takes too much memory.
async fn withstands_idle_and_slow_clients(server: &TestServer) -> anyhow::Result<u64> {
    raise_open_files_limit();
    let address = server.address();
    server.create_rush_sale(20).await?;
    sells(server, 1..=10).await.context("before the slow clients")?;
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
    sells(server, 11..=20).await.context("beside the slow clients")?;

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

/// Sends an endless body until the server responds or closes the connection.
async fn endless(address: SocketAddr) -> anyhow::Result<()> {
    let mut stream = connect(address, head("Transfer-Encoding: chunked").as_bytes()).await?;
    let chunk = format!("4000\r\n{}\r\n", " ".repeat(0x4000));
    for _ in 0..ENDLESS_BYTES / chunk.len() {
        if stream.write_all(chunk.as_bytes()).await.is_err() {
            return Ok(());
        }
    }
    let mut answer = vec![];
    // A reset is also accepted.
    let _ = stream.read_to_end(&mut answer).await;
    ensure!(
        answer.is_empty() || answer.starts_with(b"HTTP/1.1 413"),
        "it is answered with {}",
        answer.escape_ascii()
    );
    Ok(())
}

/// The resident memory of a process in KiB: current (`VmRSS:`) or peak (`VmHWM:`).
fn memory_kib(pid: u32, field: &str) -> anyhow::Result<u64> {
    // Without /proc, `ps` reports the current value only.
    let status = fs::read_to_string(format!("/proc/{pid}/status")).ok();
    let resident = match status.as_deref().and_then(|status| status.split_once(field)) {
        Some((_, rest)) => rest.split_whitespace().next().unwrap_or_default().to_owned(),
        None => {
            let output = Command::new("ps")
                .args(["-o", "rss=", "-p", &pid.to_string()])
                .output()?;
            String::from_utf8_lossy(&output.stdout).trim().to_owned()
        }
    };
    resident
        .parse()
        .with_context(|| format!("process {pid} takes {resident:?} KiB"))
}
