//! For comparison: `kafka-producer-perf-test`, Kafka's own producer, with records of an order's size and the same acknowledgements.

use anyhow::Context;
use harness::backends::{Kafka, kafka_programs};

use crate::{commands::tool, results::bench::ProducerReport};

/// Creates a topic with this many partitions, and sends records of this size to it.
pub(super) async fn run(
    kafka: &Kafka,
    records: u64,
    record_bytes: usize,
    partitions: usize,
) -> anyhow::Result<ProducerReport> {
    let (java, jars) = kafka_programs()?;
    let prefix = kafka.prefix();
    let topic = format!("{prefix}perf-test");
    kafka.create_topic(&topic, i32::try_from(partitions)?).await?;
    let mut class_path = jars.into_os_string();
    class_path.push("/*");
    let mut command = tool::command(&java)?;
    command
        // It would write to the temporary folder.
        .arg("-XX:-UsePerfData")
        .arg("-cp")
        .arg(class_path)
        .arg("org.apache.kafka.tools.ProducerPerformance")
        .args(["--topic", &topic])
        .args(["--num-records", &records.to_string()])
        .args(["--record-size", &record_bytes.to_string()])
        // No limit.
        .args(["--throughput", "-1"])
        .arg("--producer-props")
        .arg(format!("bootstrap.servers={}", kafka.bootstrap_servers()))
        // As in the level's own producer.
        .args(["acks=all", "enable.idempotence=true", "linger.ms=5"]);
    let (records_a_second, p50_ms, p95_ms) = parse(&tool::output(&mut command, "kafka-producer-perf-test").await?)?;
    Ok(ProducerReport {
        records,
        record_bytes,
        partitions,
        records_a_second,
        p50_ms,
        p95_ms,
    })
}

/// Records per second, and the latencies p50 and p95 in milliseconds, of the last line, which is about all records.
fn parse(output: &str) -> anyhow::Result<(f64, f64, f64)> {
    let last = output.lines().rfind(|line| line.contains("99.9th"));
    let last = last.with_context(|| format!("kafka-producer-perf-test did not report what it counted:\n{output}"))?;
    let before = |unit: &str| {
        let mut words = last.split_once(unit)?.0.split([' ', ',']);
        words.rfind(|word| !word.is_empty())?.parse::<f64>().ok()
    };
    let figure =
        |unit: &str| before(unit).with_context(|| format!("kafka-producer-perf-test reports no {unit}: {last}"));
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
