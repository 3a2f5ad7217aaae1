//! A backend or a tool that is missing: how to get it, exit code 3, and never a password.

use std::{net::TcpListener, process::Stdio, thread::sleep, time::Duration};

use rstest::rstest;
use tempfile::tempdir;

use crate::{command, err, oversold};

#[test]
fn a_backend_that_is_not_there_is_exit_code_3_and_never_a_password() {
    let output = command(&["rush", "lv1"])
        .env("DATABASE_URL", "postgres://me:s3cret@127.0.0.1:1/nowhere")
        .env_remove("OVERSOLD_BACKENDS")
        .output()
        .unwrap();
    let stderr = err(&output);
    assert_eq!(output.status.code(), Some(3), "{stderr}");
    assert!(stderr.contains("127.0.0.1:1") && !stderr.contains("s3cret"), "{stderr}");
}

#[test]
fn a_bench_without_wrk_says_how_to_install_it_and_is_exit_code_3() {
    let nothing = tempdir().unwrap();
    let output = command(&["bench", "lv2/pessimistic"])
        .env("PATH", nothing.path())
        .output()
        .unwrap();
    let stderr = err(&output);
    assert_eq!(output.status.code(), Some(3), "{stderr}");
    assert_eq!(stderr.trim_end().lines().count(), 1, "{stderr}");
    assert!(stderr.contains("no wrk") && stderr.contains("install"), "{stderr}");
}

#[test]
fn a_bench_without_redis_benchmark_says_how_to_install_it_and_is_exit_code_3() {
    let nothing = tempdir().unwrap();
    let output = command(&["bench", "lv3/rlock", "--lock"])
        .env("PATH", nothing.path())
        .output()
        .unwrap();
    let stderr = err(&output);
    assert_eq!(output.status.code(), Some(3), "{stderr}");
    assert_eq!(stderr.trim_end().lines().count(), 1, "{stderr}");
    assert!(
        stderr.contains("no redis-benchmark") && stderr.contains("install"),
        "{stderr}"
    );
}

#[test]
fn a_server_of_lv3_needs_redis() {
    let mut serve = command(&["serve", "lv3", "--port", "0"]);
    let output = serve
        .env("DATABASE_URL", "postgres://me:s3cret@127.0.0.1:1/nowhere")
        .env_remove("REDIS_URL")
        .output()
        .unwrap();
    let stderr = err(&output);
    assert_eq!(output.status.code(), Some(2), "{stderr}");
    assert!(
        stderr.contains("REDIS_URL (--redis-url) is not set; expected"),
        "{stderr}"
    );
    assert_eq!(stderr.trim_end().lines().count(), 1, "{stderr}");
}

#[rstest]
#[case::nobody_answers("redis://me:s3cret@127.0.0.1:1/0", "127.0.0.1:1")]
#[case::no_such_database("redis://me:s3cret@127.0.0.1:1/zero", "127.0.0.1:1")]
#[tokio::test]
async fn a_redis_that_is_not_there_is_exit_code_3_and_never_a_password(#[case] url: &str, #[case] says: &str) {
    let postgres = harness::backends::postgres().await.unwrap();
    let environment = harness::backends::TestEnvironment::on(&postgres, None, lv3_redis_lock::BARE)
        .await
        .unwrap();
    let mut serve = command(&["serve", "lv3/rlock", "--port", "0"]);
    serve.envs(environment.variables()).env("REDIS_URL", url);
    let output = serve.output().unwrap();
    let stderr = err(&output);
    assert_eq!(output.status.code(), Some(3), "{stderr}");
    assert!(stderr.contains("REDIS_URL"), "{stderr}");
    assert!(stderr.contains(says) && !stderr.contains("s3cret"), "{stderr}");
}

#[test]
fn dead_letters_where_nobody_answers_are_exit_code_3() {
    let nobody = ["dead-letters", "--kafka-bootstrap-servers", "127.0.0.1:1"];
    let output = oversold(&nobody);
    let stderr = err(&output);
    assert_eq!(output.status.code(), Some(3), "{stderr}");
    assert_eq!(stderr.trim_end().lines().count(), 1, "{stderr}");
    assert!(
        stderr.contains("KAFKA_BOOTSTRAP_SERVERS (--kafka-bootstrap-servers): no answer from Kafka at 127.0.0.1:1"),
        "{stderr}"
    );
}

/// A URL may name the port of another service. That one accepts the connection, and waits for the
/// rest of a request of its own protocol.
#[rstest]
#[case::doctor(&["doctor"], "DATABASE_URL", "postgres://me:s3cret@ADDRESS/0")]
#[case::rush(&["rush", "lv1"], "DATABASE_URL", "postgres://me:s3cret@ADDRESS/0")]
#[case::bench(&["bench", "lv2/pessimistic"], "DATABASE_URL", "postgres://me:s3cret@ADDRESS/0")]
#[case::trace(&["trace", "lv1"], "DATABASE_URL", "postgres://me:s3cret@ADDRESS/0")]
#[case::serve(&["serve", "lv1"], "DATABASE_URL", "postgres://me:s3cret@ADDRESS/0")]
#[case::rush_with_redis(&["rush", "lv3"], "REDIS_URL", "redis://me:s3cret@ADDRESS/0")]
#[case::rush_with_kafka(&["rush", "lv4"], "KAFKA_BOOTSTRAP_SERVERS", "ADDRESS")]
#[case::dead_letters(&["dead-letters"], "KAFKA_BOOTSTRAP_SERVERS", "ADDRESS")]
fn a_backend_that_accepts_and_never_answers_is_named_in_time(
    #[case] arguments: &[&str],
    #[case] variable: &str,
    #[case] url: &str,
) {
    /// The deadlines are 5 s to 10 s; the other backends are started as well.
    const IN_TIME: Duration = Duration::from_secs(60);
    const INTERVAL: Duration = Duration::from_millis(50);

    let silent = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = silent.local_addr().unwrap().to_string();
    let mut child = command(arguments)
        .env(variable, url.replace("ADDRESS", &address))
        .env_remove("OVERSOLD_BACKENDS")
        .env("PORT", "0")
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut waited = Duration::ZERO;
    while child.try_wait().unwrap().is_none() {
        if waited > IN_TIME {
            child.kill().unwrap();
            panic!("it hangs: {}", err(&child.wait_with_output().unwrap()));
        }
        sleep(INTERVAL);
        waited += INTERVAL;
    }
    let output = child.wait_with_output().unwrap();
    let stderr = err(&output);
    assert_eq!(output.status.code(), Some(3), "{stderr}");
    assert!(stderr.contains(variable) && stderr.contains(&address), "{stderr}");
    assert!(!stderr.contains("s3cret"), "{stderr}");
}

/// Compose files and shells have no other way to unset a variable.
#[test]
fn an_empty_variable_of_a_backend_counts_as_not_set() {
    for (arguments, variable) in [
        (&["serve", "lv1"][..], "DATABASE_URL"),
        (&["dead-letters"][..], "KAFKA_BOOTSTRAP_SERVERS"),
    ] {
        let output = command(arguments).env(variable, "").output().unwrap();
        let stderr = err(&output);
        assert_eq!(output.status.code(), Some(2), "{stderr}");
        assert!(
            stderr.contains(&format!("{variable} (--")) && stderr.contains("is not set"),
            "{stderr}"
        );
    }
}
