//! The contract test itself, against a stub server that accepts orders first and decides them
//! later: correct, or with one mistake.
//!
//! This test binary is also that server: if an environment variable says so, it acts as the stub
//! that `STRATEGY` names.

use std::{
    collections::HashMap,
    env,
    panic::{self, AssertUnwindSafe},
    process::ExitCode,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use axum::{
    Json, Router,
    extract::{Path, State},
    http::{HeaderMap, StatusCode, header},
    response::{IntoResponse, Response},
    routing::{get, post, put},
};
use box_office::{
    BuyerId, Guarantee,
    Invariant::{Conservation, NoFalseRefusal, NoOversell, NoUndersell, NothingLost, OneAnswer, Progress},
    Level, Promise, Promises, SaleId, Schema, Strategy, api,
};
use futures_util::FutureExt;
use harness::{
    contract,
    rush::{Program, Report, Rush},
};
use libtest_mimic::{Arguments, Trial};
use serde_json::{Value, json};
use sqlx::{PgPool, migrate::Migrator};
use tokio::{
    net::TcpListener,
    runtime::Runtime,
    signal::unix::{SignalKind, signal},
    sync::mpsc,
};
use uuid::Uuid;

const ACT_AS_SERVER: &str = "CONTRACT_TEST_ACTS_AS_SERVER";

fn main() -> ExitCode {
    let runtime = Arc::new(Runtime::new().expect("a runtime"));
    if env::var_os(ACT_AS_SERVER).is_some() {
        runtime.block_on(stub());
        return ExitCode::SUCCESS;
    }
    // Most panics here are expected. A panic that fails a test is reported with the test.
    panic::set_hook(Box::new(|_| ()));
    let on = Arc::clone(&runtime);
    let mut trials = vec![Trial::test(
        "an_honest_asynchronous_server_keeps_the_contract",
        move || {
            on.block_on(honest());
            Ok(())
        },
    )];
    for (name, run) in [
        (
            "a_server_that_should_oversell_and_does_not_is_inconclusive",
            inconclusive as fn(&Runtime),
        ),
        ("a_declaration_that_is_not_the_tables_is_refused", declared_otherwise),
    ] {
        let on = Arc::clone(&runtime);
        trials.push(Trial::test(name, move || {
            run(&on);
            Ok(())
        }));
    }
    trials.extend(LIES.iter().map(|lie| {
        let on = Arc::clone(&runtime);
        Trial::test(format!("{}_is_caught", lie.name), move || {
            on.block_on(caught(lie));
            Ok(())
        })
    }));
    libtest_mimic::run(&Arguments::from_args(), trials).exit_code()
}

/// A few buyers and fewer tickets, enough for a mistake in one order.
fn few() -> Rush {
    Rush {
        capacity: 10,
        buyers: 40,
        timeout: Duration::from_secs(5),
        ..Rush::default()
    }
}

async fn honest() {
    let report = required(&KEPT, "honest", Rush::default(), Promises::ALL_KEPT).await;
    assert_eq!(report.answers.accepted, 1000, "every answer was a 202");
    assert_eq!(report.verdict.tally.sold, 100);
}

/// The contract names exactly the invariants that a mistake breaks, and rejects the same server if
/// it declares to keep everything.
async fn caught(lie: &'static Lie) {
    required(&DECLARED, lie.name, few(), lie.breaks).await;

    let message = denied(required(&KEPT, lie.name, few(), Promises::ALL_KEPT)).await;
    for invariant in lie.breaks.those(Promise::Breaks) {
        assert!(
            message.contains(invariant.code()),
            "{} is not named:\n{message}",
            invariant.code()
        );
    }
}

/// A run that does not show a declared violation is inconclusive.
fn inconclusive(on: &Runtime) {
    let message = on.block_on(denied(required(&OVERSELLS, "honest", few(), OVERSOLD)));
    assert!(message.contains("inconclusive: I1, I2"), "{message}");
}

/// The test's table decides, not the strategy's own declaration.
fn declared_otherwise(on: &Runtime) {
    let message = on.block_on(denied(required(&OVERSELLS, "honest", few(), Promises::ALL_KEPT)));
    assert!(message.contains("declares another guarantee"), "{message}");
}

/// The message of the contract's panic.
async fn denied(held: impl Future<Output = Report>) -> String {
    let panic = AssertUnwindSafe(held).catch_unwind().await;
    let panic = panic.expect_err("the contract was kept");
    panic.downcast_ref::<String>().expect("a message").clone()
}

async fn required(level: &Level, name: &str, rush: Rush, expected: Promises) -> Report {
    let program = Program::new(env::current_exe().expect("this test binary")).variable(ACT_AS_SERVER, "1");
    contract(&program, level, name, rush, expected).await
}

/// The mistake of a stub, and the invariants that the judge must report.
struct Lie {
    name: &'static str,
    breaks: Promises,
}

const LIES: &[Lie] = &[NEVER_ENDS, WITHOUT_A_ROW, CHANGES_ITS_MIND, OVERSELLS_LATE];

const NEVER_ENDS: Lie = Lie {
    name: "an_order_that_never_ends",
    breaks: Promises::ALL_KEPT.breaks(&[NothingLost, Progress]),
};
const WITHOUT_A_ROW: Lie = Lie {
    name: "a_confirmation_without_a_row",
    breaks: Promises::ALL_KEPT
        .breaks(&[NothingLost, NoFalseRefusal])
        .leaves_open(&[NoUndersell, OneAnswer]),
};
const CHANGES_ITS_MIND: Lie = Lie {
    name: "a_final_state_that_changes",
    breaks: Promises::ALL_KEPT.breaks(&[NothingLost]),
};
const OVERSELLS_LATE: Lie = Lie {
    name: "one_ticket_too_many_confirmed_late",
    breaks: Promises::ALL_KEPT.breaks(&[NoOversell, Conservation]),
};

static MIGRATIONS: Migrator = sqlx::migrate!("../../levels/box-office/tests/migrations");

/// The stubs with true declarations.
static DECLARED: Level = level(&[
    strategy("honest", Promises::ALL_KEPT),
    strategy(NEVER_ENDS.name, NEVER_ENDS.breaks),
    strategy(WITHOUT_A_ROW.name, WITHOUT_A_ROW.breaks),
    strategy(CHANGES_ITS_MIND.name, CHANGES_ITS_MIND.breaks),
    strategy(OVERSELLS_LATE.name, OVERSELLS_LATE.breaks),
]);

/// The stubs, each declaring to keep everything.
static KEPT: Level = level(&[
    strategy("honest", Promises::ALL_KEPT),
    strategy(NEVER_ENDS.name, Promises::ALL_KEPT),
    strategy(WITHOUT_A_ROW.name, Promises::ALL_KEPT),
    strategy(CHANGES_ITS_MIND.name, Promises::ALL_KEPT),
    strategy(OVERSELLS_LATE.name, Promises::ALL_KEPT),
]);

/// A correct stub that declares to oversell.
static OVERSELLS: Level = level(&[strategy("honest", OVERSOLD)]);

const OVERSOLD: Promises = Promises::ALL_KEPT.breaks(&[NoOversell, Conservation]);

const fn level(strategies: &'static [Strategy]) -> Level {
    Level {
        name: "lv0",
        package: "lv0-stub",
        summary: "accepts first, decides later",
        lag: None,
        strategies,
        mutants: &[],
    }
}

const fn strategy(name: &'static str, promises: Promises) -> Strategy {
    Strategy {
        name,
        summary: "a stub",
        guarantee: Guarantee::uniform(promises),
        clicks: 1,
        schema: Schema {
            name: "stub",
            migrations: &MIGRATIONS,
        },
        needs: &[],
        improvements: &[],
        steps: &[],
        open: |_| Box::pin(async { anyhow::bail!("the stub is a program of its own") }),
    }
}

/// A server that answers every order with 202. It decides an order after the buyer's first read of
/// its state, so every buyer sees it pending.
struct Stub {
    lie: String,
    database: PgPool,
    orders: Mutex<HashMap<Uuid, Order>>,
    asked_about: mpsc::UnboundedSender<Uuid>,
}

#[derive(Clone)]
struct Order {
    sale: SaleId,
    buyer: BuyerId,
    key: String,
    asked_about: bool,
    /// `None` while the order is pending; then whether it got a ticket.
    confirmed: Option<bool>,
}

async fn stub() {
    let variable = |name| env::var(name).unwrap_or_else(|_| panic!("{name} is not set"));
    let mut told_to_stop = signal(SignalKind::terminate()).expect("a signal");
    box_office::raise_open_files_limit();
    let (asked_about, to_decide) = mpsc::unbounded_channel();
    let stub = Arc::new(Stub {
        lie: variable("STRATEGY"),
        database: PgPool::connect(&variable("DATABASE_URL")).await.expect("a database"),
        orders: Mutex::default(),
        asked_about,
    });
    tokio::spawn(decide_all(Arc::clone(&stub), to_decide));
    let routes = Router::new()
        .route("/readyz", get(async || "ready\n"))
        .route("/api/sales/{id}", put(open_sale))
        .route("/api/sales/{id}/reservations", post(accept))
        .route("/api/reservations/{id}", get(look_up))
        .with_state(stub);
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    println!("it listens on http://{}", listener.local_addr().expect("an address"));
    tokio::select! {
        served = axum::serve(listener, routes) => served.expect("it serves"),
        _ = told_to_stop.recv() => {}
    }
}

async fn open_sale(
    State(stub): State<Arc<Stub>>,
    Path(sale): Path<SaleId>,
    Json(new): Json<api::NewSale>,
) -> StatusCode {
    sqlx::query("insert into sale (id, name, capacity, stock) values ($1, $2, $3, $3)")
        .bind(sale)
        .bind(new.name)
        .bind(new.capacity)
        .execute(&stub.database)
        .await
        .expect("the sale is new");
    StatusCode::CREATED
}

async fn accept(
    State(stub): State<Arc<Stub>>,
    Path(sale): Path<SaleId>,
    headers: HeaderMap,
    Json(new): Json<api::NewReservation>,
) -> Response {
    let key = headers["idempotency-key"].to_str().expect("a key").to_owned();
    let mut orders = stub.orders();
    let known = orders.iter().find(|(_, order)| order.key == key).map(|(id, _)| *id);
    let id = known.unwrap_or_else(Uuid::now_v7);
    let order = orders.entry(id).or_insert(Order {
        sale,
        buyer: new.buyer_id,
        key,
        asked_about: false,
        confirmed: None,
    });
    let location = format!("/api/reservations/{id}");
    let body = Json(order.to_json(id));
    (StatusCode::ACCEPTED, [(header::LOCATION, location)], body).into_response()
}

async fn look_up(State(stub): State<Arc<Stub>>, Path(id): Path<Uuid>) -> Json<Value> {
    let mut orders = stub.orders();
    let order = orders.get_mut(&id).expect("only its own buyer asks about it");
    let body = order.to_json(id);
    if !order.asked_about {
        order.asked_about = true;
        stub.asked_about
            .send(id)
            .expect("they are decided as long as it serves");
    }
    if stub.lie == CHANGES_ITS_MIND.name && order.confirmed == Some(true) {
        order.confirmed = Some(false);
    }
    Json(body)
}

impl Order {
    fn to_json(&self, id: Uuid) -> Value {
        let (status, reason) = match self.confirmed {
            None => ("accepted", None),
            Some(true) => ("confirmed", None),
            Some(false) => ("refused", Some("sold-out")),
        };
        json!({"id": id, "sale_id": self.sale, "buyer_id": self.buyer, "status": status, "reason": reason})
    }
}

impl Stub {
    fn orders(&self) -> MutexGuard<'_, HashMap<Uuid, Order>> {
        self.orders.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes a ticket, and inserts the reservation.
    async fn sell(&self, id: Uuid, order: &Order) -> sqlx::Result<()> {
        let mut tx = self.database.begin().await?;
        sqlx::query("update sale set stock = stock - 1 where id = $1")
            .bind(order.sale)
            .execute(&mut *tx)
            .await?;
        sqlx::query("insert into reservation values ($1, $2, $3, $4, 'confirmed')")
            .bind(id)
            .bind(order.sale)
            .bind(order.buyer)
            .bind(&order.key)
            .execute(&mut *tx)
            .await?;
        tx.commit().await
    }
}

/// Decides one order after another, as a consumer would.
async fn decide_all(stub: Arc<Stub>, mut to_decide: mpsc::UnboundedReceiver<Uuid>) {
    let mut first = true;
    let mut sold = 0;
    while let Some(id) = to_decide.recv().await {
        let order = stub.orders()[&id].clone();
        let lies = std::mem::take(&mut first);
        if lies && stub.lie == NEVER_ENDS.name {
            continue;
        }
        let capacity: i64 = sqlx::query_scalar("select capacity from sale where id = $1")
            .bind(order.sale)
            .fetch_one(&stub.database)
            .await
            .expect("the sale is open");
        let too_many = i64::from(stub.lie == OVERSELLS_LATE.name);
        let confirmed = sold < capacity + too_many;
        if confirmed {
            sold += 1;
            if !(lies && stub.lie == WITHOUT_A_ROW.name) {
                stub.sell(id, &order).await.expect("the row is written");
            }
        }
        let mut orders = stub.orders();
        orders.get_mut(&id).expect("it stays").confirmed = Some(confirmed);
    }
}
