//! A level of test doubles: the strategy `scripted` answers as its request key says. The server
//! around it is under test.
//!
//! Every test binary uses a part of this module.

#![allow(dead_code)]

use std::{collections::HashMap, net::SocketAddr, num::NonZeroU32, time::Duration};

use async_trait::async_trait;
use box_office::{
    DatabaseUrl, Guarantee, Indeterminate, Level, Order, Outcome, ProblemKind, Promises, RateLimitPolicy, RateLimited,
    Refusal, Reservation, Reserve, ReserveError, Schema, Server, Settings, Steps, Strategy, StrategyContext,
};
use harness::{
    backends::{self, Database},
    until,
};
use serde_json::Value;
use sqlx::{Connection, PgConnection, PgExecutor, migrate::Migrator};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};
use uuid::Uuid;

static MIGRATIONS: Migrator = sqlx::migrate!("tests/migrations");

pub(crate) static LEVEL: Level = Level {
    name: "lv0",
    package: "lv0-test-double",
    summary: "test doubles",
    lag: None,
    strategies: &[
        Strategy {
            name: "scripted",
            summary: "answers as its request key says",
            guarantee: Guarantee::uniform(Promises::ALL_KEPT),
            clicks: 1,
            schema: Schema {
                name: "double",
                migrations: &MIGRATIONS,
            },
            needs: &[],
            improvements: &[],
            steps: &["asked", "committed"],
            open: |context| Box::pin(async { Ok(Box::new(Scripted { context }) as Box<dyn Reserve>) }),
        },
        Strategy {
            name: "unopenable",
            summary: "fails to open",
            guarantee: Guarantee::uniform(Promises::ALL_KEPT),
            clicks: 1,
            schema: Schema {
                name: "double",
                migrations: &MIGRATIONS,
            },
            needs: &[],
            improvements: &[],
            steps: &[],
            open: |_| Box::pin(async { anyhow::bail!("it was never alive") }),
        },
    ],
    mutants: &[],
};

/// The existing reservation that `already-reserved` names.
pub(crate) const EARLIER: Uuid = Uuid::from_u128(0x0190_0000_0000_7000_8000_0000_0000_0042);

/// When a client that is sent away may come back: it is told whole seconds, rounded up.
const RETRY_AFTER: Duration = Duration::from_millis(1);

struct Scripted {
    context: StrategyContext,
}

#[async_trait]
impl Reserve for Scripted {
    async fn reserve(&self, order: &Order, steps: &Steps) -> Result<Outcome, ReserveError> {
        steps.at("asked").saw(order.key.as_str()).await;
        self.context.simulate_work().await;
        match order.key.as_str() {
            "sold-out" => Err(Refusal::SoldOut.into()),
            "already-reserved" => Err(Refusal::AlreadyReserved {
                earlier: Reservation { id: EARLIER },
            }
            .into()),
            "key-of-another-buyer" => Err(Refusal::KeyOfAnotherBuyer.into()),
            "unknown-sale" => Err(Refusal::UnknownSale.into()),
            "not-vip" => Err(Refusal::NotVip.into()),
            "overloaded" => Err(Indeterminate::Overloaded.into()),
            "backlogged" => {
                let retry_after = RETRY_AFTER;
                Err(Indeterminate::Backlogged { retry_after }.into())
            }
            "rate-limited" => Err(RateLimited {
                exceeded: "buyer",
                policies: vec![RateLimitPolicy {
                    name: "buyer",
                    quota: NonZeroU32::MIN,
                }],
                retry_after: RETRY_AFTER,
            }
            .into()),
            "timed-out" => Err(Indeterminate::TimedOut.into()),
            "backend-away" => {
                let secret = anyhow::anyhow!("the backend's own words");
                Err(Indeterminate::BackendAway(secret).into())
            }
            "panic" => panic!("as asked"),
            _ => {
                let id = Uuid::now_v7();
                let mut tx = self.context.begin().await?;
                if order.key.as_str().starts_with("wait") {
                    steps.blocked("waiting for the test");
                    lock(&mut *tx, order.buyer).await?;
                }
                if order.key.as_str() == "panic-in-a-transaction" {
                    panic!("as asked");
                }
                sqlx::query("insert into reservation values ($1, $2, $3, $4, 'confirmed')")
                    .bind(id)
                    .bind(order.sale)
                    .bind(order.buyer)
                    .bind(order.key.as_str())
                    .execute(&mut *tx)
                    .await?;
                tx.commit().await?;
                steps.at("committed").await;
                Ok(Outcome::Confirmed(Reservation { id }))
            }
        }
    }
}

/// Takes an advisory lock, which a test can hold to block the reservation of this buyer.
async fn lock(connection: impl PgExecutor<'_>, buyer: i64) -> sqlx::Result<()> {
    sqlx::query("select pg_advisory_xact_lock($1)")
        .bind(buyer)
        .execute(connection)
        .await
        .map(drop)
}

pub(crate) const TOKEN: &str = "open-sesame";

/// A migrated database for one test.
pub(crate) async fn database() -> Database {
    let postgres = backends::postgres().await.unwrap_or_else(|missing| panic!("{missing}"));
    postgres.database(LEVEL.strategies[0].schema).await.expect("a database")
}

/// Settings of a server on this database, on any free port.
pub(crate) fn on(url: &str) -> Settings {
    Settings {
        database_url: Some(url.parse::<DatabaseUrl>().expect("a URL")),
        port: 0,
        admin_token: Some(TOKEN.parse().expect("a token")),
        ..Settings::default()
    }
}

/// A server of the scripted strategy, and its database.
pub(crate) struct TestEnvironment {
    pub(crate) server: Server,
    pub(crate) database: Database,
}

/// Starts a server on a new database.
pub(crate) async fn environment() -> TestEnvironment {
    environment_with(|_| ()).await
}

/// The same, with changed settings.
pub(crate) async fn environment_with(change: impl FnOnce(&mut Settings)) -> TestEnvironment {
    let database = database().await;
    let mut settings = on(&database.url());
    change(&mut settings);
    TestEnvironment {
        server: start(&settings).await,
        database,
    }
}

/// Starts a server of the scripted strategy.
pub(crate) async fn start(settings: &Settings) -> Server {
    box_office::raise_open_files_limit();
    Server::start(&LEVEL, &LEVEL.strategies[0], settings)
        .await
        .expect("it starts")
}

impl TestEnvironment {
    pub(crate) fn address(&self) -> SocketAddr {
        self.server.address()
    }

    /// A connection to the database, bypassing the server.
    pub(crate) async fn connect(&self) -> PgConnection {
        PgConnection::connect(&self.database.url())
            .await
            .expect("the database is there")
    }

    /// Blocks the reservations of buyer 42 until the lock is released.
    pub(crate) async fn block_buyer_42(&self) -> LockHolder {
        let mut connection = self.connect().await;
        sqlx::query("begin")
            .execute(&mut connection)
            .await
            .expect("a transaction");
        lock(&mut connection, 42).await.expect("the lock");
        LockHolder(connection)
    }
}

/// The number of reservations in the database.
pub(crate) async fn reservations(database: &Database) -> i64 {
    let mut connection = PgConnection::connect(&database.url())
        .await
        .expect("the database is there");
    let rows = sqlx::query_scalar("select count(*) from reservation")
        .fetch_one(&mut connection)
        .await;
    rows.expect("a count")
}

/// Holds the lock that buyer 42 waits for.
pub(crate) struct LockHolder(PgConnection);

impl LockHolder {
    pub(crate) async fn release(self) {
        self.0.close().await.expect("the connection closes");
    }
}

/// An HTTP response.
#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) status: u16,
    pub(crate) headers: HashMap<String, String>,
    pub(crate) body: Vec<u8>,
}

impl Answer {
    /// A header; empty if it is absent.
    pub(crate) fn header(&self, name: &str) -> &str {
        self.headers.get(name).map_or("", String::as_str)
    }

    pub(crate) fn text(&self) -> &str {
        std::str::from_utf8(&self.body).expect("text")
    }

    pub(crate) fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap_or_else(|why| panic!("{why} in {self:?}"))
    }

    /// Asserts that the response is this problem, with all members that every problem has.
    #[track_caller]
    pub(crate) fn is_problem(&self, status: u16, name: &str) {
        assert_eq!(self.header("content-type"), "application/problem+json", "{self:?}");
        let body = self.json();
        assert_eq!(
            (self.status, &body["type"]),
            (status, &format!("/problems/{name}").into()),
            "{body}"
        );
        assert_eq!(body["status"], status, "{body}");
        let kind = ProblemKind::from_uri(&format!("/problems/{name}")).expect("a problem that the contract knows");
        assert_eq!(
            (kind.status().as_u16(), kind.title().into()),
            (status, body["title"].clone()),
            "{body}"
        );
        assert_eq!(body["request_id"], self.header("x-request-id"), "{body}");
        for member in ["title", "detail", "request_id"] {
            assert!(
                body[member].as_str().is_some_and(|text| !text.is_empty()),
                "no {member} in {body}"
            );
        }
    }
}

/// Sends one request on a new connection.
pub(crate) async fn ask(to: SocketAddr, method: &str, path: &str, headers: &[(&str, &str)], body: &str) -> Answer {
    let mut request = format!("{method} {path} HTTP/1.1\r\nHost: box-office\r\nConnection: close\r\n");
    for (name, value) in headers {
        request.push_str(&format!("{name}: {value}\r\n"));
    }
    request.push_str(&format!("Content-Length: {}\r\n\r\n{body}", body.len()));
    send(to, request.as_bytes()).await
}

/// Reserves a ticket of sale 1 with this request key.
pub(crate) async fn reserve(to: SocketAddr, buyer: i64, key: &str) -> Answer {
    let headers = [("Content-Type", "application/json"), ("Idempotency-Key", key)];
    let body = format!(r#"{{"buyer_id": {buyer}}}"#);
    ask(to, "POST", "/api/sales/1/reservations", &headers, &body).await
}

/// Sends raw bytes on a new connection, and reads the first response.
pub(crate) async fn send(to: SocketAddr, request: &[u8]) -> Answer {
    let mut stream = TcpStream::connect(to).await.expect("it listens");
    stream.write_all(request).await.expect("it reads");
    read_answer(&mut stream).await.expect("an answer")
}

/// Reads the next response. `None`: the connection was closed first.
pub(crate) async fn read_answer(stream: &mut TcpStream) -> Option<Answer> {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        head.push(within("an answer", stream.read_u8()).await.ok()?);
    }
    let head = String::from_utf8(head).expect("headers are ASCII");
    let mut lines = head.lines();
    let status = lines.next()?.split(' ').nth(1)?.parse().expect("a status");
    let headers: HashMap<String, String> = lines
        .filter_map(|line| line.split_once(": "))
        .map(|(name, value)| (name.to_lowercase(), value.to_owned()))
        .collect();
    let length = headers
        .get("content-length")
        .map_or(0, |length| length.parse().expect("a length"));
    let mut body = vec![0; length];
    within("the body", stream.read_exact(&mut body)).await.ok()?;
    Some(Answer { status, headers, body })
}

/// The output of the future; panics with `what` after 20 s.
pub(crate) async fn within<F: Future>(what: &str, future: F) -> F::Output {
    tokio::time::timeout(Duration::from_secs(20), future)
        .await
        .unwrap_or_else(|_| panic!("waited 20 s for {what}"))
}

/// Waits until a server that is shutting down has closed its listener.
pub(crate) async fn listener_closed(at: SocketAddr) {
    until("the listener to close", async || TcpStream::connect(at).await.is_err()).await;
}
