//! The middleware around every request: request id, tracing span, latency metric, and the body of
//! problem details.

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

/// The id of a request in its response, problem details, log lines and trace.
#[derive(Clone)]
pub(super) struct RequestId(pub(super) Arc<str>);

impl RequestId {
    /// The maximum length of a client's id, in characters.
    const MAX_LENGTH: usize = 128;

    /// The client's `X-Request-Id` if it is visible ASCII, which is safe in logs and headers; else
    /// a new UUID.
    fn of(headers: &HeaderMap) -> Self {
        let is_valid = |value: &HeaderValue| {
            let bytes = value.as_bytes();
            let fits = (1..=Self::MAX_LENGTH).contains(&bytes.len());
            fits && bytes.iter().all(u8::is_ascii_graphic)
        };
        let sent = headers.get(X_REQUEST_ID).filter(|value| is_valid(value));
        match sent.and_then(|value| value.to_str().ok()) {
            Some(id) => Self(id.into()),
            None => Self(Uuid::new_v4().to_string().into()),
        }
    }
}

/// The middleware of every route.
pub(super) async fn finish_response(State(app): State<Arc<App>>, mut request: Request, next: Next) -> Response {
    let began = Instant::now();
    let id = RequestId::of(request.headers());
    let method = method_label(request.method());
    let path = request.extensions().get::<MatchedPath>().cloned();
    let route = path.as_ref().map_or("unknown", MatchedPath::as_str);
    let span = tracing::info_span!("request", id = &*id.0, method, route);
    request.extensions_mut().insert(id.clone());

    let mut response = next.run(request).instrument(span.clone()).await;

    if let Some(problem) = response.extensions_mut().remove::<Problem>() {
        if let Some(cause) = problem.cause() {
            let _span = span.enter();
            app.causes.warn_text("outcome unknown: a backend is unavailable", cause);
        }
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
    app.metrics.observe_response(method, route, status, began.elapsed());
    tracing::debug!(parent: &span, status, took_us = began.elapsed().as_micros(), "answered");
    response
}

/// Writes the body of the problem details. Status and other headers stay.
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

/// The method as a metric label. Clients can send arbitrary methods, so unknown ones are `other`.
fn method_label(method: &Method) -> &'static str {
    match *method {
        Method::GET => "GET",
        Method::HEAD => "HEAD",
        Method::POST => "POST",
        Method::PUT => "PUT",
        _ => "other",
    }
}
