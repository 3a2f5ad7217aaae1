//! nginx with the stand's configuration, in front of servers that answer, die or are not there.

use std::net::{Ipv4Addr, SocketAddr};

use harness::{
    backends::{Nginx, NginxSettings, free_port, on_system_path},
    rush::{Connection, HttpResponse},
    until,
};
use http_body_util::Full;
use hyper::{Method, Request};
use serde_json::Value;

use crate::{
    NGINX, stand,
    stub::{Stub, header},
};

const RESERVE: &str = "/api/sales/1/reservations";
const EVENTS: &str = "/api/reservations/018f0000-0000-7000-8000-000000000000/events";

async fn start(instances: &[SocketAddr]) -> Nginx {
    let settings = NginxSettings {
        executable: on_system_path(NGINX).unwrap(),
        template: stand().join("nginx/nginx.conf.template"),
        port: None,
    };
    Nginx::start(&settings, instances).await.unwrap()
}

/// Sends a request over a connection of its own.
async fn ask(nginx: &Nginx, method: Method, path: &str, headers: &[(&str, &str)]) -> HttpResponse {
    let mut request = Request::builder().method(method).uri(path);
    for &(name, value) in headers {
        request = request.header(name, value);
    }
    let mut connection = Connection::open(nginx.address()).await.unwrap();
    connection.send(request.body(Full::default()).unwrap()).await.unwrap()
}

fn text<'a>(answer: &'a HttpResponse, header: &str) -> Option<&'a str> {
    answer.headers.get(header)?.to_str().ok()
}

/// An address at which nobody listens.
fn nowhere() -> SocketAddr {
    (Ipv4Addr::LOCALHOST, free_port().unwrap()).into()
}

#[track_caller]
fn assert_unavailable(answer: &HttpResponse) {
    assert_eq!(answer.status, 503, "{:?}", answer.headers);
    assert_eq!(text(answer, "content-type"), Some("application/problem+json"));
    assert_eq!(text(answer, "retry-after"), Some("1"));
    let problem: Value = serde_json::from_slice(&answer.body).unwrap();
    assert_eq!(problem["type"], "/problems/backend-away");
    assert_eq!(problem["status"], 503);
    assert_eq!(problem["request_id"].as_str(), text(answer, "x-request-id"));
}

pub(crate) async fn a_post_goes_to_another_instance_if_the_first_cannot_be_reached() {
    let willing = Stub::willing();
    let nginx = start(&[nowhere(), willing.address, nowhere()]).await;
    for _ in 0..20 {
        assert_eq!(ask(&nginx, Method::POST, RESERVE, &[]).await.status, 200);
    }
    assert_eq!(willing.requests().len(), 20);
}

pub(crate) async fn a_post_that_was_sent_is_not_repeated() {
    let dying = [Stub::dying(), Stub::dying()];
    let nginx = start(&[dying[0].address, dying[1].address]).await;
    assert_unavailable(&ask(&nginx, Method::POST, RESERVE, &[("Idempotency-Key", "once")]).await);
    let sent: usize = dying.iter().map(|stub| stub.requests().len()).sum();
    assert_eq!(sent, 1, "it may have taken effect");
}

pub(crate) async fn a_get_is_repeated_at_another_instance() {
    let (dying, willing) = (Stub::dying(), Stub::willing());
    let nginx = start(&[dying.address, willing.address]).await;
    for _ in 0..4 {
        assert_eq!(ask(&nginx, Method::GET, "/api/sales/1", &[]).await.status, 200);
    }
    assert!(
        !dying.requests().is_empty(),
        "no request was sent to the instance that dies"
    );
}

pub(crate) async fn with_all_instances_down_the_answer_is_a_problem() {
    let nginx = start(&[nowhere(), nowhere(), nowhere()]).await;
    for (method, path) in [(Method::POST, RESERVE), (Method::GET, "/readyz"), (Method::GET, EVENTS)] {
        // The second time nginx knows it already.
        for _ in 0..2 {
            assert_unavailable(&ask(&nginx, method.clone(), path, &[]).await);
        }
    }
    assert_eq!(
        ask(&nginx, Method::GET, "/nginx-health", &[]).await.status,
        200,
        "nginx itself is well"
    );
}

pub(crate) async fn a_request_id_is_passed_on() {
    let willing = Stub::willing();
    let nginx = start(&[willing.address]).await;
    let received = async |sent: &str| {
        ask(&nginx, Method::GET, "/api/sales/1", &[("X-Request-Id", sent)]).await;
        let head = willing.requests().pop().unwrap();
        header(&head, "x-request-id").unwrap().to_owned()
    };
    assert_eq!(received("buyer-7/click-1").await, "buyer-7/click-1");
    for hostile in [r#"a"b"#, r"a\b", "a b", &"x".repeat(129)] {
        let id = received(hostile).await;
        assert_eq!(
            id.len(),
            32,
            "nginx makes one of its own instead of {hostile}, not {id}"
        );
    }

    let down = start(&[nowhere()]).await;
    let answer = ask(&down, Method::POST, RESERVE, &[("X-Request-Id", "buyer-7")]).await;
    assert_unavailable(&answer);
    assert_eq!(text(&answer, "x-request-id"), Some("buyer-7"));
}

pub(crate) async fn no_token_and_no_query_is_logged() {
    let willing = Stub::willing();
    let nginx = start(&[willing.address]).await;
    let secret = [("Authorization", "Bearer hunter2")];
    ask(&nginx, Method::PUT, "/api/sales/1?token=hunter2", &secret).await;
    let logged = || nginx.access_log().unwrap();
    until("the request is logged", async || logged().contains("/api/sales/1")).await;
    // Whoever knows the id of a reservation may cancel it.
    ask(&nginx, Method::GET, EVENTS, &[]).await;
    until("the second request is logged", async || logged().lines().count() == 2).await;
    let log = logged();
    assert!(!log.contains("hunter2"), "{log}");
    assert!(log.contains("\"/api/reservations/{id}/events\""), "{log}");
    let line: Value = serde_json::from_str(log.lines().next().unwrap()).unwrap();
    assert_eq!(line["status"], 200);
    assert_eq!(line["upstream"], willing.address.to_string());
}

pub(crate) async fn the_metrics_are_not_published() {
    let willing = Stub::willing();
    let nginx = start(&[willing.address]).await;
    assert_eq!(ask(&nginx, Method::GET, "/metrics", &[]).await.status, 404);
    assert!(willing.requests().is_empty());
}
