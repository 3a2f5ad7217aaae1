//! `oversold bench LEVEL/STRATEGY`: sustained reservations per second, next to what the database makes of the same statements.

use std::time::Duration;

use box_office::Service;
use harness::rush::SALE;

use super::{
    BenchArgs, MeasurementTable,
    bench_setup::{
        BenchEnvironment, CONNECTIONS, FIRST_MEASURED_BUYER, LoadRound, ROWS_CHECKED, Rounds, STOCK, WARM_UP,
    },
    pgbench::{Length, Pgbench},
    progress,
    wrk::Wrk,
};
use crate::{
    exit::ExitKind,
    interrupt::Signals,
    levels::SelectedStrategy,
    results::{
        ResultFile,
        bench::{PgbenchReport, Throughput, TransactionCeiling},
    },
    statistics::MedianRange,
};

/// Clients, unless told otherwise.
pub(super) const CLIENTS: u32 = 64;
/// The numbers of clients among which the ceiling is searched for.
const CEILING_CLIENTS: [u32; 5] = [1, 4, 8, 16, 64];
/// How long each of them is tried at most; never longer than a round.
const PROBE: Duration = Duration::from_secs(2);

/// Measures the strategy and its ceiling.
pub(super) async fn run(selected: SelectedStrategy, args: &BenchArgs) -> anyhow::Result<ExitKind> {
    // Tools and file first: no run is wasted on what can't be measured or written.
    let wrk = Wrk::find()?;
    let pgbench = Pgbench::find(selected)?;
    let json = args.json.as_deref().map(ResultFile::open).transpose()?;
    let mut signals = Signals::listen()?;
    let bench = signals.or_end(BenchEnvironment::new(selected, args, CLIENTS)).await?;
    let wrk = Wrk::new(wrk)?;

    let rounds = args.rounds.unwrap_or(5);
    let mut measured = Measured::default();
    let ended = signals
        .or_end(measured.measure(&bench, &wrk, pgbench, args.pool, rounds))
        .await;
    progress("");
    let Measured {
        memory,
        ceiling,
        ours,
        void,
    } = measured;
    let rounds = Rounds::of(rounds, ours.len(), ended)?;
    let throughput = throughput(args.pool, &ours, memory, ceiling)?;
    print(&bench, &throughput, rounds.measured);
    bench.finish(throughput, rounds, ROWS_CHECKED, void, json)
}

/// What was measured, also of a measurement that ended early.
#[derive(Default)]
struct Measured {
    /// Of an idle server, and of one with [`CONNECTIONS`] open, in MiB.
    memory: (f64, f64),
    ceiling: Option<Ceiling>,
    ours: Vec<LoadRound>,
    void: Vec<String>,
}

impl Measured {
    async fn measure(
        &mut self,
        bench: &BenchEnvironment,
        wrk: &Wrk,
        pgbench: Option<Pgbench>,
        pool: u32,
        rounds: u32,
    ) -> anyhow::Result<()> {
        self.memory = bench.memory(pool).await?;
        if let Some(pgbench) = pgbench {
            self.ceiling = Some(Ceiling::search(bench, pgbench, &mut self.void).await?);
        }
        for number in 1..=rounds {
            progress(&format!("round {number} of {rounds}: {}", bench.selected.name()));
            let round = bench.load_round(wrk, pool).await?;
            self.void.extend(round.void.iter().cloned());
            self.ours.push(round);
            if let Some(ceiling) = &mut self.ceiling {
                progress(&format!("round {number} of {rounds}: the ceiling"));
                ceiling.round(bench, &mut self.void).await?;
            }
        }
        Ok(())
    }
}

fn throughput(
    pool_size: u32,
    rounds: &[LoadRound],
    memory: (f64, f64),
    ceiling: Option<Ceiling>,
) -> anyhow::Result<Throughput> {
    Ok(Throughput {
        pool_size,
        reservations_a_second: MedianRange::over(rounds, |round| round.load.confirmed_a_second())?,
        p50_ms: MedianRange::over(rounds, |round| round.load.p50_ms())?,
        p99_ms: MedianRange::over(rounds, |round| round.load.p99_ms())?,
        refused: rounds.iter().map(|round| round.load.refused).sum(),
        cut_off: rounds.iter().map(|round| round.load.cut_off).sum(),
        ceiling: ceiling.and_then(|ceiling| ceiling.result(rounds)),
        ready_ms: MedianRange::over(rounds, |round| round.ready.as_secs_f64() * 1e3)?,
        idle_mib: memory.0,
        mib_with_1000_connections: memory.1,
        rows_judged: rounds.iter().map(|round| round.rows).sum(),
        rounds: rounds.iter().map(|round| round.load).collect(),
    })
}

/// The ceiling, as it is being measured.
struct Ceiling {
    pgbench: Pgbench,
    /// The number of clients with the highest throughput.
    clients: u32,
    /// Transactions per second by number of clients.
    probed: Vec<(u32, f64)>,
    rounds: Vec<PgbenchReport>,
}

impl Ceiling {
    /// Searches for the number of clients with the highest throughput.
    async fn search(bench: &BenchEnvironment, pgbench: Pgbench, void: &mut Vec<String>) -> anyhow::Result<Self> {
        let mut probed = vec![];
        for clients in CEILING_CLIENTS {
            progress(&format!("looking for the ceiling: {clients} clients"));
            let probe = run_pgbench(bench, &pgbench, clients, PROBE.min(bench.duration), void).await?;
            probed.push((clients, probe.a_second));
        }
        let best = probed.iter().max_by(|(_, a), (_, b)| a.total_cmp(b));
        Ok(Self {
            pgbench,
            clients: best.map_or(CEILING_CLIENTS[0], |&(clients, _)| clients),
            probed,
            rounds: vec![],
        })
    }

    async fn round(&mut self, bench: &BenchEnvironment, void: &mut Vec<String>) -> anyhow::Result<()> {
        let round = run_pgbench(bench, &self.pgbench, self.clients, bench.duration, void).await?;
        if round.transactions == 0 {
            void.push("the ceiling: pgbench did nothing in its time".to_owned());
        }
        self.rounds.push(round);
        Ok(())
    }

    /// `None` without a round.
    fn result(self, ours: &[LoadRound]) -> Option<TransactionCeiling> {
        let a_second = || self.rounds.iter().map(|round| round.a_second);
        let ours = ours.iter().map(|round| round.load.confirmed_a_second());
        Some(TransactionCeiling {
            clients: self.clients,
            transactions_a_second: MedianRange::of(a_second())?,
            ratio: MedianRange::of_ratios(ours, a_second())?,
            probed: self.probed,
            rounds: self.rounds,
        })
    }
}

/// Runs the strategy's statements with pgbench on a fresh database, warmed up like the server.
async fn run_pgbench(
    bench: &BenchEnvironment,
    pgbench: &Pgbench,
    clients: u32,
    duration: Duration,
    void: &mut Vec<String>,
) -> anyhow::Result<PgbenchReport> {
    let environment = bench.test_environment().await?;
    let database = environment.database();
    let (servers, _) = bench.start(&environment, 1).await?;
    servers.open_sale(SALE, STOCK).await?;
    servers.stop().await?;
    let warm = pgbench.run(database, clients, Length::Time(WARM_UP), 0).await?;
    let measured = pgbench
        .run(database, clients, Length::Time(duration), FIRST_MEASURED_BUYER / 2)
        .await?;
    let (_, broken) = bench
        .check_rows(database, warm.transactions + measured.transactions)
        .await?;
    void.extend(broken.into_iter().map(|reason| format!("the ceiling: {reason}")));
    Ok(measured)
}

fn print(bench: &BenchEnvironment, throughput: &Throughput, rounds: usize) {
    let mut table = MeasurementTable::new(
        bench.selected.name(),
        format!("median (range) of {rounds} rounds of {} s", bench.duration.as_secs()),
    );
    table.row("reservations a second", throughput.reservations_a_second.to_string());
    match &throughput.ceiling {
        Some(ceiling) => {
            table.row(
                format!("ceiling: pgbench, {} clients", ceiling.clients),
                ceiling.transactions_a_second.to_string(),
            );
            table.row("ratio to the ceiling", format!("{:.2}", ceiling.ratio));
        }
        None if bench.selected.strategy.needs.contains(&Service::Redis) => {
            table.row("ceiling", "not known; of the lock alone: --lock");
        }
        None => table.row("ceiling", "not known: pgbench can't run what this strategy does"),
    }
    table.row("latency, p50", format!("{:.1} ms", throughput.p50_ms));
    table.row("latency, p99", format!("{:.1} ms", throughput.p99_ms));
    if throughput.refused + throughput.cut_off > 0 {
        table.row(
            "not confirmed",
            format!("{} refused, {} cut off", throughput.refused, throughput.cut_off),
        );
    }
    table.row("ready after", format!("{:.0} ms", throughput.ready_ms));
    table.row("memory, idle", format!("{:.1} MiB", throughput.idle_mib));
    table.row(
        format!("memory, {CONNECTIONS} connections"),
        format!("{:.1} MiB", throughput.mib_with_1000_connections),
    );
    table.row("clients, pool", format!("{}, {}", bench.clients, throughput.pool_size));
    table.row("rows checked", throughput.rows_judged.to_string());
    table.print();
}
