//! Error responses as problem details (RFC 9457): one table of all problem types.

use std::{borrow::Cow, time::Duration};

use axum::{
    http::{HeaderName, HeaderValue, StatusCode, header},
    response::{IntoResponse, Response},
};
use uuid::Uuid;

use crate::{Indeterminate, RateLimited, Refusal, ReserveError, api, causes};

/// A problem type: the stable `type` of an error response, by which clients tell problems apart.
///
/// It is wider than [`Refusal`], for whose variants some of its own stand: it also has the
/// [`Indeterminate`] answers (503) and the errors of HTTP itself (4xx, 500). It carries no data and
/// outlives renames in the domain, because its names are part of the HTTP API and, as reasons of a
/// refusal, of LV.4's rows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ProblemKind {
    /// [`Refusal::SoldOut`].
    SoldOut,
    /// [`Refusal::AlreadyReserved`].
    AlreadyReserved,
    /// [`Refusal::KeyOfAnotherBuyer`].
    KeyOfAnotherBuyer,
    /// [`Refusal::UnknownSale`], and every other request for a sale that does not exist.
    UnknownSale,
    /// [`Refusal::Expired`]. No request is answered with it: it is the reason of a final state.
    Expired,
    /// [`Refusal::NotVip`].
    NotVip,
    /// A request for priority, or the naming of VIPs, on a server that has no priority.
    NoPriority,
    /// [`Indeterminate::Overloaded`].
    Overloaded,
    /// [`Indeterminate::Backlogged`].
    Backlogged,
    /// [`Indeterminate::TimedOut`].
    TimedOut,
    /// [`Indeterminate::BackendAway`].
    BackendAway,
    /// [`ReserveError::RateLimited`].
    RateLimited,
    /// The reservation does not exist.
    UnknownReservation,
    /// The order holds no ticket that could be released: it is not decided, refused, or confirmed.
    NotHeld,
    /// The sale exists with another name or capacity.
    SaleDiffers,
    /// A rush was to be started while another one runs.
    RushInProgress,
    /// The admin token is missing or wrong.
    Unauthorized,
    /// This server was started without an admin token.
    NoAdminToken,
    /// No route matches the path.
    NotFound,
    /// The route does not support the method.
    MethodNotAllowed,
    /// An id in the path is malformed.
    MalformedPath,
    /// The `Idempotency-Key` is malformed.
    MalformedKey,
    /// The `Last-Event-ID` is malformed.
    MalformedEventId,
    /// The body is not JSON.
    MalformedBody,
    /// The body is JSON, but does not match the schema.
    InvalidBody,
    /// The body exceeds the size limit.
    BodyTooLarge,
    /// The body was not received in time.
    BodyTooSlow,
    /// The `Content-Type` is not JSON.
    NotJson,
    /// The handler of this request panicked.
    Crashed,
}

/// The specification of one problem type.
struct Spec {
    name: &'static str,
    status: StatusCode,
    title: &'static str,
    meaning: &'static str,
}

impl ProblemKind {
    /// All problem types.
    pub const ALL: [Self; 29] = [
        Self::SoldOut,
        Self::AlreadyReserved,
        Self::KeyOfAnotherBuyer,
        Self::UnknownSale,
        Self::Expired,
        Self::NotVip,
        Self::NoPriority,
        Self::Overloaded,
        Self::Backlogged,
        Self::TimedOut,
        Self::BackendAway,
        Self::RateLimited,
        Self::UnknownReservation,
        Self::NotHeld,
        Self::SaleDiffers,
        Self::RushInProgress,
        Self::Unauthorized,
        Self::NoAdminToken,
        Self::NotFound,
        Self::MethodNotAllowed,
        Self::MalformedPath,
        Self::MalformedKey,
        Self::MalformedEventId,
        Self::MalformedBody,
        Self::InvalidBody,
        Self::BodyTooLarge,
        Self::BodyTooSlow,
        Self::NotJson,
        Self::Crashed,
    ];

    /// The path under which a server documents its problem types: a `type` is this path and the
    /// name.
    pub const PATH: &'static str = "/problems/";

    /// The table of all problem types.
    const fn spec(self) -> Spec {
        let (name, status, title, meaning) = match self {
            Self::SoldOut => (
                "sold-out",
                StatusCode::CONFLICT,
                "Sold out",
                "No ticket of this sale is left. The answer is final: do not retry.",
            ),
            Self::AlreadyReserved => (
                "already-reserved",
                StatusCode::CONFLICT,
                "Already reserved",
                "This buyer already has a reservation in this sale under another request key: `reservation_id`.",
            ),
            Self::KeyOfAnotherBuyer => (
                "key-of-another-buyer",
                StatusCode::UNPROCESSABLE_ENTITY,
                "Request key of another buyer",
                "Another buyer of this sale has used this request key. A key belongs to one buyer.",
            ),
            Self::UnknownSale => (
                "unknown-sale",
                StatusCode::NOT_FOUND,
                "Unknown sale",
                "There is no sale with this id.",
            ),
            Self::Expired => (
                "expired",
                StatusCode::CONFLICT,
                "Expired",
                "The order was accepted and was older than its time to live when it was decided. It took no ticket. Order again, with a new request key.",
            ),
            Self::NotVip => (
                "not-vip",
                StatusCode::UNPROCESSABLE_ENTITY,
                "Not a VIP of this sale",
                "Only buyers whom the admin has named as VIPs of this sale may ask for `priority: vip`. The order was not accepted, which says nothing about the stock. Order without it.",
            ),
            Self::NoPriority => (
                "no-priority",
                StatusCode::UNPROCESSABLE_ENTITY,
                "No priority",
                "This server has no priority: its strategy does not support it, or it was started without ORDER_PRIORITY. Nothing was done. Order without `priority`.",
            ),
            Self::Overloaded => (
                "overloaded",
                StatusCode::SERVICE_UNAVAILABLE,
                "Outcome unknown: overloaded",
                "No connection or lock could be acquired in time. Retry with the same request key.",
            ),
            Self::Backlogged => (
                "backlogged",
                StatusCode::SERVICE_UNAVAILABLE,
                "Not accepted: orders wait for too long",
                "Accepted orders wait for longer than their time to live, so this one would expire. An earlier request with this key may have been accepted: retry with the same request key after `Retry-After` seconds.",
            ),
            Self::TimedOut => (
                "timed-out",
                StatusCode::SERVICE_UNAVAILABLE,
                "Outcome unknown: timed out",
                "The request timed out. It may have taken effect: retry with the same request key.",
            ),
            Self::BackendAway => (
                "backend-away",
                StatusCode::SERVICE_UNAVAILABLE,
                "Outcome unknown: a backend is unavailable",
                "A backend is unreachable or failed. The request may have taken effect: retry with the same request key.",
            ),
            Self::RateLimited => (
                "rate-limited",
                StatusCode::TOO_MANY_REQUESTS,
                "Too many requests",
                "The request was over a rate limit and was not processed. It says nothing about the sale. Send it again, with the same request key, after `Retry-After` seconds.",
            ),
            Self::UnknownReservation => (
                "unknown-reservation",
                StatusCode::NOT_FOUND,
                "Unknown reservation",
                "There is no reservation with this id.",
            ),
            Self::NotHeld => (
                "not-held",
                StatusCode::CONFLICT,
                "Not held",
                "Only an order whose ticket is held can be cancelled. This one is not decided yet, was refused, or is confirmed.",
            ),
            Self::SaleDiffers => (
                "sale-differs",
                StatusCode::CONFLICT,
                "The sale exists with another name or capacity",
                "A sale keeps the name and capacity that it was opened with.",
            ),
            Self::RushInProgress => (
                "rush-in-progress",
                StatusCode::CONFLICT,
                "A rush is in progress",
                "There is one rush at a time from the live page, on all instances together. Wait until it has ended.",
            ),
            Self::Unauthorized => (
                "unauthorized",
                StatusCode::UNAUTHORIZED,
                "Admin token missing or wrong",
                "This operation requires the header `Authorization: Bearer <admin token>`.",
            ),
            Self::NoAdminToken => (
                "no-admin-token",
                StatusCode::FORBIDDEN,
                "Admin operations are disabled",
                "This server was started without an admin token. Set OVERSOLD_ADMIN_TOKEN.",
            ),
            Self::NotFound => (
                "not-found",
                StatusCode::NOT_FOUND,
                "Not found",
                "No route matches this path. `/openapi.json` lists all paths.",
            ),
            Self::MethodNotAllowed => (
                "method-not-allowed",
                StatusCode::METHOD_NOT_ALLOWED,
                "Method not allowed",
                "This path does not support this method. The header `Allow` lists those that it supports.",
            ),
            Self::MalformedPath => (
                "malformed-path",
                StatusCode::BAD_REQUEST,
                "Malformed path",
                "An id in the path is malformed.",
            ),
            Self::MalformedKey => (
                "malformed-request-key",
                StatusCode::BAD_REQUEST,
                "Malformed request key",
                "`Idempotency-Key` must be 1 to 128 visible ASCII characters, and sent once.",
            ),
            Self::MalformedEventId => (
                "malformed-event-id",
                StatusCode::BAD_REQUEST,
                "Malformed event id",
                "`Last-Event-ID` must be the number of an event, in digits.",
            ),
            Self::MalformedBody => (
                "malformed-body",
                StatusCode::BAD_REQUEST,
                "Malformed body",
                "The body is not JSON in UTF-8.",
            ),
            Self::InvalidBody => (
                "invalid-body",
                StatusCode::UNPROCESSABLE_ENTITY,
                "Invalid body",
                "The body is JSON, but does not match the schema of this operation.",
            ),
            Self::BodyTooLarge => (
                "body-too-large",
                StatusCode::PAYLOAD_TOO_LARGE,
                "Body too large",
                "The body is longer than 16 KiB.",
            ),
            Self::BodyTooSlow => (
                "body-too-slow",
                StatusCode::REQUEST_TIMEOUT,
                "Body too slow",
                "The body was not received in time.",
            ),
            Self::NotJson => (
                "not-json",
                StatusCode::UNSUPPORTED_MEDIA_TYPE,
                "Not JSON",
                "This operation requires the header `Content-Type: application/json`.",
            ),
            Self::Crashed => (
                "crashed",
                StatusCode::INTERNAL_SERVER_ERROR,
                "Internal server error",
                "A bug in the server. Its log has the panic, with the request id.",
            ),
        };
        Spec {
            name,
            status,
            title,
            meaning,
        }
    }

    /// The stable name, such as `sold-out`.
    pub const fn name(self) -> &'static str {
        self.spec().name
    }

    /// The HTTP status.
    pub const fn status(self) -> StatusCode {
        self.spec().status
    }

    /// The `title` member: a short summary.
    pub const fn title(self) -> &'static str {
        self.spec().title
    }

    /// The documentation: what it means and what a client can do.
    pub const fn meaning(self) -> &'static str {
        self.spec().meaning
    }

    /// The `type` member, such as `/problems/sold-out`: a URI reference relative to the server.
    pub fn uri(self) -> String {
        format!("{}{}", Self::PATH, self.name())
    }

    /// The additional response header, if the status calls for one.
    pub(crate) const fn header(self) -> Option<(HeaderName, &'static str)> {
        match self.status() {
            StatusCode::SERVICE_UNAVAILABLE | StatusCode::TOO_MANY_REQUESTS => Some((header::RETRY_AFTER, "1")),
            StatusCode::UNAUTHORIZED => Some((header::WWW_AUTHENTICATE, "Bearer")),
            // The rest of the body may still arrive, and would be parsed as the next request.
            StatusCode::REQUEST_TIMEOUT => Some((header::CONNECTION, "close")),
            _ => None,
        }
    }

    /// The problem type of this name.
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| kind.name() == name)
    }

    /// The problem type of this `type` member.
    pub fn from_uri(uri: &str) -> Option<Self> {
        Self::from_name(uri.strip_prefix(Self::PATH)?)
    }
}

/// Header fields of the IETF draft *RateLimit header fields for HTTP*
/// (draft-ietf-httpapi-ratelimit-headers-10): the policies in force, and what is left of the one that
/// was exceeded.
pub(crate) const RATE_LIMIT_POLICY: HeaderName = HeaderName::from_static("ratelimit-policy");
pub(crate) const RATE_LIMIT: HeaderName = HeaderName::from_static("ratelimit");

/// Whole seconds, rounded up: a client that comes back earlier is refused again.
fn whole_seconds(duration: Duration) -> u128 {
    duration.as_millis().div_ceil(1000).max(1)
}

/// The headers of a 429. Names of policies are structured fields, which need the quotes.
fn rate_limit_headers(limited: &RateLimited) -> Vec<(HeaderName, String)> {
    let seconds = whole_seconds(limited.retry_after);
    let policies = limited.policies.iter();
    let policies: Vec<String> = policies
        .map(|policy| format!("{:?};q={};w=1", policy.name, policy.quota))
        .collect();
    vec![
        (header::RETRY_AFTER, seconds.to_string()),
        (RATE_LIMIT_POLICY, policies.join(", ")),
        (RATE_LIMIT, format!("{:?};r=0;t={seconds}", limited.exceeded)),
    ]
}

/// An error response. [`http`](crate::http)'s middleware writes its body.
#[derive(Clone, Debug)]
pub(crate) struct Problem {
    kind: ProblemKind,
    detail: Cow<'static, str>,
    reservation: Option<Uuid>,
    /// What the log says, and the client is not told: it may reveal internals.
    cause: Option<String>,
    /// Headers of this occurrence.
    headers: Vec<(HeaderName, String)>,
}

impl Problem {
    /// An occurrence of a problem, with a `detail` of its own.
    pub(crate) fn new(kind: ProblemKind, detail: impl Into<Cow<'static, str>>) -> Self {
        Self {
            kind,
            detail: detail.into(),
            reservation: None,
            cause: None,
            headers: vec![],
        }
    }

    /// Whether the same request may succeed later: a backend is unavailable or overloaded (503).
    pub(crate) fn is_temporary(&self) -> bool {
        self.kind.status() == StatusCode::SERVICE_UNAVAILABLE
    }

    /// What went wrong, for the log.
    pub(crate) fn cause(&self) -> Option<&str> {
        self.cause.as_deref()
    }

    /// The body of the response.
    pub(crate) fn body(&self, request_id: &str) -> api::Problem {
        api::Problem {
            kind: self.kind.uri(),
            title: self.kind.title().to_owned(),
            status: self.kind.status().as_u16(),
            detail: self.detail.clone().into_owned(),
            request_id: request_id.to_owned(),
            reservation_id: self.reservation,
        }
    }
}

/// An occurrence without a detail of its own.
impl From<ProblemKind> for Problem {
    fn from(kind: ProblemKind) -> Self {
        Self::new(kind, kind.meaning())
    }
}

impl From<Refusal> for ProblemKind {
    fn from(refusal: Refusal) -> Self {
        match refusal {
            Refusal::SoldOut => Self::SoldOut,
            Refusal::AlreadyReserved { .. } => Self::AlreadyReserved,
            Refusal::KeyOfAnotherBuyer => Self::KeyOfAnotherBuyer,
            Refusal::UnknownSale => Self::UnknownSale,
            Refusal::Expired => Self::Expired,
            Refusal::NotVip => Self::NotVip,
        }
    }
}

impl From<&Indeterminate> for ProblemKind {
    fn from(indeterminate: &Indeterminate) -> Self {
        match indeterminate {
            Indeterminate::Overloaded => Self::Overloaded,
            Indeterminate::Backlogged { .. } => Self::Backlogged,
            Indeterminate::TimedOut => Self::TimedOut,
            Indeterminate::BackendAway(_) => Self::BackendAway,
        }
    }
}

impl From<&ReserveError> for ProblemKind {
    fn from(error: &ReserveError) -> Self {
        match error {
            ReserveError::Refused(refusal) => Self::from(*refusal),
            ReserveError::Indeterminate(indeterminate) => Self::from(indeterminate),
            ReserveError::RateLimited(_) => Self::RateLimited,
        }
    }
}

impl From<ReserveError> for Problem {
    fn from(error: ReserveError) -> Self {
        let mut problem = Self::from(ProblemKind::from(&error));
        match error {
            ReserveError::Refused(refusal) => problem.reservation = refusal.earlier().map(|earlier| earlier.id),
            ReserveError::Indeterminate(Indeterminate::BackendAway(why)) => {
                problem.cause = Some(causes(why.as_ref()));
            }
            ReserveError::RateLimited(limited) => problem.headers = rate_limit_headers(&limited),
            ReserveError::Indeterminate(Indeterminate::Backlogged { retry_after }) => {
                problem.headers = vec![(header::RETRY_AFTER, whole_seconds(retry_after).to_string())];
            }
            ReserveError::Indeterminate(_) => {}
        }
        problem
    }
}

impl From<sqlx::Error> for Problem {
    fn from(error: sqlx::Error) -> Self {
        ReserveError::from(error).into()
    }
}

impl IntoResponse for Problem {
    /// Status and headers only. The middleware writes the body, because it knows the request id.
    fn into_response(self) -> Response {
        let mut response = self.kind.status().into_response();
        if let Some((name, value)) = self.kind.header() {
            response.headers_mut().insert(name, HeaderValue::from_static(value));
        }
        for (name, value) in &self.headers {
            if let Ok(value) = HeaderValue::from_str(value) {
                response.headers_mut().insert(name, value);
            }
        }
        response.extensions_mut().insert(self);
        response
    }
}
