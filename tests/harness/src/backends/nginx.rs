//! nginx as a native process: the load balancer in front of several instances.

use std::{
    collections::HashMap,
    fmt::Write as _,
    fs,
    net::{Ipv4Addr, SocketAddr},
    path::PathBuf,
    time::Duration,
};

use anyhow::Context;
use http_body_util::Full;
use hyper::Request;
use rustix::process::{Pid, Signal, kill_process};
use serde::Deserialize;

use super::{
    managed_server::{ManagedServer, http_probe},
    native::{Home, Memory, Process},
};
use crate::rush::Connection;

const SERVICE: &str = "nginx";

/// How to start nginx.
#[derive(Clone, Debug)]
pub struct NginxSettings {
    /// The program.
    pub executable: PathBuf,
    /// The template of its configuration file, `infra/stand/nginx/nginx.conf.template`.
    pub template: PathBuf,
    /// The port to listen on; `None`: any free one.
    pub port: Option<u16>,
}

/// A running nginx that forwards to several instances. Dropping it ends it.
pub struct Nginx {
    server: ManagedServer,
    address: SocketAddr,
    access_log: PathBuf,
}

/// A line of the access log.
#[derive(Deserialize)]
struct Forwarded {
    request_id: String,
    /// The address of each instance that was tried, in order, separated by commas.
    upstream: String,
}

impl Nginx {
    /// Starts nginx in front of these instances, and waits until it serves.
    ///
    /// # Errors
    /// Fails, with the end of its log, if it does not start.
    pub async fn start(settings: &NginxSettings, instances: &[SocketAddr]) -> anyhow::Result<Self> {
        let template = fs::read_to_string(&settings.template)
            .with_context(|| format!("reading {}", settings.template.display()))?;
        let home = Home::make(SERVICE, Memory::Never)?;
        let folder = home.folder().to_owned();
        let access_log = folder.join("access.log");
        let mut upstreams = String::new();
        for instance in instances {
            writeln!(upstreams, "server {instance} max_fails=1 fail_timeout=1s;")?;
        }

        let file = folder.join("nginx.conf");
        let mut arguments: Vec<_> = ["-p".into(), folder.clone().into_os_string()].into();
        // Until it has read the file, it would log to a folder that only root may write to.
        arguments.extend(["-e", "stderr", "-c"].map(Into::into));
        arguments.push(file.clone().into_os_string());
        let log = access_log.display().to_string();
        let configure = move |port: u16| {
            let text = [
                ("NGINX_LISTEN", &*format!("{}:{port}", Ipv4Addr::LOCALHOST)),
                ("NGINX_UPSTREAMS", &*upstreams),
                ("NGINX_RUN_DIR", &*folder.display().to_string()),
                ("NGINX_ACCESS_LOG", &*log),
                ("NGINX_ERROR_LOG", "stderr"),
            ]
            .into_iter()
            .fold(template.clone(), |text, (name, value)| {
                text.replace(&format!("${{{name}}}"), value)
            });
            fs::write(&file, text)?;
            Ok(Vec::new())
        };
        let process = Process::new(home, settings.executable.clone(), arguments, Box::new(configure))
            .fixed_port(settings.port)
            // Its workers outlive a master that is killed.
            .drop_signal(Signal::TERM);
        let server = ManagedServer::as_process(process, http_probe("/nginx-health")).await?;
        let (host, port) = server.address();
        let address = SocketAddr::new(host.parse()?, port);
        Ok(Self {
            server,
            address,
            access_log,
        })
    }

    /// The address that it listens on.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// The pid of its master process.
    ///
    /// # Errors
    /// Fails if it has exited.
    pub async fn pid(&self) -> anyhow::Result<u32> {
        self.server.pid().await?.context("nginx has exited")
    }

    /// Reloads the configuration (SIGHUP): new workers take over, and the old ones finish what they
    /// serve.
    ///
    /// # Errors
    /// Fails if it has exited.
    pub async fn reload(&self) -> anyhow::Result<()> {
        let master = Pid::from_raw(self.pid().await?.cast_signed()).context("a process has a pid")?;
        Ok(kill_process(master, Signal::HUP)?)
    }

    /// Waits until it sends requests to this instance. It leaves an instance that it could not
    /// reach alone for a second (`fail_timeout`).
    ///
    /// # Errors
    /// Fails if it does not answer, or its access log cannot be read.
    pub(crate) async fn forwards_to(&self, instance: SocketAddr) -> anyhow::Result<()> {
        const POLL_INTERVAL: Duration = Duration::from_millis(20);

        let mut connection = Connection::open(self.address).await?;
        for attempt in 0_u32.. {
            let id = format!("to-{instance}-{attempt}");
            let request = Request::get("/readyz").header("x-request-id", &id);
            connection.send(request.body(Full::default())?).await?;
            tokio::time::sleep(POLL_INTERVAL).await;
            if self
                .forwarded()?
                .any(|(request, last)| request == id && last == instance)
            {
                break;
            }
        }
        Ok(())
    }

    /// Ends it, with whatever it serves.
    ///
    /// # Errors
    /// Fails if it does not exit in time.
    pub async fn stop(&self) -> anyhow::Result<()> {
        self.server.stop().await
    }

    /// The instance that each request was sent to last, by the number that the client sent as
    /// `X-Request-Id`, according to the access log.
    ///
    /// # Errors
    /// Fails if the log cannot be read.
    pub fn sent_to(&self) -> anyhow::Result<HashMap<u64, SocketAddr>> {
        // Other requests have other ids.
        let numbered = self
            .forwarded()?
            .filter_map(|(request, instance)| Some((request.parse().ok()?, instance)));
        Ok(numbered.collect())
    }

    /// The access log: a JSON object for each request.
    ///
    /// # Errors
    /// Fails if it cannot be read.
    pub fn access_log(&self) -> anyhow::Result<String> {
        Ok(fs::read_to_string(&self.access_log)?)
    }

    /// The id of each request in the access log, and the instance that it was sent to last.
    fn forwarded(&self) -> anyhow::Result<impl Iterator<Item = (String, SocketAddr)>> {
        let mut forwarded = vec![];
        for line in self.access_log()?.lines() {
            let Forwarded { request_id, upstream } =
                serde_json::from_str(line).with_context(|| format!("the access log of nginx: {line}"))?;
            // A request that reached no instance has no address.
            if let Ok(instance) = upstream.rsplit(", ").next().unwrap_or_default().parse() {
                forwarded.push((request_id, instance));
            }
        }
        Ok(forwarded.into_iter())
    }
}
