//! What every request and every answer goes through: the request's id, its span in the log, its latency, and the body of
//! its problem.

use std::sync::Arc;

use axum::{
    Json,
    extract::{MatchedPath, Request, State},
    http::{HeaderMap, HeaderName, HeaderValue, Method, header},
    middleware::Next,
    response::{IntoResponse, Response},
};
use tokio::time::Instant;
use tracing::Instrument;
use uuid::Uuid;

use super::App;
use crate::problem::Problem;

const X_REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");

/// Names a request in its answer, its problem, the log and the trace.
#[derive(Clone)]
pub(super) struct RequestId(pub(super) Arc<str>);

impl RequestId {
    const MAX_LENGTH: usize = 128;

    /// The client's own, if it is one line of plain text that can be put anywhere; a fresh one otherwise.
    fn of(headers: &HeaderMap) -> Self {
        let sane = |value: &HeaderValue| {
            let bytes = value.as_bytes();
            let fits = (1..=Self::MAX_LENGTH).contains(&bytes.len());
            fits && bytes.iter().all(u8::is_ascii_graphic)
        };
        let sent = headers.get(X_REQUEST_ID).filter(|value| sane(value));
        match sent.and_then(|value| value.to_str().ok()) {
            Some(id) => Self(id.into()),
            None => Self(Uuid::new_v4().to_string().into()),
        }
    }
}

pub(super) async fn finish_response(State(app): State<Arc<App>>, mut request: Request, next: Next) -> Response {
    let began = Instant::now();
    let id = RequestId::of(request.headers());
    let method = known(request.method());
    let path = request.extensions().get::<MatchedPath>().cloned();
    let route = path.as_ref().map_or("unknown", MatchedPath::as_str);
    let span = tracing::info_span!("request", id = &*id.0, method, route);
    request.extensions_mut().insert(id.clone());

    let mut response = next.run(request).instrument(span.clone()).await;

    if let Some(problem) = response.extensions_mut().remove::<Problem>() {
        write_problem(&problem, &id, &mut response);
    }
    if let Ok(value) = HeaderValue::from_str(&id.0) {
        response.headers_mut().insert(X_REQUEST_ID, value);
    }
    if app.stop.is_cancelled() {
        response
            .headers_mut()
            .insert(header::CONNECTION, HeaderValue::from_static("close"));
    }
    let status = response.status().as_u16();
    app.metrics.answered(method, route, status, began.elapsed());
    tracing::debug!(parent: &span, status, took_us = began.elapsed().as_micros(), "answered");
    response
}

/// Puts the body where the problem was, and leaves status and headers as they are.
fn write_problem(problem: &Problem, id: &RequestId, response: &mut Response) {
    let written = Json(problem.body(&id.0)).into_response();
    *response.body_mut() = written.into_body();
    let headers = response.headers_mut();
    headers.remove(header::CONTENT_LENGTH);
    headers.insert(
        header::CONTENT_TYPE,
        HeaderValue::from_static("application/problem+json"),
    );
}

/// The method as a label: a client can make up any word for one.
fn known(method: &Method) -> &'static str {
    match *method {
        Method::GET => "GET",
        Method::HEAD => "HEAD",
        Method::POST => "POST",
        Method::PUT => "PUT",
        _ => "other",
    }
}
