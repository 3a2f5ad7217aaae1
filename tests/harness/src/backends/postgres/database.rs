//! One database for each test, cloned from a migrated template, and the cleanup of databases that a
//! killed run left on an external server.

use std::{
    hash::{DefaultHasher, Hash, Hasher},
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, bail};
use box_office::Schema;
use percent_encoding::percent_decode_str;
use sqlx::{
    AssertSqlSafe, ConnectOptions, Connection, PgConnection, PgPool,
    postgres::{PgConnectOptions, PgPoolOptions},
};
use tokio::time::timeout;

use super::{Postgres, Server};
use crate::broken_pipe;

/// Time limit until the connections to a template have closed after its migration.
const DISCONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// Time limit for dropping a database, for a server that hangs or is gone.
const DROPPED_WITHIN: Duration = Duration::from_secs(10);

impl Postgres {
    /// Creates a database with the tables of `schema`. Dropping the value drops the database.
    ///
    /// # Errors
    /// Fails if the server does not answer or a migration fails.
    pub async fn database(&self, schema: Schema) -> anyhow::Result<Database> {
        static MADE: AtomicU32 = AtomicU32::new(0);
        let number = MADE.fetch_add(1, Ordering::Relaxed);
        let (name, template) = match &self.server {
            // An external server has no template, which would stay behind.
            Server::External(owner) => (format!("{}{number}", owner.prefix()), None),
            Server::Managed(_) => (format!("{}_{number}", schema.name), Some(self.template(schema).await?)),
        };
        let database = Database {
            options: self.admin.clone().database(&name),
            admin: self.admin.clone(),
            name,
            wait: matches!(self.server, Server::External(_)),
        };
        let context = || format!("making a database of schema {}", schema.name);
        let mut admin = self.admin.connect().await.with_context(context)?;
        let statement = match &template {
            None => format!("create database {}", quoted(&database.name)),
            Some(template) => format!(
                "create database {} template {}",
                quoted(&database.name),
                quoted(template)
            ),
        };
        run(&mut admin, statement).await.with_context(context)?;
        admin.close().await?;
        if template.is_none() {
            migrate(&database.options, schema).await.with_context(context)?;
        }
        Ok(database)
    }

    /// The name of the migrated template of a schema, created on first use.
    async fn template(&self, schema: Schema) -> anyhow::Result<String> {
        // Two levels may use the same name for their schemas.
        let mut hash = DefaultHasher::new();
        for migration in schema.migrations.iter() {
            migration.checksum.hash(&mut hash);
        }
        let name = format!("template_{}_{:016x}", schema.name, hash.finish());
        let made = Arc::clone(self.templates.lock().await.entry(name.clone()).or_default());
        made.get_or_try_init(|| async {
            let mut admin = self.admin.connect().await?;
            // Left behind by a cancelled call.
            run(
                &mut admin,
                format!("drop database if exists {} with (force)", quoted(&name)),
            )
            .await?;
            run(&mut admin, format!("create database {}", quoted(&name))).await?;
            migrate(&self.admin.clone().database(&name), schema).await?;
            // A template can be cloned only while no session is connected to it. Postgres would
            // check again only after 100 ms.
            wait_for_disconnects(&mut admin, &name).await?;
            admin.close().await?;
            anyhow::Ok(())
        })
        .await
        .with_context(|| format!("making the template of schema {}", schema.name))?;
        Ok(name)
    }
}

/// Waits until no session is connected to a database: a backend ends a moment after its client has
/// disconnected.
async fn wait_for_disconnects(admin: &mut PgConnection, name: &str) -> anyhow::Result<()> {
    let began = Instant::now();
    loop {
        let connected: Vec<String> = sqlx::query_scalar(
            "select format('%s %s (%s)', backend_type, pid, application_name)
               from pg_stat_activity
              where datname = $1",
        )
        .bind(name)
        .fetch_all(&mut *admin)
        .await?;
        if connected.is_empty() {
            return Ok(());
        }
        if began.elapsed() > DISCONNECT_TIMEOUT {
            bail!(
                "waited {DISCONNECT_TIMEOUT:?} for the last connection to {name} to close, but there is {}",
                connected.join(", ")
            );
        }
        tokio::task::yield_now().await;
    }
}

async fn run(connection: &mut PgConnection, statement: String) -> sqlx::Result<()> {
    sqlx::raw_sql(AssertSqlSafe(statement))
        .execute(connection)
        .await
        .map(drop)
}

async fn migrate(options: &PgConnectOptions, schema: Schema) -> anyhow::Result<()> {
    let mut connection = options.connect().await?;
    schema.migrations.run_direct(None, &mut connection, false).await?;
    Ok(connection.close().await?)
}

/// A quoted SQL identifier.
fn quoted(name: &str) -> String {
    format!("\"{}\"", name.replace('"', "\"\""))
}

/// A database of one test. Dropping it closes its connections and drops the database.
pub struct Database {
    name: String,
    options: PgConnectOptions,
    admin: PgConnectOptions,
    /// Whether the drop waits for the server: true if the server outlives this process.
    wait: bool,
}

impl Database {
    /// Its URL, including the password. [`without_secrets`](crate::backends::without_secrets) masks
    /// it for messages.
    pub fn url(&self) -> String {
        self.options.to_url_lossy().to_string()
    }

    /// The environment variables that connect Postgres's own programs to it. On a command line,
    /// other users could see the password.
    pub fn environment(&self) -> Vec<(&'static str, String)> {
        let url = self.options.to_url_lossy();
        let mut environment = vec![
            ("PGHOST", self.options.get_host().to_owned()),
            ("PGPORT", self.options.get_port().to_string()),
            ("PGUSER", self.options.get_username().to_owned()),
            ("PGDATABASE", self.name.clone()),
        ];
        if let Some(password) = url.password() {
            environment.push((
                "PGPASSWORD",
                percent_decode_str(password).decode_utf8_lossy().into_owned(),
            ));
        }
        if let Some((_, mode)) = url.query_pairs().find(|(name, _)| name == "sslmode") {
            environment.push(("PGSSLMODE", mode.into_owned()));
        }
        environment
    }

    /// Opens a pool with this maximum number of connections. The pool belongs to the current
    /// runtime.
    ///
    /// # Errors
    /// Fails if the server does not answer.
    pub async fn pool(&self, size: u32) -> sqlx::Result<PgPool> {
        let options = PgPoolOptions::new().max_connections(size);
        options.connect_with(self.options.clone()).await
    }
}

impl Drop for Database {
    fn drop(&mut self) {
        let (admin, name) = (self.admin.clone(), quoted(&self.name));
        // In a separate thread and runtime: the drop may happen inside a runtime, at its end, or
        // outside of any.
        let dropping = thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
            let dropping = async {
                let mut admin = admin.connect().await?;
                run(&mut admin, format!("drop database if exists {name} with (force)")).await
            };
            runtime.is_ok_and(|runtime| {
                let dropped = runtime.block_on(async { timeout(DROPPED_WITHIN, dropping).await });
                matches!(dropped, Ok(Ok(())))
            })
        });
        if self.wait && !dropping.join().unwrap_or(false) {
            broken_pipe::notice(format_args!(
                "database {} could not be dropped; the next run tries again",
                self.name
            ));
        }
    }
}

/// The registration of this run on an external server: shows other runs that it is alive and which
/// databases are its own.
pub(super) struct ExternalOwner {
    number: u32,
    /// Listed in `pg_stat_activity` under the owner's name as long as this process lives.
    _connection: PgConnection,
}

impl ExternalOwner {
    const PREFIX: &str = "oversold_";

    /// Registers this run, and drops the databases of runs that were killed.
    pub(super) async fn register(admin: &PgConnectOptions, mut sweeper: PgConnection) -> anyhow::Result<Self> {
        let number = rand::random();
        let connection = admin
            .clone()
            .application_name(&format!("{}{number}", Self::PREFIX))
            .connect()
            .await?;

        let abandoned: Vec<String> = sqlx::query_scalar(
            "select datname from pg_database as made
             where datname ~ '^oversold_[0-9]+_[0-9]+$'
               and datdba = (select oid from pg_roles where rolname = current_user)
               and not exists (
                 select from pg_stat_activity where application_name = substring(made.datname from '^oversold_[0-9]+')
               )",
        )
        .fetch_all(&mut sweeper)
        .await?;
        for name in abandoned {
            run(
                &mut sweeper,
                format!("drop database if exists {} with (force)", quoted(&name)),
            )
            .await?;
        }
        sweeper.close().await?;
        Ok(Self {
            number,
            _connection: connection,
        })
    }

    /// The prefix of the names of its databases.
    fn prefix(&self) -> String {
        format!("{}{}_", Self::PREFIX, self.number)
    }
}
