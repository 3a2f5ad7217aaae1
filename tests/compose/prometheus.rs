//! The rules, and a real Prometheus that watches one server of each level during a rush.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    net::{Ipv4Addr, SocketAddr},
    process::{Child, Command, Stdio},
    time::Duration,
};

use box_office::{Improvements, Level, Priority, Strategy, api};
use harness::{
    backends::TestEnvironment,
    payments::PaymentService,
    rush::{Program, Rush, Servers},
    until,
};
use regex::Regex;
use serde_json::Value;
use tempfile::TempDir;
use tokio::task::JoinSet;

use crate::{
    NODE_EXPORTER, POSTGRES_EXPORTER, PROMETHEUS, PROMTOOL, REDIS_EXPORTER,
    files::dashboard_expressions,
    http::{ask, free_port},
    program, stand,
};

pub(crate) fn the_rules_and_their_tests_are_valid() {
    let promtool = |arguments: &[&str]| {
        let output = Command::new(program(PROMTOOL).unwrap())
            .args(arguments)
            .current_dir(stand().join("prometheus"))
            .output()
            .unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(
            output.status.success(),
            "{}{said}",
            String::from_utf8_lossy(&output.stdout)
        );
    };
    promtool(&["check", "config", "prometheus.yml"]);
    promtool(&["test", "rules", "tests/oversold.yml"]);
}

/// A process that ends when this is dropped.
struct Running(Child);

impl Running {
    fn start(name: &str, arguments: &[String], variables: &[(&str, String)]) -> Self {
        let mut command = Command::new(program(name).unwrap());
        command
            .args(arguments)
            .envs(variables.iter().map(|(name, value)| (name, value)));
        Self(
            command
                .stdout(Stdio::null())
                .stderr(Stdio::null())
                .stdin(Stdio::null())
                .spawn()
                .unwrap(),
        )
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A running Prometheus with the stand's configuration.
struct Prometheus {
    port: u16,
    _folder: TempDir,
    _process: Running,
}

impl Prometheus {
    /// `targets` are the addresses of each job.
    fn start(targets: &BTreeMap<&str, Vec<String>>) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let copy = |name: &str| {
            let (from, to) = (stand().join("prometheus").join(name), folder.path().join(name));
            fs::create_dir_all(to.parent().unwrap()).unwrap();
            fs::copy(from, to).unwrap();
        };
        copy("prometheus.yml");
        copy("rules/oversold.yml");
        fs::create_dir(folder.path().join("targets")).unwrap();
        let groups: Vec<Value> = targets
            .iter()
            .map(|(job, addresses)| serde_json::json!({ "targets": addresses, "labels": { "job": job } }))
            .collect();
        // JSON is YAML.
        fs::write(
            folder.path().join("targets/test.yml"),
            serde_json::to_string(&groups).unwrap(),
        )
        .unwrap();
        let port = free_port();
        let arguments = [
            format!("--config.file={}", folder.path().join("prometheus.yml").display()),
            format!("--storage.tsdb.path={}", folder.path().join("data").display()),
            format!("--web.listen-address=127.0.0.1:{port}"),
        ];
        Self {
            port,
            _process: Running::start(PROMETHEUS, &arguments, &[]),
            _folder: folder,
        }
    }

    /// What the API answers; null while it does not listen.
    fn api(&self, path: &str) -> Value {
        api_of(self.port, path)
    }

    /// The series that an expression returns, over the last minutes.
    fn series(&self, expression: &str) -> Vec<Value> {
        let expression = percent_encoded(&expression.replace("$__rate_interval", "10s"));
        let now = std::time::SystemTime::now()
            .duration_since(std::time::UNIX_EPOCH)
            .unwrap()
            .as_secs();
        let answer = self.api(&format!(
            "/api/v1/query_range?step=2&start={}&end={now}&query={expression}",
            now - 180
        ));
        assert_eq!(answer["status"], "success", "{answer}");
        answer["data"]["result"].as_array().unwrap().clone()
    }

    /// The value of an expression now, if it has one.
    fn value(&self, expression: &str) -> Option<f64> {
        value_of(self.port, expression)
    }
}

pub(crate) fn api_of(port: u16, path: &str) -> Value {
    if std::net::TcpStream::connect((Ipv4Addr::LOCALHOST, port)).is_err() {
        return Value::Null;
    }
    let body = ask(port, "GET", path, &[]).body;
    // The body may come in chunks.
    let json = &body[body.find('{').unwrap_or(0)..body.rfind('}').map_or(0, |end| end + 1)];
    let json = Regex::new(r"\r\n[0-9a-f]+\r\n").unwrap().replace_all(json, "");
    serde_json::from_str(&json).unwrap_or(Value::Null)
}

/// The value of an expression now, if it has one.
pub(crate) fn value_of(port: u16, expression: &str) -> Option<f64> {
    let answer = api_of(port, &format!("/api/v1/query?query={}", percent_encoded(expression)));
    answer["data"]["result"][0]["value"][1].as_str()?.parse().ok()
}

/// The URL for the exporter's client, which takes none of sqlx's parameters, and insists on TLS.
fn for_exporter(url: &str) -> String {
    let address = url.split('?').next().unwrap_or(url);
    format!("{address}?sslmode=disable")
}

fn percent_encoded(text: &str) -> String {
    let encoded = text.bytes().map(|byte| match byte {
        b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' => char::from(byte).to_string(),
        byte => format!("%{byte:02X}"),
    });
    encoded.collect()
}

/// A server of a level, and the sale that it is asked for.
struct Watched {
    servers: Servers,
    environment: TestEnvironment,
    sale: i64,
}

impl Watched {
    async fn start(level: &'static Level, strategy: &str, sale: i64, improvements: Improvements) -> Self {
        let strategy: &Strategy = level.strategy(strategy).unwrap();
        let environment = TestEnvironment::shared(strategy).await.unwrap();
        let program = Program::new(env!("CARGO_BIN_EXE_oversold"))
            .argument("serve")
            .argument(level.name);
        let rush = Rush {
            improvements,
            ..Rush::default()
        };
        let servers = Servers::start(&rush, &environment, &program, level, strategy)
            .await
            .unwrap();
        servers.open_sale(sale, 100).await.unwrap();
        Self {
            servers,
            environment,
            sale,
        }
    }

    fn address(&self) -> SocketAddr {
        self.servers.live().borrow()[0]
    }

    /// Buyers who come for a while, so that Prometheus sees them.
    fn buyers(&self, buyers: &mut JoinSet<()>) {
        const BUYERS: i64 = 300;

        let (address, sale) = (self.address(), self.sale);
        for buyer in 0..BUYERS {
            buyers.spawn(async move {
                // Ten seconds, in waves that overlap.
                tokio::time::sleep(Duration::from_millis(250 * (buyer as u64 / 8))).await;
                let order = serde_json::to_vec(&api::NewReservation {
                    buyer_id: buyer,
                    priority: Priority::Normal,
                })
                .unwrap();
                let request = hyper::Request::post(format!("/api/sales/{sale}/reservations"))
                    .header("content-type", "application/json")
                    .body(order.into())
                    .unwrap();
                let mut connection = harness::rush::Connection::open(address).await.unwrap();
                let answered = connection.send(request).await.unwrap();
                assert!(answered.status.as_u16() != 500, "{}", answered.status);
            });
        }
    }
}

pub(crate) fn every_expression_returns_data_after_a_rush() {
    tokio::runtime::Runtime::new().unwrap().block_on(watch_a_rush());
}

async fn watch_a_rush() {
    let payments = Program::new(env!("CARGO_BIN_EXE_oversold"))
        .argument("payment-service")
        .argument("--behave")
        .argument("approve=5,decline=3,take-late=2");
    let payments = PaymentService::start(&payments).await.unwrap();
    let improvements = Improvements {
        payment_url: Some(payments.url().parse().unwrap()),
        order_ttl: Some(Duration::from_secs(30)),
        circuit_breaker: true,
        ..Improvements::default()
    };
    let watched = [
        Watched::start(
            &lv1_race_condition::LEVEL,
            "read-then-write",
            11,
            Improvements::default(),
        )
        .await,
        Watched::start(&lv2_db_lock::LEVEL, "pessimistic", 12, Improvements::default()).await,
        Watched::start(&lv3_redis_lock::LEVEL, "rlock", 13, Improvements::default()).await,
        Watched::start(&lv4_kafka::LEVEL, "single-writer", 14, improvements).await,
    ];
    let [node, postgres, redis] = [free_port(), free_port(), free_port()];
    let variables = watched[2].environment.variables();
    let url = |name: &str| variables.iter().find(|(found, _)| *found == name).unwrap().1.clone();
    let listen = |port: u16| vec![format!("--web.listen-address=127.0.0.1:{port}")];
    let _exporters = [
        Running::start(NODE_EXPORTER, &listen(node), &[]),
        Running::start(
            POSTGRES_EXPORTER,
            &listen(postgres),
            &[("DATA_SOURCE_NAME", for_exporter(&url("DATABASE_URL")))],
        ),
        Running::start(REDIS_EXPORTER, &listen(redis), &[("REDIS_ADDR", url("REDIS_URL"))]),
    ];
    let local = |port: &u16| format!("127.0.0.1:{port}");
    let prometheus = Prometheus::start(&BTreeMap::from([
        ("oversold", watched.iter().map(|it| it.address().to_string()).collect()),
        ("node", vec![local(&node)]),
        ("postgres", vec![local(&postgres)]),
        ("redis", vec![local(&redis)]),
    ]));
    until("every target to be up", async || {
        prometheus.value("sum(up)") == Some(7.0)
    })
    .await;

    let mut buyers = JoinSet::new();
    watched.iter().for_each(|it| it.buyers(&mut buyers));
    while let Some(bought) = buyers.join_next().await {
        bought.unwrap();
    }
    // LV.1 oversells, and it alone.
    let sales = async || {
        let alerts = prometheus.api("/api/v1/alerts");
        let alerts = alerts["data"]["alerts"].as_array().cloned().unwrap_or_default();
        let firing = alerts.iter().filter(|alert| alert["state"] == "firing");
        let sale = |alert: &Value| {
            let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
            (text(&alert["labels"]["alertname"]), text(&alert["labels"]["sale"]))
        };
        firing
            .map(sale)
            .filter(|(name, _)| name.ends_with("sold"))
            .collect::<BTreeSet<_>>()
    };
    let oversold = BTreeSet::from([("Oversold".to_owned(), "11".to_owned())]);
    until("LV.1's oversell to be noticed, and no other", async || {
        sales().await == oversold
    })
    .await;
    let paid = r#"oversold_sale_reservations{sale="14",status="confirmed"}"#;
    until("the orders of LV.4 to be paid for", async || {
        prometheus.value(paid) > Some(20.0)
    })
    .await;

    let mut silent = vec![];
    for (panel, expression) in dashboard_expressions() {
        if prometheus.series(&expression).is_empty() {
            silent.push(format!("{panel}: {expression}"));
        }
    }
    // An alert returns data only while it fires: what it reads has to be there.
    let rules = prometheus.api("/api/v1/rules");
    let metric = Regex::new(r"oversold_[a-z_]+").unwrap();
    let mut alerts = 0;
    for rule in rules["data"]["groups"]
        .as_array()
        .unwrap()
        .iter()
        .flat_map(|group| group["rules"].as_array().unwrap())
    {
        alerts += 1;
        for metric in metric.find_iter(rule["query"].as_str().unwrap()) {
            if prometheus.series(metric.as_str()).is_empty() {
                silent.push(format!("alert {}: {}", rule["name"], metric.as_str()));
            }
        }
    }
    assert!(alerts >= 8, "Prometheus has read {alerts} alerts");
    assert!(silent.is_empty(), "these return nothing:\n{}", silent.join("\n"));
    for it in watched {
        it.servers.stop().await.unwrap();
    }
}
