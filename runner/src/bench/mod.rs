//! `oversold bench`: what a strategy sells in a second, beside what the database could do at most.
//!
//! Every round has a database and a server of its own, on one durable Postgres. Rounds of ours and of the ceiling alternate, so that a machine
//! that is slower for a while is so for both. Rows are judged after each round: a rate that was reached by breaking a rule is no rate.

#[cfg(feature = "lv4")]
mod accept;
#[cfg(feature = "lv4")]
mod drain;
mod figures;
#[cfg(feature = "lv3")]
mod lock;
mod pgbench;
#[cfg(feature = "lv4")]
mod producer_perf_test;
#[cfg(feature = "lv3")]
mod redis_benchmark;
mod tool;
mod wrk;

use std::{
    env,
    fs::File,
    io::{IsTerminal, Write, stderr},
    time::{Duration, Instant},
};

use anyhow::{Context, ensure};
use box_office::{Invariant, Service, Strategy};
use comfy_table::{Table, presets};
use harness::{
    backends::{self, Database, Durability, Services, Source, TestEnvironment},
    history::{FORMAT_VERSION, Header, History},
    judge::judge,
    rows,
    rush::{Program, Rush, SALE, Servers},
};
use serde::Serialize;

use crate::{
    BenchArgs, Ended,
    levels::SelectedStrategy,
    machine::{Machine, commit, this_command},
};
pub(crate) use figures::MedianRange;
use pgbench::{Ceiling, Length, Pgbench};
pub(crate) use tool::ToolMissing;
use wrk::{Load, Wrk};

/// The greatest stock there can be: it is not to run out.
const STOCK: u32 = 1_000_000;
/// What the pool, the prepared statements and the branch predictors get before anything counts.
const WARM_UP: Duration = Duration::from_secs(1);
/// Where the buyers of the measured time begin: far from those of the warm-up.
const FIRST_MEASURED_BUYER: u64 = 1_000_000_000;
/// Over so many connections the ceiling is looked for.
const CEILING_CLIENTS: [u32; 5] = [1, 4, 8, 16, 64];
/// How long each of them is tried at most; never longer than what is looked for is measured then.
const PROBE: Duration = Duration::from_secs(2);
/// The connections beside which the memory is measured.
const CONNECTIONS: usize = 1000;

/// The connections that buy, unless told otherwise.
const CLIENTS: u32 = 64;

/// Measures one strategy.
pub(crate) async fn bench(args: &BenchArgs) -> anyhow::Result<Ended> {
    let choice = SelectedStrategy::one(&args.strategy)?;
    if args.lock || args.waiters.is_some() {
        return lock_alone(choice, args).await;
    }
    // Where orders are accepted first, that and their decision are measured apart.
    if choice.strategy.needs.contains(&Service::Kafka) {
        return path_of_an_order(choice, args).await;
    }
    ensure!(args.drain.is_none(), "{}", ONLY_LV4);
    // Before the run: nobody should wait for figures that can't be taken or written.
    let wrk = Wrk::find()?;
    let pgbench = match args.pools.is_empty() {
        true => Pgbench::find(choice)?,
        false => None,
    };
    let json = args.json.as_deref().map(crate::rush::create).transpose()?;
    let bench = Bench::find(choice, args, CLIENTS).await?;
    let wrk = Wrk::new(wrk)?;
    if args.pools.is_empty() {
        bench.rate(args, &wrk, pgbench.as_ref(), json).await
    } else {
        bench.curve(args, &wrk, json).await
    }
}

/// What is asked of orders that are accepted first and decided later.
#[cfg(feature = "lv4")]
async fn path_of_an_order(choice: SelectedStrategy, args: &BenchArgs) -> anyhow::Result<Ended> {
    ensure!(
        args.pools.is_empty(),
        "--pools is about answers that wait for the database, and those of LV.4 do not"
    );
    match args.drain {
        Some(orders) => drain::bench(choice, args, orders).await,
        None => accept::bench(choice, args).await,
    }
}

/// Without LV.4 in the build, nothing needs Kafka.
#[cfg(not(feature = "lv4"))]
async fn path_of_an_order(_choice: SelectedStrategy, _args: &BenchArgs) -> anyhow::Result<Ended> {
    anyhow::bail!("{}", ONLY_LV4)
}

const ONLY_LV4: &str =
    "--drain measures how fast waiting orders are decided, and only LV.4 lets them wait: lv4/locked, lv4/single-writer";

/// What is asked of a lock and not of a sale.
#[cfg(feature = "lv3")]
async fn lock_alone(choice: SelectedStrategy, args: &BenchArgs) -> anyhow::Result<Ended> {
    if choice.level.name != lv3_redis_lock::LEVEL.name {
        anyhow::bail!("{}", ONLY_LV3);
    }
    lock::bench(choice.strategy.name, args).await
}

/// What is asked of a lock and not of a sale.
#[cfg(not(feature = "lv3"))]
async fn lock_alone(_choice: SelectedStrategy, _args: &BenchArgs) -> anyhow::Result<Ended> {
    anyhow::bail!("{}", ONLY_LV3)
}

const ONLY_LV3: &str =
    "--waiters and --lock measure a lock on its own, and only LV.3 has one: lv3/spin, lv3/rlock, lv3/fenced";

fn warn_of_debug() {
    if cfg!(debug_assertions) {
        eprintln!(
            "This is a debug build: its figures mean nothing. `cargo run --release --package oversold -- bench …`"
        );
    }
}

/// What was judged after each round.
const JUDGED: &str = "I1, I2 and I3 hold, and every confirmed reservation has its row";

struct Bench {
    choice: SelectedStrategy,
    program: Program,
    services: Services,
    fdatasync_ms: Option<f64>,
    clients: u32,
    time: Duration,
}

/// One round of ours.
struct Round {
    load: Load,
    ready: Duration,
    rows: usize,
    void: Vec<String>,
}

/// The figures of one run of this command. The names are stable.
#[derive(Serialize)]
struct Figures<'a> {
    command: String,
    commit: Option<String>,
    release: bool,
    machine: Machine,
    postgres: backends::Report,
    #[serde(skip_serializing_if = "Option::is_none")]
    redis: Option<backends::Report>,
    #[serde(skip_serializing_if = "Option::is_none")]
    kafka: Option<backends::Report>,
    #[serde(skip_serializing_if = "Option::is_none")]
    fdatasync_ms: Option<f64>,
    strategy: String,
    /// Not there where orders wait, instead of coming in for a time; as `seconds`.
    #[serde(skip_serializing_if = "Option::is_none")]
    clients: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    seconds: Option<u64>,
    #[serde(flatten)]
    measured: Measured<'a>,
    void: &'a [String],
}

#[derive(Serialize)]
#[serde(untagged)]
enum Measured<'a> {
    Rate(&'a Rate),
    Curve {
        pools: &'a [OnePool],
    },
    #[cfg(feature = "lv4")]
    Accept(&'a accept::Accept),
    #[cfg(feature = "lv4")]
    Drain(&'a drain::Drain),
}

/// Ours, and the ceiling.
#[derive(Serialize)]
struct Rate {
    pool_size: u32,
    reservations_a_second: MedianRange,
    p50_ms: MedianRange,
    p99_ms: MedianRange,
    refused: u64,
    cut_off: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    ceiling: Option<CeilingRate>,
    ready_ms: MedianRange,
    idle_mib: f64,
    mib_with_1000_connections: f64,
    rows_judged: usize,
    rounds: Vec<Load>,
}

#[derive(Serialize)]
struct CeilingRate {
    clients: u32,
    transactions_a_second: MedianRange,
    /// Of the two rounds beside each other.
    ratio: MedianRange,
    probed: Vec<(u32, f64)>,
    rounds: Vec<Ceiling>,
}

/// What a pool of this size makes of the load.
#[derive(Serialize)]
struct OnePool {
    pool_size: u32,
    reservations_a_second: MedianRange,
    p50_ms: MedianRange,
    p99_ms: MedianRange,
}

impl Bench {
    /// What every measurement needs.
    async fn find(choice: SelectedStrategy, args: &BenchArgs, clients: u32) -> anyhow::Result<Self> {
        warn_of_debug();
        let services = Services::find(Durability::Durable, choice.strategy.needs).await?;
        Ok(Self {
            choice,
            program: Program::new(env::current_exe()?)
                .argument("serve")
                .argument(choice.level.name),
            fdatasync_ms: match services.postgres.report().source {
                Source::Native => Some(figures::fdatasync()?.as_secs_f64() * 1e3),
                // Their disks are elsewhere.
                Source::Docker | Source::External => None,
            },
            services,
            clients: args.clients.unwrap_or(clients),
            time: Duration::from_secs(args.seconds.into()),
        })
    }

    async fn rate(
        &self,
        args: &BenchArgs,
        wrk: &Wrk,
        pgbench: Option<&Pgbench>,
        json: Option<File>,
    ) -> anyhow::Result<Ended> {
        let pool = args.pool;
        let (idle_mib, crowded_mib) = self.memory(pool).await?;
        let mut void = vec![];
        let mut probed = vec![];
        if let Some(pgbench) = pgbench {
            for clients in CEILING_CLIENTS {
                say(&format!("looking for the ceiling: {clients} clients"));
                let probe = self.ceiling(pgbench, clients, PROBE.min(self.time), &mut void).await?;
                probed.push((clients, probe.a_second));
            }
        }
        let best = probed
            .iter()
            .max_by(|(_, a), (_, b)| a.total_cmp(b))
            .map(|&(clients, _)| clients);

        let (mut ours, mut ceiling) = (vec![], vec![]);
        let rounds = args.rounds.unwrap_or(5);
        for number in 1..=rounds {
            say(&format!("round {number} of {rounds}: {}", self.choice.name()));
            let round = self.ours(wrk, pool).await?;
            void.extend(round.void.iter().cloned());
            ours.push(round);
            if let (Some(pgbench), Some(clients)) = (pgbench, best) {
                say(&format!("round {number} of {rounds}: the ceiling"));
                let round = self.ceiling(pgbench, clients, self.time, &mut void).await?;
                if round.transactions == 0 {
                    void.push("the ceiling: pgbench did nothing in its time".to_owned());
                }
                ceiling.push(round);
            }
        }
        say("");

        let of = |figure: fn(&Round) -> f64| MedianRange::of(ours.iter().map(figure)).context("there was no round");
        let ratios = ours
            .iter()
            .zip(&ceiling)
            .map(|(ours, ceiling)| ours.load.confirmed_a_second() / ceiling.a_second);
        let rate = Rate {
            pool_size: pool,
            reservations_a_second: of(|round| round.load.confirmed_a_second())?,
            p50_ms: of(|round| round.load.p50_us as f64 / 1e3)?,
            p99_ms: of(|round| round.load.p99_us as f64 / 1e3)?,
            refused: ours.iter().map(|round| round.load.refused).sum(),
            cut_off: ours.iter().map(|round| round.load.cut_off).sum(),
            ceiling: match (
                best,
                MedianRange::of(ceiling.iter().map(|round| round.a_second)),
                MedianRange::of(ratios),
            ) {
                (Some(clients), Some(transactions_a_second), Some(ratio)) => Some(CeilingRate {
                    clients,
                    transactions_a_second,
                    ratio,
                    probed,
                    rounds: ceiling,
                }),
                _ => None,
            },
            ready_ms: of(|round| round.ready.as_secs_f64() * 1e3)?,
            idle_mib,
            mib_with_1000_connections: crowded_mib,
            rows_judged: ours.iter().map(|round| round.rows).sum(),
            rounds: ours.iter().map(|round| round.load).collect(),
        };
        self.print_rate(&rate, rounds);
        self.end(Measured::Rate(&rate), JUDGED, &void, json)
    }

    fn print_rate(&self, rate: &Rate, rounds: u32) {
        let mut table = Table::new();
        table.load_style(presets::UTF8_FULL_CONDENSED).set_header([
            self.choice.name(),
            format!("median (range) of {rounds} rounds of {} s", self.time.as_secs()),
        ]);
        let mut row = |what: &str, figure: String| {
            table.add_row([what.to_owned(), figure]);
        };
        row("reservations a second", rate.reservations_a_second.to_string());
        match &rate.ceiling {
            Some(ceiling) => {
                row(
                    &format!("ceiling: pgbench, {} clients", ceiling.clients),
                    ceiling.transactions_a_second.to_string(),
                );
                row("ratio to the ceiling", format!("{:.2}", ceiling.ratio));
            }
            None => row(
                "ceiling",
                match self.choice.strategy.needs.contains(&Service::Redis) {
                    true => "not known; of the lock alone: --lock".to_owned(),
                    false => "not known: pgbench can't do what this strategy does".to_owned(),
                },
            ),
        }
        row("answered after, p50", format!("{:.1} ms", rate.p50_ms));
        row("answered after, p99", format!("{:.1} ms", rate.p99_ms));
        if rate.refused + rate.cut_off > 0 {
            row(
                "not confirmed",
                format!("{} refused, {} cut off", rate.refused, rate.cut_off),
            );
        }
        row("ready after", format!("{:.0} ms", rate.ready_ms));
        row("memory, idle", format!("{:.1} MiB", rate.idle_mib));
        row(
            &format!("memory, {CONNECTIONS} connections"),
            format!("{:.1} MiB", rate.mib_with_1000_connections),
        );
        row("clients, pool", format!("{}, {}", self.clients, rate.pool_size));
        row("rows judged", rate.rows_judged.to_string());
        println!("{table}");
    }

    async fn curve(&self, args: &BenchArgs, wrk: &Wrk, json: Option<File>) -> anyhow::Result<Ended> {
        let rounds = args.rounds.unwrap_or(1);
        let mut void = vec![];
        let mut measured: Vec<Vec<Load>> = vec![vec![]; args.pools.len()];
        for number in 1..=rounds {
            for (&pool, loads) in args.pools.iter().zip(&mut measured) {
                say(&format!("round {number} of {rounds}: a pool of {pool}"));
                let round = self.ours(wrk, pool).await?;
                void.extend(round.void);
                loads.push(round.load);
            }
        }
        say("");

        let mut table = Table::new();
        table.load_style(presets::UTF8_FULL_CONDENSED).set_header([
            &format!("{}, pool", self.choice.name()),
            "reservations a second",
            "p50 ms",
            "p99 ms",
        ]);
        let mut curve = vec![];
        for (&pool_size, loads) in args.pools.iter().zip(&measured) {
            let of = |figure: fn(&Load) -> f64| MedianRange::of(loads.iter().map(figure)).context("there was no round");
            let one = OnePool {
                pool_size,
                reservations_a_second: of(Load::confirmed_a_second)?,
                p50_ms: of(|load| load.p50_us as f64 / 1e3)?,
                p99_ms: of(|load| load.p99_us as f64 / 1e3)?,
            };
            table.add_row([
                pool_size.to_string(),
                one.reservations_a_second.to_string(),
                format!("{:.1}", one.p50_ms),
                format!("{:.1}", one.p99_ms),
            ]);
            curve.push(one);
        }
        println!("{table}");
        self.end(Measured::Curve { pools: &curve }, JUDGED, &void, json)
    }

    /// Says what it was measured on and whether it counts, and writes the file.
    fn end(&self, measured: Measured<'_>, judged: &str, void: &[String], json: Option<File>) -> anyhow::Result<Ended> {
        let report = self.services.postgres.report();
        let setting = |name| report.durability.get(name).map_or("unknown", String::as_str);
        println!(
            "postgres {} ({}), fsync {}, synchronous_commit {}; fdatasync {}",
            report.version,
            report.source,
            setting("fsync"),
            setting("synchronous_commit"),
            self.fdatasync_ms
                .map_or("not measured: its disk is elsewhere".to_owned(), |ms| format!(
                    "{ms:.2} ms"
                )),
        );
        for reason in void {
            println!("VOID: {reason}");
        }
        if void.is_empty() {
            println!("judged after each round: {judged}");
        }
        if let Some(json) = json {
            let figures = Figures {
                command: this_command(),
                commit: commit(),
                release: !cfg!(debug_assertions),
                machine: Machine::this(),
                postgres: report.clone(),
                redis: self.services.redis.as_ref().map(|redis| redis.report().clone()),
                kafka: self.services.kafka.as_ref().map(|kafka| kafka.report().clone()),
                fdatasync_ms: self.fdatasync_ms,
                strategy: self.choice.name(),
                clients: (self.clients > 0).then_some(self.clients),
                seconds: (self.clients > 0).then_some(self.time.as_secs()),
                measured,
                void,
            };
            write(json, &figures)?;
        }
        Ok(if void.is_empty() {
            Ended::AsPromised
        } else {
            Ended::Broken
        })
    }

    /// Starts a server on a database, and tells how long it took until it was ready.
    async fn start(&self, stand: &TestEnvironment, pool: u32) -> anyhow::Result<(Servers, Duration)> {
        self.start_as(&self.program, self.choice.strategy, stand, pool).await
    }

    /// The same for another program, or another strategy of the level.
    async fn start_as(
        &self,
        program: &Program,
        strategy: &Strategy,
        stand: &TestEnvironment,
        pool: u32,
    ) -> anyhow::Result<(Servers, Duration)> {
        let rush = Rush {
            pool_size: Some(pool),
            ..Rush::default()
        };
        let began = Instant::now();
        let servers = Servers::start(&rush, stand, program, self.choice.level, strategy).await?;
        Ok((servers, began.elapsed()))
    }

    async fn ours(&self, wrk: &Wrk, pool: u32) -> anyhow::Result<Round> {
        let stand = self.services.environment(self.choice.strategy.schema).await?;
        let (servers, ready) = self.start(&stand, pool).await?;
        servers.open_sale(SALE, STOCK).await?;
        let address = *servers.live().borrow().first().context("no server lives")?;
        let warm = wrk.run(address, self.clients, WARM_UP, 0).await?;
        let load = wrk.run(address, self.clients, self.time, FIRST_MEASURED_BUYER).await?;
        servers.stop().await?;
        let (rows, void) = self
            .judge(stand.database(), warm.confirmed() + load.confirmed())
            .await?;
        Ok(Round {
            load,
            ready,
            rows,
            void,
        })
    }

    async fn ceiling(
        &self,
        pgbench: &Pgbench,
        clients: u32,
        time: Duration,
        void: &mut Vec<String>,
    ) -> anyhow::Result<Ceiling> {
        let stand = self.services.environment(self.choice.strategy.schema).await?;
        let (servers, _) = self.start(&stand, 1).await?;
        servers.open_sale(SALE, STOCK).await?;
        servers.stop().await?;
        // As warm as ours.
        let warm = pgbench.run(stand.database(), clients, Length::Time(WARM_UP), 0).await?;
        let ceiling = pgbench
            .run(stand.database(), clients, Length::Time(time), FIRST_MEASURED_BUYER / 2)
            .await?;
        let (_, broken) = self
            .judge(stand.database(), warm.transactions + ceiling.transactions)
            .await?;
        void.extend(broken.into_iter().map(|reason| format!("the ceiling: {reason}")));
        Ok(ceiling)
    }

    /// How many rows there are, and what is wrong with them. The invariants are those that rows alone can break.
    async fn judge(&self, database: &Database, confirmed: u64) -> anyhow::Result<(usize, Vec<String>)> {
        const OF_ROWS: [Invariant; 3] = [Invariant::NoOversell, Invariant::Conservation, Invariant::NoDuplicate];

        let pool = database.pool(1).await?;
        let sold = rows::read(&pool, SALE).await?;
        pool.close().await;
        let rows = sold.rows.len();
        let history = History {
            header: Header {
                version: FORMAT_VERSION,
                strategy: self.choice.name(),
                sale: SALE,
                capacity: STOCK.into(),
                deadline_us: 0,
                expiry_us: None,
                stock: Some(sold.stock),
            },
            requests: vec![],
            rows: Some(sold.rows),
            faults: vec![],
        };
        let mut void: Vec<String> = judge(&history)
            .findings
            .into_iter()
            .filter(|finding| OF_ROWS.contains(&finding.invariant))
            .map(|finding| format!("{} is broken: {}", finding.invariant.code(), finding.summary))
            .collect();
        if (rows as u64) < confirmed {
            void.push(format!("{confirmed} reservations were confirmed, and {rows} are there"));
        }
        if sold.stock <= 0 {
            void.push("the stock ran out: fewer --seconds".to_owned());
        }
        Ok((rows, void))
    }

    /// What a server holds once it is ready, and with a thousand connections open, in MiB.
    async fn memory(&self, pool: u32) -> anyhow::Result<(f64, f64)> {
        let stand = self.services.environment(self.choice.strategy.schema).await?;
        let (servers, _) = self.start(&stand, pool).await?;
        let address = *servers.live().borrow().first().context("no server lives")?;
        let pid = servers.pid(0).await?;
        let idle = figures::resident_mib(pid)?;
        let open = figures::connect(address, CONNECTIONS).await?;
        let crowded = figures::resident_mib(pid)?;
        drop(open);
        servers.stop().await?;
        Ok((idle, crowded))
    }
}

/// Writes the figures to their file.
fn write(mut json: File, figures: &impl Serialize) -> anyhow::Result<()> {
    serde_json::to_writer_pretty(&mut json, figures)?;
    writeln!(json)?;
    Ok(())
}

/// What is going on, for somebody who waits at a terminal. Nothing wipes the line.
fn say(what: &str) {
    if stderr().is_terminal() {
        let _ = write!(stderr(), "\r\x1b[K{what}");
    }
}
