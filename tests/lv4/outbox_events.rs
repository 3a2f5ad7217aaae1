//! The outbox: every outcome reaches the clients that wait for it.

use std::{sync::Arc, time::Duration};

use box_office::Database;
use harness::{
    backends,
    proxy::{Fault, Proxy},
    test_server::TestServer,
    until,
};
use lv4_kafka::pipeline::OutboxReader;
use rstest::rstest;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    task::JoinSet,
    time::timeout,
};
use uuid::Uuid;

use crate::fixture::{
    Expected::{self, Breaks, Kept},
    Fixture, LOST, OBSERVATION_TIME, TIMEOUT, follow_events, kill_instance,
};

/// The listening connection is terminated while new clients arrive without a pause.
#[tokio::test]
async fn the_listener_reconnects_while_new_clients_arrive() {
    let fixture = Fixture::new("single-writer").await;
    let pool = fixture.environment.database().pool(2).await.unwrap().into();
    let stop = tokio_util::sync::CancellationToken::new();
    let events = Arc::new(OutboxReader::open(&pool, stop.clone()).await.unwrap());
    let listening = async || -> Option<i32> {
        sqlx::query_scalar(
            "select pid from pg_stat_activity where datname = current_database() and query ilike 'listen%'",
        )
        .fetch_optional(&fixture.pool)
        .await
        .unwrap()
    };
    let first = listening().await.expect("a connection listens");
    let mut coming = JoinSet::new();
    for _ in 0..32 {
        let events = Arc::clone(&events);
        coming.spawn(async move {
            loop {
                let _ = events.events_after(Uuid::new_v4(), 0, Duration::ZERO).await;
            }
        });
    }
    let struck: bool = sqlx::query_scalar("select pg_terminate_backend($1)")
        .bind(first)
        .fetch_one(&fixture.pool)
        .await
        .unwrap();
    assert!(struck, "the fault did not strike");
    until("a connection listens again", async || {
        listening().await.is_some_and(|pid| pid != first)
    })
    .await;
    coming.shutdown().await;
    stop.cancel();
}

/// No bytes pass on the listening connection any more, and nobody closes it.
#[tokio::test]
async fn a_listener_whose_connection_fell_silent_is_replaced() {
    let fixture = Fixture::new("single-writer").await;
    let postgres = backends::postgres().await.unwrap();
    let proxy = Proxy::before(postgres.report().address.clone()).await.unwrap();
    let url = proxy.url_through(&fixture.environment.database().url());
    let stop = tokio_util::sync::CancellationToken::new();
    let database = Database::lazy(url.parse().unwrap(), 1);
    let _events = OutboxReader::open(&database, stop.clone()).await.unwrap();
    let listening = async || -> Vec<i32> {
        sqlx::query_scalar(
            "select pid from pg_stat_activity where datname = current_database() and query ilike 'listen%'",
        )
        .fetch_all(&fixture.pool)
        .await
        .unwrap()
    };
    let first = listening().await;
    assert_eq!(first.len(), 1, "a connection listens");
    assert_eq!(proxy.silence_open_connections().await, 1, "the fault did not strike");
    until("another connection listens, and the silent one is closed", async || {
        let now = listening().await;
        now.len() == 1 && now != first
    })
    .await;
    stop.cancel();
}

/// The tables of running servers get a column, as a migration of their next version does it.
#[rstest]
#[case::locked("locked")]
#[case::single_writer("single-writer")]
#[tokio::test]
async fn a_new_column_disturbs_neither_consumers_nor_events(#[case] name: &str) {
    /// More than the pool has connections: each has its own prepared statements.
    const READS: usize = 8;

    let fixture = Fixture::new(name).await;
    let server = fixture.start_acceptor(2).await;
    let consumer = fixture.start_instance(&[]).await;
    let mut orders = fixture.accept_all(&server, 1..=1).await;
    fixture.wait_until_processed().await;
    let path = format!("/api/reservations/{}", orders[0]);
    let read = async || {
        for _ in 0..READS {
            assert_eq!(server.get(&path).await.unwrap().status, 200);
            let received = server.events(orders[0], Some(0)).await.unwrap();
            assert!(matches!(&received[..], [(_, only)] if only.is_final()), "{received:?}");
        }
    };
    read().await;
    for table in ["sale", "reservation", "outbox", "partition_offset"] {
        let altered = sqlx::AssertSqlSafe(format!("alter table {table} add column note text"));
        sqlx::raw_sql(altered).execute(&fixture.pool).await.unwrap();
    }
    read().await;
    orders.extend(fixture.accept_all(&server, 2..=2).await);
    fixture.wait_until_processed().await;

    fixture.assert_outcome(&server, &orders, Kept).await;
    server.stop().await.unwrap();
    consumer.stop().await.unwrap();
}

/// A notification is lost with its connection, for example. The order is decided after the first
/// look, so only a later one can find its event.
#[tokio::test]
async fn an_event_without_a_notification_is_delivered() {
    let fixture = Fixture::new("single-writer").await;
    let pool = fixture.environment.database().pool(2).await.unwrap().into();
    let stop = tokio_util::sync::CancellationToken::new();
    let events = Arc::new(OutboxReader::open(&pool, stop.clone()).await.unwrap());
    let order = Uuid::new_v4();
    let waiting = tokio::spawn({
        let events = Arc::clone(&events);
        async move { events.events_after(order, 0, 2 * TIMEOUT).await }
    });
    until("the first look is over", async || {
        let looks: i64 = sqlx::query_scalar(
            "select count(*) from pg_stat_activity
              where datname = current_database() and query like 'select outbox.number%' and state = 'idle'",
        )
        .fetch_one(&fixture.pool)
        .await
        .unwrap();
        looks > 0
    })
    .await;
    sqlx::query(
        "with decided as (
             insert into reservation (id, sale_id, buyer_id, request_key)
             values ($1, 1, 1, 'a')
             returning id
         )
         insert into outbox (reservation_id)
         select id
           from decided",
    )
    .bind(order)
    .execute(&fixture.pool)
    .await
    .unwrap();

    let events = timeout(TIMEOUT, waiting).await.expect("a later look finds it");
    assert_eq!(events.unwrap().unwrap().len(), 1);
    stop.cancel();
}

/// Reconnects as an `EventSource` does that has received the event `accepted`. Returns once the
/// stream is open.
async fn reconnect(server: &TestServer, order: Uuid) -> TcpStream {
    let mut stream = TcpStream::connect(server.address()).await.unwrap();
    let request = format!(
        "GET /api/reservations/{order}/events HTTP/1.1\r\nHost: x\r\nConnection: close\r\nLast-Event-ID: 0\r\n\r\n"
    );
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut seen = String::new();
    let reading = async {
        while !seen.contains("retry: ") {
            seen.push(stream.read_u8().await.unwrap().into());
        }
    };
    timeout(TIMEOUT, reading).await.expect("the stream is open");
    assert!(seen.starts_with("HTTP/1.1 200"), "{seen}");
    stream
}

/// This instance cannot read the outcome. It must disconnect its clients, so that they reconnect to
/// another instance. One that comes back to it waits: an `EventSource` gives up for good after any
/// answer but 200.
#[tokio::test]
async fn event_clients_are_disconnected_when_the_database_cannot_be_read_and_wait_if_they_come_back() {
    let fixture = Fixture::new("single-writer").await;
    let postgres = backends::postgres().await.unwrap();
    let proxy = Proxy::before(postgres.report().address.clone()).await.unwrap();
    let acceptor = fixture.start_acceptor(1).await;
    let proxied_url = proxy.url_through(&fixture.environment.database().url());
    let cut_off = fixture
        .start_instance(&[("KAFKA_CONSUMERS", "0"), ("DATABASE_URL", &*proxied_url)])
        .await;
    let orders = fixture.accept_all(&acceptor, 1..=1).await;
    let mut follower = follow_events(&cut_off, orders[0]).await;
    proxy.inject(Fault::CloseAll);
    let mut received = String::new();
    timeout(TIMEOUT, follower.read_to_string(&mut received))
        .await
        .expect("the client is disconnected")
        .unwrap();
    assert!(proxy.has_struck(), "the fault did not strike");
    assert!(!received.contains("event:"), "{received}");
    let mut returned = reconnect(&cut_off, orders[0]).await;
    let consumer = fixture.start_instance(&[]).await;
    fixture.wait_until_processed().await;

    fixture.assert_outcome(&acceptor, &orders, Kept).await;
    proxy.inject(Fault::None);
    timeout(TIMEOUT, returned.read_to_string(&mut received))
        .await
        .expect("the outcome is delivered")
        .unwrap();
    assert!(received.contains("event: confirmed"), "{received}");
    acceptor.stop().await.unwrap();
    cut_off.stop().await.unwrap();
    consumer.stop().await.unwrap();
}

#[rstest]
#[case::single_writer("single-writer", Kept)]
#[case::locked("locked", Kept)]
#[case::outbox_after_commit("mutants/outbox-after-commit", LOST)]
#[tokio::test]
async fn the_news_goes_out_although_who_decided_is_killed_before_telling(
    #[case] name: &str,
    #[case] expected: Expected,
) {
    let fixture = Fixture::new(name).await.with_short_session();
    let acceptor = fixture.start_acceptor(1).await;
    let orders = fixture.accept_all(&acceptor, 1..=1).await;
    let first = fixture.start_stopped_at("committed").await;
    assert_eq!(
        fixture.rows().await,
        1,
        "the fault did not strike: nothing is committed"
    );
    kill_instance(&first).await;
    let second = fixture.start_instance(&[]).await;
    fixture.wait_until_processed().await;

    match expected {
        Kept => {
            let received = timeout(TIMEOUT, second.final_state(orders[0])).await;
            assert_eq!(received.expect("the event is delivered").unwrap().status, "confirmed");
        }
        Breaks(_) => {
            let received = timeout(OBSERVATION_TIME, second.final_state(orders[0])).await;
            assert!(received.is_err(), "{received:?}");
        }
    }
    fixture.assert_outcome(&second, &orders, expected).await;
    kill_instance(&second).await;
}

/// Both the instance that accepted the order and the one that decided it were killed.
#[rstest]
#[case::locked("locked")]
#[case::single_writer("single-writer")]
#[tokio::test]
async fn any_instance_delivers_the_outcome_and_no_event_is_missed(#[case] name: &str) {
    let fixture = Fixture::new(name).await;
    let acceptor = fixture.start_acceptor(1).await;
    let other = fixture.start_instance(&[("KAFKA_CONSUMERS", "0")]).await;
    let orders = fixture.accept_all(&acceptor, 1..=2).await;
    let state = other.get(&format!("/api/reservations/{}", orders[0])).await.unwrap();
    assert_eq!(state.json::<box_office::api::Reservation>().unwrap().status, "accepted");

    // A client follow_events, sees that its order is accepted, and is cut off.
    drop(follow_events(&other, orders[0]).await);
    kill_instance(&acceptor).await;
    // Another client reconnects before its order is decided, and waits.
    let (received, consumer) = tokio::join!(other.events(orders[1], Some(0)), async {
        let consumer = fixture.start_instance(&[]).await;
        fixture.wait_until_processed().await;
        consumer
    });
    let received = received.unwrap();
    assert!(matches!(&received[..], [(_, only)] if only.is_final()), "{received:?}");
    kill_instance(&consumer).await;

    let received = other.events(orders[0], Some(0)).await.unwrap();
    let [(number, last)] = &received[..] else {
        panic!("{received:?}")
    };
    assert!(last.is_final(), "{last:?}");
    assert_eq!(
        other.events(orders[0], Some(*number)).await.unwrap(),
        [],
        "no event follows the final one"
    );
    for &order in &orders {
        other.final_state(order).await.unwrap();
    }
    fixture.assert_outcome(&other, &orders, Kept).await;
    other.stop().await.unwrap();
}

/// The buffer limit of a single client is tested in `levels/box-office/tests/events.rs`.
#[tokio::test]
async fn event_clients_that_never_read_cost_little_memory() {
    const CLIENTS: u64 = 500;
    const MOST_KIB_EACH: u64 = 64;
    let fixture = Fixture::new("single-writer").await;
    let acceptor = fixture.start_acceptor(1).await;
    let orders = fixture.accept_all(&acceptor, 1..=1).await;
    let memory_kib = async || {
        let pid = acceptor.pid().await.unwrap();
        let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
        line.trim().trim_end_matches(" kB").parse::<u64>().unwrap()
    };
    let before_kib = memory_kib().await;
    let request = format!("GET /api/reservations/{}/events HTTP/1.1\r\nHost: x\r\n\r\n", orders[0]);
    let mut stalled = vec![];
    for _ in 0..CLIENTS {
        let mut stream = TcpStream::connect(acceptor.address()).await.unwrap();
        stream.write_all(request.as_bytes()).await.unwrap();
        stalled.push(stream);
    }
    for stream in &stalled {
        stream.readable().await.unwrap();
    }
    let consumer = fixture.start_instance(&[]).await;
    acceptor.final_state(orders[0]).await.unwrap();
    let grown_kib = memory_kib().await - before_kib;
    println!("{CLIENTS} clients cost {grown_kib} KiB");
    assert!(grown_kib < CLIENTS * MOST_KIB_EACH, "{grown_kib} KiB");
    acceptor.stop().await.unwrap();
    consumer.stop().await.unwrap();
}
