//! The state of the latest sales, which the metrics show: read when they are scraped, and never in
//! between.

use std::time::Duration;

use sqlx::{ConnectOptions, Connection as _, PgConnection, postgres::PgConnectOptions};
use tokio::{
    sync::{Mutex, MutexGuard},
    time::timeout,
};

use crate::causes;

/// How many sales are shown. Each is a few time series.
const SALES: i64 = 10;

/// The timeout of a scrape for the database: Prometheus has one of its own, and needs the other
/// metrics when the database is away.
const TIMEOUT: Duration = Duration::from_secs(1);

/// The reservations of one sale that have one status. A sale without reservations is one row, too.
#[derive(Debug, sqlx::FromRow)]
pub(crate) struct SaleState {
    pub(crate) sale_id: i64,
    pub(crate) capacity: i64,
    pub(crate) stock: i64,
    /// `None`: the sale has no reservations.
    pub(crate) status: Option<String>,
    pub(crate) reservations: i64,
}

/// Reads the state of the latest sales on a connection of its own: it must not wait for the pool,
/// nor may a reservation wait for it.
#[derive(Debug, Default)]
pub(crate) struct SaleStates(Mutex<Option<PgConnection>>);

/// The connection of one scrape. Another scrape waits until it is dropped.
pub(crate) struct Scrape<'a>(MutexGuard<'a, Option<PgConnection>>);

impl SaleStates {
    /// Begins a scrape.
    pub(crate) async fn scrape(&self) -> Scrape<'_> {
        Scrape(self.0.lock().await)
    }
}

impl Scrape<'_> {
    /// The latest sales.
    ///
    /// # Errors
    /// Why they could not be read in time.
    pub(crate) async fn read(&mut self, options: &PgConnectOptions) -> Result<Vec<SaleState>, String> {
        // A connection whose query fails or is cancelled is closed.
        let kept = self.0.take();
        let read = async {
            let mut connection = match kept {
                Some(connection) => connection,
                None => {
                    let name = options.get_application_name().unwrap_or_default();
                    let named = options.clone().application_name(&format!("{name} metrics"));
                    named.connect().await?
                }
            };
            let mut tx = connection.begin().await?;
            // A query that nobody waits for any longer ends, too. `local`: a pooler has other clients on this connection.
            sqlx::query("set local statement_timeout = '1s'")
                .execute(&mut *tx)
                .await?;
            // Two instances may read at once: `stock` and reservations are of one snapshot.
            let states = sqlx::query_as(
                "select sale_id,
                        capacity::bigint as capacity,
                        stock::bigint as stock,
                        status,
                        count(id) as reservations
                   from (select sale_id, capacity, stock
                           from sale_now
                          order by sale_id desc
                          limit $1) as latest
                   left join (select sale_id, id, status from reservation_now) as reservation
                  using (sale_id)
                  group by sale_id, capacity, stock, status",
            )
            .bind(SALES)
            .fetch_all(&mut *tx)
            .await?;
            tx.commit().await?;
            Ok::<_, sqlx::Error>((connection, states))
        };
        match timeout(TIMEOUT, read).await {
            Ok(Ok((connection, states))) => {
                *self.0 = Some(connection);
                Ok(states)
            }
            Ok(Err(why)) => Err(causes(&why)),
            Err(_) => Err(format!("no answer within {TIMEOUT:?}")),
        }
    }
}
