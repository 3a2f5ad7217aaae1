//! What operators and monitors ask.

use std::sync::Arc;

use axum::{
    extract::{Path, State, rejection::PathRejection},
    http::header,
    response::IntoResponse,
};
use tokio::time::timeout;

use super::App;
use crate::{
    Indeterminate, ReserveError,
    problem::{Problem, ProblemKind},
};

/// The process lives.
#[utoipa::path(
    get,
    path = "/livez",
    operation_id = "livez",
    responses((status = 200, description = "It does", body = str))
)]
pub(super) async fn alive() -> &'static str {
    "alive\n"
}

/// The backends answer: the database through the pool that sells (one without a free connection is not ready for more), and whatever else
/// the strategy needs.
#[utoipa::path(
    get,
    path = "/readyz",
    operation_id = "readyz",
    responses((status = 200, description = "It does", body = str))
)]
pub(super) async fn ready(State(app): State<Arc<App>>) -> Result<&'static str, Problem> {
    let probe = async {
        sqlx::query("select 1")
            .execute(&app.database)
            .await
            .map_err(ReserveError::from)?;
        app.strategy.ready().await
    };
    // One statement and no transaction: nothing is lost when it is given up.
    match timeout(app.limits.probe_timeout, probe).await {
        Ok(Ok(())) => Ok("ready\n"),
        Ok(Err(no)) => Err(no.into()),
        Err(_) => Err(ProblemKind::from(&Indeterminate::Overloaded.into()).into()),
    }
}

/// The counts of this server.
#[utoipa::path(
    get,
    path = "/metrics",
    operation_id = "metrics",
    responses((
        status = 200,
        description = "For Prometheus",
        body = str,
        content_type = "application/openmetrics-text"
    ))
)]
pub(super) async fn metrics(State(app): State<Arc<App>>) -> impl IntoResponse {
    let text = app.metrics.text().expect("a string takes whatever is written to it");
    let format = "application/openmetrics-text; version=1.0.0; charset=utf-8";
    ([(header::CONTENT_TYPE, format)], text)
}

/// What a problem's `type` leads to.
#[utoipa::path(
    get,
    path = "/problems/{name}",
    operation_id = "problem",
    params(("name" = String, Path, description = "The last part of a problem's `type`", example = "sold-out")),
    responses((status = 200, description = "What the problem means and what a client can do", body = str))
)]
pub(super) async fn explain_problem(name: Result<Path<String>, PathRejection>) -> Result<String, Problem> {
    let kind = name.ok().and_then(|Path(name)| ProblemKind::from_name(&name));
    let kind = kind.ok_or(ProblemKind::NotFound)?;
    Ok(format!("{} ({})\n{}\n", kind.title(), kind.status(), kind.meaning()))
}
