//! What `oversold bench --json` writes.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::RunMetadata;
use crate::statistics::MedianRange;

/// The results of one run of `oversold bench`; `M` is what it measured.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct BenchResults<M> {
    /// How and where it was measured.
    #[serde(flatten)]
    pub metadata: RunMetadata,
    /// `lv2/pessimistic`.
    pub strategy: String,
    /// Clients at once; `None` where a backlog or a group of waiters is measured.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub clients: Option<u32>,
    /// Duration of a round; `None` likewise.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub seconds: Option<u64>,
    /// What was measured.
    #[serde(flatten)]
    pub measured: M,
}

/// `oversold bench`: sustained reservations next to the database's ceiling.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Throughput {
    /// Connections in the server's pool.
    pub pool_size: u32,
    /// Reservations confirmed per second.
    pub reservations_a_second: MedianRange,
    /// Median latency of an answer, in milliseconds.
    pub p50_ms: MedianRange,
    /// 99th percentile of it, in milliseconds.
    pub p99_ms: MedianRange,
    /// Requests answered with an error, in all rounds.
    pub refused: u64,
    /// Requests whose connection was closed or timed out, in all rounds.
    pub cut_off: u64,
    /// The database's ceiling; `None` where pgbench can't run the strategy's statements.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ceiling: Option<TransactionCeiling>,
    /// From the start of the server's process until it was ready, in milliseconds.
    pub ready_ms: MedianRange,
    /// Resident memory of the server when idle, in MiB.
    pub idle_mib: f64,
    /// Resident memory of the server with 1,000 open connections, in MiB.
    pub mib_with_1000_connections: f64,
    /// Reservation rows that were checked after the rounds.
    pub rows_judged: usize,
    /// Each round.
    pub rounds: Vec<WrkReport>,
}

/// The same statements sent by pgbench.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct TransactionCeiling {
    /// The number of clients with the highest throughput.
    pub clients: u32,
    /// Transactions per second with these.
    pub transactions_a_second: MedianRange,
    /// Reservations per second divided by it, of rounds that took turns.
    pub ratio: MedianRange,
    /// Transactions per second by number of clients, in the search for the best number.
    pub probed: Vec<(u32, f64)>,
    /// Each round.
    pub rounds: Vec<PgbenchReport>,
}

/// `oversold bench --pools`: throughput by size of the server's connection pool.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct PoolCurve {
    /// Each size, in the order in which they were given.
    pub pools: Vec<PoolThroughput>,
}

/// Throughput with one size of the pool.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct PoolThroughput {
    /// Connections in the server's pool.
    pub pool_size: u32,
    /// Reservations confirmed per second.
    pub reservations_a_second: MedianRange,
    /// Median latency of an answer, in milliseconds.
    pub p50_ms: MedianRange,
    /// 99th percentile of it, in milliseconds.
    pub p99_ms: MedianRange,
}

/// `oversold bench lv4/…`: orders accepted while no consumer runs.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct AcceptThroughput {
    /// Connections in the server's pool.
    pub pool_size: u32,
    /// Orders accepted per second.
    pub orders_a_second: MedianRange,
    /// Median latency of a 202, in milliseconds.
    pub p50_ms: MedianRange,
    /// 95th percentile of it, in milliseconds.
    pub p95_ms: MedianRange,
    /// 99th percentile of it, in milliseconds.
    pub p99_ms: MedianRange,
    /// Requests answered with an error, in all rounds.
    pub refused: u64,
    /// Requests whose connection was closed or timed out, in all rounds.
    pub cut_off: u64,
    /// The same route with a produce that does nothing.
    pub without_produce: WithoutProduce,
    /// `kafka-producer-perf-test`; `None` where its programs are not on this machine.
    pub producer_perf_test: Option<ProducerReport>,
    /// From the start of the server's process until it was ready, in milliseconds.
    pub ready_ms: MedianRange,
    /// Resident memory of the server when idle, in MiB.
    pub idle_mib: f64,
    /// Resident memory of the server with 1,000 open connections, in MiB.
    pub mib_with_1000_connections: f64,
    /// Peak resident memory of the server, in MiB.
    pub most_mib: MedianRange,
    /// Messages that the broker had after the rounds.
    pub messages_counted: i64,
    /// Each round.
    pub rounds: Vec<WrkReport>,
}

/// The same route with a produce that does nothing.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct WithoutProduce {
    /// The strategy that produces nothing.
    pub strategy: String,
    /// Orders accepted per second.
    pub orders_a_second: MedianRange,
    /// 95th percentile of the latency of a 202, in milliseconds.
    pub p95_ms: MedianRange,
    /// Orders per second with the produce divided by those without, of rounds that took turns.
    pub ratio: MedianRange,
    /// Each round.
    pub rounds: Vec<WrkReport>,
}

/// `oversold bench lv4/… --drain`: a backlog of orders processed by one consumer.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct DrainThroughput {
    /// Connections in the server's pool.
    pub pool_size: u32,
    /// Orders in the backlog.
    pub orders: u32,
    /// Consumers that processed it.
    pub consumers: u32,
    /// Orders decided per second, from the start of the server's process.
    pub orders_a_second: MedianRange,
    /// From the start of the server's process to the last decision, in milliseconds.
    pub took_ms: MedianRange,
    /// The same transactions sent by pgbench; `None` where there are no statements for it. Its rows are generated in SQL, which can take
    /// longer than sending them: no ceiling.
    #[serde(default, alias = "ceiling", skip_serializing_if = "Option::is_none")]
    pub pgbench: Option<BatchRate>,
    /// The ceiling: the same rows in one `COPY`; `None` in files that do not record it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub copy: Option<CopyCeiling>,
    /// From the start of the server's process until it was ready, in milliseconds.
    pub ready_ms: MedianRange,
    /// Peak resident memory of the server, in MiB.
    pub most_mib: MedianRange,
    /// Reservation rows that were checked after the rounds.
    pub rows_judged: usize,
    /// Each round.
    pub rounds: Vec<DrainRound>,
}

/// The rows of the backlog's orders, copied into empty tables in one transaction.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct CopyCeiling {
    /// Orders per second, each a row in each table.
    pub orders_a_second: MedianRange,
    /// Orders decided per second divided by it, of rounds that took turns.
    pub ratio: MedianRange,
}

/// The same batches sent by pgbench.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct BatchRate {
    /// Orders in a transaction.
    pub orders_in_a_transaction: u32,
    /// Orders per second.
    pub orders_a_second: MedianRange,
    /// Orders decided per second divided by it, of rounds that took turns.
    pub ratio: MedianRange,
}

/// One backlog.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub struct DrainRound {
    /// From the start of the server's process to the last decision, in milliseconds.
    pub took_ms: f64,
    /// From the start of the server's process until it was ready, in milliseconds.
    pub ready_ms: f64,
    /// Peak resident memory of the server, in MiB.
    pub most_mib: f64,
    /// Reservation rows.
    pub rows: usize,
}

/// `oversold bench lv4/single-writer --drain --payments`: a backlog of sales that are paid for.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct PaidThroughput {
    /// Connections in the server's pool.
    pub pool_size: u32,
    /// Orders in the backlog.
    pub orders: u32,
    /// Consumers that processed it.
    pub consumers: u32,
    /// How the payment service treated the buyers: `approve=100`.
    pub payments: String,
    /// Orders per second that were held, charged, and confirmed or released, from the start of the server's process.
    pub sales_a_second: MedianRange,
    /// Orders decided per second without payments.
    pub without_payments: MedianRange,
    /// The first divided by the second, of rounds that took turns.
    pub ratio: MedianRange,
    /// Requests for a charge, repeats included, for each order.
    pub charge_requests_each: MedianRange,
    /// Reservation rows that were checked after the rounds.
    pub rows_judged: usize,
    /// Each round with payments.
    pub rounds: Vec<PaidRound>,
}

/// One backlog of sales that are paid for.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub struct PaidRound {
    /// From the start of the server's process until the last order was confirmed or released, in milliseconds.
    pub took_ms: f64,
    /// Requests for a charge, repeats included.
    pub charge_requests: u64,
    /// Reservation rows.
    pub rows: usize,
}

/// `oversold bench lv3/… --lock`: LV.3's lock without contention.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct UncontendedLock {
    /// Connections to Redis that its clients share.
    pub connections: u32,
    /// Pairs of acquire and release per second.
    pub pairs_a_second: MedianRange,
    /// redis-benchmark with a connection for each client.
    pub redis_benchmark: LockCeiling,
    /// redis-benchmark with one connection for all clients, as the lock has it.
    pub redis_benchmark_on_one_connection: LockCeiling,
}

/// The same commands sent by redis-benchmark.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct LockCeiling {
    /// Connections.
    pub connections: u32,
    /// Commands in flight on each connection.
    pub pipeline: u32,
    /// Pairs of acquire and release per second, computed from both.
    pub pairs_a_second: MedianRange,
    /// Acquires per second.
    pub acquire_a_second: MedianRange,
    /// Releases per second.
    pub release_a_second: MedianRange,
    /// Pairs per second of the lock divided by it, of rounds that took turns.
    pub ratio: MedianRange,
}

/// `oversold bench lv3/… --waiters`: LV.3's lock under contention.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct ContendedLock {
    /// Tasks that wait for the same lock at once.
    pub waiters: u32,
    /// Processes that share them.
    #[serde(default = "one")]
    pub instances: u32,
    /// Until the last of them released it, in milliseconds.
    pub took_ms: MedianRange,
    /// Commands sent to Redis, for each waiter.
    pub commands_sent_each: MedianRange,
    /// Commands that Redis ran inside scripts, for each waiter.
    pub commands_in_scripts_each: MedianRange,
    /// Each round.
    pub rounds: Vec<ContendedRound>,
}

/// In files that do not say it.
fn one() -> u32 {
    1
}

/// One round of waiters.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct ContendedRound {
    /// Until the last waiter released the lock, in milliseconds.
    pub took_ms: f64,
    /// How often Redis ran each command.
    pub commands: BTreeMap<String, u64>,
}

/// What wrk counted in a round. The names are those of the last line that `wrk.lua` prints.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct WrkReport {
    /// Answers of every kind.
    pub answers: u64,
    /// Duration, in microseconds.
    pub took_us: u64,
    /// Answers other than 2xx and 3xx.
    pub refused: u64,
    /// Requests whose connection was closed or timed out.
    pub cut_off: u64,
    /// Median latency, in microseconds.
    pub p50_us: u64,
    /// 95th percentile, in microseconds.
    pub p95_us: u64,
    /// 99th percentile, in microseconds.
    pub p99_us: u64,
    /// Maximum, in microseconds.
    pub max_us: u64,
}

impl WrkReport {
    /// Answers of the kind that was asked for: 201 or 202.
    pub(crate) fn confirmed(&self) -> u64 {
        self.answers.saturating_sub(self.refused)
    }

    /// Those per second.
    pub(crate) fn confirmed_a_second(&self) -> f64 {
        self.confirmed() as f64 / (self.took_us as f64 / 1e6)
    }

    /// Median latency, in milliseconds.
    pub(crate) fn p50_ms(&self) -> f64 {
        self.p50_us as f64 / 1e3
    }

    /// 95th percentile, in milliseconds.
    #[cfg(feature = "lv4")]
    pub(crate) fn p95_ms(&self) -> f64 {
        self.p95_us as f64 / 1e3
    }

    /// 99th percentile, in milliseconds.
    pub(crate) fn p99_ms(&self) -> f64 {
        self.p99_us as f64 / 1e3
    }
}

/// What pgbench counted in a round.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct PgbenchReport {
    /// Transactions processed.
    pub transactions: u64,
    /// Transactions failed.
    pub failed: u64,
    /// Transactions per second, without the time to connect.
    pub a_second: f64,
}

/// What `kafka-producer-perf-test` reported.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct ProducerReport {
    /// Records sent.
    pub records: u64,
    /// Size of a record, in bytes.
    pub record_bytes: usize,
    /// Partitions of the topic: as many as the orders of the bench were spread over.
    pub partitions: usize,
    /// Records per second.
    pub records_a_second: f64,
    /// Median latency, in milliseconds.
    pub p50_ms: f64,
    /// 95th percentile, in milliseconds.
    pub p95_ms: f64,
}
