//! Event streams through nginx.

use std::{collections::BTreeSet, net::SocketAddr, process::Command, time::Duration};

use harness::{
    backends::{Nginx, TestEnvironment},
    rush::{Connection, SALE},
    test_server::TestServer,
    until,
};
use http_body_util::Full;
use hyper::{Request, header};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    time::timeout,
};

use crate::{nginx, program, single_writer};

/// Generous for a slow machine.
const TIMEOUT: Duration = Duration::from_secs(20);

/// The instance behind nginx has no consumer, so the order stays accepted, and its stream open, until another instance starts: what the
/// client reads before that, nginx has passed on from an open stream.
pub(crate) async fn an_event_passes_nginx_before_the_stream_ends_and_the_stream_survives_a_reload() {
    let (level, strategy) = (&lv4_kafka::LEVEL, single_writer());
    let environment = TestEnvironment::shared(strategy).await.unwrap();
    let accepts_only = program(level).variable("KAFKA_CONSUMERS", "0");
    let server = TestServer::start(&environment, &accepts_only, level, strategy)
        .await
        .unwrap();
    server.create_rush_sale(1).await.unwrap();
    let nginx = Nginx::start(&nginx(), &[server.address()]).await.unwrap();
    let location = order(nginx.address()).await;

    let mut stream = Stream::open(nginx.address(), &format!("{location}/events")).await;
    stream.read_until("event: accepted").await;
    assert!(!stream.received.contains("event: confirmed"), "{}", stream.received);

    let before = workers(&nginx).await;
    nginx.reload().await.unwrap();
    until("new workers beside the old one that serves the stream", async || {
        let now = workers(&nginx).await;
        now.difference(&before).next().is_some() && now.intersection(&before).next().is_some()
    })
    .await;

    let decides = TestServer::start(&environment, &program(level), level, strategy)
        .await
        .unwrap();
    stream.read_until("event: confirmed").await;
    stream.read_to_end().await;

    decides.stop().await.unwrap();
    server.stop().await.unwrap();
}

/// Orders a ticket, and returns the URL of the accepted order.
async fn order(site: SocketAddr) -> String {
    let request = Request::post(format!("/api/sales/{SALE}/reservations"))
        .header(header::CONTENT_TYPE, "application/json")
        .body(Full::from("{\"buyer_id\": 1}"))
        .unwrap();
    let answered = Connection::open(site).await.unwrap().send(request).await.unwrap();
    assert_eq!(answered.status, 202);
    answered.headers[header::LOCATION].to_str().unwrap().to_owned()
}

/// The processes of nginx below its master.
async fn workers(nginx: &Nginx) -> BTreeSet<u32> {
    let master = nginx.pid().await.unwrap().to_string();
    let shown = Command::new("ps")
        .args(["-o", "pid=", "--ppid", &master])
        .output()
        .unwrap();
    let pids = String::from_utf8(shown.stdout).unwrap();
    pids.split_whitespace().map(|pid| pid.parse().unwrap()).collect()
}

/// A response that is read as it comes.
struct Stream {
    socket: TcpStream,
    received: String,
}

impl Stream {
    async fn open(site: SocketAddr, path: &str) -> Self {
        let mut socket = TcpStream::connect(site).await.unwrap();
        let request = format!("GET {path} HTTP/1.1\r\nHost: {site}\r\nConnection: close\r\n\r\n");
        socket.write_all(request.as_bytes()).await.unwrap();
        let received = String::new();
        Self { socket, received }
    }

    /// Reads more. `false`: the stream has ended.
    async fn read(&mut self) -> bool {
        let mut bytes = [0; 4096];
        let read = timeout(TIMEOUT, self.socket.read(&mut bytes)).await;
        let read = read
            .unwrap_or_else(|_| panic!("nothing more within {TIMEOUT:?} after:\n{}", self.received))
            .unwrap();
        self.received += str::from_utf8(&bytes[..read]).unwrap();
        read > 0
    }

    async fn read_until(&mut self, text: &str) {
        while !self.received.contains(text) {
            assert!(self.read().await, "it ended without {text}:\n{}", self.received);
        }
    }

    async fn read_to_end(&mut self) {
        while self.read().await {}
    }
}
