//! Disconnection: a buyer closes the connection while the server is stopped (SIGSTOP) at a
//! scheduling point.

use std::{net::SocketAddr, time::Duration};

use anyhow::{Context, bail, ensure};
use box_office::{Level, SaleId, Strategy, trace::now_monotonic_us};
use sqlx::PgPool;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    time::timeout,
};

use super::cancellation::{abandoned, nothing_left_open, order, request};
use crate::{
    backends::TestEnvironment,
    final_state,
    history::{Answer, FORMAT_VERSION, Header, History, Micros},
    judge::judge,
    rush::{Program, Rush},
    test_server::TestServer,
};

/// Time limit for the server to reach its point, and to finish once it is resumed.
const TIMEOUT: Duration = Duration::from_secs(10);

/// How a client disconnects.
#[derive(Clone, Copy, Debug)]
enum Leaves {
    /// Closes the connection (FIN).
    Closing,
    /// Resets the connection (RST).
    Resetting,
}

/// Stops the level's server at every scheduling point of a reservation, disconnects, resumes the
/// server, and checks each time that nothing partial remains. The reservation runs in its own task,
/// so it still completes; no transaction is open; the pool's only connection is usable; a repeat
/// with the same key gets that reservation, and the next buyer the other ticket.
///
/// Returns the points.
///
/// # Errors
/// Names what remained, and at which point. Fails if the server does not stop at a point.
pub async fn disconnected_at_every_point(
    program: &Program,
    level: &Level,
    strategy: &Strategy,
) -> anyhow::Result<Vec<String>> {
    let environment = TestEnvironment::shared(strategy).await?;
    let observer = environment.database().pool(1).await?;
    let points = points(&environment, program, level, strategy).await?;
    let mut sale = 1;
    for point in &points {
        for leaves in [Leaves::Closing, Leaves::Resetting] {
            sale += 1;
            let program = program.clone().variable("OVERSOLD_STOP_AT", format!("{point}#1"));
            // With one connection, a leak stops all further service.
            let rush = Rush {
                pool_size: Some(1),
                ..Rush::default()
            };
            let server = TestServer::start_for(&rush, &environment, &program, level, strategy).await?;
            hang_up(&server, &observer, sale, leaves, TIMEOUT)
                .await
                .with_context(|| format!("the buyer disconnected at {point:?}, {leaves:?} the connection"))?;
            server.stop().await?;
        }
    }
    Ok(points)
}

/// The control run of [`disconnected_at_every_point`], in which the server does not stop.
///
/// # Errors
/// Always fails: the fault did not strike.
pub async fn never_disconnected(program: &Program, level: &Level, strategy: &Strategy) -> anyhow::Result<()> {
    /// A reservation takes a few milliseconds.
    const LONG_ENOUGH: Duration = Duration::from_secs(1);

    let environment = TestEnvironment::shared(strategy).await?;
    let observer = environment.database().pool(1).await?;
    let server = TestServer::start(&environment, program, level, strategy).await?;
    hang_up(&server, &observer, 1, Leaves::Closing, LONG_ENOUGH).await?;
    server.stop().await
}

/// Every point that a reservation passes, in order.
async fn points(
    environment: &TestEnvironment,
    program: &Program,
    level: &Level,
    strategy: &Strategy,
) -> anyhow::Result<Vec<String>> {
    let server = TestServer::start_for(&Rush::default().traced(), environment, program, level, strategy).await?;
    server.create_sale(1, 1).await?;
    let mut answer = vec![0; 64];
    send(server.address(), 1).await?.read_exact(&mut answer).await?;
    ensure!(answer.starts_with(b"HTTP/1.1 201"), "{}", answer.escape_ascii());
    let steps = server.stop_with_steps().await?;
    Ok(steps.of(NUMBER).iter().map(|record| record.step.clone()).collect())
}

async fn hang_up(
    server: &TestServer,
    observer: &PgPool,
    sale: SaleId,
    leaves: Leaves,
    within: Duration,
) -> anyhow::Result<()> {
    server.create_sale(sale, 2).await?;
    let first = order(sale, 1)?;
    let mut requests = vec![request(&first)];
    let buyer = send(server.address(), sale).await?;
    server
        .wait_until_stopped(within)
        .await
        .context("the fault did not strike")?;
    if matches!(leaves, Leaves::Resetting) {
        buyer.set_zero_linger()?;
    }
    drop(buyer);
    let fault = abandoned("the buyer disconnected");
    server.resume().await?;

    let made = async {
        while final_state::read(observer, sale).await?.rows.is_empty() {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        anyhow::Ok(())
    };
    timeout(TIMEOUT, made)
        .await
        .context("the reservation was interrupted: it has no row")??;
    for buyer in [1, 2] {
        let order = order(sale, buyer)?;
        let mut request = request(&order);
        let answered = server.reserve(sale, buyer, Some(order.key.as_str())).await?;
        request.answered_us = Some(now_monotonic_us());
        if answered.status != 201 {
            bail!(
                "the next request, of buyer {buyer}, is answered with {}",
                answered.status
            );
        }
        let reservation = answered.json::<box_office::api::Reservation>()?.id;
        request.answer = Answer::Confirmed { reservation };
        requests.push(request);
    }
    nothing_left_open(observer).await?;
    let sold = final_state::read(observer, sale).await?;
    let history = History {
        header: Header {
            version: FORMAT_VERSION,
            strategy: "disconnected".to_owned(),
            sale,
            capacity: 2,
            deadline_us: Micros::MAX / 2,
            expiry_us: None,
            stock: Some(sold.stock),
        },
        requests,
        rows: Some(sold.rows),
        faults: vec![fault],
        payments: None,
        decisions: None,
    };
    let verdict = judge(&history);
    ensure!(verdict.findings.is_empty(), "{verdict}");
    Ok(())
}

/// The id of the request in the server's trace.
const NUMBER: u64 = 1;

/// Sends buyer 1's request for a ticket, and returns the open connection.
async fn send(address: SocketAddr, sale: SaleId) -> anyhow::Result<TcpStream> {
    let body = r#"{"buyer_id": 1}"#;
    let request = format!(
        "POST /api/sales/{sale}/reservations HTTP/1.1\r\nHost: {address}\r\nContent-Type: application/json\r\n\
         Idempotency-Key: buyer-1\r\nX-Request-Id: {NUMBER}\r\nContent-Length: {}\r\n\r\n{body}",
        body.len()
    );
    let mut stream = TcpStream::connect(address).await?;
    stream.write_all(request.as_bytes()).await?;
    Ok(stream)
}
