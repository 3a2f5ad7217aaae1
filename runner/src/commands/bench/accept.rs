//! `oversold bench lv4/…`: how many orders per second are accepted while no consumer runs, with a 202 once the broker has acknowledged the
//! order. Next to it, the same route with a produce that does nothing, and Kafka's own producer.

use std::{
    thread::sleep,
    time::{Duration, Instant},
};

use anyhow::{Context, ensure};
use box_office::{KafkaConfig, Order, Priority, RequestKey, Strategy};
use harness::rush::{Program, SALE};
use lv4_kafka::pipeline::{OrderMessage, PARTITIONS, orders_topic};
use rdkafka::{
    ClientConfig,
    consumer::{BaseConsumer, Consumer},
    types::RDKafkaErrorCode::NotLeaderForPartition,
};

use super::{
    BenchArgs, MeasurementTable,
    bench_setup::{BenchEnvironment, CONNECTIONS, FIRST_MEASURED_BUYER, Rounds, STOCK, WARM_UP},
    producer_perf_test, progress, resources,
    wrk::Wrk,
};
use crate::{
    exit::ExitKind,
    interrupt::Signals,
    levels::SelectedStrategy,
    results::{
        ResultFile,
        bench::{AcceptThroughput, ProducerReport, WithoutProduce, WrkReport},
    },
    statistics::MedianRange,
};

/// Clients, unless told otherwise.
pub(super) const CLIENTS: u32 = 1000;
/// The mutant with the same route that produces nothing.
const WITHOUT_PRODUCE: &str = lv4_kafka::mutants::PRODUCE_NOTHING.name;
/// Records that Kafka's own producer sends for each second of a round.
const RECORDS_A_SECOND: u64 = 50_000;
/// Time-out of a query for the number of messages.
const TIMEOUT: Duration = Duration::from_secs(10);
/// Pause before it is repeated.
const POLL_INTERVAL: Duration = Duration::from_millis(20);

/// One round of load on a server.
pub(super) struct AcceptRound {
    pub(super) load: WrkReport,
    /// From the start of the server's process until it was ready.
    ready: Duration,
    peak_mib: f64,
    /// Messages by partition.
    messages: Vec<i64>,
    /// Orders accepted, those of the warm-up included.
    accepted: u64,
}

/// Measures how fast orders are accepted.
pub(super) async fn run(selected: SelectedStrategy, args: &BenchArgs) -> anyhow::Result<ExitKind> {
    let mutant = selected
        .level
        .strategy(WITHOUT_PRODUCE)
        .with_context(|| format!("the level has no {WITHOUT_PRODUCE}"))?;
    ensure!(
        selected.strategy.name != WITHOUT_PRODUCE,
        "{} is what the others are compared with: lv4/locked, lv4/single-writer",
        selected.name()
    );
    // Tool and file first: no run is wasted on what can't be measured or written.
    let wrk = Wrk::find()?;
    let json = args.json.as_deref().map(ResultFile::open).transpose()?;
    let mut signals = Signals::listen()?;
    let mut bench = signals.or_end(BenchEnvironment::new(selected, args, CLIENTS)).await?;
    bench.program = without_consumers(bench.program);
    let wrk = Wrk::new(wrk)?;

    let memory = signals.or_end(bench.memory(args.pool)).await?;
    let (mut ours, mut others, mut void, mut producer_perf_test) = (vec![], vec![], vec![], None);
    let rounds = args.rounds.unwrap_or(5);
    let ended = signals
        .or_end(async {
            for number in 1..=rounds {
                progress(&format!("round {number} of {rounds}: {}", selected.name()));
                let round = bench
                    .accept_round(&wrk, &bench.program, selected.strategy, args.pool)
                    .await?;
                void.extend(round.missing_messages());
                ours.push(round);
                progress(&format!("round {number} of {rounds}: {WITHOUT_PRODUCE}"));
                others.push(bench.accept_round(&wrk, &bench.program, mutant, args.pool).await?);
            }
            progress("Kafka's own producer");
            let partitions = ours.iter().map(AcceptRound::partitions_used).max();
            producer_perf_test = match bench.producer_perf_test(partitions.unwrap_or(1).max(1)).await {
                Ok(report) => Some(report),
                Err(why) => {
                    println!("kafka-producer-perf-test is left out: {why:#}");
                    None
                }
            };
            Ok(())
        })
        .await;
    progress("");
    // A round without the one that it is compared with is left out.
    let rounds = Rounds::of(rounds, others.len(), ended)?;

    let throughput = AcceptThroughput {
        producer_perf_test,
        ..throughput(&bench, args.pool, memory, &ours[..others.len()], &others)?
    };
    print(&bench, &throughput, rounds.measured);
    let checked = "the broker has a message for every order that was accepted";
    bench.finish(throughput, rounds, checked, void, json)
}

/// A server that accepts orders and runs no consumer.
pub(super) fn without_consumers(program: Program) -> Program {
    program.variable("KAFKA_CONSUMERS", "0")
}

/// Without Kafka's own producer.
fn throughput(
    bench: &BenchEnvironment,
    pool_size: u32,
    memory: (f64, f64),
    ours: &[AcceptRound],
    others: &[AcceptRound],
) -> anyhow::Result<AcceptThroughput> {
    let a_second = |round: &AcceptRound| round.load.confirmed_a_second();
    let p95_ms = |round: &AcceptRound| round.load.p95_ms();
    let loads = |rounds: &[AcceptRound]| rounds.iter().map(|round| round.load).collect();
    Ok(AcceptThroughput {
        pool_size,
        orders_a_second: MedianRange::over(ours, a_second)?,
        p50_ms: MedianRange::over(ours, |round| round.load.p50_ms())?,
        p95_ms: MedianRange::over(ours, p95_ms)?,
        p99_ms: MedianRange::over(ours, |round| round.load.p99_ms())?,
        refused: ours.iter().map(|round| round.load.refused).sum(),
        cut_off: ours.iter().map(|round| round.load.cut_off).sum(),
        without_produce: WithoutProduce {
            strategy: format!("{}/{WITHOUT_PRODUCE}", bench.selected.level.name),
            orders_a_second: MedianRange::over(others, a_second)?,
            p95_ms: MedianRange::over(others, p95_ms)?,
            ratio: MedianRange::of_ratios(ours.iter().map(a_second), others.iter().map(a_second))
                .context("there was no round")?,
            rounds: loads(others),
        },
        producer_perf_test: None,
        ready_ms: MedianRange::over(ours, |round| round.ready.as_secs_f64() * 1e3)?,
        idle_mib: memory.0,
        mib_with_1000_connections: memory.1,
        most_mib: MedianRange::over(ours, |round| round.peak_mib)?,
        messages_counted: ours.iter().flat_map(|round| &round.messages).sum(),
        rounds: loads(ours),
    })
}

impl AcceptRound {
    /// A reason to void the round: the broker has fewer messages than orders were accepted.
    pub(super) fn missing_messages(&self) -> Option<String> {
        let there: i64 = self.messages.iter().sum();
        let accepted = self.accepted;
        (there.cast_unsigned() < accepted)
            .then(|| format!("{accepted} orders were accepted, and the broker has {there} messages"))
    }

    fn partitions_used(&self) -> usize {
        self.messages.iter().filter(|&&there| there > 0).count()
    }
}

impl BenchEnvironment {
    /// One round: starts a server, warms it up, measures it under load, and counts the messages.
    pub(super) async fn accept_round(
        &self,
        wrk: &Wrk,
        program: &Program,
        strategy: &'static Strategy,
        pool: u32,
    ) -> anyhow::Result<AcceptRound> {
        let environment = self.services.environment(strategy.schema).await?;
        let (servers, ready) = self.start_as(program, strategy, &environment, pool).await?;
        servers.open_sale(SALE, STOCK).await?;
        let address = *servers.live().borrow().first().context("no server is running")?;
        let warm = wrk.run(address, self.clients, WARM_UP, 0).await?;
        let load = wrk
            .run(address, self.clients, self.duration, FIRST_MEASURED_BUYER)
            .await?;
        let peak_mib = resources::peak_mib(servers.pid(0).await?)?;
        servers.stop().await?;
        let kafka = environment.kafka(0, TIMEOUT).context("there is no Kafka")?;
        Ok(AcceptRound {
            ready,
            peak_mib,
            messages: tokio::task::spawn_blocking(move || messages(&kafka)).await??,
            accepted: warm.confirmed() + load.confirmed(),
            load,
        })
    }

    /// Runs Kafka's own producer with records of an order's size.
    async fn producer_perf_test(&self, partitions: usize) -> anyhow::Result<ProducerReport> {
        let kafka = self.services.kafka.as_ref().context("there is no Kafka")?;
        let buyer = FIRST_MEASURED_BUYER.cast_signed();
        let order = Order {
            sale: SALE,
            buyer,
            key: RequestKey::try_from(buyer.to_string()).map_err(|why| anyhow::anyhow!("{why}"))?,
            priority: Priority::Normal,
        };
        let record_bytes = OrderMessage::new(Default::default(), &order).to_bytes().len();
        producer_perf_test::run(
            kafka,
            RECORDS_A_SECOND * self.duration.as_secs(),
            record_bytes,
            partitions,
        )
        .await
    }
}

fn print(bench: &BenchEnvironment, throughput: &AcceptThroughput, rounds: usize) {
    let mut table = MeasurementTable::new(
        bench.selected.name(),
        format!("median (range) of {rounds} rounds of {} s", bench.duration.as_secs()),
    );
    table.row("orders accepted a second", throughput.orders_a_second.to_string());
    let other = &throughput.without_produce;
    table.row("with a produce that does nothing", other.orders_a_second.to_string());
    table.row("ratio to it", format!("{:.2}", other.ratio));
    if let Some(report) = &throughput.producer_perf_test {
        table.row(
            format!("kafka-producer-perf-test, {} bytes each", report.record_bytes),
            format!("{:.0}, p95 {:.0} ms", report.records_a_second, report.p95_ms),
        );
    }
    table.row("latency, p50", format!("{:.1} ms", throughput.p50_ms));
    table.row("latency, p95", format!("{:.1} ms", throughput.p95_ms));
    table.row("latency, p99", format!("{:.1} ms", throughput.p99_ms));
    if throughput.refused + throughput.cut_off > 0 {
        table.row(
            "not accepted",
            format!("{} refused, {} cut off", throughput.refused, throughput.cut_off),
        );
    }
    table.row("ready after", format!("{:.0} ms", throughput.ready_ms));
    table.row("memory, idle", format!("{:.1} MiB", throughput.idle_mib));
    table.row(
        format!("memory, {CONNECTIONS} connections"),
        format!("{:.1} MiB", throughput.mib_with_1000_connections),
    );
    table.row("memory under load, peak", format!("{:.1} MiB", throughput.most_mib));
    table.row("clients, pool", format!("{}, {}", bench.clients, throughput.pool_size));
    table.row("messages counted", throughput.messages_counted.to_string());
    table.print();
}

/// Messages of the orders by partition.
fn messages(kafka: &KafkaConfig) -> anyhow::Result<Vec<i64>> {
    let consumer: BaseConsumer = ClientConfig::new()
        .set("bootstrap.servers", &kafka.bootstrap_servers)
        .create()?;
    let topic = orders_topic(kafka);
    let deadline = Instant::now() + TIMEOUT;
    let count = |partition| loop {
        match consumer.fetch_watermarks(&topic, partition, TIMEOUT) {
            // For a moment a broker does not lead the partitions of a new topic.
            Err(why) if why.rdkafka_error_code() == Some(NotLeaderForPartition) && Instant::now() < deadline => {
                sleep(POLL_INTERVAL);
            }
            counted => {
                let (low, high) = counted?;
                return Ok(high - low);
            }
        }
    };
    (0..PARTITIONS).map(count).collect()
}
