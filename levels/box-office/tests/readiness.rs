//! The readiness probe: a database that answers and does not do what a sale needs.

mod common;

use std::net::SocketAddr;

use common::{Answer, LEVEL, ask, on, reserve, start};
use harness::{
    backends::{Durability, Postgres},
    until,
};
use sqlx::{AssertSqlSafe, ConnectOptions, Connection, Executor, PgConnection, postgres::PgConnectOptions};

/// What breaks the database for reservations, what repairs it, and a part of the reason that the
/// server gives.
const FAULTS: [[&str; 3]; 5] = [
    [
        "alter system set default_transaction_read_only = on",
        "alter system reset default_transaction_read_only",
        "read-only transaction",
    ],
    [
        "alter table reservation rename to elsewhere",
        "alter table elsewhere rename to reservation",
        "\\\"reservation\\\" does not exist",
    ],
    // Not a full disk, but what Postgres says of one, wherever a file has to grow.
    [
        "create function full_disk() returns event_trigger language plpgsql as $$
         begin
             raise 'could not extend file' using errcode = 'disk_full';
         end $$;
         create event trigger full_disk on ddl_command_start
             when tag in ('CREATE TABLE AS') execute function full_disk()",
        "drop function full_disk cascade",
        "could not extend file",
    ],
    [
        "revoke insert on reservation from seller",
        "grant insert on reservation to seller",
        "permission denied for table reservation",
    ],
    [
        "revoke update on sale from seller",
        "grant update on sale to seller",
        "permission denied for table sale",
    ],
];

#[tokio::test]
async fn a_database_that_rejects_reservations_is_not_ready_until_it_takes_them() {
    let postgres = Postgres::private(Durability::Fast)
        .await
        .unwrap_or_else(|missing| panic!("{missing}"));
    let database = postgres.database(LEVEL.strategies[0].schema).await.expect("a database");
    let mut admin = PgConnection::connect(&database.url()).await.expect("a connection");
    let mut run = async |statement: &str| {
        for statement in [statement, "select pg_reload_conf()"] {
            let done = admin.execute(AssertSqlSafe(statement)).await;
            done.unwrap_or_else(|why| panic!("{statement}: {why}"));
        }
    };
    run("set default_transaction_read_only = off").await;
    run("create role seller login superuser password 'seller'").await;
    let options: PgConnectOptions = database.url().parse().expect("a URL");
    let url = options.username("seller").password("seller").to_url_lossy();
    let server = start(&on(url.as_str())).await;
    // It was one for the migrations only.
    run("alter role seller nosuperuser").await;
    run("grant select, insert, update on all tables in schema public to seller").await;

    for (buyer, [fault, remedy, why]) in (0..).zip(FAULTS) {
        until_ready(server.address()).await;
        run(fault).await;
        until("the server not to be ready", async || {
            ready(server.address()).await.status == 503
        })
        .await;
        let answer = ready(server.address()).await;
        answer.is_problem(503, "backend-away");
        assert!(answer.text().contains(why), "{fault}: {}", answer.text());
        let key = format!("key-{buyer}");
        // The test double writes no stock and extends no file.
        if !fault.contains("sale") && !fault.contains("disk") {
            assert_eq!(reserve(server.address(), buyer, &key).await.status, 503, "{fault}");
        }

        run(remedy).await;
        until_ready(server.address()).await;
        assert_eq!(reserve(server.address(), buyer, &key).await.status, 201, "{fault}");
    }
}

async fn ready(server: SocketAddr) -> Answer {
    ask(server, "GET", "/readyz", &[], "").await
}

async fn until_ready(server: SocketAddr) {
    until("the server to be ready", async || ready(server).await.status == 200).await;
}
