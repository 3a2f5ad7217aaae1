//! The Docker engine: its address, a client for it, and the host of its published ports.

use std::{
    path::Path,
    process::{Command, Stdio},
    sync::OnceLock,
    time::Duration,
};

use anyhow::bail;
use testcontainers_modules::testcontainers::{
    bollard::{API_DEFAULT_VERSION, Docker, query_parameters::InspectNetworkOptions},
    core::client::docker_client_instance,
};
use tokio::{sync::OnceCell, time::timeout};
use url::Url;

use crate::backends::setting;

/// Finds the address, for set-up as well as here.
const SCRIPT: &str = include_str!("../../../../../infra/docker-host.sh");

/// Time limit of the first ping.
const PING_TIMEOUT: Duration = Duration::from_secs(5);
/// Time limit of every request, in seconds. A pull takes long.
const REQUEST_TIMEOUT_S: u64 = 120;

/// The engine's address: `DOCKER_HOST`, that of the docker CLI's current context, or one of the
/// usual sockets. The reaper needs it, too.
pub(super) fn address() -> Option<&'static str> {
    static ADDRESS: OnceLock<Option<String>> = OnceLock::new();
    let address = ADDRESS.get_or_init(|| {
        let found = Command::new("sh")
            .args(["-c", SCRIPT])
            .stdin(Stdio::null())
            .stderr(Stdio::null())
            .output();
        let printed = String::from_utf8(found.ok()?.stdout).ok()?;
        Some(printed.trim_end().to_owned()).filter(|address| !address.is_empty())
    });
    address.as_deref()
}

/// Connects to the engine, or returns the connection that there is.
pub(super) async fn connect() -> anyhow::Result<Docker> {
    static ENGINE: OnceCell<Docker> = OnceCell::const_new();

    let answering = async {
        let engine = client().await?;
        engine.ping().await?;
        anyhow::Ok(engine)
    };
    match ENGINE
        .get_or_try_init(async || timeout(PING_TIMEOUT, answering).await?)
        .await
    {
        Ok(engine) => Ok(engine.clone()),
        _ => bail!(
            "no Docker engine answers at {}",
            address().unwrap_or("any of the usual sockets")
        ),
    }
}

/// A client that has not connected yet.
async fn client() -> anyhow::Result<Docker> {
    if setting("DOCKER_HOST").is_some() {
        // It knows the other variables as well, such as those for TLS.
        return Ok(docker_client_instance().await?);
    }
    let address = address().unwrap_or_default();
    match address.split_once("://") {
        Some(("unix", _)) => Ok(Docker::connect_with_unix(
            address,
            REQUEST_TIMEOUT_S,
            API_DEFAULT_VERSION,
        )?),
        Some(("tcp" | "http", _)) => Ok(Docker::connect_with_http(
            address,
            REQUEST_TIMEOUT_S,
            API_DEFAULT_VERSION,
        )?),
        _ => bail!("it is neither a socket nor a port"),
    }
}

/// The host at which this process reaches the ports that the engine publishes.
pub(super) async fn host(engine: &Docker) -> String {
    // Not localhost, which may resolve to ::1 first, where a port may not be published.
    const LOCALHOST: &str = "127.0.0.1";

    let url = address().and_then(|address| Url::parse(address).ok());
    if let Some(host) = url.as_ref().and_then(Url::host_str).filter(|host| !host.is_empty()) {
        return if host == "localhost" { LOCALHOST } else { host }.to_owned();
    }
    if !Path::new("/.dockerenv").exists() {
        return LOCALHOST.to_owned();
    }
    // In a container, whose engine is the one outside.
    let bridge = engine
        .inspect_network("bridge", None::<InspectNetworkOptions>)
        .await
        .ok();
    let networks = bridge.and_then(|bridge| bridge.ipam?.config).unwrap_or_default();
    let gateway = networks.into_iter().find_map(|network| network.gateway);
    gateway.unwrap_or_else(|| LOCALHOST.to_owned())
}
