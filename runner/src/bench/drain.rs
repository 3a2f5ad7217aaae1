//! How fast one consumer of LV.4 decides what waits: a server accepts orders and leaves them, another one comes and decides them. Beside it
//! `pgbench`, which sends the database the same batches.

use std::{
    collections::HashSet,
    fs::File,
    sync::atomic::{AtomicU64, Ordering},
    time::{Duration, Instant},
};

use anyhow::{Context, bail, ensure};
use box_office::{BuyerId, api::NewReservation};
use comfy_table::{Table, presets};
use futures_util::future::try_join_all;
use harness::{
    backends::TestEnvironment,
    rows,
    rush::{Connection, Program, SALE, Servers},
};
use hyper::{Request, StatusCode, header};
use serde::Serialize;
use sqlx::PgPool;
use tokio::time::sleep;

use super::{
    Bench, Measured, STOCK,
    accept::accepting,
    figures,
    figures::MedianRange,
    pgbench::{Length, Pgbench},
    say,
};
use crate::{BenchArgs, Ended, levels::SelectedStrategy};

/// Orders that wait, unless told otherwise; fewer where each is decided alone.
const ORDERS: u32 = 100_000;
const ORDERS_ONE_BY_ONE: u32 = 5_000;
/// Over so many connections they come in.
const CONNECTIONS: u64 = 128;
/// How often the database is asked how many are left: it reads one row.
const LOOK_EVERY: Duration = Duration::from_millis(10);
/// Who decides nothing for so long won't.
const STALLED: Duration = Duration::from_secs(30);

/// What was decided. The names are stable.
#[derive(Serialize)]
pub(super) struct Drain {
    pool_size: u32,
    orders: u32,
    consumers: u32,
    /// From the start of the process: its start-up is part of it.
    orders_a_second: MedianRange,
    took_ms: MedianRange,
    #[serde(skip_serializing_if = "Option::is_none")]
    ceiling: Option<CeilingRate>,
    ready_ms: MedianRange,
    /// The most memory that the server held meanwhile.
    most_mib: MedianRange,
    rows_judged: usize,
    rounds: Vec<Round>,
}

#[derive(Serialize)]
struct CeilingRate {
    orders_in_a_transaction: u32,
    orders_a_second: MedianRange,
    /// Of the two rounds beside each other.
    ratio: MedianRange,
}

/// One backlog, decided.
#[derive(Clone, Copy, Serialize)]
struct Round {
    took_ms: f64,
    ready_ms: f64,
    most_mib: f64,
    rows: usize,
}

/// Measures how fast a backlog is decided; without a number, one of the usual size.
pub(super) async fn bench(choice: SelectedStrategy, args: &BenchArgs, orders: Option<u32>) -> anyhow::Result<Ended> {
    // Before the run: nobody should wait for figures that can't be taken or written.
    let pgbench = Pgbench::find_batches(choice)?;
    let one_by_one = pgbench.as_ref().is_none_or(|&(_, batch)| batch == 1);
    let orders = orders.unwrap_or(if one_by_one { ORDERS_ONE_BY_ONE } else { ORDERS });
    let json = args.json.as_deref().map(crate::rush::create).transpose()?;
    let mut bench = Bench::find(choice, args, 0).await?;
    // Nobody buys while it is measured.
    bench.clients = 0;
    bench.drain(args, orders, pgbench.as_ref(), json).await
}

impl Bench {
    async fn drain(
        &self,
        args: &BenchArgs,
        orders: u32,
        pgbench: Option<&(Pgbench, u32)>,
        json: Option<File>,
    ) -> anyhow::Result<Ended> {
        let name = self.choice.name();
        let (mut ours, mut ceiling, mut void) = (vec![], vec![], vec![]);
        let rounds = args.rounds.unwrap_or(3);
        for number in 1..=rounds {
            say(&format!("round {number} of {rounds}: {name}, {orders} orders"));
            ours.push(self.drain_once(args.pool, orders, &mut void).await?);
            if let Some((pgbench, batch)) = pgbench {
                say(&format!("round {number} of {rounds}: the ceiling"));
                ceiling.push(self.batches(pgbench, *batch, args.pool, orders, &mut void).await?);
            }
        }
        say("");

        let of = |figure: fn(&Round) -> f64| MedianRange::of(ours.iter().map(figure)).context("there was no round");
        let a_second = |round: &Round| f64::from(orders) / (round.took_ms / 1e3);
        let ratios = ours
            .iter()
            .zip(&ceiling)
            .map(|(ours, ceiling)| a_second(ours) / ceiling);
        let drain = Drain {
            pool_size: args.pool,
            orders,
            consumers: 1,
            orders_a_second: MedianRange::of(ours.iter().map(a_second)).context("there was no round")?,
            took_ms: of(|round| round.took_ms)?,
            ceiling: match (
                pgbench,
                MedianRange::of(ceiling.iter().copied()),
                MedianRange::of(ratios),
            ) {
                (Some(&(_, orders_in_a_transaction)), Some(orders_a_second), Some(ratio)) => Some(CeilingRate {
                    orders_in_a_transaction,
                    orders_a_second,
                    ratio,
                }),
                _ => None,
            },
            ready_ms: of(|round| round.ready_ms)?,
            most_mib: of(|round| round.most_mib)?,
            rows_judged: ours.iter().map(|round| round.rows).sum(),
            rounds: ours,
        };
        self.print_drain(&drain, rounds);
        self.end(
            Measured::Drain(&drain),
            "I1, I2 and I3 hold, and every order that waited is decided once and told once",
            &void,
            json,
        )
    }

    /// Lets orders wait, and then one consumer come.
    async fn drain_once(&self, pool: u32, orders: u32, void: &mut Vec<String>) -> anyhow::Result<Round> {
        let stand = self.services.environment(self.choice.strategy.schema).await?;
        let deciding = self.program.clone().variable("KAFKA_CONSUMERS", "1");
        // Topics and group are in place when it comes, as they are where a shop is open every day.
        self.started(&deciding, &stand, pool).await?.0.stop().await?;
        let (servers, _) = self.started(&accepting(self.program.clone()), &stand, pool).await?;
        servers.open_sale(SALE, STOCK).await?;
        fill(&servers, orders).await?;
        servers.stop().await?;

        let database = stand.database().pool(1).await?;
        let began = Instant::now();
        let ((servers, ready), took) = tokio::try_join!(
            self.started(&deciding, &stand, pool),
            until_decided(&database, orders, began)
        )?;
        let most_mib = figures::most_mib(servers.pid(0).await?)?;
        servers.stop().await?;
        let rows = self.judge_decided(&stand, &database, orders, void).await?;
        database.close().await;
        Ok(Round {
            took_ms: took.as_secs_f64() * 1e3,
            ready_ms: ready.as_secs_f64() * 1e3,
            most_mib,
            rows,
        })
    }

    async fn started(
        &self,
        program: &Program,
        stand: &TestEnvironment,
        pool: u32,
    ) -> anyhow::Result<(Servers, Duration)> {
        self.start_as(program, self.choice.strategy, stand, pool).await
    }

    /// What the database makes of the same batches, in orders a second.
    async fn batches(
        &self,
        pgbench: &Pgbench,
        batch: u32,
        pool: u32,
        orders: u32,
        void: &mut Vec<String>,
    ) -> anyhow::Result<f64> {
        let stand = self.services.environment(self.choice.strategy.schema).await?;
        let (servers, _) = self.started(&accepting(self.program.clone()), &stand, pool).await?;
        servers.open_sale(SALE, STOCK).await?;
        servers.stop().await?;
        let transactions = orders.div_ceil(batch);
        let ceiling = pgbench
            .run(stand.database(), 1, Length::Transactions(transactions), 0)
            .await?;
        let database = stand.database().pool(1).await?;
        let mut broken = vec![];
        self.judge_decided(&stand, &database, transactions * batch, &mut broken)
            .await?;
        database.close().await;
        void.extend(broken.into_iter().map(|reason| format!("the ceiling: {reason}")));
        Ok(ceiling.a_second * f64::from(batch))
    }

    /// The rows: as many as there were orders, each order once, and each told once.
    async fn judge_decided(
        &self,
        stand: &TestEnvironment,
        database: &PgPool,
        orders: u32,
        void: &mut Vec<String>,
    ) -> anyhow::Result<usize> {
        let (rows, broken) = self.judge(stand.database(), orders.into()).await?;
        void.extend(broken);
        let sold = rows::read(database, SALE).await?;
        let ids: HashSet<_> = sold.rows.iter().map(|row| row.reservation).collect();
        if ids.len() != orders as usize || rows != ids.len() {
            let ids = ids.len();
            void.push(format!("{orders} orders waited; there are {rows} rows with {ids} ids"));
        }
        let (news, told): (i64, i64) = sqlx::query_as("select count(*), count(distinct reservation_id) from outbox")
            .fetch_one(database)
            .await?;
        if (news, told) != (orders.into(), orders.into()) {
            void.push(format!(
                "{orders} orders waited; {news} pieces of news tell of {told} of them"
            ));
        }
        Ok(rows)
    }

    fn print_drain(&self, drain: &Drain, rounds: u32) {
        let mut table = Table::new();
        table.load_style(presets::UTF8_FULL_CONDENSED).set_header([
            self.choice.name(),
            format!("median (range) of {rounds} backlogs of {} orders", drain.orders),
        ]);
        let mut row = |what: &str, figure: String| {
            table.add_row([what.to_owned(), figure]);
        };
        row(
            "orders decided a second, one consumer",
            drain.orders_a_second.to_string(),
        );
        row("all decided after", format!("{:.0} ms", drain.took_ms));
        match &drain.ceiling {
            Some(ceiling) => {
                let what = match ceiling.orders_in_a_transaction {
                    1 => "ceiling: pgbench, one order a transaction".to_owned(),
                    many => format!("ceiling: pgbench, {many} orders a transaction"),
                };
                row(&what, ceiling.orders_a_second.to_string());
                row("ratio to the ceiling", format!("{:.2}", ceiling.ratio));
            }
            None => row("ceiling", "not known: there are no statements for pgbench".to_owned()),
        }
        row("ready after, with orders waiting", format!("{:.0} ms", drain.ready_ms));
        row("memory, at most", format!("{:.1} MiB", drain.most_mib));
        row("pool", drain.pool_size.to_string());
        row("rows judged", drain.rows_judged.to_string());
        println!("{table}");
    }
}

/// Orders a ticket for each of so many buyers. All must be accepted.
async fn fill(servers: &Servers, orders: u32) -> anyhow::Result<()> {
    let address = *servers.live().borrow().first().context("no server lives")?;
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
                .body(serde_json::to_vec(&NewReservation { buyer_id })?.into())?;
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

/// How long after `began` the last of so many orders was decided. There is a ticket for each, so the stock tells.
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
            bail!("{left} of {orders} orders are left, and for {STALLED:?} none was decided");
        }
        sleep(LOOK_EVERY).await;
    }
}
