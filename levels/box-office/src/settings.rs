//! Settings from flags and environment variables, and the one-line messages about wrong values.

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

use crate::{BreakpointSpec, Improvements};

/// The default log filter. Below `warn`, sqlx logs Postgres's notices, which are noise to an
/// operator.
const LOG: &str = "info,sqlx=warn";

/// The settings of a server. The doc comments of the fields are the text of `--help`.
#[derive(Clone, Debug, clap::Args)]
#[command(next_help_heading = "Server")]
pub struct Settings {
    /// The URL of the Postgres database
    #[arg(long, env = "DATABASE_URL", hide_env_values = true, value_name = "URL")]
    pub database_url: Option<DatabaseUrl>,
    /// The maximum size of the connection pool
    #[arg(long, env = "DATABASE_POOL_SIZE", value_name = "N", default_value_t = Settings::default().database_pool_size, value_parser = pool_size)]
    pub database_pool_size: u32,
    /// The URL of the Redis server, for strategies that need one
    #[arg(long, env = "REDIS_URL", hide_env_values = true, value_name = "URL")]
    pub redis_url: Option<RedisUrl>,
    /// The prefix of every key and channel in Redis
    #[arg(long, env = "REDIS_PREFIX", value_name = "TEXT", default_value = "oversold:", value_parser = prefix)]
    pub redis_prefix: String,
    /// The lease of a lock in Redis, in milliseconds: it expires this long after its last renewal
    #[arg(long = "lock-lease-ms", env = "LOCK_LEASE_MS", value_name = "MS", default_value = "10000", value_parser = lease)]
    pub lock_lease: Duration,
    /// The Kafka bootstrap servers, for strategies that need Kafka
    #[arg(long, env = "KAFKA_BOOTSTRAP_SERVERS", value_name = "HOST:PORT,…", value_parser = kafka_bootstrap_servers)]
    pub kafka_bootstrap_servers: Option<String>,
    /// The prefix of every topic and consumer group in Kafka
    #[arg(long, env = "KAFKA_PREFIX", value_name = "TEXT", default_value = "oversold.", value_parser = kafka_prefix)]
    pub kafka_prefix: String,
    /// The number of consumers of this server; with 0 it only accepts orders, and other servers
    /// process them
    #[arg(long, env = "KAFKA_CONSUMERS", value_name = "N", default_value = "1", value_parser = consumers)]
    pub kafka_consumers: u32,
    /// The session timeout of a consumer (session.timeout.ms), in milliseconds: without heartbeats
    /// for this long it loses its partitions
    #[arg(long = "kafka-session-ms", env = "KAFKA_SESSION_MS", value_name = "MS", default_value = "10000", value_parser = session)]
    pub kafka_session: Duration,
    /// The IP address to listen on
    #[arg(long, env = "HOST", value_name = "ADDRESS", default_value_t = Settings::default().host, value_parser = host)]
    pub host: IpAddr,
    /// The port to listen on; 0 for any free one
    #[arg(long, env = "PORT", default_value_t = 8080, value_parser = port)]
    pub port: u16,
    /// How long a connection may be idle before its next request, in milliseconds. Longer than the idle timeout of a balancer
    /// in front, or it sends requests to connections that are being closed
    #[arg(long = "http-keep-alive-ms", env = "HTTP_KEEP_ALIVE_MS", value_name = "MS", default_value = "75000", value_parser = keep_alive)]
    pub http_keep_alive: Duration,
    /// The strategy; by default the level's first
    #[arg(long, env = "STRATEGY", value_name = "NAME")]
    pub strategy: Option<String>,
    /// The name of this server in logs, metrics and pg_stat_activity
    #[arg(long, env = "INSTANCE", value_name = "NAME", default_value = "1", value_parser = instance)]
    pub instance: String,
    /// The simulated work of every reservation inside its critical section, in milliseconds
    #[arg(long = "work-ms", env = "WORK_MS", value_name = "MS", default_value = "0", value_parser = work)]
    pub work: Duration,
    /// The bearer token of admin calls; without one, sales cannot be opened
    #[arg(
        long = "admin-token",
        env = "OVERSOLD_ADMIN_TOKEN",
        hide_env_values = true,
        value_name = "TOKEN"
    )]
    pub admin_token: Option<AdminToken>,
    /// The origins of other servers, such as http://127.0.0.1:8082: the live page shows their sales beside this one, and theirs
    /// may show this one. A rush that is started from the page is started there, too, with the same admin token
    #[arg(long, env = "LIVE_PEERS", value_name = "ORIGIN,…", value_delimiter = ',', value_parser = Origin::from_str)]
    pub live_peers: Vec<Origin>,
    /// The balancer that the buyers of a rush from the live page connect to, such as http://127.0.0.1:8080; by default this server
    #[arg(long, env = "RUSH_URL", value_name = "ORIGIN", value_parser = rush_url)]
    pub rush_url: Option<Origin>,
    /// The format of log lines on stderr
    #[arg(long, env = "LOG_FORMAT", value_enum, default_value_t = LogFormat::Pretty)]
    pub log_format: LogFormat,
    /// The log filter: a level, or levels by module
    #[arg(long, env = "RUST_LOG", value_name = "FILTER", default_value = LOG, value_parser = log_filter)]
    pub log: String,
    /// The file for the trace of every scheduling point, written as JSON lines when the server
    /// shuts down
    #[arg(long = "trace-file", env = "OVERSOLD_TRACE_FILE", value_name = "FILE")]
    pub trace_file: Option<PathBuf>,
    /// A breakpoint for fault injection: pauses this process (SIGSTOP) at a hit of a scheduling
    /// point
    #[arg(long = "stop-at", env = "OVERSOLD_STOP_AT", value_name = "POINT#HIT")]
    pub stop_at: Option<BreakpointSpec>,
    /// The improvements of LV.4. Each is off unless its setting is given.
    #[command(flatten)]
    pub improvements: Improvements,
    /// Timeouts and size limits. No flags: tests set them.
    #[arg(skip)]
    pub limits: Limits,
}

impl Default for Settings {
    /// The defaults of the flags.
    fn default() -> Self {
        Self {
            database_url: None,
            // Small on purpose: a hot row serves one transaction at a time, and more connections
            // only add row-lock contention. `oversold bench --pools` measures it.
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
            // The usual idle timeout of a balancer is 60 s.
            http_keep_alive: Duration::from_secs(75),
            strategy: None,
            instance: "1".to_owned(),
            work: Duration::ZERO,
            admin_token: None,
            live_peers: vec![],
            rush_url: None,
            log_format: LogFormat::Pretty,
            log: LOG.to_owned(),
            trace_file: None,
            stop_at: None,
            improvements: Improvements::default(),
            limits: Limits::default(),
        }
    }
}

/// Timeouts and size limits of a server. A test that needs to reach one makes it smaller.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// The maximum number of open connections; further clients wait in the backlog. Capped at half
    /// of the open-files limit of the process.
    pub connections: usize,
    /// The maximum number of reservations in flight, including those whose clients have
    /// disconnected; beyond it a request is answered
    /// [`Indeterminate::Overloaded`](crate::Indeterminate::Overloaded).
    pub reservations: usize,
    /// `TCP_USER_TIMEOUT`: the connection is closed when sent data stays unacknowledged this long
    /// (Linux only, see tcp(7)).
    pub tcp_user_timeout: Duration,
    /// The timeout for receiving the body of a request.
    pub body_timeout: Duration,
    /// The maximum size of the body of a request, in bytes.
    pub body_bytes: usize,
    /// The timeout of the readiness probe, over all backends.
    pub probe_timeout: Duration,
    /// The grace period of a shutdown: how long open connections still accept a request.
    pub shutdown_grace: Duration,
    /// The timeout of a graceful shutdown; what is in flight then is aborted.
    pub drain_timeout: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            connections: 8192,
            reservations: 8192,
            tcp_user_timeout: Duration::from_secs(30),
            body_timeout: Duration::from_secs(10),
            body_bytes: 16 * 1024,
            probe_timeout: Duration::from_secs(2),
            shutdown_grace: Duration::from_millis(500),
            drain_timeout: Duration::from_secs(20),
        }
    }
}

/// The format of log lines.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum LogFormat {
    /// Human-readable text.
    Pretty,
    /// One JSON object per line.
    Json,
}

/// The URL of a Postgres database. `Debug` and `Display` hide the password.
#[derive(Clone)]
pub struct DatabaseUrl(PgConnectOptions);

impl DatabaseUrl {
    /// The description of a valid value, for error messages.
    pub(crate) const EXPECTED: &'static str =
        "the URL of a Postgres database, such as postgres://user:password@localhost:5432/oversold";

    /// The connection options, including the password.
    pub(crate) fn options(&self) -> &PgConnectOptions {
        &self.0
    }
}

impl FromStr for DatabaseUrl {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let scheme = text.split_once("://").map(|(scheme, _)| scheme);
        if !matches!(scheme, Some("postgres" | "postgresql")) {
            return Err(Self::EXPECTED);
        }
        // The error of the parser may quote the URL, and with it the password.
        text.parse().map(Self).map_err(|_| Self::EXPECTED)
    }
}

impl fmt::Debug for DatabaseUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("DatabaseUrl(…)")
    }
}

impl fmt::Display for DatabaseUrl {
    /// Host, port and database, without user and password.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let database = self.0.get_database().unwrap_or(self.0.get_username());
        match self.0.get_socket() {
            Some(socket) => write!(f, "{}, database {database}", socket.display()),
            None => write!(f, "{}:{}, database {database}", self.0.get_host(), self.0.get_port()),
        }
    }
}

/// The URL of a Redis server. `Debug` and `Display` hide the password.
#[derive(Clone)]
pub struct RedisUrl(url::Url);

impl RedisUrl {
    /// The description of a valid value, for error messages.
    pub(crate) const EXPECTED: &'static str = "the URL of a Redis server, such as redis://:password@localhost:6379/0";

    /// The URL, including the password.
    pub fn expose(&self) -> &str {
        self.0.as_str()
    }
}

impl FromStr for RedisUrl {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        // The error of the parser may quote the URL, and with it the password.
        let url = url::Url::parse(text).map_err(|_| Self::EXPECTED)?;
        if url.scheme() != "redis" || url.host().is_none() {
            return Err(Self::EXPECTED);
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
    /// Host and port, without user and password.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const DEFAULT_PORT: u16 = 6379;
        let host = self.0.host_str().unwrap_or_default();
        write!(f, "{host}:{}", self.0.port().unwrap_or(DEFAULT_PORT))
    }
}

/// The bearer token of admin calls. `Debug` hides it.
#[derive(Clone)]
pub struct AdminToken(String);

impl AdminToken {
    /// Compares in constant time, so that the response time reveals no prefix of the token.
    pub(crate) fn matches(&self, offered: &[u8]) -> bool {
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

/// The origin of a server: scheme, host and port, and nothing else.
#[derive(Clone, Debug)]
pub struct Origin {
    url: url::Url,
    text: String,
}

impl Origin {
    /// As browsers write it: without a slash at the end, and without the port that is the default.
    pub fn as_str(&self) -> &str {
        &self.text
    }

    /// Where a client connects to.
    pub(crate) fn host_and_port(&self) -> String {
        let host = self.url.host_str().unwrap_or_default();
        format!("{host}:{}", self.url.port_or_known_default().unwrap_or(80))
    }
}

impl FromStr for Origin {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let malformed = "the origin of a server, such as http://127.0.0.1:8080";
        let url = url::Url::parse(text).map_err(|_| malformed)?;
        let is_web = matches!(url.scheme(), "http" | "https") && url.has_host();
        let is_origin = url.path() == "/" && url.query().is_none() && url.fragment().is_none();
        if !is_web || !is_origin || !url.username().is_empty() || url.password().is_some() {
            return Err(malformed);
        }
        let text = url.origin().ascii_serialization();
        Ok(Self { url, text })
    }
}

/// The buyers of a rush speak plain HTTP.
fn rush_url(text: &str) -> Result<Origin, &'static str> {
    let origin: Option<Origin> = text.parse().ok();
    let origin = origin.filter(|origin| origin.url.scheme() == "http");
    origin.ok_or("the origin of a balancer without TLS, such as http://127.0.0.1:8080")
}

/// Parses a number of this range, or describes it.
pub(crate) fn whole_number<T: FromStr + PartialOrd>(
    text: &str,
    range: RangeInclusive<T>,
    expected: &'static str,
) -> Result<T, &'static str> {
    match text.parse() {
        Ok(number) if range.contains(&number) => Ok(number),
        _ => Err(expected),
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

/// More work than this would run into the database's own timeouts.
fn work(text: &str) -> Result<Duration, &'static str> {
    whole_number(text, 0..=10_000, "a number of milliseconds, 0 to 10000").map(Duration::from_millis)
}

/// hyper counts the time from the end of a response to the end of the next headers: shorter than this would cut off slow clients.
fn keep_alive(text: &str) -> Result<Duration, &'static str> {
    whole_number(text, 100..=3_600_000, "a number of milliseconds, 100 to 3600000").map(Duration::from_millis)
}

/// The description of a valid `KAFKA_BOOTSTRAP_SERVERS`, for error messages.
pub(crate) const BOOTSTRAP_SERVERS: &str = "the addresses of Kafka brokers, such as localhost:9092,localhost:9093";

/// Parses `KAFKA_BOOTSTRAP_SERVERS`, for commands without the other settings of a server.
///
/// # Errors
/// A description of a valid value.
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

/// Parses `KAFKA_PREFIX`: the characters that Kafka allows in a topic name, and short enough to
/// leave room for the rest of the name (at most 249 characters).
///
/// # Errors
/// A description of a valid value.
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
    // librdkafka rejects a `session.timeout.ms` over `max.poll.interval.ms`, which is 300000 by
    // default.
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

/// The variables that are not set if they are empty.
const OPTIONAL: [&str; 7] = [
    "DATABASE_URL",
    "REDIS_URL",
    "KAFKA_BOOTSTRAP_SERVERS",
    "PAYMENT_URL",
    "ORDER_TTL_MS",
    "OVERSOLD_ADMIN_TOKEN",
    "STRATEGY",
];

/// Makes an empty variable count as not set, in a command and its subcommands, if it is one that a
/// script or a compose file sets for some servers only: these have no other way to unset one.
pub fn unset_if_empty(command: Command) -> Command {
    let is_empty = |argument: &Arg| {
        let variable = argument.get_env().filter(|name| OPTIONAL.iter().any(|it| name == it));
        variable.and_then(env::var_os).is_some_and(|value| value.is_empty())
    };
    command
        .mut_args(|argument| match is_empty(&argument) {
            true => argument.env(None::<&'static str>),
            false => argument,
        })
        .mut_subcommands(unset_if_empty)
}

/// Explains a command-line error in one line: the variable and flag, the value (unless it is a
/// secret), and a description of a valid value.
pub fn explain(error: &clap::Error, command: &Command) -> String {
    // Only a built command can render its arguments.
    let mut command = command.clone();
    command.build();
    let command = &command;
    let argument = match error.get(ContextKind::InvalidArg) {
        // Each argument is valid without the other, so none is to blame.
        _ if error.kind() == ErrorKind::ArgumentConflict => None,
        Some(ContextValue::String(shown)) => arguments(command).find(|argument| argument.to_string() == *shown),
        _ => None,
    };
    let Some(argument) = argument else {
        return explain_without_argument(error, command);
    };

    let held = match error.get(ContextKind::InvalidValue) {
        _ if argument.is_hide_env_values_set() => "holds an invalid value (not shown: it is a secret)".to_owned(),
        Some(ContextValue::String(value)) if !value.is_empty() => format!("holds {value:?}"),
        _ => "is empty".to_owned(),
    };
    let expected = match (error.source(), error.get(ContextKind::ValidValue)) {
        (Some(expected), _) => expected.to_string(),
        (None, Some(ContextValue::Strings(known))) if !known.is_empty() => known.join(" or "),
        _ => "a value".to_owned(),
    };
    format!("{} {held}; expected {expected}", name(argument))
}

/// Explains an error that clap does not attribute to one argument.
fn explain_without_argument(error: &clap::Error, command: &Command) -> String {
    // clap does not report which value is not UTF-8.
    let not_utf8 = || {
        arguments(command).find(|argument| {
            let value = argument.get_env().and_then(env::var_os);
            value.is_some_and(|value| value.to_str().is_none())
        })
    };
    match (error.kind(), error.get(ContextKind::InvalidArg)) {
        (ErrorKind::ArgumentConflict, _) => first_line(error),
        (_, Some(ContextValue::Strings(missing))) => format!("{} is missing; see --help", missing.join(" and ")),
        (ErrorKind::MissingRequiredArgument, _) => "an argument is missing; see --help".to_owned(),
        (ErrorKind::InvalidUtf8, _) => match not_utf8() {
            Some(argument) => format!("{} is not valid UTF-8", name(argument)),
            None => first_line(error),
        },
        _ => first_line(error),
    }
}

/// The first line of clap's message is the error; the rest is advice.
fn first_line(error: &clap::Error) -> String {
    let text = error.render().to_string();
    let line = text.lines().next().unwrap_or_default();
    format!("{}; see --help", line.trim_start_matches("error: "))
}

/// The variable and the flag of an argument: `PORT (--port)`.
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

/// All arguments of a command and its subcommands.
fn arguments(command: &Command) -> Box<dyn Iterator<Item = &Arg> + '_> {
    Box::new(
        command
            .get_arguments()
            .chain(command.get_subcommands().flat_map(arguments)),
    )
}
