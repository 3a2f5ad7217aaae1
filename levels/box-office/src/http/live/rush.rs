//! A rush from inside the server: many buyers order at once, each over a connection of its own.
//!
//! The requests take the way of every other, through the server's own address or the balancer in
//! front of it. It is a demonstration: server and buyers share processors, and no buyer repeats a
//! request whose outcome is unknown. `oversold rush` measures and judges.

use std::{net::SocketAddr, pin::pin, sync::Arc, time::Duration};

use anyhow::Context;
use futures_util::{Stream, StreamExt, TryStreamExt, stream};
use http_body_util::{BodyExt, Full};
use hyper::{
    Request, StatusCode,
    body::Bytes,
    client::conn::http1::{self, handshake},
    header,
};
use hyper_util::rt::TokioIo;
use serde::Serialize;
use sqlx::{Connection, PgConnection};
use tokio::{
    net::TcpStream,
    sync::{Barrier, watch},
    task::JoinSet,
    time::{Instant, sleep, timeout},
};
use tracing::Instrument;

use super::json;
use crate::{
    BuyerId, Origin, Priority, ReserveError, SaleId, api,
    http::App,
    problem::{Problem, ProblemKind},
};

/// The number of connections that are opened concurrently: less than a listener's backlog.
const OPENING_AT_ONCE: usize = 64;

/// The time limit for a connection to be opened.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// How long a buyer waits for an answer.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(30);

/// The interval of the lines of progress.
const REPORT_INTERVAL: Duration = Duration::from_millis(100);

/// The advisory lock of a rush, in the key space of two integers: one rush at a time, whichever
/// instance it was started on.
const LOCK: (i32, i32) = (0x6f76_6572, 1);

/// Where the buyers connect: `host:port`.
pub(crate) struct RushTarget(String);

impl RushTarget {
    /// The balancer in front, or else the server's own address.
    pub(crate) fn new(balancer: Option<&Origin>, own: SocketAddr) -> Self {
        Self(match balancer {
            Some(origin) => origin.host_and_port(),
            None if own.ip().is_unspecified() && own.is_ipv4() => format!("127.0.0.1:{}", own.port()),
            None if own.ip().is_unspecified() => format!("[::1]:{}", own.port()),
            None => own.to_string(),
        })
    }
}

/// What has happened so far.
#[derive(Clone, Debug, Default, Serialize)]
struct Progress {
    sale: SaleId,
    /// The requests that are to be sent.
    requests: u32,
    /// The connections that are open.
    connected: u32,
    confirmed: u32,
    accepted: u32,
    refused: u32,
    limited: u32,
    /// Answers with an unknown outcome, and requests without an answer.
    unknown: u32,
    /// Since the first request was sent.
    elapsed_ms: u64,
    ended: bool,
    /// Why it ended early.
    error: Option<String>,
}

impl Progress {
    fn count(&mut self, status: Option<StatusCode>) {
        let counter = match status {
            Some(StatusCode::CREATED) => &mut self.confirmed,
            Some(StatusCode::ACCEPTED) => &mut self.accepted,
            Some(StatusCode::CONFLICT) => &mut self.refused,
            Some(StatusCode::TOO_MANY_REQUESTS) => &mut self.limited,
            _ => &mut self.unknown,
        };
        *counter += 1;
    }
}

/// Opens a new sale, and starts the rush. Returns its progress as JSON lines; dropping them stops
/// the rush.
///
/// # Errors
/// [`ProblemKind::RushInProgress`], or the problem of a database error.
pub(super) async fn start(
    app: &Arc<App>,
    wanted: api::NewRush,
) -> Result<impl Stream<Item = String> + Send + use<>, Problem> {
    // Held until the rush ends, and released by Postgres if this server dies.
    let mut lock = connect(app).await?;
    let sale = open_sale(&mut lock, &wanted)
        .await?
        .ok_or(ProblemKind::RushInProgress)?;

    let (progress, reports) = watch::channel(Progress {
        sale,
        requests: wanted.buyers * wanted.clicks,
        ..Progress::default()
    });
    let running = app.stop.child_token();
    let stop_when_dropped = running.clone().drop_guard();
    let app = Arc::clone(app);
    let rush = async move {
        let ended = running.run_until_cancelled(run(&app.live.rush_target, &wanted, &progress));
        let error = match ended.await {
            Some(Ok(())) => None,
            Some(Err(why)) => Some(format!("{why:#}")),
            None => Some("the server is shutting down".to_owned()),
        };
        progress.send_modify(|progress| {
            progress.ended = true;
            progress.error = error;
        });
        let _ = lock.close().await;
    };
    tokio::spawn(rush.instrument(tracing::info_span!("rush", sale)));
    Ok(stream::unfold(
        (Some(reports), stop_when_dropped),
        async |(reports, stop_when_dropped)| {
            let mut reports = reports?;
            reports.changed().await.ok()?;
            let now = reports.borrow_and_update().clone();
            let line = json(&now) + "\n";
            if now.ended {
                return Some((line, (None, stop_when_dropped)));
            }
            sleep(REPORT_INTERVAL).await;
            Some((line, (Some(reports), stop_when_dropped)))
        },
    ))
}

async fn connect(app: &App) -> Result<PgConnection, ReserveError> {
    Ok(PgConnection::connect_with(&app.database.pool().connect_options()).await?)
}

/// Opens the sale after the newest. `None`: another rush holds the lock.
async fn open_sale(connection: &mut PgConnection, wanted: &api::NewRush) -> Result<Option<SaleId>, ReserveError> {
    let is_only: bool = sqlx::query_scalar("select pg_try_advisory_lock($1, $2)")
        .bind(LOCK.0)
        .bind(LOCK.1)
        .fetch_one(&mut *connection)
        .await?;
    if !is_only {
        return Ok(None);
    }
    let opened = sqlx::query_scalar(
        "insert into sale (id, name, capacity, stock)
         select coalesce(max(id), 0) + 1, $1, $2, $2
           from sale
         returning id",
    )
    .bind(format!("a rush of {} buyers", wanted.buyers))
    .bind(wanted.capacity)
    .fetch_one(connection)
    .await?;
    Ok(Some(opened))
}

/// Connects every buyer, opens the gate, and counts the answers.
async fn run(target: &RushTarget, wanted: &api::NewRush, progress: &watch::Sender<Progress>) -> anyhow::Result<()> {
    let target = &target.0;
    let (sale, requests) = {
        let progress = progress.borrow();
        (progress.sale, progress.requests)
    };
    let mut opening = stream::iter(0..requests)
        .map(|_| open(target))
        .buffer_unordered(OPENING_AT_ONCE);
    let mut connections = vec![];
    while let Some(connection) = opening.try_next().await? {
        connections.push(connection);
        progress.send_modify(|progress| progress.connected += 1);
    }

    let gate = Arc::new(Barrier::new(connections.len() + 1));
    let mut buyers = JoinSet::new();
    for (number, connection) in connections.into_iter().enumerate() {
        let buyer = number as BuyerId / BuyerId::from(wanted.clicks) + 1;
        buyers.spawn(buy(connection, request(target, sale, buyer)?, Arc::clone(&gate)));
    }
    gate.wait().await;
    let began = Instant::now();
    while let Some(answered) = buyers.join_next().await {
        progress.send_modify(|progress| {
            progress.count(answered.ok().flatten());
            progress.elapsed_ms = began.elapsed().as_millis().try_into().unwrap_or(u64::MAX);
        });
    }
    Ok(())
}

/// A connection for one request, and what drives it. It is driven by the task that sends: with tasks
/// of their own, the scheduler would choose the order in which a buyer's clicks are sent.
type BuyerConnection = (
    http1::SendRequest<Full<Bytes>>,
    http1::Connection<TokioIo<TcpStream>, Full<Bytes>>,
);

async fn open(target: &str) -> anyhow::Result<BuyerConnection> {
    let opening = async {
        let stream = TcpStream::connect(target).await?;
        stream.set_nodelay(true)?;
        anyhow::Ok(handshake(TokioIo::new(stream)).await?)
    };
    let opened = timeout(CONNECT_TIMEOUT, opening).await.map_err(anyhow::Error::from);
    opened.flatten().with_context(|| format!("no connection to {target}"))
}

fn request(target: &str, sale: SaleId, buyer: BuyerId) -> anyhow::Result<Request<Full<Bytes>>> {
    let body = serde_json::to_vec(&api::NewReservation {
        buyer_id: buyer,
        priority: Priority::Normal,
    })?;
    Ok(Request::post(format!("/api/sales/{sale}/reservations"))
        .header(header::HOST, target)
        .header(header::CONTENT_TYPE, "application/json")
        .body(Full::from(body))?)
}

/// Waits at the gate and sends one request. `None`: no answer.
async fn buy(connection: BuyerConnection, request: Request<Full<Bytes>>, gate: Arc<Barrier>) -> Option<StatusCode> {
    gate.wait().await;
    let (mut sender, driver) = connection;
    let mut exchange = pin!(async move {
        let (head, body) = sender.send_request(request).await?.into_parts();
        body.collect().await?;
        Ok::<_, hyper::Error>(head.status)
    });
    let answered = async {
        tokio::select! {
            biased;
            answered = &mut exchange => answered,
            // The server has closed; what it sent before is still to be read.
            _ = driver => exchange.await,
        }
    };
    timeout(ANSWER_TIMEOUT, answered).await.ok()?.ok()
}
