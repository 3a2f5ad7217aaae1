//! The command `oversold`: its exit codes, its words about bad input, and the names in its JSON.

#![allow(clippy::unwrap_used)]

use std::{
    collections::BTreeSet,
    fs,
    process::{Command, Output},
    time::{Duration, Instant},
};

use harness::rush::{Program, Rush, SALE, Servers};
use rdkafka::producer::FutureRecord;
use rstest::rstest;
use serde_json::Value;
use tempfile::tempdir;

/// Runs the command in an environment without settings of its own.
fn oversold(arguments: &[&str]) -> Output {
    command(arguments).output().unwrap()
}

fn command(arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_oversold"));
    command.args(arguments);
    for variable in [
        "STRATEGY",
        "PORT",
        "DATABASE_POOL_SIZE",
        "WORK_MS",
        "OVERSOLD_TRACE_FILE",
        "REDIS_PREFIX",
        "LOCK_LEASE_MS",
        "KAFKA_PREFIX",
        "KAFKA_CONSUMERS",
        "KAFKA_SESSION_MS",
    ] {
        command.env_remove(variable);
    }
    command
}

fn out(output: &Output) -> String {
    String::from_utf8(output.stdout.clone()).unwrap()
}

fn err(output: &Output) -> String {
    String::from_utf8(output.stderr.clone()).unwrap()
}

#[rstest]
#[case::no_such_level(&["rush", "lv9"], "oversold: there is no level \"lv9\"; there is lv1, lv2")]
#[case::no_such_strategy(&["trace", "lv1/luck"], "oversold: lv1 has no strategy \"luck\"; it has read-then-write, check-then-decrement, check-then-insert")]
#[case::no_tickets(&["rush", "--capacity", "0"], "a number, 1 to 1000000")]
#[case::too_many_buyers(&["rush", "--buyers", "1e9"], "a number, 1 to 20000")]
#[case::too_many_at_once(&["rush", "lv3/spin", "--buyers", "2000", "--clicks", "10"], "20000 connections at once; 1 instance(s) take 8184")]
#[case::too_many_instances(&["rush", "--instances", "17"], "a number, 1 to 16")]
#[case::no_such_option(&["rush", "--byers", "3"], "--byers")]
#[case::no_such_command(&["sell"], "sell")]
#[case::no_such_file(&["judge", "nowhere.jsonl"], "oversold: opening nowhere.jsonl: No such file")]
#[case::json_into_nowhere(&["rush", "lv1", "--json", "no/such/folder/x.json"], "oversold: writing no/such/folder/x.json")]
#[case::no_such_buyer(&["trace", "lv1", "--order", "AXB"], "letters A, B, C for the buyers")]
#[case::one_request(&["trace", "lv1", "--order", "AA"], "of at least two requests")]
#[case::capacity_of_nothing(&["trace", "lv1", "--capacity", "2"], "--order")]
#[case::consumers_have_no_trace(&["trace", "lv4"], "oversold: there is no trace of lv4/locked: its orders are decided by consumers")]
#[case::bench_of_nothing(&["bench"], "LEVEL/STRATEGY")]
#[case::bench_of_no_such_strategy(&["bench", "lv2/luck"], "oversold: lv2 has no strategy \"luck\"")]
#[case::bench_without_clients(&["bench", "lv2", "--clients", "0"], "a number, 1 to 4000")]
#[case::bench_of_no_pools(&["bench", "lv2", "--pools", "1,none"], "a number, 1 to 400")]
#[case::waiters_without_a_lock(&["bench", "lv2/mutex", "--waiters", "1000"], "only LV.3 has one: lv3/spin, lv3/rlock, lv3/fenced")]
#[case::waiters_for_a_broken_lock(&["bench", "lv3/mutants/wrong-key", "--waiters", "9"], "lv3/mutants/wrong-key is none of them")]
#[case::a_lock_on_its_own_without_one(&["bench", "lv1", "--lock"], "only LV.3 has one")]
#[case::no_waiters(&["bench", "lv3/rlock", "--waiters", "0"], "a number, 1 to 20000")]
#[case::alone_and_in_a_crowd(&["bench", "lv3/rlock", "--lock", "--waiters", "9"], "'--lock' cannot be used with '--waiters <N>'")]
#[case::a_session_that_kafka_does_not_take(&["serve", "lv4", "--kafka-session-ms", "300001"], "KAFKA_SESSION_MS (--kafka-session-ms) holds \"300001\"; it takes a number of milliseconds, 500 to 300000")]
#[case::a_lease_that_is_none(&["serve", "lv3", "--lock-lease-ms", "9"], "LOCK_LEASE_MS (--lock-lease-ms) holds \"9\"; it takes a number of milliseconds, 10 to 600000")]
#[case::a_prefix_of_two_words(&["serve", "lv3", "--redis-prefix", "two words"], "REDIS_PREFIX")]
#[case::a_redis_that_is_none(&["serve", "lv3", "--redis-url", "http://localhost"], "REDIS_URL (--redis-url) holds something else (not shown: it is a secret)")]
#[case::orders_that_wait_elsewhere(&["bench", "lv2/mutex", "--drain", "100"], "only LV.4 lets them wait: lv4/locked, lv4/single-writer")]
#[case::no_orders_that_wait(&["bench", "lv4", "--drain", "0"], "a number, 1 to 500000")]
#[case::answers_that_wait_for_no_pool(&["bench", "lv4", "--pools", "1,2"], "those of LV.4 do not")]
#[case::dead_letters_of_nobody(&["dead-letters"], "oversold: KAFKA_BOOTSTRAP_SERVERS (--kafka-bootstrap-servers) is not set; it takes the addresses of Kafka brokers, such as localhost:9092")]
#[case::dead_letters_of_no_broker(&["dead-letters", "--kafka-bootstrap-servers", "localhost"], "KAFKA_BOOTSTRAP_SERVERS (--kafka-bootstrap-servers) holds \"localhost\"; it takes the addresses")]
#[case::a_dead_letter_without_origin(&["dead-letters", "show"], "<ORIGIN> is missing")]
#[case::an_order_of_nothing(&["trace", "lv1", "--order"], "oversold: --order holds nothing; it takes a value")]
#[case::a_port_that_is_none(&["serve", "lv1", "--port", "eighty"], "PORT")]
fn bad_input_is_one_clear_line_and_exit_code_2(#[case] arguments: &[&str], #[case] says: &str) {
    let output = command(arguments)
        .env_remove("KAFKA_BOOTSTRAP_SERVERS")
        .output()
        .unwrap();
    let said = err(&output);
    assert_eq!(output.status.code(), Some(2), "{said}");
    assert!(said.contains(says), "{said}");
    assert_eq!(said.trim_end().lines().count(), 1, "{said}");
    assert!(out(&output).is_empty(), "{}", out(&output));
}

#[test]
fn without_a_command_it_shows_its_help() {
    let output = oversold(&[]);
    assert_eq!(output.status.code(), Some(2));
    for subcommand in [
        "rush",
        "bench",
        "serve",
        "trace",
        "judge",
        "list",
        "dead-letters",
        "doctor",
    ] {
        assert!(err(&output).contains(&format!("  {subcommand} ")), "{}", err(&output));
    }
}

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
fn a_bad_setting_is_one_clear_line_and_exit_code_2() {
    let output = command(&["rush", "lv1"])
        .env("OVERSOLD_BACKENDS", "podman")
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(2));
    assert_eq!(
        err(&output),
        "oversold: OVERSOLD_BACKENDS is `podman`; it takes `docker` or `native`\n"
    );
}

#[test]
fn bench_says_what_it_takes() {
    let output = oversold(&["bench", "--help"]);
    assert_eq!(output.status.code(), Some(0));
    for option in [
        "--clients",
        "--seconds",
        "--rounds",
        "--pool ",
        "--pools",
        "--lock",
        "--waiters",
        "--drain",
        "--json",
    ] {
        assert!(out(&output).contains(option), "{}", out(&output));
    }
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

/// What the book says of the lock comes from these names.
#[rstest]
#[case::spin("lv3/spin")]
#[case::rlock("lv3/rlock")]
#[case::fenced("lv3/fenced")]
fn waiters_are_timed_and_their_commands_counted(#[case] strategy: &str) {
    let folder = tempdir().unwrap();
    let json = folder.path().join("waiters.json");
    let arguments = ["bench", strategy, "--waiters", "100", "--rounds", "1", "--json"];
    let output = command(&arguments).arg(&json).output().unwrap();
    assert_eq!(output.status.code(), Some(0), "{}", err(&output));
    let figures: Value = serde_json::from_slice(&fs::read(&json).unwrap()).unwrap();
    assert_eq!(figures["strategy"], strategy);
    assert_eq!(figures["waiters"], 100);
    assert!(figures["took_ms"]["median"].as_f64() > Some(0.0), "{figures}");
    // Each takes the lock and gives it back.
    assert!(
        figures["commands_sent_each"]["median"].as_f64() >= Some(2.0),
        "{figures}"
    );
    assert!(
        figures["rounds"][0]["commands"]["evalsha"].as_u64() >= Some(100),
        "{figures}"
    );
    if strategy != "lv3/spin" {
        // Who is woken by a message does not ask again and again.
        assert!(
            figures["commands_sent_each"]["median"].as_f64() <= Some(6.0),
            "{figures}"
        );
    }
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
    assert!(said.contains("REDIS_URL (--redis-url) is not set; it takes"), "{said}");
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
    serve.envs(stand.environment()).env("REDIS_URL", url);
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

#[tokio::test(flavor = "multi_thread")]
async fn a_dead_letter_is_listed_and_shown_and_gets_a_second_chance() {
    let strategy = lv4_kafka::LEVEL.strategy("single-writer").unwrap();
    let stand = harness::backends::TestEnvironment::shared(strategy).await.unwrap();
    let letters = |arguments: &[&str]| {
        let mut letters = command(&[&["dead-letters"], arguments].concat());
        letters.envs(stand.environment()).output().unwrap()
    };
    let listed = || -> Vec<Value> { serde_json::from_str(&out(&letters(&["list", "--json"]))).unwrap() };

    // Before there is a topic.
    let output = letters(&[]);
    assert_eq!(output.status.code(), Some(0), "{}", err(&output));
    assert!(
        out(&output).starts_with("no dead letters in oversold-"),
        "{}",
        out(&output)
    );
    assert!(listed().is_empty());
    for word in ["show", "replay"] {
        let output = letters(&[word, "orders/0/7"]);
        assert_eq!(output.status.code(), Some(2), "{}", err(&output));
        assert!(
            err(&output).starts_with("oversold: there is no dead letter orders/0/7"),
            "{}",
            err(&output)
        );
        assert_eq!(err(&output).trim_end().lines().count(), 1, "{}", err(&output));
    }

    let program = Program::new(env!("CARGO_BIN_EXE_oversold"))
        .argument("serve")
        .argument("lv4");
    let rush = Rush::default();
    let servers = Servers::start(&rush, &stand, &program, &lv4_kafka::LEVEL, strategy)
        .await
        .unwrap();
    let place = stand.kafka(0, Duration::from_secs(1)).unwrap();
    let topic = lv4_kafka::pipeline::orders_topic(&place);
    // With a key, as orders have one: it decides on the partition, the second time as well.
    let key = SALE.to_be_bytes();
    let poison = FutureRecord::to(&topic).key(&key).payload("not an order\n");
    let producer = lv4_kafka::pipeline::producer(&place).unwrap();
    let written = producer.send(poison, Duration::from_secs(10)).await.unwrap();
    let (partition, offset) = (written.partition, written.offset);
    let origin = format!("{topic}/{partition}/{offset}");
    let one = |attempts: u64| {
        let began = Instant::now();
        loop {
            match listed().as_slice() {
                [letter] if letter["attempts"] == attempts => return letter.clone(),
                other => assert!(began.elapsed() < Duration::from_secs(20), "{other:?}"),
            }
        }
    };
    let letter = one(1);
    assert_eq!(letter["origin"], origin, "{letter}");
    assert_eq!(letter["payload"], "not an order\n");
    let reason = letter["reason"].as_str().unwrap().to_owned();
    let output = letters(&["list"]);
    assert_eq!(out(&output), format!("{origin}  {reason} (tried once)\n"));
    let output = letters(&["show", &origin]);
    assert_eq!(
        out(&output),
        format!("origin    {origin}\nreason    {reason}\nattempts  1\npayload   not an order\\n\n")
    );

    // It is no more of an order the second time.
    let output = letters(&["replay", &origin]);
    assert_eq!(output.status.code(), Some(0), "{}", err(&output));
    assert!(
        out(&output).contains(&format!("{origin} is in {topic} again")),
        "{}",
        out(&output)
    );
    assert_eq!(one(2)["origin"], format!("{topic}/{partition}/{}", offset + 1));
    let again = letters(&["replay", &origin]);
    assert_eq!(again.status.code(), Some(2), "{}", out(&again));
    servers.stop().await.unwrap();
}

#[test]
fn the_retries_of_a_rush_are_counted() {
    let folder = tempdir().unwrap();
    let json = folder.path().join("rush.json");
    let arguments = ["rush", "lv2/optimistic", "--buyers", "100", "--json"];
    let output = command(&arguments).arg(&json).output().unwrap();
    assert_eq!(output.status.code(), Some(0), "{}", err(&output));
    let figures: Value = serde_json::from_slice(&fs::read(&json).unwrap()).unwrap();
    let retries = figures["strategies"][0]["retries"].as_u64().unwrap();
    assert!(retries > 0, "{figures}");
    assert!(out(&output).contains(&format!("{retries} retries")), "{}", out(&output));
}

#[test]
fn a_rush_of_several_rounds_tells_their_range() {
    let folder = tempdir().unwrap();
    let json = folder.path().join("rush.json");
    let histories = folder.path().join("histories");
    let arguments = ["rush", "lv2/pessimistic", "--buyers", "20", "--rounds", "3", "--json"];
    let mut command = command(&arguments);
    command.arg(&json).arg("--history").arg(&histories);
    let output = command.output().unwrap();
    assert_eq!(output.status.code(), Some(0), "{}", err(&output));
    assert!(
        out(&output).contains("median (range) of 3 rounds: "),
        "{}",
        out(&output)
    );

    let figures: Value = serde_json::from_slice(&fs::read(&json).unwrap()).unwrap();
    let shown = &figures["strategies"][0];
    let rounds = &shown["rounds"];
    assert_eq!(rounds["times"], 3);
    let spread = &rounds["all_answered_ms"];
    assert_eq!(
        spread["median"], shown["all_answered_ms"],
        "the round in the middle is shown"
    );
    assert!(spread["least"].as_f64() <= spread["most"].as_f64(), "{spread}");
    assert!(rounds["all_completed_ms"].is_null(), "its answers are final");
    assert_eq!(fs::read_dir(&histories).unwrap().count(), 3);
}

#[test]
fn list_names_every_strategy_with_its_promises() {
    let output = oversold(&["list"]);
    assert_eq!(output.status.code(), Some(0));
    let listed = out(&output);
    for name in [
        "lv1/read-then-write",
        "lv2/mutex",
        "lv2/mutants/guard-before-commit",
        "lv4/locked",
        "lv4/single-writer",
    ] {
        assert!(listed.contains(name), "{listed}");
    }
    assert!(listed.contains("I10"), "{listed}");
}

/// LV.1 breaks, as it promises: that is exit code 0, and the table says both.
#[test]
fn a_strategy_that_breaks_as_promised_ends_well_and_its_figures_have_stable_names() {
    let folder = tempdir().unwrap();
    let json = folder.path().join("rush.json");
    let output = oversold(&["rush", "lv1/read-then-write", "--json", json.to_str().unwrap()]);
    assert_eq!(output.status.code(), Some(0), "{}", err(&output));
    assert!(out(&output).contains("BROKEN (I1, I2"), "{}", out(&output));
    assert!(out(&output).contains("verdict: as promised"), "{}", out(&output));

    let figures: Value = serde_json::from_slice(&fs::read(&json).unwrap()).unwrap();
    let keys = |value: &Value| -> BTreeSet<String> { value.as_object().unwrap().keys().cloned().collect() };
    for name in [
        "command",
        "commit",
        "machine",
        "postgres",
        "capacity",
        "buyers",
        "instances",
        "work_ms",
        "strategies",
    ] {
        assert!(
            keys(&figures).contains(name),
            "{name} is not among {:?}",
            keys(&figures)
        );
    }
    let strategy = &figures["strategies"][0];
    for name in [
        "strategy",
        "promises",
        "clicks",
        "requests",
        "sold",
        "stock",
        "oversold_by",
        "duplicates",
        "answers",
        "requests_a_second",
        "sales_a_second",
        "took_ms",
        "answered",
        "all_answered_ms",
        "completed",
        "all_completed_ms",
        "greatest_overlap",
        "client_share",
        "broken",
        "seen",
        "verdict",
    ] {
        assert!(
            keys(strategy).contains(name),
            "{name} is not among {:?}",
            keys(strategy)
        );
    }
    assert_eq!(strategy["verdict"], "as promised");
    assert!(strategy["sold"].as_u64() > Some(100));
    // Here an answer is final: there is one clock.
    assert!(strategy["completed"].is_null() && strategy["all_completed_ms"].is_null());
    for durability in ["fsync", "synchronous_commit"] {
        assert_eq!(
            figures["postgres"]["durability"][durability], "on",
            "{}",
            figures["postgres"]
        );
    }
}

#[test]
fn what_is_accepted_first_and_decided_later_has_two_clocks() {
    let folder = tempdir().unwrap();
    let json = folder.path().join("rush.json");
    let arguments = ["rush", "lv4", "--buyers", "50", "--capacity", "10", "--json"];
    let output = command(&arguments).arg(&json).output().unwrap();
    assert_eq!(output.status.code(), Some(0), "{}\n{}", out(&output), err(&output));
    for said in ["completed, ms", "all answered after", "all completed after"] {
        assert!(out(&output).contains(said), "{}", out(&output));
    }
    let figures: Value = serde_json::from_slice(&fs::read(&json).unwrap()).unwrap();
    assert_eq!(figures["kafka"]["service"], "kafka", "{figures}");
    for strategy in figures["strategies"].as_array().unwrap() {
        let at = |clock: &str, point: &str| strategy[clock][point].as_f64().unwrap();
        assert_eq!(strategy["sold"], 10, "{strategy}");
        assert!(strategy["sales_a_second"].as_f64() > Some(0.0), "{strategy}");
        for point in ["p50_ms", "p95_ms", "p99_ms", "max_ms"] {
            assert!(at("answered", point) <= at("completed", point), "{strategy}");
        }
        assert!(strategy["all_answered_ms"].as_f64() <= strategy["all_completed_ms"].as_f64());
        assert!(strategy["all_completed_ms"].as_f64() <= strategy["took_ms"].as_f64());
    }
}

/// A rush that is too small to break anything says so, instead of passing.
#[test]
fn a_rush_that_shows_nothing_is_inconclusive_and_exit_code_4() {
    let output = oversold(&["rush", "lv1/read-then-write", "--buyers", "1"]);
    assert_eq!(output.status.code(), Some(4), "{}", err(&output));
    assert!(
        out(&output).contains("inconclusive: I1, I2 was not seen to break"),
        "{}",
        out(&output)
    );
}

/// What `rush --history` writes is what `judge` reads, and both come to the same verdict; a broken one is exit code 1.
#[test]
fn a_recorded_history_is_judged_again() {
    let folder = tempdir().unwrap();
    let histories = folder.path().join("histories");
    let recorded = oversold(&[
        "rush",
        "lv1/check-then-decrement",
        "--history",
        histories.to_str().unwrap(),
    ]);
    assert_eq!(recorded.status.code(), Some(0), "{}", err(&recorded));
    let file = histories.join("lv1-check-then-decrement.jsonl");

    let judged = oversold(&["judge", file.to_str().unwrap()]);
    assert_eq!(judged.status.code(), Some(1), "{}", err(&judged));
    assert!(out(&judged).contains("BROKEN I1"), "{}", out(&judged));

    let verdict: Value = serde_json::from_str(&out(&oversold(&["judge", "--json", file.to_str().unwrap()]))).unwrap();
    assert_eq!(verdict["coverage"]["requests"], 1000);
    assert!(!verdict["findings"].as_array().unwrap().is_empty());

    // One byte too few, and it is no history any more: the line that is wrong is named.
    let text = fs::read_to_string(&file).unwrap();
    let cut = folder.path().join("cut.jsonl");
    fs::write(&cut, &text[..text.len() - 2]).unwrap();
    let refused = oversold(&["judge", cut.to_str().unwrap()]);
    assert_eq!(refused.status.code(), Some(2), "{}", err(&refused));
    assert!(err(&refused).contains("line "), "{}", err(&refused));
}

/// The lines of a trace that name a lane's steps, without the table's borders.
#[test]
fn the_forced_interleaving_is_the_same_each_time_and_shows_the_oversell() {
    let [first, second] = [0, 1].map(|_| oversold(&["trace", "lv1/read-then-write"]));
    assert_eq!(first.status.code(), Some(0), "{}", err(&first));
    assert_eq!(out(&first), out(&second));
    assert!(out(&first).contains("2 sold of 1, stock 0"), "{}", out(&first));
    assert!(out(&first).contains("BROKEN I1"), "{}", out(&first));
}

#[rstest]
#[case::one_after_another("lv1/read-then-write", "AAAAAAAABBBBBBBB", "1 sold of 1, stock 0\nnothing broken")]
#[case::in_turn("lv1/read-then-write", "ABABAB", "2 sold of 1, stock 0\nBROKEN I1")]
#[case::two_clicks("lv1/check-then-insert", "AaAaAaAa", "BROKEN I3")]
#[case::behind_a_lock("lv2/pessimistic", "ABABABAB", "1 sold of 1, stock 0\nnothing broken")]
fn a_reader_chooses_the_order(#[case] strategy: &str, #[case] order: &str, #[case] says: &str) {
    let output = oversold(&["trace", strategy, "--order", order]);
    assert_eq!(output.status.code(), Some(0), "{}", err(&output));
    assert!(out(&output).contains(says), "{}\n{}", out(&output), err(&output));
}

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
    let said = out(&output);
    let services: Vec<&str> = said.lines().filter_map(|line| Some(line.split_once(": ")?.0)).collect();
    assert_eq!(services, there, "{said}");
    assert!(err(&output).contains(missing), "{}", err(&output));
}

/// Whoever sets a machine up wants to hear of everything at once.
#[test]
fn doctor_tells_of_all_that_is_missing() {
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

/// A strategy that is wrong on purpose says what is wrong with it: in a rush, or when something befalls it.
#[test]
fn every_mutant_declares_what_it_breaks() {
    let output = oversold(&["list", "--json"]);
    let listed: Value = serde_json::from_slice(&output.stdout).unwrap();
    let is_empty = |value: &Value| value.as_array().unwrap().is_empty();
    for strategy in listed.as_array().unwrap() {
        let says = ["single_instance", "multi_instance"]
            .into_iter()
            .any(|instances| !is_empty(&strategy[instances]["breaks"]))
            || !is_empty(&strategy["failure_modes"]);
        assert!(strategy["mutant"] == false || says, "{strategy}");
    }
}
