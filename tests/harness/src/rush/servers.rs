//! The servers of a rush: processes of the level's own program.

use std::{
    collections::HashMap,
    fs::{self, File},
    io::{BufRead, BufReader},
    net::SocketAddr,
    path::{Path, PathBuf},
    process::{ExitStatus, Stdio},
    time::Duration,
};

use anyhow::{Context, anyhow, bail, ensure};
use box_office::{BuyerId, Level, SaleId, Strategy, api, trace::Record};
use http_body_util::Full;
use hyper::{Request, StatusCode, header, http::request::Builder};
use rustix::process::{Pid, Signal, WaitId, WaitIdOptions, kill_process, waitid};
use tokio::{
    io::{AsyncBufReadExt, BufReader as AsyncBufReader},
    process::{Child, Command},
    sync::{Mutex, watch},
    time::{sleep, timeout},
};
use uuid::Uuid;

use super::{
    Rush,
    connection::{Connection, HttpResponse},
};
use crate::{
    backends::{Nginx, TestEnvironment, reaper},
    history::{self, Micros, Step},
};

/// Time limit for a server to listen, or to exit.
const TIMEOUT: Duration = Duration::from_secs(30);

/// The port of a server that may listen on any free one.
const ANY_PORT: u16 = 0;

/// How to start a server: a program, its arguments and its environment variables. A rush adds
/// variables of its own.
#[derive(Clone, Debug)]
pub struct Program {
    executable: PathBuf,
    arguments: Vec<String>,
    environment: Vec<(&'static str, String)>,
}

/// How many VIPs are named in one request: its body is limited.
const VIPS_AT_ONCE: usize = 500;

/// The server processes of one rush.
pub struct Servers {
    program: Program,
    environment: Vec<(&'static str, String)>,
    admin_token: String,
    traced: bool,
    instances: Vec<Mutex<Instance>>,
    live: watch::Sender<Vec<SocketAddr>>,
    nginx: Option<Nginx>,
    folder: PathBuf,
}

/// One server process.
struct Instance {
    process: Child,
    address: SocketAddr,
    log: PathBuf,
    traces: Vec<PathBuf>,
}

/// The steps that the servers traced.
#[derive(Default)]
pub struct Steps {
    /// By the id of the request.
    of_requests: HashMap<u64, Vec<Record>>,
    /// For each instance, the steps outside requests.
    beside: Vec<Vec<Record>>,
}

impl Program {
    /// A program that serves when it is started without arguments, such as a level's server.
    pub fn new(executable: impl Into<PathBuf>) -> Self {
        Self {
            executable: executable.into(),
            arguments: vec![],
            environment: vec![],
        }
    }

    /// Adds an argument.
    pub fn argument(mut self, argument: &str) -> Self {
        self.arguments.push(argument.to_owned());
        self
    }

    /// Adds an environment variable.
    pub fn variable(mut self, name: &'static str, value: impl Into<String>) -> Self {
        self.environment.push((name, value.into()));
        self
    }

    pub(crate) fn executable(&self) -> &Path {
        &self.executable
    }

    pub(crate) fn arguments(&self) -> &[String] {
        &self.arguments
    }
}

impl Servers {
    /// Starts the servers of a rush concurrently, and waits until each is ready.
    ///
    /// # Errors
    /// Fails, with the end of its log, if a server does not start.
    pub async fn start(
        rush: &Rush,
        environment: &TestEnvironment,
        program: &Program,
        level: &Level,
        strategy: &Strategy,
    ) -> anyhow::Result<Self> {
        ensure!(
            level.all().any(|known| std::ptr::eq(known, strategy)),
            "{} has no strategy {}",
            level.name,
            strategy.name
        );
        Self::start_named(rush, environment, program, strategy.name).await
    }

    /// Starts the servers like [`start`](Self::start), for a strategy given by its name in the
    /// program.
    ///
    /// # Errors
    /// As [`start`](Self::start).
    pub async fn start_named(
        rush: &Rush,
        environment: &TestEnvironment,
        program: &Program,
        strategy: &str,
    ) -> anyhow::Result<Self> {
        let admin_token = Uuid::new_v4().to_string();
        let mut environment = environment.variables();
        environment.extend([
            ("HOST", "127.0.0.1".to_owned()),
            ("STRATEGY", strategy.to_owned()),
            ("WORK_MS", rush.work.as_millis().to_string()),
            ("OVERSOLD_ADMIN_TOKEN", admin_token.clone()),
        ]);
        if let Some(pool_size) = rush.pool_size {
            environment.push(("DATABASE_POOL_SIZE", pool_size.to_string()));
        }
        environment.extend(rush.improvements.variables());
        // Every buyer is also an open file in this process.
        box_office::raise_open_files_limit();
        let folder = reaper::folder("rush")?;
        let mut servers = Self {
            program: program.clone(),
            environment,
            admin_token,
            traced: rush.traced,
            instances: vec![],
            live: watch::Sender::new(vec![]),
            nginx: None,
            folder,
        };
        let starting = (0..rush.instances).map(|number| servers.launch(number, 0, ANY_PORT));
        let instances = futures_util::future::try_join_all(starting).await?;
        for instance in &instances {
            ready(instance).await?;
        }
        let addresses: Vec<SocketAddr> = instances.iter().map(|instance| instance.address).collect();
        if let Some(nginx) = &rush.nginx {
            servers.nginx = Some(Nginx::start(nginx, &addresses).await?);
        }
        servers.live.send_replace(addresses);
        servers.instances = instances.into_iter().map(Mutex::new).collect();
        Ok(servers)
    }

    /// The addresses of the live instances, as a load balancer would know them.
    pub fn live(&self) -> watch::Receiver<Vec<SocketAddr>> {
        self.live.subscribe()
    }

    /// The addresses that buyers connect to: that of nginx, or those of the live instances.
    pub(super) fn entry_points(&self) -> watch::Receiver<Vec<SocketAddr>> {
        match &self.nginx {
            Some(nginx) => watch::Sender::new(vec![nginx.address()]).subscribe(),
            None => self.live(),
        }
    }

    /// The nginx in front of the instances, if the rush has one.
    pub fn nginx(&self) -> Option<&Nginx> {
        self.nginx.as_ref()
    }

    /// Ends nginx. Returns the instance that it sent each request to; nothing without an nginx.
    pub(super) async fn stop_nginx(&mut self) -> anyhow::Result<HashMap<u64, SocketAddr>> {
        let Some(nginx) = self.nginx.take() else {
            return Ok(HashMap::new());
        };
        nginx.stop().await?;
        nginx.sent_to()
    }

    /// Opens a sale as an administrator.
    ///
    /// # Errors
    /// Fails if the sale is open already or the server does not answer.
    pub async fn open_sale(&self, sale: SaleId, capacity: u32) -> anyhow::Result<()> {
        let body = serde_json::to_vec(&api::NewSale {
            name: "the last tickets".to_owned(),
            capacity: capacity.into(),
        })?;
        let answered = self.as_admin(Request::put(format!("/api/sales/{sale}")), body).await?;
        ensure!(
            answered.status == StatusCode::CREATED,
            "opening the sale was answered with {}: {}",
            answered.status,
            String::from_utf8_lossy(&answered.body)
        );
        Ok(())
    }

    /// Names VIPs of a sale as an administrator.
    ///
    /// # Errors
    /// Fails if a server does not answer, or has no priority.
    pub async fn name_vips(&self, sale: SaleId, buyers: &[BuyerId]) -> anyhow::Result<()> {
        for buyers in buyers.chunks(VIPS_AT_ONCE) {
            let body = serde_json::to_vec(&api::NewVips {
                buyer_ids: buyers.to_vec(),
            })?;
            let request = Request::post(format!("/api/sales/{sale}/vips"));
            let answered = self.as_admin(request, body).await?;
            ensure!(
                answered.status == StatusCode::NO_CONTENT,
                "naming VIPs was answered with {}: {}",
                answered.status,
                String::from_utf8_lossy(&answered.body)
            );
        }
        Ok(())
    }

    async fn as_admin(&self, request: Builder, body: Vec<u8>) -> anyhow::Result<HttpResponse> {
        let address = *self.live.borrow().first().context("no instance is running")?;
        let request = request
            .header(header::CONTENT_TYPE, "application/json")
            .header(header::AUTHORIZATION, format!("Bearer {}", self.admin_token))
            .body(Full::from(body))?;
        Connection::open(address).await?.send(request).await
    }

    /// The current or last address of an instance.
    pub(super) async fn address(&self, instance: usize) -> anyhow::Result<SocketAddr> {
        Ok(self.instance(instance)?.lock().await.address)
    }

    /// Kills an instance (SIGKILL). Clients stop using it at once.
    pub(crate) async fn kill(&self, instance: usize) -> anyhow::Result<ExitStatus> {
        let mut instance = self.instance(instance)?.lock().await;
        self.remove_from_live(instance.address);
        instance.process.start_kill()?;
        Ok(instance.process.wait().await?)
    }

    /// Terminates an instance (SIGTERM), and starts a new one once it has exited.
    pub(super) async fn restart(&self, number: usize) -> anyhow::Result<ExitStatus> {
        let mut instance = self.instance(number)?.lock().await;
        self.remove_from_live(instance.address);
        let status = instance.terminate().await?;
        let traces = std::mem::take(&mut instance.traces);
        // nginx knows an instance by its address.
        let port = match self.nginx {
            Some(_) => instance.address.port(),
            None => ANY_PORT,
        };
        *instance = self.launch(number, traces.len(), port).await?;
        instance.traces.splice(0..0, traces);
        if let Some(nginx) = &self.nginx {
            ready(&instance).await?;
            timeout(TIMEOUT, nginx.forwards_to(instance.address))
                .await
                .context("nginx does not use the new instance")??;
        }
        self.live.send_modify(|live| live.push(instance.address));
        Ok(status)
    }

    /// The administration token of these servers.
    pub fn admin_token(&self) -> &str {
        &self.admin_token
    }

    /// The pid of an instance.
    ///
    /// # Errors
    /// Fails if the instance does not exist or has exited.
    pub async fn pid(&self, instance: usize) -> anyhow::Result<u32> {
        self.instance(instance)?
            .lock()
            .await
            .process
            .id()
            .context("it has exited")
    }

    /// What an instance has logged.
    ///
    /// # Errors
    /// Fails if the instance does not exist, or its log cannot be read.
    pub(crate) async fn log(&self, instance: usize) -> anyhow::Result<String> {
        Ok(fs::read_to_string(&self.instance(instance)?.lock().await.log)?)
    }

    /// The sum of `oversold_retries_total` over the live servers. A server without this metric
    /// counts as 0.
    ///
    /// # Errors
    /// Fails if a server does not answer.
    pub async fn retries(&self) -> anyhow::Result<u64> {
        let live = self.live.borrow().clone();
        let mut retries = 0;
        for address in live {
            let request = Request::get("/metrics").body(Full::default())?;
            let answered = Connection::open(address).await?.send(request).await?;
            let text = String::from_utf8(answered.body.to_vec())?;
            let counted = text
                .lines()
                .find_map(|line| line.strip_prefix("oversold_retries_total "));
            retries += counted.map_or(Ok(0), |counted| counted.trim().parse::<u64>())?;
        }
        Ok(retries)
    }

    /// Terminates all running servers (SIGTERM). Each must answer its requests in flight and exit
    /// with code 0.
    ///
    /// # Errors
    /// Fails, with the end of its log, if a server does not.
    pub async fn stop(self) -> anyhow::Result<Steps> {
        let mut steps = Steps::default();
        for instance in self.instances {
            let mut instance = instance.into_inner();
            if instance.process.try_wait()?.is_none() {
                let status = instance.terminate().await?;
                ensure!(
                    status.success(),
                    "a server exited with {status}\n{}",
                    tail(&instance.log)
                );
            }
            let mut beside = vec![];
            for trace in instance.traces.iter().filter(|trace| trace.exists()) {
                for line in BufReader::new(File::open(trace)?).lines() {
                    let record: Record = serde_json::from_str(&line?)?;
                    match record.request.parse() {
                        Ok(request) => steps.of_requests.entry(request).or_default().push(record),
                        Err(_) => beside.push(record),
                    }
                }
            }
            steps.beside.push(beside);
        }
        fs::remove_dir_all(&self.folder)?;
        Ok(steps)
    }

    fn instance(&self, number: usize) -> anyhow::Result<&Mutex<Instance>> {
        let started = self.instances.len();
        self.instances
            .get(number)
            .with_context(|| format!("there is no instance {}: {started} were started", number + 1))
    }

    fn remove_from_live(&self, address: SocketAddr) {
        self.live.send_modify(|live| live.retain(|&other| other != address));
    }

    async fn launch(&self, number: usize, generation: usize, port: u16) -> anyhow::Result<Instance> {
        let name = format!("instance-{}-{generation}", number + 1);
        let log = self.folder.join(format!("{name}.log"));
        let mut command = Command::from(reaper::command(&self.program.executable)?);
        command
            .args(&self.program.arguments)
            .env("PORT", port.to_string())
            .envs(self.environment.iter().map(|(name, value)| (name, value)))
            .envs(self.program.environment.iter().map(|(name, value)| (name, value)))
            .env("INSTANCE", (number + 1).to_string())
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(File::create(&log)?)
            .kill_on_drop(true);
        let mut traces = vec![];
        if self.traced {
            let trace = self.folder.join(format!("{name}.trace"));
            command.env("OVERSOLD_TRACE_FILE", &trace);
            traces.push(trace);
        }
        let mut process = command
            .spawn()
            .with_context(|| format!("starting {}", self.program.executable.display()))?;
        let output = process.stdout.take().context("its output is piped")?;
        let mut line = String::new();
        let mut output = AsyncBufReader::new(output);
        let read = timeout(TIMEOUT, output.read_line(&mut line)).await;
        let address = line
            .trim()
            .rsplit_once("http://")
            .and_then(|(_, address)| address.parse().ok());
        match (read, address) {
            (Ok(Ok(_)), Some(address)) => Ok(Instance {
                process,
                address,
                log,
                traces,
            }),
            (Err(_), _) => bail!("after {TIMEOUT:?} the server did not print its address\n{}", tail(&log)),
            (Ok(read), _) => {
                read?;
                bail!("the server did not print its address\n{}", tail(&log))
            }
        }
    }
}

impl Instance {
    async fn terminate(&mut self) -> anyhow::Result<ExitStatus> {
        let pid = self.process.id().and_then(|pid| Pid::from_raw(pid.cast_signed()));
        kill_process(pid.context("it has exited already")?, Signal::TERM)?;
        timeout(TIMEOUT, self.process.wait())
            .await
            .map_err(|_| anyhow!("{TIMEOUT:?} after SIGTERM the server still runs\n{}", tail(&self.log)))?
            .map_err(Into::into)
    }
}

impl Steps {
    /// The traced steps of a request.
    pub fn of(&self, request: u64) -> &[Record] {
        self.of_requests.get(&request).map_or(&[], Vec::as_slice)
    }

    /// Adds its steps to each request, and returns the remaining steps of each instance.
    pub(super) fn add_to(mut self, requests: &mut [history::Request], started_us: Micros) -> Vec<Vec<Record>> {
        for request in requests {
            let mut records = self.of_requests.remove(&request.request).unwrap_or_default();
            records.sort_by_key(|record| record.at_us);
            request.steps = records
                .into_iter()
                .map(|record| Step {
                    at_us: record.at_us.saturating_sub(started_us),
                    step: record.step,
                    saw: record.saw,
                    place: record.place,
                })
                .collect();
        }
        self.beside
    }
}

/// Waits until a process is stopped (SIGSTOP).
///
/// # Errors
/// Fails if it is no child of this process, or has exited.
pub(crate) async fn until_stopped(pid: Pid) -> anyhow::Result<()> {
    let stopped = WaitIdOptions::STOPPED | WaitIdOptions::NOHANG | WaitIdOptions::NOWAIT;
    while waitid(WaitId::Pid(pid), stopped)?.is_none() {
        sleep(Duration::from_millis(1)).await;
    }
    Ok(())
}

/// Waits until a server is ready, or stopped at its breakpoint. A consumer is ready once it has its
/// partitions.
async fn ready(instance: &Instance) -> anyhow::Result<()> {
    let polling = async {
        loop {
            let request = Request::get("/readyz").body(Full::default())?;
            let answered = Connection::open(instance.address).await?.send(request).await?;
            if answered.status != StatusCode::SERVICE_UNAVAILABLE {
                return anyhow::Ok(());
            }
            sleep(Duration::from_millis(5)).await;
        }
    };
    let pid = instance.process.id().and_then(|pid| Pid::from_raw(pid.cast_signed()));
    let stopped = until_stopped(pid.context("it has exited already")?);
    let ready_or_stopped = async {
        tokio::select! {
            ready = polling => ready,
            stopped = stopped => stopped,
        }
    };
    timeout(TIMEOUT, ready_or_stopped)
        .await
        .map_err(|_| anyhow!("after {TIMEOUT:?} the server is not ready\n{}", tail(&instance.log)))?
}

/// The last 20 lines of a log.
fn tail(log: &Path) -> String {
    let text = fs::read_to_string(log).unwrap_or_default();
    let lines: Vec<&str> = text.lines().collect();
    lines[lines.len().saturating_sub(20)..].join("\n")
}
