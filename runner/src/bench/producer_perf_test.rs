//! For scale: `kafka-producer-perf-test`, Kafka's own producer, with records as large as an order's and as well acknowledged.

use anyhow::Context;
use harness::backends::{Kafka, kafka_programs};
use serde::Serialize;

use super::tool;

/// What it says at its end.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub(super) struct Produced {
    pub(super) records: u64,
    pub(super) record_bytes: usize,
    /// Over which they were spread, as ours were.
    pub(super) partitions: usize,
    pub(super) records_a_second: f64,
    pub(super) p50_ms: f64,
    pub(super) p95_ms: f64,
}

/// Sends so many records, each of so many bytes, to a topic with so many partitions that is made for it.
pub(super) async fn run(
    kafka: &Kafka,
    records: u64,
    record_bytes: usize,
    partitions: usize,
) -> anyhow::Result<Produced> {
    let (java, jars) = kafka_programs()?;
    let prefix = kafka.prefix();
    let topic = format!("{prefix}perf-test");
    kafka.create_topic(&topic, i32::try_from(partitions)?).await?;
    let mut class_path = jars.into_os_string();
    class_path.push("/*");
    let mut command = tool::command(&java)?;
    command
        // They would lie in the temporary folder.
        .arg("-XX:-UsePerfData")
        .arg("-cp")
        .arg(class_path)
        .arg("org.apache.kafka.tools.ProducerPerformance")
        .args(["--topic", &topic])
        .args(["--num-records", &records.to_string()])
        .args(["--record-size", &record_bytes.to_string()])
        // As fast as it can.
        .args(["--throughput", "-1"])
        .arg("--producer-props")
        .arg(format!("bootstrap.servers={}", kafka.bootstrap_servers()))
        // As in the level's own producer.
        .args(["acks=all", "enable.idempotence=true", "linger.ms=5"]);
    let (records_a_second, p50_ms, p95_ms) = parse(&tool::output(&mut command, "kafka-producer-perf-test").await?)?;
    Ok(Produced {
        records,
        record_bytes,
        partitions,
        records_a_second,
        p50_ms,
        p95_ms,
    })
}

/// The figures of the last line, which is about all records.
fn parse(output: &str) -> anyhow::Result<(f64, f64, f64)> {
    let last = output.lines().rfind(|line| line.contains("99.9th"));
    let last = last.with_context(|| format!("kafka-producer-perf-test did not say what it counted:\n{output}"))?;
    let before = |unit: &str| {
        let mut words = last.split_once(unit)?.0.split([' ', ',']);
        words.rfind(|word| !word.is_empty())?.parse::<f64>().ok()
    };
    let figure = |unit: &str| before(unit).with_context(|| format!("kafka-producer-perf-test tells no {unit}: {last}"));
    Ok((figure(" records/sec")?, figure(" ms 50th")?, figure(" ms 95th")?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_counted_is_in_the_last_line() {
        let output = include_str!("samples/producer-perf-test.txt");
        assert_eq!(parse(output).expect("it is a real output"), (41_084.6, 207.0, 436.0));
        let error = parse("Killed\n").expect_err("nothing was counted");
        assert!(error.to_string().contains("Killed"), "{error}");
    }
}
