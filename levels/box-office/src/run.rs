//! A server as a program: parse the settings, start, print the address, serve until a signal.

use std::{
    io::{self, Write},
    process::ExitCode,
};

use clap::{Args, Command, FromArgMatches, error::ErrorKind};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use tokio::{
    runtime::Runtime,
    signal::unix::{SignalKind, signal},
};

use crate::{Level, Server, Settings, Strategy, explain, telemetry, unset_if_empty};

/// The exit code for a wrong flag or variable.
const USAGE: u8 = 2;

/// The `main` of a level's server: `fn main() -> ExitCode { box_office::main(&LEVEL) }`.
///
/// The exit code is 0 after a graceful shutdown that aborted nothing, 2 if a flag or variable is
/// wrong, 3 if a backend is missing, and 1 otherwise.
pub fn main(level: &'static Level) -> ExitCode {
    let strategies: Vec<String> = level
        .strategies
        .iter()
        .map(|strategy| format!("  {:24} {}", strategy.name, strategy.summary))
        .collect();
    let command = unset_if_empty(Settings::augment_args(Command::new(level.package)))
        .about(level.summary)
        .after_help(format!("Strategies:\n{}", strategies.join("\n")));
    let parsed = command
        .clone()
        .try_get_matches()
        .and_then(|matches| Settings::from_arg_matches(&matches));
    let settings = match parsed {
        Ok(settings) => settings,
        Err(help) if help.kind() == ErrorKind::DisplayHelp => {
            // The reader may leave before its end: `… --help | head -1`.
            let _ = help.print();
            return ExitCode::SUCCESS;
        }
        Err(error) => return fail(USAGE, explain(&error, &command)),
    };
    let strategy = match &settings.strategy {
        None => level.strategies.first(),
        Some(name) => level.strategy(name),
    };
    match strategy {
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
