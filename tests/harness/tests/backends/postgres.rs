//! Postgres: its settings, the databases of tests, and a server that is stopped and killed.

use std::{borrow::Cow, env, net::TcpStream, sync::LazyLock, thread, time::Instant};

use box_office::Schema;
use harness::backends::{self, Database, Durability, Postgres};
use sqlx::{
    Connection, PgConnection, SqlSafeStr,
    migrate::{Migration, MigrationType, Migrator},
};

use crate::{child::TIMEOUT, child_roles::break_private};

/// A schema with one table.
pub(crate) fn schema(name: &'static str) -> Schema {
    fn one(sql: &'static str) -> Migrator {
        let description = Cow::Borrowed("one table");
        let sql = sql.into_sql_str();
        Migrator::with_migrations(vec![Migration::new(1, description, MigrationType::Simple, sql, false)])
    }
    static TICKETS: LazyLock<Migrator> = LazyLock::new(|| one("create table tickets (id int primary key)"));
    static SEATS: LazyLock<Migrator> = LazyLock::new(|| one("create table seats (id int primary key)"));
    Schema {
        name,
        migrations: if name == "seats" { &SEATS } else { &TICKETS },
    }
}

pub(crate) async fn connect(database: &Database) -> PgConnection {
    PgConnection::connect(&database.url()).await.unwrap()
}

async fn show(connection: &mut PgConnection, setting: &'static str) -> String {
    let shown = sqlx::query_scalar("select current_setting($1)").bind(setting);
    shown.fetch_one(connection).await.unwrap()
}

pub(crate) async fn serve() {
    let postgres = backends::postgres().await.unwrap();
    let database = postgres.database(schema("tickets")).await.unwrap();
    let pool = database.pool(2).await.unwrap();
    sqlx::query("insert into tickets values (1)")
        .execute(&pool)
        .await
        .unwrap();

    let mut connection = connect(&database).await;
    for (setting, value) in [
        ("max_connections", "500"),
        ("deadlock_timeout", "10ms"),
        ("fsync", "off"),
        ("full_page_writes", "off"),
        ("synchronous_commit", "on"),
        ("server_encoding", "UTF8"),
    ] {
        assert_eq!(show(&mut connection, setting).await, value, "{setting}");
    }

    let report = postgres.report();
    assert_eq!(report.source.name(), env::var("OVERSOLD_BACKENDS").unwrap());
    assert_eq!(report.version, show(&mut connection, "server_version").await);
    assert_eq!(report.durability["fsync"], "off");
    assert!(TcpStream::connect(&report.address).is_ok(), "{report}");
}

pub(crate) async fn durable() {
    let postgres = Postgres::find(Durability::Durable).await.unwrap();
    for setting in ["fsync", "synchronous_commit", "full_page_writes"] {
        assert_eq!(postgres.report().durability[setting], "on", "{setting}");
    }
}

pub(crate) fn race() {
    let databases: Vec<(&str, Database)> = thread::scope(|scope| {
        let threads: Vec<_> = (0..8)
            .map(|number| {
                scope.spawn(move || {
                    let name = if number % 2 == 0 { "tickets" } else { "seats" };
                    let runtime = tokio::runtime::Builder::new_current_thread()
                        .enable_all()
                        .build()
                        .unwrap();
                    let database = runtime.block_on(async {
                        let postgres = backends::postgres().await.unwrap();
                        postgres.database(schema(name)).await.unwrap()
                    });
                    (name, database)
                })
            })
            .collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    });
    let runtime = tokio::runtime::Runtime::new().unwrap();
    runtime.block_on(async {
        for (name, database) in &databases {
            let mut connection = connect(database).await;
            let insert = format!("insert into {name} values (1)");
            // The primary key would reject a second row, written by another test.
            sqlx::raw_sql(sqlx::AssertSqlSafe(insert))
                .execute(&mut connection)
                .await
                .unwrap();
        }
        let postgres = backends::postgres().await.unwrap();
        let later = postgres.database(schema("tickets")).await.unwrap();
        let rows = sqlx::query_scalar("select count(*) from tickets");
        let rows: i64 = rows.fetch_one(&mut connect(&later).await).await.unwrap();
        assert_eq!(rows, 0, "what a test writes does not reach the template");
    });
}

pub(crate) async fn drop_database() {
    let postgres = backends::postgres().await.unwrap();
    let [kept, dropped] = [
        postgres.database(schema("tickets")).await.unwrap(),
        postgres.database(schema("tickets")).await.unwrap(),
    ];
    let _still_connected = connect(&dropped).await;
    let mut connection = connect(&kept).await;
    let names = async |connection: &mut PgConnection| -> Vec<String> {
        let names = sqlx::query_scalar("select datname from pg_database where datname like 'tickets%'");
        names.fetch_all(connection).await.unwrap()
    };
    assert_eq!(names(&mut connection).await.len(), 2);
    drop(dropped);
    let began = Instant::now();
    while names(&mut connection).await.len() > 1 {
        assert!(began.elapsed() < TIMEOUT, "waited for the database to be dropped");
    }
}

pub(crate) async fn stop_and_kill() {
    let postgres = Postgres::private(Durability::Fast).await.unwrap();
    let database = postgres.database(schema("tickets")).await.unwrap();
    let write = async |number: i64| {
        let mut connection = connect(&database).await;
        let insert = sqlx::query("insert into tickets values ($1)").bind(number);
        insert.execute(&mut connection).await.unwrap();
        connection
    };
    let is_cut = async |mut connection: PgConnection| connection.ping().await.is_err();
    let written = async || {
        let rows = sqlx::query_scalar("select count(*) from tickets");
        let mut connection = PgConnection::connect(&database.url()).await.ok()?;
        Some(rows.fetch_one(&mut connection).await.unwrap())
    };
    // What was committed is still there.
    let left = [1, 2, 3];
    break_private(&postgres, &postgres.report().address, write, is_cut, written, left).await;
}
