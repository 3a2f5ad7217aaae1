//! The rules, and a real Prometheus that watches one server of each level during a rush.

use std::{
    collections::BTreeSet,
    net::{Ipv4Addr, SocketAddr},
    num::NonZeroU32,
    process::{Child, Command, Stdio},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use box_office::{Improvements, Level, Priority, Strategy, api};
use harness::{
    backends::{Prometheus, PrometheusSettings, TestEnvironment, free_port, on_system_path, reaper},
    payments::PaymentService,
    rush::{Connection, Program, Rush, Servers},
    until,
};
use http_body_util::Full;
use hyper::Request;
use regex::Regex;
use serde_json::Value;
use tokio::task::JoinSet;

use crate::{
    NODE_EXPORTER, POSTGRES_EXPORTER, PROMETHEUS, PROMTOOL, REDIS_EXPORTER, files::dashboard_expressions, stand,
};

pub(crate) fn the_rules_and_their_tests_are_valid() {
    let promtool = |arguments: &[&str]| {
        let output = Command::new(on_system_path(PROMTOOL).unwrap())
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
        let mut command = reaper::command(on_system_path(name).unwrap()).unwrap();
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

/// What the API of a Prometheus answers; null while it does not listen.
async fn api_of(prometheus: SocketAddr, path: &str) -> Value {
    let asked = async {
        let mut connection = Connection::open(prometheus).await?;
        let answered = connection.send(Request::get(path).body(Full::default())?).await?;
        anyhow::Ok(serde_json::from_slice(&answered.body)?)
    };
    asked.await.unwrap_or(Value::Null)
}

/// The series that an expression returns, over the last minutes.
async fn series(prometheus: SocketAddr, expression: &str) -> Vec<Value> {
    let expression = percent_encoded(&expression.replace("$__rate_interval", "10s"));
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs();
    let path = format!(
        "/api/v1/query_range?step=2&start={}&end={now}&query={expression}",
        now - 180
    );
    let answer = api_of(prometheus, &path).await;
    assert_eq!(answer["status"], "success", "{answer}");
    answer["data"]["result"].as_array().unwrap().clone()
}

/// The value of an expression now, if it has one.
pub(crate) async fn value_of(prometheus: SocketAddr, expression: &str) -> Option<f64> {
    let path = format!("/api/v1/query?query={}", percent_encoded(expression));
    let answer = api_of(prometheus, &path).await;
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
                let request = Request::post(format!("/api/sales/{sale}/reservations"))
                    .header("content-type", "application/json")
                    .body(order.into())
                    .unwrap();
                let mut connection = Connection::open(address).await.unwrap();
                let answered = connection.send(request).await.unwrap();
                assert!(answered.status.as_u16() != 500, "{}", answered.status);
            });
        }
    }
}

pub(crate) async fn every_expression_returns_data_after_a_rush() {
    let payments = Program::new(env!("CARGO_BIN_EXE_oversold"))
        .argument("payment-service")
        .argument("--behave")
        .argument("approve=5,decline=3,take-late=2");
    let payments = PaymentService::start(&payments).await.unwrap();
    let improvements = Improvements {
        payment_url: Some(payments.url().parse().unwrap()),
        order_ttl: Some(Duration::from_secs(30)),
        circuit_breaker: true,
        order_priority: NonZeroU32::new(4),
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
    let [node, postgres, redis] = [(); 3].map(|()| SocketAddr::from((Ipv4Addr::LOCALHOST, free_port().unwrap())));
    let variables = watched[2].environment.variables();
    let url = |name: &str| variables.iter().find(|(found, _)| *found == name).unwrap().1.clone();
    let listen = |address: SocketAddr| vec![format!("--web.listen-address={address}")];
    let _exporters = [
        Running::start(NODE_EXPORTER, &listen(node), &[]),
        Running::start(
            POSTGRES_EXPORTER,
            &listen(postgres),
            &[("DATA_SOURCE_NAME", for_exporter(&url("DATABASE_URL")))],
        ),
        Running::start(REDIS_EXPORTER, &listen(redis), &[("REDIS_ADDR", url("REDIS_URL"))]),
    ];
    let settings = PrometheusSettings {
        executable: on_system_path(PROMETHEUS).unwrap(),
        configuration: stand().join("prometheus"),
        port: None,
    };
    let targets = [
        ("oversold", watched.iter().map(Watched::address).collect()),
        ("node", vec![node]),
        ("postgres", vec![postgres]),
        ("redis", vec![redis]),
    ];
    let running = Prometheus::start(&settings, &targets).await.unwrap();
    let prometheus = running.address();
    until("every target to be up", async || {
        value_of(prometheus, "sum(up)").await == Some(7.0)
    })
    .await;

    let mut buyers = JoinSet::new();
    watched.iter().for_each(|it| it.buyers(&mut buyers));
    while let Some(bought) = buyers.join_next().await {
        bought.unwrap();
    }
    // LV.1 oversells, and it alone.
    let sales = async || {
        let alerts = api_of(prometheus, "/api/v1/alerts").await;
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
        value_of(prometheus, paid).await > Some(20.0)
    })
    .await;

    let mut silent = vec![];
    for (panel, expression) in dashboard_expressions() {
        if series(prometheus, &expression).await.is_empty() {
            silent.push(format!("{panel}: {expression}"));
        }
    }
    // A series that appears with a value has lost the increase to it. After a short rush that is all
    // of it, and its panel is flat.
    let reserve = r#"method="POST",route="/api/sales/{id}/reservations""#;
    for counted in [
        "oversold_reservations_total".to_owned(),
        "oversold_step_seconds_count".to_owned(),
        format!("oversold_http_request_duration_seconds_count{{{reserve}}}"),
    ] {
        let from_zero = format!("min_over_time({counted}[10m]) == 0 and {counted} > 0");
        if series(prometheus, &from_zero).await.is_empty() {
            silent.push(from_zero);
        }
        for late in series(prometheus, &format!("min_over_time({counted}[10m]) > 0")).await {
            silent.push(format!("the first increase of {}", late["metric"]));
        }
    }
    // An alert returns data only while it fires: what it reads has to be there.
    let rules = api_of(prometheus, "/api/v1/rules").await;
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
            if series(prometheus, metric.as_str()).await.is_empty() {
                silent.push(format!("alert {}: {}", rule["name"], metric.as_str()));
            }
        }
    }
    assert!(alerts >= 8, "Prometheus has read {alerts} alerts");
    assert!(silent.is_empty(), "these return nothing:\n{}", silent.join("\n"));
    running.stop().await.unwrap();
    for it in watched {
        it.servers.stop().await.unwrap();
    }
}
