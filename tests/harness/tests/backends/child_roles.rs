//! The roles of child processes. Each test of [`crate::managed_servers`] is one role.

use std::{
    any::Any,
    env,
    io::{self, BufRead, BufReader, Write},
    net::TcpStream,
    process::{Command, Stdio},
    sync::Arc,
    thread,
};

use harness::backends::{self, Durability, Kafka, Missing, Postgres, Private, Redis, Report, reaper};
use serde_json::{Value, json};

use crate::{
    child::SERVICE,
    kafka,
    postgres::{self, schema},
    redis,
    service::Service,
};

pub(crate) fn play(role: &str) {
    let named = env::var(SERVICE).unwrap();
    let service = Service::ALL
        .into_iter()
        .find(|service| service.name() == named)
        .unwrap();
    let runtime = tokio::runtime::Runtime::new().unwrap();
    match role {
        "find" => {
            let result = match runtime.block_on(report(service)) {
                Ok(report) => serde_json::to_value(report).unwrap(),
                Err(missing) => {
                    json!({ "error": missing.to_string(), "setting": matches!(missing, Missing::BadSetting { .. }) })
                }
            };
            println!("{result}");
        }
        "hold" => hold(service, &runtime),
        "keep" => {
            reaper::folder("empty").unwrap();
        }
        "stubborn" => stubborn(),
        "serve" => runtime.block_on(async {
            match service {
                Service::Postgres => postgres::serve().await,
                Service::Redis => redis::serve().await,
                Service::Kafka => kafka::serve().await,
            }
        }),
        "share" => share(service),
        "race" => postgres::race(),
        "drop" => runtime.block_on(async {
            match service {
                Service::Postgres => postgres::drop_database().await,
                Service::Redis => redis::drop_prefix().await,
                Service::Kafka => kafka::drop_topics().await,
            }
        }),
        "reply" => runtime.block_on(redis::reply()),
        "break" => runtime.block_on(async {
            match service {
                Service::Postgres => postgres::stop_and_kill().await,
                Service::Redis => redis::stop_and_kill().await,
                Service::Kafka => kafka::stop_and_kill().await,
            }
        }),
        "private" => runtime.block_on(drop_private(service)),
        "freeze" => runtime.block_on(kafka::freeze()),
        "durable" => runtime.block_on(postgres::durable()),
        _ => unreachable!("no role is called {role}"),
    }
}

/// Leaves a process behind that ignores all signals but SIGKILL.
#[allow(clippy::zombie_processes)]
fn stubborn() {
    let mut child = reaper::command("sh").unwrap();
    let child = child
        .args(["-c", "trap '' INT TERM; echo; sleep 1000"])
        .stdout(Stdio::piped());
    let mut child = child.spawn().unwrap();
    // From here on the process ignores the signal.
    BufReader::new(child.stdout.take().unwrap())
        .read_line(&mut String::new())
        .unwrap();
    say(&json!({ "pid": child.id() }));
}

fn say(value: &Value) {
    println!("{value}");
    io::stdout().flush().unwrap();
}

/// The report of the shared server.
async fn report(service: Service) -> Result<Report, Missing> {
    Ok(match service {
        Service::Postgres => backends::postgres().await?.report().clone(),
        Service::Redis => backends::redis().await?.report().clone(),
        Service::Kafka => backends::kafka().await?.report().clone(),
    })
}

/// Keeps a server, and a database, a key or a topic on it, until a line on stdin says how to end.
fn hold(service: Service, runtime: &tokio::runtime::Runtime) {
    let (address, holds, _held): (String, String, Box<dyn Any>) = runtime.block_on(async {
        match service {
            Service::Postgres => {
                let postgres = backends::postgres().await.unwrap();
                let database = postgres.database(schema("tickets")).await.unwrap();
                let url = database.url();
                let (_, name) = url.rsplit_once('/').unwrap();
                let name = name.split('?').next().unwrap().to_owned();
                let held: Box<dyn Any> = Box::new((Arc::clone(&postgres), database));
                (postgres.report().address.clone(), name, held)
            }
            Service::Redis => {
                let redis = backends::redis().await.unwrap();
                let prefix = redis.prefix();
                let key = format!("{prefix}lock");
                redis.command(&["SET", &key, "me"]).await.unwrap();
                let held: Box<dyn Any> = Box::new((Arc::clone(&redis), prefix));
                (redis.report().address.clone(), key, held)
            }
            Service::Kafka => {
                let kafka = backends::kafka().await.unwrap();
                let prefix = kafka.prefix();
                let topic = format!("{prefix}orders");
                kafka.create_topic(&topic, 2).await.unwrap();
                let held: Box<dyn Any> = Box::new((Arc::clone(&kafka), prefix));
                (kafka.report().address.clone(), topic, held)
            }
        }
    });
    let folder = reaper::folder("asked").unwrap();
    say(&json!({ "folder": folder.parent(), "address": address, "holds": holds }));
    let mut how = String::new();
    io::stdin().read_line(&mut how).unwrap();
    assert_ne!(how.trim(), "panic", "as it was set to");
}

fn share(service: Service) {
    // Identifies the server, which lives as long as the process.
    let on_its_own_runtime = || {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap();
        runtime.block_on(async {
            match service {
                Service::Postgres => {
                    let postgres = backends::postgres().await.unwrap();
                    let database = postgres.database(schema("tickets")).await.unwrap();
                    database.pool(1).await.unwrap();
                    Arc::as_ptr(&postgres).addr()
                }
                Service::Redis => {
                    let redis = backends::redis().await.unwrap();
                    redis.command(&["PING"]).await.unwrap();
                    Arc::as_ptr(&redis).addr()
                }
                Service::Kafka => {
                    let kafka = backends::kafka().await.unwrap();
                    kafka.topics("").await.unwrap();
                    Arc::as_ptr(&kafka).addr()
                }
            }
        })
    };
    let first = thread::scope(|scope| {
        let threads: Vec<_> = (0..4).map(|_| scope.spawn(on_its_own_runtime)).collect();
        let found: Vec<_> = threads.into_iter().map(|thread| thread.join().unwrap()).collect();
        assert!(found.iter().all(|one| *one == found[0]));
        found[0]
    });
    // Also after all runtimes that took part in starting it are gone.
    assert_eq!(first, on_its_own_runtime());
}

/// Stops or kills a server after each write. `left` is the expected number of items after each
/// start.
pub(crate) async fn break_private<S, C>(
    server: &Private<S>,
    address: &str,
    write: impl AsyncFn(i64) -> C,
    is_cut: impl AsyncFn(C) -> bool,
    written: impl AsyncFn() -> Option<i64>,
    left: [i64; 3],
) {
    let mut pids = vec![server.pid().await.unwrap().unwrap()];
    for ((number, kill), left) in [(1, false), (2, true), (3, true)].into_iter().zip(left) {
        let connection = write(number).await;
        if kill {
            server.kill().await.unwrap();
        } else {
            server.stop().await.unwrap();
        }
        assert!(is_cut(connection).await, "the connection is cut");
        assert_eq!(written().await, None, "the server does not answer");
        assert_eq!(server.pid().await.unwrap(), None);
        // On a server that is down, both do nothing.
        server.stop().await.unwrap();
        server.kill().await.unwrap();

        server.start().await.unwrap();
        server.start().await.unwrap();
        assert_eq!(written().await, Some(left), "what is left after a start");
        assert!(TcpStream::connect(address).is_ok(), "at the same address");
        pids.push(server.pid().await.unwrap().unwrap());
    }
    pids.sort_unstable();
    pids.dedup();
    assert_eq!(pids.len(), 4, "it was another process each time: {pids:?}");
}

async fn drop_private(service: Service) {
    match service {
        Service::Postgres => {
            let start = async || Postgres::private(Durability::Fast).await.unwrap();
            let segments = drop_two(start, Postgres::report).await;
            let gone = segments
                .iter()
                .filter(|segment| !shared_memory().contains(segment))
                .count();
            let native = env::var("OVERSOLD_BACKENDS").unwrap() == "native";
            assert!(!native || gone >= 2, "both segments of shared memory are gone");
        }
        Service::Redis => {
            drop_two(async || Redis::private().await.unwrap(), Redis::report).await;
        }
        Service::Kafka => {
            drop_two(async || Kafka::private().await.unwrap(), Kafka::report).await;
        }
    }
}

/// Drops two private servers, one of which was killed. Returns the shared memory segments from
/// before.
async fn drop_two<S>(start: impl AsyncFn() -> Private<S>, report: fn(&S) -> &Report) -> Vec<String> {
    let up = start().await;
    let killed = start().await;
    assert_ne!(report(&up).address, report(&killed).address);
    killed.kill().await.unwrap();
    let addresses = [report(&up).address.clone(), report(&killed).address.clone()];
    let segments = shared_memory();
    drop(up);
    drop(killed);
    for address in addresses {
        assert!(TcpStream::connect(&address).is_err(), "{address} is closed");
    }
    segments
}

/// The ids of the System V shared memory segments on this machine.
fn shared_memory() -> Vec<String> {
    let listed = Command::new("ipcs").arg("-m").output().unwrap();
    let listed = String::from_utf8(listed.stdout).unwrap();
    let id = |line: &str| {
        line.split_whitespace()
            .nth(1)
            .filter(|id| id.parse::<u32>().is_ok())
            .map(str::to_owned)
    };
    listed.lines().filter_map(id).collect()
}
