//! The HTTP API, the same for every level.

mod events;
mod input;
mod middleware;
mod openapi;
mod operations;
mod reservations;
mod sales;

use std::{sync::Arc, time::Duration};

use axum::{
    Router,
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
};

/// The state of a server, shared by all handlers.
pub(crate) struct App {
    pub(crate) strategy: Box<dyn Reserve>,
    pub(crate) database: Database,
    pub(crate) metrics: Metrics,
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
    pub(crate) limits: Limits,
    /// How long a connection may be idle before its next request.
    pub(crate) keep_alive: Duration,
    /// Cancelled when the server shuts down.
    pub(crate) stop: CancellationToken,
}

/// All operations, each with its documentation.
fn documented_routes() -> OpenApiRouter<Arc<App>> {
    OpenApiRouter::new()
        .routes(routes!(reservations::reserve))
        .routes(routes!(reservations::look_up, reservations::cancel))
        .routes(routes!(events::follow))
        .routes(routes!(sales::look_up, sales::open))
        .routes(routes!(operations::alive))
        .routes(routes!(operations::ready))
        .routes(routes!(operations::metrics))
        .routes(routes!(operations::explain_problem))
        .routes(routes!(openapi::document))
}

/// The router with its middleware.
pub(crate) fn router(app: Arc<App>) -> Router {
    let (router, _) = documented_routes().split_for_parts();
    router
        .fallback(async || Problem::from(ProblemKind::NotFound))
        .method_not_allowed_fallback(async || Problem::from(ProblemKind::MethodNotAllowed))
        .layer(CatchPanicLayer::custom(|_| -> Response {
            // The panic hook has logged it.
            Problem::from(ProblemKind::Crashed).into_response()
        }))
        .layer(from_fn_with_state(Arc::clone(&app), middleware::finish_response))
        .with_state(app)
}
