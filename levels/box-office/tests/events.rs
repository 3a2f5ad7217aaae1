//! Asynchronous orders: accepted first, processed later; and the server-sent events about them.

use std::{
    sync::atomic::{AtomicI64, Ordering::Relaxed},
    time::{Duration, Instant},
};

use async_trait::async_trait;
use box_office::{
    Event, Guarantee, Level, Opening, Order, Outcome, Promises, Reservation, Reserve, ReserveError, Server, Steps,
    Strategy, StrategyContext, api,
};
use harness::{
    backends::{self, Database},
    proxy::{Fault, Proxy},
    until,
};
use serde_json::{Value, json};
use sqlx::{Connection, PgConnection, PgPool};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpSocket, TcpStream},
    sync::{Mutex, mpsc},
};
use uuid::Uuid;

mod common;
use common::{ask, database, on, reserve, within};

static ASYNCHRONOUS: Level = Level {
    name: "lv0",
    package: "lv0-test-double",
    summary: "accepts; the test processes",
    lag: None,
    strategies: &[Strategy {
        name: "asynchronous",
        summary: "accepts; the test processes",
        guarantee: Guarantee::uniform(Promises::ALL_KEPT),
        clicks: 1,
        schema: common::LEVEL.strategies[0].schema,
        needs: &[],
        improvements: &[],
        steps: &[],
        open: |context| Box::pin(async { Ok(Box::new(Asynchronous { context }) as Box<dyn Reserve>) }),
    }],
    mutants: &[],
};

/// The request key of the row that is written when the strategy is closed.
const CLOSED: &str = "closed";

/// The request key of the row that is written before the simulated work of a request.
const ASKED: &str = "asked";

/// The request key of the row that is written after it.
const ANSWERED: &str = "answered";

/// The number of the event with the final state of an order.
const FINAL: i64 = 7;

struct Asynchronous {
    context: StrategyContext,
}

#[async_trait]
impl Reserve for Asynchronous {
    async fn reserve(&self, _: &Order, _: &Steps) -> Result<Outcome, ReserveError> {
        if !self.context.work.is_zero() {
            decide(self.context.database.pool(), Uuid::new_v4(), ASKED).await;
            self.context.simulate_work().await;
            decide(self.context.database.pool(), Uuid::new_v4(), ANSWERED).await;
        }
        let id = Uuid::new_v8(Uuid::new_v4().into_bytes());
        Ok(Outcome::Accepted(Reservation { id }))
    }

    fn accepted(&self, id: Uuid) -> bool {
        id.get_version_num() == 8
    }

    async fn events(&self, id: Uuid, after: i64, timeout: Duration) -> Result<Option<Vec<Event>>, ReserveError> {
        let give_up = Instant::now() + timeout;
        while after < FINAL && Instant::now() < give_up {
            let row: Option<api::Reservation> =
                sqlx::query_as("select id, sale_id, buyer_id, status from reservation where id = $1")
                    .bind(id)
                    .fetch_optional(&self.context.database)
                    .await?;
            if let Some(reservation) = row {
                return Ok(Some(vec![Event {
                    number: FINAL,
                    reservation,
                }]));
            }
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
        Ok(Some(vec![]))
    }

    async fn close(&self) {
        let mut connection = self.context.database.pool().acquire().await.expect("a connection");
        if written(&mut connection, ASKED).await == written(&mut connection, ANSWERED).await {
            decide(self.context.database.pool(), Uuid::new_v4(), CLOSED).await;
        }
    }
}

async fn decide(database: &PgPool, id: Uuid, key: &str) {
    sqlx::query("insert into reservation values ($1, 1, 42, $2, 'confirmed')")
        .bind(id)
        .bind(key)
        .execute(database)
        .await
        .expect("a row");
}

async fn start(database: &Database, hold: Duration) -> Server {
    let mut settings = on(&database.url());
    settings.work = hold;
    Server::start(&ASYNCHRONOUS, &ASYNCHRONOUS.strategies[0], &settings)
        .await
        .expect("it starts")
}

/// Places an order, and asserts that it is accepted. Returns its id and location.
async fn accepted(server: &Server) -> (Uuid, String) {
    let answer = reserve(server.address(), 42, "mine").await;
    assert_eq!(answer.status, 202);
    let body = answer.json();
    let id: Uuid = body["id"].as_str().expect("an id").parse().expect("an id");
    assert_eq!(
        body,
        json!({"id": id, "sale_id": 1, "buyer_id": 42, "status": "accepted"})
    );
    let location = answer.header("location").to_owned();
    assert_eq!(location, format!("/api/reservations/{id}"));
    (id, location)
}

/// Requests the events, and reads them to the end of the stream.
async fn events(server: &Server, location: &str, last: &str) -> (String, Vec<(String, String, Value)>) {
    let text = within("the end of the events", stream_text(server, location, last)).await;
    parsed(&text)
}

fn parsed(text: &str) -> (String, Vec<(String, String, Value)>) {
    let (head, body) = text.split_once("\r\n\r\n").expect("a head");
    let field = |event: &str, name: &str| -> String {
        let line = event.lines().find_map(|line| line.strip_prefix(name));
        line.unwrap_or_else(|| panic!("no {name} in {event:?}"))
            .trim()
            .to_owned()
    };
    let events = body.split("\n\n").filter(|event| event.contains("data:"));
    let events = events.map(|event| {
        let data = serde_json::from_str(&field(event, "data:")).expect("JSON");
        (field(event, "id:"), field(event, "event:"), data)
    });
    (head.to_lowercase(), events.collect())
}

async fn follow(server: &Server, location: &str, last: &str) -> TcpStream {
    let mut stream = TcpStream::connect(server.address()).await.expect("it listens");
    let request = format!("GET {location}/events HTTP/1.1\r\nHost: x\r\nConnection: close\r\n{last}\r\n");
    stream.write_all(request.as_bytes()).await.expect("it reads");
    stream
}

async fn stream_text(server: &Server, location: &str, last: &str) -> String {
    let mut stream = follow(server, location, last).await;
    let mut text = String::new();
    stream.read_to_string(&mut text).await.expect("text");
    text
}

#[tokio::test]
async fn an_accepted_order_can_be_read_before_it_is_processed() {
    let database = database().await;
    let server = start(&database, Duration::ZERO).await;
    let (id, location) = accepted(&server).await;

    let seen = ask(server.address(), "GET", &location, &[], "").await;
    assert_eq!(
        (seen.status, seen.json()),
        (200, json!({"id": id, "status": "accepted"}))
    );
    let made_up = format!("/api/reservations/{}", Uuid::new_v4());
    for path in [made_up.clone(), format!("{made_up}/events")] {
        let unknown = ask(server.address(), "GET", &path, &[], "").await;
        unknown.is_problem(404, "unknown-reservation");
    }
}

#[tokio::test]
async fn the_events_of_an_order_end_with_its_final_state_and_miss_nothing() {
    let database = database().await;
    let server = start(&database, Duration::ZERO).await;
    let pool = database.pool(1).await.expect("a pool");
    let (id, location) = accepted(&server).await;
    let confirmed = json!({"id": id, "sale_id": 1, "buyer_id": 42, "status": "confirmed"});

    let mut stream = follow(&server, &location, "").await;
    let mut text = String::new();
    while !text.contains("event: accepted") {
        text.push(stream.read_u8().await.expect("a byte").into());
    }
    // The client is subscribed: every later state change must reach it.
    decide(&pool, id, "mine").await;
    within("the shutdown", stream.read_to_string(&mut text))
        .await
        .expect("text");
    let retry_ms: u64 = text
        .lines()
        .find_map(|line| line.strip_prefix("retry: "))
        .expect("the delay before a reconnect")
        .parse()
        .expect("milliseconds");
    assert!((1000..2000).contains(&retry_ms), "{retry_ms}");
    let (head, told) = parsed(&text);
    let first = (
        "0".to_owned(),
        "accepted".to_owned(),
        json!({"id": id, "status": "accepted"}),
    );
    let last = ("7".to_owned(), "confirmed".to_owned(), confirmed);
    assert_eq!(told, [first, last.clone()]);
    assert!(head.starts_with("http/1.1 200"), "{head}");
    for header in [
        "content-type: text/event-stream",
        "cache-control: no-cache",
        "x-accel-buffering: no",
    ] {
        assert!(head.contains(header), "{head}");
    }

    // A late subscriber and a reconnected one receive the same event.
    for seen in ["", "Last-Event-ID: 0\r\n"] {
        assert_eq!(events(&server, &location, seen).await.1, std::slice::from_ref(&last));
    }
    let over = stream_text(&server, &location, "Last-Event-ID: 7\r\n").await;
    assert!(over.starts_with("HTTP/1.1 204"), "{over}");
}

/// A server whose connections to its database can be cut.
async fn behind_a_proxy(database: &Database) -> (Server, Proxy) {
    let postgres = backends::postgres().await.expect("a Postgres");
    let proxy = Proxy::before(postgres.report().address.clone()).await.expect("a port");
    let settings = on(&proxy.url_through(&database.url()));
    let server = Server::start(&ASYNCHRONOUS, &ASYNCHRONOUS.strategies[0], &settings);
    (server.await.expect("it starts"), proxy)
}

/// Reads the stream until it contains this text.
async fn read_until(stream: &mut TcpStream, text: &mut String, expected: &str) {
    let reading = async {
        while !text.contains(expected) {
            text.push(stream.read_u8().await.expect("a byte").into());
        }
    };
    within(expected, reading).await;
}

/// An `EventSource` reconnects after a stream has ended, and gives up for good after any status but
/// 200.
#[tokio::test]
async fn a_browser_that_follows_an_order_gets_its_outcome_although_the_database_was_away() {
    let database = database().await;
    let (server, proxy) = behind_a_proxy(&database).await;
    let pool = database.pool(1).await.expect("a pool");
    let (id, location) = accepted(&server).await;
    let mut stream = follow(&server, &location, "").await;
    let mut text = String::new();
    read_until(&mut stream, &mut text, "event: accepted").await;
    proxy.inject(Fault::CloseAll);
    within("the end of the stream", stream.read_to_string(&mut text))
        .await
        .expect("text");
    assert!(proxy.has_struck(), "the fault did not strike");

    let mut streams = vec![];
    for last in ["Last-Event-ID: 0\r\n", ""] {
        let mut stream = follow(&server, &location, last).await;
        let mut text = String::new();
        read_until(&mut stream, &mut text, "retry: ").await;
        assert!(text.starts_with("HTTP/1.1 200"), "{text}");
        streams.push((stream, text));
    }
    // They stay open.
    let (first, _) = &mut streams[0];
    let ended = tokio::time::timeout(Duration::from_secs(3), first.read_to_string(&mut text));
    assert!(ended.await.is_err(), "{text}");
    let seen_the_last = "Last-Event-ID: 7\r\n";
    let over = stream_text(&server, &location, seen_the_last).await;
    assert!(over.starts_with("HTTP/1.1 200"), "{over}");

    proxy.inject(Fault::None);
    decide(&pool, id, "mine").await;
    let mut told = vec![];
    for (mut stream, mut text) in streams {
        within("the end of the stream", stream.read_to_string(&mut text))
            .await
            .expect("text");
        told.push(parsed(&text).1);
    }
    let names = |told: &[(String, String, Value)]| told.iter().map(|(_, name, _)| name.clone()).collect::<Vec<_>>();
    assert_eq!(names(&told[0]), ["confirmed"]);
    assert_eq!(names(&told[1]), ["accepted", "confirmed"]);
    let over = stream_text(&server, &location, seen_the_last).await;
    assert!(over.starts_with("HTTP/1.1 204"), "{over}");
    server.shut_down().await.expect("nothing is aborted");
}

/// The id may be unknown: the client asks again until the database can be read.
#[tokio::test]
async fn a_browser_that_follows_another_reservation_reconnects_until_the_database_is_there() {
    let database = database().await;
    let (server, proxy) = behind_a_proxy(&database).await;
    let location = format!("/api/reservations/{}", Uuid::new_v4());
    proxy.inject(Fault::CloseAll);
    let text = within("the end of the stream", stream_text(&server, &location, "")).await;
    assert!(proxy.has_struck(), "the fault did not strike");
    assert!(text.starts_with("HTTP/1.1 200") && text.contains("\nretry: "), "{text}");
    assert_eq!(parsed(&text).1, []);

    proxy.inject(Fault::None);
    let text = stream_text(&server, &location, "").await;
    assert!(text.starts_with("HTTP/1.1 404"), "{text}");
    server.shut_down().await.expect("nothing is aborted");
}

/// An `EventSource` that receives 204 never reconnects.
#[tokio::test]
async fn a_slow_read_of_the_final_event_is_not_answered_with_204() {
    static SLOW_READS: Level = Level {
        strategies: &[Strategy {
            open: |context| Box::pin(async { Ok(Box::new(SlowReads(Asynchronous { context })) as Box<dyn Reserve>) }),
            ..ASYNCHRONOUS.strategies[0]
        }],
        ..ASYNCHRONOUS
    };
    let database = database().await;
    let server = Server::start(&SLOW_READS, &SLOW_READS.strategies[0], &on(&database.url()))
        .await
        .expect("it starts");
    let (id, location) = accepted(&server).await;
    let pool = PgPool::connect(&database.url()).await.expect("the database is there");
    decide(&pool, id, "mine").await;
    let (head, told) = events(&server, &location, "Last-Event-ID: 0\r\n").await;
    assert!(head.starts_with("http/1.1 200"), "{head}");
    assert_eq!(told.len(), 1, "{told:?}");
    server.shut_down().await.expect("nothing is aborted");
}

/// Finds no event within a short timeout, as under load.
struct SlowReads(Asynchronous);

#[async_trait]
impl Reserve for SlowReads {
    async fn reserve(&self, order: &Order, steps: &Steps) -> Result<Outcome, ReserveError> {
        self.0.reserve(order, steps).await
    }

    fn accepted(&self, id: Uuid) -> bool {
        self.0.accepted(id)
    }

    async fn events(&self, id: Uuid, after: i64, timeout: Duration) -> Result<Option<Vec<Event>>, ReserveError> {
        match timeout {
            short if short <= Duration::from_secs(1) => Ok(Some(vec![])),
            long => self.0.events(id, after, long).await,
        }
    }
}

#[tokio::test]
async fn a_reservation_that_was_final_at_once_has_one_event() {
    let environment = common::environment().await;
    let confirmed = reserve(environment.address(), 42, "mine").await;
    let location = confirmed.header("location");
    let (_, told) = events(&environment.server, location, "").await;
    assert_eq!(told, [("1".to_owned(), "confirmed".to_owned(), confirmed.json())]);
    let over = stream_text(&environment.server, location, "Last-Event-ID: 1\r\n").await;
    assert!(over.starts_with("HTTP/1.1 204"), "{over}");
}

#[tokio::test]
async fn a_shutdown_ends_the_streams_of_clients_that_wait_and_of_clients_that_never_read() {
    let database = database().await;
    let server = start(&database, Duration::ZERO).await;
    let (_, location) = accepted(&server).await;
    let request = format!("GET {location}/events HTTP/1.1\r\nHost: x\r\n\r\n");
    let mut never_read = vec![];
    for _ in 0..50 {
        let mut stream = TcpStream::connect(server.address()).await.expect("it listens");
        stream.write_all(request.as_bytes()).await.expect("it reads");
        never_read.push(stream);
    }
    let mut first = [0; 12];
    never_read[0].read_exact(&mut first).await.expect("an answer");
    assert_eq!(&first, b"HTTP/1.1 200");

    let began = Instant::now();
    server.shut_down().await.expect("nothing is aborted");
    assert!(began.elapsed() < Duration::from_secs(5), "{:?}", began.elapsed());
}

/// The number of events and the size of each: together 64 MiB, many times what a connection
/// buffers.
const EVENTS: i64 = 4096;
const EVENT_BYTES: usize = 16 * 1024;

/// The number of equal consecutive reads after which the counter counts as stable.
const STABLE_READS: u32 = 100;

#[tokio::test]
async fn a_client_that_never_reads_gets_no_more_events_than_its_connection_buffers() {
    static MADE: AtomicI64 = AtomicI64::new(0);
    let pulled = event_flood(|_| Box::pin(async { Ok(Box::new(EventFlood::new(&MADE, false)) as _) }));
    let (server, _client) = never_reads(pulled).await;
    let (mut same, mut before) = (0, 0);
    while same < STABLE_READS {
        tokio::time::sleep(Duration::from_millis(10)).await;
        let made = MADE.load(Relaxed);
        same = if made == before { same + 1 } else { 0 };
        before = made;
    }
    println!("{before} of {EVENTS} events were made");
    assert!(before < EVENTS / 4, "{before} of {EVENTS} events were made");
    server.shut_down().await.expect("nothing is aborted");
}

/// The counter-example: events are pushed into an unbounded queue per subscriber, without
/// backpressure.
#[tokio::test]
async fn an_unbounded_queue_holds_all_events_of_a_client_that_never_reads() {
    static MADE: AtomicI64 = AtomicI64::new(0);
    let pushed = event_flood(|_| Box::pin(async { Ok(Box::new(EventFlood::new(&MADE, true)) as _) }));
    let (server, _client) = never_reads(pushed).await;
    until("all events are in memory", async || MADE.load(Relaxed) == EVENTS).await;
    server.shut_down().await.expect("nothing is aborted");
}

/// A server and a client that subscribes and never reads. Returns once the server's send buffer is
/// full.
async fn never_reads(strategy: &'static Strategy) -> (Server, TcpStream) {
    let database = database().await;
    let server = Server::start(&ASYNCHRONOUS, strategy, &on(&database.url()))
        .await
        .expect("it starts");
    let socket = TcpSocket::new_v4().expect("a socket");
    socket.set_recv_buffer_size(4096).expect("a small one");
    let mut client = socket.connect(server.address()).await.expect("it listens");
    let id = Uuid::new_v8(Uuid::new_v4().into_bytes());
    let request = format!("GET /api/reservations/{id}/events HTTP/1.1\r\nHost: x\r\n\r\n");
    client.write_all(request.as_bytes()).await.expect("it reads");
    if cfg!(target_os = "linux") {
        let port = client.local_addr().expect("an address").port();
        until("the connection is full", async || unsent(port) > 0).await;
    }
    (server, client)
}

/// The length of the send queue to the client at this port, in bytes, from `/proc/net/tcp`.
fn unsent(port: u16) -> u64 {
    let table = std::fs::read_to_string("/proc/net/tcp").expect("/proc/net/tcp");
    let to_client = format!(":{port:04X}");
    let waiting = table.lines().filter_map(|line| {
        let fields: Vec<&str> = line.split_whitespace().collect();
        let sends = fields.get(2)?.ends_with(&to_client);
        let (unsent, _) = fields.get(4)?.split_once(':')?;
        sends.then(|| u64::from_str_radix(unsent, 16).ok())?
    });
    waiting.sum()
}

fn event_flood(open: fn(StrategyContext) -> Opening) -> &'static Strategy {
    Box::leak(Box::new(Strategy {
        name: "event-flood",
        summary: "produces many events",
        open,
        ..ASYNCHRONOUS.strategies[0]
    }))
}

/// Produces many events for every order: on demand, or all at once into a queue.
struct EventFlood {
    made: &'static AtomicI64,
    pushed: Option<Mutex<mpsc::UnboundedReceiver<Event>>>,
}

impl EventFlood {
    fn new(made: &'static AtomicI64, pushed: bool) -> Self {
        let pushed = pushed.then(|| {
            let (queue, events) = mpsc::unbounded_channel();
            tokio::spawn(async move {
                for number in 1..=EVENTS {
                    let _ = queue.send(event(made, number));
                }
            });
            Mutex::new(events)
        });
        Self { made, pushed }
    }
}

fn event(made: &AtomicI64, number: i64) -> Event {
    made.fetch_add(1, Relaxed);
    let mut reservation = api::Reservation::accepted(Uuid::nil());
    reservation.reason = Some("x".repeat(EVENT_BYTES));
    Event { number, reservation }
}

#[async_trait]
impl Reserve for EventFlood {
    async fn reserve(&self, _: &Order, _: &Steps) -> Result<Outcome, ReserveError> {
        unreachable!("nobody orders")
    }

    fn accepted(&self, _: Uuid) -> bool {
        true
    }

    async fn events(&self, _: Uuid, after: i64, timeout: Duration) -> Result<Option<Vec<Event>>, ReserveError> {
        Ok(Some(match &self.pushed {
            Some(queue) => queue.lock().await.recv().await.into_iter().collect(),
            None if after < EVENTS => vec![event(self.made, after + 1)],
            None => {
                tokio::time::sleep(timeout).await;
                vec![]
            }
        }))
    }
}

#[tokio::test]
async fn a_strategy_is_closed_after_the_last_request() {
    let database = database().await;
    let server = start(&database, Duration::from_millis(300)).await;
    let address = server.address();
    let asking = tokio::spawn(async move { reserve(address, 42, "mine").await.status });
    let mut connection = PgConnection::connect(&database.url())
        .await
        .expect("the database is there");
    until("the request", async || written(&mut connection, ASKED).await == 1).await;
    server.shut_down().await.expect("nothing is aborted");

    assert_eq!(asking.await.expect("an answer"), 202);
    let closed = written(&mut connection, CLOSED).await;
    assert_eq!(
        closed, 1,
        "it was closed once, after the answer, while the pool was open"
    );
}

/// The number of rows with this request key.
async fn written(connection: &mut PgConnection, key: &str) -> i64 {
    sqlx::query_scalar("select count(*) from reservation where request_key = $1")
        .bind(key)
        .fetch_one(connection)
        .await
        .expect("a count")
}
