//! docker-compose.yml: each level comes up, a rush through nginx sells what its strategy promises, and nothing but volumes stays.
//!
//! It needs a Docker engine, Compose and the images of the stand, by name: `eval "$(infra/images/build.sh …)"` builds and names them.

use std::{
    env,
    net::{Ipv4Addr, SocketAddr, TcpListener},
    process::{Command, Output},
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use box_office::{Priority, api};
use harness::{backends::free_port, rush::Connection, until};
use hyper::Request;
use libtest_mimic::{Completion, Trial};
use tokio::{
    sync::{
        Barrier,
        mpsc::{UnboundedSender, unbounded_channel},
    },
    task::JoinSet,
};

use crate::{prometheus::value_of, repository};

const BUYERS: i64 = 1000;
const CAPACITY: usize = 100;

/// How a rush through nginx ends.
#[derive(Clone, Copy)]
enum Promise {
    /// More are told that they have a ticket than there are.
    Oversells,
    /// As many as there are.
    SellsOut,
}

/// The strategies that are tried. Of those with a number, an instance is killed and another one drained in mid-rush; it is the simulated
/// work of a transaction in milliseconds, so that buyers still wait then.
const STANDS: [(&str, &str, Promise, Option<u32>); 6] = [
    ("lv1", "read-then-write", Promise::Oversells, None),
    ("lv2", "mutex", Promise::Oversells, None),
    ("lv2", "pessimistic", Promise::SellsOut, Some(2)),
    ("lv3", "rlock", Promise::SellsOut, None),
    ("lv4", "locked", Promise::SellsOut, None),
    // A transaction of many orders, none of which is decided before it ends.
    ("lv4", "single-writer", Promise::SellsOut, Some(1000)),
];

pub(crate) fn tests() -> Vec<Trial> {
    let tests = STANDS.map(|(level, strategy, promise, faults)| {
        Trial::ignorable_test(format!("containers::{level}_{strategy}"), move || {
            if !has_images() {
                return Ok(no_images());
            }
            tokio::runtime::Runtime::new()
                .unwrap()
                .block_on(sell(level, strategy, promise, faults));
            Ok(Completion::Completed)
        })
    });
    let taken = Trial::ignorable_test("containers::a_port_that_is_taken_is_one_clear_line", || {
        if !has_images() {
            return Ok(no_images());
        }
        a_port_that_is_taken_is_one_clear_line();
        Ok(Completion::Completed)
    });
    tests.into_iter().chain([taken]).collect()
}

fn no_images() -> Completion {
    Completion::ignored_with("no images of the stand: infra/images/build.sh")
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
                ("OVERSOLD_POSTGRES_PASSWORD", "a-password-of-this-test"),
                ("WORK_MS", self.work_ms.to_string().as_str()),
                ("OVERSOLD_NGINX_PORT", self.nginx.to_string().as_str()),
                ("OVERSOLD_PROMETHEUS_PORT", self.prometheus.to_string().as_str()),
            ])
            .output()
            .unwrap()
    }

    /// Sends a signal to the container of a service.
    fn signal(&self, service: &str, signal: &str) {
        docker(&["kill", "--signal", signal, &self.container(service)]);
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
        let (service, project) = (
            format!("label=com.docker.compose.service={service}"),
            format!("label=com.docker.compose.project={}", self.project),
        );
        let id = docker(&["ps", "--all", "--quiet", "--filter", &service, "--filter", &project]);
        id.trim().to_owned()
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

async fn sell(level: &'static str, strategy: &'static str, promise: Promise, faults: Option<u32>) {
    let stand = Stand::up(level, strategy, faults.unwrap_or_default());
    let address: SocketAddr = (Ipv4Addr::LOCALHOST, stand.nginx).into();
    let prometheus: SocketAddr = (Ipv4Addr::LOCALHOST, stand.prometheus).into();
    let sale = serde_json::to_vec(&api::NewSale {
        name: "the last tickets".to_owned(),
        capacity: CAPACITY as i64,
    });
    let opening = Request::put("/api/sales/1")
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

    let gate = Arc::new(Barrier::new(BUYERS as usize + 1));
    let answers = Arc::new(AtomicUsize::new(0));
    let (told, mut heard) = unbounded_channel();
    let mut buyers = JoinSet::new();
    for buyer in 0..BUYERS {
        let (gate, answers, told) = (Arc::clone(&gate), Arc::clone(&answers), told.clone());
        buyers.spawn(async move {
            let mut connection = Connection::open(address).await.unwrap();
            gate.wait().await;
            let has_ticket = buy(&mut connection, address, buyer, &told).await;
            answers.fetch_add(1, Ordering::Relaxed);
            has_ticket
        });
    }
    gate.wait().await;
    if faults.is_some() {
        for _ in 0..BUYERS / 10 {
            heard.recv().await.unwrap();
        }
        stand.signal(&format!("{level}-2"), "KILL");
        stand.signal(&format!("{level}-3"), "TERM");
        let left = BUYERS as usize - answers.load(Ordering::Relaxed);
        assert!(left > 0, "the fault did not strike: everybody had an answer");
    }
    let mut sold = 0;
    while let Some(has_ticket) = buyers.join_next().await {
        sold += usize::from(has_ticket.unwrap());
    }
    if faults.is_some() {
        until("two instances to be gone", async || {
            let codes = ["2", "3"].map(|number| stand.exit_code(&format!("{level}-{number}")));
            assert!(matches!(codes[0], None | Some(137)), "not killed: {codes:?}");
            assert!(matches!(codes[1], None | Some(0)), "not drained: {codes:?}");
            codes == [Some(137), Some(0)]
        })
        .await;
    }
    match promise {
        Promise::Oversells => assert!(sold > CAPACITY, "{level}/{strategy} has sold {sold} of {CAPACITY}"),
        Promise::SellsOut => assert_eq!(sold, CAPACITY, "{level}/{strategy}"),
    }
    let out = r#"max(sum by (instance) (oversold_sale_reservations{status="confirmed"}))"#;
    until("Prometheus to know what was sold", async || {
        value_of(prometheus, out).await == Some(sold as f64)
    })
    .await;
    let firing = r#"count(ALERTS{alertname="Oversold",alertstate="firing"})"#;
    let alarmed = || value_of(prometheus, firing);
    match promise {
        Promise::Oversells => until("the alert to fire", async || alarmed().await == Some(1.0)).await,
        Promise::SellsOut => assert_eq!(alarmed().await, None, "an alert about a sale that is right"),
    }

    let down = stand.run("infra/stand/compose.sh", &["down"], strategy);
    assert!(down.status.success(), "{}", String::from_utf8_lossy(&down.stderr));
    let project = format!("label=com.docker.compose.project={}", stand.project);
    assert_eq!(
        docker(&["ps", "--all", "--quiet", "--filter", &project]),
        "",
        "containers stay"
    );
    assert_eq!(
        docker(&["network", "ls", "--quiet", "--filter", &project]),
        "",
        "a network stays"
    );
    assert_ne!(
        docker(&["volume", "ls", "--quiet", "--filter", &project]),
        "",
        "`down` keeps the volumes"
    );
    let clean = stand.run("infra/stand/compose.sh", &["clean"], strategy);
    assert!(clean.status.success(), "{}", String::from_utf8_lossy(&clean.stderr));
    assert_eq!(
        docker(&["volume", "ls", "--quiet", "--filter", &project]),
        "",
        "volumes stay"
    );
}

/// Buys until the answer is final. Returns whether the buyer has a ticket.
///
/// Every answer but a 503 is final or an order that was accepted, and every one is an answer of the API: nginx shows nothing of its own.
/// `told` hears of each.
async fn buy(connection: &mut Connection, address: SocketAddr, buyer: i64, told: &UnboundedSender<()>) -> bool {
    let deadline = tokio::time::Instant::now() + Duration::from_secs(60);
    let order = serde_json::to_vec(&api::NewReservation {
        buyer_id: buyer,
        priority: Priority::Normal,
    })
    .unwrap();
    loop {
        assert!(
            tokio::time::Instant::now() < deadline,
            "buyer {buyer} has no final answer"
        );
        let request = Request::post("/api/sales/1/reservations")
            .header("content-type", "application/json")
            .header("idempotency-key", format!("buyer-{buyer}"))
            .body(order.clone().into())
            .unwrap();
        let Ok(answered) = connection.send(request).await else {
            *connection = Connection::open(address).await.unwrap();
            continue;
        };
        // Nobody listens where nobody is killed.
        let _ = told.send(());
        match answered.status.as_u16() {
            201 => return true,
            409 => return false,
            202 => {
                let path = answered.headers["location"].to_str().unwrap().to_owned();
                if let Some(has_ticket) = outcome(address, &path).await {
                    return has_ticket;
                }
            }
            503 => {
                assert!(answered.headers.contains_key("retry-after"));
                tokio::time::sleep(Duration::from_millis(200)).await;
            }
            status => panic!("{status}: {}", String::from_utf8_lossy(&answered.body)),
        }
    }
}

/// The final state of an accepted order: whether it has a ticket. `None`: it takes too long.
async fn outcome(address: SocketAddr, path: &str) -> Option<bool> {
    for _ in 0..300 {
        let request = Request::get(path).body(Vec::<u8>::new().into()).unwrap();
        let answered = async { Connection::open(address).await?.send(request).await };
        if let Ok(answered) = answered.await
            && let Ok(reservation) = serde_json::from_slice::<api::Reservation>(&answered.body)
        {
            match reservation.status.as_str() {
                "confirmed" => return Some(true),
                "accepted" | "held" => {}
                _ => return Some(false),
            }
        }
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
    None
}
