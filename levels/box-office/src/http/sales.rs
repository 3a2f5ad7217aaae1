//! Opening a sale, and reading it.

use std::sync::Arc;

use axum::{
    Json,
    extract::{FromRequestParts, State},
    http::{StatusCode, header, request::Parts},
};

use super::{
    App,
    input::{JsonBody, SaleInPath},
};
use crate::{
    Database, SaleId, api,
    problem::{Problem, ProblemKind},
};

/// Reads a sale.
#[utoipa::path(
    get,
    path = "/api/sales/{id}",
    operation_id = "sale",
    params(("id" = i64, Path, description = "The sale", minimum = 0)),
    responses((status = 200, description = "The sale", body = api::Sale))
)]
pub(super) async fn look_up(
    State(app): State<Arc<App>>,
    SaleInPath(sale): SaleInPath,
) -> Result<Json<api::Sale>, Problem> {
    find(&app.database, sale).await.map(Json)
}

async fn find(database: &Database, sale: SaleId) -> Result<api::Sale, Problem> {
    let found = sqlx::query_as(
        "select sale_id as id,
                name,
                capacity,
                stock,
                (select count(*)
                   from reservation_now
                  where reservation_now.sale_id = sale_now.sale_id
                    and status in ('held', 'confirmed')) as reserved
           from sale_now
          where sale_id = $1",
    )
    .bind(sale)
    .fetch_optional(database)
    .await?;
    found.ok_or(ProblemKind::UnknownSale.into())
}

/// Opens a sale. Idempotent: the same request again changes nothing.
#[utoipa::path(
    put,
    path = "/api/sales/{id}",
    operation_id = "open_sale",
    params(("id" = i64, Path, description = "The sale", minimum = 0)),
    request_body = api::NewSale,
    responses(
        (status = 201, description = "The sale was opened", body = api::Sale),
        (status = 200, description = "The sale was already open, with the same name and capacity", body = api::Sale),
    ),
    security(("admin token" = []))
)]
pub(super) async fn open(
    _: Admin,
    State(app): State<Arc<App>>,
    SaleInPath(id): SaleInPath,
    JsonBody(wanted): JsonBody<api::NewSale>,
) -> Result<(StatusCode, Json<api::Sale>), Problem> {
    let inserted = sqlx::query(
        "insert into sale (id, name, capacity, stock)
         values ($1, $2, $3, $3)
             on conflict (id) do nothing",
    )
    .bind(id)
    .bind(&wanted.name)
    .bind(wanted.capacity)
    .execute(&app.database)
    .await?;

    let sale = find(&app.database, id).await?;
    if (&sale.name, sale.capacity) != (&wanted.name, wanted.capacity) {
        let detail = format!(
            "sale {id} is open as {:?} with a capacity of {}",
            sale.name, sale.capacity
        );
        return Err(Problem::new(ProblemKind::SaleDiffers, detail));
    }
    let status = if inserted.rows_affected() == 1 {
        StatusCode::CREATED
    } else {
        StatusCode::OK
    };
    Ok((status, Json(sale)))
}

/// Names VIPs of a sale: buyers who may ask for `priority: vip`. Idempotent; those who are named
/// already stay named, and nobody is ever struck off.
#[utoipa::path(
    post,
    path = "/api/sales/{id}/vips",
    operation_id = "name_vips",
    params(("id" = i64, Path, description = "The sale", minimum = 0)),
    request_body = api::NewVips,
    responses((status = 204, description = "The buyers are named")),
    security(("admin token" = []))
)]
pub(super) async fn name_vips(
    _: Admin,
    State(app): State<Arc<App>>,
    SaleInPath(sale): SaleInPath,
    JsonBody(named): JsonBody<api::NewVips>,
) -> Result<StatusCode, Problem> {
    find(&app.database, sale).await?;
    if !app.has_priority {
        return Err(ProblemKind::NoPriority.into());
    }
    app.strategy.name_vips(sale, &named.buyer_ids).await?;
    Ok(StatusCode::NO_CONTENT)
}

/// An extractor that requires the admin token.
pub(super) struct Admin;

impl FromRequestParts<Arc<App>> for Admin {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, app: &Arc<App>) -> Result<Self, Problem> {
        let token = app.admin_token.as_ref().ok_or(ProblemKind::NoAdminToken)?;
        let offered = parts.headers.get(header::AUTHORIZATION).and_then(|value| {
            let (scheme, offered) = value.as_bytes().split_at_checked("Bearer ".len())?;
            scheme.eq_ignore_ascii_case(b"Bearer ").then_some(offered)
        });
        match offered {
            Some(offered) if token.matches(offered) => Ok(Self),
            _ => Err(ProblemKind::Unauthorized.into()),
        }
    }
}
