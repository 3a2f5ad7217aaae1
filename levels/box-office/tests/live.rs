//! The live page: its security headers, its events, and the rush that can be started from it. What
//! a browser makes of it is tested in `tests/live`.

mod common;

use std::time::Duration;

use common::{TOKEN, TestEnvironment, ask, environment, environment_with, on, reserve, start, within};
use harness::{
    backends,
    proxy::{Fault, Proxy},
    until,
};
use serde_json::{Value, json};
use sqlx::PgConnection;
use tokio::{
    io::{AsyncBufReadExt, AsyncWriteExt, BufReader},
    net::TcpStream,
};

const JSON: (&str, &str) = ("Content-Type", "application/json");
const ADMIN: (&str, &str) = ("Authorization", "Bearer open-sesame");

/// A client that watches a sale.
struct Watcher {
    stream: BufReader<TcpStream>,
    head: String,
}

impl Watcher {
    async fn of(server: &box_office::Server, path: &str) -> Self {
        Self::reading(request(server, "GET", path, "", "").await).await
    }

    /// Reads the head of the answer.
    async fn reading(stream: TcpStream) -> Self {
        let mut watcher = Self {
            stream: BufReader::new(stream),
            head: String::new(),
        };
        while !watcher.head.ends_with("\r\n\r\n") {
            let read = watcher.stream.read_line(&mut watcher.head);
            assert!(within("a head", read).await.expect("text") > 0, "closed");
        }
        watcher
    }

    /// The next line of the body. `None`: it has ended.
    async fn line(&mut self) -> Option<String> {
        let mut line = String::new();
        let read = self.stream.read_line(&mut line).await.ok()?;
        (read > 0).then(|| line.trim_end().to_owned())
    }

    /// The next event of this name.
    async fn next(&mut self, name: &str) -> Value {
        let event = format!("event: {name}");
        let reading = async {
            while self.line().await.expect("an event") != event {}
            let data = self.line().await.expect("its data");
            let data = data.strip_prefix("data: ").expect("its data");
            serde_json::from_str(data).expect("JSON")
        };
        within(name, reading).await
    }

    /// The next state for which this holds.
    async fn state(&mut self, holds: impl Fn(&Value) -> bool) -> Value {
        loop {
            let state = self.next("state").await;
            if holds(&state) {
                return state;
            }
        }
    }
}

/// Sends a request, and leaves the answer to be read.
async fn request(server: &box_office::Server, method: &str, path: &str, headers: &str, body: &str) -> TcpStream {
    let mut stream = TcpStream::connect(server.address()).await.expect("it listens");
    let length = body.len();
    let request = format!(
        "{method} {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n{headers}Content-Length: {length}\r\n\r\n{body}"
    );
    stream.write_all(request.as_bytes()).await.expect("it reads");
    stream
}

async fn open_sale(server: &box_office::Server, sale: i64, capacity: i64) {
    let body = format!(r#"{{"name": "Night {sale}", "capacity": {capacity}}}"#);
    let path = format!("/api/sales/{sale}");
    let opened = ask(server.address(), "PUT", &path, &[JSON, ADMIN], &body).await;
    assert_eq!(opened.status, 201, "{opened:?}");
}

#[tokio::test]
async fn the_page_allows_only_its_own_script_and_style_and_says_no_secret() {
    let server = environment().await;
    let mut nonces = vec![];
    for path in ["/live", "/live/1", "/live/404"] {
        let page = ask(server.address(), "GET", path, &[], "").await;
        assert_eq!(
            (page.status, page.header("content-type")),
            (200, "text/html; charset=utf-8")
        );
        let policy = page.header("content-security-policy");
        let (_, after) = policy.split_once("script-src 'nonce-").expect("a nonce");
        let (nonce, _) = after.split_once('\'').expect("its end");
        assert!(policy.starts_with("default-src 'none'; "), "{policy}");
        assert!(policy.contains(&format!("style-src 'nonce-{nonce}'")), "{policy}");
        for strict in ["base-uri 'none'", "form-action 'none'", "frame-ancestors 'none'"] {
            assert!(policy.contains(strict), "{policy}");
        }
        assert!(!policy.contains("unsafe"), "{policy}");
        let inline = format!(r#" nonce="{nonce}">"#);
        assert_eq!(page.text().matches(&inline).count(), 2, "one style and one script");
        assert!(!page.text().contains("{{"), "a placeholder is left");
        assert!(!page.text().contains(TOKEN));
        for header in ["cache-control", "referrer-policy", "x-content-type-options"] {
            assert_ne!(page.header(header), "", "{header}");
        }
        nonces.push(nonce.to_owned());
    }
    nonces.dedup();
    assert_eq!(nonces.len(), 3, "a nonce is used once");
}

#[tokio::test]
async fn a_watcher_sees_each_change_of_the_newest_sale() {
    let server = environment().await;
    let mut watcher = Watcher::of(&server.server, "/live/events").await;
    let head = watcher.head.to_lowercase();
    for header in [
        "http/1.1 200",
        "content-type: text/event-stream",
        "x-accel-buffering: no",
    ] {
        assert!(head.contains(header), "{head}");
    }
    let about = watcher.next("server").await;
    assert_eq!(
        about,
        json!({"level": "lv0", "strategy": "scripted", "summary": "answers as its request key says", "instance": "1"})
    );
    let empty = watcher.next("state").await;
    assert_eq!((&empty["sale"], &empty["sales"]), (&Value::Null, &json!([])));

    open_sale(&server.server, 1, 2).await;
    let opened = watcher.state(|state| !state["sale"].is_null()).await;
    assert_eq!(
        opened["sale"],
        json!({"id": 1, "name": "Night 1", "capacity": 2, "stock": 2, "confirmed": 0, "held": 0, "released": 0,
               "refused": 0, "duplicates": 0, "took_ms": null})
    );

    // The test double sells what is not there.
    let mut ids = vec![];
    for buyer in [7, 8, 9] {
        let sold = reserve(server.address(), buyer, &format!("key-{buyer}")).await;
        ids.push(sold.json()["id"].as_str().expect("an id").to_owned());
    }
    let oversold = watcher.state(|state| state["sale"]["confirmed"] == 3).await;
    let mut buyers: Vec<&Value> = oversold["seats"]
        .as_array()
        .expect("seats")
        .iter()
        .map(|seat| &seat[0])
        .collect();
    buyers.sort_by_key(|buyer| buyer.as_i64());
    assert_eq!(buyers, [7, 8, 9]);
    let text = oversold.to_string();
    assert!(
        ids.iter().all(|id| !text.contains(id)),
        "an id of a reservation is a secret: {text}"
    );

    open_sale(&server.server, 2, 5).await;
    let newest = watcher.state(|state| state["sale"]["id"] == 2).await;
    assert_eq!(
        newest["sales"],
        json!([{"id": 2, "name": "Night 2"}, {"id": 1, "name": "Night 1"}])
    );
    let mut other = Watcher::of(&server.server, "/live/1/events").await;
    assert_eq!(other.state(|_| true).await["sale"]["confirmed"], 3);
}

#[tokio::test]
async fn a_sale_that_does_not_exist_is_shown_once_it_is_opened() {
    let server = environment().await;
    let mut watcher = Watcher::of(&server.server, "/live/7/events").await;
    let unknown = watcher.next("state").await;
    assert_eq!((&unknown["sale"], &unknown["unknown"]), (&Value::Null, &json!(7)));
    open_sale(&server.server, 7, 2).await;
    let opened = watcher.state(|state| !state["sale"].is_null()).await;
    assert_eq!((&opened["sale"]["id"], &opened["unknown"]), (&json!(7), &Value::Null));
}

/// The connections of this server to its database.
async fn sessions(connection: &mut PgConnection) -> i64 {
    let count = sqlx::query_scalar(
        "select count(*) from pg_stat_activity where datname = current_database() and application_name like 'lv0/%'",
    );
    count.fetch_one(connection).await.expect("a count")
}

#[tokio::test]
async fn all_watchers_share_one_connection_which_ends_with_the_last_of_them() {
    let server = environment().await;
    let mut database = server.connect().await;
    until("those of the start to be closed: nobody watches", async || {
        sessions(&mut database).await == 0
    })
    .await;

    let mut watchers = vec![];
    for _ in 0..5 {
        let mut watcher = Watcher::of(&server.server, "/live/events").await;
        watcher.next("state").await;
        watchers.push(watcher);
    }
    assert_eq!(sessions(&mut database).await, 1);
    drop(watchers);
    until("the connection to be closed", async || {
        sessions(&mut database).await == 0
    })
    .await;
    // And again.
    Watcher::of(&server.server, "/live/events").await.next("state").await;
}

#[tokio::test]
async fn a_watcher_that_never_reads_keeps_nobody_from_the_latest_state() {
    let server = environment().await;
    let stalled = request(&server.server, "GET", "/live/events", "", "").await;
    let mut watcher = Watcher::of(&server.server, "/live/events").await;
    watcher.next("state").await;
    open_sale(&server.server, 1, 1000).await;
    let mut database = server.connect().await;
    sqlx::query(
        "insert into reservation
         select gen_random_uuid(), 1, buyer, buyer::text, 'confirmed'
           from generate_series(1, 1500) as buyer",
    )
    .execute(&mut database)
    .await
    .expect("rows");
    let last = watcher.state(|state| state["sale"]["confirmed"] == 1500).await;
    assert_eq!(last["seats"].as_array().expect("seats").len(), 1500);
    drop(stalled);
}

#[tokio::test]
async fn the_sixteen_sales_that_are_watched_bound_the_work() {
    let server = environment().await;
    let mut watchers = vec![];
    for sale in 1..=16 {
        let mut watcher = Watcher::of(&server.server, &format!("/live/{sale}/events")).await;
        watcher.next("state").await;
        watchers.push(watcher);
    }
    let refused = ask(server.address(), "GET", "/live/17/events", &[], "").await;
    refused.is_problem(503, "overloaded");
    // The newest is not among them.
    let mut newest = Watcher::of(&server.server, "/live/events").await;
    newest.next("state").await;
    drop(newest);
    // One that is watched already is no more work.
    let mut again = Watcher::of(&server.server, "/live/1/events").await;
    again.next("state").await;
    drop(watchers);
    until("another sale to be watched", async || {
        let stream = request(&server.server, "GET", "/live/17/events", "", "").await;
        Watcher::reading(stream).await.head.contains(" 200 ")
    })
    .await;
}

#[tokio::test]
async fn while_the_database_is_away_a_watcher_is_told_and_the_next_state_follows() {
    let database = common::database().await;
    let postgres = backends::postgres().await.expect("a Postgres");
    let proxy = Proxy::before(postgres.report().address.clone()).await.expect("a port");
    let server = start(&on(&proxy.url_through(&database.url()))).await;
    open_sale(&server, 1, 2).await;
    let mut watcher = Watcher::of(&server, "/live/events").await;
    watcher.state(|state| state["sale"]["confirmed"] == 0).await;

    proxy.inject(Fault::CloseAll);
    let away = watcher.next("away").await;
    assert!(
        away["detail"].as_str().expect("a detail").contains("database"),
        "{away}"
    );
    // One that comes now is told as well.
    Watcher::of(&server, "/live/events").await.next("away").await;

    assert!(proxy.has_struck(), "the fault did not strike");
    proxy.inject(Fault::None);
    watcher.next("state").await;
    reserve(server.address(), 7, "mine").await;
    watcher.state(|state| state["sale"]["confirmed"] == 1).await;
}

#[tokio::test]
async fn a_shutdown_does_not_wait_for_watchers() {
    let TestEnvironment {
        server,
        database: _database,
    } = environment().await;
    let mut watcher = Watcher::of(&server, "/live/events").await;
    watcher.next("state").await;
    within("the shutdown", server.shut_down()).await.expect("drained");
    while watcher.line().await.is_some() {}
}

const RUSH: &str = r#"{"buyers": 40, "clicks": 2, "capacity": 10}"#;

fn headers(token: &str) -> String {
    format!("Authorization: Bearer {token}\r\nContent-Type: application/json\r\n")
}

/// Starts a rush, and reads its progress to the end.
async fn rush(server: &box_office::Server) -> (Watcher, Vec<Value>) {
    let stream = request(server, "POST", "/live/rush", &headers(TOKEN), RUSH).await;
    let mut lines = Watcher::reading(stream).await;
    let mut progress = vec![];
    let reading = async {
        while let Some(line) = lines.line().await {
            // Between the lines are the lengths of the chunks.
            if line.starts_with('{') {
                progress.push(serde_json::from_str(&line).expect("JSON"));
            }
        }
    };
    within("the end of the rush", reading).await;
    (lines, progress)
}

#[tokio::test]
async fn a_rush_sells_a_new_sale_over_the_servers_own_address_and_reports_its_progress() {
    let server = environment().await;
    open_sale(&server.server, 4, 1).await;
    let mut watcher = Watcher::of(&server.server, "/live/events").await;

    let (answer, progress) = rush(&server.server).await;
    assert!(answer.head.contains("HTTP/1.1 200"), "{}", answer.head);
    assert!(answer.head.contains("application/x-ndjson"), "{}", answer.head);
    let last = progress.last().expect("progress");
    assert_eq!(
        (&last["sale"], &last["requests"], &last["ended"]),
        (&json!(5), &json!(80), &json!(true))
    );
    assert_eq!(
        (&last["confirmed"], &last["error"]),
        (&json!(80), &Value::Null),
        "{last}"
    );
    let sold = watcher.state(|state| state["sale"]["confirmed"] == 80).await;
    assert_eq!(
        (&sold["sale"]["id"], &sold["sale"]["capacity"]),
        (&json!(5), &json!(10))
    );
}

#[tokio::test]
async fn there_is_one_rush_at_a_time_and_whoever_stops_reading_stops_it() {
    let server = environment_with(|settings| settings.work = Duration::from_secs(5)).await;
    let first = request(&server.server, "POST", "/live/rush", &headers(TOKEN), RUSH).await;
    let first = Watcher::reading(first).await;
    let second = ask(server.address(), "POST", "/live/rush", &[JSON, ADMIN], RUSH).await;
    second.is_problem(409, "rush-in-progress");

    drop(first);
    until("the next rush to begin", async || {
        let stream = request(&server.server, "POST", "/live/rush", &headers(TOKEN), RUSH).await;
        Watcher::reading(stream).await.head.contains(" 200 ")
    })
    .await;
}

#[tokio::test]
async fn without_an_admin_token_the_page_starts_nothing() {
    let server = environment_with(|settings| settings.admin_token = None).await;
    let page = ask(server.address(), "GET", "/live", &[], "").await;
    assert!(page.text().contains(r#"data-admin="off""#));
    let refused = ask(server.address(), "POST", "/live/rush", &[JSON, ADMIN], RUSH).await;
    refused.is_problem(403, "no-admin-token");
    let mut watcher = Watcher::of(&server.server, "/live/events").await;
    assert_eq!(watcher.next("state").await["sales"], json!([]), "it opened a sale");
}

#[tokio::test]
async fn a_rush_whose_balancer_is_away_says_so() {
    let server = environment_with(|settings| {
        settings.rush_url = Some("http://127.0.0.1:1".parse().expect("an origin"));
    })
    .await;
    let (_, progress) = rush(&server.server).await;
    let last = progress.last().expect("progress");
    let error = last["error"].as_str().expect("an error");
    assert!(error.starts_with("no connection to 127.0.0.1:1: "), "{error}");
}

#[tokio::test]
async fn only_the_pages_of_peers_may_read_and_rush_from_elsewhere() {
    const PEER: &str = "http://127.0.0.1:8082";
    let lonely = environment().await;
    let server = environment_with(|settings| {
        settings.live_peers = vec![format!("{PEER}/").parse().expect("an origin")];
    })
    .await;
    let asks = |origin: &'static str| [("Origin", origin), ("Access-Control-Request-Method", "POST")];
    let allowed = async |server: &TestEnvironment, origin| {
        let answer = ask(server.address(), "OPTIONS", "/live/rush", &asks(origin), "").await;
        answer.header("access-control-allow-origin").to_owned()
    };
    assert_eq!(allowed(&server, PEER).await, PEER);
    assert_eq!(allowed(&server, "http://127.0.0.1:8083").await, "");
    assert_eq!(allowed(&lonely, PEER).await, "");
    // The peers read the page's events, and not the rest of the API.
    let sale = ask(server.address(), "GET", "/api/sales/1", &[("Origin", PEER)], "").await;
    assert_eq!(sale.header("access-control-allow-origin"), "");

    let page = ask(server.address(), "GET", "/live", &[], "").await;
    let policy = page.header("content-security-policy");
    assert!(policy.contains(&format!("connect-src 'self' {PEER};")), "{policy}");
    assert!(page.text().contains(&format!(r#"data-peers="{PEER}""#)));
}
