//! The HTTP API: every status, every problem, every invalid input; and request ids, panics, metrics
//! and traces.

mod common;

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use box_office::{ProblemKind, trace::Record};
use common::{
    EARLIER, LEVEL, TestEnvironment, ask, database, environment, environment_with, on, read_answer, reservations,
    reserve, start, within,
};
use harness::{
    backends::{Durability, Postgres},
    until,
};
use serde_json::{Value, json};
use sqlx::{Connection, PgConnection};
use tokio::{io::AsyncWriteExt, net::TcpStream};

const JSON: (&str, &str) = ("Content-Type", "application/json");
const ADMIN: (&str, &str) = ("Authorization", "Bearer open-sesame");

/// A request and the problem that it must be answered with.
struct Case {
    method: &'static str,
    path: &'static str,
    headers: &'static [(&'static str, &'static str)],
    body: &'static str,
    status: u16,
    problem: &'static str,
    /// A text that the detail must contain.
    says: &'static str,
}

const fn buys(body: &'static str, status: u16, problem: &'static str, says: &'static str) -> Case {
    let (method, path, headers) = ("POST", "/api/sales/1/reservations", &[JSON]);
    Case {
        method,
        path,
        headers,
        body,
        status,
        problem,
        says,
    }
}

const fn buys_with(headers: &'static [(&'static str, &'static str)], status: u16, problem: &'static str) -> Case {
    Case {
        headers,
        ..buys(r#"{"buyer_id": 42}"#, status, problem, "")
    }
}

const fn opens(body: &'static str, status: u16, problem: &'static str, says: &'static str) -> Case {
    let (method, path, headers) = ("PUT", "/api/sales/7", &[JSON, ADMIN]);
    Case {
        method,
        path,
        headers,
        body,
        status,
        problem,
        says,
    }
}

const fn opens_with(headers: &'static [(&'static str, &'static str)], status: u16, problem: &'static str) -> Case {
    Case {
        headers,
        ..opens(r#"{"name": "Night", "capacity": 100}"#, status, problem, "")
    }
}

const fn starts(body: &'static str, status: u16, problem: &'static str, says: &'static str) -> Case {
    let (method, path) = ("POST", "/live/rush");
    Case {
        method,
        path,
        ..opens(body, status, problem, says)
    }
}

const fn starts_with(headers: &'static [(&'static str, &'static str)], status: u16, problem: &'static str) -> Case {
    Case {
        headers,
        ..starts(r#"{"buyers": 10, "clicks": 1, "capacity": 100}"#, status, problem, "")
    }
}

const fn names(body: &'static str, status: u16, problem: &'static str, says: &'static str) -> Case {
    let (method, path) = ("POST", "/api/sales/1/vips");
    Case {
        method,
        path,
        ..opens(body, status, problem, says)
    }
}

const fn at(method: &'static str, path: &'static str, status: u16, problem: &'static str) -> Case {
    Case {
        method,
        path,
        headers: &[],
        body: "",
        status,
        problem,
        says: "",
    }
}

const CASES: &[Case] = &[
    // Answers of a strategy.
    buys_with(&[JSON, ("Idempotency-Key", "sold-out")], 409, "sold-out"),
    buys_with(
        &[JSON, ("Idempotency-Key", "already-reserved")],
        409,
        "already-reserved",
    ),
    buys_with(
        &[JSON, ("Idempotency-Key", "key-of-another-buyer")],
        422,
        "key-of-another-buyer",
    ),
    buys_with(&[JSON, ("Idempotency-Key", "unknown-sale")], 404, "unknown-sale"),
    buys_with(&[JSON, ("Idempotency-Key", "not-vip")], 422, "not-vip"),
    buys_with(&[JSON, ("Idempotency-Key", "overloaded")], 503, "overloaded"),
    buys_with(&[JSON, ("Idempotency-Key", "backlogged")], 503, "backlogged"),
    buys_with(&[JSON, ("Idempotency-Key", "rate-limited")], 429, "rate-limited"),
    buys_with(&[JSON, ("Idempotency-Key", "timed-out")], 503, "timed-out"),
    buys_with(&[JSON, ("Idempotency-Key", "backend-away")], 503, "backend-away"),
    buys_with(&[JSON, ("Idempotency-Key", "panic")], 500, "crashed"),
    // Request keys.
    buys_with(&[JSON, ("Idempotency-Key", "")], 400, "malformed-request-key"),
    buys_with(&[JSON, ("Idempotency-Key", "two words")], 400, "malformed-request-key"),
    buys_with(&[JSON, ("Idempotency-Key", "naïve")], 400, "malformed-request-key"),
    buys_with(
        &[JSON, ("Idempotency-Key", "a"), ("Idempotency-Key", "b")],
        400,
        "malformed-request-key",
    ),
    // Bodies that are not JSON, or not declared as JSON.
    buys("", 400, "malformed-body", "EOF"),
    buys("{", 400, "malformed-body", "line 1 column 1"),
    buys(r#"{"buyer_id": 42} and more"#, 400, "malformed-body", "trailing"),
    buys(r#"{"buyer_id": 42,}"#, 400, "malformed-body", "line 1"),
    buys(r#"{"buyer_id": "x" "#, 400, "malformed-body", "EOF"),
    buys_with(&[], 415, "not-json"),
    buys_with(&[("Content-Type", "text/plain")], 415, "not-json"),
    buys_with(&[("Content-Type", "application/jsonp")], 415, "not-json"),
    // JSON bodies that do not match the schema: the detail names the field.
    buys("{}", 422, "invalid-body", "`buyer_id`"),
    buys("42", 422, "invalid-body", "not a JSON object"),
    buys("[42]", 422, "invalid-body", "not a JSON object"),
    buys(r#"{"buyer_id": -1}"#, 422, "invalid-body", "`buyer_id`: -1 is negative"),
    buys(r#"{"buyer_id": "42"}"#, 422, "invalid-body", "`buyer_id`"),
    buys(r#"{"buyer_id": null}"#, 422, "invalid-body", "`buyer_id`"),
    buys(r#"{"buyer_id": 4.2}"#, 422, "invalid-body", "`buyer_id`"),
    buys(
        r#"{"buyer_id": 9223372036854775808}"#,
        422,
        "invalid-body",
        "`buyer_id`",
    ),
    buys(r#"{"buyer_id": 42, "vip": true}"#, 422, "invalid-body", "`vip`"),
    buys(
        r#"{"buyer_id": 42, "buyer_id": 43}"#,
        422,
        "invalid-body",
        "duplicate field `buyer_id`",
    ),
    // Priority, on a server that has none: it is refused and not ignored.
    buys(
        r#"{"buyer_id": 42, "priority": "vip"}"#,
        422,
        "no-priority",
        "ORDER_PRIORITY",
    ),
    buys(
        r#"{"buyer_id": 42, "priority": "VIP"}"#,
        422,
        "invalid-body",
        "`priority`",
    ),
    buys(
        r#"{"buyer_id": 42, "priority": null}"#,
        422,
        "invalid-body",
        "`priority`",
    ),
    names("{", 400, "malformed-body", ""),
    names(r#"{"buyer_ids": [-1]}"#, 422, "invalid-body", "-1 is negative"),
    names(r#"{"buyer_ids": 42}"#, 422, "invalid-body", "`buyer_ids`"),
    Case {
        headers: &[JSON],
        ..names(r#"{"buyer_ids": [42]}"#, 401, "unauthorized", "")
    },
    Case {
        headers: &[ADMIN],
        ..names(r#"{"buyer_ids": [42]}"#, 415, "not-json", "")
    },
    Case {
        path: "/api/sales/x/vips",
        ..names(r#"{"buyer_ids": [42]}"#, 400, "malformed-path", "")
    },
    Case {
        path: "/api/sales/404/vips",
        ..names(r#"{"buyer_ids": [42]}"#, 404, "unknown-sale", "")
    },
    // Paths.
    Case {
        path: "/api/sales/-1/reservations",
        ..buys(r#"{"buyer_id": 42}"#, 400, "malformed-path", "whole number")
    },
    Case {
        path: "/api/sales/+1/reservations",
        ..buys(r#"{"buyer_id": 42}"#, 400, "malformed-path", "")
    },
    Case {
        path: "/api/sales/one/reservations",
        ..buys(r#"{"buyer_id": 42}"#, 400, "malformed-path", "")
    },
    Case {
        path: "/api/sales/%ff/reservations",
        ..buys(r#"{"buyer_id": 42}"#, 400, "malformed-path", "")
    },
    at("GET", "/api/sales/9223372036854775808", 400, "malformed-path"),
    at("GET", "/api/sales/404", 404, "unknown-sale"),
    at(
        "GET",
        "/api/reservations/00000000-0000-0000-0000-000000000000",
        404,
        "unknown-reservation",
    ),
    at("GET", "/api/reservations/not-an-id", 404, "unknown-reservation"),
    at("GET", "/api/reservations/%ff", 404, "unknown-reservation"),
    at("DELETE", "/api/reservations/not-an-id", 404, "unknown-reservation"),
    at(
        "GET",
        "/api/reservations/00000000-0000-0000-0000-000000000000/events",
        404,
        "unknown-reservation",
    ),
    Case {
        headers: &[("Last-Event-ID", "-1")],
        ..at(
            "GET",
            "/api/reservations/00000000-0000-0000-0000-000000000000/events",
            400,
            "malformed-event-id",
        )
    },
    at("GET", "/problems/no-such-problem", 404, "not-found"),
    at("GET", "/problems/%ff", 404, "not-found"),
    // The live page, and the rush from it.
    at("GET", "/live/-1", 400, "malformed-path"),
    at("GET", "/live/one/events", 400, "malformed-path"),
    starts_with(&[JSON], 401, "unauthorized"),
    starts_with(&[JSON, ("Authorization", "Bearer open-sesam")], 401, "unauthorized"),
    starts_with(&[ADMIN], 415, "not-json"),
    starts("{", 400, "malformed-body", ""),
    starts(r#"{"buyers": 10, "clicks": 1}"#, 422, "invalid-body", "`capacity`"),
    starts(
        r#"{"buyers": 2001, "clicks": 1, "capacity": 100}"#,
        422,
        "invalid-body",
        "`buyers`: 2001",
    ),
    starts(
        r#"{"buyers": 0, "clicks": 1, "capacity": 100}"#,
        422,
        "invalid-body",
        "`buyers`: 0",
    ),
    starts(
        r#"{"buyers": 10, "clicks": 3, "capacity": 100}"#,
        422,
        "invalid-body",
        "`clicks`: 3",
    ),
    starts(
        r#"{"buyers": 10, "clicks": 1, "capacity": 1001}"#,
        422,
        "invalid-body",
        "`capacity`: 1001",
    ),
    // Opening a sale.
    opens_with(&[JSON], 401, "unauthorized"),
    opens_with(&[JSON, ("Authorization", "Bearer open-sesam")], 401, "unauthorized"),
    opens_with(&[JSON, ("Authorization", "Bearer open-sesame!")], 401, "unauthorized"),
    opens_with(&[JSON, ("Authorization", "Basic open-sesame")], 401, "unauthorized"),
    opens_with(&[JSON, ("Authorization", "x")], 401, "unauthorized"),
    opens_with(&[ADMIN], 415, "not-json"),
    Case {
        path: "/api/sales/x",
        ..opens(r#"{"name": "Night", "capacity": 100}"#, 400, "malformed-path", "")
    },
    opens("{", 400, "malformed-body", ""),
    opens(r#"{"name": "Night"}"#, 422, "invalid-body", "`capacity`"),
    opens(
        r#"{"name": "Night", "capacity": 0}"#,
        422,
        "invalid-body",
        "`capacity`: 0",
    ),
    opens(
        r#"{"name": "Night", "capacity": 1000001}"#,
        422,
        "invalid-body",
        "`capacity`: 1000001",
    ),
    opens(r#"{"name": "", "capacity": 100}"#, 422, "invalid-body", "`name`"),
    opens(
        r#"{"name": "a\u0000b", "capacity": 100}"#,
        422,
        "invalid-body",
        "`name`",
    ),
    opens(
        r#"{"name": "Night", "capacity": 100, "stock": 5}"#,
        422,
        "invalid-body",
        "`stock`",
    ),
];

/// Problems that need more than one plain request. Each has a test of its own, here, in `limits.rs`
/// and `live.rs`, or in the suite of LV.4.
const ELSEWHERE: [&str; 7] = [
    "body-too-large",
    "body-too-slow",
    "sale-differs",
    "rush-in-progress",
    "no-admin-token",
    "not-held",
    "no-priority",
];

#[tokio::test]
async fn every_bad_request_is_answered_with_its_problem() {
    let server = environment().await;
    for case in CASES {
        let answer = ask(server.address(), case.method, case.path, case.headers, case.body).await;
        println!("{} {} {:?} {}", case.method, case.path, case.headers, case.body);
        answer.is_problem(case.status, case.problem);
        let detail = answer.json()["detail"].as_str().expect("a detail").to_owned();
        assert!(detail.contains(case.says), "{detail:?} does not say {:?}", case.says);
        assert!(!answer.text().contains("the backend's own words"), "{}", answer.text());

        let retry_after = if [429, 503].contains(&case.status) { "1" } else { "" };
        assert_eq!(answer.header("retry-after"), retry_after);
        let challenge = if case.status == 401 { "Bearer" } else { "" };
        assert_eq!(answer.header("www-authenticate"), challenge);
    }
    let sold = reserve(server.address(), 42, "fine").await;
    assert_eq!(sold.status, 201, "it sells after all that");
}

/// The route pattern of a path in `CASES`.
fn documented_as(path: &str) -> &str {
    match path.split('/').collect::<Vec<_>>()[..] {
        ["", "api", "sales", _, "reservations"] => "/api/sales/{id}/reservations",
        ["", "api", "sales", _, "vips"] => "/api/sales/{id}/vips",
        ["", "api", "sales", _] => "/api/sales/{id}",
        ["", "api", "reservations", _] => "/api/reservations/{id}",
        ["", "api", "reservations", _, "events"] => "/api/reservations/{id}/events",
        ["", "live", id] if !["events", "rush"].contains(&id) => "/live/{id}",
        ["", "live", _, "events"] => "/live/{id}/events",
        ["", "problems", _] => "/problems/{name}",
        _ => path,
    }
}

#[tokio::test]
async fn the_document_lists_exactly_the_problems_that_occur() {
    let server = environment().await;
    let document = ask(server.address(), "GET", "/openapi.json", &[], "").await.json();
    assert_eq!(document["openapi"], "3.1.0");

    let mut documented: BTreeSet<(String, String, u16, String)> = BTreeSet::new();
    for (path, method, operation) in operations(&document) {
        let responses = operation["responses"].as_object().expect("responses");
        for (status, response) in responses {
            let kinds = &response["content"]["application/problem+json"]["schema"]["allOf"][1]["properties"]["type"];
            for kind in kinds["enum"].as_array().into_iter().flatten() {
                let kind = kind.as_str().expect("a type").to_owned();
                documented.insert((method.clone(), path.clone(), status.parse().expect("a status"), kind));
            }
        }
    }
    let answered: BTreeSet<_> = CASES
        .iter()
        .map(|case| {
            let path = documented_as(case.path).to_owned();
            (
                case.method.to_owned(),
                path,
                case.status,
                format!("/problems/{}", case.problem),
            )
        })
        .collect();

    let undocumented: Vec<_> = answered.difference(&documented).collect();
    assert!(undocumented.is_empty(), "not in the document: {undocumented:?}");
    let untested: Vec<_> = documented
        .difference(&answered)
        // The problems of an unavailable or slow database are tested for one operation only.
        .filter(|(_, path, status, _)| *status != 503 || path.ends_with("reservations"))
        .filter(|(.., kind)| !ELSEWHERE.iter().any(|elsewhere| kind.ends_with(elsewhere)))
        .collect();
    assert!(untested.is_empty(), "in the document only: {untested:?}");
}

fn operations(document: &Value) -> Vec<(String, String, &Value)> {
    let paths = document["paths"].as_object().expect("paths");
    let mut all = Vec::new();
    for (path, item) in paths {
        for (method, operation) in item.as_object().expect("operations") {
            all.push((path.clone(), method.to_uppercase(), operation));
        }
    }
    all
}

#[tokio::test]
async fn every_documented_operation_is_served_and_no_other_method() {
    let server = environment().await;
    let document = ask(server.address(), "GET", "/openapi.json", &[], "").await.json();
    let mut documented: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
    for (path, method, _) in operations(&document) {
        documented.entry(path).or_default().insert(method);
    }

    for (path, mut methods) in documented {
        let path = path.replace("{id}", "1").replace("{name}", "sold-out");
        let refused = ask(server.address(), "PATCH", &path, &[], "").await;
        refused.is_problem(405, "method-not-allowed");
        // GET implies HEAD.
        if methods.contains("GET") {
            methods.insert("HEAD".to_owned());
        }
        let allowed: BTreeSet<String> = refused.header("allow").split(',').map(str::to_owned).collect();
        assert_eq!(allowed, methods, "{path}");
    }
    ask(server.address(), "GET", "/", &[], "")
        .await
        .is_problem(404, "not-found");
    ask(server.address(), "GET", "/api/sales/1/", &[], "")
        .await
        .is_problem(404, "not-found");
}

#[tokio::test]
async fn every_problem_type_is_documented_at_its_uri() {
    let server = environment().await;
    let mut uris = BTreeSet::new();
    for kind in ProblemKind::ALL {
        let explained = ask(server.address(), "GET", &kind.uri(), &[], "").await;
        assert_eq!(explained.status, 200);
        assert!(explained.text().contains(kind.meaning()), "{}", explained.text());
        assert_eq!(ProblemKind::from_uri(&kind.uri()), Some(kind));
        assert!(uris.insert(kind.uri()), "{kind:?} shares its type with another");
    }
}

#[tokio::test]
async fn a_reservation_is_confirmed_and_can_be_read() {
    let server = environment().await;

    let confirmed = reserve(server.address(), 42, "mine").await;
    assert_eq!(confirmed.status, 201);
    let body = confirmed.json();
    let id = body["id"].as_str().expect("an id");
    assert_eq!(confirmed.header("location"), format!("/api/reservations/{id}"));
    assert_eq!(
        body,
        json!({"id": id, "sale_id": 1, "buyer_id": 42, "status": "confirmed"})
    );

    let seen = ask(server.address(), "GET", confirmed.header("location"), &[], "").await;
    assert_eq!((seen.status, seen.json()), (200, body));
    // Nothing is held here: what is confirmed cannot be cancelled.
    let cancelled = ask(server.address(), "DELETE", confirmed.header("location"), &[], "").await;
    cancelled.is_problem(409, "not-held");
}

#[tokio::test]
async fn already_reserved_names_the_existing_reservation() {
    let server = environment().await;
    let refused = reserve(server.address(), 42, "already-reserved").await;
    refused.is_problem(409, "already-reserved");
    assert_eq!(refused.json()["reservation_id"], EARLIER.to_string());
    let other = reserve(server.address(), 42, "sold-out").await;
    assert_eq!(other.json().get("reservation_id"), None);
}

#[tokio::test]
async fn a_sale_is_opened_once_and_keeps_what_it_was_opened_with() {
    let server = environment().await;
    let put = async |body: &str| ask(server.address(), "PUT", "/api/sales/7", &[JSON, ADMIN], body).await;
    let night = json!({"id": 7, "name": "Night", "capacity": 3, "stock": 3, "reserved": 0});

    let opened = put(r#"{"name": "Night", "capacity": 3}"#).await;
    assert_eq!((opened.status, opened.json()), (201, night.clone()));
    let again = put(r#"{"name": "Night", "capacity": 3}"#).await;
    assert_eq!((again.status, again.json()), (200, night.clone()));
    put(r#"{"name": "Night", "capacity": 4}"#)
        .await
        .is_problem(409, "sale-differs");
    put(r#"{"name": "Day", "capacity": 3}"#)
        .await
        .is_problem(409, "sale-differs");

    let seen = ask(server.address(), "GET", "/api/sales/7", &[], "").await;
    assert_eq!((seen.status, seen.json()), (200, night));
}

#[tokio::test]
async fn a_sale_counts_the_reservations_that_hold_a_ticket() {
    let server = environment().await;
    let body = r#"{"name": "Night", "capacity": 3}"#;
    ask(server.address(), "PUT", "/api/sales/1", &[JSON, ADMIN], body).await;
    let mut rows = server.connect().await;
    for (buyer, status) in [(1, "confirmed"), (2, "held"), (3, "released")] {
        sqlx::query("insert into reservation values (gen_random_uuid(), 1, $1, $1::text, $2)")
            .bind(buyer)
            .bind(status)
            .execute(&mut rows)
            .await
            .expect("a row");
    }
    let seen = ask(server.address(), "GET", "/api/sales/1", &[], "").await;
    assert_eq!(seen.json()["reserved"], 2);
}

#[tokio::test]
async fn without_an_admin_token_no_sale_can_be_opened() {
    let server = environment_with(|settings| settings.admin_token = None).await;
    let body = r#"{"name": "Night", "capacity": 3}"#;
    let refused = ask(server.address(), "PUT", "/api/sales/7", &[JSON, ADMIN], body).await;
    refused.is_problem(403, "no-admin-token");
    ask(server.address(), "GET", "/api/sales/7", &[], "")
        .await
        .is_problem(404, "unknown-sale");
}

#[tokio::test]
async fn a_valid_request_id_is_kept_and_any_other_replaced() {
    let server = environment().await;
    let sent = async |id: &str| {
        let answer = ask(server.address(), "GET", "/nowhere", &[("X-Request-Id", id)], "").await;
        answer.is_problem(404, "not-found");
        answer.header("x-request-id").to_owned()
    };
    let longest = "x".repeat(128);
    assert_eq!(sent("order-66").await, "order-66");
    assert_eq!(sent(&longest).await, longest);

    let mut fresh = BTreeSet::new();
    for bad in ["", "two words", "tab\there", "é", &"x".repeat(129)] {
        let given = sent(bad).await;
        assert_ne!(given, bad);
        assert!(fresh.insert(given), "two requests share an id");
    }
    assert!(
        !ask(server.address(), "GET", "/livez", &[], "")
            .await
            .header("x-request-id")
            .is_empty()
    );
}

#[tokio::test]
async fn a_panic_fails_its_own_request_only() {
    let server = environment().await;
    let mut stream = TcpStream::connect(server.address()).await.expect("it listens");
    let post = |key: &str| {
        let body = r#"{"buyer_id": 1}"#;
        format!(
            "POST /api/sales/1/reservations HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n\
             Idempotency-Key: {key}\r\nContent-Length: {}\r\n\r\n{body}",
            body.len()
        )
    };
    stream.write_all(post("panic").as_bytes()).await.expect("it reads");
    read_answer(&mut stream)
        .await
        .expect("an answer")
        .is_problem(500, "crashed");
    // The connection stays usable.
    stream.write_all(post("fine").as_bytes()).await.expect("it reads");
    assert_eq!(read_answer(&mut stream).await.expect("an answer").status, 201);
    assert_eq!(
        metric(&server, r#"oversold_reservations_total{answer="crashed"}"#).await,
        1.0
    );
}

#[tokio::test]
async fn a_reservation_completes_although_its_client_disconnects() {
    let server = environment().await;
    let holder = server.block_buyer_42().await;

    let mut stream = TcpStream::connect(server.address()).await.expect("it listens");
    let body = r#"{"buyer_id": 42}"#;
    let request = format!(
        "POST /api/sales/1/reservations HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n\
         Idempotency-Key: wait\r\nContent-Length: {}\r\n\r\n{body}",
        body.len()
    );
    stream.write_all(request.as_bytes()).await.expect("it reads");
    until("the reservation to begin", async || {
        metric(&server, "oversold_reservations_in_flight").await == 1.0
    })
    .await;
    drop(stream);
    until("the server to notice the disconnect", async || {
        metric(&server, "oversold_connections_open").await == 1.0
    })
    .await;
    assert_eq!(metric(&server, "oversold_reservations_in_flight").await, 1.0);

    holder.release().await;
    until("the reservation's row", async || {
        reservations(&server.database).await == 1
    })
    .await;
    assert_eq!(
        metric(&server, r#"oversold_reservations_total{answer="confirmed"}"#).await,
        1.0
    );
}

async fn metric(server: &TestEnvironment, line: &str) -> f64 {
    let metrics = ask(server.address(), "GET", "/metrics", &[], "").await;
    let value = metrics
        .text()
        .lines()
        .find_map(|found| found.strip_prefix(line)?.strip_prefix(' ')?.parse().ok());
    value.unwrap_or(f64::NAN)
}

#[tokio::test]
async fn metrics_count_events_and_no_label_holds_client_input() {
    let server = environment_with(|settings| settings.instance = "box-3".to_owned()).await;
    reserve(server.address(), 1, "fine").await;
    reserve(server.address(), 2, "sold-out").await;
    reserve(server.address(), 3, "sold-out").await;
    reserve(server.address(), 4, "overloaded").await;
    for odd in ["/api/sales/77", "/some/where", "/else/where"] {
        ask(server.address(), "BREW", odd, &[], "").await;
    }

    let answer = ask(server.address(), "GET", "/metrics", &[], "").await;
    assert_eq!(
        answer.header("content-type"),
        "application/openmetrics-text; version=1.0.0; charset=utf-8"
    );
    let text = answer.text();
    for line in [
        r#"oversold_server_info{strategy="lv0/scripted",instance_name="box-3"} 1"#,
        r#"oversold_reservations_total{answer="confirmed"} 1"#,
        r#"oversold_reservations_total{answer="sold-out"} 2"#,
        r#"oversold_reservations_total{answer="overloaded"} 1"#,
        r#"oversold_step_seconds_count{step="asked"} 4"#,
        r#"oversold_step_seconds_count{step="committed"} 1"#,
        r#"oversold_step_seconds_count{step="answered"} 3"#,
        r#"oversold_step_seconds_count{step="outcome unknown"} 1"#,
        r#"oversold_http_request_duration_seconds_count{method="POST",route="/api/sales/{id}/reservations",status="409"} 2"#,
        r#"oversold_http_request_duration_seconds_count{method="other",route="/api/sales/{id}",status="405"} 1"#,
        r#"oversold_http_request_duration_seconds_count{method="other",route="unknown",status="404"} 2"#,
        "# EOF",
    ] {
        assert!(text.lines().any(|found| found == line), "no line {line:?} in\n{text}");
    }
    // The connections return to the pool, or close, shortly after the response.
    for (gauge, value) in [
        ("oversold_pool_connections_in_use", 0.0),
        ("oversold_pool_connections_idle", 1.0),
        ("oversold_pool_waiting", 0.0),
        ("oversold_reservations_in_flight", 0.0),
        ("oversold_connections_open", 1.0),
    ] {
        until(gauge, async || metric(&server, gauge).await == value).await;
    }
    assert!(
        !text.contains("BREW") && !text.contains("/where") && !text.contains("/77"),
        "{text}"
    );
}

/// Prometheus sees no increase from nothing to a first value, and the first rush may be over between
/// two scrapes.
#[tokio::test]
async fn the_metrics_of_a_rush_are_zero_before_its_first_buyer() {
    let server = environment().await;
    for answer in [
        "confirmed",
        "sold-out",
        "already-reserved",
        "overloaded",
        "timed-out",
        "backend-away",
    ] {
        let line = format!(r#"oversold_reservations_total{{answer="{answer}"}}"#);
        assert_eq!(metric(&server, &line).await, 0.0, "{line}");
    }
    for status in [201, 409, 503] {
        let labels = format!(r#"method="POST",route="/api/sales/{{id}}/reservations",status="{status}""#);
        let line = format!("oversold_http_request_duration_seconds_count{{{labels}}}");
        assert_eq!(metric(&server, &line).await, 0.0, "{line}");
    }
    for step in ["asked", "committed", "answered", "outcome unknown"] {
        let line = format!(r#"oversold_step_seconds_count{{step="{step}"}}"#);
        assert_eq!(metric(&server, &line).await, 0.0, "{line}");
    }
}

/// A step is measured when it is reached, and a buyer who waits in vain reaches none.
#[tokio::test]
async fn metrics_show_the_time_of_a_reservation_that_ends_between_two_steps() {
    const WORK: Duration = Duration::from_millis(100);

    let server = environment_with(|settings| settings.work = WORK).await;
    for (buyer, key) in (1..).zip(["overloaded", "timed-out", "panic", "sold-out", "fine"]) {
        reserve(server.address(), buyer, key).await;
    }
    let step = async |metric_of: &str, step: &str| {
        let line = format!(r#"oversold_step_seconds_{metric_of}{{step="{step}"}}"#);
        metric(&server, &line).await
    };
    assert_eq!(step("count", "outcome unknown").await, 3.0);
    assert!(step("sum", "outcome unknown").await >= 3.0 * WORK.as_secs_f64());
    assert_eq!(step("count", "answered").await, 2.0);
    assert!(step("sum", "answered").await >= WORK.as_secs_f64());
}

/// Also while every connection of the pool is taken: an operator looks when buyers wait.
#[tokio::test]
async fn metrics_show_the_latest_sales_as_the_database_has_them() {
    let server = environment_with(|settings| settings.database_pool_size = 1).await;
    let mut connection = server.connect().await;
    let sales = sqlx::raw_sql(
        "delete from sale;
         insert into sale select n, 'sale', 100, 100 - n from generate_series(1, 12) as n;",
    );
    sales.execute(&mut connection).await.expect("twelve sales");
    reserve(server.address(), 1, "one").await;
    reserve(server.address(), 2, "two").await;
    let holder = server.block_buyer_42().await;
    let address = server.address();
    let waiting = tokio::spawn(async move { reserve(address, 42, "wait").await });
    until("the pool to be exhausted", async || {
        metric(&server, "oversold_pool_connections_in_use").await == 1.0
    })
    .await;

    assert_eq!(metric(&server, r#"oversold_sale_stock{sale="12"}"#).await, 88.0);
    assert_eq!(metric(&server, r#"oversold_sale_capacity{sale="3"}"#).await, 100.0);
    assert!(
        metric(&server, r#"oversold_sale_stock{sale="2"}"#).await.is_nan(),
        "only the latest ten"
    );
    let reserved = r#"oversold_sale_reservations{sale="1",status="confirmed"}"#;
    assert!(metric(&server, reserved).await.is_nan());

    sqlx::raw_sql("delete from sale where id > 1")
        .execute(&mut connection)
        .await
        .expect("they are gone");
    assert_eq!(metric(&server, reserved).await, 2.0);
    assert!(
        metric(&server, r#"oversold_sale_stock{sale="12"}"#).await.is_nan(),
        "no sale that is gone"
    );
    holder.release().await;
    assert_eq!(within("the buyer", waiting).await.expect("no panic").status, 201);
}

#[tokio::test]
async fn metrics_show_reservations_that_wait_for_the_pool() {
    let server = environment_with(|settings| settings.database_pool_size = 1).await;
    let holder = server.block_buyer_42().await;

    let address = server.address();
    let buyers: Vec<_> = (0..3)
        .map(|n| tokio::spawn(async move { reserve(address, 42, &format!("wait-{n}")).await }))
        .collect();
    until("one to have the connection and two to wait for it", async || {
        metric(&server, "oversold_pool_connections_in_use").await == 1.0
            && metric(&server, "oversold_pool_waiting").await == 2.0
    })
    .await;
    holder.release().await;
    for buyer in buyers {
        assert_eq!(within("a buyer", buyer).await.expect("no panic").status, 201);
    }
}

#[tokio::test]
async fn an_exhausted_pool_is_indeterminate_and_never_a_refusal() {
    let server = environment_with(|settings| settings.database_pool_size = 1).await;
    let holder = server.block_buyer_42().await;

    // The first runs into `lock_timeout`, the second into the acquire timeout of the pool.
    let (first, second) = tokio::join!(
        reserve(server.address(), 42, "wait-1"),
        reserve(server.address(), 42, "wait-2")
    );
    first.is_problem(503, "overloaded");
    second.is_problem(503, "overloaded");
    holder.release().await;
    assert_eq!(reserve(server.address(), 42, "wait-1").await.status, 201);
}

#[tokio::test]
async fn answers_are_indeterminate_while_the_database_is_down() {
    let postgres = Postgres::private(Durability::Fast)
        .await
        .unwrap_or_else(|missing| panic!("{missing}"));
    let database = postgres.database(LEVEL.strategies[0].schema).await.expect("a database");
    let server = start(&on(&database.url())).await;
    let ready = async || ask(server.address(), "GET", "/readyz", &[], "").await;
    assert_eq!(ready().await.status, 200);
    let before = reserve(server.address(), 1, "before").await;
    let reservation = before.header("location");

    postgres.kill().await.expect("it is killed");
    let address = server.address();
    let (probed, looked_up, sale, opened, reserved) = tokio::join!(
        ready(),
        ask(address, "GET", reservation, &[], ""),
        ask(address, "GET", "/api/sales/1", &[], ""),
        ask(
            address,
            "PUT",
            "/api/sales/1",
            &[JSON, ADMIN],
            r#"{"name": "Night", "capacity": 3}"#
        ),
        reserve(address, 2, "during"),
    );
    for answer in [probed, looked_up, sale, opened, reserved] {
        assert_eq!((answer.status, answer.header("retry-after")), (503, "1"), "{answer:?}");
    }
    assert_eq!(ask(address, "GET", "/livez", &[], "").await.status, 200);

    postgres.start().await.expect("it starts again");
    until("the server to be ready again", async || ready().await.status == 200).await;
    assert_eq!(ask(address, "GET", reservation, &[], "").await.status, 200);
    assert_eq!(reserve(address, 2, "during").await.status, 201);
}

#[tokio::test]
async fn two_servers_in_one_process_share_nothing() {
    let (one, two) = (environment().await, environment().await);
    assert_ne!(one.address(), two.address());
    reserve(one.address(), 1, "fine").await;
    assert_eq!(
        metric(&one, r#"oversold_reservations_total{answer="confirmed"}"#).await,
        1.0
    );
    assert_eq!(
        metric(&two, r#"oversold_reservations_total{answer="confirmed"}"#).await,
        0.0
    );
    one.server.shut_down().await.expect("nothing is in flight");
    assert_eq!(reserve(two.address(), 1, "fine").await.status, 201);
}

#[tokio::test]
async fn several_instances_migrate_concurrently() {
    let database = database().await;
    let mut connection = PgConnection::connect(&database.url())
        .await
        .expect("the database is there");
    let empty = sqlx::raw_sql("drop schema public cascade; create schema public");
    empty.execute(&mut connection).await.expect("an empty database");

    let settings = on(&database.url());
    let servers = futures_util::future::join_all((0..8).map(|_| start(&settings))).await;
    for (buyer, server) in (0..).zip(&servers) {
        assert_eq!(reserve(server.address(), buyer, "fine").await.status, 201);
    }
}

#[tokio::test]
async fn a_trace_holds_every_step_with_request_time_and_place() {
    let folder = tempfile::tempdir().expect("a folder");
    let file = folder.path().join("trace.jsonl");
    let server = environment_with(|settings| {
        settings.trace_file = Some(file.clone());
        settings.work = Duration::from_millis(20);
    })
    .await;
    let before_us = box_office::trace::now_monotonic_us();
    let headers = [JSON, ("Idempotency-Key", "wait"), ("X-Request-Id", "r-7")];
    ask(
        server.address(),
        "POST",
        "/api/sales/1/reservations",
        &headers,
        r#"{"buyer_id": 1}"#,
    )
    .await;
    let after_us = box_office::trace::now_monotonic_us();
    server.server.shut_down().await.expect("nothing is in flight");

    let written = std::fs::read_to_string(&file).expect("the trace");
    let trace: Vec<Record> = written
        .lines()
        .map(|line| serde_json::from_str(line).expect("a record"))
        .collect();
    let steps: Vec<_> = trace
        .iter()
        .map(|record| (record.step.as_str(), record.saw.as_deref()))
        .collect();
    assert_eq!(
        steps,
        [
            ("asked", Some("wait")),
            ("waiting for the test", None),
            ("committed", None)
        ]
    );
    let mut last_us = before_us;
    for record in &trace {
        assert_eq!(record.request, "r-7");
        assert!((last_us..=after_us).contains(&record.at_us), "{record:?}");
        let (file, line) = record.place.rsplit_once(':').expect("file:line");
        assert!(
            file.ends_with("tests/common/mod.rs") && line.parse::<u32>().is_ok(),
            "{record:?}"
        );
        last_us = record.at_us;
    }
    let spent_us = trace[1].at_us - trace[0].at_us;
    assert!(spent_us >= 20_000, "WORK_MS is 20, but {spent_us} µs were spent");
}
