//! Operations for operators and monitoring: probes, metrics, problem documentation.

use std::sync::Arc;

use axum::{
    extract::{Path, State, rejection::PathRejection},
    http::header,
    response::IntoResponse,
};

use super::App;
use crate::{
    causes,
    problem::{Problem, ProblemKind},
    readiness,
};

/// The liveness probe.
#[utoipa::path(
    get,
    path = "/livez",
    operation_id = "livez",
    responses((status = 200, description = "The process is alive", body = str))
)]
pub(super) async fn alive() -> &'static str {
    "alive\n"
}

/// The readiness probe: whether the database, through the same pool as reservations (a server
/// without a free connection is not ready), and the other services of the strategy can do what a
/// sale needs. The `detail` of the problem says what cannot: operators read it, and no buyer.
#[utoipa::path(
    get,
    path = "/readyz",
    operation_id = "readyz",
    responses((status = 200, description = "The server is ready", body = str))
)]
pub(super) async fn ready(State(app): State<Arc<App>>) -> Result<&'static str, Problem> {
    match readiness::probe(&app).await {
        Ok(()) => Ok("ready\n"),
        Err(why) => Err(Problem::new(ProblemKind::from(&why), causes(&why))),
    }
}

/// The metrics of this server.
#[utoipa::path(
    get,
    path = "/metrics",
    operation_id = "metrics",
    responses((
        status = 200,
        description = "The metrics, for Prometheus",
        body = str,
        content_type = "application/openmetrics-text"
    ))
)]
pub(super) async fn metrics(State(app): State<Arc<App>>) -> impl IntoResponse {
    // Held until the text is written: it must not show half of another scrape.
    let mut scrape = app.sales.scrape().await;
    let read = scrape.read(&app.database.pool().connect_options()).await;
    if let Err(why) = &read {
        app.causes.warn_text("the metrics show no sale", why);
    }
    app.metrics.set_sales(&read.unwrap_or_default());
    let text = app.metrics.text().expect("writing to a string cannot fail");
    drop(scrape);
    let format = "application/openmetrics-text; version=1.0.0; charset=utf-8";
    ([(header::CONTENT_TYPE, format)], text)
}

/// The documentation of a problem type.
#[utoipa::path(
    get,
    path = "/problems/{name}",
    operation_id = "problem",
    params(("name" = String, Path, description = "The last segment of a problem's `type`", example = "sold-out")),
    responses((status = 200, description = "What the problem means and what a client can do", body = str))
)]
pub(super) async fn explain_problem(name: Result<Path<String>, PathRejection>) -> Result<String, Problem> {
    let kind = name.ok().and_then(|Path(name)| ProblemKind::from_name(&name));
    let kind = kind.ok_or(ProblemKind::NotFound)?;
    Ok(format!("{} ({})\n{}\n", kind.title(), kind.status(), kind.meaning()))
}
