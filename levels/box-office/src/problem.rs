//! Every answer of the HTTP contract that is not a success, as RFC 9457 problem details: one row each.

use std::borrow::Cow;

use axum::{
    http::{HeaderName, HeaderValue, StatusCode, header},
    response::{IntoResponse, Response},
};
use uuid::Uuid;

use crate::{Indeterminate, Refusal, ReserveError, api};

/// What can be wrong. The `type` of each is stable: clients tell problems apart by it, never by the words.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ProblemKind {
    /// [`Refusal::SoldOut`].
    SoldOut,
    /// [`Refusal::AlreadyReserved`].
    AlreadyReserved,
    /// [`Refusal::KeyOfAnotherBuyer`].
    KeyOfAnotherBuyer,
    /// [`Refusal::UnknownSale`], and every other call about a sale that nobody opened.
    UnknownSale,
    /// [`Indeterminate::Overloaded`].
    Overloaded,
    /// [`Indeterminate::TimedOut`].
    TimedOut,
    /// [`Indeterminate::BackendAway`].
    BackendAway,
    /// There is no reservation with this id.
    UnknownReservation,
    /// The sale was opened with another name or capacity.
    SaleDiffers,
    /// The admin token is missing or wrong.
    Unauthorized,
    /// This server was started without an admin token.
    NoAdminToken,
    /// No route has this path.
    NotFound,
    /// The route exists, but not with this method.
    MethodNotAllowed,
    /// An id in the path can't be one.
    MalformedPath,
    /// The `Idempotency-Key` can't be one.
    MalformedKey,
    /// The `Last-Event-ID` can't be one.
    MalformedEventId,
    /// The body is not JSON.
    MalformedBody,
    /// The body is JSON, but not what the call takes.
    InvalidBody,
    /// The body is longer than the server reads.
    BodyTooLarge,
    /// The body did not come in time.
    BodyTooSlow,
    /// The body is not declared to be JSON.
    NotJson,
    /// The server panicked at this one request.
    Crashed,
}

/// What the contract says about one kind of problem.
struct Row {
    name: &'static str,
    status: StatusCode,
    title: &'static str,
    meaning: &'static str,
}

impl ProblemKind {
    /// All of them.
    pub const ALL: [Self; 22] = [
        Self::SoldOut,
        Self::AlreadyReserved,
        Self::KeyOfAnotherBuyer,
        Self::UnknownSale,
        Self::Overloaded,
        Self::TimedOut,
        Self::BackendAway,
        Self::UnknownReservation,
        Self::SaleDiffers,
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

    /// Where a server explains its problems: a problem's `type` is this, followed by its name.
    pub const PATH: &'static str = "/problems/";

    const fn row(self) -> Row {
        let (name, status, title, meaning) = match self {
            Self::SoldOut => (
                "sold-out",
                StatusCode::CONFLICT,
                "Sold out",
                "Every ticket of this sale is taken. Asking again will not help.",
            ),
            Self::AlreadyReserved => (
                "already-reserved",
                StatusCode::CONFLICT,
                "Already reserved",
                "This buyer has a reservation in this sale under another request key: the one named in `reservation_id`.",
            ),
            Self::KeyOfAnotherBuyer => (
                "key-of-another-buyer",
                StatusCode::UNPROCESSABLE_ENTITY,
                "Request key of another buyer",
                "This request key was used by another buyer of this sale. A key belongs to one buyer.",
            ),
            Self::UnknownSale => (
                "unknown-sale",
                StatusCode::NOT_FOUND,
                "Unknown sale",
                "Nobody has opened a sale with this id.",
            ),
            Self::Overloaded => (
                "overloaded",
                StatusCode::SERVICE_UNAVAILABLE,
                "Undecided: overloaded",
                "No connection or lock could be had in time. Repeat the request with the same request key.",
            ),
            Self::TimedOut => (
                "timed-out",
                StatusCode::SERVICE_UNAVAILABLE,
                "Undecided: timed out",
                "It took too long and was given up. It may have happened: repeat the request with the same request key.",
            ),
            Self::BackendAway => (
                "backend-away",
                StatusCode::SERVICE_UNAVAILABLE,
                "Undecided: a backend is away",
                "A backend could not be reached, or failed. It may have happened: repeat the request with the same request key.",
            ),
            Self::UnknownReservation => (
                "unknown-reservation",
                StatusCode::NOT_FOUND,
                "Unknown reservation",
                "There is no reservation with this id.",
            ),
            Self::SaleDiffers => (
                "sale-differs",
                StatusCode::CONFLICT,
                "The sale is open with another name or capacity",
                "A sale keeps the name and capacity it was opened with.",
            ),
            Self::Unauthorized => (
                "unauthorized",
                StatusCode::UNAUTHORIZED,
                "Admin token missing or wrong",
                "This call takes the header `Authorization: Bearer <admin token>`.",
            ),
            Self::NoAdminToken => (
                "no-admin-token",
                StatusCode::FORBIDDEN,
                "Admin calls are off",
                "This server was started without an admin token, so it takes no admin calls. Set OVERSOLD_ADMIN_TOKEN.",
            ),
            Self::NotFound => (
                "not-found",
                StatusCode::NOT_FOUND,
                "Not found",
                "There is nothing at this path. `/openapi.json` lists what there is.",
            ),
            Self::MethodNotAllowed => (
                "method-not-allowed",
                StatusCode::METHOD_NOT_ALLOWED,
                "Method not allowed",
                "This path does not take this method. The header `Allow` names those it takes.",
            ),
            Self::MalformedPath => (
                "malformed-path",
                StatusCode::BAD_REQUEST,
                "Malformed path",
                "An id in the path can't be one.",
            ),
            Self::MalformedKey => (
                "malformed-request-key",
                StatusCode::BAD_REQUEST,
                "Malformed request key",
                "`Idempotency-Key` takes 1 to 128 visible ASCII characters, once.",
            ),
            Self::MalformedEventId => (
                "malformed-event-id",
                StatusCode::BAD_REQUEST,
                "Malformed event id",
                "`Last-Event-ID` takes the number of an event, in digits.",
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
                "The body is JSON, but not what this call takes.",
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
                "The body did not come in time.",
            ),
            Self::NotJson => (
                "not-json",
                StatusCode::UNSUPPORTED_MEDIA_TYPE,
                "Not JSON",
                "This call takes a body with the header `Content-Type: application/json`.",
            ),
            Self::Crashed => (
                "crashed",
                StatusCode::INTERNAL_SERVER_ERROR,
                "The server crashed at this request",
                "A bug in the server. Its log has the request id and the reason.",
            ),
        };
        Row {
            name,
            status,
            title,
            meaning,
        }
    }

    /// The short name, such as `sold-out`.
    pub const fn name(self) -> &'static str {
        self.row().name
    }

    /// The HTTP status it is answered with.
    pub const fn status(self) -> StatusCode {
        self.row().status
    }

    /// What is wrong, in a few words that are the same every time.
    pub const fn title(self) -> &'static str {
        self.row().title
    }

    /// What it means and what a client can do.
    pub const fn meaning(self) -> &'static str {
        self.row().meaning
    }

    /// The `type` member: `/problems/sold-out`. Relative to the server, which explains it there.
    pub fn uri(self) -> String {
        format!("{}{}", Self::PATH, self.name())
    }

    /// The header that it is answered with.
    pub(crate) const fn header(self) -> Option<(HeaderName, &'static str)> {
        match self.status() {
            StatusCode::SERVICE_UNAVAILABLE => Some((header::RETRY_AFTER, "1")),
            StatusCode::UNAUTHORIZED => Some((header::WWW_AUTHENTICATE, "Bearer")),
            // What is left of the body may still come: nothing after it could be understood.
            StatusCode::REQUEST_TIMEOUT => Some((header::CONNECTION, "close")),
            _ => None,
        }
    }

    /// Finds a kind by its name.
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| kind.name() == name)
    }

    /// Finds a kind by its `type`.
    pub fn from_uri(uri: &str) -> Option<Self> {
        Self::from_name(uri.strip_prefix(Self::PATH)?)
    }
}

/// A problem on its way to the client.
#[derive(Clone, Debug)]
pub(crate) struct Problem {
    kind: ProblemKind,
    detail: Cow<'static, str>,
    reservation: Option<Uuid>,
}

impl Problem {
    /// With what this one request should know.
    pub(crate) fn new(kind: ProblemKind, detail: impl Into<Cow<'static, str>>) -> Self {
        Self {
            kind,
            detail: detail.into(),
            reservation: None,
        }
    }

    /// The body that the client reads.
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

/// The kind's own meaning says it all.
impl From<ProblemKind> for Problem {
    fn from(kind: ProblemKind) -> Self {
        Self::new(kind, kind.meaning())
    }
}

/// The one table that turns a "no" into its answer.
impl From<&ReserveError> for ProblemKind {
    fn from(no: &ReserveError) -> Self {
        match no {
            ReserveError::Refused(Refusal::SoldOut) => Self::SoldOut,
            ReserveError::Refused(Refusal::AlreadyReserved { .. }) => Self::AlreadyReserved,
            ReserveError::Refused(Refusal::KeyOfAnotherBuyer) => Self::KeyOfAnotherBuyer,
            ReserveError::Refused(Refusal::UnknownSale) => Self::UnknownSale,
            ReserveError::Indeterminate(Indeterminate::Overloaded) => Self::Overloaded,
            ReserveError::Indeterminate(Indeterminate::TimedOut) => Self::TimedOut,
            ReserveError::Indeterminate(Indeterminate::BackendAway(_)) => Self::BackendAway,
        }
    }
}

impl From<ReserveError> for Problem {
    fn from(no: ReserveError) -> Self {
        let problem = Self::from(ProblemKind::from(&no));
        match no {
            ReserveError::Refused(Refusal::AlreadyReserved { earlier }) => Self {
                reservation: Some(earlier.id),
                ..problem
            },
            ReserveError::Indeterminate(Indeterminate::BackendAway(why)) => {
                // For the operator only: a backend's own words are none of the buyer's business.
                tracing::warn!(error = format!("{why:#}"), "undecided: a backend is away");
                problem
            }
            ReserveError::Refused(_) | ReserveError::Indeterminate(_) => problem,
        }
    }
}

impl From<sqlx::Error> for Problem {
    fn from(error: sqlx::Error) -> Self {
        ReserveError::from(error).into()
    }
}

impl IntoResponse for Problem {
    /// The status and headers. The body is written by the envelope around every answer, which knows the request's id.
    fn into_response(self) -> Response {
        let mut response = self.kind.status().into_response();
        if let Some((name, value)) = self.kind.header() {
            response.headers_mut().insert(name, HeaderValue::from_static(value));
        }
        response.extensions_mut().insert(self);
        response
    }
}
