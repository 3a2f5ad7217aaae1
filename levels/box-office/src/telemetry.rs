//! Log lines, on stderr: stdout belongs to the one line that says where the server listens.

use std::{
    env,
    io::{self, IsTerminal},
    panic,
};

use tracing_subscriber::EnvFilter;

use crate::LogFormat;

/// Sends the whole process's log lines to stderr, panics included. For a program's `main`, never for a library.
///
/// # Errors
/// `RUST_LOG` can't be read.
pub(crate) fn start(format: LogFormat) -> Result<(), String> {
    let filter = match env::var("RUST_LOG") {
        Ok(text) => EnvFilter::try_new(&text).map_err(|_| {
            format!("RUST_LOG holds {text:?}; it takes a tracing filter, such as info or box_office=debug")
        })?,
        Err(_) => EnvFilter::new("info"),
    };
    let lines = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(io::stderr);
    // A program that has its own subscriber keeps it.
    let _ = match format {
        LogFormat::Json => lines.json().try_init(),
        LogFormat::Pretty => {
            let colours = io::stderr().is_terminal() && env::var_os("NO_COLOR").is_none();
            lines.with_ansi(colours).try_init()
        }
    };
    panic::set_hook(Box::new(|panic| tracing::error!(%panic, "panicked")));
    Ok(())
}
