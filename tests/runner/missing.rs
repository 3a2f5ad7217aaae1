//! A backend or a tool that is missing: how to get it, exit code 3, and never a password.

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
    let said = err(&output);
    assert_eq!(output.status.code(), Some(3), "{said}");
    assert!(said.contains("127.0.0.1:1") && !said.contains("s3cret"), "{said}");
}

#[test]
fn a_bench_without_wrk_says_how_to_install_it_and_is_exit_code_3() {
    let nothing = tempdir().unwrap();
    let output = command(&["bench", "lv2/pessimistic"])
        .env("PATH", nothing.path())
        .output()
        .unwrap();
    let said = err(&output);
    assert_eq!(output.status.code(), Some(3), "{said}");
    assert_eq!(said.trim_end().lines().count(), 1, "{said}");
    assert!(said.contains("no wrk") && said.contains("install"), "{said}");
}

#[test]
fn a_bench_without_redis_benchmark_says_how_to_install_it_and_is_exit_code_3() {
    let nothing = tempdir().unwrap();
    let output = command(&["bench", "lv3/rlock", "--lock"])
        .env("PATH", nothing.path())
        .output()
        .unwrap();
    let said = err(&output);
    assert_eq!(output.status.code(), Some(3), "{said}");
    assert_eq!(said.trim_end().lines().count(), 1, "{said}");
    assert!(
        said.contains("no redis-benchmark") && said.contains("install"),
        "{said}"
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
    let said = err(&output);
    assert_eq!(output.status.code(), Some(2), "{said}");
    assert!(said.contains("REDIS_URL (--redis-url) is not set; expected"), "{said}");
    assert_eq!(said.trim_end().lines().count(), 1, "{said}");
}

#[rstest]
#[case::nobody_answers("redis://me:s3cret@127.0.0.1:1/0", "127.0.0.1:1")]
#[case::no_such_database("redis://me:s3cret@127.0.0.1:1/zero", "127.0.0.1:1")]
#[tokio::test]
async fn a_redis_that_is_not_there_is_exit_code_3_and_never_a_password(#[case] url: &str, #[case] says: &str) {
    let postgres = harness::backends::postgres().await.unwrap();
    let stand = harness::backends::TestEnvironment::on(&postgres, None, lv3_redis_lock::BARE)
        .await
        .unwrap();
    let mut serve = command(&["serve", "lv3/rlock", "--port", "0"]);
    serve.envs(stand.variables()).env("REDIS_URL", url);
    let output = serve.output().unwrap();
    let said = err(&output);
    assert_eq!(output.status.code(), Some(3), "{said}");
    assert!(said.contains("REDIS_URL"), "{said}");
    assert!(said.contains(says) && !said.contains("s3cret"), "{said}");
}

#[test]
fn dead_letters_where_nobody_answers_are_exit_code_3() {
    let nobody = ["dead-letters", "--kafka-bootstrap-servers", "127.0.0.1:1"];
    let output = oversold(&nobody);
    let said = err(&output);
    assert_eq!(output.status.code(), Some(3), "{said}");
    assert_eq!(said.trim_end().lines().count(), 1, "{said}");
    assert!(said.contains("no answer from Kafka at 127.0.0.1:1"), "{said}");
}
