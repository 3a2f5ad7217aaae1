//! Fault: commits that Postgres delays and then completes, even if the client has disconnected.

use sqlx::{AssertSqlSafe, PgPool, Postgres, pool::PoolConnection};

use crate::{backends::TestEnvironment, until};

/// Delays commits in one database until they are released. Postgres completes each commit even if
/// its client has disconnected, as when a commit waits for a slow disk or a standby.
pub struct DelayedCommits {
    database: PgPool,
    holder: PoolConnection<Postgres>,
}

impl DelayedCommits {
    /// Starts to delay the commits of reservations.
    ///
    /// # Errors
    /// Fails if a statement fails.
    pub async fn on(environment: &TestEnvironment) -> anyhow::Result<Self> {
        Self::of(environment, "insert on reservation").await
    }

    /// Starts to delay the commits of this change, in the words of `create trigger`: `update of fence
    /// on sale`.
    ///
    /// # Errors
    /// Fails if a statement fails.
    pub async fn of(environment: &TestEnvironment, change: &str) -> anyhow::Result<Self> {
        let database = environment.database().pool(2).await?;
        let mut holder = database.acquire().await?;
        // A deferred trigger runs inside the commit. Its wait exceeds the lock timeout of the
        // strategies.
        sqlx::raw_sql(AssertSqlSafe(format!(
            "create function waits() returns trigger language plpgsql set lock_timeout = 0 as $$
                 begin
                     perform pg_advisory_xact_lock_shared(1);
                     return null;
                 end $$;
             create constraint trigger waits after {change}
                 deferrable initially deferred for each row execute function waits();
             select pg_advisory_lock(1);",
        )))
        .execute(&mut *holder)
        .await?;
        Ok(Self { database, holder })
    }

    /// The number of backends that wait for a lock of these kinds, which are names of
    /// `pg_stat_activity.wait_event` separated by spaces.
    ///
    /// # Errors
    /// Fails if the database does not answer.
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

    /// Whether a commit is being delayed.
    ///
    /// # Errors
    /// Fails if the database does not answer.
    pub async fn has_struck(&self) -> sqlx::Result<bool> {
        Ok(self.waiting("advisory").await? > 0)
    }

    /// Terminates the backends of the delayed commits, which Postgres rolls back. Returns their
    /// number.
    ///
    /// # Errors
    /// Fails if the database does not answer.
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

    /// Releases the delayed commits, and waits until all have completed.
    ///
    /// # Errors
    /// Fails if a statement fails.
    ///
    /// # Panics
    /// Panics if some are not complete after 20 seconds.
    pub async fn release(mut self) -> sqlx::Result<()> {
        sqlx::query("select pg_advisory_unlock(1)")
            .execute(&mut *self.holder)
            .await?;
        // Each commit keeps its advisory lock until its changes are visible.
        let on_their_way = "select count(*)
                              from pg_locks
                             where locktype = 'advisory'
                               and database = (select oid from pg_database where datname = current_database())";
        until("all is committed", async || {
            let left = sqlx::query_scalar(on_their_way).fetch_one(&self.database);
            left.await.is_ok_and(|left: i64| left == 0)
        })
        .await;
        drop(self.holder);
        self.database.close().await;
        Ok(())
    }
}
