//! A server as a program: parse the settings, start, print the address, serve until a signal.

use std::{
    io::{self, Read, Write},
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream},
    process::ExitCode,
    time::Duration,
};

use clap::{Arg, ArgAction, Args, Command, FromArgMatches, error::ErrorKind};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use tokio::{
    runtime::Runtime,
    signal::unix::{SignalKind, signal},
};

use crate::{Level, Server, Settings, Strategy, explain, server, telemetry, unset_if_empty};

/// The exit code for a wrong flag or variable.
const USAGE: u8 = 2;

/// The timeout of `--health`: longer than that of the readiness probe.
const HEALTH_TIMEOUT: Duration = Duration::from_secs(3);

/// The `main` of a level's server: `fn main() -> ExitCode { box_office::main(&LEVEL) }`.
///
/// With `--migrate` it only prepares the database, and with `--health` it only asks the server that
/// listens on `PORT` whether it is ready: what a container needs besides the server itself.
///
/// The exit code is 0 after a graceful shutdown that aborted nothing, 2 if a flag or variable is
/// wrong, 3 if a backend is missing, and 1 otherwise.
pub fn main(level: &'static Level) -> ExitCode {
    let strategies: Vec<String> = level
        .strategies
        .iter()
        .map(|strategy| format!("  {:24} {}", strategy.name, strategy.summary))
        .collect();
    let once = |name: &'static str, help: &'static str| Arg::new(name).long(name).action(ArgAction::SetTrue).help(help);
    let command = unset_if_empty(Settings::augment_args(Command::new(level.package)))
        .arg(
            once(
                "migrate",
                "Create the database if there is none, run the migrations, and exit",
            )
            .conflicts_with("health"),
        )
        .arg(once(
            "health",
            "Ask the server that listens on PORT whether it is ready, and exit",
        ))
        .about(level.summary)
        .after_help(format!("Strategies:\n{}", strategies.join("\n")));
    let parsed = command
        .clone()
        .try_get_matches()
        .and_then(|matches| Ok((Settings::from_arg_matches(&matches)?, matches)));
    let (settings, matches) = match parsed {
        Ok(parsed) => parsed,
        Err(help) if help.kind() == ErrorKind::DisplayHelp => {
            // The reader may leave before its end: `… --help | head -1`.
            let _ = help.print();
            return ExitCode::SUCCESS;
        }
        Err(error) => return fail(USAGE, explain(&error, &command)),
    };
    if matches.get_flag("health") {
        return match health(&settings) {
            Ok(()) => ExitCode::SUCCESS,
            Err(why) => fail(1, format!("not ready: {why}")),
        };
    }
    let strategy = match &settings.strategy {
        None => level.strategies.first(),
        Some(name) => level.strategy(name),
    };
    match strategy {
        Some(strategy) if matches.get_flag("migrate") => migrate(level, strategy, &settings),
        Some(strategy) => serve(level, strategy, &settings),
        None => {
            let known: Vec<&str> = level.all().map(|strategy| strategy.name).collect();
            let held = settings.strategy.as_deref().unwrap_or_default();
            let expected = known.join(" or ");
            fail(
                USAGE,
                format!("STRATEGY (--strategy) holds {held:?}; expected {expected}"),
            )
        }
    }
}

/// Prepares the database of a strategy: for instances that are started together, once before them.
fn migrate(level: &'static Level, strategy: &'static Strategy, settings: &Settings) -> ExitCode {
    telemetry::start(settings);
    let migrated = Runtime::new().map(|runtime| runtime.block_on(server::migrate(level, strategy, settings)));
    match migrated {
        Ok(Ok(())) => ExitCode::SUCCESS,
        Ok(Err(why)) => fail(why.exit_code(), why.to_string()),
        Err(why) => fail(1, format!("the runtime could not be created: {why}")),
    }
}

/// Asks the server on `HOST` and `PORT` whether it is ready.
///
/// # Errors
/// Its answer, if it is not; the error of the connection.
fn health(settings: &Settings) -> io::Result<()> {
    let host = match settings.host {
        IpAddr::V4(host) if host.is_unspecified() => Ipv4Addr::LOCALHOST.into(),
        IpAddr::V6(host) if host.is_unspecified() => Ipv6Addr::LOCALHOST.into(),
        host => host,
    };
    let mut server = TcpStream::connect_timeout(&SocketAddr::new(host, settings.port), HEALTH_TIMEOUT)?;
    server.set_read_timeout(Some(HEALTH_TIMEOUT))?;
    server.set_write_timeout(Some(HEALTH_TIMEOUT))?;
    server.write_all(b"GET /readyz HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")?;
    let mut answer = String::new();
    server.read_to_string(&mut answer)?;
    match answer.starts_with("HTTP/1.1 200 ") {
        true => Ok(()),
        false => Err(io::Error::other(answer.lines().last().unwrap_or_default().to_owned())),
    }
}

/// Serves one strategy of a level until SIGTERM or Ctrl-C, then shuts down gracefully.
///
/// Once it listens it prints one line to stdout, which ends in its address; everything else goes to
/// stderr.
pub fn serve(level: &'static Level, strategy: &'static Strategy, settings: &Settings) -> ExitCode {
    telemetry::start(settings);
    raise_open_files_limit();
    let runtime = match Runtime::new() {
        Ok(runtime) => runtime,
        Err(why) => return fail(1, format!("the runtime could not be created: {why}")),
    };
    let code = runtime.block_on(serve_until_signal(level, strategy, settings));
    // Does not wait for tasks that were not drained in time.
    runtime.shutdown_background();
    code
}

async fn serve_until_signal(level: &'static Level, strategy: &'static Strategy, settings: &Settings) -> ExitCode {
    // Install the handlers first: a signal during the startup must end the server as well.
    let signals = (signal(SignalKind::terminate()), signal(SignalKind::interrupt()));
    let (mut terminate, mut interrupt) = match signals {
        (Ok(terminate), Ok(interrupt)) => (terminate, interrupt),
        (Err(why), _) | (_, Err(why)) => return fail(1, format!("the signal handlers could not be installed: {why}")),
    };
    let server = tokio::select! {
        started = Server::start(level, strategy, settings) => match started {
            Ok(server) => server,
            Err(why) => return fail(why.exit_code(), why.to_string()),
        },
        _ = terminate.recv() => return ExitCode::SUCCESS,
        _ = interrupt.recv() => return ExitCode::SUCCESS,
    };

    let ready = format!(
        "{}/{} listens on http://{}",
        level.name,
        strategy.name,
        server.address()
    );
    // Stdout may be closed; the server serves all the same.
    let _ = writeln!(io::stdout(), "{ready}");
    server.arm_breakpoint();

    let signal = tokio::select! {
        _ = terminate.recv() => "SIGTERM",
        _ = interrupt.recv() => "Ctrl-C",
    };
    tracing::info!(signal, "shutting down");
    match server.shut_down().await {
        Ok(()) => {
            tracing::info!("drained");
            ExitCode::SUCCESS
        }
        Err(timeout) => {
            tracing::error!("{timeout}");
            ExitCode::FAILURE
        }
    }
}

/// Prints the error, and returns the exit code.
fn fail(code: u8, why: String) -> ExitCode {
    // Not a log line: the subscriber may not be installed yet, and its filter must not hide this.
    let _ = writeln!(io::stderr(), "error: {why}");
    ExitCode::from(code)
}

/// Raises the soft limit of open files (`RLIMIT_NOFILE`) to the hard limit: a thousand buyers are a
/// thousand sockets, and the usual soft limit is 1,024.
pub fn raise_open_files_limit() {
    /// macOS reports an infinite hard limit, and rejects a soft limit above this.
    const MOST: u64 = 10_240;

    let Rlimit { current, maximum } = getrlimit(Resource::Nofile);
    let wanted = maximum.unwrap_or(MOST);
    if current.is_some_and(|current| current < wanted) {
        let raised = Rlimit {
            current: Some(wanted),
            maximum,
        };
        if let Err(why) = setrlimit(Resource::Nofile, raised) {
            tracing::warn!(%why, "RLIMIT_NOFILE could not be raised from {current:?}");
        }
    }
}
