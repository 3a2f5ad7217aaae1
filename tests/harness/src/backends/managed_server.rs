//! A server that this process started: a container or a native process, of any service.

use std::{
    net::SocketAddr,
    ops::Deref,
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::ensure;
use futures_util::future::BoxFuture;
use http_body_util::Full;
use hyper::Request;

use super::{Postgres, docker::Container, native::Process};
use crate::rush::Connection;

/// Time limit from the start of a server to its first answer.
const READY_TIMEOUT: Duration = Duration::from_secs(60);
const POLL_INTERVAL: Duration = Duration::from_millis(5);

/// A server started by this process, which can be started again at the same address. Dropping it
/// stops and removes the server.
pub(super) struct ManagedServer {
    backing: Backing,
    probe: ReadinessProbe,
}

enum Backing {
    Container(Container),
    Process(Process),
}

/// Checks once whether the server at this host and port is ready.
pub(super) type ReadinessProbe = Box<dyn Fn(String, u16) -> BoxFuture<'static, Result<(), NotReady>> + Send + Sync>;

/// Why a server is not ready.
pub(super) struct NotReady {
    pub(super) error: anyhow::Error,
    /// Whether the server may still become ready because it is starting up.
    pub(super) may_become_ready: bool,
}

/// Checks that `GET path` succeeds.
pub(super) fn http_probe(path: &'static str) -> ReadinessProbe {
    async fn probe(host: String, port: u16, path: &str) -> anyhow::Result<()> {
        let mut connection = Connection::open(SocketAddr::new(host.parse()?, port)).await?;
        let answered = connection.send(Request::get(path).body(Full::default())?).await?;
        ensure!(
            answered.status.is_success(),
            "{path} is answered with {}",
            answered.status
        );
        Ok(())
    }

    Box::new(move |host, port| {
        Box::pin(async move {
            probe(host, port, path).await.map_err(|error| NotReady {
                error,
                may_become_ready: true,
            })
        })
    })
}

impl ManagedServer {
    /// Waits until the server in a newly started container is ready.
    pub(super) async fn in_container(container: Container, probe: ReadinessProbe) -> anyhow::Result<Self> {
        let backing = Backing::Container(container);
        let server = Self { backing, probe };
        server.answers().await?;
        Ok(server)
    }

    /// Starts a process on a free port and waits until it is ready.
    pub(super) async fn as_process(mut process: Process, mut probe: ReadinessProbe) -> anyhow::Result<Self> {
        /// Attempts with another port if the chosen one was taken in the meantime.
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

    /// Host and port at which this process reaches the server.
    pub(super) fn address(&self) -> (&str, u16) {
        match &self.backing {
            Backing::Container(container) => container.address(),
            Backing::Process(process) => process.address(),
        }
    }

    /// Starts the server unless it is running, and waits until it is ready.
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
            // If the server has exited, its log says why.
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

    /// Shuts the server down gracefully unless it is down.
    pub(super) async fn stop(&self) -> anyhow::Result<()> {
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

    /// The pid of the server's root process; `None` while the server is down.
    pub(super) async fn pid(&self) -> anyhow::Result<Option<u32>> {
        match &self.backing {
            Backing::Container(container) => container.pid().await,
            Backing::Process(process) => Ok(process.pid()),
        }
    }
}

/// A server of one test, which the test may stop, kill or freeze. It keeps its address.
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
    /// The service on a server that no other test uses.
    pub(super) fn new(service: S, server: Arc<ManagedServer>) -> Self {
        Self { service, server }
    }

    /// Shuts the server down gracefully and closes its connections. After a restart, Postgres has
    /// what was committed, Kafka has what was acknowledged, and Redis is empty. Does nothing if the
    /// server is down.
    ///
    /// # Errors
    /// Fails if the server does not exit in time.
    pub async fn stop(&self) -> anyhow::Result<()> {
        self.server.stop().await
    }

    /// Kills all processes of the server (SIGKILL), like a crash. Does nothing if the server is
    /// down.
    ///
    /// # Errors
    /// Fails if the processes can't be killed.
    pub async fn kill(&self) -> anyhow::Result<()> {
        self.server.kill().await
    }

    /// Freezes all processes of the server: connections stay open but get no answer. Does nothing
    /// if the server is down.
    ///
    /// # Errors
    /// Fails if the processes can't be frozen.
    pub async fn freeze(&self) -> anyhow::Result<()> {
        self.server.freeze().await
    }

    /// Resumes a frozen server.
    ///
    /// # Errors
    /// Fails if the processes can't be signalled or were not frozen.
    pub async fn thaw(&self) -> anyhow::Result<()> {
        self.server.thaw().await
    }

    /// Starts the server again at the same address, and waits until it is ready. Does nothing if
    /// the server is running.
    ///
    /// # Errors
    /// Fails if the server does not become ready.
    pub async fn start(&self) -> anyhow::Result<()> {
        self.server.launch().await
    }

    /// The pid of the server's root process; `None` while the server is down. For a container it is
    /// the pid as the engine reports it, which is valid on this machine only if the engine runs
    /// here.
    ///
    /// # Errors
    /// Fails if the engine does not answer.
    pub async fn pid(&self) -> anyhow::Result<Option<u32>> {
        self.server.pid().await
    }
}
