//! `oversold doctor`.

use rstest::rstest;

use crate::{command, err, out};

#[rstest]
#[case::all("", 0, &["postgres", "redis", "kafka"], "")]
#[case::no_redis("OVERSOLD_REDIS_BIN", 3, &["postgres", "kafka"], "lv3/fenced, lv4/locked can't run, the other strategies can: there is no redis:")]
#[case::no_kafka("OVERSOLD_KAFKA_JARS", 3, &["postgres", "redis"], "lv4/locked, lv4/single-writer can't run, the other strategies can: there is no kafka:")]
#[case::no_postgres("OVERSOLD_POSTGRES_BIN", 3, &["redis", "kafka"], "there is no postgres:")]
fn doctor_tells_where_each_backend_comes_from(
    #[case] nowhere: &str,
    #[case] code: i32,
    #[case] there: &[&str],
    #[case] missing: &str,
) {
    let mut doctor = command(&["doctor"]);
    if !nowhere.is_empty() {
        doctor
            .env_remove("DATABASE_URL")
            .env_remove("REDIS_URL")
            .env_remove("KAFKA_BOOTSTRAP_SERVERS")
            .env("OVERSOLD_BACKENDS", "native")
            .env(nowhere, "/nowhere");
    }
    let output = doctor.output().unwrap();
    assert_eq!(output.status.code(), Some(code), "{}", err(&output));
    let stdout = out(&output);
    let services: Vec<&str> = stdout
        .lines()
        .filter_map(|line| Some(line.split_once(": ")?.0))
        .collect();
    assert_eq!(services, there, "{stdout}");
    assert!(err(&output).contains(missing), "{}", err(&output));
}

/// One run of `doctor` reports everything that a new machine lacks.
#[test]
fn doctor_reports_all_that_is_missing() {
    let mut doctor = command(&["doctor"]);
    for service in ["DATABASE_URL", "REDIS_URL", "KAFKA_BOOTSTRAP_SERVERS"] {
        doctor.env_remove(service);
    }
    doctor.env("OVERSOLD_BACKENDS", "native");
    for nowhere in ["OVERSOLD_POSTGRES_BIN", "OVERSOLD_REDIS_BIN", "OVERSOLD_KAFKA_JARS"] {
        doctor.env(nowhere, "/nowhere");
    }
    let output = doctor.output().unwrap();
    assert_eq!(output.status.code(), Some(3), "{}", err(&output));
    for service in ["postgres", "redis", "kafka"] {
        assert!(
            err(&output).contains(&format!("there is no {service}:")),
            "{}",
            err(&output)
        );
    }
}
