//! LV.4: how many orders a server accepts in a second, beside the same route without Kafka; and how fast a backlog of them is decided, beside
//! what the database makes of the same batches.

use std::{
    env,
    net::SocketAddr,
    path::Path,
    time::{Duration, Instant},
};

use anyhow::{Context, ensure};
use comfy_table::{Table, presets};
use serde::Serialize;
use sqlx::PgPool;
use suite::{
    backends::{Durability, Report, Services, Source, Stand},
    rush::{Program, Rush, SALE, Servers},
};
use tokio::time::sleep;

use super::{
    FIRST_MEASURED_BUYER, WARM_UP,
    figures::{self, Spread},
    pgbench::Pgbench,
    say, warn_of_debug,
    wrk::{Load, Wrk},
};
use crate::{
    BenchArgs, Ended,
    levels::Choice,
    machine::{Machine, commit, this_command},
};

/// Connections that send orders, unless told otherwise.
const CLIENTS: u32 = 1000;
/// Tickets of the sale. All orders but these are refused in the end, and a refusal is written as a sale is.
const STOCK: u32 = 1000;
/// What a batch of the ceiling holds.
const BATCH: f64 = 2000.0;
/// How long the ceiling is measured.
const CEILING: Duration = Duration::from_secs(5);
/// How often a backlog is looked at while it is decided.
const LOOK: Duration = Duration::from_millis(20);
/// A backlog that takes longer is an error here.
const PATIENCE: Duration = Duration::from_secs(120);

/// The figures of one run of this command. The names are stable.
#[derive(Serialize)]
struct Figures {
    command: String,
    commit: Option<String>,
    release: bool,
    machine: Machine,
    postgres: Report,
    kafka: Option<Report>,
    #[serde(skip_serializing_if = "Option::is_none")]
    fdatasync_ms: Option<f64>,
    strategy: String,
    clients: u32,
    seconds: u32,
    accept: Accept,
    drain: Drain,
    void: Vec<String>,
}

/// Orders that were answered with 202 while nobody decided any.
#[derive(Serialize)]
struct Accept {
    orders_a_second: Spread,
    p50_ms: Spread,
    p95_ms: Spread,
    p99_ms: Spread,
    /// The same route, with a produce that does nothing.
    without_kafka_a_second: Spread,
    /// Of the two rounds beside each other.
    ratio: Spread,
}

/// A backlog for one sale, decided by one server with one consumer.
#[derive(Serialize)]
struct Drain {
    orders: u32,
    orders_a_second: Spread,
    /// Until the server is ready, with its topics and its part of the partitions.
    ready_ms: Spread,
    /// The most memory that was seen, with the backlog waiting.
    most_mib: f64,
    #[serde(skip_serializing_if = "Option::is_none")]
    ceiling: Option<Ceiling>,
}

/// What the database makes of the same batches.
#[derive(Serialize)]
struct Ceiling {
    orders_a_second: Spread,
    ratio: Spread,
}

struct Bench {
    choice: Choice,
    nothing: Choice,
    wrk: Wrk,
    services: Services,
    clients: u32,
    void: Vec<String>,
}

/// Measures one strategy of LV.4.
pub(super) async fn bench(choice: Choice, args: &BenchArgs) -> anyhow::Result<Ended> {
    let wrk = Wrk::find()?;
    let pgbench = match choice.strategy.name {
        "single-writer" => {
            let source = Path::new(env!("CARGO_MANIFEST_DIR"))
                .join("..")
                .join(choice.strategy.source);
            Some(Pgbench::of(source.with_extension("ceiling.sql"))?)
        }
        _ => None,
    };
    let json = args.json.as_deref().map(crate::rush::create).transpose()?;
    warn_of_debug();
    let services = Services::find(Durability::Durable, choice.strategy.needs).await?;
    let fdatasync_ms = match services.postgres.report().source {
        Source::Native => Some(figures::fdatasync()?.as_secs_f64() * 1e3),
        Source::Docker | Source::External => None,
    };
    let mut bench = Bench {
        choice,
        nothing: Choice::one("lv4/broken/produce-nothing")?,
        wrk: Wrk::new(wrk)?,
        services,
        clients: args.clients.unwrap_or(CLIENTS),
        void: vec![],
    };
    let rounds = args.rounds.unwrap_or(5);
    let orders = args.orders.unwrap_or(if pgbench.is_some() { 100_000 } else { 5_000 });
    let accept = bench.accept(rounds, Duration::from_secs(args.seconds.into())).await?;
    let drain = bench.drain(rounds.min(3), orders, pgbench.as_ref()).await?;
    let figures = Figures {
        command: this_command(),
        commit: commit(),
        release: !cfg!(debug_assertions),
        machine: Machine::this(),
        postgres: bench.services.postgres.report().clone(),
        kafka: bench.services.kafka.as_ref().map(|kafka| kafka.report().clone()),
        fdatasync_ms,
        strategy: choice.name(),
        clients: bench.clients,
        seconds: args.seconds,
        accept,
        drain,
        void: bench.void,
    };
    say("");
    print(&figures);
    if let Some(json) = json {
        super::write(json, &figures)?;
    }
    Ok(if figures.void.is_empty() {
        Ended::AsPromised
    } else {
        Ended::Broken
    })
}

fn print(figures: &Figures) {
    let Figures { accept, drain, .. } = figures;
    let mut table = Table::new();
    table.load_style(presets::UTF8_FULL_CONDENSED);
    table.set_header([format!("{}: median (least to most)", figures.strategy), String::new()]);
    let ratio = |ratio: &Spread| format!("{ratio:.2}");
    let mut rows = vec![
        (
            "accepted, orders a second".to_owned(),
            format!("{:.0}", accept.orders_a_second),
        ),
        ("    p50 / p95 / p99, ms".to_owned(), {
            let Accept {
                p50_ms, p95_ms, p99_ms, ..
            } = accept;
            format!("{:.1} / {:.1} / {:.1}", p50_ms.median, p95_ms.median, p99_ms.median)
        }),
        (
            "    the same route without Kafka".to_owned(),
            format!("{:.0}", accept.without_kafka_a_second),
        ),
        ("    ratio".to_owned(), ratio(&accept.ratio)),
        (
            format!("decided from a backlog of {}, orders a second", drain.orders),
            format!("{:.0}", drain.orders_a_second),
        ),
    ];
    if let Some(ceiling) = &drain.ceiling {
        rows.push((
            "    pgbench with the same batches".to_owned(),
            format!("{:.0}", ceiling.orders_a_second),
        ));
        rows.push(("    ratio".to_owned(), ratio(&ceiling.ratio)));
    }
    rows.push(("ready after, ms".to_owned(), format!("{:.0}", drain.ready_ms)));
    rows.push((
        "memory with the backlog, MiB".to_owned(),
        format!("{:.0}", drain.most_mib),
    ));
    for (name, value) in rows {
        table.add_row([name, value]);
    }
    println!("{table}");
    println!(
        "{} connections; orders for one sale, decided by one server with one consumer, start-up not counted",
        figures.clients
    );
    if let Some(fdatasync_ms) = figures.fdatasync_ms {
        println!("fdatasync takes {fdatasync_ms:.2} ms");
    }
    for void in &figures.void {
        println!("VOID: {void}");
    }
    if figures.void.is_empty() {
        println!("after each round: what was accepted is in Kafka, and was decided once; I1 and I2 hold");
    }
}

impl Bench {
    async fn start(&self, choice: Choice, stand: &Stand, consumers: u32) -> anyhow::Result<(Servers, SocketAddr)> {
        let program = Program::new(env::current_exe()?)
            .argument("serve")
            .argument(choice.level.name)
            .variable("KAFKA_CONSUMERS", consumers.to_string());
        let servers = Servers::start(&Rush::default(), stand, &program, choice.level, choice.strategy).await?;
        let address = *servers.live().borrow().first().context("no server lives")?;
        Ok((servers, address))
    }

    async fn accept(&mut self, rounds: u32, time: Duration) -> anyhow::Result<Accept> {
        let (mut ours, mut nothing) = (vec![], vec![]);
        for round in 1..=rounds {
            say(&format!("accepting: round {round} of {rounds}"));
            ours.push(self.accepted(self.choice, time).await?);
            nothing.push(self.accepted(self.nothing, time).await?);
        }
        let spread = |of: &dyn Fn(&Load) -> f64, loads: &[Load]| Spread::of(loads.iter().map(of)).context("no round");
        let rate = |load: &Load| load.confirmed_a_second();
        Ok(Accept {
            orders_a_second: spread(&rate, &ours)?,
            p50_ms: spread(&|load| load.p50_us as f64 / 1e3, &ours)?,
            p95_ms: spread(&|load| load.p95_us as f64 / 1e3, &ours)?,
            p99_ms: spread(&|load| load.p99_us as f64 / 1e3, &ours)?,
            without_kafka_a_second: spread(&rate, &nothing)?,
            ratio: Spread::of(
                ours.iter()
                    .zip(&nothing)
                    .map(|(ours, nothing)| rate(ours) / rate(nothing)),
            )
            .context("no round")?,
        })
    }

    async fn accepted(&mut self, choice: Choice, time: Duration) -> anyhow::Result<Load> {
        let stand = self.services.stand(choice.strategy.schema).await?;
        let (servers, address) = self.start(choice, &stand, 0).await?;
        servers.open_sale(SALE, STOCK).await?;
        let warm = self.wrk.run(address, self.clients, WARM_UP, 0).await?;
        let load = self.wrk.run(address, self.clients, time, FIRST_MEASURED_BUYER).await?;
        servers.stop().await?;
        let sent = warm.confirmed() + load.confirmed();
        if choice.strategy.name == self.choice.strategy.name {
            let held = backlog(&stand).await?;
            if held < sent {
                self.void
                    .push(format!("{sent} orders were accepted, and Kafka has {held}"));
            }
        }
        if load.refused + load.cut_off > 0 {
            let Load { refused, cut_off, .. } = load;
            self.void
                .push(format!("{}: {refused} refused, {cut_off} cut off", choice.name()));
        }
        Ok(load)
    }

    async fn drain(&mut self, rounds: u32, orders: u32, pgbench: Option<&Pgbench>) -> anyhow::Result<Drain> {
        let (mut rates, mut ready, mut most_mib) = (vec![], vec![], 0_f64);
        let (mut ceilings, mut ratios) = (vec![], vec![]);
        for round in 1..=rounds {
            say(&format!("deciding: round {round} of {rounds}"));
            let (rate, started, mib) = self.drained(orders).await?;
            rates.push(rate);
            ready.push(started.as_secs_f64() * 1e3);
            most_mib = most_mib.max(mib);
            if let Some(pgbench) = pgbench {
                let ceiling = self.ceiling(pgbench).await?;
                ceilings.push(ceiling);
                ratios.push(rate / ceiling);
            }
        }
        Ok(Drain {
            orders,
            orders_a_second: Spread::of(rates).context("no round")?,
            ready_ms: Spread::of(ready).context("no round")?,
            most_mib,
            ceiling: match (Spread::of(ceilings), Spread::of(ratios)) {
                (Some(orders_a_second), Some(ratio)) => Some(Ceiling { orders_a_second, ratio }),
                _ => None,
            },
        })
    }

    /// Fills a backlog, and lets one server with one consumer decide it. Tells the rate, how long the server took to be ready, and its memory.
    async fn drained(&mut self, orders: u32) -> anyhow::Result<(f64, Duration, f64)> {
        let stand = self.services.stand(self.choice.strategy.schema).await?;
        let (servers, address) = self.start(self.choice, &stand, 0).await?;
        servers.open_sale(SALE, STOCK).await?;
        let (mut sent, mut buyer) = (0, 0);
        while sent < u64::from(orders) {
            sent += self.fill(address, u64::from(orders) - sent, buyer).await?;
            // Some were sent and not answered any more when the time was over: nobody buys twice here.
            buyer += FIRST_MEASURED_BUYER;
        }
        servers.stop().await?;
        let held = backlog(&stand).await?;
        ensure!(held >= sent, "{sent} orders were accepted, and Kafka has {held}");

        let pool = stand.database().pool(1).await?;
        let began = Instant::now();
        let starting = self.start(self.choice, &stand, 1);
        let (servers, first) = tokio::try_join!(starting, first_decided(&pool))?;
        let servers = servers.0;
        let (first_at, first_decided) = first;
        // As a client finds it: listening, joined, and asked.
        let ready = began.elapsed().min(first_at - began);
        let pid = servers.pid(0).await?;
        let (mut mib, mut decided) = (0_f64, 0);
        while decided < held {
            ensure!(
                first_at.elapsed() < PATIENCE,
                "{decided} of {held} orders are decided after {PATIENCE:?}"
            );
            sleep(LOOK).await;
            mib = mib.max(figures::resident_mib(pid)?);
            decided = told(&pool).await?;
        }
        let took = first_at.elapsed();
        servers.stop().await?;
        self.judge(&pool, held).await?;
        pool.close().await;
        Ok(((held - first_decided) as f64 / took.as_secs_f64(), ready, mib))
    }

    /// Sends about so many orders, of buyers after `buyer`.
    async fn fill(&self, address: SocketAddr, orders: u64, buyer: u64) -> anyhow::Result<u64> {
        // A few connections where it is but a few orders, as wrk counts in seconds.
        let clients = if orders < 20_000 { 4 } else { self.clients };
        Ok(self
            .wrk
            .run(address, clients, Duration::from_secs(1), buyer)
            .await?
            .confirmed())
    }

    /// What is wrong with what was decided.
    async fn judge(&mut self, pool: &PgPool, held: u64) -> anyhow::Result<()> {
        let (rows, orders, confirmed): (i64, i64, i64) = sqlx::query_as(
            "select count(*), count(distinct id), count(*) filter (where status = 'confirmed') from reservation",
        )
        .fetch_one(pool)
        .await?;
        let stock: i64 = sqlx::query_scalar("select stock from sale where id = $1")
            .bind(SALE)
            .fetch_one(pool)
            .await?;
        if rows != orders || u64::try_from(orders)? != held {
            self.void
                .push(format!("{held} orders, and {rows} decisions of {orders}"));
        }
        if confirmed + stock != i64::from(STOCK) || stock < 0 {
            self.void
                .push(format!("{confirmed} sold of {STOCK}, and {stock} are left"));
        }
        Ok(())
    }

    async fn ceiling(&self, pgbench: &Pgbench) -> anyhow::Result<f64> {
        let stand = self.services.stand(self.choice.strategy.schema).await?;
        let (servers, _) = self.start(self.choice, &stand, 0).await?;
        servers.open_sale(SALE, STOCK).await?;
        servers.stop().await?;
        let pool = stand.database().pool(1).await?;
        sqlx::query("insert into partition_offset (topic, partition, next_offset) values ('orders', 0, 0)")
            .execute(&pool)
            .await?;
        pool.close().await;
        pgbench.run(stand.database(), 1, WARM_UP, 0).await?;
        let ceiling = pgbench
            .run(stand.database(), 1, CEILING, FIRST_MEASURED_BUYER / 2)
            .await?;
        Ok(ceiling.a_second * BATCH)
    }
}

/// How many orders Kafka holds that the group has not passed.
async fn backlog(stand: &Stand) -> anyhow::Result<u64> {
    let place = stand.kafka(0, Duration::from_secs(10)).context("there is no Kafka")?;
    tokio::task::spawn_blocking(move || lv4_kafka::path::backlog(&place, Duration::from_secs(10))).await?
}

/// How many orders are decided and told. Their numbers tell, without counting.
async fn told(pool: &PgPool) -> anyhow::Result<u64> {
    let told: i64 = sqlx::query_scalar("select coalesce(max(number), 0) from outbox")
        .fetch_one(pool)
        .await?;
    Ok(u64::try_from(told)?)
}

/// Waits until something is decided. Tells when, and how much.
async fn first_decided(pool: &PgPool) -> anyhow::Result<(Instant, u64)> {
    let began = Instant::now();
    while began.elapsed() < PATIENCE {
        let decided = told(pool).await?;
        if decided > 0 {
            return Ok((Instant::now(), decided));
        }
        sleep(Duration::from_millis(1)).await;
    }
    anyhow::bail!("nothing is decided after {PATIENCE:?}")
}
