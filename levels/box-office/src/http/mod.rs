//! The HTTP API, the same for every level.

mod events;
mod input;
mod middleware;
mod openapi;
mod operations;
mod reservations;
mod sales;

use std::sync::Arc;

use axum::{
    Router,
    middleware::from_fn_with_state,
    response::{IntoResponse, Response},
    routing::{MethodRouter, get, post},
};
use sqlx::PgPool;
use tokio::sync::Semaphore;
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tower_http::catch_panic::CatchPanicLayer;

use crate::{
    AdminToken, CauseLog, Instrumentation, Limits, Reserve,
    metrics::Metrics,
    problem::{Problem, ProblemKind},
    readiness::Readiness,
};

/// The state of a server, shared by all handlers.
pub(crate) struct App {
    pub(crate) strategy: Box<dyn Reserve>,
    pub(crate) database: PgPool,
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
    /// Cancelled when the server shuts down.
    pub(crate) stop: CancellationToken,
}

/// All paths and their handlers.
fn route_table() -> [(&'static str, MethodRouter<Arc<App>>); 9] {
    [
        ("/api/sales/{id}/reservations", post(reservations::reserve)),
        ("/api/reservations/{id}", get(reservations::look_up)),
        ("/api/reservations/{id}/events", get(events::follow)),
        ("/api/sales/{id}", get(sales::look_up).put(sales::open)),
        ("/livez", get(operations::alive)),
        ("/readyz", get(operations::ready)),
        ("/metrics", get(operations::metrics)),
        ("/problems/{name}", get(operations::explain_problem)),
        ("/openapi.json", get(openapi::document)),
    ]
}

/// The router with its middleware.
pub(crate) fn routes(app: Arc<App>) -> Router {
    route_table()
        .into_iter()
        .fold(Router::new(), |router, (path, methods)| router.route(path, methods))
        .fallback(async || Problem::from(ProblemKind::NotFound))
        .method_not_allowed_fallback(async || Problem::from(ProblemKind::MethodNotAllowed))
        .layer(CatchPanicLayer::custom(|_| -> Response {
            // The panic hook has logged it.
            Problem::from(ProblemKind::Crashed).into_response()
        }))
        .layer(from_fn_with_state(Arc::clone(&app), middleware::finish_response))
        .with_state(app)
}
