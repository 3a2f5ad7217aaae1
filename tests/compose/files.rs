//! What stands in the files of the stand, before anything runs.

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
};

use box_office::Level;
use regex::Regex;
use serde_json::Value;

use crate::{repository, stand};

fn read(path: impl AsRef<Path>) -> String {
    let path = path.as_ref();
    fs::read_to_string(path).unwrap_or_else(|why| panic!("{}: {why}", path.display()))
}

/// The files of a folder with this ending.
fn names(folder: impl AsRef<Path>, ending: &str) -> BTreeSet<PathBuf> {
    let folder = folder.as_ref();
    let entries = fs::read_dir(folder).unwrap_or_else(|why| panic!("{}: {why}", folder.display()));
    entries
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.extension().is_some_and(|found| found == ending))
        .collect()
}

fn all(pattern: &str, text: &str) -> BTreeSet<String> {
    let pattern = Regex::new(pattern).unwrap();
    pattern.captures_iter(text).map(|found| found[1].to_owned()).collect()
}

pub(crate) fn every_alert_has_a_page_and_a_test() {
    let rules = read(stand().join("prometheus/rules/oversold.yml"));
    let alerts = all(r"(?m)^ +- alert: (\w+)$", &rules);
    assert!(alerts.len() >= 8, "{alerts:?}");
    let tested = all(
        r"(?m)^ +- alertname: (\w+)$",
        &read(stand().join("prometheus/tests/oversold.yml")),
    );
    assert_eq!(alerts, tested, "alerts and those that are tested");
    assert_eq!(
        rules.matches("runbook_url:").count(),
        alerts.len(),
        "each alert has a page"
    );

    let linked = all(
        r"runbook_url: http://localhost:3000/stand/runbooks/([a-z-]+)\.html",
        &rules,
    );
    let pages = names(repository().join("book/src/stand/runbooks"), "md");
    let pages = pages
        .iter()
        .map(|page| page.file_stem().unwrap().to_str().unwrap().to_owned());
    assert_eq!(
        linked,
        pages.collect(),
        "pages that alerts link to, and those that there are"
    );
    for alert in &alerts {
        let page = all(&format!(r"alert: {alert}\n[\s\S]*?runbooks/([a-z-]+)\.html"), &rules);
        let page = read(repository().join(format!("book/src/stand/runbooks/{}.md", page.first().unwrap())));
        assert!(
            page.contains(&format!("`{alert}`")),
            "the page of {alert} does not name it"
        );
    }
}

/// Every expression of every dashboard, with the title of its panel.
pub(crate) fn dashboard_expressions() -> Vec<(String, String)> {
    let mut expressions = vec![];
    for file in names(stand().join("grafana/dashboards"), "json") {
        let dashboard: Value = serde_json::from_str(&read(&file)).unwrap();
        for panel in dashboard["panels"].as_array().unwrap() {
            let title = format!("{} / {}", dashboard["title"], panel["title"]);
            for target in panel["targets"].as_array().into_iter().flatten() {
                expressions.push((title.clone(), target["expr"].as_str().unwrap().to_owned()));
            }
        }
    }
    expressions
}

pub(crate) fn every_dashboard_is_complete() {
    let (mut uids, mut queries) = (BTreeSet::new(), 0);
    for file in names(stand().join("grafana/dashboards"), "json") {
        let dashboard: Value = serde_json::from_str(&read(&file)).unwrap();
        assert!(
            uids.insert(dashboard["uid"].as_str().unwrap().to_owned()),
            "two with the uid of {file:?}"
        );
        for panel in dashboard["panels"].as_array().unwrap() {
            let title = &panel["title"];
            if panel["type"] == "text" {
                continue;
            }
            assert!(
                !panel["description"].as_str().unwrap_or_default().is_empty(),
                "{title} explains nothing"
            );
            assert_eq!(panel["datasource"]["uid"], "prometheus", "{title}");
            let targets = panel["targets"].as_array().unwrap();
            assert!(!targets.is_empty(), "{title} shows nothing");
            queries += targets.len();
        }
    }
    assert_eq!((uids.len(), queries), (5, dashboard_expressions().len()));
    let provisioned = read(stand().join("grafana/provisioning/datasources/prometheus.yml"));
    assert!(
        provisioned.contains("uid: prometheus"),
        "the data source that the panels name"
    );
}

/// "Where buyers wait" shows a first rush only if the metric of each step was there before it.
pub(crate) fn every_step_is_in_the_table_of_its_level() {
    let levels: [&Level; 4] = [
        &lv1_race_condition::LEVEL,
        &lv2_db_lock::LEVEL,
        &lv3_redis_lock::LEVEL,
        &lv4_kafka::LEVEL,
    ];
    for level in levels {
        for strategy in level.strategies {
            let source = read(repository().join(level.source(strategy)));
            let reserve = match level.lag {
                None => source.as_str(),
                // The other steps in the file are those of consumers.
                Some(_) => {
                    let (_, from_reserve) = source.split_once("async fn reserve(").unwrap();
                    from_reserve.split_once("\n    }\n").unwrap().0
                }
            };
            let listed = strategy.steps.iter().map(|&step| step.to_owned());
            assert_eq!(
                listed.collect::<BTreeSet<_>>(),
                all(r#"\.at\("([^"]+)"\)"#, reserve),
                "the steps of {} in the table of {}, and in its source",
                strategy.name,
                level.name
            );
        }
    }
}

/// A target that Prometheus cannot find is down, and its panels are empty.
pub(crate) fn every_target_is_a_service() {
    let compose = read(repository().join("docker-compose.yml"));
    let services = all(r"(?m)^  ([a-z0-9-]+):(?: \{.*)?$", &compose);
    let aliases = all(r"aliases: \[([a-z0-9-]+)\]", &compose);
    let targets = all(
        r"([a-z][a-z0-9-]+):\d+",
        &read(stand().join("prometheus/targets/compose.yml")),
    );
    assert!(targets.len() >= 6, "{targets:?}");
    for target in targets {
        assert!(
            services.contains(&target) || aliases.contains(&target),
            "{target} is in no container"
        );
    }
    let exporters = services.iter().filter(|name| name.ends_with("-exporter"));
    let watched = read(stand().join("prometheus/targets/compose.yml"));
    for exporter in exporters {
        assert!(watched.contains(exporter.as_str()), "nobody reads {exporter}");
    }
}

pub(crate) fn compose_is_hardened() {
    let compose = read(repository().join("docker-compose.yml"));
    let ports = all(r#"ports: \["([^"]+)"\]"#, &compose);
    assert_eq!(ports.len(), compose.matches("ports:").count());
    assert_eq!(
        ports,
        BTreeSet::from(
            [
                "127.0.0.1:${OVERSOLD_GRAFANA_PORT:-3001}:3000",
                "127.0.0.1:${OVERSOLD_NGINX_PORT:-8080}:8080",
                "127.0.0.1:${OVERSOLD_PROMETHEUS_PORT:-9090}:9090",
            ]
            .map(str::to_owned)
        ),
        "only nginx, Prometheus and Grafana are published, and only here"
    );
    // A secret is a variable without a default.
    for secret in ["OVERSOLD_ADMIN_TOKEN", "OVERSOLD_POSTGRES_PASSWORD"] {
        let uses = compose.matches(&format!("${{{secret}")).count();
        assert_eq!(
            uses,
            compose.matches(&format!("${{{secret}:-}}")).count(),
            "{secret} has a default"
        );
        assert!(read(repository().join(".env.example")).contains(&format!("\n{secret}=\n")));
    }
    // A bound is inherited or the service's own; the images of the levels and of nginx have theirs in an anchor.
    let services = compose
        .split_once("\nservices:\n")
        .unwrap()
        .1
        .split_once("\nvolumes:\n")
        .unwrap()
        .0;
    let service = Regex::new(r"(?m)^  ([a-z0-9-]+):").unwrap();
    let starts: Vec<_> = service
        .captures_iter(services)
        .map(|found| found.get(0).unwrap().start())
        .collect();
    let ends = starts[1..].iter().copied().chain([services.len()]);
    for (start, end) in starts.iter().copied().zip(ends) {
        let text = &services[start..end];
        let inherits = ["*instance-", "*migrate", "*nginx", "*level"]
            .iter()
            .any(|anchor| text.contains(&format!("<<: {anchor}")));
        for bound in ["<<: *hardened", "mem_limit: ", "cpus: "] {
            assert!(inherits || text.contains(bound), "no `{bound}` in\n{text}");
        }
    }
    let writable = compose.matches("read_only: false").count();
    assert_eq!(writable, 1, "Kafka's image alone writes to its own folders");
    let pinned = Regex::new(r":-[^}]*:[^}]*\d[^}]*\}$").unwrap();
    for image in all(r"(?m)^ +image: (.+)$", &compose) {
        assert!(
            pinned.is_match(&image) || image.contains("oversold/levels"),
            "{image} has no version"
        );
    }
}
