//! `load rush`: the stand. Postgres by the suite's means, a server of the command `oversold`, and both generators against it.

use std::{
    env,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::Duration,
};

use anyhow::{Context, bail, ensure};
use box_office::{Invariant, Promise, SaleId, Schema, Service};
use harness::{
    backends::{Durability, Services, reaper},
    rush::{Program, Servers},
};
use serde::Deserialize;
use sqlx::migrate::Migrator;

use crate::{
    Crowd, Rush, RushArgs, attack,
    outcome::{Ended, Outcome},
    promises,
};

/// No tables: a server makes those of its strategy when it starts.
const EMPTY: Schema = Schema {
    name: "load",
    migrations: &Migrator::DEFAULT,
};

/// The sale that Goose sells out.
const GOOSE_SALE: SaleId = 1;
/// The one that k6 does.
const K6_SALE: SaleId = 2;

/// What k6 exits with when a threshold did not hold.
const THRESHOLDS_CROSSED: i32 = 99;

/// A strategy as `oversold list --json` tells of it.
#[derive(Deserialize)]
struct Strategy {
    name: String,
    mutant: bool,
    clicks: u32,
    needs: Vec<String>,
    single_instance: Promised,
}

#[derive(Deserialize)]
struct Promised {
    breaks: Vec<Invariant>,
    leaves_open: Vec<Invariant>,
}

/// Runs Goose and k6 against every chosen strategy, and prints what came of it.
pub(crate) async fn rush(args: &RushArgs) -> anyhow::Result<Ended> {
    for (file, what) in [
        (&args.oversold, "`cargo build -p oversold` builds it"),
        (&args.k6, "`make target/tools/bin/k6` builds it"),
        (&args.script, "run this at the root of the repository"),
    ] {
        ensure!(file.exists(), "there is no {}: {what}", file.display());
    }
    let chosen = choose(list(&args.oversold)?, &args.levels)?;
    let needed = |service: &Service| {
        let mut names = chosen.iter().flat_map(|strategy| &strategy.needs);
        names.any(|name| name == service.name())
    };
    let needs: Vec<Service> = [Service::Redis, Service::Kafka].into_iter().filter(needed).collect();
    let services = Services::find(Durability::Durable, &needs).await?;
    let mut outcomes = vec![];
    for strategy in &chosen {
        let name = &strategy.name;
        eprintln!("{name}: Goose, then k6");
        outcomes.extend(one(args, strategy, &services).await.with_context(|| name.clone())?);
    }
    Ok(Outcome::print(&outcomes))
}

/// What there is.
fn list(oversold: &Path) -> anyhow::Result<Vec<Strategy>> {
    let output = Command::new(oversold).args(["list", "--json"]).output()?;
    serde_json::from_slice(&output.stdout).with_context(|| format!("what {} lists", oversold.display()))
}

/// A strategy, or all on the trail of a level.
fn choose(listed: Vec<Strategy>, names: &[String]) -> anyhow::Result<Vec<Strategy>> {
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
    let chosen = listed
        .into_iter()
        .filter(|strategy| names.iter().any(|name| matches(strategy, name)));
    Ok(chosen.collect())
}

async fn one(args: &RushArgs, strategy: &Strategy, services: &Services) -> anyhow::Result<Vec<Outcome>> {
    let (level, name) = strategy.name.split_once('/').context("a name is LEVEL/STRATEGY")?;
    let program = Program::new(std::path::absolute(&args.oversold)?)
        .argument("serve")
        .argument(level);
    let stand = services.environment(EMPTY).await?;
    let servers = Servers::start_named(&setting(strategy), &stand, &program, name).await?;
    let address = *servers.live().borrow().first().context("no server lives")?;
    let (crowd, clicks) = stress(args.crowd, strategy);
    let Promised { breaks, leaves_open } = &strategy.single_instance;
    let goose_rush = Rush {
        name: strategy.name.clone(),
        host: address.into(),
        admin_token: servers.admin_token().to_owned(),
        sale: GOOSE_SALE,
        crowd,
        clicks,
        promises: promises(breaks, leaves_open),
    };
    let mut k6_rush = Rush {
        sale: K6_SALE,
        ..goose_rush.clone()
    };
    if env::var_os("SCENARIO").is_some_and(|scenario| scenario == "arrivals") {
        // A calm stream of buyers need not show what a rush does.
        k6_rush.promises = promises(&[], &[breaks.as_slice(), leaves_open].concat());
    }
    let outcomes = vec![
        attack::run(&goose_rush).await.context("Goose")?,
        k6(args, &k6_rush).await.context("k6")?,
    ];
    servers.stop().await?;
    Ok(outcomes)
}

/// How the server is set up. Where two clicks of one buyer have to meet in it, more requests are let to the database at once than by default,
/// and each takes its time there, as one that asks for a payment does.
fn setting(strategy: &Strategy) -> harness::rush::Rush {
    let mut setting = harness::rush::Rush::default();
    if strategy.single_instance.breaks.contains(&Invariant::NoDuplicate) {
        setting.pool_size = Some(32);
        setting.work = Duration::from_millis(5);
    }
    setting
}

/// Who has to come for the guarantee to be tried.
///
/// Two clicks of one buyer that leave together do not arrive together: in either generator other buyers' requests come between them. Where
/// they have to meet in the server, few buyers come and click all the more often: as many requests, far more pairs of them.
fn stress(crowd: Crowd, strategy: &Strategy) -> (Crowd, u32) {
    const FEWER: u32 = 25;

    if strategy.single_instance.breaks.contains(&Invariant::NoDuplicate) {
        let buyers = crowd.buyers.div_ceil(FEWER);
        (Crowd { buyers, ..crowd }, strategy.clicks * FEWER)
    } else {
        (crowd, strategy.clicks)
    }
}

/// Runs the script of k6.
async fn k6(args: &RushArgs, rush: &Rush) -> anyhow::Result<Outcome> {
    let folder = reaper::folder("k6")?;
    let summary: PathBuf = folder.join("summary.json");
    let codes = |promise| {
        let codes: Vec<&str> = rush.promises.those(promise).map(Invariant::code).collect();
        codes.join(",")
    };
    let mut command = tokio::process::Command::from(reaper::command(std::path::absolute(&args.k6)?)?);
    let output = command
        .args(["run", "--quiet", "--no-usage-report", "--no-color", "--address", ""])
        .arg(&args.script)
        .env("BASE_URL", rush.host.to_string())
        .env("OVERSOLD_ADMIN_TOKEN", &rush.admin_token)
        .env("SALE", rush.sale.to_string())
        .env("BUYERS", rush.crowd.buyers.to_string())
        .env("CAPACITY", rush.crowd.capacity.to_string())
        .env("CLICKS", rush.clicks.to_string())
        .env("PATIENCE", rush.crowd.patience.to_string())
        .env("BREAKS", codes(Promise::Breaks))
        .env("LEAVES_OPEN", codes(Promise::NotPromised))
        .env("SUMMARY", &summary)
        .stdin(Stdio::null())
        .output()
        .await?;
    let printed = || {
        let (out, err) = (
            String::from_utf8_lossy(&output.stdout),
            String::from_utf8_lossy(&output.stderr),
        );
        format!("{out}{err}")
    };
    match output.status.code() {
        Some(0 | THRESHOLDS_CROSSED) => {}
        _ => bail!("it left with {}\n{}", output.status, printed()),
    }
    let outcome = Outcome::of_k6(rush, &summary)?;
    let kept = outcome.conclusion() == harness::judge::Conclusion::AsPromised;
    ensure!(
        kept == output.status.success(),
        "its thresholds and its summary disagree\n{}",
        printed()
    );
    std::fs::remove_dir_all(folder)?;
    Ok(outcome)
}
