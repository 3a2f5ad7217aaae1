//! Containers: images, and a container that can be stopped and started.

mod engine;

use std::{
    collections::HashMap,
    env, fs,
    path::{Path, PathBuf},
    sync::{LazyLock, mpsc},
    time::{Duration, Instant},
};

use anyhow::{Context, bail};
use futures_util::{StreamExt, TryStreamExt};
use testcontainers_modules::testcontainers::{
    ContainerRequest, Image, ImageExt,
    bollard::{
        Docker,
        errors::Error as EngineError,
        models::{ContainerCreateBody, HostConfig, PortBinding},
        query_parameters::{
            CreateContainerOptionsBuilder, CreateImageOptionsBuilder, LogsOptionsBuilder,
            RemoveContainerOptionsBuilder, StopContainerOptionsBuilder,
        },
    },
};
use tokio::{runtime::Runtime, sync::Mutex};

use super::{free_port, is_port_taken, reaper, root, setting};
use crate::broken_pipe;

/// Seconds of a graceful shutdown after which the engine kills the container.
const SHUTDOWN_TIMEOUT_S: i32 = 30;
/// Time limit for freezing a container.
const FREEZE_TIMEOUT: Duration = Duration::from_secs(10);
/// Time limit for removing a container, after which it is left to the reaper.
const REMOVE_TIMEOUT: Duration = Duration::from_secs(30);
/// Time after a failed pull in which no process repeats it.
const PULL_RETRY_INTERVAL: Duration = Duration::from_secs(5 * 60);
/// Attempts with another port if the chosen one was taken in the meantime.
const PORTS_TO_TRY: u32 = 3;

/// The runtime of all calls to the engine. Connections belong to the runtime that opened them, and
/// a test's runtime ends with the test.
static RUNTIME: LazyLock<Runtime> = LazyLock::new(|| {
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .thread_name("docker")
        .enable_all()
        .build()
        .expect("a runtime needs a thread and an epoll, and both were to be had until here")
});

/// A container of a service. Dropping it removes the container.
pub(super) struct Container {
    name: String,
    host: String,
    port: u16,
}

/// The image of a service.
pub(super) struct ImageName {
    /// The environment variable that overrides it.
    pub(super) variable: &'static str,
    /// The default image.
    pub(super) default: &'static str,
}

impl Container {
    /// Starts a container and maps its port `inside` to a port of this machine that stays the same
    /// across restarts. `request` receives that port. The container need not be ready on return.
    pub(super) async fn start<I: Image + 'static>(
        service: &'static str,
        image: ImageName,
        request: impl Fn(u16) -> ContainerRequest<I> + Send + 'static,
        inside: u16,
    ) -> anyhow::Result<Self> {
        let (repository, tag) = image.named()?;
        let named = move |port| request(port).with_name(&repository).with_tag(&tag);
        on_engine_runtime(async move {
            let engine = engine::connect().await?;
            present(service, &engine, &named(inside).descriptor()).await?;
            let mut tries_left = PORTS_TO_TRY;
            loop {
                tries_left -= 1;
                let port = free_port()?;
                let name = format!("oversold-{service}-{:08x}", rand::random::<u32>());
                reaper::register_container(&name, engine::address())?;
                let body = body(&named(port), port, inside);
                match create_and_start(&engine, &name, body).await {
                    Ok(()) => {
                        let host = engine::host(&engine).await;
                        return Ok(Self { name, host, port });
                    }
                    // The container exists but does not run. The reaper removes it by its name.
                    Err(error) if tries_left > 0 && is_port_taken(&error.to_string()) => {}
                    Err(error) => return Err(error).context("the container did not start"),
                }
            }
        })
        .await
    }

    /// Host and port at which this process reaches the container.
    pub(super) fn address(&self) -> (&str, u16) {
        (&self.host, self.port)
    }

    /// Stops the container gracefully unless it is down.
    pub(super) async fn stop(&self) -> anyhow::Result<()> {
        let options = StopContainerOptionsBuilder::new().t(SHUTDOWN_TIMEOUT_S).build();
        self.ask(|engine, name| async move { engine.stop_container(&name, Some(options)).await })
            .await
    }

    /// Kills every process in the container unless it is down.
    pub(super) async fn kill(&self) -> anyhow::Result<()> {
        if self.pid().await?.is_none() {
            return Ok(());
        }
        self.ask(|engine, name| async move { engine.kill_container(&name, None).await })
            .await?;
        // The engine answers once the signal is sent, before the container has exited.
        self.ask(|engine, name| async move {
            engine.wait_container(&name, None).next().await;
            Ok(())
        })
        .await
    }

    /// Freezes every process in the container unless it is down.
    pub(super) async fn freeze(&self) -> anyhow::Result<()> {
        if self.pid().await?.is_none() {
            return Ok(());
        }
        let began = Instant::now();
        loop {
            let paused = self
                .ask(|engine, name| async move { engine.pause_container(&name).await })
                .await;
            match paused {
                // An engine on cgroups v1 gives up on a container whose threads come and go, and
                // resumes all of them.
                Err(why) if format!("{why:#}").contains("unable to freeze") && began.elapsed() < FREEZE_TIMEOUT => {}
                paused => return paused,
            }
        }
    }

    /// Resumes every process in the container.
    pub(super) async fn thaw(&self) -> anyhow::Result<()> {
        if self.pid().await?.is_none() {
            return Ok(());
        }
        self.ask(|engine, name| async move { engine.unpause_container(&name).await })
            .await
    }

    /// Starts the container again unless it is running.
    pub(super) async fn start_again(&self) -> anyhow::Result<()> {
        self.ask(|engine, name| async move { engine.start_container(&name, None).await })
            .await
    }

    /// The pid of its root process as the engine reports it, while the container is running.
    pub(super) async fn pid(&self) -> anyhow::Result<Option<u32>> {
        let about = self
            .ask(|engine, name| async move { engine.inspect_container(&name, None).await })
            .await?;
        let pid = about.state.and_then(|state| state.pid).unwrap_or(0);
        Ok(u32::try_from(pid).ok().filter(|&pid| pid > 0))
    }

    /// Fails with the end of the log unless the container is running.
    pub(super) async fn ensure_running(&self) -> anyhow::Result<()> {
        if self.pid().await?.is_none() {
            bail!("the container did not start; the end of its log: {}", self.log().await?);
        }
        Ok(())
    }

    /// The last 10 lines of its output.
    async fn log(&self) -> anyhow::Result<String> {
        let options = LogsOptionsBuilder::new().stdout(true).stderr(true).tail("10").build();
        self.ask(|engine, name| async move {
            let lines: Vec<_> = engine.logs(&name, Some(options)).collect().await;
            Ok(lines.into_iter().flatten().map(|line| line.to_string()).collect())
        })
        .await
    }

    async fn ask<T, F>(&self, question: impl FnOnce(Docker, String) -> F + Send + 'static) -> anyhow::Result<T>
    where
        T: Send + 'static,
        F: Future<Output = Result<T, EngineError>> + Send,
    {
        let name = self.name.clone();
        on_engine_runtime(async move { Ok(question(engine::connect().await?, name).await?) }).await
    }
}

impl Drop for Container {
    fn drop(&mut self) {
        let (removed, wait) = mpsc::channel();
        let name = self.name.clone();
        RUNTIME.spawn(async move {
            let _ = removed.send(remove(&name).await);
        });
        // While it is registered, the reaper removes it.
        if let Ok(Ok(())) = wait.recv_timeout(REMOVE_TIMEOUT) {
            let _ = reaper::unregister_container(&self.name);
        }
    }
}

impl ImageName {
    /// The image's repository and tag.
    fn named(&self) -> anyhow::Result<(String, String)> {
        let named =
            setting(self.variable).map_or_else(|| self.default.into(), |named| named.to_string_lossy().into_owned());
        match named.rsplit_once(':') {
            // In `host:5000/image` the colon belongs to the port.
            Some((repository, tag)) if !tag.contains('/') && !repository.is_empty() && !tag.is_empty() => {
                Ok((repository.to_owned(), tag.to_owned()))
            }
            Some((_, tag)) if !tag.contains('/') => {
                bail!("{} is `{named}`, which is no name of an image", self.variable)
            }
            _ => Ok((named, "latest".to_owned())),
        }
    }
}

async fn on_engine_runtime<T: Send + 'static>(
    work: impl Future<Output = anyhow::Result<T>> + Send + 'static,
) -> anyhow::Result<T> {
    RUNTIME.spawn(work).await?
}

/// The container of a request, with its port `inside` published as `port`.
fn body<I: Image>(request: &ContainerRequest<I>, port: u16, inside: u16) -> ContainerCreateBody {
    let inside = format!("{inside}/tcp");
    let published = PortBinding {
        host_ip: None,
        host_port: Some(port.to_string()),
    };
    let words: Vec<String> = request.cmd().map(Into::into).collect();
    ContainerCreateBody {
        image: Some(request.descriptor()),
        entrypoint: request.entrypoint().map(|program| vec![program.to_owned()]),
        cmd: (!words.is_empty()).then_some(words),
        env: Some(
            request
                .env_vars()
                .map(|(name, value)| format!("{name}={value}"))
                .collect(),
        ),
        exposed_ports: Some(vec![inside.clone()]),
        host_config: Some(HostConfig {
            port_bindings: Some(HashMap::from([(inside, Some(vec![published]))])),
            ..HostConfig::default()
        }),
        ..ContainerCreateBody::default()
    }
}

async fn create_and_start(engine: &Docker, name: &str, body: ContainerCreateBody) -> Result<(), EngineError> {
    let named = CreateContainerOptionsBuilder::new().name(name).build();
    engine.create_container(Some(named), body).await?;
    // The service's own probe decides readiness.
    engine.start_container(name, None).await
}

async fn remove(name: &str) -> anyhow::Result<()> {
    let options = RemoveContainerOptionsBuilder::new().force(true).v(true).build();
    Ok(engine::connect().await?.remove_container(name, Some(options)).await?)
}

/// Pulls the image unless it is present. A failed pull is not repeated in this process, and for a
/// while not in others, which find it noted in a file: a machine without a network does not wait
/// for a pull in every test binary.
async fn present(service: &str, engine: &Docker, image: &str) -> anyhow::Result<()> {
    static PULLED: Mutex<Option<HashMap<String, Result<(), String>>>> = Mutex::const_new(None);

    let mut pulled = PULLED.lock().await;
    let pulled = pulled.get_or_insert_default();
    if engine.inspect_image(image).await.is_ok() {
        return Ok(());
    }
    if !pulled.contains_key(image) {
        pulled.insert(image.to_owned(), pull(service, engine, image).await);
    }
    match &pulled[image] {
        Ok(()) => Ok(()),
        Err(reason) => bail!("image {image} is not here, and {reason}"),
    }
}

async fn pull(service: &str, engine: &Docker, image: &str) -> Result<(), String> {
    let note = pull_note(image);
    if let Some(age_s) = age(&note)
        .filter(|age| *age < PULL_RETRY_INTERVAL)
        .map(|age| age.as_secs())
    {
        let before = fs::read_to_string(&note).unwrap_or_default();
        return Err(format!(
            "{before} ({age_s} s ago; to have it tried again now, delete {})",
            note.display()
        ));
    }
    broken_pipe::notice(format_args!("{service}: pulling the image {image}"));
    // Without a login: set-up pulls with the docker CLI, which has one.
    let options = CreateImageOptionsBuilder::new().from_image(image).build();
    let pulled: Result<Vec<_>, _> = engine.create_image(Some(options), None, None).try_collect().await;
    match pulled {
        Ok(_) => {
            let _ = fs::remove_file(&note);
            Ok(())
        }
        Err(error) => {
            let reason = format!("can't be pulled: {}", root(&error));
            // Without the note, the next process repeats the pull: slower, but correct.
            let _ = fs::write(&note, &reason);
            Err(reason)
        }
    }
}

/// The file that notes a failed pull.
fn pull_note(image: &str) -> PathBuf {
    let user = rustix::process::geteuid().as_raw();
    let image = image.replace(|c: char| !c.is_ascii_alphanumeric(), "-");
    env::temp_dir().join(format!("oversold-pull-failed-{user}-{image}"))
}

fn age(file: &Path) -> Option<Duration> {
    fs::metadata(file).ok()?.modified().ok()?.elapsed().ok()
}
