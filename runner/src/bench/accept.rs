//! How many orders LV.4 accepts in a second, while nobody decides them: 202 once the broker has the order. Beside it the same route with a
//! produce that does nothing, and Kafka's own producer.

use std::{fs::File, time::Duration};

use anyhow::{Context, ensure};
use box_office::{KafkaConfig, Order, RequestKey, Strategy};
use comfy_table::{Table, presets};
use harness::rush::{Program, SALE};
use lv4_kafka::pipeline::{OrderMessage, PARTITIONS, orders_topic};
use rdkafka::{
    ClientConfig,
    consumer::{BaseConsumer, Consumer},
};
use serde::Serialize;

use super::{
    Bench, FIRST_MEASURED_BUYER, Measured, STOCK, WARM_UP, figures,
    figures::MedianRange,
    producer_perf_test::{self, Produced},
    say,
    wrk::{Load, Wrk},
};
use crate::{BenchArgs, Ended, levels::SelectedStrategy};

/// So many buyers are connected, unless told otherwise.
const CLIENTS: u32 = 1000;
/// The strategy with the same route, which sends nothing.
const NOTHING: &str = "mutants/produce-nothing";
/// How many records Kafka's own producer sends for each second of a round.
const RECORDS_A_SECOND: u64 = 50_000;
/// How long the broker may take to say how many messages it has.
const PATIENCE: Duration = Duration::from_secs(10);

/// What was accepted. The names are stable.
#[derive(Serialize)]
pub(super) struct Accept {
    pool_size: u32,
    orders_a_second: MedianRange,
    p50_ms: MedianRange,
    p95_ms: MedianRange,
    p99_ms: MedianRange,
    refused: u64,
    cut_off: u64,
    without_produce: WithoutProduce,
    /// `null` where its programs are not on this machine.
    producer_perf_test: Option<Produced>,
    ready_ms: MedianRange,
    idle_mib: f64,
    mib_with_1000_connections: f64,
    most_mib: MedianRange,
    messages_counted: i64,
    rounds: Vec<Load>,
}

/// The same route, and no way to the broker.
#[derive(Serialize)]
struct WithoutProduce {
    strategy: String,
    orders_a_second: MedianRange,
    p95_ms: MedianRange,
    /// Of ours to it, in the two rounds beside each other.
    ratio: MedianRange,
    rounds: Vec<Load>,
}

/// One round of ours, or of the other.
struct Round {
    load: Load,
    ready: Duration,
    most_mib: f64,
    /// In each partition.
    messages: Vec<i64>,
    /// 202s, those of the warm-up too.
    accepted: u64,
}

/// Measures how fast orders are accepted.
pub(super) async fn bench(choice: SelectedStrategy, args: &BenchArgs) -> anyhow::Result<Ended> {
    let nothing = choice.level.strategy(NOTHING).context("the level sends everything")?;
    ensure!(
        choice.strategy.name != NOTHING,
        "{} is what the others are measured beside: lv4/locked, lv4/single-writer",
        choice.name()
    );
    // Before the run: nobody should wait for figures that can't be taken or written.
    let wrk = Wrk::find()?;
    let json = args.json.as_deref().map(crate::rush::create).transpose()?;
    let mut bench = Bench::find(choice, args, CLIENTS).await?;
    bench.program = accepting(bench.program);
    bench.accept(args, &Wrk::new(wrk)?, nothing, json).await
}

/// A server that accepts orders and leaves them to others.
pub(super) fn accepting(program: Program) -> Program {
    program.variable("KAFKA_CONSUMERS", "0")
}

impl Bench {
    async fn accept(
        &self,
        args: &BenchArgs,
        wrk: &Wrk,
        nothing: &'static Strategy,
        json: Option<File>,
    ) -> anyhow::Result<Ended> {
        let name = self.choice.name();
        let (idle_mib, crowded_mib) = self.memory(args.pool).await?;
        let (mut ours, mut others, mut void) = (vec![], vec![], vec![]);
        let rounds = args.rounds.unwrap_or(5);
        for number in 1..=rounds {
            say(&format!("round {number} of {rounds}: {name}"));
            let round = self.accept_for_a_while(wrk, self.choice.strategy, args.pool).await?;
            let there: i64 = round.messages.iter().sum();
            if there.cast_unsigned() < round.accepted {
                let accepted = round.accepted;
                void.push(format!(
                    "{accepted} orders were accepted, and the broker has {there} messages"
                ));
            }
            ours.push(round);
            say(&format!("round {number} of {rounds}: {NOTHING}"));
            others.push(self.accept_for_a_while(wrk, nothing, args.pool).await?);
        }
        say("Kafka's own producer");
        let partitions = ours
            .iter()
            .map(|round| round.messages.iter().filter(|&&there| there > 0).count());
        let produced = self.produce(partitions.max().unwrap_or(1).max(1)).await;
        say("");
        if let Err(why) = &produced {
            println!("kafka-producer-perf-test is left out: {why:#}");
        }

        let of = |rounds: &[Round], figure: fn(&Round) -> f64| {
            MedianRange::of(rounds.iter().map(figure)).context("there was no round")
        };
        let ratios = ours.iter().zip(&others);
        let ratios = ratios.map(|(ours, other)| ours.load.confirmed_a_second() / other.load.confirmed_a_second());
        let accept = Accept {
            pool_size: args.pool,
            orders_a_second: of(&ours, |round| round.load.confirmed_a_second())?,
            p50_ms: of(&ours, |round| round.load.p50_us as f64 / 1e3)?,
            p95_ms: of(&ours, |round| round.load.p95_us as f64 / 1e3)?,
            p99_ms: of(&ours, |round| round.load.p99_us as f64 / 1e3)?,
            refused: ours.iter().map(|round| round.load.refused).sum(),
            cut_off: ours.iter().map(|round| round.load.cut_off).sum(),
            without_produce: WithoutProduce {
                strategy: format!("{}/{NOTHING}", self.choice.level.name),
                orders_a_second: of(&others, |round| round.load.confirmed_a_second())?,
                p95_ms: of(&others, |round| round.load.p95_us as f64 / 1e3)?,
                ratio: MedianRange::of(ratios).context("there was no round")?,
                rounds: others.iter().map(|round| round.load).collect(),
            },
            producer_perf_test: produced.ok(),
            ready_ms: of(&ours, |round| round.ready.as_secs_f64() * 1e3)?,
            idle_mib,
            mib_with_1000_connections: crowded_mib,
            most_mib: of(&ours, |round| round.most_mib)?,
            messages_counted: ours.iter().flat_map(|round| &round.messages).sum(),
            rounds: ours.iter().map(|round| round.load).collect(),
        };
        self.print_accept(&accept, rounds);
        self.end(
            Measured::Accept(&accept),
            "the broker has a message for every order that was accepted",
            &void,
            json,
        )
    }

    /// Orders for so long, of a server that nobody helps.
    async fn accept_for_a_while(&self, wrk: &Wrk, strategy: &'static Strategy, pool: u32) -> anyhow::Result<Round> {
        let stand = self.services.stand(strategy.schema).await?;
        let (servers, ready) = self.start_as(&self.program, strategy, &stand, pool).await?;
        servers.open_sale(SALE, STOCK).await?;
        let address = *servers.live().borrow().first().context("no server lives")?;
        let warm = wrk.run(address, self.clients, WARM_UP, 0).await?;
        let load = wrk.run(address, self.clients, self.time, FIRST_MEASURED_BUYER).await?;
        let most_mib = figures::most_mib(servers.pid(0).await?)?;
        servers.stop().await?;
        let place = stand.kafka(0, PATIENCE).context("there is no Kafka")?;
        Ok(Round {
            ready,
            most_mib,
            messages: tokio::task::spawn_blocking(move || messages(&place)).await??,
            accepted: warm.confirmed() + load.confirmed(),
            load,
        })
    }

    /// What Kafka's own producer makes of records like these.
    async fn produce(&self, partitions: usize) -> anyhow::Result<Produced> {
        let kafka = self.services.kafka.as_ref().context("there is no Kafka")?;
        let buyer = FIRST_MEASURED_BUYER.cast_signed();
        let order = Order {
            sale: SALE,
            buyer,
            key: RequestKey::try_from(buyer.to_string()).map_err(|why| anyhow::anyhow!("{why}"))?,
        };
        let record_bytes = OrderMessage::new(Default::default(), &order).to_bytes().len();
        producer_perf_test::run(kafka, RECORDS_A_SECOND * self.time.as_secs(), record_bytes, partitions).await
    }

    fn print_accept(&self, accept: &Accept, rounds: u32) {
        let mut table = Table::new();
        table.load_style(presets::UTF8_FULL_CONDENSED).set_header([
            self.choice.name(),
            format!("median (range) of {rounds} rounds of {} s", self.time.as_secs()),
        ]);
        let mut row = |what: &str, figure: String| {
            table.add_row([what.to_owned(), figure]);
        };
        row("orders accepted a second", accept.orders_a_second.to_string());
        row(
            "with a produce that does nothing",
            accept.without_produce.orders_a_second.to_string(),
        );
        row("ratio to it", format!("{:.2}", accept.without_produce.ratio));
        if let Some(produced) = &accept.producer_perf_test {
            row(
                &format!("kafka-producer-perf-test, {} bytes each", produced.record_bytes),
                format!("{:.0}, p95 {:.0} ms", produced.records_a_second, produced.p95_ms),
            );
        }
        row("answered after, p50", format!("{:.1} ms", accept.p50_ms));
        row("answered after, p95", format!("{:.1} ms", accept.p95_ms));
        row("answered after, p99", format!("{:.1} ms", accept.p99_ms));
        if accept.refused + accept.cut_off > 0 {
            row(
                "not accepted",
                format!("{} refused, {} cut off", accept.refused, accept.cut_off),
            );
        }
        row("ready after", format!("{:.0} ms", accept.ready_ms));
        row("memory, idle", format!("{:.1} MiB", accept.idle_mib));
        row(
            "memory, 1000 connections",
            format!("{:.1} MiB", accept.mib_with_1000_connections),
        );
        row("memory under load, at most", format!("{:.1} MiB", accept.most_mib));
        row("clients, pool", format!("{}, {}", self.clients, accept.pool_size));
        row("messages counted", accept.messages_counted.to_string());
        println!("{table}");
    }
}

/// How many messages are in each partition of the orders.
fn messages(place: &KafkaConfig) -> anyhow::Result<Vec<i64>> {
    let consumer: BaseConsumer = ClientConfig::new()
        .set("bootstrap.servers", &place.bootstrap_servers)
        .create()?;
    let topic = orders_topic(place);
    let counted = (0..PARTITIONS).map(|partition| {
        let (low, high) = consumer.fetch_watermarks(&topic, partition, PATIENCE)?;
        Ok(high - low)
    });
    counted.collect()
}
