//! `oversold bench lv4/single-writer --drain --payments …`: how fast one instance completes a backlog of sales, each of which is held,
//! charged, and confirmed or released. Next to it, the same backlog without payments.

use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use harness::{
    payments::{self, PaymentService},
    rush::Program,
};
use sqlx::PgPool;
use tokio::time::sleep;

use super::{
    BenchArgs, MeasurementTable,
    bench_setup::{BenchEnvironment, Rounds},
    drain::{STALLED, with_consumer},
    progress,
};
use crate::{
    exit::ExitKind,
    interrupt::Signals,
    levels::SelectedStrategy,
    results::{
        ResultFile,
        bench::{PaidRound, PaidThroughput},
    },
    statistics::MedianRange,
};

/// Orders in the backlog, unless told otherwise.
const ORDERS: u32 = 20_000;
/// Interval of the queries for what is not completed yet.
const POLL_INTERVAL: Duration = Duration::from_millis(20);

/// Measures how fast a backlog is completed with payments and without; without a number, one of the default size.
pub(super) async fn run(
    selected: SelectedStrategy,
    args: &BenchArgs,
    orders: Option<u32>,
    service: &Program,
) -> anyhow::Result<ExitKind> {
    let orders = orders.unwrap_or(ORDERS);
    let json = args.json.as_deref().map(ResultFile::open).transpose()?;
    let mut signals = Signals::listen()?;
    let mut bench = signals.or_end(BenchEnvironment::new(selected, args, 0)).await?;
    bench.clients = 0;
    let with = args
        .sale
        .given()
        .into_iter()
        .fold(with_consumer(&bench.program), |program, (name, value)| {
            program.variable(name, value)
        });

    let (mut paid, mut unpaid, mut void) = (vec![], vec![], vec![]);
    let rounds = args.rounds.unwrap_or(3);
    let ended = signals
        .or_end(async {
            for number in 1..=rounds {
                progress(&format!("round {number} of {rounds}: {orders} sales with payments"));
                paid.push(bench.paid_round(&with, service, args.pool, orders, &mut void).await?);
                progress(&format!("round {number} of {rounds}: {orders} sales without payments"));
                let (round, _) = bench.drain_round(args.pool, orders, &mut void).await?;
                unpaid.push(round);
            }
            Ok(())
        })
        .await;
    progress("");
    let rounds = Rounds::of(rounds, unpaid.len(), ended)?;
    paid.truncate(rounds.measured);

    let a_second = |took_ms: f64| f64::from(orders) / (took_ms / 1e3);
    let with = || paid.iter().map(|round| a_second(round.took_ms));
    let without = || unpaid.iter().map(|round| a_second(round.took_ms));
    let none = "there was no round";
    let throughput = PaidThroughput {
        pool_size: args.pool,
        orders,
        consumers: 1,
        payments: args.sale.payments().unwrap_or_default(),
        sales_a_second: MedianRange::of(with()).context(none)?,
        without_payments: MedianRange::of(without()).context(none)?,
        ratio: MedianRange::of_ratios(with(), without()).context(none)?,
        charge_requests_each: MedianRange::over(&paid, |round| round.charge_requests as f64 / f64::from(orders))?,
        rows_judged: paid.iter().map(|round| round.rows).sum(),
        rounds: paid,
    };
    print(&bench.selected.name(), &throughput, rounds.measured);
    let checked = "I1, I2, I3 and I11 hold, and every order of the backlog has one row and has ended";
    bench.finish(throughput, rounds, checked, void, json)
}

impl BenchEnvironment {
    /// Lets one instance complete a backlog of sales that are paid for.
    async fn paid_round(
        &self,
        program: &Program,
        service: &Program,
        pool: u32,
        orders: u32,
        void: &mut Vec<String>,
    ) -> anyhow::Result<PaidRound> {
        let payments = PaymentService::start(service).await?;
        let program = program.clone().variable("PAYMENT_URL", payments.url());
        let environment = self.backlog(&program, pool, orders).await?;
        let database = environment.database().pool(1).await?;
        let began = Instant::now();
        let ((servers, _), took) = tokio::try_join!(
            self.started(&program, &environment, pool),
            until_completed(&database, orders, began)
        )?;
        servers.stop().await?;
        let charge_requests = payments.calls().await?;
        let ledger = payments.ledger().await?;
        database.close().await;
        let (rows, broken) = self
            .check_paid_rows(environment.database(), orders.into(), Some(ledger))
            .await?;
        void.extend(broken);
        Ok(PaidRound {
            took_ms: took.as_secs_f64() * 1e3,
            charge_requests,
            rows,
        })
    }
}

/// Waits until every order has a row, and every ticket that was held is confirmed or released. Returns the time since `began`.
async fn until_completed(database: &PgPool, orders: u32, began: Instant) -> anyhow::Result<Duration> {
    let (mut left, mut moved) = ((i64::from(orders), 0), Instant::now());
    loop {
        let decided: i64 = sqlx::query_scalar("select count(*) from reservation")
            .fetch_one(database)
            .await?;
        let now_left = (i64::from(orders) - decided, payments::unfinished(database).await?);
        if now_left == (0, 0) {
            return Ok(began.elapsed());
        }
        if now_left != left {
            (left, moved) = (now_left, Instant::now());
        } else if moved.elapsed() > STALLED {
            let (undecided, unfinished) = left;
            bail!(
                "of {orders} orders, {undecided} are not decided and {unfinished} neither confirmed nor released, and nothing \
                 has changed for {STALLED:?}"
            );
        }
        sleep(POLL_INTERVAL).await;
    }
}

fn print(strategy: &str, throughput: &PaidThroughput, rounds: usize) {
    let mut table = MeasurementTable::new(
        strategy,
        format!("median (range) of {rounds} backlogs of {} orders", throughput.orders),
    );
    table.row(
        format!("sales completed a second, {}", throughput.payments),
        throughput.sales_a_second.to_string(),
    );
    table.row(
        "orders decided a second without payments",
        throughput.without_payments.to_string(),
    );
    table.row("ratio", format!("{:.2}", throughput.ratio));
    table.row(
        "requests for a charge, each",
        format!("{:.2}", throughput.charge_requests_each),
    );
    table.row("pool", throughput.pool_size.to_string());
    table.row("rows checked", throughput.rows_judged.to_string());
    table.print();
}
