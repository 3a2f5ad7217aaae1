//! The payment service of a sale: a process of its own, whose ledger the judge compares with the
//! rows.

use std::{net::SocketAddr, process::Stdio, time::Duration};

use anyhow::{Context, bail, ensure};
use box_office::Improvements;
use http_body_util::Full;
use hyper::{Request, StatusCode, body::Bytes};
use serde::Deserialize;
use sqlx::PgPool;
use tokio::{
    io::{AsyncBufReadExt, AsyncReadExt, BufReader},
    process::{Child, Command},
    time::{Instant, sleep, timeout},
};
use uuid::Uuid;

use crate::{
    backends::reaper,
    broken_pipe,
    history::{Entry, Payment},
    rush::{Connection, Program},
};

/// Time limit for the service to listen, and to answer.
const TIMEOUT: Duration = Duration::from_secs(10);

/// A running payment service. It ends when this is dropped.
pub struct PaymentService {
    process: Child,
    address: SocketAddr,
}

/// A line of the ledger: it also names the key.
#[derive(Deserialize)]
struct Line {
    reservation: Uuid,
    entry: Entry,
}

impl PaymentService {
    /// Starts the service: a program that prints its URL when it listens.
    ///
    /// # Errors
    /// Fails if the program does not start, or does not print its URL: with what it printed to
    /// stderr instead.
    pub async fn start(program: &Program) -> anyhow::Result<Self> {
        let mut command = Command::from(reaper::command(program.executable())?);
        let mut process = command
            .args(program.arguments())
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .with_context(|| format!("starting {}", program.executable().display()))?;
        let output = process.stdout.take().context("its output is piped")?;
        let mut errors = process.stderr.take().context("its errors are piped")?;
        let mut line = String::new();
        timeout(TIMEOUT, BufReader::new(output).read_line(&mut line))
            .await
            .context("the payment service did not say in time where it listens")??;
        if line.is_empty() {
            let mut error = String::new();
            errors.read_to_string(&mut error).await?;
            bail!("{}", error.trim());
        }
        tokio::spawn(async move {
            let mut errors = BufReader::new(errors).lines();
            while let Ok(Some(error)) = errors.next_line().await {
                broken_pipe::notice(format_args!("{error}"));
            }
        });
        let address = line
            .trim()
            .rsplit_once("http://")
            .and_then(|(_, address)| address.parse().ok())
            .context("the payment service did not say where it listens")?;
        Ok(Self { process, address })
    }

    /// The URL that servers reach it at: their `PAYMENT_URL`.
    pub fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    /// The address that it listens on.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// The process, to signal it and to wait for its end.
    pub fn process(&mut self) -> &mut Child {
        &mut self.process
    }

    /// The process id. `None`: it has ended, and was waited for.
    pub fn pid(&self) -> Option<u32> {
        self.process.id()
    }

    /// The charges and refunds so far, in their order.
    ///
    /// # Errors
    /// Fails if the service does not answer.
    pub async fn ledger(&self) -> anyhow::Result<Vec<Payment>> {
        ledger(self.address).await
    }

    /// The number of requests for a charge so far, repeats included.
    ///
    /// # Errors
    /// Fails if the service does not answer.
    pub async fn calls(&self) -> anyhow::Result<u64> {
        let answered = get(self.address, "/calls").await?;
        Ok(std::str::from_utf8(&answered)?.parse()?)
    }
}

/// The charges and refunds of the payment service at this address, in their order.
///
/// # Errors
/// Fails if the service does not answer.
pub async fn ledger(address: SocketAddr) -> anyhow::Result<Vec<Payment>> {
    let lines: Vec<Line> = serde_json::from_slice(&get(address, "/ledger").await?)?;
    let payments = lines.into_iter().map(|line| Payment {
        reservation: line.reservation,
        entry: line.entry,
    });
    Ok(payments.collect())
}

async fn get(address: SocketAddr, path: &str) -> anyhow::Result<Bytes> {
    let request = async {
        let mut connection = Connection::open(address).await?;
        connection.send(Request::get(path).body(Full::default())?).await
    };
    let answered = timeout(TIMEOUT, request)
        .await
        .context("the payment service does not answer")??;
    ensure!(
        answered.status == StatusCode::OK,
        "the payment service answers {path} with {}",
        answered.status
    );
    Ok(answered.body)
}

/// These settings, with short holds and payments where they are not set: a rush with a payment
/// service beside it waits for their end.
#[must_use]
pub fn with_short_holds(improvements: Improvements) -> Improvements {
    const HOLD: Duration = Duration::from_secs(5);
    const PAYMENT_TIMEOUT: Duration = Duration::from_secs(1);

    Improvements {
        hold: improvements.hold.or(Some(HOLD)),
        payment_timeout: improvements.payment_timeout.or(Some(PAYMENT_TIMEOUT)),
        ..improvements
    }
}

/// The number of tickets that were held and are neither confirmed, nor released and refunded.
///
/// # Errors
/// Fails if the database cannot be read.
pub async fn unfinished(database: &PgPool) -> sqlx::Result<i64> {
    sqlx::query_scalar("select count(*) from saga where due_at is not null")
        .fetch_one(database)
        .await
}

/// Waits until every ticket that was held is confirmed or released, and every refund is made.
///
/// # Errors
/// Fails if that takes longer than `within`, or the database cannot be read.
pub async fn wait_until_settled(database: &PgPool, within: Duration) -> anyhow::Result<()> {
    const POLL_INTERVAL: Duration = Duration::from_millis(20);

    let deadline = Instant::now() + within;
    loop {
        let unfinished = unfinished(database).await?;
        if unfinished == 0 {
            return Ok(());
        }
        ensure!(
            Instant::now() < deadline,
            "{within:?} after the last answer {unfinished} tickets are neither confirmed nor released and refunded"
        );
        sleep(POLL_INTERVAL).await;
    }
}
