//! The state changes of an accepted order as server-sent events.

use std::{collections::VecDeque, convert::Infallible, sync::Arc, time::Duration};

use axum::{
    extract::State,
    http::{HeaderMap, StatusCode},
    response::{
        IntoResponse, Response,
        sse::{Event as SseEvent, KeepAlive, Sse},
    },
};
use futures_util::{Stream, StreamExt, stream};
use tokio::time::{Instant, sleep};
use uuid::Uuid;

use super::{App, UNBUFFERED, input::ReservationInPath, reservations};
use crate::{
    Event, api,
    problem::{Problem, ProblemKind},
};

/// The timeout of one poll of the strategy for new events.
const POLL_TIMEOUT: Duration = Duration::from_secs(30);

/// The timeout for reading stored events after the client's last one.
const REPLAY_TIMEOUT: Duration = Duration::from_secs(1);

/// The interval of keep-alive comments: proxies close silent connections.
const KEEP_ALIVE: Duration = Duration::from_secs(15);

/// How long a browser's `EventSource` waits before it reconnects: this, and up to as much again, by
/// the reservation. A server that ends all its streams at once does not get them back at once.
const RECONNECT_DELAY: Duration = Duration::from_secs(1);

/// How long a stream that was opened while the database was unavailable waits for it. After that it
/// ends: another instance may be able to read its database.
const DATABASE_TIMEOUT: Duration = Duration::from_secs(30);

/// The delay before it tries again to read the events.
const DATABASE_RETRY_DELAY: Duration = Duration::from_secs(1);

/// Streams the state changes of a reservation as server-sent events. An event is named after the
/// status; its data is the reservation as JSON.
///
/// The first event of an unprocessed order is `accepted`, and the stream ends after the final
/// state. It also ends when this server shuts down or its database becomes unavailable: the client
/// reconnects, to any instance, and resumes with `Last-Event-ID`. A client that comes while the
/// database is unavailable is answered 200 all the same, and waits: an `EventSource` gives up for
/// good after any other status.
#[utoipa::path(
    get,
    path = "/api/reservations/{id}/events",
    operation_id = "events",
    params(
        ("id" = Uuid, Path, description = "The reservation"),
        ("Last-Event-ID" = Option<i64>, Header, description = "The id of the last event that the client has received", minimum = 0),
    ),
    responses(
        (status = 200, description = "The events", body = str, content_type = "text/event-stream"),
        (status = 204, description = "The client has received the last event: it must not reconnect"),
    )
)]
pub(super) async fn follow(
    State(app): State<Arc<App>>,
    ReservationInPath(id): ReservationInPath,
    headers: HeaderMap,
) -> Result<Response, Problem> {
    let seen = last_event_id(&headers)?;
    let (reservation, database_by) = match reservations::find(&app, id).await {
        Ok(reservation) => (reservation, None),
        Err(problem) if problem.is_temporary() => {
            if !app.strategy.accepted(id) {
                // It may be unknown. The client reconnects until the database can be read.
                let events = stream::once(std::future::ready(reconnect_delay(id)));
                return Ok(response(events, keep_alive()));
            }
            (api::Reservation::accepted(id), Some(Instant::now() + DATABASE_TIMEOUT))
        }
        Err(problem) => return Err(problem),
    };
    let mut subscription = Subscription {
        seen: seen.unwrap_or(0),
        database_by,
        next: VecDeque::new(),
        ended: false,
        app: Arc::clone(&app),
        id,
    };
    let next = &mut subscription.next;
    if reservation.status == api::Reservation::ACCEPTED {
        if seen.is_none() {
            next.push_back(Event { number: 0, reservation });
        }
    } else {
        match app.strategy.events(id, subscription.seen, REPLAY_TIMEOUT).await {
            Ok(Some(events)) => next.extend(events),
            // A strategy without events: its rows are final from the start.
            Ok(None) if subscription.seen < 1 => next.push_back(Event { number: 1, reservation }),
            Ok(None) => {}
            Err(_) => subscription.database_by = Some(Instant::now() + DATABASE_TIMEOUT),
        }
    }
    // A client that has received a stored event of a final order has received the last one. For any
    // other client the stream stays open, even if the event could not be read within the timeout.
    if next.is_empty() && subscription.seen > 0 && is_final(&app, id).await {
        return Ok(StatusCode::NO_CONTENT.into_response());
    }
    let reconnect_delay = stream::once(std::future::ready(reconnect_delay(id)));
    Ok(response(reconnect_delay.chain(stream_of(subscription)), keep_alive()))
}

/// Whether the reservation has its final state. While the database is unavailable, nobody knows.
async fn is_final(app: &App, id: Uuid) -> bool {
    let found = reservations::find(app, id).await;
    found.is_ok_and(|reservation| reservation.is_final())
}

fn keep_alive() -> KeepAlive {
    KeepAlive::new().interval(KEEP_ALIVE)
}

/// A stream of events.
pub(super) fn response(
    events: impl Stream<Item = Result<SseEvent, Infallible>> + Send + 'static,
    keep_alive: KeepAlive,
) -> Response {
    ([UNBUFFERED], Sse::new(events).keep_alive(keep_alive)).into_response()
}

/// The field `retry`, which is no event.
pub(super) fn reconnect_delay(id: Uuid) -> Result<SseEvent, Infallible> {
    let spread = (id.as_u128() % RECONNECT_DELAY.as_millis()) as u64;
    Ok(SseEvent::default().retry(RECONNECT_DELAY + Duration::from_millis(spread)))
}

/// The position of one client in the events of one reservation.
struct Subscription {
    app: Arc<App>,
    id: Uuid,
    seen: i64,
    /// When the stream ends if its database could not be read so far. `None`: it was read.
    database_by: Option<Instant>,
    next: VecDeque<Event>,
    ended: bool,
}

impl Subscription {
    /// Waits for new events; there may be none yet. `None`: the stream ends.
    async fn poll(&mut self) -> Option<VecDeque<Event>> {
        match self.app.strategy.events(self.id, self.seen, POLL_TIMEOUT).await {
            Ok(events) => {
                // A client that has received the last event would wait for good.
                let reconnects = self.database_by.take().is_some() && events.as_ref().is_none_or(Vec::is_empty);
                events.filter(|_| !reconnects).map(VecDeque::from)
            }
            Err(_) if self.database_by.is_some_and(|deadline| Instant::now() < deadline) => {
                sleep(DATABASE_RETRY_DELAY).await;
                Some(VecDeque::new())
            }
            Err(_) => None,
        }
    }
}

fn stream_of(subscription: Subscription) -> impl Stream<Item = Result<SseEvent, Infallible>> {
    stream::unfold(subscription, async |mut subscription: Subscription| {
        if subscription.ended {
            return None;
        }
        while subscription.next.is_empty() {
            let app = Arc::clone(&subscription.app);
            subscription.next = app.stop.run_until_cancelled(subscription.poll()).await??;
        }
        let event = subscription.next.pop_front()?;
        subscription.seen = event.number;
        subscription.ended = event.reservation.is_final();
        Some((Ok(to_sse(&event)), subscription))
    })
}

fn to_sse(event: &Event) -> SseEvent {
    let data: &api::Reservation = &event.reservation;
    SseEvent::default()
        .id(event.number.to_string())
        .event(&data.status)
        .json_data(data)
        .expect("a reservation always serializes to JSON")
}

/// Parses `Last-Event-ID`: digits only.
fn last_event_id(headers: &HeaderMap) -> Result<Option<i64>, Problem> {
    let Some(sent) = headers.get("last-event-id") else {
        return Ok(None);
    };
    let number = sent
        .to_str()
        .ok()
        .filter(|text| text.bytes().all(|byte| byte.is_ascii_digit()));
    match number.and_then(|number| number.parse().ok()) {
        Some(number) => Ok(Some(number)),
        None => Err(ProblemKind::MalformedEventId.into()),
    }
}
