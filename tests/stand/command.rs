//! The command `oversold stand`.

use std::{
    collections::BTreeMap,
    net::{SocketAddr, TcpListener},
    path::Path,
    process::{Command, Output, Stdio},
};

use harness::{
    rush::{Connection, HttpResponse},
    until,
};
use http_body_util::Full;
use hyper::{Method, Request, header};
use serde_json::Value;
use tempfile::tempdir;
use tokio::{
    io::{AsyncBufReadExt, BufReader},
    net::TcpStream,
};

/// What a rush on three instances sells.
#[derive(Clone, Copy)]
pub(crate) enum Sold {
    /// Every ticket once.
    AsMany,
    /// More tickets than there are, as the strategy declares.
    TooMany,
}

fn stand(arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_oversold"));
    command.arg("stand").args(arguments);
    command
}

fn said(output: &Output) -> (String, String) {
    let text = |bytes: &[u8]| String::from_utf8(bytes.to_vec()).unwrap();
    (text(&output.stdout), text(&output.stderr))
}

pub(crate) fn a_rush_through_nginx_is_judged(name: &str, sold: Sold) {
    let output = stand(&[name, "--rush"]).output().unwrap();
    let (out, err) = said(&output);
    assert_eq!(output.status.code(), Some(0), "{out}\n{err}");
    assert!(out.contains("3 instance(s) behind nginx"), "{out}");
    assert!(out.contains("verdict: as promised"), "{out}");
    match sold {
        Sold::AsMany => assert!(out.contains("100 sold of 100, nothing broken"), "{out}"),
        Sold::TooMany => assert!(out.contains("BROKEN (I1"), "{out}"),
    }
}

pub(crate) fn a_port_that_is_taken_is_one_clear_line() {
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = taken.local_addr().unwrap().port().to_string();
    for flag in ["--nginx-port", "--prometheus-port"] {
        let output = stand(&["lv1", flag, &port]).output().unwrap();
        let (out, err) = said(&output);
        assert_eq!(output.status.code(), Some(2), "{out}\n{err}");
        let expected = format!("oversold: {flag}: port {port} is taken; choose another, or leave it out");
        assert!(err.starts_with(&expected), "{err}");
        assert_eq!(err.trim_end().lines().count(), 1, "{err}");
    }
}

pub(crate) fn a_missing_prometheus_is_one_clear_line() {
    let nothing = tempdir().unwrap();
    let output = stand(&["lv1"]).env("PATH", nothing.path()).output().unwrap();
    let (out, err) = said(&output);
    assert_eq!(output.status.code(), Some(3), "{out}\n{err}");
    // nginx may be where no PATH is needed.
    let missing = ["nginx", "prometheus"]
        .map(|program| format!("oversold: there is no {program}; to get it: infra/test-tools.sh nginx prometheus\n"));
    assert!(missing.contains(&err), "{err}");
}

pub(crate) async fn the_stand_serves_until_ctrl_c_and_leaves_nothing() {
    let mut command = tokio::process::Command::from(stand(&["lv2", "--strategy", "pessimistic"]));
    let mut process = command.stdout(Stdio::piped()).kill_on_drop(true).spawn().unwrap();
    let mut lines = BufReader::new(process.stdout.take().unwrap()).lines();
    let mut printed = BTreeMap::new();
    while !printed.contains_key("services") {
        let line = lines.next_line().await.unwrap().expect("it prints where everything is");
        if let Some((what, place)) = line.split_at_checked(13) {
            printed.insert(what.trim().to_owned(), place.to_owned());
        }
    }
    let address = |what: &str| -> SocketAddr {
        let url = printed[what].split_whitespace().next().unwrap();
        url.trim_start_matches("http://").parse().unwrap()
    };
    let (site, prometheus) = (address("site"), address("Prometheus"));
    let token_file = printed["admin token"].trim_start_matches("in ").to_owned();
    let token = std::fs::read_to_string(&token_file).unwrap();
    assert!(printed.values().all(|line| !line.contains(&token)), "{printed:?}");
    let (services_file, _) = printed["services"].trim_start_matches("in ").split_once(": ").unwrap();
    let services = std::fs::read_to_string(services_file).unwrap();
    assert!(services.starts_with("export DATABASE_URL='postgres://"), "{services}");
    assert!(
        !services.contains("statement-cache-capacity"),
        "psql refuses it: {services}"
    );

    let sale = Request::put("/api/sales/1")
        .header(header::AUTHORIZATION, format!("Bearer {token}"))
        .header(header::CONTENT_TYPE, "application/json")
        .body(r#"{"name":"the last tickets","capacity":10}"#.into())
        .unwrap();
    assert_eq!(send(site, sale).await.status, 201);
    // It watches all three.
    scraped(prometheus, 3).await;

    // The others serve when one is killed.
    let (_, pid) = printed["instance 1"].rsplit_once("(pid ").unwrap();
    signal("-KILL", pid.trim_end_matches(')'));
    scraped(prometheus, 2).await;
    for buyer in 1..=10 {
        let order = Request::post("/api/sales/1/reservations")
            .header(header::CONTENT_TYPE, "application/json")
            .body(format!("{{\"buyer_id\": {buyer}}}").into())
            .unwrap();
        assert_eq!(send(site, order).await.status, 201);
    }

    signal("-INT", &process.id().unwrap().to_string());
    let status = process.wait().await.unwrap();
    assert_eq!(status.code(), Some(0));
    for what in ["site", "Prometheus", "instance 1", "instance 2", "instance 3"] {
        assert!(TcpStream::connect(address(what)).await.is_err(), "{what} is left");
    }
    // The reaper has the last word.
    until("the folder of the stand to be removed", async || {
        !Path::new(&token_file).exists()
    })
    .await;
}

/// Waits until Prometheus reaches this number of instances.
async fn scraped(prometheus: SocketAddr, instances: usize) {
    until(&format!("Prometheus to reach {instances} instances"), async || {
        let query = Request::builder()
            .method(Method::GET)
            .uri("/api/v1/query?query=sum(up%7Bjob%3D%22oversold%22%7D)")
            .body(Full::default())
            .unwrap();
        let found: Value = send(prometheus, query).await.json().unwrap();
        found["data"]["result"][0]["value"][1].as_str() == Some(&*instances.to_string())
    })
    .await;
}

async fn send(to: SocketAddr, request: Request<Full<hyper::body::Bytes>>) -> HttpResponse {
    Connection::open(to).await.unwrap().send(request).await.unwrap()
}

fn signal(signal: &str, pid: &str) {
    let sent = Command::new("kill").args([signal, pid]).status().unwrap();
    assert!(sent.success(), "{signal} to {pid}: {sent}");
}
