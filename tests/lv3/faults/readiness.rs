//! Faults of Redis that PING does not show: it answers, and does not do what a sale needs.

use super::*;

/// A Redis that rejects the writes of a lock.
#[derive(Clone, Copy, Debug)]
enum Rejects {
    Replica,
    OutOfMemory,
    WithoutReplicas,
}

impl Rejects {
    /// The commands that inject and remove the fault, the code of the error, and a part of the reason
    /// that the server gives.
    fn commands(self) -> ([&'static [&'static str]; 2], &'static str, &'static str) {
        match self {
            Self::Replica => (
                [&["REPLICAOF", "127.0.0.1", "1"], &["REPLICAOF", "NO", "ONE"]],
                "READONLY",
                "read only replica",
            ),
            Self::OutOfMemory => (
                [
                    &["CONFIG", "SET", "maxmemory", "1"],
                    &["CONFIG", "SET", "maxmemory", "0"],
                ],
                "OOM",
                "maxmemory",
            ),
            Self::WithoutReplicas => (
                [
                    &["CONFIG", "SET", "min-replicas-to-write", "1"],
                    &["CONFIG", "SET", "min-replicas-to-write", "0"],
                ],
                "NOREPLICAS",
                "NOREPLICAS",
            ),
        }
    }
}

#[rstest]
#[case::spin("spin", Rejects::Replica)]
#[case::rlock("rlock", Rejects::Replica)]
#[case::fenced("fenced", Rejects::Replica)]
#[case::spin_out_of_memory("spin", Rejects::OutOfMemory)]
#[case::rlock_out_of_memory("rlock", Rejects::OutOfMemory)]
#[case::ready_is_a_ping("mutants/ready-is-a-ping", Rejects::Replica)]
#[case::rlock_without_replicas("rlock", Rejects::WithoutReplicas)]
#[tokio::test]
async fn a_redis_that_rejects_writes_is_not_ready_until_it_takes_them(#[case] name: &str, #[case] rejects: Rejects) {
    let (redis, environment) = private_environment(name).await;
    let server = instance(&environment, name, LEASE).await;
    server.create_rush_sale(1).await.unwrap();
    let pid = server.pid().await.unwrap();
    let ([fault, remedy], code, reason) = rejects.commands();

    assert_eq!(redis.command(fault).await.unwrap(), Reply::Status("OK".to_owned()));
    let rejected = redis.command(&["SET", "key", "value"]).await.unwrap();
    assert!(
        matches!(&rejected, Reply::Error(why) if why.starts_with(code)),
        "the fault did not strike: {rejected:?}"
    );
    assert_eq!(server.reserve(SALE, 1, Some("a")).await.unwrap().status, 503);
    if name == "mutants/ready-is-a-ping" {
        assert_eq!(unready(&server).await, "");
        assert_failure_mode(strategy(name), &[]);
        server.stop().await.unwrap();
        return;
    }
    until("the reason is named", async || unready(&server).await.contains(reason)).await;

    assert_eq!(redis.command(remedy).await.unwrap(), Reply::Status("OK".to_owned()));
    until("it is ready again", async || unready(&server).await.is_empty()).await;
    assert_eq!(server.reserve(SALE, 1, Some("a")).await.unwrap().status, 201);
    assert_eq!(server.pid().await.unwrap(), pid, "it is another process");
    server.stop().await.unwrap();
}

/// Why the server is not ready; empty if it is.
async fn unready(server: &TestServer) -> String {
    let answer = server.get("/readyz").await.unwrap();
    match answer.status.is_success() {
        true => String::new(),
        false => String::from_utf8_lossy(&answer.body).into_owned(),
    }
}

/// A Redis user, and the URL for it.
async fn user(redis: &Redis, rules: &[&str]) -> String {
    let command = [&["ACL", "SETUSER", "app", "on", ">secret"], rules].concat();
    assert_eq!(redis.command(&command).await.unwrap(), Reply::Status("OK".to_owned()));
    format!("redis://app:secret@{}/0", redis.report().address)
}

/// By default a new user of Redis 7 may use no channel.
#[rstest]
#[case::no_channel(&["~*", "+@all", "resetchannels"])]
#[case::no_subscription(&["~*", "&*", "+@all", "-subscribe"])]
#[case::no_key(&["&*", "+@all"])]
#[case::no_script(&["~*", "&*", "+@all", "-@scripting"])]
#[tokio::test]
async fn a_user_without_the_permissions_of_a_lock_does_not_start(
    #[values("rlock", "fenced")] name: &str,
    #[case] rules: &[&str],
) {
    let (redis, environment) = private_environment(name).await;
    let program = program(LEASE).variable("REDIS_URL", user(&redis, rules).await);
    let started = TestServer::start(&environment, &program, &LEVEL, strategy(name)).await;
    let Err(why) = started else { panic!("it starts") };
    let why = format!("{why:#}");
    let pattern = format!("{}lock:*", environment.prefix().unwrap());
    let named: Vec<&str> = why.lines().filter(|line| line.contains("error: ")).collect();
    let [line] = named[..] else { panic!("{why}") };
    assert!(
        line.contains(&format!("acl setuser app on ~{pattern} &{pattern}")),
        "{line}"
    );
    assert!(!why.contains("secret"), "{why}");
}

/// `spin` publishes nothing.
#[tokio::test]
async fn a_lock_that_uses_no_channel_needs_none() {
    let (redis, environment) = private_environment("spin").await;
    let url = user(&redis, &["~*", "+@all", "resetchannels"]).await;
    let program = program(LEASE).variable("REDIS_URL", url);
    let server = TestServer::start(&environment, &program, &LEVEL, strategy("spin"))
        .await
        .unwrap();
    server.create_rush_sale(1).await.unwrap();
    assert_eq!(server.reserve(SALE, 1, None).await.unwrap().status, 201);
    server.stop().await.unwrap();
}

/// The permission is withdrawn while the server runs. Its locks are released all the same.
#[rstest]
#[case::rlock("rlock")]
#[case::fenced("fenced")]
#[tokio::test]
async fn a_server_that_may_not_publish_any_more_is_not_ready_and_releases_its_locks(#[case] name: &str) {
    // So long that only a release frees the lock.
    let lease = Duration::from_secs(60);
    let (redis, environment) = private_environment(name).await;
    let lock = Lock::of(SALE, &environment, &redis);
    let url = user(&redis, &["~*", "&*", "+@all"]).await;
    let program = program(lease).variable("REDIS_URL", url);
    let server = TestServer::start(&environment, &program, &LEVEL, strategy(name))
        .await
        .unwrap();
    server.create_rush_sale(20).await.unwrap();

    user(&redis, &["resetchannels"]).await;
    until("the reason is named", async || {
        unready(&server).await.contains("acl setuser app")
    })
    .await;
    for buyer in 1..=20 {
        let sold = server.reserve(SALE, buyer, None).await.unwrap();
        assert_eq!(sold.status, 201, "buyer {buyer}");
        until("the lock is released", async || !lock.is_held().await).await;
    }
    let log = server.log().await.unwrap();
    assert!(!log.contains("was not released"), "{log}");
    let count = log.matches("its waiters could not be notified").count();
    assert_eq!(count, 1, "{log}");

    user(&redis, &["&*"]).await;
    until("it is ready again", async || unready(&server).await.is_empty()).await;
    server.stop().await.unwrap();
}
