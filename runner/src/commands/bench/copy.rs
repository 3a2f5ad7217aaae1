//! The ceiling of a backlog: `COPY` of the rows that it leaves, on one connection and in one transaction. It reads nothing and decides
//! nothing, and is the fastest way into Postgres's tables.

use std::time::{Duration, Instant};

use anyhow::ensure;
use futures_util::TryStreamExt;
use sqlx::{PgConnection, PgPool};

/// The tables that a consumer writes a row to for each order.
const TABLES: [&str; 2] = ["reservation", "outbox"];

/// The rows of a table, as `COPY` writes and reads them.
pub(super) struct TableRows {
    table: &'static str,
    text: Vec<u8>,
}

/// Copies the rows out of a database.
pub(super) async fn rows(database: &PgPool) -> anyhow::Result<Vec<TableRows>> {
    let mut connection = database.acquire().await?;
    let mut all = vec![];
    for table in TABLES {
        let chunks = connection.copy_out_raw(&format!("copy {table} to stdout")).await?;
        let text = chunks
            .try_fold(vec![], async |mut text: Vec<u8>, chunk| {
                text.extend_from_slice(&chunk);
                Ok(text)
            })
            .await?;
        all.push(TableRows { table, text });
    }
    Ok(all)
}

/// Copies them into another one, and returns how long that took, the durable commit included.
///
/// # Errors
/// A table got another number of rows than there were orders, or the database failed.
pub(super) async fn copy_in(database: &PgPool, rows: &[TableRows], orders: u32) -> anyhow::Result<Duration> {
    let mut connection = database.acquire().await?;
    let began = Instant::now();
    sqlx::query("begin").execute(&mut *connection).await?;
    for TableRows { table, text } in rows {
        let copied = copy_table(&mut connection, table, text).await?;
        ensure!(
            copied == u64::from(orders),
            "{table} has {copied} rows for {orders} orders"
        );
    }
    sqlx::query("commit").execute(&mut *connection).await?;
    Ok(began.elapsed())
}

async fn copy_table(connection: &mut PgConnection, table: &str, text: &[u8]) -> anyhow::Result<u64> {
    let mut copy = connection.copy_in_raw(&format!("copy {table} from stdin")).await?;
    copy.send(text).await?;
    Ok(copy.finish().await?)
}
