//! Reserving a ticket, and reading a reservation.

use std::{panic::AssertUnwindSafe, sync::Arc};

use axum::{
    Extension, Json,
    extract::State,
    http::{HeaderMap, StatusCode, header},
    response::{IntoResponse, Response},
};
use futures_util::FutureExt;
use tracing::Instrument;
use uuid::Uuid;

use super::{
    App,
    input::{JsonBody, ReservationInPath, SaleInPath, request_key},
    middleware::RequestId,
};
use crate::{
    Indeterminate, Order, Outcome, ReserveError, api,
    problem::{Problem, ProblemKind},
};

/// Reserves one ticket.
///
/// The same `Idempotency-Key` always yields the same reservation: a client without a final answer
/// retries with the same key.
#[utoipa::path(
    post,
    path = "/api/sales/{id}/reservations",
    operation_id = "reserve",
    params(
        ("id" = i64, Path, description = "The sale", minimum = 0),
        (
            "Idempotency-Key" = Option<String>,
            Header,
            description = "The request key. Without it, every request is a new order",
            min_length = 1,
            max_length = 128,
            pattern = "^[!-~]+$"
        ),
    ),
    request_body = api::NewReservation,
    responses(
        (
            status = 201,
            description = "Confirmed: the reservation is durable",
            body = api::Reservation,
            headers(("Location" = String, description = "The reservation")),
        ),
        (
            status = 202,
            description = "Accepted: the order is durable and is processed asynchronously. Its final state follows at its \
                           `Location`, and as an event. A refusal is a final state then, whose `reason` is the name of a problem",
            body = api::Reservation,
            headers(("Location" = String, description = "The reservation")),
        ),
    )
)]
pub(super) async fn reserve(
    State(app): State<Arc<App>>,
    Extension(request): Extension<RequestId>,
    SaleInPath(sale): SaleInPath,
    headers: HeaderMap,
    JsonBody(body): JsonBody<api::NewReservation>,
) -> Result<Response, Problem> {
    // It is not ignored: a buyer who is answered 202 relies on it.
    if !app.has_priority && !body.priority.is_normal() {
        return Err(ProblemKind::NoPriority.into());
    }
    let order = Order {
        sale,
        buyer: body.buyer_id,
        key: request_key(&headers)?,
        priority: body.priority,
    };
    let (code, reservation, status) = match reserve_detached(app, request, order).await? {
        Outcome::Confirmed(reservation) => (StatusCode::CREATED, reservation, "confirmed"),
        Outcome::Accepted(reservation) => (StatusCode::ACCEPTED, reservation, api::Reservation::ACCEPTED),
    };
    let location = format!("/api/reservations/{}", reservation.id);
    let taken = api::Reservation {
        id: reservation.id,
        sale_id: Some(sale),
        buyer_id: Some(body.buyer_id),
        status: status.to_owned(),
        reason: None,
        earlier: None,
    };
    Ok((code, [(header::LOCATION, location)], Json(taken)).into_response())
}

// ANCHOR: task
/// Runs the reservation in a task of its own, which completes even if the client disconnects and
/// this future is dropped. Such tasks outlive their connections, so a semaphore bounds their
/// number.
async fn reserve_detached(app: Arc<App>, request: RequestId, order: Order) -> Result<Outcome, ReserveError> {
    let admitted = app.readiness.check().and_then(|()| {
        let permit = Arc::clone(&app.permits).try_acquire_owned();
        permit.map_err(|_| Indeterminate::Overloaded)
    });
    let permit = match admitted {
        Ok(permit) => permit,
        Err(why) => {
            let unknown = Err(why.into());
            app.metrics.count_reservation(Some(&unknown));
            return unknown;
        }
    };
    let steps = app.instrumentation.steps(&request.0).timed(app.metrics.step_clock());
    let tracker = app.reservations.clone();
    let task = async move {
        let _permit = permit;
        let result = AssertUnwindSafe(app.strategy.reserve(&order, &steps))
            .catch_unwind()
            .await;
        app.metrics.count_reservation(result.as_ref().ok());
        steps.ended(result.as_ref().ok());
        result
    };
    match tracker.spawn(task.in_current_span()).await {
        Ok(Ok(result)) => result,
        // Propagates the panic to this request, which `CatchPanicLayer` answers.
        Ok(Err(panic)) => std::panic::resume_unwind(panic),
        // The runtime is shutting down, and has cancelled the task.
        Err(_) => Err(Indeterminate::TimedOut.into()),
    }
}
// ANCHOR_END: task

/// Reads a reservation.
#[utoipa::path(
    get,
    path = "/api/reservations/{id}",
    operation_id = "reservation",
    params(("id" = Uuid, Path, description = "The reservation")),
    responses((status = 200, description = "The reservation", body = api::Reservation))
)]
pub(super) async fn look_up(
    State(app): State<Arc<App>>,
    ReservationInPath(id): ReservationInPath,
) -> Result<Json<api::Reservation>, Problem> {
    find(&app, id).await.map(Json)
}

/// Cancels an order whose ticket is held: the ticket is released, and what was charged for it is
/// refunded. Idempotent. Whoever knows the id may cancel: it is as secret as the buyer keeps it.
#[utoipa::path(
    delete,
    path = "/api/reservations/{id}",
    operation_id = "cancel",
    params(("id" = Uuid, Path, description = "The reservation")),
    responses(
        (
            status = 202,
            description = "The ticket is being released. The final state follows, and as an event",
            body = api::Reservation,
        ),
        (status = 200, description = "The order holds no ticket any more", body = api::Reservation),
    )
)]
pub(super) async fn cancel(
    State(app): State<Arc<App>>,
    ReservationInPath(id): ReservationInPath,
) -> Result<(StatusCode, Json<api::Reservation>), Problem> {
    find(&app, id).await?;
    let is_being_released = app.strategy.cancel(id).await?;
    let reservation = find(&app, id).await?;
    let code = match reservation.status.as_str() {
        "declined" | "expired" | "cancelled" => StatusCode::OK,
        _ if is_being_released => StatusCode::ACCEPTED,
        _ => return Err(ProblemKind::NotHeld.into()),
    };
    Ok((code, Json(reservation)))
}

/// The reservation from its row, or an accepted order without a row.
///
/// # Errors
/// [`ProblemKind::UnknownReservation`] if there is neither, or the problem of a database error.
pub(super) async fn find(app: &App, id: Uuid) -> Result<api::Reservation, Problem> {
    // Every column is named: with `select *` a new column would make the prepared statement stale.
    // Only the views of some levels have the columns of a refusal, so these are read as JSON.
    let row = sqlx::query_as(
        "select id,
                sale_id,
                buyer_id,
                status,
                to_jsonb(reservation_now) ->> 'reason' as reason,
                (to_jsonb(reservation_now) ->> 'earlier')::uuid as earlier
           from reservation_now
          where id = $1",
    )
    .bind(id)
    .fetch_optional(&app.database)
    .await?;
    let accepted = || app.strategy.accepted(id).then(|| api::Reservation::accepted(id));
    row.or_else(accepted).ok_or(ProblemKind::UnknownReservation.into())
}
