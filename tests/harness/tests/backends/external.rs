//! External servers: used and left unchanged, cleaned of what a killed run left, and rejected if
//! they are unsuitable.

use std::{
    path::Path,
    time::{SystemTime, UNIX_EPOCH},
};

use harness::backends::{Database, Durability, Kafka, Postgres, Private, Redis, Reply, Source};
use serde_json::{Value, json};

use crate::{
    Test,
    child::{End, Role, temp, text, until},
    of_each, of_one,
    postgres::{connect, schema},
    service::Service,
    test,
};

pub(crate) fn tests() -> Vec<Test> {
    use Service::{Kafka, Postgres, Redis};
    use Source::Native;

    let mut tests = of_each(
        "an_external_server_is_used_and_left_as_it_was",
        &[Native],
        an_external_server_is_used_and_left_as_it_was,
    );
    tests.extend(of_each(
        "a_server_that_was_asked_for_and_is_not_there_is_named_without_its_password",
        &[],
        an_absent_external_server,
    ));
    for service in [Postgres, Redis] {
        let name = "what_a_killed_run_left_on_an_external_server_goes_with_the_next";
        let name = format!("{}::{name}", service.name());
        tests.push(test(name, service, &[Native], move || {
            an_external_server_is_swept(service)
        }));
    }
    tests.extend([
        of_one(
            "what_a_killed_run_left_in_an_external_kafka_goes_after_a_day",
            Kafka,
            &[Native],
            an_external_kafka_is_swept,
        ),
        of_one(
            "an_external_user_must_be_allowed_to_create_databases",
            Postgres,
            &[Native],
            an_external_user_must_be_allowed_to_create_databases,
        ),
        of_one(
            "an_external_user_must_be_allowed_to_write",
            Redis,
            &[Native],
            an_external_user_must_be_allowed_to_write,
        ),
    ]);
    tests
}

/// A server in the role of an external one: a private native server of this process, with content
/// of another user.
struct External {
    runtime: tokio::runtime::Runtime,
    service: Service,
    /// The URL for children.
    url: String,
    server: Server,
}

enum Server {
    Postgres(Box<(Database, Private<Postgres>)>),
    Redis(Box<Private<Redis>>),
    Kafka(Box<Private<Kafka>>),
}

impl External {
    fn start(service: Service) -> Self {
        let runtime = tokio::runtime::Runtime::new().unwrap();
        let (server, url) = runtime.block_on(async {
            match service {
                Service::Postgres => {
                    let postgres = Postgres::private(Durability::Fast).await.unwrap();
                    let database = postgres.database(schema("tickets")).await.unwrap();
                    let url = database.url();
                    (Server::Postgres(Box::new((database, postgres))), url)
                }
                Service::Redis => {
                    let redis = Redis::private().await.unwrap();
                    redis.command(&["SET", "oversold:{someone}:else", "1"]).await.unwrap();
                    let url = redis.url().to_owned();
                    (Server::Redis(Box::new(redis)), url)
                }
                Service::Kafka => {
                    let kafka = Kafka::private().await.unwrap();
                    kafka.create_topic("oversold-someone-else", 1).await.unwrap();
                    let servers = kafka.bootstrap_servers().to_owned();
                    (Server::Kafka(Box::new(kafka)), servers)
                }
            }
        });
        Self {
            runtime,
            service,
            url,
            server,
        }
    }

    /// Its databases, keys or topics.
    fn contents(&self) -> Vec<String> {
        self.runtime.block_on(async {
            match &self.server {
                Server::Postgres(server) => {
                    let names = sqlx::query_scalar("select datname from pg_database order by 1");
                    names.fetch_all(&mut connect(&server.0).await).await.unwrap()
                }
                Server::Redis(redis) => {
                    let Reply::Array(keys) = redis.command(&["KEYS", "*"]).await.unwrap() else {
                        panic!("KEYS gives keys");
                    };
                    let mut keys: Vec<String> = keys
                        .into_iter()
                        .map(|key| match key {
                            Reply::Bulk(key) => key,
                            other => panic!("{other:?}"),
                        })
                        .collect();
                    keys.sort_unstable();
                    keys
                }
                Server::Kafka(kafka) => kafka.topics("").await.unwrap().into_keys().collect(),
            }
        })
    }

    fn role(&self, role: &str, temp: &Path) -> Role {
        Role::new(self.service, role, temp).set(self.service.url_variable(), &self.url)
    }
}

fn an_external_server_is_used_and_left_as_it_was(service: Service) {
    let external = External::start(service);
    let before = external.contents();
    let temp = temp();
    let mut held = external.role("hold", temp.path()).held();
    assert!(external.url.contains(held.word("address")), "{}", held.word("address"));
    let during = external.contents();
    assert_eq!(during.len(), before.len() + 1, "{during:?}");
    assert!(during.iter().any(|one| one == held.word("holds")), "{during:?}");
    held.end(End::Exit);
    assert_eq!(external.contents(), before);
    temp.becomes_empty();

    let report = external.role("find", temp.path()).json();
    let reason = format!("{} is set", service.url_variable());
    assert_eq!(
        (&report["source"], &report["reason"]),
        (&json!("external"), &json!(reason))
    );
}

fn an_absent_external_server(service: Service) {
    let (scheme, variable) = (service.name(), service.url_variable());
    let (absent, shown, what) = match service {
        Service::Kafka => ("127.0.0.1:1".to_owned(), "127.0.0.1:1".to_owned(), "list of brokers"),
        _ => (
            format!("{scheme}://me:s3cret@127.0.0.1:1/0"),
            format!("{scheme}://me:***@127.0.0.1:1/0"),
            "URL of a ",
        ),
    };
    let not_understood = format!("{variable} is no {what}");
    for (url, part) in [
        (absent, format!("{shown} does not answer")),
        ("mysql://me:s3cret@127.0.0.1:1/0".to_owned(), not_understood.clone()),
        ("s3cret".to_owned(), not_understood),
    ] {
        let output = Role::new(service, "find", temp().path()).set(variable, url).succeeds();
        let report: Value = serde_json::from_slice(&output.stdout).unwrap();
        let error = report["error"].as_str().unwrap();
        assert!(error.contains(&part), "{error}");
        let remedy = format!("Set {variable} to a server that answers, or unset it to have one started.");
        assert!(error.ends_with(&remedy), "{error}");
        assert!(!text(&output).contains("s3cret"), "{}", text(&output));
    }
}

fn an_external_server_is_swept(service: Service) {
    let external = External::start(service);
    let before = external.contents();
    let temp = temp();
    let mut killed = external.role("hold", temp.path()).held();
    let mut alive = external.role("hold", temp.path()).held();
    killed.end(End::Kill);
    assert_eq!(
        external.contents().len(),
        before.len() + 2,
        "SIGKILL leaves a database or a key behind"
    );

    // The server may take a moment to notice that the connection is gone.
    until("the next run to sweep it", || {
        external.role("find", temp.path()).succeeds();
        external.contents().len() == before.len() + 1
    });
    let left = external.contents();
    assert!(
        left.iter().any(|one| one == alive.word("holds")),
        "what a run holds that is alive stays: {left:?}"
    );
    alive.end(End::Exit);
    assert_eq!(external.contents(), before);
}

fn an_external_kafka_is_swept() {
    let external = External::start(Service::Kafka);
    let Server::Kafka(kafka) = &external.server else {
        unreachable!("it is a Kafka")
    };
    let before = external.contents();
    let since_1970 = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs();
    let [old, young] = [25, 23].map(|hours| format!("oversold-{}-00c0ffee-0-orders", since_1970 - hours * 60 * 60));
    external.runtime.block_on(async {
        kafka.create_topic(&old, 1).await.unwrap();
        kafka.create_topic(&young, 1).await.unwrap();
    });
    assert_eq!(external.contents().len(), before.len() + 2);
    external.role("find", temp().path()).succeeds();
    let mut left = before;
    left.push(young);
    left.sort_unstable();
    assert_eq!(external.contents(), left);
}

fn an_external_user_must_be_allowed_to_create_databases() {
    let external = External::start(Service::Postgres);
    let Server::Postgres(server) = &external.server else {
        unreachable!("it is a Postgres")
    };
    external.runtime.block_on(async {
        let user = sqlx::raw_sql("create role guest login password 'guest'");
        user.execute(&mut connect(&server.0).await).await.unwrap();
    });
    a_guest_is_refused(&external, "may not create databases");
}

fn an_external_user_must_be_allowed_to_write() {
    let external = External::start(Service::Redis);
    let Server::Redis(redis) = &external.server else {
        unreachable!("it is a Redis")
    };
    let user = redis.command(&["ACL", "SETUSER", "guest", "on", ">guest", "~*", "+@all", "-@write"]);
    let user = external.runtime.block_on(user).unwrap();
    assert_eq!(user, Reply::Status("OK".to_owned()));
    a_guest_is_refused(&external, "can't be written to: NOPERM");
}

fn a_guest_is_refused(external: &External, part: &str) {
    let (scheme, rest) = external.url.split_once("://").unwrap();
    let (_, place) = rest.rsplit_once('@').unwrap();
    let report = Role::new(external.service, "find", temp().path())
        .set(
            external.service.url_variable(),
            format!("{scheme}://guest:guest@{place}"),
        )
        .json();
    let error = report["error"].as_str().unwrap();
    assert!(error.contains(part), "{error}");
    assert!(!error.contains("guest:guest"), "{error}");
}
