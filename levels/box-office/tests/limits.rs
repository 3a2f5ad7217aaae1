//! Limits and timeouts: oversized, slow, malformed or numerous clients get a 4xx or are
//! disconnected, and affect no other client. And the graceful shutdown.

mod common;

use std::{
    net::SocketAddr,
    time::{Duration, Instant},
};

use box_office::Limits;
use common::{
    LockHolder, TestEnvironment, ask, environment, environment_with, listener_closed, read_answer, reservations,
    reserve, send, within,
};
use harness::until;
use rstest::rstest;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};

/// A timeout short enough for a test to wait for it.
const SHORT: Duration = Duration::from_millis(300);

const HEAD: &str = "POST /api/sales/1/reservations HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n";

async fn with_limits(limits: Limits) -> TestEnvironment {
    environment_with(|settings| settings.limits = limits).await
}

/// Waits until the server closes the connection, and discards what it still sends.
async fn closed(mut stream: TcpStream) {
    let mut rest = Vec::new();
    // A reset also counts as closed.
    let _ = within("the server to close the connection", stream.read_to_end(&mut rest)).await;
}

const LIVEZ: &[u8] = b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n";

/// A kept-alive connection after its first response.
async fn kept_alive(to: SocketAddr) -> TcpStream {
    let mut stream = TcpStream::connect(to).await.expect("it listens");
    stream.write_all(LIVEZ).await.expect("it reads");
    let answer = read_answer(&mut stream).await.expect("an answer");
    assert_eq!((answer.status, answer.header("connection")), (200, ""));
    stream
}

async fn it_sells(to: SocketAddr) {
    assert_eq!(reserve(to, 1, "fine").await.status, 201);
}

#[tokio::test]
async fn a_declared_length_over_the_limit_is_refused_unread() {
    let server = environment().await;
    let request = format!(
        "{HEAD}Content-Length: {}\r\nExpect: 100-continue\r\n\r\n",
        16 * 1024 + 1
    );
    send(server.address(), request.as_bytes())
        .await
        .is_problem(413, "body-too-large");
    let request = format!("{HEAD}Content-Length: {}\r\n\r\n", u64::MAX / 2);
    send(server.address(), request.as_bytes())
        .await
        .is_problem(413, "body-too-large");
    it_sells(server.address()).await;
}

#[tokio::test]
async fn a_body_of_exactly_the_limit_is_read() {
    let server = environment().await;
    let body = format!(r#"{{"buyer_id": 42}}{}"#, " ".repeat(16 * 1024 - 16));
    assert_eq!(body.len(), 16 * 1024);
    let headers = [("Content-Type", "application/json")];
    let sold = ask(server.address(), "POST", "/api/sales/1/reservations", &headers, &body).await;
    assert_eq!(sold.status, 201);
    let longer = ask(
        server.address(),
        "POST",
        "/api/sales/1/reservations",
        &headers,
        &format!("{body} "),
    )
    .await;
    longer.is_problem(413, "body-too-large");
}

#[tokio::test]
async fn a_chunked_body_over_the_limit_is_refused() {
    let server = environment().await;
    let body = " ".repeat(0x4001);
    let request = format!("{HEAD}Transfer-Encoding: chunked\r\n\r\n4001\r\n{body}\r\n0\r\n\r\n");
    send(server.address(), request.as_bytes())
        .await
        .is_problem(413, "body-too-large");
}

#[tokio::test]
async fn an_endless_chunked_body_is_stopped_at_the_limit() {
    let server = environment().await;
    let mut stream = TcpStream::connect(server.address()).await.expect("it listens");
    stream
        .write_all(format!("{HEAD}Transfer-Encoding: chunked\r\n\r\n").as_bytes())
        .await
        .expect("it reads");
    let chunk = format!("400\r\n{}\r\n", " ".repeat(0x400));
    let mut taken = 0;
    within("the server to close the connection", async {
        while stream.write_all(chunk.as_bytes()).await.is_ok() {
            taken += chunk.len();
        }
    })
    .await;
    // The limit is sixteen chunks; the rest is in the socket buffers on both sides.
    println!("{taken} bytes were taken");
    it_sells(server.address()).await;
}

#[rstest]
#[case::not_utf8(b"{\"buyer_id\": 42, \"\xff\": 1}", 400, "malformed-body")]
#[case::half_a_character(b"{\"buyer_id\": \"\xe2\x82", 400, "malformed-body")]
#[case::deep_arrays(&[b'['; 16 * 1024], 400, "malformed-body")]
#[case::nul(b"\0", 400, "malformed-body")]
#[case::half_a_surrogate(br#"{"buyer_id": "\ud800"}"#, 422, "invalid-body")]
#[case::a_long_number(&[b'9'; 16 * 1024], 422, "invalid-body")]
#[tokio::test]
async fn a_hostile_body_is_a_problem_like_any_other(#[case] body: &[u8], #[case] status: u16, #[case] problem: &str) {
    let server = environment().await;
    let mut request = format!("{HEAD}Content-Length: {}\r\n\r\n", body.len()).into_bytes();
    request.extend_from_slice(body);
    send(server.address(), &request).await.is_problem(status, problem);
    it_sells(server.address()).await;
}

#[tokio::test]
async fn deep_json_does_not_reach_the_end_of_the_stack() {
    let server = environment().await;
    let deep = 8_000;
    let body = format!(r#"{{"buyer_id": {}{}}}"#, "[".repeat(deep), "]".repeat(deep));
    let request = format!("{HEAD}Content-Length: {}\r\n\r\n{body}", body.len());
    send(server.address(), request.as_bytes())
        .await
        .is_problem(422, "invalid-body");
    it_sells(server.address()).await;
}

#[rstest]
#[case::no_http(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03 this is TLS\r\n\r\n", 400)]
#[case::two_lengths(b"POST / HTTP/1.1\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n", 400)]
#[case::no_length(b"GET / HTTP/1.1\r\nContent-Length: many\r\n\r\n", 400)]
#[case::unknown_version(b"GET / HTTP/9.9\r\n\r\n", 400)]
#[tokio::test]
async fn what_is_not_http_is_a_400(#[case] bytes: &[u8], #[case] status: u16) {
    let server = environment().await;
    assert_eq!(send(server.address(), bytes).await.status, status);
    it_sells(server.address()).await;
}

#[tokio::test]
async fn headers_without_end_are_refused() {
    let server = environment().await;
    let long = format!("GET /livez HTTP/1.1\r\nX-Long: {}\r\n\r\n", "x".repeat(64 * 1024));
    assert_eq!(send(server.address(), long.as_bytes()).await.status, 431);
    let many = format!("GET /livez HTTP/1.1\r\n{}\r\n", "X: y\r\n".repeat(200));
    assert_eq!(send(server.address(), many.as_bytes()).await.status, 431);
    it_sells(server.address()).await;
}

#[tokio::test]
async fn slow_headers_and_idle_connections_are_closed() {
    let server = environment_with(|settings| settings.http_keep_alive = SHORT).await;
    let idle = TcpStream::connect(server.address()).await.expect("it listens");
    let mut slow = TcpStream::connect(server.address()).await.expect("it listens");
    slow.write_all(b"GET /livez HTTP/1.1\r\nX-").await.expect("it reads");
    let kept_alive = kept_alive(server.address()).await;

    let began = Instant::now();
    tokio::join!(closed(idle), closed(slow), closed(kept_alive));
    assert!(
        began.elapsed() < Duration::from_secs(10),
        "closed by another timeout after {:?}",
        began.elapsed()
    );
    it_sells(server.address()).await;
}

#[tokio::test]
async fn a_slow_body_is_answered_and_its_connection_closed() {
    let server = with_limits(Limits {
        body_timeout: SHORT,
        ..Limits::default()
    })
    .await;
    let mut slow = TcpStream::connect(server.address()).await.expect("it listens");
    slow.write_all(format!("{HEAD}Content-Length: 16\r\n\r\n{{").as_bytes())
        .await
        .expect("it reads");
    it_sells(server.address()).await;
    let answer = read_answer(&mut slow).await.expect("an answer");
    answer.is_problem(408, "body-too-slow");
    assert_eq!(answer.header("connection"), "close");
    closed(slow).await;
}

#[tokio::test]
async fn an_incomplete_body_affects_no_other_client() {
    let server = environment().await;
    let mut broken = TcpStream::connect(server.address()).await.expect("it listens");
    broken
        .write_all(format!("{HEAD}Content-Length: 16\r\n\r\n{{").as_bytes())
        .await
        .expect("it reads");
    broken.shutdown().await.expect("half closed");
    closed(broken).await;
    it_sells(server.address()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn two_thousand_idle_connections_do_not_keep_others_waiting() {
    let server = environment().await;
    let mut idle = Vec::new();
    for n in 0..2_000 {
        let mut stream = TcpStream::connect(server.address()).await.expect("it listens");
        if n % 2 == 0 {
            stream.write_all(b"GET /livez HTTP/1.1\r\n").await.expect("it reads");
        }
        idle.push(stream);
    }
    let began = Instant::now();
    for _ in 0..20 {
        it_sells(server.address()).await;
    }
    assert!(
        began.elapsed() < Duration::from_secs(5),
        "20 tickets took {:?}",
        began.elapsed()
    );

    // Nor do they delay the shutdown: none of them has sent a complete request.
    let began = Instant::now();
    let address = server.address();
    within("the shutdown", server.server.shut_down())
        .await
        .expect("nothing is in flight");
    assert!(
        began.elapsed() < Duration::from_secs(5),
        "the shutdown took {:?}",
        began.elapsed()
    );
    TcpStream::connect(address).await.expect_err("the listener is closed");
}

#[tokio::test]
async fn a_connection_over_the_limit_waits_until_one_is_closed() {
    let server = with_limits(Limits {
        connections: 2,
        ..Limits::default()
    })
    .await;
    let mut held = Vec::new();
    for _ in 0..2 {
        let mut stream = TcpStream::connect(server.address()).await.expect("it listens");
        stream
            .write_all(b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n")
            .await
            .expect("it reads");
        assert_eq!(read_answer(&mut stream).await.expect("an answer").status, 200);
        held.push(stream);
    }
    let address = server.address();
    let third = tokio::spawn(async move { reserve(address, 1, "fine").await });
    let early = tokio::time::timeout(SHORT, read_answer(&mut held[0])).await;
    assert!(early.is_err() && !third.is_finished(), "a third connection was served");
    held.clear();
    assert_eq!(within("the third", third).await.expect("no panic").status, 201);
}

/// The reservation of a client that disconnects stays in flight. Without a limit, a client that
/// reconnects and retries would pile up reservations.
#[tokio::test]
async fn a_reservation_over_the_limit_is_answered_overloaded() {
    let one = Limits {
        reservations: 1,
        ..Limits::default()
    };
    let (server, holder, buyer) = with_one_in_flight(one).await;
    drop(buyer);
    reserve(server.address(), 1, "fine").await.is_problem(503, "overloaded");
    let metrics = ask(server.address(), "GET", "/metrics", &[], "").await;
    let counted = r#"oversold_reservations_total{answer="overloaded"} 1"#;
    assert!(metrics.text().contains(counted), "{}", metrics.text());
    holder.release().await;
    until("a permit to be free again", async || {
        reserve(server.address(), 1, "fine").await.status == 201
    })
    .await;
}

/// It pipelines requests and never reads the responses.
#[cfg(target_os = "linux")]
#[tokio::test]
async fn a_client_that_never_reads_its_responses_is_disconnected() {
    let server = with_limits(Limits {
        connections: 1,
        tcp_user_timeout: SHORT,
        ..Limits::default()
    })
    .await;
    let mut client = TcpStream::connect(server.address()).await.expect("it listens");
    let mut asked = 0;
    // Until a request is not taken for a while, or the client is disconnected already.
    let asks = async {
        let request = b"GET /openapi.json HTTP/1.1\r\nHost: x\r\n\r\n";
        while let Ok(Ok(())) = tokio::time::timeout(SHORT, client.write_all(request)).await {
            asked += 1;
        }
    };
    within("a connection that takes no more", asks).await;
    assert!(
        asked > 1,
        "the fault was not injected: only {asked} requests were taken"
    );
    let next = within("the next client", reserve(server.address(), 1, "fine")).await;
    assert_eq!(next.status, 201);
    drop(client);
}

#[tokio::test]
async fn pipelined_requests_are_answered_in_order() {
    let server = environment().await;
    let mut stream = TcpStream::connect(server.address()).await.expect("it listens");
    let mut requests = String::new();
    for buyer in 0..50 {
        let body = format!(r#"{{"buyer_id": {buyer}}}"#);
        requests.push_str(&format!("{HEAD}Content-Length: {}\r\n\r\n{body}", body.len()));
    }
    stream.write_all(requests.as_bytes()).await.expect("it reads");
    for buyer in 0..50 {
        let answer = read_answer(&mut stream).await.expect("an answer");
        assert_eq!((answer.status, answer.json()["buyer_id"].as_i64()), (201, Some(buyer)));
    }
}

#[tokio::test]
async fn http_1_0_is_answered_and_closed() {
    let server = environment().await;
    let mut stream = TcpStream::connect(server.address()).await.expect("it listens");
    stream
        .write_all(b"GET /livez HTTP/1.0\r\n\r\n")
        .await
        .expect("it reads");
    let answer = read_answer(&mut stream).await.expect("an answer");
    assert_eq!((answer.status, answer.text()), (200, "alive\n"));
    closed(stream).await;
}

/// A server with one reservation in flight, blocked by a lock.
async fn with_one_in_flight(limits: Limits) -> (TestEnvironment, LockHolder, TcpStream) {
    let server = with_limits(limits).await;
    let holder = server.block_buyer_42().await;
    let mut buyer = TcpStream::connect(server.address()).await.expect("it listens");
    let body = r#"{"buyer_id": 42}"#;
    let request = format!(
        "{HEAD}Idempotency-Key: wait\r\nContent-Length: {}\r\n\r\n{body}",
        body.len()
    );
    buyer.write_all(request.as_bytes()).await.expect("it reads");

    let mut postgres = server.connect().await;
    until("the reservation to wait for its lock", async || {
        let waiting = sqlx::query_scalar(
            "select exists (select
                              from pg_stat_activity
                             where datname = current_database()
                               and wait_event_type = 'Lock')",
        );
        waiting.fetch_one(&mut postgres).await.expect("an answer")
    })
    .await;
    (server, holder, buyer)
}

#[tokio::test]
async fn a_shutdown_completes_requests_in_flight_and_closes_idle_connections() {
    let (
        TestEnvironment {
            server,
            database: _database,
        },
        holder,
        mut buyer,
    ) = with_one_in_flight(Limits::default()).await;
    let address = server.address();
    let fresh = TcpStream::connect(address).await.expect("it listens");
    let kept_alive = kept_alive(address).await;
    let mut incomplete = TcpStream::connect(address).await.expect("it listens");
    incomplete
        .write_all(b"GET /livez HTTP/1.1\r\nX-")
        .await
        .expect("it reads");

    let shutdown = tokio::spawn(server.shut_down());
    tokio::join!(closed(fresh), closed(kept_alive), closed(incomplete));
    TcpStream::connect(address).await.expect_err("the listener is closed");
    assert!(
        !shutdown.is_finished(),
        "the shutdown did not wait for the request in flight"
    );

    holder.release().await;
    let answer = read_answer(&mut buyer).await.expect("an answer");
    assert_eq!((answer.status, answer.header("connection")), (201, "close"));
    within("the shutdown", shutdown)
        .await
        .expect("no panic")
        .expect("drained");
}

/// The client cannot know of the shutdown: its request may have been on its way.
#[tokio::test]
async fn a_kept_alive_connection_is_served_once_more_in_the_grace_period() {
    let TestEnvironment {
        server,
        database: _database,
    } = with_limits(Limits {
        shutdown_grace: Limits::default().drain_timeout,
        ..Limits::default()
    })
    .await;
    let address = server.address();
    let mut kept_alive = kept_alive(address).await;

    let shutdown = tokio::spawn(server.shut_down());
    listener_closed(address).await;
    kept_alive.write_all(LIVEZ).await.expect("it reads");
    let answer = read_answer(&mut kept_alive).await.expect("an answer");
    assert_eq!((answer.status, answer.header("connection")), (200, "close"));
    closed(kept_alive).await;

    within("the shutdown", shutdown)
        .await
        .expect("no panic")
        .expect("drained");
}

/// The test is single-threaded: the server accepts no connection while the clients connect, so all
/// of them are in the backlog at the shutdown.
#[tokio::test]
async fn every_client_in_the_backlog_is_served_before_the_shutdown() {
    const CLIENTS: usize = 500;

    let TestEnvironment {
        server,
        database: _database,
    } = environment().await;
    let address = server.address();
    let clients: Vec<std::net::TcpStream> = (0..CLIENTS)
        .map(|_| {
            let mut stream = std::net::TcpStream::connect(address).expect("it listens");
            let request = b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n";
            std::io::Write::write_all(&mut stream, request).expect("the kernel takes it");
            stream
        })
        .collect();
    within("the shutdown", server.shut_down()).await.expect("drained");

    let mut answered = 0;
    for stream in clients {
        stream.set_nonblocking(true).expect("a socket");
        let mut stream = TcpStream::from_std(stream).expect("a socket");
        answered += usize::from(
            read_answer(&mut stream)
                .await
                .is_some_and(|answer| answer.status == 200),
        );
    }
    assert_eq!(answered, CLIENTS, "answered of {CLIENTS}");
}

#[tokio::test]
async fn a_client_that_waits_for_a_connection_permit_is_served_in_the_shutdown() {
    let one_at_a_time = Limits {
        connections: 1,
        ..Limits::default()
    };
    let (
        TestEnvironment {
            server,
            database: _database,
        },
        holder,
        mut buyer,
    ) = with_one_in_flight(one_at_a_time).await;
    let mut next = TcpStream::connect(server.address())
        .await
        .expect("the kernel connects it");
    next.write_all(b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n")
        .await
        .expect("the kernel takes it");
    let (shutdown, ()) = tokio::join!(within("the shutdown", server.shut_down()), holder.release());
    shutdown.expect("drained");
    for (stream, status) in [(&mut buyer, 201), (&mut next, 200)] {
        assert_eq!(read_answer(stream).await.expect("an answer").status, status);
    }
}

#[tokio::test]
async fn a_shutdown_waits_for_a_reservation_whose_client_disconnected() {
    let (TestEnvironment { server, database }, holder, buyer) = with_one_in_flight(Limits::default()).await;
    drop(buyer);
    let (shutdown, ()) = tokio::join!(within("the shutdown", server.shut_down()), holder.release());
    shutdown.expect("drained");
    assert_eq!(reservations(&database).await, 1);
}

#[tokio::test]
async fn a_shutdown_gives_up_at_the_drain_timeout_and_reports_what_it_aborted() {
    let short = Limits {
        drain_timeout: SHORT,
        ..Limits::default()
    };
    let (environment, _holder, _buyer) = with_one_in_flight(short).await;
    let timeout = within("the shutdown", environment.server.shut_down())
        .await
        .expect_err("something is in flight");
    assert_eq!((timeout.connections, timeout.reservations), (1, 1));
    assert!(
        timeout.to_string().contains("1 connections and 1 reservations"),
        "{timeout}"
    );

    // The reservation of a disconnected client is still in flight.
    let (environment, _holder, buyer) = with_one_in_flight(short).await;
    drop(buyer);
    let timeout = within("the shutdown", environment.server.shut_down())
        .await
        .expect_err("something is in flight");
    assert_eq!((timeout.connections, timeout.reservations), (0, 1));
}

#[tokio::test]
async fn a_dropped_server_stops_listening() {
    let TestEnvironment {
        server,
        database: _database,
    } = environment().await;
    let address = server.address();
    drop(server);
    listener_closed(address).await;
}
