//! Prometheus as a native process.

use std::{
    fs,
    net::{Ipv4Addr, SocketAddr},
    path::{Path, PathBuf},
};

use anyhow::Context;
use rustix::process::Signal;
use serde_json::{Value, json};

use super::{
    managed_server::{ManagedServer, http_probe},
    native::{Home, Memory, Process},
};

const SERVICE: &str = "prometheus";

/// How to start Prometheus.
#[derive(Clone, Debug)]
pub struct PrometheusSettings {
    /// The program.
    pub executable: PathBuf,
    /// The folder of its configuration, `infra/stand/prometheus`.
    pub configuration: PathBuf,
    /// The port to listen on; `None`: any free one.
    pub port: Option<u16>,
}

/// A running Prometheus. Dropping it ends it, and discards what it has stored.
pub struct Prometheus {
    server: ManagedServer,
    address: SocketAddr,
}

impl Prometheus {
    /// Starts Prometheus, which scrapes these addresses of each job, and waits until it is ready.
    ///
    /// # Errors
    /// Fails, with the end of its log, if it does not start.
    pub async fn start(settings: &PrometheusSettings, targets: &[(&str, Vec<SocketAddr>)]) -> anyhow::Result<Self> {
        let source = &settings.configuration;
        let home = Home::make(SERVICE, Memory::Never)?;
        let folder = home.folder().to_owned();
        copy_rules(source, &home)?;
        let target_folder = folder.join("targets");
        fs::create_dir(&target_folder)?;
        home.chown_to_server_user(&target_folder)?;
        let target_file = target_folder.join("targets.yml");
        let groups = targets
            .iter()
            .map(|(job, addresses)| json!({ "targets": addresses, "labels": { "job": job } }));
        // JSON is YAML.
        fs::write(&target_file, Value::Array(groups.collect()).to_string())?;
        home.chown_to_server_user(&target_file)?;

        let file = folder.join("prometheus.yml");
        fs::copy(source.join("prometheus.yml"), &file)
            .with_context(|| format!("reading the configuration in {}", source.display()))?;
        home.chown_to_server_user(&file)?;
        let arguments = vec![
            format!("--config.file={}", file.display()).into(),
            format!("--storage.tsdb.path={}", folder.join("data").display()).into(),
            "--log.level=warn".into(),
        ];
        let configure = move |port: u16| {
            Ok(vec![
                format!("--web.listen-address={}:{port}", Ipv4Addr::LOCALHOST).into(),
            ])
        };
        let process = Process::new(home, settings.executable.clone(), arguments, Box::new(configure))
            .fixed_port(settings.port)
            .stop_signal(Signal::TERM);
        let server = ManagedServer::as_process(process, http_probe("/-/ready")).await?;
        let (host, port) = server.address();
        let address = SocketAddr::new(host.parse()?, port);
        Ok(Self { server, address })
    }

    /// The address that it listens on.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Shuts it down gracefully.
    ///
    /// # Errors
    /// Fails if it does not exit in time.
    pub async fn stop(&self) -> anyhow::Result<()> {
        self.server.stop().await
    }
}

/// Copies the folder of alert rules, if there is one, to where the user that runs the server can
/// read it.
fn copy_rules(source: &Path, home: &Home) -> anyhow::Result<()> {
    let Ok(rules) = fs::read_dir(source.join("rules")) else {
        return Ok(());
    };
    let copies = home.folder().join("rules");
    fs::create_dir(&copies)?;
    home.chown_to_server_user(&copies)?;
    for rule in rules {
        let rule = rule?;
        let copy = copies.join(rule.file_name());
        fs::copy(rule.path(), &copy)?;
        home.chown_to_server_user(&copy)?;
    }
    Ok(())
}
