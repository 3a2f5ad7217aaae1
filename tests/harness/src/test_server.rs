//! One server process of a level, and an HTTP client for it.

use std::{net::SocketAddr, process::ExitStatus, time::Duration};

use anyhow::{Context, anyhow, bail, ensure};
use box_office::{BuyerId, Level, Priority, ProblemKind, SaleId, Strategy, api};
use http_body_util::Full;
use hyper::{Method, Request, StatusCode, body::Bytes, header};
use rustix::process::{Pid, Signal, kill_process};
use serde::de::DeserializeOwned;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    time::timeout,
};
use uuid::Uuid;

use crate::{
    backends::TestEnvironment,
    rush::{Connection, HttpResponse, Program, Rush, SALE, Servers, Steps, until_stopped},
};

/// Time limit of one response.
const TIMEOUT: Duration = Duration::from_secs(10);

/// A level's server process, and a client for it.
pub struct TestServer {
    servers: Servers,
    address: SocketAddr,
}

/// An HTTP request.
struct Call<'a> {
    method: Method,
    path: String,
    key: Option<&'a str>,
    token: Option<String>,
    body: Option<Vec<u8>>,
}

impl TestServer {
    /// Starts a server.
    ///
    /// # Errors
    /// Fails if the server does not start.
    pub async fn start(
        environment: &TestEnvironment,
        program: &Program,
        level: &Level,
        strategy: &Strategy,
    ) -> anyhow::Result<Self> {
        Self::start_for(&Rush::default(), environment, program, level, strategy).await
    }

    /// Starts a server with the settings of a rush.
    ///
    /// # Errors
    /// Fails if the server does not start.
    pub async fn start_for(
        rush: &Rush,
        environment: &TestEnvironment,
        program: &Program,
        level: &Level,
        strategy: &Strategy,
    ) -> anyhow::Result<Self> {
        let servers = Servers::start(rush, environment, program, level, strategy).await?;
        let address = *servers.live().borrow().first().context("one was started")?;
        Ok(Self { servers, address })
    }

    /// The server's address.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// The pid of the server.
    ///
    /// # Errors
    /// Fails if the server has exited.
    pub async fn pid(&self) -> anyhow::Result<u32> {
        self.servers.pid(0).await
    }

    /// What the server has logged.
    ///
    /// # Errors
    /// Fails if its log cannot be read.
    pub async fn log(&self) -> anyhow::Result<String> {
        self.servers.log(0).await
    }

    /// The administration token of the server.
    pub fn admin_token(&self) -> &str {
        self.servers.admin_token()
    }

    /// Stops the server (SIGTERM).
    ///
    /// # Errors
    /// Fails unless the server exits with code 0.
    pub async fn stop(self) -> anyhow::Result<()> {
        self.stop_with_steps().await.map(drop)
    }

    /// Stops the server (SIGTERM), and returns the steps that it traced.
    ///
    /// # Errors
    /// Fails unless the server exits with code 0.
    pub async fn stop_with_steps(self) -> anyhow::Result<Steps> {
        self.servers.stop().await
    }

    /// Waits until the process is stopped (SIGSTOP).
    ///
    /// # Errors
    /// Fails if the process is not stopped `within` this time.
    pub async fn wait_until_stopped(&self, within: Duration) -> anyhow::Result<()> {
        timeout(within, until_stopped(self.process().await?))
            .await
            .map_err(|_| anyhow!("after {within:?} the server still runs"))?
    }

    /// Resumes a stopped process (SIGCONT).
    ///
    /// # Errors
    /// Fails if the process has exited.
    pub async fn resume(&self) -> anyhow::Result<()> {
        Ok(kill_process(self.process().await?, Signal::CONT)?)
    }

    /// Kills the process (SIGKILL), even if it is stopped, and returns its exit status.
    ///
    /// # Errors
    /// Fails if the process has exited.
    pub async fn kill(&self) -> anyhow::Result<ExitStatus> {
        self.servers.kill(0).await
    }

    async fn process(&self) -> anyhow::Result<Pid> {
        Pid::from_raw(self.pid().await?.cast_signed()).context("a process has a pid")
    }

    async fn call(&self, call: Call<'_>) -> anyhow::Result<HttpResponse> {
        let mut request = Request::builder().method(call.method).uri(call.path);
        if let Some(key) = call.key {
            request = request.header("idempotency-key", key);
        }
        if let Some(token) = call.token {
            request = request.header(header::AUTHORIZATION, format!("Bearer {token}"));
        }
        if call.body.is_some() {
            request = request.header(header::CONTENT_TYPE, "application/json");
        }
        let request = request.body(Full::<Bytes>::from(call.body.unwrap_or_default()))?;
        let mut connection = Connection::open(self.address).await?;
        timeout(TIMEOUT, connection.send(request))
            .await
            .context("no answer in time")?
    }

    /// Sends `GET path`.
    ///
    /// # Errors
    /// Fails if the server does not answer.
    pub async fn get(&self, path: &str) -> anyhow::Result<HttpResponse> {
        self.call(Call {
            method: Method::GET,
            path: path.to_owned(),
            key: None,
            token: None,
            body: None,
        })
        .await
    }

    /// Sends `DELETE path`.
    ///
    /// # Errors
    /// Fails if the server does not answer.
    pub async fn delete(&self, path: &str) -> anyhow::Result<HttpResponse> {
        self.call(Call {
            method: Method::DELETE,
            path: path.to_owned(),
            key: None,
            token: None,
            body: None,
        })
        .await
    }

    /// Reads the events of a reservation after event `seen`, up to the last.
    ///
    /// # Errors
    /// Fails if the stream does not end in time or is not an event stream.
    pub async fn events(&self, reservation: Uuid, seen: Option<i64>) -> anyhow::Result<Vec<(i64, api::Reservation)>> {
        let mut request = Request::get(format!("/api/reservations/{reservation}/events"));
        if let Some(seen) = seen {
            request = request.header("last-event-id", seen.to_string());
        }
        let mut connection = Connection::open(self.address).await?;
        let answered = timeout(TIMEOUT, connection.send(request.body(Full::default())?))
            .await
            .context("the events do not end in time")??;
        if answered.status == StatusCode::NO_CONTENT {
            return Ok(vec![]);
        }
        let text = str::from_utf8(&answered.body)?;
        ensure!(answered.status == StatusCode::OK, "{} {text}", answered.status);
        let mut events = vec![];
        for event in text.split("\n\n").filter(|event| event.contains("data:")) {
            let field = |name: &str| {
                event
                    .lines()
                    .find_map(|line| line.strip_prefix(name))
                    .map(str::trim_start)
            };
            let number = field("id:").context("an event without a number")?.parse()?;
            let reservation: api::Reservation = serde_json::from_str(field("data:").unwrap_or_default())?;
            ensure!(
                field("event:") == Some(&reservation.status),
                "an event is named after the status"
            );
            events.push((number, reservation));
        }
        Ok(events)
    }

    /// Waits for the final state of an accepted order, from its events and its status.
    ///
    /// # Errors
    /// Fails if there is none in time, or if events and status differ.
    pub async fn final_state(&self, reservation: Uuid) -> anyhow::Result<api::Reservation> {
        let events = self.events(reservation, None).await?;
        let (_, last) = events.into_iter().next_back().context("no events")?;
        ensure!(last.is_final(), "the events end, and the last one is {last:?}");
        let state: api::Reservation = self.get(&format!("/api/reservations/{reservation}")).await?.json()?;
        ensure!(state == last, "the events end with {last:?}, the status says {state:?}");
        Ok(state)
    }

    /// Checks that a reservation is confirmed, at once or as the final state of an accepted order.
    ///
    /// # Errors
    /// Names the answer that came instead.
    pub async fn expect_confirmed(&self, answered: &HttpResponse) -> anyhow::Result<api::Reservation> {
        let reservation: api::Reservation = answered.json()?;
        let reservation = match answered.status {
            StatusCode::CREATED => reservation,
            StatusCode::ACCEPTED => self.final_state(reservation.id).await?,
            status => bail!("answered with {status}"),
        };
        ensure!(reservation.status == "confirmed", "{reservation:?}");
        Ok(reservation)
    }

    /// Checks that a reservation is refused for this reason, at once or as the final state of an
    /// accepted order. Returns the earlier reservation that the refusal names.
    ///
    /// # Errors
    /// Names the answer that came instead.
    pub async fn expect_refused(&self, answered: &HttpResponse, kind: ProblemKind) -> anyhow::Result<Option<Uuid>> {
        if answered.status != StatusCode::ACCEPTED {
            return Ok(answered.is(kind)?.reservation_id);
        }
        let state = self.final_state(answered.json::<api::Reservation>()?.id).await?;
        ensure!(
            (state.status.as_str(), state.reason.as_deref()) == ("refused", Some(kind.name())),
            "expected to be refused with {}, and got {state:?}",
            kind.name()
        );
        Ok(state.earlier)
    }

    /// Requests a reservation.
    ///
    /// # Errors
    /// Fails if the server does not answer.
    pub async fn reserve(&self, sale: SaleId, buyer: i64, key: Option<&str>) -> anyhow::Result<HttpResponse> {
        self.reserve_with(Priority::Normal, sale, buyer, key).await
    }

    /// Requests a reservation with this priority.
    ///
    /// # Errors
    /// Fails if the server does not answer.
    pub async fn reserve_with(
        &self,
        priority: Priority,
        sale: SaleId,
        buyer: BuyerId,
        key: Option<&str>,
    ) -> anyhow::Result<HttpResponse> {
        let buyer_id = buyer;
        let body = serde_json::to_vec(&api::NewReservation { buyer_id, priority })?;
        self.post(sale, key, body).await
    }

    /// Names VIPs of sale [`SALE`] as an administrator.
    ///
    /// # Errors
    /// Fails if the server does not answer, or has no priority.
    pub async fn name_vips(&self, buyers: &[BuyerId]) -> anyhow::Result<()> {
        self.servers.name_vips(SALE, buyers).await
    }

    /// Sends an arbitrary body as a reservation.
    ///
    /// # Errors
    /// Fails if the server does not answer.
    pub async fn post(&self, sale: SaleId, key: Option<&str>, body: Vec<u8>) -> anyhow::Result<HttpResponse> {
        self.call(Call {
            method: Method::POST,
            path: format!("/api/sales/{sale}/reservations"),
            key,
            token: None,
            body: Some(body),
        })
        .await
    }

    /// Opens a sale with this token, and returns the response.
    ///
    /// # Errors
    /// Fails if the server does not answer.
    pub async fn open_sale(&self, sale: SaleId, capacity: i64, token: Option<&str>) -> anyhow::Result<HttpResponse> {
        let body = serde_json::to_vec(&api::NewSale {
            name: "the last tickets".to_owned(),
            capacity,
        })?;
        self.call(Call {
            method: Method::PUT,
            path: format!("/api/sales/{sale}"),
            key: None,
            token: token.map(str::to_owned),
            body: Some(body),
        })
        .await
    }

    /// Opens sale [`SALE`] as an administrator.
    ///
    /// # Errors
    /// Fails if the sale is open already or the server does not answer.
    pub async fn create_rush_sale(&self, capacity: u32) -> anyhow::Result<()> {
        self.create_sale(SALE, capacity).await
    }

    /// Opens a sale as an administrator.
    ///
    /// # Errors
    /// Fails if the sale is open already or the server does not answer.
    pub async fn create_sale(&self, sale: SaleId, capacity: u32) -> anyhow::Result<()> {
        self.servers.open_sale(sale, capacity).await
    }

    /// Reads a sale.
    ///
    /// # Errors
    /// Fails if the server does not answer with a sale.
    pub async fn sale(&self, sale: SaleId) -> anyhow::Result<api::Sale> {
        self.get(&format!("/api/sales/{sale}")).await?.json()
    }

    /// Sends raw bytes, and reads until the server responds or closes the connection.
    ///
    /// # Errors
    /// Fails if the server neither responds nor closes the connection.
    pub async fn raw(&self, bytes: &[u8]) -> anyhow::Result<String> {
        let mut stream = TcpStream::connect(self.address).await?;
        // The server may close before it has read everything.
        let _ = stream.write_all(bytes).await;
        let mut answer = vec![0; 4096];
        let read = timeout(TIMEOUT, stream.read(&mut answer))
            .await
            .context("neither answered nor closed")?;
        answer.truncate(read.unwrap_or(0));
        Ok(String::from_utf8_lossy(&answer).into_owned())
    }
}

impl HttpResponse {
    /// Parses the body as JSON.
    ///
    /// # Errors
    /// Fails if the body is not a `T`.
    pub fn json<T: DeserializeOwned>(&self) -> anyhow::Result<T> {
        serde_json::from_slice(&self.body)
            .with_context(|| format!("{} {}", self.status, String::from_utf8_lossy(&self.body)))
    }

    /// Checks that the response is this problem, with everything that RFC 9457 and the contract
    /// require.
    ///
    /// # Errors
    /// Names the first difference.
    pub fn is(&self, kind: ProblemKind) -> anyhow::Result<api::Problem> {
        let problem: api::Problem = self.json()?;
        ensure!(
            (problem.kind.as_str(), self.status) == (kind.uri().as_str(), kind.status()),
            "expected {} with {}, got {} with {}: {}",
            kind.uri(),
            kind.status(),
            problem.kind,
            self.status,
            problem.detail
        );
        ensure!(
            problem.status == self.status.as_u16(),
            "the body says {}, the answer {}",
            problem.status,
            self.status
        );
        ensure!(
            self.headers
                .get(header::CONTENT_TYPE)
                .is_some_and(|kind| kind == "application/problem+json")
        );
        let id = self.headers.get("x-request-id").and_then(|id| id.to_str().ok());
        ensure!(
            id == Some(problem.request_id.as_str()),
            "request id {id:?}, in the body {:?}",
            problem.request_id
        );
        ensure!(
            matches!(
                self.status,
                StatusCode::SERVICE_UNAVAILABLE | StatusCode::TOO_MANY_REQUESTS
            ) == self.headers.contains_key(header::RETRY_AFTER),
            "503 and 429, and only these, say when to try again"
        );
        Ok(problem)
    }
}
