//! Flags and environment: the same names everywhere, and one clear line where a value is wrong.

use std::{
    env,
    error::Error,
    fmt,
    net::{IpAddr, Ipv4Addr},
    ops::RangeInclusive,
    path::PathBuf,
    str::FromStr,
    time::Duration,
};

use clap::{
    Arg, Command, ValueEnum,
    error::{ContextKind, ContextValue, ErrorKind},
};
use sqlx::postgres::PgConnectOptions;
use subtle::ConstantTimeEq;
use tracing_subscriber::EnvFilter;

use crate::BreakpointSpec;

/// The log lines that are written unless told otherwise. sqlx passes on Postgres's notices, which say nothing to an operator.
const LOG: &str = "info,sqlx=warn";

/// What a server is told when it starts.
#[derive(Clone, Debug, clap::Args)]
#[command(next_help_heading = "Server")]
pub struct Settings {
    /// The Postgres database to sell from
    #[arg(long, env = "DATABASE_URL", hide_env_values = true, value_name = "URL")]
    pub database_url: Option<DatabaseUrl>,
    /// How many connections to the database a server opens at most
    #[arg(long, env = "DATABASE_POOL_SIZE", value_name = "N", default_value_t = Settings::default().database_pool_size, value_parser = pool_size)]
    pub database_pool_size: u32,
    /// The Redis server, for a strategy that needs one
    #[arg(long, env = "REDIS_URL", hide_env_values = true, value_name = "URL")]
    pub redis_url: Option<RedisUrl>,
    /// What every key and channel in Redis begins with
    #[arg(long, env = "REDIS_PREFIX", value_name = "TEXT", default_value = "oversold:", value_parser = prefix)]
    pub redis_prefix: String,
    /// How long a lock in Redis outlives its holder, in milliseconds: its lease
    #[arg(long = "lock-lease-ms", env = "LOCK_LEASE_MS", value_name = "MS", default_value = "10000", value_parser = lease)]
    pub lock_lease: Duration,
    /// The Kafka brokers to begin with, for a strategy that needs Kafka
    #[arg(long, env = "KAFKA_BOOTSTRAP_SERVERS", value_name = "HOST:PORT,…", value_parser = kafka_bootstrap_servers)]
    pub kafka_bootstrap_servers: Option<String>,
    /// What the name of every topic and group in Kafka begins with
    #[arg(long, env = "KAFKA_PREFIX", value_name = "TEXT", default_value = "oversold.", value_parser = kafka_prefix)]
    pub kafka_prefix: String,
    /// How many consumers this server runs; with 0 it accepts orders, and other servers decide them
    #[arg(long, env = "KAFKA_CONSUMERS", value_name = "N", default_value = "1", value_parser = consumers)]
    pub kafka_consumers: u32,
    /// How long the group waits for a silent consumer before it gives its partitions to others, in milliseconds
    #[arg(long = "kafka-session-ms", env = "KAFKA_SESSION_MS", value_name = "MS", default_value = "10000", value_parser = session)]
    pub kafka_session: Duration,
    /// The address to listen on
    #[arg(long, env = "HOST", value_name = "ADDRESS", default_value_t = Settings::default().host, value_parser = host)]
    pub host: IpAddr,
    /// The port to listen on; 0 takes any free one
    #[arg(long, env = "PORT", default_value_t = 8080, value_parser = port)]
    pub port: u16,
    /// Which of the level's strategies sells; the first unless told otherwise
    #[arg(long, env = "STRATEGY", value_name = "NAME")]
    pub strategy: Option<String>,
    /// What this server is called in logs, metrics and Postgres's list of connections
    #[arg(long, env = "INSTANCE", value_name = "NAME", default_value = "1", value_parser = instance)]
    pub instance: String,
    /// Business time that every reservation spends inside its critical section, in milliseconds
    #[arg(long = "work-ms", env = "WORK_MS", value_name = "MS", default_value = "0", value_parser = work)]
    pub work: Duration,
    /// Who knows it may open sales; without one nobody may
    #[arg(
        long = "admin-token",
        env = "OVERSOLD_ADMIN_TOKEN",
        hide_env_values = true,
        value_name = "TOKEN"
    )]
    pub admin_token: Option<AdminToken>,
    /// How log lines on stderr are written
    #[arg(long, env = "LOG_FORMAT", value_enum, default_value_t = LogFormat::Pretty)]
    pub log_format: LogFormat,
    /// Which log lines are written: a level, or levels by module
    #[arg(long, env = "RUST_LOG", value_name = "FILTER", default_value = LOG, value_parser = log_filter)]
    pub log: String,
    /// Where to write every step of every reservation as JSON lines, when the server ends
    #[arg(long = "trace-file", env = "OVERSOLD_TRACE_FILE", value_name = "FILE")]
    pub trace_file: Option<PathBuf>,
    /// Where to stop this process (SIGSTOP), as if it froze there: for tests of what then happens
    #[arg(long = "stop-at", env = "OVERSOLD_STOP_AT", value_name = "POINT#TIME")]
    pub stop_at: Option<BreakpointSpec>,
    /// How long and how big things may get.
    #[arg(skip)]
    pub limits: Limits,
}

impl Default for Settings {
    /// What a server does when it is told nothing.
    fn default() -> Self {
        Self {
            database_url: None,
            // Few: a hot row serves one transaction at a time, and whoever else stands before it is in its way. `oversold bench --pools` measures it.
            database_pool_size: 4,
            redis_url: None,
            redis_prefix: "oversold:".to_owned(),
            lock_lease: Duration::from_secs(10),
            kafka_bootstrap_servers: None,
            kafka_prefix: "oversold.".to_owned(),
            kafka_consumers: 1,
            kafka_session: Duration::from_secs(10),
            host: IpAddr::V4(Ipv4Addr::LOCALHOST),
            port: 8080,
            strategy: None,
            instance: "1".to_owned(),
            work: Duration::ZERO,
            admin_token: None,
            log_format: LogFormat::Pretty,
            log: LOG.to_owned(),
            trace_file: None,
            stop_at: None,
            limits: Limits::default(),
        }
    }
}

/// How long and how big things may get. A test that has to see one strike makes it smaller.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// How many clients may be connected at once; more wait until one leaves. Never more than half of the files that the
    /// process may open.
    pub connections: usize,
    /// How many reservations may be under way at once, those included whose buyers have hung up; who comes then is told to come again.
    pub reservations: usize,
    /// How long a client may leave what it is sent untaken (Linux only).
    pub tcp_user_timeout: Duration,
    /// How long the headers of a request may take. A connection that is idle for so long is closed as well.
    pub header_timeout: Duration,
    /// How long the body of a request may take.
    pub body_timeout: Duration,
    /// How long the body of a request may be, in bytes.
    pub body_bytes: usize,
    /// How long the readiness probe looks for its backends.
    pub probe_timeout: Duration,
    /// How long a client that is connected when the server ends has to say what it wants.
    pub shutdown_grace: Duration,
    /// How long a server that ends waits for what is in flight.
    pub drain_timeout: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            connections: 8192,
            reservations: 8192,
            tcp_user_timeout: Duration::from_secs(30),
            header_timeout: Duration::from_secs(30),
            body_timeout: Duration::from_secs(10),
            body_bytes: 16 * 1024,
            probe_timeout: Duration::from_secs(2),
            shutdown_grace: Duration::from_millis(500),
            drain_timeout: Duration::from_secs(20),
        }
    }
}

/// How log lines are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum LogFormat {
    /// For people.
    Pretty,
    /// One JSON object a line.
    Json,
}

/// Where the database is. Its password shows nowhere.
#[derive(Clone)]
pub struct DatabaseUrl(PgConnectOptions);

impl DatabaseUrl {
    /// What the variable takes, for messages.
    pub(crate) const TAKES: &'static str =
        "the URL of a Postgres database, such as postgres://user:password@localhost:5432/oversold";

    /// How to connect.
    pub(crate) fn options(&self) -> &PgConnectOptions {
        &self.0
    }
}

impl FromStr for DatabaseUrl {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let scheme = text.split_once("://").map(|(scheme, _)| scheme);
        if !matches!(scheme, Some("postgres" | "postgresql")) {
            return Err(Self::TAKES);
        }
        // The parser's own words may quote the URL, and with it the password.
        text.parse().map(Self).map_err(|_| Self::TAKES)
    }
}

impl fmt::Debug for DatabaseUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("DatabaseUrl(…)")
    }
}

impl fmt::Display for DatabaseUrl {
    /// Where the database is, without who connects.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let database = self.0.get_database().unwrap_or(self.0.get_username());
        match self.0.get_socket() {
            Some(socket) => write!(f, "{}, database {database}", socket.display()),
            None => write!(f, "{}:{}, database {database}", self.0.get_host(), self.0.get_port()),
        }
    }
}

/// Where Redis is. Its password shows nowhere.
#[derive(Clone)]
pub struct RedisUrl(url::Url);

impl RedisUrl {
    /// What the variable takes, for messages.
    pub(crate) const TAKES: &'static str = "the URL of a Redis server, such as redis://:password@localhost:6379/0";

    /// The whole URL, password included.
    pub fn expose(&self) -> &str {
        self.0.as_str()
    }
}

impl FromStr for RedisUrl {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        // The parser's own words may quote the URL, and with it the password.
        let url = url::Url::parse(text).map_err(|_| Self::TAKES)?;
        if url.scheme() != "redis" || url.host().is_none() {
            return Err(Self::TAKES);
        }
        Ok(Self(url))
    }
}

impl fmt::Debug for RedisUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("RedisUrl(…)")
    }
}

impl fmt::Display for RedisUrl {
    /// Where Redis is, without who connects.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const USUAL_PORT: u16 = 6379;
        let host = self.0.host_str().unwrap_or_default();
        write!(f, "{host}:{}", self.0.port().unwrap_or(USUAL_PORT))
    }
}

/// What an admin call has to carry. Shows nowhere.
#[derive(Clone)]
pub struct AdminToken(String);

impl AdminToken {
    /// Whether this is the token. Takes as long for a near miss as for a far one.
    pub(crate) fn is(&self, offered: &[u8]) -> bool {
        self.0.as_bytes().ct_eq(offered).into()
    }
}

impl FromStr for AdminToken {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        if text.is_empty() || !text.bytes().all(|byte| byte.is_ascii_graphic()) {
            return Err("one or more visible ASCII characters without spaces");
        }
        Ok(Self(text.to_owned()))
    }
}

impl fmt::Debug for AdminToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("AdminToken(…)")
    }
}

fn whole_number<T: FromStr + PartialOrd>(
    text: &str,
    range: RangeInclusive<T>,
    takes: &'static str,
) -> Result<T, &'static str> {
    match text.parse() {
        Ok(number) if range.contains(&number) => Ok(number),
        _ => Err(takes),
    }
}

fn pool_size(text: &str) -> Result<u32, &'static str> {
    whole_number(text, 1..=1_000, "a number of connections, 1 to 1000")
}

fn host(text: &str) -> Result<IpAddr, &'static str> {
    text.parse()
        .map_err(|_| "an IP address, such as 127.0.0.1, or 0.0.0.0 for every interface")
}

fn port(text: &str) -> Result<u16, &'static str> {
    whole_number(text, 0..=u16::MAX, "a port number, 0 (any free one) to 65535")
}

/// A reservation that holds longer than this would be cut off by the database's own time-outs.
fn work(text: &str) -> Result<Duration, &'static str> {
    whole_number(text, 0..=10_000, "a number of milliseconds, 0 to 10000").map(Duration::from_millis)
}

/// What `KAFKA_BOOTSTRAP_SERVERS` takes, for messages.
pub(crate) const BOOTSTRAP_SERVERS: &str = "the addresses of Kafka brokers, such as localhost:9092,localhost:9093";

/// Reads `KAFKA_BOOTSTRAP_SERVERS`, for a command that has no other settings of a server.
///
/// # Errors
/// What it takes.
pub fn kafka_bootstrap_servers(text: &str) -> Result<String, &'static str> {
    let address = |text: &str| {
        text.rsplit_once(':')
            .is_some_and(|(host, port)| !host.is_empty() && port.parse::<u16>().is_ok_and(|port| port > 0))
    };
    if text.split(',').all(address) {
        Ok(text.to_owned())
    } else {
        Err(BOOTSTRAP_SERVERS)
    }
}

/// Reads `KAFKA_PREFIX`: as Kafka allows it in a topic's name, and short enough to leave room for the rest.
///
/// # Errors
/// What it takes.
pub fn kafka_prefix(text: &str) -> Result<String, &'static str> {
    let legal = |byte: u8| byte.is_ascii_alphanumeric() || b"._-".contains(&byte);
    if text.len() <= 100 && text.bytes().all(legal) {
        Ok(text.to_owned())
    } else {
        Err("up to 100 letters, digits, dots, underscores and hyphens")
    }
}

fn consumers(text: &str) -> Result<u32, &'static str> {
    whole_number(text, 0..=64, "a number of consumers, 0 to 64")
}

fn session(text: &str) -> Result<Duration, &'static str> {
    // Kafka's client takes no session that is longer than it may be without asking for messages: `max.poll.interval.ms`.
    whole_number(text, 500..=300_000, "a number of milliseconds, 500 to 300000").map(Duration::from_millis)
}

fn lease(text: &str) -> Result<Duration, &'static str> {
    whole_number(text, 10..=600_000, "a number of milliseconds, 10 to 600000").map(Duration::from_millis)
}

fn prefix(text: &str) -> Result<String, &'static str> {
    if text.len() > 100 || !text.bytes().all(|byte| byte.is_ascii_graphic()) {
        return Err("at most 100 visible ASCII characters without spaces");
    }
    Ok(text.to_owned())
}

fn log_filter(text: &str) -> Result<String, &'static str> {
    match EnvFilter::try_new(text) {
        Ok(_) => Ok(text.to_owned()),
        Err(_) => Err("a tracing filter, such as info or box_office=debug"),
    }
}

fn instance(text: &str) -> Result<String, &'static str> {
    let fits = (1..=40).contains(&text.len());
    if !fits || !text.bytes().all(|byte| byte.is_ascii_graphic()) {
        return Err("a name of 1 to 40 visible ASCII characters without spaces");
    }
    Ok(text.to_owned())
}

/// Says in one line what is wrong with the command line or the environment: which variable, what it held (unless that
/// is a secret), and what it takes.
pub fn explain(error: &clap::Error, command: &Command) -> String {
    // Before it is built, a command does not know how its arguments are written.
    let mut command = command.clone();
    command.build();
    let command = &command;
    let argument = match error.get(ContextKind::InvalidArg) {
        // Both are right, each without the other.
        _ if error.kind() == ErrorKind::ArgumentConflict => None,
        Some(ContextValue::String(shown)) => arguments(command).find(|argument| argument.to_string() == *shown),
        _ => None,
    };
    let Some(argument) = argument else {
        // clap does not say which value is not UTF-8.
        let unreadable = arguments(command).find(|argument| {
            let value = argument.get_env().and_then(env::var_os);
            value.is_some_and(|value| value.to_str().is_none())
        });
        if error.kind() != ErrorKind::ArgumentConflict
            && let Some(ContextValue::Strings(missing)) = error.get(ContextKind::InvalidArg)
        {
            return format!("{} is missing; --help lists what there is", missing.join(" and "));
        }
        return match (error.kind(), unreadable) {
            (ErrorKind::InvalidUtf8, Some(argument)) => {
                format!("{} holds something that is not UTF-8; it takes text", name(argument))
            }
            (ErrorKind::MissingRequiredArgument, _) => {
                let missing = match error.get(ContextKind::InvalidArg) {
                    Some(ContextValue::Strings(missing)) => missing.join(" and "),
                    _ => "an argument".to_owned(),
                };
                format!("{missing} is missing; --help lists what there is")
            }
            // clap's first line says what is wrong; the rest is advice.
            _ => {
                let text = error.render().to_string();
                let line = text.lines().next().unwrap_or_default();
                format!("{}; --help lists what there is", line.trim_start_matches("error: "))
            }
        };
    };

    let held = match error.get(ContextKind::InvalidValue) {
        _ if argument.is_hide_env_values_set() => "holds something else (not shown: it is a secret)".to_owned(),
        Some(ContextValue::String(value)) if !value.is_empty() => format!("holds {value:?}"),
        _ => "holds nothing".to_owned(),
    };
    let takes = match (error.source(), error.get(ContextKind::ValidValue)) {
        (Some(takes), _) => takes.to_string(),
        (None, Some(ContextValue::Strings(known))) if !known.is_empty() => known.join(" or "),
        _ => "a value".to_owned(),
    };
    format!("{} {held}; it takes {takes}", name(argument))
}

/// The variable and the flag that an argument can come from.
fn name(argument: &Arg) -> String {
    let flag = argument.get_long().map(|long| format!("--{long}"));
    let variable = argument
        .get_env()
        .map(|variable| variable.to_string_lossy().into_owned());
    match (variable, flag) {
        (Some(variable), Some(flag)) => format!("{variable} ({flag})"),
        (Some(only), None) | (None, Some(only)) => only,
        (None, None) => argument.get_id().to_string(),
    }
}

/// Every argument of a command and of its subcommands.
fn arguments(command: &Command) -> Box<dyn Iterator<Item = &Arg> + '_> {
    Box::new(
        command
            .get_arguments()
            .chain(command.get_subcommands().flat_map(arguments)),
    )
}
