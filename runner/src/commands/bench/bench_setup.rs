//! What all measurements of a sale share: the services, the server under test, the check of its rows, and the end of a run.

use std::time::{Duration, Instant};

use anyhow::Context;
use box_office::{Invariant, Strategy};
use harness::{
    backends::{Database, Durability, Services, TestEnvironment},
    final_state,
    history::{FORMAT_VERSION, Header, History, Payment},
    judge::judge,
    rush::{Program, Rush, SALE, Servers},
};
use serde::Serialize;

use super::{BenchArgs, resources, warn_of_debug_build, wrk::Wrk};
use crate::{
    exit::ExitKind,
    levels::SelectedStrategy,
    results::{ResultFile, RunMetadata, bench::BenchResults, bench::WrkReport},
};

/// Tickets on sale: the most that a sale may have, so that it never sells out.
pub(super) const STOCK: u32 = 1_000_000;
/// Load before each measured round: connects the pool and prepares the statements.
pub(super) const WARM_UP: Duration = Duration::from_secs(1);
/// The first buyer of a measured round, out of reach of the warm-up's buyers.
pub(super) const FIRST_MEASURED_BUYER: u64 = 1_000_000_000;
/// Connections with which the memory is measured.
pub(super) const CONNECTIONS: usize = 1000;
/// What is checked after each round of confirmed reservations.
pub(super) const ROWS_CHECKED: &str = "I1, I2 and I3 hold, and every confirmed reservation has its row";

/// The strategy under test, and the services that it runs on.
pub(super) struct BenchEnvironment {
    pub(super) selected: SelectedStrategy,
    pub(super) program: Program,
    pub(super) services: Services,
    metadata: RunMetadata,
    pub(super) clients: u32,
    /// Duration of a round.
    pub(super) duration: Duration,
}

/// One round of load on a server.
pub(super) struct LoadRound {
    pub(super) load: WrkReport,
    /// From the start of the server's process until it was ready.
    pub(super) ready: Duration,
    pub(super) rows: usize,
    pub(super) void: Vec<String>,
}

impl BenchEnvironment {
    /// Finds or starts the services.
    pub(super) async fn new(
        selected: SelectedStrategy,
        args: &BenchArgs,
        default_clients: u32,
    ) -> anyhow::Result<Self> {
        warn_of_debug_build();
        let services = Services::find(Durability::Durable, selected.strategy.needs).await?;
        Ok(Self {
            metadata: RunMetadata::of_this_run().with_services(&services)?,
            program: selected.program()?,
            selected,
            services,
            clients: args.clients.unwrap_or(default_clients),
            duration: Duration::from_secs(args.seconds.into()),
        })
    }

    /// A fresh database for the selected strategy.
    pub(super) async fn test_environment(&self) -> anyhow::Result<TestEnvironment> {
        self.services.environment(self.selected.strategy.schema).await
    }

    /// Starts a server of the selected strategy, and measures the time until it is ready.
    pub(super) async fn start(&self, environment: &TestEnvironment, pool: u32) -> anyhow::Result<(Servers, Duration)> {
        self.start_as(&self.program, self.selected.strategy, environment, pool)
            .await
    }

    /// Starts a server of this program and this strategy of the level, and measures the time until it is ready.
    pub(super) async fn start_as(
        &self,
        program: &Program,
        strategy: &Strategy,
        environment: &TestEnvironment,
        pool: u32,
    ) -> anyhow::Result<(Servers, Duration)> {
        let rush = Rush {
            pool_size: Some(pool),
            ..Rush::default()
        };
        let began = Instant::now();
        let servers = Servers::start(&rush, environment, program, self.selected.level, strategy).await?;
        Ok((servers, began.elapsed()))
    }

    /// One round: starts a server, warms it up, measures it under load, and checks the rows.
    pub(super) async fn load_round(&self, wrk: &Wrk, pool: u32) -> anyhow::Result<LoadRound> {
        let environment = self.test_environment().await?;
        let (servers, ready) = self.start(&environment, pool).await?;
        servers.open_sale(SALE, STOCK).await?;
        let address = *servers.live().borrow().first().context("no server is running")?;
        let warm = wrk.run(address, self.clients, WARM_UP, 0).await?;
        let load = wrk
            .run(address, self.clients, self.duration, FIRST_MEASURED_BUYER)
            .await?;
        servers.stop().await?;
        let (rows, void) = self
            .check_rows(environment.database(), warm.confirmed() + load.confirmed())
            .await?;
        Ok(LoadRound {
            load,
            ready,
            rows,
            void,
        })
    }

    /// Counts the rows, and lists what is wrong with them: the invariants that rows alone can violate, confirmed reservations without a
    /// row, and a sale that sold out.
    pub(super) async fn check_rows(&self, database: &Database, confirmed: u64) -> anyhow::Result<(usize, Vec<String>)> {
        self.check_paid_rows(database, confirmed, None).await
    }

    /// The same of a sale with payments, with what the payment service has charged and refunded.
    pub(super) async fn check_paid_rows(
        &self,
        database: &Database,
        confirmed: u64,
        payments: Option<Vec<Payment>>,
    ) -> anyhow::Result<(usize, Vec<String>)> {
        const OF_ROWS: [Invariant; 4] = [
            Invariant::NoOversell,
            Invariant::Conservation,
            Invariant::NoDuplicate,
            Invariant::PaidOnce,
        ];

        let pool = database.pool(1).await?;
        let sold = final_state::read(&pool, SALE).await?;
        pool.close().await;
        let rows = sold.rows.len();
        let history = History {
            header: Header {
                version: FORMAT_VERSION,
                strategy: self.selected.name(),
                sale: SALE,
                capacity: STOCK.into(),
                deadline_us: 0,
                expiry_us: None,
                stock: Some(sold.stock),
            },
            requests: vec![],
            rows: Some(sold.rows),
            faults: vec![],
            payments,
            decisions: None,
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

    /// Resident memory of a server that is ready and idle, and of one with [`CONNECTIONS`] open, in MiB.
    pub(super) async fn memory(&self, pool: u32) -> anyhow::Result<(f64, f64)> {
        let environment = self.test_environment().await?;
        let (servers, _) = self.start(&environment, pool).await?;
        let address = *servers.live().borrow().first().context("no server is running")?;
        let pid = servers.pid(0).await?;
        let idle = resources::resident_mib(pid)?;
        let open = resources::connect(address, CONNECTIONS).await?;
        let connected = resources::resident_mib(pid)?;
        drop(open);
        servers.stop().await?;
        Ok((idle, connected))
    }

    /// Prints what it was measured on and whether it is void, and writes the result file unless the measurement ended early.
    ///
    /// # Errors
    /// That of the measurement, or the file can't be written.
    pub(super) fn finish(
        &self,
        measured: impl Serialize,
        rounds: Rounds,
        checked: &str,
        void: Vec<String>,
        json: Option<ResultFile>,
    ) -> anyhow::Result<ExitKind> {
        let report = self.services.postgres.report();
        let setting = |name| report.durability.get(name).map_or("unknown", String::as_str);
        println!(
            "{}\npostgres {} ({}), fsync {}, synchronous_commit {}",
            self.metadata.conditions(),
            report.version,
            report.source,
            setting("fsync"),
            setting("synchronous_commit"),
        );
        let exit = print_void(&void);
        rounds.check_complete()?;
        if void.is_empty() {
            println!("checked after each round: {checked}");
        }
        if let Some(json) = json {
            let has_clients = self.clients > 0;
            let results = BenchResults {
                metadata: RunMetadata {
                    void,
                    ..self.metadata.clone()
                },
                strategy: self.selected.name(),
                clients: has_clients.then_some(self.clients),
                seconds: has_clients.then_some(self.duration.as_secs()),
                measured,
            };
            json.write(&results)?;
        }
        Ok(exit)
    }
}

/// The rounds of a measurement, which may have ended early.
pub(super) struct Rounds {
    planned: u32,
    /// Those that there is something to show of.
    pub(super) measured: usize,
    ended: anyhow::Result<()>,
}

impl Rounds {
    /// # Errors
    /// That of the measurement, if there is nothing to show.
    pub(super) fn of(planned: u32, measured: usize, ended: anyhow::Result<()>) -> anyhow::Result<Self> {
        match ended {
            Err(why) if measured == 0 => Err(incomplete(why, 0, planned)),
            ended => Ok(Self {
                planned,
                measured,
                ended,
            }),
        }
    }

    /// Says so if the measurement ended early.
    ///
    /// # Errors
    /// That of the measurement.
    pub(super) fn check_complete(self) -> anyhow::Result<()> {
        self.ended.map_err(|why| incomplete(why, self.measured, self.planned))
    }
}

fn incomplete(why: anyhow::Error, measured: usize, planned: u32) -> anyhow::Error {
    println!("INCOMPLETE: the measurement ended early, after {measured} of {planned} rounds, and writes no results");
    why
}

/// Prints why the results are void, if they are.
pub(super) fn print_void(void: &[String]) -> ExitKind {
    for reason in void {
        println!("VOID: {reason}");
    }
    if void.is_empty() {
        ExitKind::AsPromised
    } else {
        ExitKind::Broken
    }
}
