//! The live page: a sale as it is being sold, and a rush that can be started from it.
//!
//! While nobody watches, it costs nothing: the rows are polled by one task, on a connection of its
//! own, that runs only as long as there is a watcher.

mod feed;
mod rush;
mod state;

use std::{convert::Infallible, sync::Arc, time::Duration};

use axum::{
    Router,
    body::Body,
    extract::State,
    http::{HeaderName, HeaderValue, Method, header},
    response::{
        IntoResponse, Response,
        sse::{Event as SseEvent, KeepAlive},
    },
};
use futures_util::{StreamExt, stream};
use serde::Serialize;
use tower_http::cors::CorsLayer;
use utoipa_axum::{router::OpenApiRouter, routes};
use uuid::Uuid;

pub(crate) use self::{feed::LiveFeed, rush::RushTarget};
use super::{
    App, UNBUFFERED, events,
    input::{JsonBody, SaleInPath},
    method_not_allowed,
    sales::Admin,
};
use crate::{Level, Origin, SaleId, Settings, Strategy, api, problem::Problem};

/// The page. `{{nonce}}`, `{{admin}}` and `{{peers}}` are filled in for each response.
const PAGE: &str = include_str!("page.html");

/// The interval of the event `beat`, by which a page notices that a connection is dead. Also the
/// interval within which a proxy sees traffic.
const BEAT: Duration = Duration::from_secs(5);

/// All operations of the page.
pub(super) fn routes() -> OpenApiRouter<Arc<App>> {
    OpenApiRouter::new()
        .routes(routes!(newest))
        .routes(routes!(newest_events))
        .routes(routes!(one))
        .routes(routes!(one_events))
        .routes(routes!(start_rush))
}

/// Lets the pages of peers read the events, and start a rush with the admin token. Without peers
/// the browser's same-origin policy stays as it is.
pub(super) fn allow_peers(routes: Router<Arc<App>>, peers: &[Origin]) -> Router<Arc<App>> {
    if peers.is_empty() {
        return routes;
    }
    let origins: Vec<HeaderValue> = peers.iter().filter_map(|peer| peer.as_str().parse().ok()).collect();
    let cors = CorsLayer::new()
        .allow_origin(origins)
        .allow_methods([Method::GET, Method::POST])
        .allow_headers([header::AUTHORIZATION, header::CONTENT_TYPE]);
    // The layer answers the preflight requests only of a fallback that is there before it.
    routes.method_not_allowed_fallback(method_not_allowed).layer(cors)
}

/// What the page shows of the server itself.
#[derive(Serialize)]
pub(crate) struct About {
    level: &'static str,
    strategy: &'static str,
    summary: &'static str,
    instance: String,
}

impl About {
    pub(crate) fn new(level: &Level, strategy: &Strategy, settings: &Settings) -> Self {
        Self {
            level: level.name,
            strategy: strategy.name,
            summary: strategy.summary,
            instance: settings.instance.clone(),
        }
    }
}

/// The live page of the newest sale: the one with the greatest id.
#[utoipa::path(
    get,
    path = "/live",
    operation_id = "live",
    responses((status = 200, description = "The page", body = str, content_type = "text/html"))
)]
async fn newest(State(app): State<Arc<App>>) -> Response {
    page(&app)
}

/// The live page of one sale.
#[utoipa::path(
    get,
    path = "/live/{id}",
    operation_id = "live_sale",
    params(("id" = i64, Path, description = "The sale", minimum = 0)),
    responses((status = 200, description = "The page, also while there is no such sale", body = str, content_type = "text/html"))
)]
async fn one(State(app): State<Arc<App>>, SaleInPath(_): SaleInPath) -> Response {
    page(&app)
}

/// The page has its style and its script inline, so the policy names them by a nonce and allows
/// nothing else. No form can be submitted, and no other site can frame it.
fn page(app: &App) -> Response {
    let nonce = Uuid::new_v4().simple().to_string();
    let peers: Vec<&str> = app.live.peers().iter().map(Origin::as_str).collect();
    let peers = peers.join(" ");
    let admin = if app.admin_token.is_some() { "on" } else { "off" };
    let html = PAGE
        .replace("{{nonce}}", &nonce)
        .replace("{{admin}}", admin)
        .replace("{{peers}}", &peers);
    let policy = format!(
        "default-src 'none'; script-src 'nonce-{nonce}'; style-src 'nonce-{nonce}'; img-src data:; \
         connect-src 'self' {peers}; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    );
    let headers = [
        (header::CONTENT_TYPE, "text/html; charset=utf-8".to_owned()),
        (header::CONTENT_SECURITY_POLICY, policy),
        (header::CACHE_CONTROL, "no-store".to_owned()),
        (header::REFERRER_POLICY, "no-referrer".to_owned()),
        (header::X_CONTENT_TYPE_OPTIONS, "nosniff".to_owned()),
    ];
    (headers, html).into_response()
}

/// Streams the newest sale, and the next one once that is opened. See the operation for one sale.
#[utoipa::path(
    get,
    path = "/live/events",
    operation_id = "live_events",
    responses((status = 200, description = "The events", body = str, content_type = "text/event-stream"))
)]
async fn newest_events(State(app): State<Arc<App>>) -> Result<Response, Problem> {
    follow(&app, None)
}

/// Streams a sale as server-sent events, whether it exists yet or not.
///
/// `server` comes first: level, strategy and instance. `state` is the whole state of the sale, after
/// each change; a client that reads slowly misses states in between, and never the last. `away`
/// means that the database is unavailable, until the next `state`. `beat` means that the connection
/// lives.
#[utoipa::path(
    get,
    path = "/live/{id}/events",
    operation_id = "live_sale_events",
    params(("id" = i64, Path, description = "The sale", minimum = 0)),
    responses((status = 200, description = "The events", body = str, content_type = "text/event-stream"))
)]
async fn one_events(State(app): State<Arc<App>>, SaleInPath(sale): SaleInPath) -> Result<Response, Problem> {
    follow(&app, Some(sale))
}

fn follow(app: &Arc<App>, sale: Option<SaleId>) -> Result<Response, Problem> {
    let frames = feed::subscribe(app, sale)?;
    let about = json(&app.live.about);
    let first = [
        events::reconnect_delay(Uuid::new_v4()),
        Ok(SseEvent::default().event("server").data(about)),
    ];
    let stop = app.stop.clone();
    let states = stream::unfold(frames, move |mut frames| {
        let stop = stop.clone();
        async move {
            loop {
                stop.run_until_cancelled(frames.changed()).await?.ok()?;
                let frame = frames.borrow_and_update().clone();
                if let Some(frame) = frame {
                    let event = SseEvent::default().event(frame.event).data(&frame.data);
                    return Some((Ok::<_, Infallible>(event), frames));
                }
            }
        }
    });
    let beat = SseEvent::default().event("beat").data("-");
    let beat = KeepAlive::new().interval(BEAT).event(beat);
    Ok(events::response(stream::iter(first).chain(states), beat))
}

/// JSON of a type without maps and without a fallible `Serialize`.
fn json(value: &impl Serialize) -> String {
    serde_json::to_string(value).expect("this type always serializes to JSON")
}

/// Starts a rush: opens a new sale, and lets all buyers order from it at once.
///
/// The answer is a stream of JSON lines, each with the progress so far; the last one has `ended`.
/// Whoever stops reading stops the rush. There is one rush at a time.
#[utoipa::path(
    post,
    path = "/live/rush",
    operation_id = "rush",
    request_body = api::NewRush,
    responses((status = 200, description = "The progress", body = str, content_type = "application/x-ndjson")),
    security(("admin token" = []))
)]
async fn start_rush(
    _: Admin,
    State(app): State<Arc<App>>,
    JsonBody(wanted): JsonBody<api::NewRush>,
) -> Result<Response, Problem> {
    let lines = rush::start(&app, wanted).await?;
    let lines = Body::from_stream(lines.map(Ok::<_, Infallible>));
    let headers: [(HeaderName, HeaderValue); 2] = [
        (header::CONTENT_TYPE, HeaderValue::from_static("application/x-ndjson")),
        UNBUFFERED,
    ];
    Ok((headers, lines).into_response())
}
