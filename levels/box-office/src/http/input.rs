//! Extractors: validate the input of requests, and reject it with a problem that names the error.

use std::sync::Arc;

use axum::{
    body::Body,
    extract::{FromRequest, FromRequestParts, Path, Request},
    http::{HeaderMap, header, request::Parts},
};
use http_body_util::{BodyExt, LengthLimitError, Limited};
use hyper::body::{Body as _, Bytes};
use serde::de::{DeserializeOwned, IgnoredAny};
use tokio::time::timeout;
use uuid::Uuid;

use super::App;
use crate::{
    Limits, RequestKey, SaleId,
    problem::{Problem, ProblemKind},
};

/// The `{id}` of `/api/sales/{id}`.
pub(super) struct SaleInPath(pub(super) SaleId);

impl FromRequestParts<Arc<App>> for SaleInPath {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, app: &Arc<App>) -> Result<Self, Problem> {
        let malformed = || {
            let detail = "expected the id of a sale: a whole number from 0 to 9223372036854775807, in digits";
            Problem::new(ProblemKind::MalformedPath, detail)
        };
        let Path(text) = Path::<String>::from_request_parts(parts, app)
            .await
            .map_err(|_| malformed())?;
        // `parse` also accepts "+7", "-0" and "007", but a sale has one canonical path.
        if !text.bytes().all(|byte| byte.is_ascii_digit()) || text.len() > 1 && text.starts_with('0') {
            return Err(malformed());
        }
        text.parse().map(Self).map_err(|_| malformed())
    }
}

/// The `{id}` of `/api/reservations/{id}`. A malformed id is a [`ProblemKind::UnknownReservation`].
pub(super) struct ReservationInPath(pub(super) Uuid);

impl FromRequestParts<Arc<App>> for ReservationInPath {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, app: &Arc<App>) -> Result<Self, Problem> {
        let unknown = || Problem::from(ProblemKind::UnknownReservation);
        let Path(text) = Path::<String>::from_request_parts(parts, app)
            .await
            .map_err(|_| unknown())?;
        text.parse().map(Self).map_err(|_| unknown())
    }
}

/// Parses `Idempotency-Key`; without the header, the key is random.
///
/// # Errors
/// [`ProblemKind::MalformedKey`].
pub(super) fn request_key(headers: &HeaderMap) -> Result<RequestKey, Problem> {
    let malformed = |detail: String| Problem::new(ProblemKind::MalformedKey, detail);
    let mut sent = headers.get_all("idempotency-key").iter();
    let Some(key) = sent.next() else {
        return Ok(RequestKey::fresh());
    };
    if sent.next().is_some() {
        return Err(malformed("`Idempotency-Key` was sent more than once".to_owned()));
    }
    let key = String::from_utf8_lossy(key.as_bytes()).into_owned();
    RequestKey::try_from(key).map_err(|why| malformed(format!("`Idempotency-Key`: {why}")))
}

/// A JSON body.
pub(super) struct JsonBody<T>(pub(super) T);

impl<T: DeserializeOwned> FromRequest<Arc<App>> for JsonBody<T> {
    type Rejection = Problem;

    async fn from_request(request: Request, app: &Arc<App>) -> Result<Self, Problem> {
        if !is_json(request.headers()) {
            return Err(ProblemKind::NotJson.into());
        }
        let bytes = read(request.into_body(), &app.limits).await?;
        parse(&bytes).map(Self)
    }
}

fn is_json(headers: &HeaderMap) -> bool {
    let declared = headers.get(header::CONTENT_TYPE).and_then(|value| value.to_str().ok());
    let essence = declared.and_then(|value| value.split(';').next());
    essence.is_some_and(|essence| essence.trim().eq_ignore_ascii_case("application/json"))
}

/// Reads the body, within its size limit and timeout.
async fn read(body: Body, limits: &Limits) -> Result<Bytes, Problem> {
    let too_large = || {
        let detail = format!("the body is longer than {} bytes", limits.body_bytes);
        Problem::new(ProblemKind::BodyTooLarge, detail)
    };
    // A declared length over the limit is rejected before anything is read, so no "100 Continue" is
    // sent.
    if body.size_hint().lower() > limits.body_bytes as u64 {
        return Err(too_large());
    }
    let whole = Limited::new(body, limits.body_bytes).collect();
    match timeout(limits.body_timeout, whole).await {
        Ok(Ok(body)) => Ok(body.to_bytes()),
        Ok(Err(error)) if error.is::<LengthLimitError>() => Err(too_large()),
        Ok(Err(_)) => Err(Problem::new(ProblemKind::MalformedBody, "the body is incomplete")),
        Err(_) => {
            let detail = format!("the body was not received within {:?}", limits.body_timeout);
            Err(Problem::new(ProblemKind::BodyTooSlow, detail))
        }
    }
}

/// Parses the body: [`ProblemKind::MalformedBody`] if it is not JSON, [`ProblemKind::InvalidBody`]
/// if it does not match the schema.
fn parse<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, Problem> {
    let malformed = |why: String| Problem::new(ProblemKind::MalformedBody, why);
    let text = std::str::from_utf8(bytes).map_err(|why| malformed(format!("the body is not UTF-8: {why}")))?;
    // Validates the whole text without building a value, at any depth of nesting.
    serde_json::from_str::<IgnoredAny>(text).map_err(|why| malformed(format!("the body is not JSON: {why}")))?;

    // serde would also accept `[42]` for `{"buyer_id": 42}`.
    if !text.trim_ascii_start().starts_with('{') {
        return Err(Problem::new(ProblemKind::InvalidBody, "the body is not a JSON object"));
    }
    let mut json = serde_json::Deserializer::from_str(text);
    serde_path_to_error::deserialize(&mut json).map_err(|why| {
        let field = why.path().to_string();
        let why = why.into_inner();
        let detail = match field.as_str() {
            // The whole body: serde's message names the field.
            "." => format!("the body: {why}"),
            field => format!("`{field}`: {why}"),
        };
        Problem::new(ProblemKind::InvalidBody, detail)
    })
}
