//! Kafka: topics, prefixes, and a broker that is stopped, killed and frozen; and the messages when
//! a broker does not start.

use std::{
    collections::BTreeMap,
    env, fs,
    io::Read,
    net::TcpStream,
    time::{Duration, Instant},
};

use harness::backends::{self, Kafka, Source};

use crate::{
    Test,
    child::{Role, TIMEOUT, temp},
    child_roles::break_private,
    of_one,
    service::Service,
};

pub(crate) fn tests() -> Vec<Test> {
    use Source::{Docker, Native};

    vec![
        of_one("no_java_is_said_so", Service::Kafka, &[], no_java_is_said_so),
        of_one(
            "jars_that_do_not_start_show_the_end_of_the_log",
            Service::Kafka,
            &[Native],
            jars_that_do_not_start_show_the_end_of_the_log,
        ),
        of_one(
            "an_image_that_does_not_start_shows_the_end_of_its_log",
            Service::Kafka,
            &[Docker],
            an_image_that_does_not_start_shows_the_end_of_its_log,
        ),
    ]
}

pub(crate) async fn serve() {
    let kafka = backends::kafka().await.unwrap();
    let (prefix, other) = (kafka.prefix(), kafka.prefix());
    assert_ne!(*prefix, *other);
    let topic = format!("{prefix}orders");
    kafka.create_topic(&topic, 3).await.unwrap();
    let made = BTreeMap::from([(topic.clone(), 3)]);
    assert_eq!(kafka.topics(&prefix).await.unwrap(), made);
    assert_eq!(kafka.topics(&other).await.unwrap(), BTreeMap::new());
    let again = kafka.create_topic(&topic, 3).await.unwrap_err();
    assert!(format!("{again:#}").contains("error code 36"), "{again:#}");

    let report = kafka.report();
    assert_eq!(report.source.name(), env::var("OVERSOLD_BACKENDS").unwrap());
    assert!(report.version.starts_with("4."), "{report}");
    assert_eq!(kafka.bootstrap_servers(), report.address);
    assert!(TcpStream::connect(&report.address).is_ok(), "{report}");
}

pub(crate) async fn drop_topics() {
    let kafka = backends::kafka().await.unwrap();
    let (kept, dropped) = (kafka.prefix(), kafka.prefix());
    for topic in ["orders", "orders-dead"] {
        kafka.create_topic(&format!("{dropped}{topic}"), 2).await.unwrap();
    }
    let topic = format!("{kept}orders");
    kafka.create_topic(&topic, 2).await.unwrap();
    drop(dropped);
    let began = Instant::now();
    let left = BTreeMap::from([(topic, 2)]);
    while kafka.topics("oversold-").await.unwrap() != left {
        assert!(began.elapsed() < TIMEOUT, "waited for the topics to be deleted");
    }
}

pub(crate) async fn freeze() {
    let kafka = Kafka::private().await.unwrap();
    kafka.freeze().await.unwrap();
    let asked = kafka.topics("");
    tokio::pin!(asked);
    let answered = tokio::time::timeout(Duration::from_millis(200), &mut asked).await;
    assert!(answered.is_err(), "it is frozen: {answered:?}");
    kafka.thaw().await.unwrap();
    // On the connection that was opened while the broker was frozen.
    asked.await.unwrap();
    kafka.freeze().await.unwrap();
    kafka.kill().await.unwrap();
    kafka.start().await.unwrap();
    kafka.topics("").await.unwrap();
}

pub(crate) async fn stop_and_kill() {
    let kafka = Kafka::private().await.unwrap();
    let prefix = kafka.prefix();
    let address = kafka.bootstrap_servers();
    let write = async |number: i64| {
        kafka.create_topic(&format!("{prefix}{number}"), 1).await.unwrap();
        TcpStream::connect(address).unwrap()
    };
    let is_cut = async |mut connection: TcpStream| !matches!(connection.read(&mut [0; 100]), Ok(1..));
    let written = async || Some(i64::try_from(kafka.topics(&prefix).await.ok()?.len()).unwrap());
    // What was acknowledged is still there.
    break_private(&kafka, address, write, is_cut, written, [1, 2, 3]).await;
}

fn no_java_is_said_so() {
    let temp = temp();
    let path = tempfile::tempdir().unwrap();
    std::os::unix::fs::symlink("/usr/bin/env", path.path().join("env")).unwrap();
    fs::write(temp.path().join("kafka_2.13-0.jar"), "").unwrap();
    let report = Role::new(Service::Kafka, "find", temp.path())
        .forced(Source::Native)
        .set("OVERSOLD_KAFKA_JARS", temp.path())
        .set("JAVA_HOME", "/nowhere")
        .set("PATH", path.path())
        .json();
    let error = report["error"].as_str().unwrap();
    assert!(error.contains("java is neither in JAVA_HOME nor on PATH"), "{error}");
    fs::remove_file(temp.path().join("kafka_2.13-0.jar")).unwrap();
}

fn jars_that_do_not_start_show_the_end_of_the_log() {
    let jars = temp();
    fs::write(jars.path().join("kafka_2.13-0.jar"), "").unwrap();
    let report = Role::new(Service::Kafka, "find", temp().path())
        .forced(Source::Native)
        .set("OVERSOLD_KAFKA_JARS", jars.path())
        .json();
    let error = report["error"].as_str().unwrap();
    assert!(error.contains("could not format its data folder"), "{error}");
    assert!(error.contains("kafka.tools.StorageTool"), "{error}");
    fs::remove_file(jars.path().join("kafka_2.13-0.jar")).unwrap();
}

/// Uses a present image that does not contain Kafka.
fn an_image_that_does_not_start_shows_the_end_of_its_log() {
    let other = env::var("OVERSOLD_REDIS_IMAGE").unwrap_or_else(|_| "redis:7-alpine".to_owned());
    let report = Role::new(Service::Kafka, "find", temp().path())
        .forced(Source::Docker)
        .set("OVERSOLD_KAFKA_IMAGE", other)
        .json();
    let error = report["error"].as_str().unwrap();
    assert!(error.contains("the container did not start"), "{error}");
    // Of an image with bash its log says it, of one without the engine.
    assert!(error.contains("bash"), "{error}");
}
