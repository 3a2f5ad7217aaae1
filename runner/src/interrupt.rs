//! Ctrl-C and SIGTERM during a measurement.

use std::{fmt, process};

use tokio::signal::unix::{Signal, SignalKind, signal};

/// A signal ended the command.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Interrupted(SignalKind);

impl Interrupted {
    /// The exit code, as shells have it: 130 after Ctrl-C, 143 after SIGTERM.
    pub(crate) fn code(self) -> u8 {
        u8::try_from(128 + self.0.as_raw_value()).unwrap_or(u8::MAX)
    }
}

impl fmt::Display for Interrupted {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self.0 == SignalKind::interrupt() {
            true => "interrupted",
            false => "terminated",
        })
    }
}

impl std::error::Error for Interrupted {}

/// The signals that end a command. Once listened to, one that comes between two pieces of work ends the second.
pub(crate) struct Signals {
    interrupt: Signal,
    terminate: Signal,
}

impl Signals {
    /// Listens from now on, in place of ending the process at once.
    pub(crate) fn listen() -> anyhow::Result<Self> {
        Ok(Self {
            interrupt: signal(SignalKind::interrupt())?,
            terminate: signal(SignalKind::terminate())?,
        })
    }

    /// Drops the work at the first signal, so that its caller can show what was measured until then. Servers and tools end with the work.
    ///
    /// # Errors
    /// [`Interrupted`], or the error of the work.
    pub(crate) async fn or_end<T>(&mut self, work: impl Future<Output = anyhow::Result<T>>) -> anyhow::Result<T> {
        let interrupted = tokio::select! {
            // The signals first: Ctrl-C also reaches the tools, whose end is no failure then.
            biased;
            interrupted = self.next() => interrupted,
            done = work => return done,
        };
        // A second one does not wait for the clean-up, which the reaper completes.
        let mut second = Self::listen()?;
        tokio::spawn(async move {
            let interrupted = second.next().await;
            process::exit(interrupted.code().into())
        });
        Err(interrupted.into())
    }

    /// Waits for the next signal.
    pub(crate) async fn next(&mut self) -> Interrupted {
        tokio::select! {
            _ = self.interrupt.recv() => Interrupted(SignalKind::interrupt()),
            _ = self.terminate.recv() => Interrupted(SignalKind::terminate()),
        }
    }
}
