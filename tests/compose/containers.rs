//! docker-compose.yml: each level comes up, a rush through nginx sells what its strategy promises, and nothing but volumes stays.
//!
//! It needs a Docker engine, Compose and the images of the stand, by name: `eval "$(infra/images/build.sh …)"` builds and names them.

use std::{
    env,
    net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener},
    process::{Command, Output},
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use box_office::{BuyerId, Improvement, Invariant, Level, Priority, Promise, Strategy, api, trace::now_monotonic_us};
use harness::{
    backends::free_port,
    final_state,
    history::{Answer, Ending, FORMAT_VERSION, Fault, Header, History, Micros, Refused, Request},
    judge::{Conclusion, Verdict, judge},
    payments,
    rush::{Classified, Connection, classify, final_state as ended},
    until,
};
use hyper::Request as HttpRequest;
use libtest_mimic::{Completion, Trial};
use serde_json::Value;
use sqlx::{PgPool, postgres::PgConnectOptions};
use tokio::{
    sync::{
        Barrier,
        mpsc::{UnboundedSender, unbounded_channel},
    },
    task::JoinSet,
};

use crate::{prometheus::value_of, repository};

const BUYERS: BuyerId = 1000;
const CAPACITY: usize = 100;
const SALE: i64 = 1;
const PASSWORD: &str = "a-password-of-this-test";

/// The time that a buyer has for a final answer.
const PATIENCE: Duration = Duration::from_secs(60);

/// The strategies that are tried. Of those with a number, an instance is killed and another one drained in mid-rush; it is the simulated
/// work of a transaction in milliseconds, so that buyers still wait then.
const STANDS: [(&Level, &str, Option<u32>); 6] = [
    (&lv1_race_condition::LEVEL, "read-then-write", None),
    (&lv2_db_lock::LEVEL, "mutex", None),
    (&lv2_db_lock::LEVEL, "pessimistic", Some(20)),
    (&lv3_redis_lock::LEVEL, "rlock", None),
    (&lv4_kafka::LEVEL, "locked", None),
    // A transaction of many orders, none of which is decided before it ends.
    (&lv4_kafka::LEVEL, "single-writer", Some(1000)),
];

pub(crate) fn tests() -> Vec<Trial> {
    let sales = STANDS.map(|(level, strategy, work_ms)| {
        test(&format!("{}_{strategy}", level.name), move || {
            tokio::runtime::Runtime::new()
                .unwrap()
                .block_on(sell(level, level.strategy(strategy).unwrap(), work_ms));
        })
    });
    let others = [
        test(
            "a_port_that_is_taken_is_one_clear_line",
            a_port_that_is_taken_is_one_clear_line,
        ),
        test("the_services_alone", the_services_alone),
    ];
    sales.into_iter().chain(others).collect()
}

fn test(name: &str, run: impl FnOnce() + Send + 'static) -> Trial {
    Trial::ignorable_test(format!("containers::{name}"), || {
        if !has_images() {
            return Ok(Completion::ignored_with(
                "no images of the stand: infra/images/build.sh",
            ));
        }
        run();
        Ok(Completion::Completed)
    })
}

fn has_images() -> bool {
    env::var_os("OVERSOLD_LEVELS_IMAGE").is_some()
}

/// A stand in containers. It is removed when it is dropped.
struct Stand {
    project: String,
    nginx: u16,
    prometheus: u16,
    token: &'static str,
    work_ms: u32,
}

impl Stand {
    fn new(level: &str, strategy: &str) -> Self {
        Self {
            project: format!("oversold-stand-{level}-{strategy}"),
            nginx: free_port().unwrap(),
            prometheus: free_port().unwrap(),
            token: "a-token-of-this-test",
            work_ms: 0,
        }
    }

    fn up(level: &str, strategy: &str, work_ms: u32) -> Self {
        let mut stand = Self::new(level, strategy);
        stand.work_ms = work_ms;
        let output = stand.run("infra/stand/compose.sh", &["up", level], strategy);
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        stand
    }

    fn run(&self, program: &str, arguments: &[&str], strategy: &str) -> Output {
        Command::new(repository().join(program))
            .args(arguments)
            .envs([
                ("COMPOSE_PROJECT_NAME", self.project.as_str()),
                ("STRATEGY", strategy),
                ("GRAFANA", "no"),
                // A ticket that comes back after the rush stays unsold.
                ("PAYMENT_BEHAVIOUR", "approve"),
                ("OVERSOLD_ADMIN_TOKEN", self.token),
                ("OVERSOLD_POSTGRES_PASSWORD", PASSWORD),
                ("WORK_MS", self.work_ms.to_string().as_str()),
                ("OVERSOLD_NGINX_PORT", self.nginx.to_string().as_str()),
                ("OVERSOLD_PROMETHEUS_PORT", self.prometheus.to_string().as_str()),
            ])
            .output()
            .unwrap()
    }

    /// The code that the container of a service has exited with. `None`: it runs.
    fn exit_code(&self, service: &str) -> Option<i32> {
        let state = docker(&[
            "inspect",
            "--format",
            "{{.State.Running}} {{.State.ExitCode}}",
            &self.container(service),
        ]);
        let (running, code) = state.trim().split_once(' ').unwrap();
        (running == "false").then(|| code.parse().unwrap())
    }

    fn container(&self, service: &str) -> String {
        let service = format!("label=com.docker.compose.service={service}");
        self.list(&["ps", "--all", "--filter", &service]).trim().to_owned()
    }

    /// The ids of what this project has of a kind: `ps --all`, `volume ls`.
    fn list(&self, kind: &[&str]) -> String {
        let project = format!("label=com.docker.compose.project={}", self.project);
        docker(&[kind, &["--quiet", "--filter", &project]].concat())
    }

    /// Runs `clean`, which leaves no volume.
    fn clean(&self) {
        let clean = self.run("infra/stand/compose.sh", &["clean"], "");
        assert!(clean.status.success(), "{}", String::from_utf8_lossy(&clean.stderr));
        assert_eq!(self.list(&["volume", "ls"]), "", "volumes stay");
    }

    /// Where the container of a service is in the stand's network, which this machine reaches although nothing is published.
    fn address(&self, service: &str) -> IpAddr {
        let addresses = "{{range .NetworkSettings.Networks}}{{.IPAddress}}{{end}}";
        let address = docker(&["inspect", "--format", addresses, &self.container(service)]);
        address.trim().parse().unwrap()
    }

    /// The rows of the sale and the ledger of its payments, beside what the buyers were told.
    async fn judge(&self, level: &Level, strategy: &Strategy, requests: Vec<Request>, faults: Vec<Fault>) -> Verdict {
        let connect = PgConnectOptions::new()
            .host(&self.address("postgres").to_string())
            .username("oversold")
            .password(PASSWORD)
            .database(&format!("{}-{}", level.name, strategy.name));
        let database = PgPool::connect_with(connect).await.unwrap();
        let payments = match strategy.improvements.contains(&Improvement::Saga) {
            true => {
                payments::wait_until_settled(&database, PATIENCE).await.unwrap();
                let service = (self.address("payment-service"), 8080).into();
                Some(payments::ledger(service).await.unwrap())
            }
            false => None,
        };
        let sold = final_state::read(&database, SALE).await.unwrap();
        database.close().await;
        judge(&History {
            header: Header {
                version: FORMAT_VERSION,
                strategy: format!("{}/{}", level.name, strategy.name),
                sale: SALE,
                capacity: CAPACITY as u64,
                deadline_us: PATIENCE.as_micros() as Micros,
                expiry_us: None,
                stock: Some(sold.stock),
            },
            requests,
            rows: Some(sold.rows),
            faults,
            payments,
            decisions: sold.decisions,
        })
    }
}

impl Drop for Stand {
    fn drop(&mut self) {
        self.run("infra/stand/compose.sh", &["clean"], "");
    }
}

fn a_port_that_is_taken_is_one_clear_line() {
    let taken = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let port = taken.local_addr().unwrap().port();
    let mut stand = Stand::new("lv1", "check-then-insert");
    stand.nginx = port;
    let output = stand.run("infra/stand/compose.sh", &["up", "lv1"], "check-then-insert");
    assert_taken(port, &output);
}

/// The last line says that this port is taken.
fn assert_taken(port: u16, output: &Output) {
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(3), "{said}");
    let last = said.trim_end().lines().next_back().unwrap();
    assert!(last.starts_with(&format!("stand: port {port} is taken.")), "{said}");
}

fn docker(arguments: &[&str]) -> String {
    let output = Command::new("docker").args(arguments).output().unwrap();
    assert!(
        output.status.success(),
        "docker {arguments:?}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8(output.stdout).unwrap()
}

async fn sell(level: &'static Level, strategy: &'static Strategy, work_ms: Option<u32>) {
    let stand = Stand::up(level.name, strategy.name, work_ms.unwrap_or_default());
    let address: SocketAddr = (Ipv4Addr::LOCALHOST, stand.nginx).into();
    let prometheus: SocketAddr = (Ipv4Addr::LOCALHOST, stand.prometheus).into();
    let sale = serde_json::to_vec(&api::NewSale {
        name: "the last tickets".to_owned(),
        capacity: CAPACITY as i64,
    });
    let opening = HttpRequest::put(format!("/api/sales/{SALE}"))
        .header("content-type", "application/json")
        .header("authorization", format!("Bearer {}", stand.token))
        .body(sale.unwrap().into())
        .unwrap();
    let opened = Connection::open(address).await.unwrap().send(opening).await.unwrap();
    assert_eq!(opened.status.as_u16(), 201);
    let watched = || value_of(prometheus, r#"sum(up{job="oversold"})"#);
    until("Prometheus to see three instances", async || {
        watched().await == Some(3.0)
    })
    .await;

    // Looked up before the rush: that takes as long as many a buyer waits.
    let instances = [1, 2, 3].map(|number| stand.container(&format!("{}-{number}", level.name)));
    let gate = Arc::new(Barrier::new(BUYERS as usize + 1));
    let finished = Arc::new(AtomicUsize::new(0));
    let (told, mut heard) = unbounded_channel();
    let started_us = now_monotonic_us();
    let mut buyers = JoinSet::new();
    for buyer in 1..=BUYERS {
        let (gate, finished, told) = (Arc::clone(&gate), Arc::clone(&finished), told.clone());
        buyers.spawn(async move {
            let mut connection = Connection::open(address).await.unwrap();
            gate.wait().await;
            let requests = buy(&mut connection, address, buyer, started_us, &told).await;
            finished.fetch_add(1, Ordering::Relaxed);
            requests
        });
    }
    gate.wait().await;
    let mut faults = vec![];
    if work_ms.is_some() {
        for _ in 0..CAPACITY / 5 {
            heard.recv().await.unwrap();
        }
        for (number, signal) in [(2, "KILL"), (3, "TERM")] {
            docker(&["kill", "--signal", signal, &instances[number - 1]]);
            faults.push(Fault {
                fault: format!("SIG{signal} to instance {number}"),
                struck_us: now_monotonic_us() - started_us,
                healed_us: None,
            });
        }
        let left = BUYERS as usize - finished.load(Ordering::Relaxed);
        assert!(left > 0, "the fault did not strike: everybody had an answer");
    }
    let requests: Vec<Request> = buyers.join_all().await.into_iter().flatten().collect();
    if work_ms.is_some() {
        until("two instances to be gone", async || {
            let codes = ["2", "3"].map(|number| stand.exit_code(&format!("{}-{number}", level.name)));
            assert!(matches!(codes[0], None | Some(137)), "not killed: {codes:?}");
            assert!(matches!(codes[1], None | Some(0)), "not drained: {codes:?}");
            codes == [Some(137), Some(0)]
        })
        .await;
    }
    let sold = requests.iter().filter(|request| has_ticket(&request.answer)).count();
    let verdict = stand.judge(level, strategy, requests, faults).await;
    println!("{}/{}: {verdict}", level.name, strategy.name);
    let promises = strategy.guarantee.multi_instance;
    assert_eq!(verdict.conclude(&promises), Conclusion::AsPromised, "{verdict}");
    let oversells = promises
        .those(Promise::Breaks)
        .any(|broken| broken == Invariant::NoOversell);
    match oversells {
        true => assert!(sold > CAPACITY, "{sold} sold of {CAPACITY}"),
        false => assert_eq!(sold, CAPACITY),
    }
    let out = r#"max(sum by (instance) (oversold_sale_reservations{status="confirmed"}))"#;
    until("Prometheus to know what was sold", async || {
        value_of(prometheus, out).await == Some(sold as f64)
    })
    .await;
    let firing = r#"count(ALERTS{alertname="Oversold",alertstate="firing"})"#;
    let alarmed = || value_of(prometheus, firing);
    if oversells {
        until("the alert to fire", async || alarmed().await == Some(1.0)).await;
    } else {
        assert_eq!(alarmed().await, None, "an alert about a sale that is right");
    }
    if strategy.name == "mutex" {
        a_rush_from_the_live_page_goes_through_nginx(&stand, address).await;
    }

    let down = stand.run("infra/stand/compose.sh", &["down"], strategy.name);
    assert!(down.status.success(), "{}", String::from_utf8_lossy(&down.stderr));
    assert_eq!(stand.list(&["ps", "--all"]), "", "containers stay");
    assert_eq!(stand.list(&["network", "ls"]), "", "a network stays");
    assert_ne!(stand.list(&["volume", "ls"]), "", "`down` keeps the volumes");
    stand.clean();
}

/// One instance alone does not oversell with a mutex: the buyers of the live page have come to several.
async fn a_rush_from_the_live_page_goes_through_nginx(stand: &Stand, address: SocketAddr) {
    let rush = HttpRequest::post("/live/rush")
        .header("content-type", "application/json")
        .header("authorization", format!("Bearer {}", stand.token))
        .body(format!(r#"{{"buyers": {BUYERS}, "clicks": 1, "capacity": {CAPACITY}}}"#).into())
        .unwrap();
    let progress = Connection::open(address).await.unwrap().send(rush).await.unwrap();
    let progress = String::from_utf8(progress.body.to_vec()).unwrap();
    let last: Value = serde_json::from_str(progress.lines().next_back().unwrap()).unwrap();
    assert_eq!(
        (&last["ended"], &last["error"]),
        (&Value::Bool(true), &Value::Null),
        "{last}"
    );
    assert!(last["confirmed"].as_u64() > Some(CAPACITY as u64), "{last}");
}

/// `up` without a level, the same where a port is taken, and `clean`.
fn the_services_alone() {
    let stand = Stand::new("the-services", "alone");
    let ports =
        ["POSTGRES", "REDIS", "KAFKA"].map(|service| (format!("OVERSOLD_{service}_PORT"), free_port().unwrap()));
    let up = |ports: &[(String, u16)]| {
        Command::new(repository().join("infra/stand/compose.sh"))
            .arg("up")
            .env("COMPOSE_PROJECT_NAME", &stand.project)
            .envs(ports.iter().map(|(name, port)| (name, port.to_string())))
            .output()
            .unwrap()
    };
    let output = up(&ports);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let said = String::from_utf8(output.stdout).unwrap();
    for ((_, port), variable) in ports
        .iter()
        .zip(["DATABASE_URL", "REDIS_URL", "KAFKA_BOOTSTRAP_SERVERS"])
    {
        let line = said
            .lines()
            .find(|line| line.starts_with(&format!("export {variable}=")));
        assert!(line.unwrap().contains(&format!("127.0.0.1:{port}")), "{said}");
    }
    stand.clean();

    let taken = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let port = taken.local_addr().unwrap().port();
    let output = up(&[ports[0].clone(), (ports[1].0.clone(), port), ports[2].clone()]);
    assert_taken(port, &output);
}

fn has_ticket(answer: &Answer) -> bool {
    match answer {
        Answer::Confirmed { .. } => true,
        Answer::Accepted { ending, .. } => ending.as_ref().is_some_and(|ending| ending.refused.is_none()),
        _ => false,
    }
}

/// Buys until the answer is final. Returns every request.
///
/// Every one of them is an answer of the API: nginx shows nothing of its own. `told` hears of each.
async fn buy(
    connection: &mut Connection,
    address: SocketAddr,
    buyer: BuyerId,
    started_us: Micros,
    told: &UnboundedSender<()>,
) -> Vec<Request> {
    let deadline = tokio::time::Instant::now() + PATIENCE;
    let key = format!("buyer-{buyer}");
    let order = serde_json::to_vec(&api::NewReservation {
        buyer_id: buyer,
        priority: Priority::Normal,
    })
    .unwrap();
    let mut requests = vec![];
    loop {
        assert!(
            tokio::time::Instant::now() < deadline,
            "buyer {buyer} has no final answer"
        );
        let number = buyer as u64 + requests.len() as u64 * 1_000_000;
        let request = HttpRequest::post(format!("/api/sales/{SALE}/reservations"))
            .header("content-type", "application/json")
            .header("idempotency-key", &key)
            .header("x-request-id", number.to_string())
            .body(order.clone().into())
            .unwrap();
        let mut sent = Request {
            request: number,
            buyer,
            key: key.clone(),
            sent_us: now_monotonic_us() - started_us,
            answered_us: None,
            answer: Answer::Indeterminate,
            steps: vec![],
        };
        let Ok(answered) = connection.send(request).await else {
            requests.push(sent);
            *connection = Connection::open(address).await.unwrap();
            continue;
        };
        sent.answered_us = Some(now_monotonic_us() - started_us);
        // Nobody listens where nobody is killed.
        let _ = told.send(());
        sent.answer = match classify(&answered) {
            Classified::Final(answer) => answer,
            Classified::Accepted { reservation, location } => {
                let refused = ending(address, &location).await;
                Answer::Accepted {
                    reservation,
                    ending: refused.map(|refused| Ending {
                        at_us: now_monotonic_us() - started_us,
                        refused,
                        changed_to: None,
                    }),
                }
            }
        };
        assert!(!matches!(sent.answer, Answer::Unexpected { .. }), "{sent:?}");
        let indeterminate = sent.answer == Answer::Indeterminate;
        requests.push(sent);
        if !indeterminate {
            return requests;
        }
        assert!(answered.headers.contains_key("retry-after"));
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
}

/// How an accepted order ended: the reason of a refusal, or that it has a ticket. `None`: it takes too long.
async fn ending(address: SocketAddr, path: &str) -> Option<Option<Refused>> {
    for _ in 0..PATIENCE.as_millis() / 200 {
        let request = HttpRequest::get(path).body(Vec::<u8>::new().into()).unwrap();
        let answered = async { Connection::open(address).await?.send(request).await };
        if let Ok(answered) = answered.await
            && let Some(refused) = ended(&answered)
        {
            return Some(refused);
        }
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
    None
}
