//! `oversold bench lv4/… --drain`: how fast one consumer of LV.4 processes a backlog. A server without consumers accepts the orders, then one
//! with a consumer processes them. Next to it, `pgbench` sends the database the same batches, and one `COPY` the rows that they leave.

use std::{
    collections::HashSet,
    sync::atomic::{AtomicU64, Ordering},
    time::{Duration, Instant},
};

use anyhow::{Context, bail, ensure};
use box_office::{BuyerId, Priority, api::NewReservation};
use futures_util::future::try_join_all;
use harness::{
    backends::TestEnvironment,
    final_state,
    rush::{Connection, Program, SALE, Servers},
};
use hyper::{Request, StatusCode, header};
use sqlx::PgPool;
use tokio::time::sleep;

use super::{
    BenchArgs, MeasurementTable,
    accept::without_consumers,
    bench_setup::{BenchEnvironment, Rounds, STOCK},
    copy::{self, TableRows},
    pgbench::{Length, Pgbench},
    progress, resources,
};
use crate::{
    exit::ExitKind,
    interrupt::Signals,
    levels::SelectedStrategy,
    results::{
        ResultFile,
        bench::{BatchRate, CopyCeiling, DrainRound, DrainThroughput},
    },
    statistics::MedianRange,
};

/// Orders in the backlog, unless told otherwise.
const ORDERS: u32 = 100_000;
/// The same for a strategy that processes one order at a time.
const ORDERS_ONE_BY_ONE: u32 = 5_000;
/// Connections that fill the backlog.
const CONNECTIONS: u64 = 128;
/// Interval of the queries for the remaining stock, each of which reads one row.
const POLL_INTERVAL: Duration = Duration::from_millis(10);
/// A consumer without progress for this long is considered stalled.
pub(super) const STALLED: Duration = Duration::from_secs(30);

/// Measures how fast a backlog is processed; without a number, one of the default size.
pub(super) async fn run(selected: SelectedStrategy, args: &BenchArgs, orders: Option<u32>) -> anyhow::Result<ExitKind> {
    // Tool and file first: no run is wasted on what can't be measured or written.
    let pgbench = Pgbench::find_batches(selected)?;
    let one_by_one = pgbench.as_ref().is_none_or(|&(_, batch)| batch == 1);
    let orders = orders.unwrap_or(if one_by_one { ORDERS_ONE_BY_ONE } else { ORDERS });
    let json = args.json.as_deref().map(ResultFile::open).transpose()?;
    let mut signals = Signals::listen()?;
    let mut bench = signals.or_end(BenchEnvironment::new(selected, args, 0)).await?;
    // No client sends anything while the backlog is processed.
    bench.clients = 0;

    let (mut ours, mut batches, mut copies, mut void) = (vec![], vec![], vec![], vec![]);
    let rounds = args.rounds.unwrap_or(3);
    let ended = signals
        .or_end(async {
            for number in 1..=rounds {
                progress(&format!(
                    "round {number} of {rounds}: {}, {orders} orders",
                    selected.name()
                ));
                let (round, written) = bench.drain_round(args.pool, orders, &mut void).await?;
                ours.push(round);
                if let Some((pgbench, batch)) = &pgbench {
                    progress(&format!("round {number} of {rounds}: pgbench"));
                    let round = bench.batch_round(pgbench, *batch, args.pool, orders, &mut void);
                    batches.push(round.await?);
                }
                progress(&format!("round {number} of {rounds}: COPY"));
                copies.push(bench.copy_round(&written, orders).await?);
            }
            Ok(())
        })
        .await;
    progress("");
    let rounds = Rounds::of(rounds, ours.len(), ended)?;

    let a_second = |round: &DrainRound| f64::from(orders) / (round.took_ms / 1e3);
    let throughput = DrainThroughput {
        pool_size: args.pool,
        orders,
        consumers: 1,
        orders_a_second: MedianRange::over(&ours, a_second)?,
        took_ms: MedianRange::over(&ours, |round| round.took_ms)?,
        pgbench: batch_rate(pgbench.map(|(_, batch)| batch), ours.iter().map(a_second), &batches),
        copy: copy_ceiling(ours.iter().map(a_second), &copies),
        ready_ms: MedianRange::over(&ours, |round| round.ready_ms)?,
        most_mib: MedianRange::over(&ours, |round| round.most_mib)?,
        rows_judged: ours.iter().map(|round| round.rows).sum(),
        rounds: ours,
    };
    print(&selected.name(), &throughput, rounds.measured);
    let checked = "I1, I2 and I3 hold, and every order of the backlog has one row and one event";
    bench.finish(throughput, rounds, checked, void, json)
}

/// A server with one consumer.
pub(super) fn with_consumer(program: &Program) -> Program {
    program.clone().variable("KAFKA_CONSUMERS", "1")
}

/// `None` without statements for pgbench.
fn batch_rate(batch: Option<u32>, ours: impl Iterator<Item = f64>, theirs: &[f64]) -> Option<BatchRate> {
    Some(BatchRate {
        orders_in_a_transaction: batch?,
        orders_a_second: MedianRange::of(theirs.iter().copied())?,
        ratio: MedianRange::of_ratios(ours, theirs.iter().copied())?,
    })
}

fn copy_ceiling(ours: impl Iterator<Item = f64>, theirs: &[f64]) -> Option<CopyCeiling> {
    Some(CopyCeiling {
        orders_a_second: MedianRange::of(theirs.iter().copied())?,
        ratio: MedianRange::of_ratios(ours, theirs.iter().copied())?,
    })
}

impl BenchEnvironment {
    /// Fills a backlog, and lets one consumer process it. Returns what it has written as well.
    pub(super) async fn drain_round(
        &self,
        pool: u32,
        orders: u32,
        void: &mut Vec<String>,
    ) -> anyhow::Result<(DrainRound, Vec<TableRows>)> {
        let with_consumer = with_consumer(&self.program);
        let environment = self.backlog(&with_consumer, pool, orders).await?;
        let database = environment.database().pool(1).await?;
        let began = Instant::now();
        let ((servers, ready), took) = tokio::try_join!(
            self.started(&with_consumer, &environment, pool),
            until_decided(&database, orders, began)
        )?;
        let most_mib = resources::peak_mib(servers.pid(0).await?)?;
        servers.stop().await?;
        let rows = self.check_decided(&environment, &database, orders, void).await?;
        let written = copy::rows(&database).await?;
        database.close().await;
        let round = DrainRound {
            took_ms: took.as_secs_f64() * 1e3,
            ready_ms: ready.as_secs_f64() * 1e3,
            most_mib,
            rows,
        };
        Ok((round, written))
    }

    /// A fresh database and fresh topics, with a backlog for a server of this program to process.
    pub(super) async fn backlog(&self, program: &Program, pool: u32, orders: u32) -> anyhow::Result<TestEnvironment> {
        let environment = self.test_environment().await?;
        // Topics and consumer group exist before it starts, as they do in production.
        self.started(program, &environment, pool).await?.0.stop().await?;
        let without_consumers = without_consumers(self.program.clone());
        let (servers, _) = self.started(&without_consumers, &environment, pool).await?;
        servers.open_sale(SALE, STOCK).await?;
        fill(&servers, orders).await?;
        servers.stop().await?;
        Ok(environment)
    }

    pub(super) async fn started(
        &self,
        program: &Program,
        environment: &TestEnvironment,
        pool: u32,
    ) -> anyhow::Result<(Servers, Duration)> {
        self.start_as(program, self.selected.strategy, environment, pool).await
    }

    /// Sends the same batches to the database with pgbench. Returns orders per second.
    async fn batch_round(
        &self,
        pgbench: &Pgbench,
        batch: u32,
        pool: u32,
        orders: u32,
        void: &mut Vec<String>,
    ) -> anyhow::Result<f64> {
        let environment = self.test_environment().await?;
        let program = without_consumers(self.program.clone());
        let (servers, _) = self.started(&program, &environment, pool).await?;
        servers.open_sale(SALE, STOCK).await?;
        servers.stop().await?;
        let transactions = orders.div_ceil(batch);
        let report = pgbench
            .run(environment.database(), 1, Length::Transactions(transactions), 0)
            .await?;
        let database = environment.database().pool(1).await?;
        let mut broken = vec![];
        self.check_decided(&environment, &database, transactions * batch, &mut broken)
            .await?;
        database.close().await;
        void.extend(broken.into_iter().map(|reason| format!("pgbench: {reason}")));
        Ok(report.a_second * f64::from(batch))
    }

    /// Copies the rows of the orders into a fresh database. Returns orders per second.
    async fn copy_round(&self, written: &[TableRows], orders: u32) -> anyhow::Result<f64> {
        let environment = self.test_environment().await?;
        let database = environment.database().pool(1).await?;
        let took = copy::copy_in(&database, written, orders).await?;
        database.close().await;
        Ok(f64::from(orders) / took.as_secs_f64())
    }

    /// Checks that there is one row and one event for each order. Returns the number of rows.
    async fn check_decided(
        &self,
        environment: &TestEnvironment,
        database: &PgPool,
        orders: u32,
        void: &mut Vec<String>,
    ) -> anyhow::Result<usize> {
        let (rows, broken) = self.check_rows(environment.database(), orders.into()).await?;
        void.extend(broken);
        let sold = final_state::read(database, SALE).await?;
        let ids: HashSet<_> = sold.rows.iter().map(|row| row.reservation).collect();
        if ids.len() != orders as usize || rows != ids.len() {
            let ids = ids.len();
            void.push(format!(
                "{orders} orders were in the backlog; there are {rows} rows with {ids} ids"
            ));
        }
        let (events, ids): (i64, i64) = sqlx::query_as("select count(*), count(distinct reservation_id) from outbox")
            .fetch_one(database)
            .await?;
        if (events, ids) != (orders.into(), orders.into()) {
            void.push(format!(
                "{orders} orders were in the backlog; there are {events} events about {ids} of them"
            ));
        }
        Ok(rows)
    }
}

fn print(strategy: &str, throughput: &DrainThroughput, rounds: usize) {
    let mut table = MeasurementTable::new(
        strategy,
        format!("median (range) of {rounds} backlogs of {} orders", throughput.orders),
    );
    table.row(
        "orders decided a second, one consumer",
        throughput.orders_a_second.to_string(),
    );
    table.row("all decided after", format!("{:.0} ms", throughput.took_ms));
    match &throughput.pgbench {
        Some(pgbench) => {
            let what = match pgbench.orders_in_a_transaction {
                1 => "pgbench, one order a transaction".to_owned(),
                many => format!("pgbench, {many} orders a transaction"),
            };
            table.row(what, pgbench.orders_a_second.to_string());
            table.row("ratio to it", format!("{:.2}", pgbench.ratio));
        }
        None => table.row("pgbench", "not known: there are no statements for it"),
    }
    if let Some(copy) = &throughput.copy {
        table.row("ceiling: COPY of the same rows", copy.orders_a_second.to_string());
        table.row("ratio to the ceiling", format!("{:.3}", copy.ratio));
    }
    table.row("ready after, with a backlog", format!("{:.0} ms", throughput.ready_ms));
    table.row("memory, peak", format!("{:.1} MiB", throughput.most_mib));
    table.row("pool", throughput.pool_size.to_string());
    table.row("rows checked", throughput.rows_judged.to_string());
    table.print();
}

/// Fills the backlog with one order for each of this many buyers.
///
/// # Errors
/// An order was not accepted.
async fn fill(servers: &Servers, orders: u32) -> anyhow::Result<()> {
    let address = *servers.live().borrow().first().context("no server is running")?;
    let next = AtomicU64::new(1);
    let connection = async || {
        let mut connection = Connection::open(address).await?;
        loop {
            let buyer = next.fetch_add(1, Ordering::Relaxed);
            if buyer > orders.into() {
                return anyhow::Ok(());
            }
            let buyer_id: BuyerId = buyer.cast_signed();
            let request = Request::post(format!("/api/sales/{SALE}/reservations"))
                .header(header::CONTENT_TYPE, "application/json")
                .header("idempotency-key", buyer.to_string())
                .body(
                    serde_json::to_vec(&NewReservation {
                        buyer_id,
                        priority: Priority::Normal,
                    })?
                    .into(),
                )?;
            let answered = connection.send(request).await?;
            ensure!(
                answered.status == StatusCode::ACCEPTED,
                "an order was answered with {}: {}",
                answered.status,
                String::from_utf8_lossy(&answered.body)
            );
        }
    };
    try_join_all((0..CONNECTIONS).map(|_| connection())).await?;
    Ok(())
}

/// Waits until the last of the orders is decided, and returns the time since `began`. There is a ticket for each, so the stock shows it.
async fn until_decided(database: &PgPool, orders: u32, began: Instant) -> anyhow::Result<Duration> {
    let (mut left, mut moved) = (i64::from(orders), Instant::now());
    loop {
        let stock: i64 = sqlx::query_scalar("select stock from sale where id = $1")
            .bind(SALE)
            .fetch_one(database)
            .await?;
        let now_left = stock - (i64::from(STOCK) - i64::from(orders));
        if now_left <= 0 {
            return Ok(began.elapsed());
        }
        if now_left != left {
            (left, moved) = (now_left, Instant::now());
        } else if moved.elapsed() > STALLED {
            bail!("{left} of {orders} orders are left, and none was decided for {STALLED:?}");
        }
        sleep(POLL_INTERVAL).await;
    }
}
