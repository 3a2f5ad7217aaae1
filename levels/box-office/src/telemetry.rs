//! Log lines, on stderr: stdout belongs to the one line that says where the server listens.

use std::{
    env,
    io::{self, IsTerminal},
    panic,
};

use tracing_subscriber::EnvFilter;

use crate::{LogFormat, Settings};

/// Sends the whole process's log lines to stderr, panics included. For a program's `main`, never for a library.
pub(crate) fn start(settings: &Settings) {
    // The settings were read with the same filter: what can't be parsed does not come this far.
    let filter = EnvFilter::new(&settings.log);
    let lines = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(io::stderr);
    // A program that has its own subscriber keeps it.
    let _ = match settings.log_format {
        LogFormat::Json => lines.json().try_init(),
        LogFormat::Pretty => {
            let colours = io::stderr().is_terminal() && env::var_os("NO_COLOR").is_none();
            lines.with_ansi(colours).try_init()
        }
    };
    panic::set_hook(Box::new(|panic| tracing::error!(%panic, "panicked")));
}
