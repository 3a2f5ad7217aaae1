//! How an accepted order ends, told as it happens.

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

/// How long the strategy is asked to wait for an event at a time.
const POLL_TIMEOUT: Duration = Duration::from_secs(30);

/// How long it is asked whether there are events after the last one.
const REPLAY_TIMEOUT: Duration = Duration::from_secs(1);

/// How often a quiet stream says that it is still there, for proxies that close what is silent.
const KEEP_ALIVE: Duration = Duration::from_secs(15);

/// Tells how a reservation ends, as server-sent events: each is named after the status, and holds the reservation as JSON.
///
/// The first event of an order that is not decided yet is `accepted`, and the stream ends after the one that is final. It also ends when
/// this server does or can't read its database: the client comes back, to any instance, and says with `Last-Event-ID` where it was.
#[utoipa::path(
    get,
    path = "/api/reservations/{id}/events",
    operation_id = "events",
    params(
        ("id" = Uuid, Path, description = "The reservation"),
        ("Last-Event-ID" = Option<i64>, Header, description = "The number of the last event that the client has seen", minimum = 0),
    ),
    responses(
        (status = 200, description = "The events", body = str, content_type = "text/event-stream"),
        (status = 204, description = "There will be no more events after the last one: the client stays away"),
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
        // A strategy without events: its row was final from the start.
        next.push_back(Event { number: 1, reservation });
    }
    // Who has seen a stored event of an order that is final has seen the last. Who has not is still to be told, and if it was not found in time it comes.
    if next.is_empty() && seen.is_some_and(|seen| seen > 0) && reservations::find(&app, id).await?.is_final() {
        return Ok(StatusCode::NO_CONTENT.into_response());
    }
    let events = Sse::new(told(Subscription {
        app,
        id,
        seen: seen.unwrap_or(0),
        next,
        ended: false,
    }));
    // nginx would keep the events back until it has a bufferful.
    let unbuffered = (
        HeaderName::from_static("x-accel-buffering"),
        HeaderValue::from_static("no"),
    );
    Ok(([unbuffered], events.keep_alive(KeepAlive::new().interval(KEEP_ALIVE))).into_response())
}

/// One client on its way through the events of one reservation. It holds no more than it was just given.
struct Subscription {
    app: Arc<App>,
    id: Uuid,
    seen: i64,
    next: VecDeque<Event>,
    ended: bool,
}

fn told(subscription: Subscription) -> impl Stream<Item = Result<SseEvent, Infallible>> {
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
        Some((Ok(written(&event)), subscription))
    })
}

fn written(event: &Event) -> SseEvent {
    let data: &api::Reservation = &event.reservation;
    SseEvent::default()
        .id(event.number.to_string())
        .event(&data.status)
        .json_data(data)
        .expect("strings and numbers are always JSON")
}

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
