//! Connections to Postgres that fall silent, or whose prepared statements are stale.

mod common;

use std::time::{Duration, Instant};

use box_office::Settings;
use common::{TestEnvironment, ask, database, on, reserve, start, within};
use futures_util::future::join_all;
use harness::{
    backends,
    proxy::{Fault, Proxy},
    until,
};
use rstest::rstest;
use sqlx::{Connection, PgConnection};

/// A server that reaches its database through a proxy.
async fn behind_a_proxy(change: impl FnOnce(&mut Settings)) -> (TestEnvironment, Proxy) {
    let postgres = backends::postgres().await.unwrap_or_else(|missing| panic!("{missing}"));
    let proxy = Proxy::before(postgres.report().address.clone()).await.expect("a port");
    let database = database().await;
    let mut settings = on(&proxy.url_through(&database.url()));
    change(&mut settings);
    let server = start(&settings).await;
    (TestEnvironment { server, database }, proxy)
}

/// Opens as many connections as the pool may have: that many reservations wait at once.
async fn fill_the_pool(environment: &TestEnvironment, connections: u32) {
    let holder = environment.block_buyer_42().await;
    let address = environment.address();
    let waiting = (0..connections).map(|number| async move { reserve(address, 42, &format!("wait-{number}")).await });
    let ((), answers) = tokio::join!(
        async {
            let mut observer = environment.connect().await;
            until("all wait", async || {
                let waiting = sqlx::query_scalar(
                    "select count(*)
                       from pg_stat_activity
                      where datname = current_database()
                        and wait_event_type = 'Lock'",
                );
                waiting
                    .fetch_one(&mut observer)
                    .await
                    .is_ok_and(|waiting: i64| waiting == i64::from(connections))
            })
            .await;
            holder.release().await;
        },
        join_all(waiting)
    );
    for answer in answers {
        assert_eq!(answer.status, 201, "{answer:?}");
    }
}

/// Waits until every connection of the pool has been idle for so long that it is pinged.
async fn until_idle() {
    let began = Instant::now();
    until("the connections are idle", async || {
        began.elapsed() > Duration::from_millis(200)
    })
    .await;
}

#[tokio::test]
async fn connections_that_fell_silent_while_idle_are_replaced() {
    const CONNECTIONS: u32 = 4;

    let (environment, proxy) = behind_a_proxy(|settings| settings.database_pool_size = CONNECTIONS).await;
    let address = environment.address();
    fill_the_pool(&environment, CONNECTIONS).await;
    let struck = proxy.silence_open_connections().await;
    assert_eq!(struck, u64::from(CONNECTIONS), "the fault did not strike");
    until_idle().await;
    let answers =
        join_all((1..=4).map(|buyer| async move { reserve(address, buyer, &format!("{buyer}")).await })).await;
    for answer in answers {
        assert_eq!(answer.status, 201, "{answer:?}");
    }
    assert!(proxy.chunks_discarded() > 0, "no silent connection was tried");
    environment.server.shut_down().await.expect("it drains");
}

/// The connection falls silent as soon as the server has sent this. The pool has no other, so it
/// must be given up before anybody is served.
#[rstest]
#[case::in_a_begin("begin", 503)]
#[case::in_a_statement("insert into reservation", 503)]
#[case::in_a_commit("commit", 503)]
#[case::in_a_look_up("from reservation_now", 503)]
#[case::in_a_rollback("rollback", 500)]
#[tokio::test]
async fn a_connection_that_falls_silent_in_use_is_given_up(#[case] after: &'static str, #[case] status: u16) {
    /// The deadline of a statement is 12 s; a transaction that Postgres has to end itself takes 15 s.
    const IN_TIME: Duration = Duration::from_secs(40);

    let (environment, proxy) = behind_a_proxy(|settings| settings.database_pool_size = 1).await;
    let address = environment.address();
    proxy.inject(Fault::Blackhole(after));
    let answer = match after {
        "from reservation_now" => {
            let path = format!("/api/reservations/{}", uuid::Uuid::nil());
            within("an answer", ask(address, "GET", &path, &[], "")).await
        }
        "rollback" => within("an answer", reserve(address, 1, "panic-in-a-transaction")).await,
        _ => within("an answer", reserve(address, 1, "first")).await,
    };
    assert_eq!(answer.status, status, "{answer:?}");
    until("the fault strikes", async || proxy.connections_blackholed() == 1).await;
    proxy.inject(Fault::None);

    let served = async { while reserve(address, 1, "again").await.status != 201 {} };
    let served = tokio::time::timeout(IN_TIME, served).await;
    served.expect("the connection is not given up");
    environment.server.shut_down().await.expect("it drains");
}

/// The tables of a running server get a column, as a migration of its next version does it.
#[tokio::test]
async fn a_new_column_disturbs_nobody() {
    let environment = common::environment_with(|settings| settings.database_pool_size = 1).await;
    let reserved = reserve(environment.address(), 1, "first").await;
    let path = reserved.header("location").to_owned();
    let look_up = async || ask(environment.address(), "GET", &path, &[], "").await;
    assert_eq!(look_up().await.status, 200);
    run(
        &environment,
        "alter table reservation add column note text;
         create or replace view reservation_now as
         select id, sale_id, buyer_id, request_key, status, now() as changed_at, note
           from reservation",
    )
    .await;
    let again = look_up().await;
    assert_eq!(again.status, 200, "{again:?}");
    assert_eq!(reserve(environment.address(), 2, "second").await.status, 201);
}

/// A column gets another type, which no prepared statement survives. One request may find that out.
#[tokio::test]
async fn a_column_of_another_type_disturbs_one_request_and_not_one_for_each_connection() {
    const CONNECTIONS: u32 = 3;

    let environment = common::environment_with(|settings| settings.database_pool_size = CONNECTIONS).await;
    fill_the_pool(&environment, CONNECTIONS).await;
    let path = reserve(environment.address(), 1, "first")
        .await
        .header("location")
        .to_owned();
    let look_up = async || ask(environment.address(), "GET", &path, &[], "").await.status;
    // The connections take turns.
    for _ in 0..2 * CONNECTIONS {
        assert_eq!(look_up().await, 200);
    }
    run(
        &environment,
        "drop view reservation_now;
         create view reservation_now as
         select id, sale_id, buyer_id, request_key, status::varchar as status, now() as changed_at
           from reservation",
    )
    .await;
    assert_eq!(
        look_up().await,
        503,
        "the fault did not strike: the statements are still valid"
    );
    for _ in 0..2 * CONNECTIONS {
        assert_eq!(look_up().await, 200);
    }
}

async fn run(environment: &TestEnvironment, statements: &'static str) {
    let mut connection: PgConnection = environment.connect().await;
    sqlx::raw_sql(statements)
        .execute(&mut connection)
        .await
        .expect("it is run");
    connection.close().await.expect("it closes");
}
