//! The HTTP API, the same for every level.

mod events;
mod input;
mod live;
mod middleware;
mod openapi;
mod operations;
mod reservations;
mod sales;

use std::{sync::Arc, time::Duration};

use axum::{
    Router,
    http::{HeaderName, HeaderValue},
    middleware::from_fn_with_state,
    response::{IntoResponse, Response},
};
use tokio::sync::Semaphore;
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tower_http::catch_panic::CatchPanicLayer;
use utoipa_axum::{router::OpenApiRouter, routes};

use crate::{
    AdminToken, CauseLog, Database, Instrumentation, Limits, Reserve,
    metrics::Metrics,
    problem::{Problem, ProblemKind},
    readiness::Readiness,
    sale_states::SaleStates,
};

pub(crate) use self::live::{About, LiveFeed, RushTarget};

/// The header that keeps nginx from buffering a stream.
const UNBUFFERED: (HeaderName, HeaderValue) = (
    HeaderName::from_static("x-accel-buffering"),
    HeaderValue::from_static("no"),
);

/// The state of a server, shared by all handlers.
pub(crate) struct App {
    pub(crate) strategy: Box<dyn Reserve>,
    pub(crate) database: Database,
    pub(crate) metrics: Metrics,
    /// The state of the latest sales, for the metrics.
    pub(crate) sales: SaleStates,
    pub(crate) readiness: Readiness,
    /// Why requests were answered that the outcome is unknown.
    pub(crate) causes: CauseLog,
    pub(crate) instrumentation: Instrumentation,
    /// The tasks of reservations in flight. They outlive their connections, so that a client that
    /// disconnects does not cancel a transaction half-way.
    pub(crate) reservations: TaskTracker,
    /// Permits for further reservations.
    pub(crate) permits: Arc<Semaphore>,
    pub(crate) admin_token: Option<AdminToken>,
    pub(crate) live: LiveFeed,
    /// Whether named buyers may ask for priority.
    pub(crate) has_priority: bool,
    pub(crate) limits: Limits,
    /// How long a connection may be idle before its next request.
    pub(crate) keep_alive: Duration,
    /// Cancelled when the server shuts down.
    pub(crate) stop: CancellationToken,
}

/// All operations but those of the live page, each with its documentation.
fn api_routes() -> OpenApiRouter<Arc<App>> {
    OpenApiRouter::new()
        .routes(routes!(reservations::reserve))
        .routes(routes!(reservations::look_up, reservations::cancel))
        .routes(routes!(events::follow))
        .routes(routes!(sales::look_up, sales::open))
        .routes(routes!(sales::name_vips))
        .routes(routes!(operations::alive))
        .routes(routes!(operations::ready))
        .routes(routes!(operations::metrics))
        .routes(routes!(operations::explain_problem))
        .routes(routes!(openapi::document))
}

/// All operations, each with its documentation.
fn documented_routes() -> OpenApiRouter<Arc<App>> {
    api_routes().merge(live::routes())
}

async fn method_not_allowed() -> Problem {
    ProblemKind::MethodNotAllowed.into()
}

/// The router with its middleware.
pub(crate) fn router(app: Arc<App>) -> Router {
    let (router, _) = api_routes().split_for_parts();
    let (live, _) = live::routes().split_for_parts();
    router
        .merge(live::allow_peers(live, app.live.peers()))
        .fallback(async || Problem::from(ProblemKind::NotFound))
        .method_not_allowed_fallback(method_not_allowed)
        .layer(CatchPanicLayer::custom(|_| -> Response {
            // The panic hook has logged it.
            Problem::from(ProblemKind::Crashed).into_response()
        }))
        .layer(from_fn_with_state(Arc::clone(&app), middleware::finish_response))
        .with_state(app)
}
