//! A server that was started here, of whatever service: in a container or as a process.

use std::{
    ops::Deref,
    sync::Arc,
    time::{Duration, Instant},
};

use futures_util::future::BoxFuture;

use super::{Postgres, docker::Container, native::Process};

/// How long a server may take from its start to its first answer.
const READY_TIMEOUT: Duration = Duration::from_secs(60);
const POLL_INTERVAL: Duration = Duration::from_millis(5);

/// A server that was started here, and that can be started again at the same address. It goes when this is dropped.
pub(super) struct ManagedServer {
    backing: Backing,
    probe: ReadinessProbe,
}

enum Backing {
    Container(Container),
    Process(Process),
}

/// Asks the server at this host and port once whether it is ready.
pub(super) type ReadinessProbe = Box<dyn Fn(String, u16) -> BoxFuture<'static, Result<(), NotReady>> + Send + Sync>;

/// A server's refusal, or its silence.
pub(super) struct NotReady {
    pub(super) error: anyhow::Error,
    /// Whether it may answer yet, as it is just starting.
    pub(super) may_become_ready: bool,
}

impl ManagedServer {
    /// Waits until the server in a container that was just started answers.
    pub(super) async fn in_container(container: Container, probe: ReadinessProbe) -> anyhow::Result<Self> {
        let backing = Backing::Container(container);
        let server = Self { backing, probe };
        server.answers().await?;
        Ok(server)
    }

    /// Starts a process on a free port and waits until it answers.
    pub(super) async fn as_process(mut process: Process, mut probe: ReadinessProbe) -> anyhow::Result<Self> {
        /// How often another port is tried when somebody was quicker.
        const PORTS_TO_TRY: u32 = 3;

        let mut tries_left = PORTS_TO_TRY;
        loop {
            tries_left -= 1;
            process.choose_port()?;
            let server = Self {
                backing: Backing::Process(process),
                probe,
            };
            let error = match server.launch().await {
                Ok(()) => return Ok(server),
                Err(error) => error,
            };
            match server {
                Self {
                    backing: Backing::Process(again),
                    probe: again_probe,
                } if tries_left > 0 && again.port_was_taken() => (process, probe) = (again, again_probe),
                _ => return Err(error),
            }
        }
    }

    /// Where it can be reached from here.
    pub(super) fn address(&self) -> (&str, u16) {
        match &self.backing {
            Backing::Container(container) => container.address(),
            Backing::Process(process) => process.address(),
        }
    }

    /// Starts it, unless it is up, and waits until it answers.
    async fn launch(&self) -> anyhow::Result<()> {
        match &self.backing {
            Backing::Container(container) => container.start_again().await?,
            Backing::Process(process) => process.launch()?,
        }
        self.answers().await
    }

    async fn answers(&self) -> anyhow::Result<()> {
        let (host, port) = self.address();
        let began = Instant::now();
        loop {
            let Err(NotReady {
                error,
                may_become_ready,
            }) = (self.probe)(host.to_owned(), port).await
            else {
                return Ok(());
            };
            // If it has ended, that says why.
            match &self.backing {
                Backing::Container(container) => container.ensure_running().await?,
                Backing::Process(process) => process.ensure_running()?,
            }
            if !may_become_ready || began.elapsed() > READY_TIMEOUT {
                return Err(error.context(format!("it was started, but did not answer at {host}:{port}")));
            }
            tokio::time::sleep(POLL_INTERVAL).await;
        }
    }

    async fn stop(&self) -> anyhow::Result<()> {
        match &self.backing {
            Backing::Container(container) => container.stop().await,
            Backing::Process(process) => process.stop().await,
        }
    }

    async fn kill(&self) -> anyhow::Result<()> {
        match &self.backing {
            Backing::Container(container) => container.kill().await,
            Backing::Process(process) => process.kill().await,
        }
    }

    async fn freeze(&self) -> anyhow::Result<()> {
        match &self.backing {
            Backing::Container(container) => container.freeze().await,
            Backing::Process(process) => process.freeze(),
        }
    }

    async fn thaw(&self) -> anyhow::Result<()> {
        match &self.backing {
            Backing::Container(container) => container.thaw().await,
            Backing::Process(process) => process.thaw(),
        }
    }

    async fn pid(&self) -> anyhow::Result<Option<u32>> {
        match &self.backing {
            Backing::Container(container) => container.pid().await,
            Backing::Process(process) => Ok(process.pid()),
        }
    }
}

/// A server that a test may break. It keeps its address.
pub struct Private<S = Postgres> {
    service: S,
    server: Arc<ManagedServer>,
}

impl<S> Deref for Private<S> {
    type Target = S;

    fn deref(&self) -> &S {
        &self.service
    }
}

impl<S> Private<S> {
    /// The service on a server that nobody else uses.
    pub(super) fn new(service: S, server: Arc<ManagedServer>) -> Self {
        Self { service, server }
    }

    /// Shuts it down in order: connections are cut. When it starts again, Postgres has what was committed and Kafka what was acknowledged;
    /// Redis is empty. Nothing happens if it is down.
    ///
    /// # Errors
    /// It does not end in time.
    pub async fn stop(&self) -> anyhow::Result<()> {
        self.server.stop().await
    }

    /// Kills all its processes, as a crash would. Nothing happens if it is down.
    ///
    /// # Errors
    /// It can't be killed.
    pub async fn kill(&self) -> anyhow::Result<()> {
        self.server.kill().await
    }

    /// Holds all its processes still: connections stay open, and nobody answers. Nothing happens if it is down.
    ///
    /// # Errors
    /// It can't be held.
    pub async fn freeze(&self) -> anyhow::Result<()> {
        self.server.freeze().await
    }

    /// Lets one go on that was frozen.
    ///
    /// # Errors
    /// It can't be reached, or was not frozen.
    pub async fn thaw(&self) -> anyhow::Result<()> {
        self.server.thaw().await
    }

    /// Starts it again at the same address, and waits until it answers. Nothing happens if it is up.
    ///
    /// # Errors
    /// It does not come up.
    pub async fn start(&self) -> anyhow::Result<()> {
        self.server.launch().await
    }

    /// The process that all others of the server descend from; `None` while it is down. For a container it is the pid that the engine
    /// sees, which is one of this machine only if the engine runs on it.
    ///
    /// # Errors
    /// The engine does not tell.
    pub async fn pid(&self) -> anyhow::Result<Option<u32>> {
        self.server.pid().await
    }
}
