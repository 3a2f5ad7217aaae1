//! `oversold stand`: a level as a team would run it, on a machine without a container engine. Several instances, nginx in front of them,
//! and Prometheus, as processes of this machine.

use std::{
    fs::OpenOptions,
    io::{ErrorKind, Write},
    net::{Ipv4Addr, SocketAddr, TcpListener},
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
};

use anyhow::{Context, ensure};
use clap::Args;
use harness::{
    backends::{
        Durability, NginxSettings, Prometheus, PrometheusSettings, Services, TestEnvironment, free_port,
        on_system_path, reaper,
    },
    payments::PaymentService,
    rush::{Rush, Servers},
};

use crate::{
    checkout::root,
    cli::number,
    commands::{
        rush::{self, SaleArgs},
        tool,
    },
    exit::ExitKind,
    interrupt::Signals,
    levels::SelectedStrategy,
};

/// How to get nginx and Prometheus.
const INSTALL: &str = "infra/test-tools.sh nginx prometheus";

#[derive(Args)]
pub(crate) struct StandArgs {
    /// The level to serve, or one strategy as LEVEL/STRATEGY.
    #[arg(value_name = "LEVEL[/STRATEGY]", default_value = "lv4")]
    level: String,
    /// The strategy of the level [default: its first].
    #[arg(long, value_name = "NAME")]
    strategy: Option<String>,
    /// Server processes behind nginx.
    #[arg(long, default_value_t = 3, value_parser = number(1..=16))]
    instances: u32,
    /// The port of nginx [default: any free one].
    #[arg(long, value_name = "PORT", value_parser = port)]
    nginx_port: Option<u16>,
    /// The port of Prometheus [default: any free one].
    #[arg(long, value_name = "PORT", value_parser = port, conflicts_with = "rush")]
    prometheus_port: Option<u16>,
    /// Send the rush of `oversold rush` through nginx, print its verdict, and end. Prometheus is not started.
    #[arg(long)]
    rush: bool,
    #[command(flatten)]
    sale: SaleArgs,
}

fn port(text: &str) -> Result<u16, &'static str> {
    match text.parse() {
        Ok(port) if port > 0 => Ok(port),
        _ => Err("a port number, 1 to 65535"),
    }
}

/// Runs the stand until a signal, or until its rush is judged.
///
/// # Errors
/// A program or a backend is missing, a port is taken, or a process does not start or end as it should.
pub(crate) async fn run(args: &StandArgs) -> anyhow::Result<ExitKind> {
    let selected = selected(args)?;
    args.sale.check(&selected)?;
    let folder = root().join("infra/stand");
    // Known before nginx starts: the instances start before it, and a rush from their live page goes through it.
    let site = match free("--nginx-port", args.nginx_port)? {
        Some(port) => port,
        None => free_port()?,
    };
    let nginx = NginxSettings {
        executable: tool::needed(on_system_path("nginx"), "nginx", INSTALL)?,
        template: folder.join("nginx/nginx.conf.template"),
        port: Some(site),
    };
    let rush = Rush {
        clicks: selected.strategy.clicks,
        instances: args.instances as usize,
        nginx: Some(nginx),
        improvements: args.sale.improvements(),
        payments: args.sale.payment_service()?,
        ..Rush::default()
    };
    let mut signals = Signals::listen()?;
    if args.rush {
        return signals.or_end(judged_rush(&rush, &selected)).await;
    }
    let prometheus = PrometheusSettings {
        executable: tool::needed(on_system_path("prometheus"), "prometheus", INSTALL)?,
        configuration: folder.join("prometheus"),
        port: free("--prometheus-port", args.prometheus_port)?,
    };
    let site = format!("http://{}:{site}", Ipv4Addr::LOCALHOST);
    let stand = signals
        .or_end(Stand::start(&rush, site, &prometheus, &selected))
        .await?;
    stand.print(&selected).await?;
    signals.next().await;
    signals.or_end(stand.stop()).await?;
    Ok(ExitKind::AsPromised)
}

async fn judged_rush(rush: &Rush, selected: &SelectedStrategy) -> anyhow::Result<ExitKind> {
    let services = Services::find(Durability::Durable, selected.strategy.needs).await?;
    println!(
        "{} buyers, {} tickets, {} instance(s) behind nginx",
        rush.buyers, rush.capacity, rush.instances
    );
    rush::run_and_print(rush, selected, &services).await
}

fn selected(args: &StandArgs) -> anyhow::Result<SelectedStrategy> {
    let Some(strategy) = &args.strategy else {
        return SelectedStrategy::one(&args.level);
    };
    ensure!(
        !args.level.contains('/'),
        "{} names a strategy already: leave out --strategy",
        args.level
    );
    SelectedStrategy::one(&format!("{}/{strategy}", args.level))
}

/// Checks that nobody listens on a port, so that the message names it, and not the log of a server.
fn free(flag: &str, port: Option<u16>) -> anyhow::Result<Option<u16>> {
    let Some(port) = port else { return Ok(None) };
    match TcpListener::bind((Ipv4Addr::LOCALHOST, port)) {
        Ok(_) => Ok(Some(port)),
        Err(error) if error.kind() == ErrorKind::AddrInUse => {
            Err(error).context(format!("{flag}: port {port} is taken; choose another, or leave it out"))
        }
        Err(error) => Err(error).context(format!("{flag}: port {port} can't be bound")),
    }
}

fn write_private(file: &Path, text: &str) -> anyhow::Result<()> {
    let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(file)?;
    Ok(file.write_all(text.as_bytes())?)
}

/// Where the services are, as lines of a shell. psql takes the database's URL, too.
fn exports(environment: &TestEnvironment) -> String {
    /// The driver's own parameter.
    const NOT_FOR_PSQL: &str = "statement-cache-capacity=";

    let lines = environment.variables().into_iter().map(|(name, value)| {
        let value = match value.split_once('?') {
            Some((address, parameters)) => {
                let kept = parameters.split('&').filter(|it| !it.starts_with(NOT_FOR_PSQL));
                format!("{address}?{}", kept.collect::<Vec<_>>().join("&"))
            }
            None => value,
        };
        format!("export {name}='{value}'\n")
    });
    lines.collect()
}

/// Everything that runs. Dropping it ends all of it.
struct Stand {
    prometheus: Prometheus,
    servers: Servers,
    payments: Option<PaymentService>,
    /// A file that only this user can read.
    admin_token: PathBuf,
    /// Another one, for a shell: where the services are, with their passwords.
    variables: PathBuf,
    /// Migrated before the first instance starts, as it is a copy of a database that was.
    environment: TestEnvironment,
    services: Services,
}

impl Stand {
    async fn start(
        rush: &Rush,
        site: String,
        prometheus: &PrometheusSettings,
        selected: &SelectedStrategy,
    ) -> anyhow::Result<Self> {
        let services = Services::find(Durability::Durable, selected.strategy.needs).await?;
        let environment = services.environment(selected.strategy.schema).await?;
        let mut rush = rush.clone();
        let payments = match &rush.payments {
            Some(program) => Some(PaymentService::start(program).await?),
            None => None,
        };
        if let Some(payments) = &payments {
            rush.improvements.payment_url = Some(payments.url().parse()?);
        }
        let servers = Servers::start(
            &rush,
            &environment,
            &selected.program()?.variable("RUSH_URL", site),
            selected.level,
            selected.strategy,
        )
        .await?;
        let instances = servers.live().borrow().clone();
        let prometheus = Prometheus::start(prometheus, &[("oversold", instances)]).await?;
        let folder = reaper::folder("stand")?;
        let admin_token = folder.join("admin-token");
        write_private(&admin_token, servers.admin_token())?;
        let variables = folder.join("environment");
        write_private(&variables, &exports(&environment))?;
        Ok(Self {
            prometheus,
            servers,
            payments,
            admin_token,
            variables,
            environment,
            services,
        })
    }

    /// Prints where everything is. The admin token is not printed: a terminal's output ends up in logs and on projectors.
    async fn print(&self, selected: &SelectedStrategy) -> anyhow::Result<()> {
        let site = self.servers.nginx().context("nginx was started")?.address();
        let token = self.admin_token.display();
        let line = |what: &str, address: SocketAddr, more: &str| println!("{what:<12} http://{address}{more}");
        println!(
            "{}: {} instance(s) behind nginx; Ctrl-C ends everything",
            selected.name(),
            self.servers.live().borrow().len()
        );
        line("site", site, "");
        line("live page", site, "/live");
        line("Prometheus", self.prometheus.address(), "");
        let instances = self.servers.live().borrow().clone();
        for (number, address) in instances.into_iter().enumerate() {
            let pid = self.servers.pid(number).await?;
            line(&format!("instance {}", number + 1), address, &format!(" (pid {pid})"));
        }
        if let Some(payments) = &self.payments {
            println!("{:<12} {}", "payments", payments.url());
        }
        println!("{:<12} in {token}", "admin token");
        println!(
            "{:<12} in {1}: `. {1}` in a shell, then psql \"$DATABASE_URL\"",
            "services",
            self.variables.display()
        );
        println!(
            "to open a sale:\n  curl -X PUT http://{site}/api/sales/1 -H \"Authorization: Bearer $(cat {token})\" \
             -H 'Content-Type: application/json' -d '{{\"name\":\"the last tickets\",\"capacity\":100}}'"
        );
        Ok(())
    }

    /// Ends everything: nginx first, so that nothing new comes in while the instances drain.
    async fn stop(self) -> anyhow::Result<()> {
        let Self {
            prometheus,
            servers,
            payments,
            environment,
            services,
            ..
        } = self;
        println!("draining");
        if let Some(nginx) = servers.nginx() {
            nginx.stop().await?;
        }
        prometheus.stop().await?;
        servers.stop().await?;
        drop((payments, environment, services));
        Ok(())
    }
}
