//! `load rush`: for each strategy, backends from the harness, a server of the command `oversold`, and both generators against it.

use std::{env, path::Path, process::Command, time::Duration};

use anyhow::{Context, bail, ensure};
use box_office::{Improvement, Improvements, Invariant, SaleId, Schema, Service};
use harness::{
    backends::{Durability, Services},
    payments::{PaymentService, with_short_holds},
    rush::{Program, Servers},
};
use serde::Deserialize;
use sqlx::migrate::Migrator;

use crate::{
    Rush, RushArgs, RushSize, goose, k6,
    outcome::{ExitKind, Outcome},
    promises,
};

/// Without tables: a server creates those of its strategy when it starts.
const EMPTY: Schema = Schema {
    name: "load",
    migrations: &Migrator::DEFAULT,
};

/// The sale of the rush by Goose.
const GOOSE_SALE: SaleId = 1;
/// The sale of the rush by k6.
const K6_SALE: SaleId = 2;

/// A strategy as `oversold list --json` prints it.
#[derive(Deserialize)]
struct Strategy {
    name: String,
    mutant: bool,
    clicks: u32,
    needs: Vec<String>,
    improvements: Vec<String>,
    single_instance: Promised,
}

#[derive(Deserialize)]
struct Promised {
    breaks: Vec<Invariant>,
    leaves_open: Vec<Invariant>,
}

/// Runs Goose and k6 against every selected strategy, and prints the results.
pub(crate) async fn run(args: &RushArgs) -> anyhow::Result<ExitKind> {
    let oversold = match &args.oversold {
        Some(named) => std::path::absolute(named)?,
        None => env::current_exe()?.with_file_name("oversold"),
    };
    for (file, what) in [
        (&oversold, "`cargo build -p oversold` builds it"),
        (&args.k6, "`make target/tools/bin/k6` builds it"),
        (&args.script, "run this at the root of the repository"),
    ] {
        ensure!(file.exists(), "there is no {}: {what}", file.display());
    }
    let selected = select(list(&oversold)?, args)?;
    let payments = match &args.payments {
        Some(mix) => {
            let program = Program::new(&oversold).argument("payment-service");
            let started = PaymentService::start(&program.argument("--behave").argument(mix)).await;
            Some(started.context("--payments")?)
        }
        None => None,
    };
    let needed = |service: &Service| {
        let mut names = selected.iter().flat_map(|strategy| &strategy.needs);
        names.any(|name| name == service.name())
    };
    let needs: Vec<Service> = [Service::Redis, Service::Kafka].into_iter().filter(needed).collect();
    let services = Services::find(Durability::Durable, &needs).await?;
    let mut outcomes = vec![];
    for strategy in &selected {
        let name = &strategy.name;
        eprintln!("{name}: Goose, then k6");
        outcomes.extend(
            run_strategy(args, &oversold, strategy, payments.as_ref(), &services)
                .await
                .with_context(|| name.clone())?,
        );
    }
    Ok(Outcome::print(&outcomes))
}

/// All strategies.
fn list(oversold: &Path) -> anyhow::Result<Vec<Strategy>> {
    let output = Command::new(oversold).args(["list", "--json"]).output()?;
    serde_json::from_slice(&output.stdout).with_context(|| format!("what {} lists", oversold.display()))
}

impl Strategy {
    /// Whether it holds a ticket until it is paid for.
    fn holds_tickets(&self) -> bool {
        self.improvements.iter().any(|name| name == Improvement::Saga.name())
    }
}

/// The strategies with these names: a strategy, or a level for its main strategies; where payments are taken, those that hold tickets.
fn select(listed: Vec<Strategy>, args: &RushArgs) -> anyhow::Result<Vec<Strategy>> {
    let names = &args.levels;
    let matches = |strategy: &Strategy, name: &String| match strategy.name.split_once('/') {
        _ if strategy.name == *name => true,
        Some((level, _)) => level == name && !strategy.mutant,
        None => false,
    };
    if let Some(unknown) = names
        .iter()
        .find(|name| !listed.iter().any(|strategy| matches(strategy, name)))
    {
        let known: Vec<&str> = listed.iter().map(|strategy| strategy.name.as_str()).collect();
        bail!(
            "there is no level or strategy {unknown:?}; there is {}",
            known.join(", ")
        );
    }
    let is_wanted = |strategy: &Strategy| args.payments.is_none() || strategy.holds_tickets();
    if let Some(name) = names.iter().find(|name| {
        !listed
            .iter()
            .any(|strategy| matches(strategy, name) && is_wanted(strategy))
    }) {
        bail!("--payments is given, but {name} holds no tickets; lv4/single-writer does");
    }
    let selected = listed
        .into_iter()
        .filter(|strategy| is_wanted(strategy) && names.iter().any(|name| matches(strategy, name)));
    Ok(selected.collect())
}

async fn run_strategy(
    args: &RushArgs,
    oversold: &Path,
    strategy: &Strategy,
    payments: Option<&PaymentService>,
    services: &Services,
) -> anyhow::Result<Vec<Outcome>> {
    let (level, name) = strategy.name.split_once('/').context("a name is LEVEL/STRATEGY")?;
    let program = Program::new(oversold).argument("serve").argument(level);
    let stand = services.environment(EMPTY).await?;
    let settings = settings(strategy, payments)?;
    let servers = Servers::start_named(&settings, &stand, &program, name).await?;
    let address = *servers.live().borrow().first().context("no server lives")?;
    let (size, clicks) = stress(args.size, strategy);
    let Promised { breaks, leaves_open } = &strategy.single_instance;
    let goose_rush = Rush {
        name: strategy.name.clone(),
        host: address.into(),
        admin_token: servers.admin_token().to_owned(),
        sale: GOOSE_SALE,
        size,
        clicks,
        payments: payments.map(|service| service.address().into()),
        expiry: settings.improvements.hold,
        promises: promises(breaks, leaves_open),
    };
    let mut k6_rush = Rush {
        sale: K6_SALE,
        ..goose_rush.clone()
    };
    if env::var_os("SCENARIO").is_some_and(|scenario| scenario == "arrivals") {
        // Buyers at a constant rate need not cause what a rush does.
        k6_rush.promises = promises(&[], &[breaks.as_slice(), leaves_open].concat());
    }
    let outcomes = vec![
        goose::run(&goose_rush).await.context("Goose")?,
        k6::run(args, &k6_rush).await.context("k6")?,
    ];
    servers.stop().await?;
    Ok(outcomes)
}

/// The settings of the server. Where two clicks of one buyer have to overlap in it, its pool is larger than by default, and each request works
/// inside the critical section, like one that asks for a payment.
fn settings(strategy: &Strategy, payments: Option<&PaymentService>) -> anyhow::Result<harness::rush::Rush> {
    let mut settings = harness::rush::Rush::default();
    if let Some(payments) = payments {
        settings.improvements = with_short_holds(Improvements {
            payment_url: Some(payments.url().parse()?),
            ..Improvements::default()
        });
    }
    if strategy.single_instance.breaks.contains(&Invariant::NoDuplicate) {
        settings.pool_size = Some(32);
        settings.work = Duration::from_millis(5);
    }
    Ok(settings)
}

/// The size of the rush and the clicks of each buyer that put the guarantee to the test.
///
/// Two clicks of one buyer that leave together do not arrive together: in either generator other buyers' requests come between them. Where
/// they have to overlap in the server, fewer buyers click more often: as many requests, far more pairs of clicks.
fn stress(size: RushSize, strategy: &Strategy) -> (RushSize, u32) {
    const FEWER: u32 = 25;

    if strategy.single_instance.breaks.contains(&Invariant::NoDuplicate) {
        let buyers = size.buyers.div_ceil(FEWER);
        (RushSize { buyers, ..size }, strategy.clicks * FEWER)
    } else {
        (size, strategy.clicks)
    }
}
