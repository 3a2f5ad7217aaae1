//! A server as a program: read the settings, start, say where, serve until told to stop.

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

use crate::{Level, Server, Settings, Strategy, explain, telemetry};

/// A wrong flag or variable.
const USAGE: u8 = 2;

/// The whole of a level's server program: `fn main() -> ExitCode { box_office::main(&LEVEL) }`.
///
/// It exits with 0 after a graceful end, which cuts nothing off, 2 if a flag or variable is wrong, 3 if a backend is missing, 1 for all else.
pub fn main(level: &'static Level) -> ExitCode {
    let strategies: Vec<String> = level
        .strategies
        .iter()
        .map(|strategy| format!("  {:24} {}", strategy.name, strategy.summary))
        .collect();
    let command = Settings::augment_args(Command::new(level.package))
        .about(level.summary)
        .after_help(format!("Strategies:\n{}", strategies.join("\n")));
    let parsed = command
        .clone()
        .try_get_matches()
        .and_then(|matches| Settings::from_arg_matches(&matches));
    let settings = match parsed {
        Ok(settings) => settings,
        Err(help) if help.kind() == ErrorKind::DisplayHelp => {
            return match help.print() {
                Ok(()) => ExitCode::SUCCESS,
                Err(_) => ExitCode::FAILURE,
            };
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
            let known: Vec<&str> = level.strategies.iter().map(|strategy| strategy.name).collect();
            let held = settings.strategy.as_deref().unwrap_or_default();
            let takes = known.join(" or ");
            fail(USAGE, format!("STRATEGY (--strategy) holds {held:?}; it takes {takes}"))
        }
    }
}

/// Sells with one strategy of a level until SIGTERM or Ctrl-C, then drains.
///
/// Once it is ready it prints one line on stdout, which ends in its address; all else goes to stderr.
pub fn serve(level: &'static Level, strategy: &'static Strategy, settings: &Settings) -> ExitCode {
    telemetry::start(settings);
    raise_open_files_limit();
    let runtime = match Runtime::new() {
        Ok(runtime) => runtime,
        Err(why) => return fail(1, format!("no runtime: {why}")),
    };
    let code = runtime.block_on(serve_until_signal(level, strategy, settings));
    // Whatever was not drained in time is let go, not waited for.
    runtime.shutdown_background();
    code
}

async fn serve_until_signal(level: &'static Level, strategy: &'static Strategy, settings: &Settings) -> ExitCode {
    // Listened for before anybody can know that there is a server to stop.
    let signals = (signal(SignalKind::terminate()), signal(SignalKind::interrupt()));
    let (mut terminate, mut interrupt) = match signals {
        (Ok(terminate), Ok(interrupt)) => (terminate, interrupt),
        (Err(why), _) | (_, Err(why)) => return fail(1, format!("no signals: {why}")),
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
    // Nobody may be reading: the server serves all the same.
    let _ = writeln!(io::stdout(), "{ready}");

    let told = tokio::select! {
        _ = terminate.recv() => "SIGTERM",
        _ = interrupt.recv() => "Ctrl-C",
    };
    tracing::info!(by = told, "told to stop");
    match server.shut_down().await {
        Ok(()) => {
            tracing::info!("drained");
            ExitCode::SUCCESS
        }
        Err(cut_off) => {
            tracing::error!("{cut_off}");
            ExitCode::FAILURE
        }
    }
}

fn fail(code: u8, why: String) -> ExitCode {
    // Straight to stderr: without settings there is no telemetry yet, and this line must not depend on its filter.
    let _ = writeln!(io::stderr(), "error: {why}");
    ExitCode::from(code)
}

/// Lets this process open as many files as the system allows: a thousand buyers are a thousand sockets, and the usual
/// soft limit is 1,024.
pub fn raise_open_files_limit() {
    /// macOS calls its hard limit infinite, and refuses a soft limit over this.
    const MOST: u64 = 10_240;

    let Rlimit { current, maximum } = getrlimit(Resource::Nofile);
    let wanted = maximum.unwrap_or(MOST);
    if current.is_some_and(|current| current < wanted) {
        let raised = Rlimit {
            current: Some(wanted),
            maximum,
        };
        if let Err(why) = setrlimit(Resource::Nofile, raised) {
            tracing::warn!(%why, "the limit of open files stays at {current:?}");
        }
    }
}
