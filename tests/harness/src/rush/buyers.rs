//! The buyers: each sends its requests, and repeats those with unknown outcome or over a rate limit
//! under the same key, until a timeout.

use std::{collections::HashMap, net::SocketAddr, sync::Arc, time::Duration};

use anyhow::{Context, anyhow};
use box_office::{BuyerId, Priority, ProblemKind, SaleId, api, trace::now_monotonic_us};
use futures_util::future::{join_all, try_join_all};
use http_body_util::Full;
use hyper::{
    Request as HttpRequest, StatusCode,
    body::Bytes,
    header::{self, HeaderMap},
};
use rand::RngExt;
use serde::Deserialize;
use tokio::{
    sync::{Barrier, watch},
    task::JoinSet,
    time::{sleep, timeout},
};
use uuid::Uuid;

use super::{
    Rush, SALE, Servers,
    connection::{Connection, HttpResponse},
    report::Clock,
};
use crate::history::{Answer, Ending, Micros, Refused, Request};

/// Number of connections that are opened concurrently: less than a listener's backlog.
const OPENING_AT_ONCE: usize = 64;

/// The first pause between two reads of an accepted order's state.
const FIRST_PAUSE: Duration = Duration::from_millis(5);

/// The longest pause between two reads; pauses double up to it.
const LONGEST_PAUSE: Duration = Duration::from_millis(100);

/// The closed gate: every buyer is connected, and no request has been sent.
pub(super) struct Gate {
    buyers: JoinSet<Vec<Sent>>,
    opened: Arc<Barrier>,
    start: watch::Sender<Option<Start>>,
    live: watch::Receiver<Vec<SocketAddr>>,
}

#[derive(Clone)]
struct Start {
    started_us: Micros,
    answered: Arc<watch::Sender<u64>>,
    healings: watch::Receiver<usize>,
}

/// The requests of a rush, as their clients saw them.
pub(super) struct Released {
    pub(super) requests: Vec<Request>,
    /// The instance, or the nginx, that each request was sent to.
    pub(super) sent_to: HashMap<u64, SocketAddr>,
    pub(super) clock: Clock,
}

/// A request, and the instance that it was sent to.
type Sent = (Request, SocketAddr);

/// One click of one buyer, and all its repeats.
struct Click {
    number: u64,
    buyer: BuyerId,
    priority: Priority,
    key: String,
    connection: Option<Connection>,
    /// The instance at the other end.
    address: SocketAddr,
    live: watch::Receiver<Vec<SocketAddr>>,
    timeout: Duration,
}

impl Gate {
    /// Connects every buyer and warms every connection.
    pub(super) async fn new(rush: &Rush, servers: &Servers) -> anyhow::Result<Self> {
        let live = servers.entry_points();
        let addresses = live.borrow().clone();
        let clicks: Vec<(BuyerId, u32)> = (1..=rush.buyers)
            .flat_map(|buyer| (1..=rush.clicks).map(move |click| (BuyerId::from(buyer), click)))
            .collect();
        let mut connections = Vec::with_capacity(clicks.len());
        for (group, clicks) in clicks.chunks(OPENING_AT_ONCE).enumerate() {
            let opening = (0..clicks.len()).map(|place| {
                let address = addresses[(group * OPENING_AT_ONCE + place) % addresses.len()];
                async move { anyhow::Ok((address, Connection::open_warm(address).await?)) }
            });
            connections.extend(try_join_all(opening).await?);
        }

        let opened = Arc::new(Barrier::new(rush.buyers as usize + 1));
        let (start, started) = watch::channel(None);
        let mut clicks =
            clicks
                .into_iter()
                .zip(connections)
                .enumerate()
                .map(|(number, ((buyer, click), (address, connection)))| Click {
                    number: number as u64,
                    buyer,
                    priority: rush.priority_of(buyer),
                    key: format!("buyer-{buyer}-click-{click}"),
                    connection: Some(connection),
                    address,
                    live: live.clone(),
                    timeout: rush.timeout,
                });
        let mut buyers = JoinSet::new();
        for buyer in 0..rush.buyers as usize {
            // One task for all clicks of a buyer, which sends them back to back.
            let clicks: Vec<Click> = clicks.by_ref().take(rush.clicks as usize).collect();
            let wave = buyer * rush.waves() / rush.buyers as usize;
            buyers.spawn(buy(clicks, wave, started.clone(), opened.clone()));
        }
        // Every buyer waits at the gate before it opens.
        opened.wait().await;
        Ok(Self {
            buyers,
            opened,
            start,
            live,
        })
    }

    /// Opens the gate, and waits until every buyer has finished. Each wave of buyers after the
    /// first starts when one more fault is healed.
    pub(super) async fn open(
        self,
        started_us: Micros,
        answered: Arc<watch::Sender<u64>>,
        healings: watch::Receiver<usize>,
    ) -> Released {
        drop(self.opened);
        let clock = Clock::start();
        self.start.send_replace(Some(Start {
            started_us,
            answered,
            healings,
        }));
        let sent: Vec<Sent> = self.buyers.join_all().await.into_iter().flatten().collect();
        let clock = clock.stop();
        let sent_to = sent.iter().map(|(request, to)| (request.request, *to)).collect();
        let mut requests: Vec<Request> = sent.into_iter().map(|(request, _)| request).collect();
        let address = self.live.borrow().first().copied();
        if let Some(address) = address {
            recheck(&mut requests, address, started_us).await;
        }
        requests.sort_by_key(|request| (request.sent_us, request.request));
        Released {
            requests,
            sent_to,
            clock,
        }
    }
}

/// Reads every accepted order's state once more after all are decided, as a final state must never
/// change.
pub async fn recheck(requests: &mut [Request], address: SocketAddr, started_us: Micros) {
    let Ok(mut connection) = Connection::open(address).await else {
        return;
    };
    for request in requests {
        let Answer::Accepted {
            reservation,
            ending: Some(ending),
        } = &mut request.answer
        else {
            continue;
        };
        let state = State::read(&mut connection, &format!("/api/reservations/{reservation}")).await;
        if let Some(refused) = state.ok().and_then(|state| state.decided())
            && refused != ending.refused
        {
            ending.changed_to = Some(Box::new(Ending {
                at_us: now_monotonic_us() - started_us,
                refused,
                changed_to: None,
            }));
        }
    }
}

/// One buyer: waits at the gate and for its wave, then sends its requests.
async fn buy(
    clicks: Vec<Click>,
    wave: usize,
    mut started: watch::Receiver<Option<Start>>,
    opened: Arc<Barrier>,
) -> Vec<Sent> {
    opened.wait().await;
    drop(opened);
    let Ok(start) = started.wait_for(Option::is_some).await.map(|start| start.clone()) else {
        return vec![]; // The rush was aborted before it began.
    };
    drop(started);
    let Some(mut start) = start else { return vec![] };
    if start.healings.wait_for(|healed| *healed >= wave).await.is_err() {
        return vec![]; // A fault before this wave failed, and the rush is aborted.
    }
    join_all(clicks.into_iter().map(|click| click.run(start.clone())))
        .await
        .into_iter()
        .flatten()
        .collect()
}

impl Click {
    async fn run(mut self, start: Start) -> Vec<Sent> {
        let first_sent_us = now_monotonic_us() - start.started_us;
        let mut requests = vec![];
        loop {
            let number = self.number + (requests.len() as u64) * 1_000_000;
            let ((request, sent_to), retry_after) = self.ask(number, &start).await;
            // Neither is final: the same key comes again.
            let indeterminate = matches!(
                request.answer,
                Answer::Indeterminate | Answer::Refused(Refused::RateLimited)
            );
            requests.push((request, sent_to));
            let spent_us = now_monotonic_us() - start.started_us - first_sent_us;
            let left = self.timeout.saturating_sub(Duration::from_micros(spent_us));
            if !indeterminate || left.is_zero() {
                return requests;
            }
            sleep(retry_after.min(left)).await;
        }
    }

    /// Sends one request and follows it to its final state. Also returns the pause before a repeat.
    async fn ask(&mut self, number: u64, start: &Start) -> (Sent, Duration) {
        let started_us = start.started_us;
        let mut request = Request {
            request: number,
            buyer: self.buyer,
            key: self.key.clone(),
            sent_us: now_monotonic_us() - started_us,
            answered_us: None,
            answer: Answer::Indeterminate,
            steps: vec![],
        };
        let mut retry_after = jittered(Duration::from_millis(50));
        // The client's own deadline: the client disconnects, the server may continue.
        let sending = timeout(self.timeout, self.send(number)).await;
        start.answered.send_modify(|answered| *answered += 1);
        // An accepted order may be followed on another instance.
        let sent_to = self.address;
        if let Ok(Ok(answered)) = sending {
            request.answered_us = Some(now_monotonic_us() - started_us);
            if let Some(pause) = self::retry_after(&answered.headers) {
                retry_after = jittered(pause);
            }
            request.answer = self.classify(answered, started_us).await;
        }
        if request.answered_us.is_none() {
            self.connection = None;
        }
        ((request, sent_to), retry_after)
    }

    async fn send(&mut self, number: u64) -> anyhow::Result<HttpResponse> {
        let wanted = api::NewReservation {
            buyer_id: self.buyer,
            priority: self.priority,
        };
        let request = order(SALE, &wanted, &self.key, number)?;
        self.connection().await?.send(request).await
    }

    /// The buyer's connection; a new one to a live instance if it is closed or its instance is
    /// gone.
    async fn connection(&mut self) -> anyhow::Result<&mut Connection> {
        let live = self.live.borrow().clone();
        let gone = self.connection.as_mut().is_some_and(Connection::is_closed);
        if gone || !live.contains(&self.address) {
            self.connection = None;
        }
        let connection = match self.connection.take() {
            Some(connection) => connection,
            None => {
                let at = rand::rng().random_range(0..live.len().max(1));
                self.address = *live.get(at).ok_or_else(|| anyhow!("no instance is running"))?;
                Connection::open(self.address).await?
            }
        };
        Ok(self.connection.insert(connection))
    }

    async fn classify(&mut self, answered: HttpResponse, started_us: Micros) -> Answer {
        match classify(&answered) {
            Classified::Final(answer) => answer,
            Classified::Accepted { reservation, location } => {
                let ending = timeout(self.timeout, self.follow(&location, started_us))
                    .await
                    .ok()
                    .flatten();
                Answer::Accepted { reservation, ending }
            }
        }
    }

    /// Waits for an accepted order's final event, on any live instance. Without event streams,
    /// polls its state.
    async fn follow(&mut self, location: &str, started_us: Micros) -> Option<Ending> {
        let mut pause = FIRST_PAUSE;
        let mut events = true;
        loop {
            let state = match self.connection().await {
                Err(_) => None,
                Ok(connection) if events => {
                    let state = State::from_events(connection, location).await;
                    events = state.as_ref().map_or(true, Option::is_some);
                    state.ok().flatten()
                }
                Ok(connection) => State::read(connection, location).await.ok(),
            };
            if let Some(refused) = state.and_then(|state| state.decided()) {
                return Some(Ending {
                    at_us: now_monotonic_us() - started_us,
                    refused,
                    changed_to: None,
                });
            }
            sleep(jittered(pause)).await;
            pause = (pause * 2).min(LONGEST_PAUSE);
        }
    }
}

/// The final state of an accepted order in a response of `GET /api/reservations/{id}` or its event
/// stream: `None` while it is pending, `Some(None)` if it is confirmed, otherwise the reason of the
/// refusal.
pub fn final_state(answered: &HttpResponse) -> Option<Option<Refused>> {
    State::of(answered).ok()?.decided()
}

/// Whether a response is an event stream, read to its end.
pub fn is_event_stream(answered: &HttpResponse) -> bool {
    let kind = answered.headers.get(header::CONTENT_TYPE);
    answered.status == StatusCode::OK && kind.is_some_and(|kind| kind.as_bytes().starts_with(b"text/event-stream"))
}

/// The state of a reservation in a response of `GET /api/reservations/{id}`.
#[derive(Deserialize)]
struct State {
    status: String,
    reason: Option<String>,
    earlier: Option<Uuid>,
}

impl State {
    async fn read(connection: &mut Connection, location: &str) -> anyhow::Result<Self> {
        let request = HttpRequest::get(location).body(Full::default())?;
        Self::of(&connection.send(request).await?)
    }

    /// Reads the last event of an order; the stream ends with the final state. `None`: the server
    /// has no event stream.
    async fn from_events(connection: &mut Connection, location: &str) -> anyhow::Result<Option<Self>> {
        let request = HttpRequest::get(format!("{location}/events")).body(Full::default())?;
        let answered = connection.send(request).await?;
        is_event_stream(&answered).then(|| Self::of(&answered)).transpose()
    }

    /// Parses the body of a response, or the last event of a stream.
    fn of(answered: &HttpResponse) -> anyhow::Result<Self> {
        if !is_event_stream(answered) {
            return Ok(serde_json::from_slice(&answered.body)?);
        }
        let text = str::from_utf8(&answered.body)?;
        let last = text.lines().filter_map(|line| line.strip_prefix("data:")).next_back();
        Ok(serde_json::from_str(
            last.context("a stream without an event")?.trim_start(),
        )?)
    }

    /// `None` while the order is pending, `Some(None)` if it is confirmed, otherwise the reason of
    /// the refusal.
    #[expect(clippy::option_option, reason = "not decided yet, decided yes, decided no")]
    fn decided(&self) -> Option<Option<Refused>> {
        match (self.status.as_str(), self.reason.as_deref()) {
            ("confirmed", _) => Some(None),
            ("refused" | "expired", Some(reason)) => Refused::from_name(reason, self.earlier).map(Some),
            (ended @ ("declined" | "expired" | "cancelled"), _) => Refused::from_name(ended, None).map(Some),
            _ => None,
        }
    }
}

/// The meaning of an HTTP response to a reservation.
pub enum Classified {
    /// The answer is complete.
    Final(Answer),
    /// 202: the final state follows later.
    Accepted {
        /// The order's id.
        reservation: Uuid,
        /// The URL of its state.
        location: String,
    },
}

/// Classifies an HTTP response by the contract that all levels share.
pub fn classify(answered: &HttpResponse) -> Classified {
    let answer = match answered.status {
        StatusCode::CREATED => reservation(answered).map(|reservation| Answer::Confirmed { reservation }),
        StatusCode::ACCEPTED => {
            let location = answered
                .headers
                .get(header::LOCATION)
                .and_then(|location| location.to_str().ok());
            if let (Some(reservation), Some(location)) = (reservation(answered), location) {
                let location = location.to_owned();
                return Classified::Accepted { reservation, location };
            }
            None
        }
        StatusCode::SERVICE_UNAVAILABLE => Some(Answer::Indeterminate),
        StatusCode::TOO_MANY_REQUESTS => Some(Answer::Refused(Refused::RateLimited)),
        _ => refused(answered).map(Answer::Refused),
    };
    Classified::Final(answer.unwrap_or_else(|| {
        let start: String = String::from_utf8_lossy(&answered.body).chars().take(200).collect();
        Answer::Unexpected {
            what: format!("{} {start}", answered.status),
        }
    }))
}

fn reservation(answered: &HttpResponse) -> Option<Uuid> {
    serde_json::from_slice::<api::Reservation>(&answered.body)
        .ok()
        .map(|reservation| reservation.id)
}

fn refused(answered: &HttpResponse) -> Option<Refused> {
    let problem: api::Problem = serde_json::from_slice(&answered.body).ok()?;
    let kind = ProblemKind::from_uri(&problem.kind).filter(|kind| kind.status() == answered.status)?;
    Refused::from_name(kind.name(), problem.reservation_id)
}

fn order(
    sale: SaleId,
    wanted: &api::NewReservation,
    key: &str,
    number: u64,
) -> anyhow::Result<HttpRequest<Full<Bytes>>> {
    let body = serde_json::to_vec(wanted)?;
    Ok(HttpRequest::post(format!("/api/sales/{sale}/reservations"))
        .header(header::CONTENT_TYPE, "application/json")
        .header("idempotency-key", key)
        .header("x-request-id", number.to_string())
        .body(Full::from(body))?)
}

/// The pause of a `Retry-After` header, if present.
pub fn retry_after(headers: &HeaderMap) -> Option<Duration> {
    let seconds = headers.get(header::RETRY_AFTER)?.to_str().ok()?.parse().ok()?;
    Some(Duration::from_secs(seconds))
}

/// A random time between `pause` and 1.5 times `pause`, so that clients rejected together do not
/// retry together.
pub fn jittered(pause: Duration) -> Duration {
    pause.mul_f64(rand::rng().random_range(1.0..1.5))
}
