//! Logging to stderr. Stdout is reserved for the line with the address that the server listens on.

use std::{
    env,
    io::{self, IsTerminal},
    panic,
};

use tracing_subscriber::EnvFilter;

use crate::{LogFormat, Settings};

/// Installs the process-wide subscriber and panic hook. Only for a program's `main`.
pub(crate) fn start(settings: &Settings) {
    // The filter was validated when the settings were parsed.
    let filter = EnvFilter::new(&settings.log);
    let lines = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(io::stderr)
        // It would report a log line that nobody reads any more with `eprintln!`, which panics then.
        .log_internal_errors(false);
    // A subscriber that is already installed stays.
    let _ = match settings.log_format {
        LogFormat::Json => lines.json().try_init(),
        LogFormat::Pretty => {
            let colours = io::stderr().is_terminal() && env::var_os("NO_COLOR").is_none();
            lines.with_ansi(colours).try_init()
        }
    };
    panic::set_hook(Box::new(|panic| tracing::error!(%panic, "panicked")));
}
