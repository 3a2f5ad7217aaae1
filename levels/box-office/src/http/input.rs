//! What clients send, read with suspicion: whatever is wrong with it becomes a problem that says what.

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
            let detail = "a sale's id is a whole number from 0 to 9223372036854775807, in digits";
            Problem::new(ProblemKind::MalformedPath, detail)
        };
        let Path(text) = Path::<String>::from_request_parts(parts, app)
            .await
            .map_err(|_| malformed())?;
        // `parse` alone would take "+7", "-0" and "007" as well: one sale, one path.
        if !text.bytes().all(|byte| byte.is_ascii_digit()) || text.len() > 1 && text.starts_with('0') {
            return Err(malformed());
        }
        text.parse().map(Self).map_err(|_| malformed())
    }
}

/// The `{id}` of `/api/reservations/{id}`. What can't be an id is no reservation's.
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

/// Reads `Idempotency-Key`. A buyer who sends none gets a key that nobody else has.
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

/// A body of JSON.
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

async fn read(body: Body, limits: &Limits) -> Result<Bytes, Problem> {
    let too_large = || {
        let detail = format!("the body is longer than {} bytes", limits.body_bytes);
        Problem::new(ProblemKind::BodyTooLarge, detail)
    };
    // A length that is declared is enough to refuse: nothing is read, and no "100 Continue" invites the rest.
    if body.size_hint().lower() > limits.body_bytes as u64 {
        return Err(too_large());
    }
    let whole = Limited::new(body, limits.body_bytes).collect();
    match timeout(limits.body_timeout, whole).await {
        Ok(Ok(body)) => Ok(body.to_bytes()),
        Ok(Err(error)) if error.is::<LengthLimitError>() => Err(too_large()),
        Ok(Err(_)) => Err(Problem::new(ProblemKind::MalformedBody, "the body broke off")),
        Err(_) => {
            let detail = format!("the body did not come within {:?}", limits.body_timeout);
            Err(Problem::new(ProblemKind::BodyTooSlow, detail))
        }
    }
}

/// Tells what is not JSON from what is not the JSON that the call takes.
fn parse<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, Problem> {
    let malformed = |why: String| Problem::new(ProblemKind::MalformedBody, why);
    let text = std::str::from_utf8(bytes).map_err(|why| malformed(format!("the body is not UTF-8: {why}")))?;
    // Looks at the whole text without building anything from it, however deep it nests.
    serde_json::from_str::<IgnoredAny>(text).map_err(|why| malformed(format!("the body is not JSON: {why}")))?;

    // serde would take `[42]` for `{"buyer_id": 42}`.
    if !text.trim_ascii_start().starts_with('{') {
        return Err(Problem::new(ProblemKind::InvalidBody, "the body is not a JSON object"));
    }
    let mut json = serde_json::Deserializer::from_str(text);
    serde_path_to_error::deserialize(&mut json).map_err(|why| {
        let field = why.path().to_string();
        let why = why.into_inner();
        let detail = match field.as_str() {
            // The whole body: serde's words name the field.
            "." => format!("the body: {why}"),
            field => format!("`{field}`: {why}"),
        };
        Problem::new(ProblemKind::InvalidBody, detail)
    })
}
