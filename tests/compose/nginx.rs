//! nginx with the stand's configuration, in front of servers that answer, die or are not there.

use std::{
    fs,
    net::{Ipv4Addr, SocketAddr, TcpStream},
    os::unix::fs::PermissionsExt,
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use rustix::process::{Pid, Signal, geteuid, kill_process};
use serde_json::Value;
use tempfile::TempDir;

use crate::{
    NGINX,
    http::{Answer, Stub, ask, free_port, header},
    program, stand,
};

const RESERVE: &str = "/api/sales/1/reservations";
const EVENTS: &str = "/api/reservations/018f0000-0000-7000-8000-000000000000/events";

/// A running nginx. It ends when it is dropped.
struct Nginx {
    process: Child,
    port: u16,
    folder: TempDir,
}

impl Nginx {
    fn start(instances: &[SocketAddr]) -> Self {
        let folder = tempfile::tempdir().unwrap();
        // nginx's workers have another user than root.
        fs::set_permissions(folder.path(), fs::Permissions::from_mode(0o755)).unwrap();
        let (port, run) = (free_port(), folder.path().to_str().unwrap());
        let servers: Vec<String> = instances
            .iter()
            .map(|instance| format!("server {instance} max_fails=1 fail_timeout=1s;"))
            .collect();
        let mut settings = fs::read_to_string(stand().join("nginx/nginx.conf.template")).unwrap();
        for (name, value) in [
            ("NGINX_LISTEN", format!("127.0.0.1:{port}")),
            ("NGINX_UPSTREAMS", servers.join(" ")),
            ("NGINX_RUN_DIR", run.to_owned()),
            ("NGINX_ACCESS_LOG", format!("{run}/access.log")),
            ("NGINX_ERROR_LOG", format!("{run}/error.log")),
        ] {
            settings = settings.replace(&format!("${{{name}}}"), &value);
        }
        assert!(
            !settings.contains("${"),
            "the template has a variable that nobody fills in"
        );
        let file = folder.path().join("nginx.conf");
        fs::write(&file, settings).unwrap();
        let mut command = Command::new(program(NGINX).unwrap());
        command.arg("-c").arg(&file).stdin(Stdio::null()).stderr(Stdio::null());
        if geteuid().is_root() {
            command.args(["-g", "user root;"]);
        }
        let nginx = Self {
            process: command.spawn().unwrap(),
            port,
            folder,
        };
        let deadline = Instant::now() + Duration::from_secs(10);
        while TcpStream::connect((Ipv4Addr::LOCALHOST, port)).is_err() {
            assert!(
                Instant::now() < deadline,
                "nginx does not listen: {}",
                nginx.log("error.log")
            );
            thread::sleep(Duration::from_millis(10));
        }
        nginx
    }

    fn ask(&self, method: &str, path: &str, headers: &[(&str, &str)]) -> Answer {
        ask(self.port, method, path, headers)
    }

    fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.process), signal).unwrap();
    }

    fn log(&self, name: &str) -> String {
        fs::read_to_string(self.folder.path().join(name)).unwrap_or_default()
    }
}

impl Drop for Nginx {
    fn drop(&mut self) {
        // It ends its workers, which SIGKILL would leave behind.
        self.signal(Signal::TERM);
        let _ = self.process.wait();
    }
}

/// An address at which nobody listens.
fn nowhere() -> SocketAddr {
    (Ipv4Addr::LOCALHOST, free_port()).into()
}

#[track_caller]
fn assert_unavailable(answer: &Answer) {
    assert_eq!(answer.status, 503, "{}", answer.head);
    assert_eq!(answer.header("content-type"), Some("application/problem+json"));
    assert_eq!(answer.header("retry-after"), Some("1"));
    let problem: Value = serde_json::from_str(&answer.body).unwrap();
    assert_eq!(problem["type"], "/problems/backend-away");
    assert_eq!(problem["status"], 503);
    assert_eq!(problem["request_id"].as_str(), answer.header("x-request-id"));
}

pub(crate) fn a_post_goes_to_another_instance_if_the_first_cannot_be_reached() {
    let willing = Stub::willing();
    let nginx = Nginx::start(&[nowhere(), willing.address, nowhere()]);
    for _ in 0..20 {
        assert_eq!(nginx.ask("POST", RESERVE, &[]).status, 200);
    }
    assert_eq!(willing.requests().len(), 20);
}

pub(crate) fn a_post_that_was_sent_is_not_repeated() {
    let dying = [Stub::dying(), Stub::dying()];
    let nginx = Nginx::start(&[dying[0].address, dying[1].address]);
    assert_unavailable(&nginx.ask("POST", RESERVE, &[("Idempotency-Key", "once")]));
    let sent: usize = dying.iter().map(|stub| stub.requests().len()).sum();
    assert_eq!(sent, 1, "it may have taken effect");
}

pub(crate) fn a_get_is_repeated_at_another_instance() {
    let (dying, willing) = (Stub::dying(), Stub::willing());
    let nginx = Nginx::start(&[dying.address, willing.address]);
    for _ in 0..4 {
        assert_eq!(nginx.ask("GET", "/api/sales/1", &[]).status, 200);
    }
    assert!(
        !dying.requests().is_empty(),
        "no request was sent to the instance that dies"
    );
}

pub(crate) fn with_all_instances_down_the_answer_is_a_problem() {
    let nginx = Nginx::start(&[nowhere(), nowhere(), nowhere()]);
    for (method, path) in [("POST", RESERVE), ("GET", "/readyz"), ("GET", EVENTS)] {
        // The second time nginx knows it already.
        for _ in 0..2 {
            assert_unavailable(&nginx.ask(method, path, &[]));
        }
    }
    assert_eq!(
        nginx.ask("GET", "/nginx-health", &[]).status,
        200,
        "nginx itself is well"
    );
}

pub(crate) fn a_request_id_is_passed_on() {
    let willing = Stub::willing();
    let nginx = Nginx::start(&[willing.address]);
    let received = |sent: &str| {
        nginx.ask("GET", "/api/sales/1", &[("X-Request-Id", sent)]);
        let head = willing.requests().pop().unwrap();
        header(&head, "x-request-id").unwrap().to_owned()
    };
    assert_eq!(received("buyer-7/click-1"), "buyer-7/click-1");
    for hostile in [r#"a"b"#, r"a\b", "a b", &"x".repeat(129)] {
        let id = received(hostile);
        assert_eq!(
            id.len(),
            32,
            "nginx makes one of its own instead of {hostile}, not {id}"
        );
    }

    let down = Nginx::start(&[nowhere()]);
    let answer = down.ask("POST", RESERVE, &[("X-Request-Id", "buyer-7")]);
    assert_unavailable(&answer);
    assert_eq!(answer.header("x-request-id"), Some("buyer-7"));
}

pub(crate) fn no_token_and_no_query_is_logged() {
    let willing = Stub::willing();
    let nginx = Nginx::start(&[willing.address]);
    nginx.ask(
        "PUT",
        "/api/sales/1?token=hunter2",
        &[("Authorization", "Bearer hunter2")],
    );
    nginx.signal(Signal::QUIT);
    let deadline = Instant::now() + Duration::from_secs(10);
    while !nginx.log("access.log").contains("/api/sales/1") {
        assert!(Instant::now() < deadline, "nothing is logged");
        thread::sleep(Duration::from_millis(10));
    }
    let log = nginx.log("access.log");
    assert!(!log.contains("hunter2"), "{log}");
    let line: Value = serde_json::from_str(log.lines().next().unwrap()).unwrap();
    assert_eq!(line["status"], 200);
    assert_eq!(line["upstream"], willing.address.to_string());
}

pub(crate) fn the_metrics_are_not_published() {
    let willing = Stub::willing();
    let nginx = Nginx::start(&[willing.address]);
    assert_eq!(nginx.ask("GET", "/metrics", &[]).status, 404);
    assert!(willing.requests().is_empty());
}
