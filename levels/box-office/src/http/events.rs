//! The state changes of an accepted order as server-sent events.

use std::{collections::VecDeque, convert::Infallible, sync::Arc, time::Duration};

use axum::{
    extract::State,
    http::{HeaderMap, HeaderName, HeaderValue, StatusCode},
    response::{
        IntoResponse, Response,
        sse::{Event as SseEvent, KeepAlive, Sse},
    },
};
use futures_util::{Stream, stream};
use uuid::Uuid;

use super::{App, input::ReservationInPath, reservations};
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

/// Streams the state changes of a reservation as server-sent events. An event is named after the
/// status; its data is the reservation as JSON.
///
/// The first event of an unprocessed order is `accepted`, and the stream ends after the final
/// state. It also ends when this server shuts down or its database is unavailable: the client
/// reconnects, to any instance, and resumes with `Last-Event-ID`.
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
    let reservation = reservations::find(&app, id).await?;
    let mut next = VecDeque::new();
    if !reservation.is_final() {
        if seen.is_none() {
            next.push_back(Event { number: 0, reservation });
        }
    } else if let Some(events) = app.strategy.events(id, seen.unwrap_or(0), REPLAY_TIMEOUT).await? {
        next.extend(events);
    } else if seen.is_none_or(|seen| seen < 1) {
        // A strategy without events: its rows are final from the start.
        next.push_back(Event { number: 1, reservation });
    }
    // A client that has received a stored event of a final order has received the last one. For any
    // other client the stream stays open, even if the event could not be read within the timeout.
    if next.is_empty() && seen.is_some_and(|seen| seen > 0) && reservations::find(&app, id).await?.is_final() {
        return Ok(StatusCode::NO_CONTENT.into_response());
    }
    let events = Sse::new(stream_of(Subscription {
        app,
        id,
        seen: seen.unwrap_or(0),
        next,
        ended: false,
    }));
    // nginx would otherwise buffer the events.
    let unbuffered = (
        HeaderName::from_static("x-accel-buffering"),
        HeaderValue::from_static("no"),
    );
    Ok(([unbuffered], events.keep_alive(KeepAlive::new().interval(KEEP_ALIVE))).into_response())
}

/// The position of one client in the events of one reservation.
struct Subscription {
    app: Arc<App>,
    id: Uuid,
    seen: i64,
    next: VecDeque<Event>,
    ended: bool,
}

fn stream_of(subscription: Subscription) -> impl Stream<Item = Result<SseEvent, Infallible>> {
    stream::unfold(subscription, async |mut subscription: Subscription| {
        if subscription.ended {
            return None;
        }
        while subscription.next.is_empty() {
            let app = Arc::clone(&subscription.app);
            let events = tokio::select! {
                () = app.stop.cancelled() => return None,
                events = app.strategy.events(subscription.id, subscription.seen, POLL_TIMEOUT) => events,
            };
            subscription.next.extend(events.ok().flatten()?);
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
