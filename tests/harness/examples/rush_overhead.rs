//! Benchmark of the rush itself: a thousand buyers against a server that does nothing. The clients
//! must not be the bottleneck of what they measure.
//!
//! `cargo run --release --package harness --example rush_overhead`; with `-- --bound` it fails
//! above its limit.
//!
//! This program is also that server: if an environment variable says so, it answers the first
//! hundred orders with 201 and all others with "sold out".

use std::{
    env,
    process::ExitCode,
    sync::{
        Arc,
        atomic::{AtomicI64, Ordering},
    },
    time::Duration,
};

use anyhow::ensure;
use axum::{
    Json, Router,
    extract::{Path, State},
    http::{StatusCode, header},
    response::{IntoResponse, Response},
    routing::{get, post, put},
};
use box_office::{Guarantee, Level, ProblemKind, Promises, Schema, Strategy, api};
use harness::rush::{Program, Rush};
use sqlx::{PgPool, migrate::Migrator};
use tokio::{
    net::TcpListener,
    runtime::Runtime,
    signal::unix::{SignalKind, signal},
};
use uuid::Uuid;

const ACT_AS_SERVER: &str = "RUSH_OF_NOTHING_ACTS_AS_SERVER";

/// The number of rushes.
const RUNS: usize = 10;
/// Limit of the median, for a release build on an idle machine.
const BOUND: Duration = Duration::from_millis(150);

static MIGRATIONS: Migrator = sqlx::migrate!("../../levels/box-office/tests/migrations");

static LEVEL: Level = Level {
    name: "lv0",
    package: "lv0-nothing",
    summary: "does nothing",
    lag: None,
    strategies: &[Strategy {
        name: "nothing",
        summary: "answers at once",
        guarantee: Guarantee::uniform(Promises::ALL_KEPT),
        clicks: 1,
        schema: Schema {
            name: "nothing",
            migrations: &MIGRATIONS,
        },
        needs: &[],
        improvements: &[],
        steps: &[],
        open: |_| Box::pin(async { anyhow::bail!("this server is a program of its own") }),
    }],
    mutants: &[],
};

fn main() -> anyhow::Result<ExitCode> {
    let runtime = Runtime::new()?;
    if env::var_os(ACT_AS_SERVER).is_some() {
        runtime.block_on(nothing())?;
    } else {
        let bound = env::args().any(|argument| argument == "--bound");
        ensure!(!bound || !cfg!(debug_assertions), "--bound takes a build in release");
        let mut took = runtime.block_on(rush())?;
        took.sort();
        let median = took[RUNS / 2];
        if bound {
            ensure!(median < BOUND, "a rush took {median:?}, and may take {BOUND:?}");
            println!("a rush took {median:?}, within the bound of {BOUND:?}");
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// The duration of each rush.
async fn rush() -> anyhow::Result<Vec<Duration>> {
    let program = Program::new(env::current_exe()?).variable(ACT_AS_SERVER, "1");
    let mut took = vec![];
    for _ in 0..RUNS {
        let report = Rush::default().run(&program, &LEVEL, &LEVEL.strategies[0]).await?;
        let answers = report.answers;
        println!(
            "{} answers ({} × 201, {} × sold out) in {:.1} ms; the clients used {:.0} % of the machine; p50 {:.1} ms, p99 {:.1} ms",
            report.history.requests.len(),
            answers.confirmed,
            answers.sold_out,
            report.took.as_secs_f64() * 1000.0,
            report.client_share * 100.0,
            report.answered.p50_ms,
            report.answered.p99_ms,
        );
        took.push(report.took);
    }
    Ok(took)
}

async fn nothing() -> anyhow::Result<()> {
    let mut told_to_stop = signal(SignalKind::terminate())?;
    box_office::raise_open_files_limit();
    let routes = Router::new()
        .route("/readyz", get(async || "ready\n"))
        .route("/api/sales/{id}/reservations", post(answer))
        .with_state(Arc::new(AtomicI64::new(100)))
        .route("/api/sales/{id}", put(open_sale))
        .with_state(PgPool::connect(&env::var("DATABASE_URL")?).await?);
    let listener = TcpListener::bind("127.0.0.1:0").await?;
    println!("it listens on http://{}", listener.local_addr()?);
    tokio::select! {
        served = axum::serve(listener, routes) => served?,
        _ = told_to_stop.recv() => {}
    }
    Ok(())
}

/// Inserts the sale's row, which the rush reads at its end.
async fn open_sale(State(database): State<PgPool>, Path(sale): Path<i64>, Json(new): Json<api::NewSale>) -> StatusCode {
    let opened = sqlx::query("insert into sale (id, name, capacity, stock) values ($1, $2, $3, $3)")
        .bind(sale)
        .bind(new.name)
        .bind(new.capacity)
        .execute(&database)
        .await;
    opened.map_or(StatusCode::INTERNAL_SERVER_ERROR, |_| StatusCode::CREATED)
}

async fn answer(State(left): State<Arc<AtomicI64>>, Json(new): Json<api::NewReservation>) -> Response {
    if left.fetch_sub(1, Ordering::Relaxed) > 0 {
        let confirmed = api::Reservation {
            id: Uuid::now_v7(),
            sale_id: Some(1),
            buyer_id: Some(new.buyer_id),
            status: "confirmed".to_owned(),
            reason: None,
            earlier: None,
        };
        return (StatusCode::CREATED, Json(confirmed)).into_response();
    }
    let kind = ProblemKind::SoldOut;
    let problem = api::Problem {
        kind: kind.uri(),
        title: "sold out".to_owned(),
        status: 409,
        detail: "every ticket of this sale is taken".to_owned(),
        request_id: "0".to_owned(),
        reservation_id: None,
    };
    let content_type = [(header::CONTENT_TYPE, "application/problem+json")];
    (kind.status(), content_type, Json(problem)).into_response()
}
