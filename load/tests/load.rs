//! `load goose` against an honest server and against servers that lie: each lie is found, and named.

use std::{
    collections::{HashMap, HashSet},
    io,
    process::{Output, Stdio},
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use axum::{
    Json, Router,
    extract::{Path, State},
    http::{HeaderMap, StatusCode},
    response::{IntoResponse, Response},
    routing::{get, post, put},
};
use rstest::rstest;
use serde_json::{Value, json};
use tokio::{net::TcpListener, process::Command, task::JoinHandle, time::sleep};
use uuid::Uuid;

const CAPACITY: usize = 5;
const TOKEN: &str = "the token";
/// The answering time of a slow server.
const SLOW: Duration = Duration::from_millis(500);

/// How a fake server violates the contract.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Lie {
    None,
    /// Sells one ticket too many, and reports a correct sale.
    Oversells,
    /// Two clicks of a buyer get two tickets.
    SellsABuyerTwice,
    /// Reports a stock with a lost update.
    ForgetsAnUpdate,
    /// Reports no reservations.
    LosesReservations,
    /// Reports one reservation too many.
    InventsAReservation,
    /// Answers "sold out" while one ticket is left.
    Undersells,
    /// Answers every request with 503.
    AlwaysUnavailable,
    /// Gives answers that the HTTP contract does not allow.
    AnswersNonsense,
    /// Accepts orders with 202, and reports the correct final state later.
    DecidesLater,
    /// Accepts orders, and confirms all of them later.
    ConfirmsAllLater,
    /// Accepts orders, which stay pending for ever.
    StaysPending,
    /// Accepts orders, and reports another final state once a first one was read.
    ChangesItsMind,
    /// Tells the truth, and takes its time.
    IsSlow,
    /// Holds a ticket until it is paid for, and releases it if it is not. All is well.
    TakesPayments,
    /// The same, and the money of a hold that has ended is not returned.
    KeepsTheMoney,
    /// The same, and a ticket is charged twice.
    ChargesTwice,
    /// The same, and nobody is charged.
    SellsUnpaid,
    /// The same, and one ticket too many is held for a while.
    HoldsTooMany,
    /// The same, and a ticket is held for ever.
    StaysHeld,
}

impl Lie {
    fn accepts_first(self) -> bool {
        let decides_later = matches!(
            self,
            Self::DecidesLater | Self::ConfirmsAllLater | Self::StaysPending | Self::ChangesItsMind
        );
        decides_later || self.takes_payments()
    }

    fn takes_payments(self) -> bool {
        matches!(
            self,
            Self::TakesPayments
                | Self::KeepsTheMoney
                | Self::ChargesTwice
                | Self::SellsUnpaid
                | Self::HoldsTooMany
                | Self::StaysHeld
        )
    }
}

struct FakeServer {
    lie: Lie,
    /// Of the sale that was opened.
    capacity: AtomicUsize,
    sold: Mutex<Vec<(i64, String, Uuid)>>,
    answered_503_once: Mutex<HashSet<String>>,
    accepted: Mutex<HashMap<Uuid, Accepted>>,
    /// Charges and refunds.
    ledger: Mutex<Vec<Value>>,
    /// Refunds that are in the ledger when it is next read.
    refunds_due: Mutex<Vec<Value>>,
}

/// An order that is decided when its state is read for the second time.
struct Accepted {
    buyer: i64,
    asked: u32,
    /// Refused, if not.
    confirmed: bool,
    /// How many orders had got a ticket before.
    number: usize,
    /// How an order that held a ticket has ended.
    ended: Option<&'static str>,
    /// Why it was refused, once that was told.
    refused: Option<Value>,
}

impl FakeServer {
    fn capacity(&self) -> usize {
        self.capacity.load(Ordering::Relaxed)
    }

    fn accept(&self, sale: i64, buyer: i64, key: String) -> Response {
        let id = Uuid::new_v4();
        let mut sold = self.sold.lock().expect("nobody panicked");
        let confirmed = sold.len() < self.capacity() && sold.iter().all(|(owner, ..)| *owner != buyer);
        if confirmed {
            sold.push((buyer, key, id));
        }
        let mut accepted = self.accepted.lock().expect("nobody panicked");
        let number = accepted.values().filter(|order| order.confirmed).count();
        let order = Accepted {
            buyer,
            asked: 0,
            confirmed,
            number,
            ended: None,
            refused: None,
        };
        accepted.insert(id, order);
        let body = json!({"id": id, "sale_id": sale, "buyer_id": buyer, "status": "pending"});
        let location = [("location", format!("/api/reservations/{id}"))];
        (StatusCode::ACCEPTED, location, Json(body)).into_response()
    }

    /// How an order ends that holds a ticket: the first payment is declined, and the third is charged and not answered in time.
    fn pay(&self, id: Uuid, order: &mut Accepted) -> &'static str {
        if let Some(ended) = order.ended {
            return ended;
        }
        let entry = |entry| json!({"key": id, "reservation": id, "entry": entry});
        let mut ledger = self.ledger.lock().expect("nobody panicked");
        let ended = match order.number {
            0 => "declined",
            2 => {
                ledger.push(entry("charge"));
                if self.lie != Lie::KeepsTheMoney {
                    self.refunds_due.lock().expect("nobody panicked").push(entry("refund"));
                }
                "expired"
            }
            _ => {
                let charges = match self.lie {
                    Lie::SellsUnpaid => 0,
                    Lie::ChargesTwice => 2,
                    _ => 1,
                };
                ledger.extend((0..charges).map(|_| entry("charge")));
                "confirmed"
            }
        };
        if ended != "confirmed" {
            self.sold
                .lock()
                .expect("nobody panicked")
                .retain(|(.., sold)| *sold != id);
        }
        order.ended = Some(ended);
        ended
    }
}

async fn ledger(State(server): State<Arc<FakeServer>>) -> Json<Value> {
    let mut ledger = server.ledger.lock().expect("nobody panicked");
    let read = json!(*ledger);
    ledger.append(&mut server.refunds_due.lock().expect("nobody panicked"));
    Json(read)
}

async fn follow(State(server): State<Arc<FakeServer>>, Path(id): Path<Uuid>) -> Json<Value> {
    let mut accepted = server.accepted.lock().expect("nobody panicked");
    let order = accepted.get_mut(&id).expect("it was accepted");
    order.asked += 1;
    let confirmed = match server.lie {
        Lie::ConfirmsAllLater => true,
        Lie::ChangesItsMind if order.asked > 2 => !order.confirmed,
        _ => order.confirmed,
    };
    let state = match confirmed {
        true if server.lie.takes_payments() && (order.asked < 3 || server.lie == Lie::StaysHeld) => {
            json!({"status": "held"})
        }
        true if server.lie.takes_payments() => json!({"status": server.pay(id, order)}),
        _ if order.asked < 2 || server.lie == Lie::StaysPending => json!({"status": "pending"}),
        true => json!({"status": "confirmed"}),
        false => {
            let sold = server.sold.lock().expect("nobody panicked");
            let earlier = sold.iter().find(|(owner, ..)| *owner == order.buyer);
            let refused = || match earlier {
                Some((.., earlier)) => json!({"status": "refused", "reason": "already-reserved", "earlier": earlier}),
                None => json!({"status": "refused", "reason": "sold-out"}),
            };
            order.refused.get_or_insert_with(refused).clone()
        }
    };
    let mut body = json!({"id": id, "sale_id": 1, "buyer_id": order.buyer});
    body.as_object_mut()
        .expect("it is one")
        .extend(state.as_object().expect("it is one").clone());
    Json(body)
}

async fn reserve(
    State(server): State<Arc<FakeServer>>,
    Path(sale): Path<i64>,
    headers: HeaderMap,
    Json(body): Json<Value>,
) -> Response {
    if server.lie == Lie::IsSlow {
        sleep(SLOW).await;
    }
    let key = headers["idempotency-key"].to_str().expect("it is text").to_owned();
    let buyer = body["buyer_id"].as_i64().expect("it is a number");
    let problem = |status: StatusCode, kind: &str, reservation: Option<Uuid>| {
        let body = json!({
            "type": format!("/problems/{kind}"), "title": kind, "status": status.as_u16(), "detail": kind, "request_id": "1",
            "reservation_id": reservation,
        });
        (status, Json(body)).into_response()
    };
    let confirmed = |id: Uuid| {
        let body = json!({"id": id, "sale_id": sale, "buyer_id": buyer, "status": "confirmed"});
        (StatusCode::CREATED, Json(body)).into_response()
    };
    match server.lie {
        Lie::AlwaysUnavailable => return problem(StatusCode::SERVICE_UNAVAILABLE, "undecided", None),
        _ if server.lie.accepts_first() => return server.accept(sale, buyer, key),
        Lie::AnswersNonsense => return (StatusCode::IM_A_TEAPOT, "short and stout").into_response(),
        _ => {}
    }
    let mut sold = server.sold.lock().expect("nobody panicked");
    if let Some((.., id)) = sold.iter().find(|(_, earlier, _)| *earlier == key) {
        return confirmed(*id);
    }
    // The first answer to a key is 503, after the ticket was sold: a repeat gets the final answer.
    let undecided = server
        .answered_503_once
        .lock()
        .expect("nobody panicked")
        .insert(key.clone());
    let earlier = sold.iter().find(|(owner, ..)| *owner == buyer).map(|(.., id)| *id);
    if let Some(id) = earlier.filter(|_| server.lie != Lie::SellsABuyerTwice) {
        return problem(StatusCode::CONFLICT, "already-reserved", Some(id));
    }
    let tickets = match server.lie {
        Lie::Oversells => server.capacity() + 1,
        Lie::Undersells => server.capacity() - 1,
        _ => server.capacity(),
    };
    if sold.len() >= tickets {
        return problem(StatusCode::CONFLICT, "sold-out", None);
    }
    let id = Uuid::new_v4();
    sold.push((buyer, key, id));
    if undecided {
        problem(StatusCode::SERVICE_UNAVAILABLE, "undecided", None)
    } else {
        confirmed(id)
    }
}

async fn read_sale(State(server): State<Arc<FakeServer>>, Path(sale): Path<i64>) -> Json<Value> {
    let (sold, capacity) = (server.sold.lock().expect("nobody panicked").len(), server.capacity());
    let accepted = server.accepted.lock().expect("nobody panicked");
    let is_held = accepted.values().any(|order| order.confirmed && order.ended.is_none());
    let (stock, reserved) = match server.lie {
        Lie::Oversells => (0, capacity),
        Lie::ForgetsAnUpdate => (1, sold),
        Lie::LosesReservations => (capacity, 0),
        Lie::InventsAReservation => (capacity - sold, sold + 1),
        Lie::HoldsTooMany if is_held => (0, capacity + 1),
        _ => (capacity - sold, sold),
    };
    Json(json!({"id": sale, "name": "x", "capacity": capacity, "stock": stock, "reserved": reserved}))
}

async fn open(State(server): State<Arc<FakeServer>>, headers: HeaderMap, Json(body): Json<Value>) -> StatusCode {
    let capacity = body["capacity"].as_u64().expect("it is a number");
    server
        .capacity
        .store(usize::try_from(capacity).expect("it is small"), Ordering::Relaxed);
    if headers["authorization"] == format!("Bearer {TOKEN}") {
        StatusCode::CREATED
    } else {
        StatusCode::UNAUTHORIZED
    }
}

/// Starts a server with this lie, and returns its address.
async fn serve(lie: Lie) -> (String, JoinHandle<io::Result<()>>) {
    let server = Arc::new(FakeServer {
        lie,
        capacity: AtomicUsize::new(0),
        sold: Mutex::default(),
        answered_503_once: Mutex::default(),
        accepted: Mutex::default(),
        ledger: Mutex::default(),
        refunds_due: Mutex::default(),
    });
    let app = Router::new()
        .route("/api/sales/{sale}/reservations", post(reserve))
        .route("/api/sales/{sale}", put(open).get(read_sale))
        .route("/api/reservations/{id}", get(follow))
        .route("/ledger", get(ledger))
        .route("/readyz", get(|| async {}))
        .with_state(server);
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
    let host = format!("http://{}", listener.local_addr().expect("it listens"));
    (host, tokio::spawn(async { axum::serve(listener, app).await }))
}

/// The number of buyers for five tickets. With two clicks each, of three buyers one gets two.
fn buyers(lie: Lie) -> &'static str {
    if lie == Lie::SellsABuyerTwice { "3" } else { "10" }
}

/// Runs `load goose` against a server with this lie.
async fn load(lie: Lie, arguments: &[&str]) -> (Option<i32>, String) {
    let (host, serving) = serve(lie).await;
    let size = ["goose", "--host", &host, "--buyers", buyers(lie), "--capacity", "5"];
    let payments = ["--payment-url", &host, "--expiry-ms", "1"];
    let payments = if lie.takes_payments() { &payments[..] } else { &[] };
    let output = run(&[&size, payments, arguments].concat()).await;
    serving.abort();
    output
}

const K6: &str = "target/tools/bin/k6";
const K6_ARGUMENTS: [&str; 6] = [
    "run",
    "--quiet",
    "--no-usage-report",
    "--address",
    "",
    "load/k6/rush.js",
];

/// Runs the script of k6 against a server with this lie.
async fn k6(lie: Lie, breaks: &str) -> (Option<i32>, String) {
    let mut command = Command::new(K6);
    command
        .args(K6_ARGUMENTS)
        .env("BUYERS", buyers(lie))
        .env("CLICKS", "2")
        .env("PATIENCE", "1")
        .env("BREAKS", breaks);
    k6_as(lie, command).await
}

async fn k6_as(lie: Lie, mut command: Command) -> (Option<i32>, String) {
    let (host, serving) = serve(lie).await;
    command
        .current_dir(concat!(env!("CARGO_MANIFEST_DIR"), "/.."))
        .env("PAYMENT_URL", if lie.takes_payments() { &host } else { "" })
        .env("BASE_URL", &host)
        .env("CAPACITY", CAPACITY.to_string());
    let output = finish(command).await;
    serving.abort();
    output
}

/// A command in a shell that allows it so many open files, and no more.
fn with_open_files(files: u32, program: &str, arguments: &[&str]) -> Command {
    let mut command = Command::new("sh");
    command
        .args(["-c", &format!("ulimit -n {files} && exec \"$0\" \"$@\""), program])
        .args(arguments);
    command
}

async fn run(arguments: &[&str]) -> (Option<i32>, String) {
    let mut command = Command::new(env!("CARGO_BIN_EXE_load"));
    command.args(arguments);
    finish(command).await
}

/// Runs `load` where its script and k6 are.
async fn at_the_root(arguments: &[&str]) -> (Option<i32>, String) {
    let mut command = Command::new(env!("CARGO_BIN_EXE_load"));
    command
        .current_dir(concat!(env!("CARGO_MANIFEST_DIR"), "/.."))
        .args(arguments);
    finish(command).await
}

async fn finish(mut command: Command) -> (Option<i32>, String) {
    let output = command.env("OVERSOLD_ADMIN_TOKEN", TOKEN).stdin(Stdio::null()).output();
    let Output { status, stdout, stderr } = output.await.expect("it runs");
    let said = String::from_utf8_lossy(&stdout).into_owned() + &String::from_utf8_lossy(&stderr);
    (status.code(), said)
}

#[rstest]
#[case(Lie::Oversells, "I1, I2, I4")]
#[case(Lie::SellsABuyerTwice, "I3")]
#[case(Lie::ForgetsAnUpdate, "I2")]
#[case(Lie::LosesReservations, "I2, I4")]
#[case(Lie::InventsAReservation, "I1, I2, I5")]
#[case(Lie::Undersells, "I7")]
#[case(Lie::AlwaysUnavailable, "I10")]
#[case(Lie::AnswersNonsense, "I10")]
#[case(Lie::ConfirmsAllLater, "I1, I2, I3, I4")]
#[case(Lie::StaysPending, "I4, I10")]
#[case(Lie::ChangesItsMind, "I4, I5, I7")]
#[case(Lie::KeepsTheMoney, "I11")]
#[case(Lie::ChargesTwice, "I11")]
#[case(Lie::SellsUnpaid, "I11")]
#[case(Lie::HoldsTooMany, "I1")]
#[case(Lie::StaysHeld, "I4, I10")]
#[tokio::test]
async fn a_server_that_lies_fails_the_load_and_its_lie_is_named(#[case] lie: Lie, #[case] broken: &str) {
    let (code, said) = load(lie, &["--clicks", "2", "--patience", "1"]).await;
    assert_eq!(code, Some(1), "{said}");
    assert!(
        said.contains(&format!("BROKEN ({broken}); guarantee broken: {broken}\n")),
        "{said}"
    );
}

#[tokio::test]
async fn an_honest_server_passes() {
    let (code, said) = load(Lie::None, &["--clicks", "2"]).await;
    assert_eq!(code, Some(0), "{said}");
    assert!(said.contains("5 sold of 5, nothing broken"), "{said}");
}

#[tokio::test]
async fn what_was_accepted_is_followed_to_its_final_state_which_has_a_clock_of_its_own() {
    let (code, said) = load(Lie::DecidesLater, &["--clicks", "2"]).await;
    assert_eq!(code, Some(0), "{said}");
    assert!(said.contains("5 sold of 5, nothing broken"), "{said}");
    assert!(
        said.contains("completed, ms") && !said.contains("as answered"),
        "{said}"
    );

    let (_, said) = load(Lie::None, &["--clicks", "2"]).await;
    assert!(said.contains("as answered"), "{said}");
}

/// Some are declined, some expire, and refunds come after the answers: a run of which nothing is broken.
#[tokio::test]
async fn holds_and_payments_are_followed_to_their_end() {
    let (code, said) = load(Lie::TakesPayments, &["--clicks", "2"]).await;
    assert_eq!(code, Some(0), "{said}");
    assert!(said.contains("sold of 5, nothing broken"), "{said}");
    let payments = said.lines().find(|line| line.contains("payments: "));
    assert!(
        payments.is_some_and(|line| !line.contains(" 0 refunded") && !line.contains("; 0 orders ended unpaid")),
        "{said}"
    );
}

#[tokio::test]
async fn what_is_broken_on_purpose_passes_and_must_be_seen() {
    let (code, said) = load(Lie::Oversells, &["--breaks", "I1,I2,I4"]).await;
    assert_eq!(code, Some(0), "{said}");
    assert!(said.contains("exists to show"), "{said}");

    let (code, said) = load(Lie::None, &["--breaks", "I1"]).await;
    assert_eq!(code, Some(4), "{said}");
    assert!(said.contains("inconclusive: I1 was not seen to break"), "{said}");
}

#[rstest]
#[case(&["goose", "--host", "http://127.0.0.1:1"], "load: connecting to 127.0.0.1:1: Connection refused")]
#[case(&["goose", "--host", "ftp://x"], "load: --host holds \"ftp://x\"; expected an address")]
#[case(&["goose", "--host", "http://127.0.0.1:1", "--buyers", "0"], "load: --buyers holds \"0\"; expected a number, 1 to 5000")]
#[case(&["goose", "--host", "http://127.0.0.1:1", "--breaks", "I12"], "load: --breaks holds \"I12\"; expected codes")]
#[case(&["goose", "--host", "http://127.0.0.1:1", "--payment-url", "payments"], "load: PAYMENT_URL (--payment-url) holds \"payments\"; expected an address")]
#[case(&["goose", "--host", "http://127.0.0.1:1", "--expiry-ms", "0"], "load: --expiry-ms holds \"0\"; expected a number, 1 to 86400000")]
#[case(&["goose"], "load: --host <http://HOST:PORT> is missing")]
#[case(&["rush", "lv1", "--oversold", "/nowhere"], "load: there is no /nowhere")]
#[case(&["roll"], "load: unrecognized subcommand 'roll'")]
#[tokio::test]
async fn what_can_not_be_done_is_one_clear_line(#[case] arguments: &[&str], #[case] line: &str) {
    let (code, said) = run(arguments).await;
    assert_eq!(code, Some(2), "{said}");
    assert!(said.starts_with(line), "{said}");
    assert_eq!(said.lines().count(), 1, "{said}");
}

/// As in `load goose … | head -1`.
#[tokio::test]
async fn a_reader_of_the_results_may_leave_before_their_end() {
    let (host, serving) = serve(Lie::None).await;
    let (reader, writer) = io::pipe().expect("a pipe");
    drop(reader);
    let mut command = Command::new(env!("CARGO_BIN_EXE_load"));
    command
        .args(["goose", "--host", &host, "--buyers", "10", "--capacity", "5"])
        .env("OVERSOLD_ADMIN_TOKEN", TOKEN)
        .stdout(writer);
    let output = command.output().await.expect("it runs");
    serving.abort();
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(0), "{said}");
    assert!(!said.contains("panicked"), "{said}");
}

#[tokio::test]
async fn what_goose_could_not_send_makes_the_run_void() {
    let (host, serving) = serve(Lie::None).await;
    let arguments = [
        "goose",
        "--host",
        &host,
        "--buyers",
        "100",
        "--capacity",
        "5",
        "--patience",
        "1",
    ];
    let (code, said) = finish(with_open_files(60, env!("CARGO_BIN_EXE_load"), &arguments)).await;
    serving.abort();
    assert_eq!(code, Some(4), "{said}");
    assert!(said.contains("5; void\n"), "{said}");
    assert!(
        said.contains("VOID: ") && said.contains("requests never left this process"),
        "{said}"
    );
}

/// k6 sees what Goose's judge sees, but for the truth of each refusal.
#[rstest]
#[case(Lie::Oversells, "I1, I4")]
#[case(Lie::SellsABuyerTwice, "I3")]
#[case(Lie::ForgetsAnUpdate, "I2")]
#[case(Lie::LosesReservations, "I4")]
#[case(Lie::InventsAReservation, "I2, I5")]
#[case(Lie::Undersells, "I7")]
#[case(Lie::AlwaysUnavailable, "I10")]
#[case(Lie::AnswersNonsense, "I10")]
#[case(Lie::ConfirmsAllLater, "I1, I3, I4")]
#[case(Lie::StaysPending, "I10")]
#[case(Lie::KeepsTheMoney, "I11")]
#[case(Lie::ChargesTwice, "I11")]
#[case(Lie::SellsUnpaid, "I11")]
#[case(Lie::HoldsTooMany, "I1")]
#[case(Lie::StaysHeld, "I10")]
#[ignore = "needs k6: make target/tools/bin/k6"]
#[tokio::test]
async fn k6_fails_on_a_server_that_lies(#[case] lie: Lie, #[case] broken: &str) {
    let (code, said) = k6(lie, "").await;
    assert_eq!(code, Some(99), "{said}");
    let lines = said.lines().filter_map(|line| line.strip_prefix("BROKEN "));
    let named: Vec<&str> = lines.filter_map(|line| line.split(' ').next()).collect();
    assert_eq!(named.join(", "), broken, "{said}");
}

/// On the backends, with a payment service beside each server: the strategy passes, and a mutant that charges twice does not.
#[rstest]
#[case("lv4/single-writer", "approve=80,decline=10,hang=5,answer-late=5", 0)]
#[case("lv4/mutants/no-idempotency-key", "answer-late", 1)]
#[ignore = "needs k6 and the command: make target/tools/bin/k6, cargo build -p oversold"]
#[tokio::test]
async fn a_load_with_payments_passes_and_one_that_takes_too_much_money_fails(
    #[case] strategy: &str,
    #[case] mix: &str,
    #[case] exit: i32,
) {
    let (code, said) = at_the_root(&[
        "rush",
        strategy,
        "--payments",
        mix,
        "--buyers",
        "100",
        "--capacity",
        "40",
    ])
    .await;
    assert_eq!(code, Some(exit), "{said}");
    let payments = said.lines().filter(|line| line.contains("payments: ")).count();
    assert_eq!(payments, 2, "of Goose and of k6: {said}");
    let broken = said.matches("BROKEN (I11); guarantee broken: I11\n").count();
    assert_eq!(broken, if exit == 0 { 0 } else { 2 }, "{said}");
}

#[rstest]
#[case(
    "lv4/single-writer",
    "aprove=1",
    "load: --payments: ",
    "expected weights as in approve=90,decline=8,hang=2"
)]
#[case("lv4", "approve=0", "load: --payments: ", "not all of them 0")]
#[case(
    "lv4/locked",
    "approve",
    "load: --payments is given, but lv4/locked holds no tickets",
    ""
)]
#[case("lv2", "approve", "load: --payments is given, but lv2 holds no tickets", "")]
#[ignore = "needs k6 and the command: make target/tools/bin/k6, cargo build -p oversold"]
#[tokio::test]
async fn payments_that_can_not_be_are_one_clear_line(
    #[case] strategy: &str,
    #[case] mix: &str,
    #[case] begins: &str,
    #[case] contains: &str,
) {
    let (code, said) = at_the_root(&["rush", strategy, "--payments", mix]).await;
    assert_eq!(code, Some(2), "{said}");
    assert!(said.starts_with(begins) && said.contains(contains), "{said}");
    assert_eq!(said.lines().count(), 1, "{said}");
}

#[ignore = "needs k6: make target/tools/bin/k6"]
#[tokio::test]
async fn k6_passes_on_an_honest_server_and_where_the_break_is_expected() {
    let (code, said) = k6(Lie::None, "").await;
    assert_eq!(code, Some(0), "{said}");
    let (code, said) = k6(Lie::DecidesLater, "").await;
    assert_eq!(code, Some(0), "{said}");
    assert!(said.contains("completed, p50 / p95 / p99: "), "{said}");
    let (code, said) = k6(Lie::TakesPayments, "").await;
    assert_eq!(code, Some(0), "{said}");
    assert!(said.contains("payments: ") && !said.contains(" 0 refunded"), "{said}");
    let (code, said) = k6(Lie::ForgetsAnUpdate, "I2").await;
    assert_eq!(code, Some(0), "{said}");
    let (code, said) = k6(Lie::None, "I2").await;
    assert_eq!(code, Some(99), "{said}");
}

/// At a server that takes half a second, five virtual users play at most ten buyers a second, and not a hundred.
#[ignore = "needs k6: make target/tools/bin/k6"]
#[tokio::test]
async fn buyers_for_whom_k6_had_nobody_make_the_run_void() {
    for (virtual_users, void) in [("5", true), ("300", false)] {
        let mut command = Command::new(K6);
        command
            .args(K6_ARGUMENTS)
            .env("SCENARIO", "arrivals")
            .env("RATE", "100")
            .env("SECONDS", "1")
            .env("VUS", virtual_users);
        let (code, said) = k6_as(Lie::IsSlow, command).await;
        assert_eq!(code, Some(if void { 99 } else { 0 }), "{said}");
        assert_eq!(said.contains("buyers could not be sent: "), void, "{said}");
        assert_eq!(said.contains("VOID: "), void, "{said}");
        assert!(!said.contains("BROKEN"), "{said}");
    }
}

#[ignore = "needs k6: make target/tools/bin/k6"]
#[tokio::test]
async fn what_k6_could_not_send_makes_the_run_void() {
    let mut command = with_open_files(60, K6, &K6_ARGUMENTS);
    command.env("BUYERS", "200").env("VUS", "200").env("PATIENCE", "1");
    let (code, said) = k6_as(Lie::IsSlow, command).await;
    assert_eq!(code, Some(99), "{said}");
    assert!(
        said.contains("VOID: ") && said.contains("requests never left this process"),
        "{said}"
    );
}
