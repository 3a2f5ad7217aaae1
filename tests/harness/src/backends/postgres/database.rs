//! A database of its own for every test, copied from a migrated template.

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

/// How long connections to a template may outlive its migration.
const LEFT_WITHIN: Duration = Duration::from_secs(10);
/// How long a drop may take. It is given up when its server hangs or is gone.
const DROPPED_WITHIN: Duration = Duration::from_secs(10);

impl Postgres {
    /// Makes a fresh database with the tables of `schema`, which goes when it is dropped.
    ///
    /// # Errors
    /// The server does not answer, or a migration fails.
    pub async fn database(&self, schema: Schema) -> anyhow::Result<Database> {
        static MADE: AtomicU32 = AtomicU32::new(0);
        let number = MADE.fetch_add(1, Ordering::Relaxed);
        let (name, template) = match &self.server {
            // On a server of somebody else nothing is to stay behind, so there is no template.
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

    /// The name of the migrated template of a schema, which is made by whoever comes first.
    async fn template(&self, schema: Schema) -> anyhow::Result<String> {
        // Two levels may call their schemas the same.
        let mut hash = DefaultHasher::new();
        for migration in schema.migrations.iter() {
            migration.checksum.hash(&mut hash);
        }
        let name = format!("template_{}_{:016x}", schema.name, hash.finish());
        let made = Arc::clone(self.templates.lock().await.entry(name.clone()).or_default());
        made.get_or_try_init(|| async {
            let mut admin = self.admin.connect().await?;
            // Left by one who was cancelled half way.
            run(
                &mut admin,
                format!("drop database if exists {} with (force)", quoted(&name)),
            )
            .await?;
            run(&mut admin, format!("create database {}", quoted(&name))).await?;
            migrate(&self.admin.clone().database(&name), schema).await?;
            // Nobody may be connected to what is copied: Postgres would look again only after 100 ms.
            nobody_is_connected(&mut admin, &name).await?;
            admin.close().await?;
            anyhow::Ok(())
        })
        .await
        .with_context(|| format!("making the template of schema {}", schema.name))?;
        Ok(name)
    }
}

/// Waits until the last connection to a database is gone: a server process ends a moment after its client has closed.
async fn nobody_is_connected(admin: &mut PgConnection, name: &str) -> anyhow::Result<()> {
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
        if began.elapsed() > LEFT_WITHIN {
            bail!(
                "waited {LEFT_WITHIN:?} until nobody is connected to {name}, but there is {}",
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

/// A name as SQL writes it.
fn quoted(name: &str) -> String {
    format!("\"{}\"", name.replace('"', "\"\""))
}

/// A database that nobody else uses. It goes, with its connections cut, when this is dropped.
pub struct Database {
    name: String,
    options: PgConnectOptions,
    admin: PgConnectOptions,
    /// Whether to wait until it is gone: where the server outlives this process, only then it is sure to be.
    wait: bool,
}

impl Database {
    /// Its URL, password included. [`without_secrets`](crate::backends::without_secrets) makes it fit to be shown.
    pub fn url(&self) -> String {
        self.options.to_url_lossy().to_string()
    }

    /// The same for Postgres's own programs, as the environment that they read: on a command line everybody could see the password.
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

    /// Opens a pool of at most so many connections. The pool belongs to the runtime it was opened on.
    ///
    /// # Errors
    /// The server does not answer.
    pub async fn pool(&self, size: u32) -> sqlx::Result<PgPool> {
        let options = PgPoolOptions::new().max_connections(size);
        options.connect_with(self.options.clone()).await
    }
}

impl Drop for Database {
    fn drop(&mut self) {
        let (admin, name) = (self.admin.clone(), quoted(&self.name));
        // A thread and a runtime of its own: this may be dropped by a runtime, at its end, or outside of any.
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
            eprintln!("database {} could not be dropped; the next run tries again", self.name);
        }
    }
}

/// Tells other runs that this one is alive, and which databases of an external server are its own.
pub(super) struct ExternalOwner {
    number: u32,
    /// Shown in `pg_stat_activity` under the owner's name for as long as this process lives.
    _connection: PgConnection,
}

impl ExternalOwner {
    const PREFIX: &str = "oversold_";

    /// Takes a number, and drops the databases of runs that were killed before they could.
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

    /// What the names of its databases begin with.
    fn prefix(&self) -> String {
        format!("{}{}_", Self::PREFIX, self.number)
    }
}
