//! The payment service of a sale: a process of its own, whose ledger the judge compares with the
//! rows.

use std::{net::SocketAddr, process::Stdio, time::Duration};

use anyhow::{Context, ensure};
use http_body_util::Full;
use hyper::{Request, StatusCode, body::Bytes};
use serde::Deserialize;
use sqlx::PgPool;
use tokio::{
    io::{AsyncBufReadExt, BufReader},
    process::{Child, Command},
    time::{Instant, sleep, timeout},
};
use uuid::Uuid;

use crate::{
    backends::reaper,
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
    /// Fails if the program does not start, or does not print its URL.
    pub async fn start(program: &Program) -> anyhow::Result<Self> {
        let mut command = Command::from(reaper::command(program.executable())?);
        let mut process = command
            .args(program.arguments())
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .with_context(|| format!("starting {}", program.executable().display()))?;
        let output = process.stdout.take().context("its output is piped")?;
        let mut line = String::new();
        timeout(TIMEOUT, BufReader::new(output).read_line(&mut line))
            .await
            .context("the payment service did not say in time where it listens")??;
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
        let lines: Vec<Line> = serde_json::from_slice(&self.get("/ledger").await?)?;
        let payments = lines.into_iter().map(|line| Payment {
            reservation: line.reservation,
            entry: line.entry,
        });
        Ok(payments.collect())
    }

    /// The number of requests for a charge so far, repeats included.
    ///
    /// # Errors
    /// Fails if the service does not answer.
    pub async fn calls(&self) -> anyhow::Result<u64> {
        let answered = self.get("/calls").await?;
        Ok(std::str::from_utf8(&answered)?.parse()?)
    }

    async fn get(&self, path: &str) -> anyhow::Result<Bytes> {
        let request = async {
            let mut connection = Connection::open(self.address).await?;
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
