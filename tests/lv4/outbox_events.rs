//! The outbox: every outcome reaches the clients that wait for it.

use std::{sync::Arc, time::Duration};

use harness::{
    backends,
    proxy::{Cut, Proxy},
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
    LOST, PATIENCE, Place, TIME_FOR_A_MISTAKE, follows, killed,
};

/// A connection that listens is lost while buyers come without a pause: it is made again all the same.
#[tokio::test]
async fn who_listens_comes_back_however_many_come_to_wait() {
    let place = Place::of("single-writer").await;
    let pool = place.stand.database().pool(2).await.unwrap();
    let stop = tokio_util::sync::CancellationToken::new();
    let events = Arc::new(OutboxReader::open(&pool, stop.clone()).await.unwrap());
    let listening = async || -> Option<i32> {
        sqlx::query_scalar(
            "select pid from pg_stat_activity where datname = current_database() and query ilike 'listen%'",
        )
        .fetch_optional(&place.pool)
        .await
        .unwrap()
    };
    let first = listening().await.expect("somebody listens");
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
        .fetch_one(&place.pool)
        .await
        .unwrap();
    assert!(struck, "the fault did not strike");
    until("somebody listens again", async || {
        listening().await.is_some_and(|pid| pid != first)
    })
    .await;
    coming.shutdown().await;
    stop.cancel();
}

/// It can't say what became of the order. Another instance can, and the client has to be let go to it.
#[tokio::test]
async fn who_follows_is_let_go_when_the_database_can_not_be_read() {
    let place = Place::of("single-writer").await;
    let postgres = backends::postgres().await.unwrap();
    let proxy = Proxy::before(postgres.report().address.clone()).await.unwrap();
    let acceptor = place.acceptor(1).await;
    let behind = proxy.instead_of(&place.stand.database().url());
    let cut_off = place
        .instance(&[("KAFKA_CONSUMERS", "0"), ("DATABASE_URL", &*behind)])
        .await;
    let orders = place.accepted(&acceptor, 1..=1).await;
    let mut follower = follows(&cut_off, orders[0]).await;
    proxy.cuts(Cut::Everything);
    let mut told = String::new();
    timeout(PATIENCE, follower.read_to_string(&mut told))
        .await
        .expect("it is let go")
        .unwrap();
    assert!(proxy.has_struck(), "the fault did not strike");
    assert!(!told.contains("event:"), "{told}");
    let decider = place.instance(&[]).await;
    place.quiet().await;

    place.hold(&acceptor, &orders, Kept).await;
    proxy.cuts(Cut::Nothing);
    acceptor.stop().await.unwrap();
    cut_off.stop().await.unwrap();
    decider.stop().await.unwrap();
}

#[rstest]
#[case::single_writer("single-writer", Kept)]
#[case::locked("locked", Kept)]
#[case::notify_outside("mutants/notify-outside", LOST)]
#[tokio::test]
async fn the_news_goes_out_although_who_decided_is_killed_before_telling(
    #[case] name: &str,
    #[case] expected: Expected,
) {
    let place = Place::of(name).await.where_deaths_are_noticed();
    let acceptor = place.acceptor(1).await;
    let orders = place.accepted(&acceptor, 1..=1).await;
    let first = place.stops_at("committed").await;
    assert_eq!(place.rows().await, 1, "the fault did not strike: nothing is committed");
    killed(&first).await;
    let second = place.instance(&[]).await;
    place.quiet().await;

    match expected {
        Kept => {
            let told = timeout(PATIENCE, second.final_state(orders[0])).await;
            assert_eq!(told.expect("the news goes out").unwrap().status, "confirmed");
        }
        Breaks(_) => {
            let told = timeout(TIME_FOR_A_MISTAKE, second.final_state(orders[0])).await;
            assert!(told.is_err(), "{told:?}");
        }
    }
    place.hold(&second, &orders, expected).await;
    killed(&second).await;
}

/// Neither the instance that accepted the order nor the one that decided it is there any more.
#[rstest]
#[case::locked("locked")]
#[case::single_writer("single-writer")]
#[tokio::test]
async fn any_instance_tells_how_an_order_ended_and_no_event_is_missed(#[case] name: &str) {
    let place = Place::of(name).await;
    let acceptor = place.acceptor(1).await;
    let other = place.instance(&[("KAFKA_CONSUMERS", "0")]).await;
    let orders = place.accepted(&acceptor, 1..=2).await;
    let state = other.get(&format!("/api/reservations/{}", orders[0])).await.unwrap();
    assert_eq!(state.json::<box_office::api::Reservation>().unwrap().status, "accepted");

    // A client follows, sees that its order is accepted, and is cut off.
    drop(follows(&other, orders[0]).await);
    killed(&acceptor).await;
    // Another one is back before its order is decided, and waits.
    let (told, decider) = tokio::join!(other.events(orders[1], Some(0)), async {
        let decider = place.instance(&[]).await;
        place.quiet().await;
        decider
    });
    let told = told.unwrap();
    assert!(matches!(&told[..], [(_, only)] if only.is_final()), "{told:?}");
    killed(&decider).await;

    let told = other.events(orders[0], Some(0)).await.unwrap();
    let [(number, last)] = &told[..] else {
        panic!("{told:?}")
    };
    assert!(last.is_final(), "{last:?}");
    assert_eq!(
        other.events(orders[0], Some(*number)).await.unwrap(),
        [],
        "and then there is nothing more to come"
    );
    for &order in &orders {
        other.final_state(order).await.unwrap();
    }
    place.hold(&other, &orders, Kept).await;
    other.stop().await.unwrap();
}

/// What one of them may hold back is measured where the events are told: `levels/box-office/tests/events.rs`.
#[tokio::test]
async fn clients_that_follow_and_never_read_cost_little() {
    const CLIENTS: u64 = 500;
    const MOST_KIB_EACH: u64 = 64;
    let place = Place::of("single-writer").await;
    let acceptor = place.acceptor(1).await;
    let orders = place.accepted(&acceptor, 1..=1).await;
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
    let decider = place.instance(&[]).await;
    acceptor.final_state(orders[0]).await.unwrap();
    let grown_kib = memory_kib().await - before_kib;
    println!("{CLIENTS} clients cost {grown_kib} KiB");
    assert!(grown_kib < CLIENTS * MOST_KIB_EACH, "{grown_kib} KiB");
    acceptor.stop().await.unwrap();
    decider.stop().await.unwrap();
}
