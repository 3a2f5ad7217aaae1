//! A commit that takes its time, and that Postgres carries out to the end whoever has left.

use sqlx::{PgPool, Postgres, pool::PoolConnection};

use crate::{backends::TestEnvironment, until};

/// Commits of reservations in one database, which Postgres has taken and does not carry out before it is let. It does so to the end, whether or not
/// the client is still there, as when a commit waits for a slow disk or a standby.
pub struct DelayedCommits {
    database: PgPool,
    holds: PoolConnection<Postgres>,
}

impl DelayedCommits {
    /// Holds them from here on.
    ///
    /// # Errors
    /// The database does not do as asked.
    pub async fn on(environment: &TestEnvironment) -> anyhow::Result<Self> {
        let database = environment.database().pool(2).await?;
        let mut holds = database.acquire().await?;
        // A trigger that is put off runs inside of the commit. It waits for longer than any statement may.
        sqlx::raw_sql(
            "create function waits() returns trigger language plpgsql set lock_timeout = 0 as $$
                 begin
                     perform pg_advisory_xact_lock_shared(1);
                     return null;
                 end $$;
             create constraint trigger waits after insert on reservation
                 deferrable initially deferred for each row execute function waits();
             select pg_advisory_lock(1);",
        )
        .execute(&mut *holds)
        .await?;
        Ok(Self { database, holds })
    }

    /// How many backends wait for a lock of such kinds, in the words of `pg_stat_activity`.
    ///
    /// # Errors
    /// The database does not answer.
    pub async fn waiting(&self, kinds: &str) -> sqlx::Result<i64> {
        let waiting = sqlx::query_scalar(
            "select count(*)
               from pg_stat_activity
              where datname = current_database()
                and wait_event_type = 'Lock'
                and wait_event = any(string_to_array($1, ' '))",
        );
        waiting.bind(kinds).fetch_one(&self.database).await
    }

    /// Whether a commit is on its way.
    ///
    /// # Errors
    /// The database does not answer.
    pub async fn has_struck(&self) -> sqlx::Result<bool> {
        Ok(self.waiting("advisory").await? > 0)
    }

    /// Ends the connections of those that are on their way: Postgres takes them back. Tells how many.
    ///
    /// # Errors
    /// The database does not answer.
    pub async fn fail(&self) -> sqlx::Result<i64> {
        sqlx::query_scalar(
            "select count(*) filter (where pg_terminate_backend(pid))
               from pg_stat_activity
              where datname = current_database()
                and wait_event_type = 'Lock'
                and wait_event = 'advisory'",
        )
        .fetch_one(&self.database)
        .await
    }

    /// Lets them, and waits until all are carried out.
    ///
    /// # Errors
    /// The database does not do as asked.
    ///
    /// # Panics
    /// After 20 seconds some still are not.
    pub async fn release(mut self) -> sqlx::Result<()> {
        sqlx::query("select pg_advisory_unlock(1)")
            .execute(&mut *self.holds)
            .await?;
        // Each keeps its advisory lock until what it has committed can be seen.
        let on_their_way = "select count(*)
                              from pg_locks
                             where locktype = 'advisory'
                               and database = (select oid from pg_database where datname = current_database())";
        until("all is committed", async || {
            let left = sqlx::query_scalar(on_their_way).fetch_one(&self.database);
            left.await.is_ok_and(|left: i64| left == 0)
        })
        .await;
        drop(self.holds);
        self.database.close().await;
        Ok(())
    }
}
