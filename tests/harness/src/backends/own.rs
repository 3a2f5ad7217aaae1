//! A server that was started here, of whatever service: in a container or as a process.

use std::{
    ops::Deref,
    sync::Arc,
    time::{Duration, Instant},
};

use futures_util::future::BoxFuture;

use super::{Postgres, docker::Container, native::Process};

/// How long a server may take from its start to its first answer.
const READY_WITHIN: Duration = Duration::from_secs(60);
const LOOK_AGAIN_AFTER: Duration = Duration::from_millis(5);

/// A server that was started here, and that can be started again at the same address. It goes when this is dropped.
pub(super) struct ManagedServer {
    runs: Runs,
    ask: Ask,
}

enum Runs {
    InContainer(Container),
    AsProcess(Process),
}

/// Asks the server at this host and port once whether it is ready.
pub(super) type Ask = Box<dyn Fn(String, u16) -> BoxFuture<'static, Result<(), NotReady>> + Send + Sync>;

/// A server's refusal, or its silence.
pub(super) struct NotReady {
    pub(super) error: anyhow::Error,
    /// Whether it may answer yet, as it is just starting.
    pub(super) comes_yet: bool,
}

impl ManagedServer {
    /// Waits until the server in a container that was just started answers.
    pub(super) async fn in_container(container: Container, ask: Ask) -> anyhow::Result<Self> {
        let runs = Runs::InContainer(container);
        let own = Self { runs, ask };
        own.answers().await?;
        Ok(own)
    }

    /// Starts a process on a free port and waits until it answers.
    pub(super) async fn as_process(mut process: Process, mut ask: Ask) -> anyhow::Result<Self> {
        /// How often another port is tried when somebody was quicker.
        const PORTS_TO_TRY: u32 = 3;

        let mut tries_left = PORTS_TO_TRY;
        loop {
            tries_left -= 1;
            process.choose_port()?;
            let own = Self {
                runs: Runs::AsProcess(process),
                ask,
            };
            let error = match own.launch().await {
                Ok(()) => return Ok(own),
                Err(error) => error,
            };
            match own {
                Self {
                    runs: Runs::AsProcess(again),
                    ask: again_ask,
                } if tries_left > 0 && again.port_was_taken() => (process, ask) = (again, again_ask),
                _ => return Err(error),
            }
        }
    }

    /// Where it can be reached from here.
    pub(super) fn address(&self) -> (&str, u16) {
        match &self.runs {
            Runs::InContainer(container) => container.address(),
            Runs::AsProcess(process) => process.address(),
        }
    }

    /// Starts it, unless it is up, and waits until it answers.
    async fn launch(&self) -> anyhow::Result<()> {
        match &self.runs {
            Runs::InContainer(container) => container.start_again().await?,
            Runs::AsProcess(process) => process.launch()?,
        }
        self.answers().await
    }

    async fn answers(&self) -> anyhow::Result<()> {
        let (host, port) = self.address();
        let began = Instant::now();
        loop {
            let Err(NotReady { error, comes_yet }) = (self.ask)(host.to_owned(), port).await else {
                return Ok(());
            };
            // If it has ended, that says why.
            match &self.runs {
                Runs::InContainer(container) => container.still_there().await?,
                Runs::AsProcess(process) => process.still_there()?,
            }
            if !comes_yet || began.elapsed() > READY_WITHIN {
                return Err(error.context(format!("it was started, but did not answer at {host}:{port}")));
            }
            tokio::time::sleep(LOOK_AGAIN_AFTER).await;
        }
    }

    async fn stop(&self) -> anyhow::Result<()> {
        match &self.runs {
            Runs::InContainer(container) => container.stop().await,
            Runs::AsProcess(process) => process.stop().await,
        }
    }

    async fn kill(&self) -> anyhow::Result<()> {
        match &self.runs {
            Runs::InContainer(container) => container.kill().await,
            Runs::AsProcess(process) => process.kill().await,
        }
    }

    async fn freeze(&self) -> anyhow::Result<()> {
        match &self.runs {
            Runs::InContainer(container) => container.freeze().await,
            Runs::AsProcess(process) => process.freeze(),
        }
    }

    async fn thaw(&self) -> anyhow::Result<()> {
        match &self.runs {
            Runs::InContainer(container) => container.thaw().await,
            Runs::AsProcess(process) => process.thaw(),
        }
    }

    async fn pid(&self) -> anyhow::Result<Option<u32>> {
        match &self.runs {
            Runs::InContainer(container) => container.pid().await,
            Runs::AsProcess(process) => Ok(process.pid()),
        }
    }
}

/// A server that a test may break. It keeps its address.
pub struct Private<S = Postgres> {
    service: S,
    own: Arc<ManagedServer>,
}

impl<S> Deref for Private<S> {
    type Target = S;

    fn deref(&self) -> &S {
        &self.service
    }
}

impl<S> Private<S> {
    /// The service on a server that nobody else uses.
    pub(super) fn new(service: S, own: Arc<ManagedServer>) -> Self {
        Self { service, own }
    }

    /// Shuts it down in order: connections are cut. When it starts again, Postgres has what was committed and Kafka what was acknowledged;
    /// Redis is empty. Nothing happens if it is down.
    ///
    /// # Errors
    /// It does not end in time.
    pub async fn stop(&self) -> anyhow::Result<()> {
        self.own.stop().await
    }

    /// Kills all its processes, as a crash would. Nothing happens if it is down.
    ///
    /// # Errors
    /// It can't be killed.
    pub async fn kill(&self) -> anyhow::Result<()> {
        self.own.kill().await
    }

    /// Holds all its processes still: connections stay open, and nobody answers. Nothing happens if it is down.
    ///
    /// # Errors
    /// It can't be held.
    pub async fn freeze(&self) -> anyhow::Result<()> {
        self.own.freeze().await
    }

    /// Lets one go on that was frozen.
    ///
    /// # Errors
    /// It can't be reached, or was not frozen.
    pub async fn thaw(&self) -> anyhow::Result<()> {
        self.own.thaw().await
    }

    /// Starts it again at the same address, and waits until it answers. Nothing happens if it is up.
    ///
    /// # Errors
    /// It does not come up.
    pub async fn start(&self) -> anyhow::Result<()> {
        self.own.launch().await
    }

    /// The process that all others of the server descend from; `None` while it is down. For a container it is the pid that the engine
    /// sees, which is one of this machine only if the engine runs on it.
    ///
    /// # Errors
    /// The engine does not tell.
    pub async fn pid(&self) -> anyhow::Result<Option<u32>> {
        self.own.pid().await
    }
}
