//! The OpenAPI 3.1 document, with every status and problem type of every operation.

use std::{collections::BTreeMap, sync::LazyLock};

use axum::Json;
use utoipa::{
    OpenApi,
    openapi::{
        self, AllOfBuilder, Content, HeaderBuilder, HttpMethod, ObjectBuilder, RefOr, Response, ResponseBuilder,
        path::Operation,
        schema::{Schema, SchemaType, Type},
        security::{HttpAuthScheme, HttpBuilder, SecurityScheme},
    },
};

use crate::{
    api,
    problem::{
        ProblemKind::{self, *},
        RATE_LIMIT, RATE_LIMIT_POLICY,
    },
};

/// The problems of every operation that queries the database.
const DATABASE: &[ProblemKind] = &[Overloaded, TimedOut, BackendAway];

/// The problems of every operation with a request body.
const BODY: &[ProblemKind] = &[MalformedBody, InvalidBody, BodyTooLarge, BodyTooSlow, NotJson];

/// The problems of every operation.
const PROBLEMS: [(HttpMethod, &str, &[&[ProblemKind]]); 17] = [
    (
        HttpMethod::Post,
        "/api/sales/{id}/reservations",
        &[
            &[
                SoldOut,
                AlreadyReserved,
                KeyOfAnotherBuyer,
                UnknownSale,
                NotVip,
                NoPriority,
            ],
            &[MalformedPath, MalformedKey, Crashed],
            BODY,
            DATABASE,
            &[Backlogged, RateLimited],
        ],
    ),
    (
        HttpMethod::Get,
        "/api/reservations/{id}",
        &[&[UnknownReservation], DATABASE],
    ),
    (
        HttpMethod::Delete,
        "/api/reservations/{id}",
        &[&[UnknownReservation, NotHeld], DATABASE],
    ),
    (
        HttpMethod::Get,
        "/api/reservations/{id}/events",
        &[&[UnknownReservation, MalformedEventId], DATABASE],
    ),
    (
        HttpMethod::Get,
        "/api/sales/{id}",
        &[&[UnknownSale, MalformedPath], DATABASE],
    ),
    (
        HttpMethod::Put,
        "/api/sales/{id}",
        &[
            &[SaleDiffers, Unauthorized, NoAdminToken, MalformedPath],
            BODY,
            DATABASE,
        ],
    ),
    (HttpMethod::Get, "/live", &[]),
    (HttpMethod::Get, "/live/{id}", &[&[MalformedPath]]),
    (HttpMethod::Get, "/live/events", &[&[Overloaded]]),
    (HttpMethod::Get, "/live/{id}/events", &[&[MalformedPath, Overloaded]]),
    (
        HttpMethod::Post,
        "/live/rush",
        &[&[RushInProgress, Unauthorized, NoAdminToken], BODY, DATABASE],
    ),
    (
        HttpMethod::Post,
        "/api/sales/{id}/vips",
        &[
            &[UnknownSale, NoPriority, Unauthorized, NoAdminToken, MalformedPath],
            BODY,
            DATABASE,
        ],
    ),
    (HttpMethod::Get, "/livez", &[]),
    (HttpMethod::Get, "/readyz", &[DATABASE]),
    (HttpMethod::Get, "/metrics", &[]),
    (HttpMethod::Get, "/problems/{name}", &[&[NotFound]]),
    (HttpMethod::Get, "/openapi.json", &[]),
];

/// The document without its operations.
#[derive(OpenApi)]
#[openapi(
    info(
        title = "Oversold",
        description = "Sells tickets. Errors are problem details (RFC 9457), whose `type` is a path on this server that \
                       documents the problem. A path that is not listed here is answered with 404 \
                       `/problems/not-found`, a method that is not listed with 405 `/problems/method-not-allowed`."
    ),
    components(schemas(api::Problem))
)]
struct ApiDocument;

/// This OpenAPI document.
#[utoipa::path(
    get,
    path = "/openapi.json",
    operation_id = "openapi",
    responses((status = 200, description = "This document", body = Object))
)]
pub(super) async fn document() -> Json<&'static openapi::OpenApi> {
    /// Made once: it is the same for every server and request.
    static DOCUMENT: LazyLock<openapi::OpenApi> = LazyLock::new(|| {
        let mut document = ApiDocument::openapi();
        document.merge(super::documented_routes().into_openapi());
        add_common_responses(&mut document);
        document
    });
    Json(&*DOCUMENT)
}

/// Adds what many operations share: problems, request ids, and the admin token.
fn add_common_responses(contract: &mut openapi::OpenApi) {
    for (method, path, problems) in PROBLEMS {
        let operation = contract
            .paths
            .paths
            .get_mut(path)
            .and_then(|item| operation_of(item, &method));
        let operation = operation.expect("every row of PROBLEMS is a documented operation");
        document_problems(operation, problems.concat());
    }
    let bearer = HttpBuilder::new().scheme(HttpAuthScheme::Bearer).build();
    contract
        .components
        .get_or_insert_default()
        .add_security_scheme("admin token", SecurityScheme::Http(bearer));
}

fn operation_of<'a>(item: &'a mut openapi::PathItem, method: &HttpMethod) -> Option<&'a mut Operation> {
    match method {
        HttpMethod::Get => item.get.as_mut(),
        HttpMethod::Post => item.post.as_mut(),
        HttpMethod::Put => item.put.as_mut(),
        HttpMethod::Delete => item.delete.as_mut(),
        _ => None,
    }
}

fn document_problems(operation: &mut Operation, problems: Vec<ProblemKind>) {
    let mut by_status: BTreeMap<u16, Vec<ProblemKind>> = BTreeMap::new();
    for problem in problems {
        by_status.entry(problem.status().as_u16()).or_default().push(problem);
    }
    let responses = &mut operation.responses.responses;
    for (status, problems) in by_status {
        responses.insert(status.to_string(), RefOr::T(response(&problems)));
    }
    for response in responses.values_mut() {
        if let RefOr::T(response) = response {
            let id = HeaderBuilder::new().description(Some(
                "The id of this request in the server's log: the client's own, or a new one",
            ));
            response.headers.insert("X-Request-Id".to_owned(), RefOr::T(id.build()));
        }
    }
}

/// The response for all problems of one status, distinguished by `type`.
fn response(problems: &[ProblemKind]) -> Response {
    let lines: Vec<String> = problems
        .iter()
        .map(|problem| format!("`{}`: {}", problem.uri(), problem.meaning()))
        .collect();
    let kind = ObjectBuilder::new()
        .schema_type(SchemaType::Type(Type::String))
        .enum_values(Some(problems.iter().map(|problem| problem.uri())));
    let schema = AllOfBuilder::new()
        .item(openapi::Ref::from_schema_name("Problem"))
        .item(ObjectBuilder::new().property("type", kind));
    let header = problems.iter().find_map(|problem| problem.header());
    let headers = header.map(|(name, value)| {
        let documented = HeaderBuilder::new().description(Some(format!("`{value}`")));
        (name.to_string(), documented.build())
    });
    let limits: &[_] = match problems.contains(&RateLimited) {
        true => &[
            (RATE_LIMIT_POLICY, "The policies in force: `q` requests in `w` seconds"),
            (
                RATE_LIMIT,
                "The policy that was exceeded: `r` requests remain, and more come in `t` seconds",
            ),
        ],
        false => &[],
    };
    let limits = limits.iter().map(|(name, meaning)| {
        let documented = HeaderBuilder::new().description(Some(*meaning));
        (name.to_string(), documented.build())
    });
    headers
        .into_iter()
        .chain(limits)
        .fold(ResponseBuilder::new(), |response, (name, header)| {
            response.header(name, header)
        })
        .description(lines.join("\n\n"))
        .content(
            "application/problem+json",
            Content::new(Some(Schema::from(schema.build()))),
        )
        .build()
}
