//! The first connection to a database: that it is Postgres, with the settings of this server in
//! force, and has the tables of this schema.

use std::time::Duration;

use sqlx::{
    AssertSqlSafe, ConnectOptions, Connection, PgConnection, Row,
    migrate::MigrateError,
    postgres::{PgConnectOptions, PgRow},
};
use tokio::time::timeout;

use super::DATABASE_TIMEOUTS;
use crate::{DatabaseUrl, Schema, StartError};

/// The timeout of the first connection, and of the checks that follow.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// The timeout of all migrations, including the wait for another instance that runs them.
const MIGRATION_TIMEOUT: Duration = Duration::from_secs(60);

/// Checks the session that Postgres gives to this server, and runs the migrations. On a connection
/// of its own: the pool would hide why the database is unreachable.
///
/// Several instances may do this at once, because sqlx holds an advisory lock meanwhile.
///
/// # Errors
/// [`StartError::Database`], [`StartError::Pooler`], [`StartError::OtherTables`] or
/// [`StartError::Migrations`].
pub(crate) async fn prepare(
    connect: &PgConnectOptions,
    url: &DatabaseUrl,
    level: &'static str,
    schema: Schema,
) -> Result<(), StartError> {
    let failed = |why: sqlx::Error| unusable(url, &why);
    let connected = timeout(CONNECT_TIMEOUT, connect.connect()).await;
    let mut connection = connected.map_err(|_| silent(url))?.map_err(failed)?;
    let checked = timeout(CONNECT_TIMEOUT, check_session(&mut connection, connect, url)).await;
    checked.map_err(|_| silent(url))??;
    let migrating = async {
        // A migration may take longer than a statement of a reservation.
        let unlimited = sqlx::raw_sql("set lock_timeout = 0; set statement_timeout = 0");
        unlimited.execute(&mut connection).await.map_err(failed)?;
        let migrated = schema.migrations.run(&mut connection).await;
        migrated.map_err(|why| not_migrated(why, url, level, schema))?;
        connection.close().await.map_err(failed)
    };
    timeout(MIGRATION_TIMEOUT, migrating).await.unwrap_or_else(|_| {
        Err(StartError::Database {
            place: url.to_string(),
            why: format!("the migrations did not end within {MIGRATION_TIMEOUT:?}"),
        })
    })
}

/// Creates the database of this URL if the server does not have it.
///
/// # Errors
/// [`StartError::Database`].
pub(crate) async fn create(url: &DatabaseUrl) -> Result<(), StartError> {
    /// SQLSTATE `invalid_catalog_name`: there is no such database.
    const NO_DATABASE: &str = "3D000";
    /// SQLSTATE `duplicate_database` and `unique_violation`: another client has created it meanwhile.
    const EXISTS: [&str; 2] = ["42P04", "23505"];

    let code = |why: &sqlx::Error| Some(why.as_database_error()?.code()?.into_owned());
    let options = url.options();
    let created = async {
        match options.connect().await {
            Err(why) if code(&why).as_deref() == Some(NO_DATABASE) => {}
            connected => return connected?.close().await,
        }
        let name = options.get_database().unwrap_or(options.get_username());
        let mut connection = options.clone().database("postgres").connect().await?;
        let statement = format!("create database \"{}\"", name.replace('"', "\"\""));
        match sqlx::raw_sql(AssertSqlSafe(statement)).execute(&mut connection).await {
            Err(why) if !code(&why).is_some_and(|code| EXISTS.contains(&code.as_str())) => Err(why),
            _ => connection.close().await,
        }
    };
    match timeout(CONNECT_TIMEOUT, created).await {
        Ok(created) => created.map_err(|why| unusable(url, &why)),
        Err(_) => Err(silent(url)),
    }
}

/// Checks that each session has a backend of its own, with the timeouts of this server in force.
async fn check_session(
    connection: &mut PgConnection,
    connect: &PgConnectOptions,
    url: &DatabaseUrl,
) -> Result<(), StartError> {
    let failed = |why: sqlx::Error| unusable(url, &why);
    let pooler = |why: String| StartError::Pooler {
        place: url.to_string(),
        why,
    };
    for (setting, expected) in DATABASE_TIMEOUTS {
        let in_force: String = ask(connection, format!("show {setting}")).await.map_err(failed)?.get(0);
        if in_force != expected {
            return Err(pooler(format!("ignores {setting}={expected}, it is {in_force}")));
        }
    }
    // With a pooler in transaction mode, the second session gets the backend that the first has
    // just used.
    let mut second = connect.connect().await.map_err(failed)?;
    let mut backends = [0; 2];
    for (backend, session) in backends.iter_mut().zip([connection, &mut second]) {
        let row = ask(session, "select pg_backend_pid()".to_owned())
            .await
            .map_err(failed)?;
        *backend = row.get::<i32, _>(0);
    }
    if backends[0] == backends[1] {
        return Err(pooler(
            "shares a backend between sessions (transaction mode)".to_owned(),
        ));
    }
    second.close().await.map_err(failed)
}

/// Sends a simple query. A pooler in transaction mode may break prepared statements.
async fn ask(session: &mut PgConnection, statement: String) -> sqlx::Result<PgRow> {
    sqlx::raw_sql(AssertSqlSafe(statement)).fetch_one(session).await
}

fn silent(url: &DatabaseUrl) -> StartError {
    StartError::Database {
        place: url.to_string(),
        why: format!("no answer within {CONNECT_TIMEOUT:?}; is it a Postgres server?"),
    }
}

fn unusable(url: &DatabaseUrl, why: &sqlx::Error) -> StartError {
    let place = url.to_string();
    match why.as_database_error() {
        // PgBouncer's answer to the session settings.
        Some(refused) if refused.message().starts_with("unsupported startup parameter") => StartError::Pooler {
            place,
            why: format!("refuses a session setting ({})", refused.message()),
        },
        _ => StartError::Database {
            place,
            why: why.to_string(),
        },
    }
}

fn not_migrated(why: MigrateError, url: &DatabaseUrl, level: &'static str, schema: Schema) -> StartError {
    /// SQLSTATE `duplicate_table`: a table of this name is there, made without a migration.
    const DUPLICATE_TABLE: &str = "42P07";

    let are_others = match &why {
        MigrateError::VersionMismatch(_) | MigrateError::VersionMissing(_) => true,
        MigrateError::ExecuteMigration(error, _) => error
            .as_database_error()
            .is_some_and(|error| error.code().as_deref() == Some(DUPLICATE_TABLE)),
        _ => false,
    };
    match are_others {
        true => StartError::OtherTables {
            place: url.to_string(),
            level,
            schema: schema.name,
        },
        false => StartError::Migrations {
            schema: schema.name,
            why,
        },
    }
}
