//! The payment service, as the tests of the saga start and question it.

use std::{path::Path, time::Duration};

use harness::{
    history::{Entry, Payment},
    rush::Program,
    until,
};
use reqwest::{Client, Response, StatusCode};
use rstest::rstest;
use serde_json::{Value, json};
use tokio::{process::Command, time::timeout};
use uuid::Uuid;

use lv4_kafka::saga::{Charge, PaymentClient, UnknownOutcome};

use super::fixture::TIMEOUT;

/// The payment service of this level.
pub(crate) const PROGRAM: &str = env!("CARGO_BIN_EXE_payment-service");

/// How long a frozen service is observed not to answer.
const FROZEN: Duration = Duration::from_millis(500);

/// A payment service in a process of its own, with a ledger that survives it.
pub(crate) struct PaymentService {
    running: harness::payments::PaymentService,
    pub(crate) url: String,
    client: Client,
    ledger: tempfile::TempPath,
}

impl PaymentService {
    /// Starts a service with these flags on a free port.
    pub(crate) async fn start(flags: &[&str]) -> Self {
        let ledger = tempfile::NamedTempFile::new().unwrap().into_temp_path();
        let running = spawn(&ledger, "127.0.0.1:0", flags).await;
        Self {
            url: running.url(),
            running,
            client: Client::builder().no_proxy().build().unwrap(),
            ledger,
        }
    }

    /// Starts it again on the same port, with its ledger, and without the behaviours that were set.
    pub(crate) async fn restart(&mut self) {
        let address = self.url.trim_start_matches("http://").to_owned();
        self.running = spawn(&self.ledger, &address, &[]).await;
    }

    /// Waits until the process has exited by itself.
    pub(crate) async fn wait_until_dead(&mut self) {
        let status = timeout(TIMEOUT, self.running.process().wait())
            .await
            .expect("the fault did not strike");
        assert_eq!(status.unwrap().code(), Some(9), "the fault did not strike");
    }

    /// Freezes the process: it takes connections, and answers nothing.
    pub(crate) async fn freeze(&self) {
        self.signal("STOP").await;
        let answer = timeout(FROZEN, self.running.calls()).await;
        assert!(answer.is_err(), "the fault did not strike");
    }

    /// Lets it go on.
    pub(crate) async fn thaw(&self) {
        self.signal("CONT").await;
    }

    async fn signal(&self, signal: &str) {
        let pid = self.running.pid().unwrap().to_string();
        let sent = Command::new("kill").args(["-s", signal, &pid]).status().await.unwrap();
        assert!(sent.success());
    }

    /// Chooses how the charges of a buyer are treated.
    pub(crate) async fn behave(&self, buyer: i64, behaviour: &'static str) {
        let url = format!("{}/behaviours/{buyer}", self.url);
        let answer = self.client.put(url).body(behaviour).send().await.unwrap();
        assert_eq!(answer.status(), StatusCode::NO_CONTENT);
    }

    async fn post(&self, path: &str, key: Option<&str>, body: Value) -> reqwest::Result<Response> {
        let request = self.client.post(format!("{}{path}", self.url));
        let request = request
            .header("content-type", "application/json")
            .body(body.to_string());
        let request = match key {
            Some(key) => request.header("idempotency-key", key),
            None => request,
        };
        request.timeout(Duration::from_secs(2)).send().await
    }

    /// The charges and refunds, in their order.
    pub(crate) async fn ledger(&self) -> Vec<Payment> {
        self.running.ledger().await.unwrap()
    }

    /// The entries of one reservation.
    pub(crate) async fn entries(&self, reservation: Uuid) -> Vec<Entry> {
        let ledger = self.ledger().await.into_iter();
        let own = ledger.filter(|payment| payment.reservation == reservation);
        own.map(|payment| payment.entry).collect()
    }

    /// The number of bytes that it has sent in answers that are floods.
    async fn flooded(&self) -> u64 {
        let answer = self.client.get(format!("{}/flooded", self.url)).send().await.unwrap();
        answer.text().await.unwrap().parse().unwrap()
    }

    /// The number of requests for a charge, repeats included.
    pub(crate) async fn calls(&self) -> u64 {
        self.running.calls().await.unwrap()
    }
}

async fn spawn(ledger: &Path, address: &str, flags: &[&str]) -> harness::payments::PaymentService {
    let arguments = ["--ledger", ledger.to_str().unwrap(), "--listen", address];
    let program = arguments
        .iter()
        .chain(flags)
        .fold(Program::new(PROGRAM), |program, argument| program.argument(argument));
    harness::payments::PaymentService::start(&program).await.unwrap()
}

/// More than a flood sends to a client that reads no more of it than an answer may have: that, and
/// what the buffers of both sockets take.
const FLOOD_LIMIT: u64 = 64 * 1024 * 1024;

const RESERVATION: Uuid = Uuid::from_u128(7);

fn body(buyer: i64) -> Value {
    json!({"reservation": RESERVATION, "buyer": buyer})
}

async fn status(answer: reqwest::Result<Response>) -> Option<String> {
    let text = answer.ok()?.text().await.ok()?;
    let answer: Value = serde_json::from_str(&text).ok()?;
    Some(answer["status"].as_str()?.to_owned())
}

/// What the client sees of its first request and of a repeat with the same key, and what is in the
/// ledger then.
#[rstest]
#[case::approve("approve", [Some("approved"), Some("approved")], &[Entry::Charge])]
#[case::decline("decline", [Some("declined"), Some("declined")], &[])]
#[case::hang("hang", [None, None], &[])]
#[case::answer_late("answer-late", [None, Some("approved")], &[Entry::Charge])]
#[case::twice("twice", [None, Some("approved")], &[Entry::Charge])]
#[case::fail("fail", [None, None], &[Entry::Charge])]
#[case::garbage("garbage", [None, None], &[Entry::Charge])]
#[case::huge("huge", [None, None], &[Entry::Charge])]
#[case::endless("endless", [None, None], &[Entry::Charge])]
#[tokio::test]
async fn the_payment_service_behaves_as_it_is_told_and_charges_a_key_once(
    #[case] behaviour: &'static str,
    #[case] answers: [Option<&str>; 2],
    #[case] entries: &[Entry],
) {
    let service = PaymentService::start(&["--late-ms", "60000"]).await;
    service.behave(1, behaviour).await;
    for expected in answers {
        let answered = status(service.post("/charges", Some("a"), body(1)).await).await;
        assert_eq!(answered.as_deref(), expected);
    }
    assert_eq!(service.entries(RESERVATION).await, entries);
    assert_eq!(service.calls().await, 2);
}

/// An answer that is none is an unknown outcome. It takes no more time than the timeout, and no more
/// memory than an answer may have: of 10 MB the rest is not read. A flood never ends, so a client that
/// reads it to its end would run into the timeout.
#[rstest]
#[case::garbage("garbage", |why: &UnknownOutcome| matches!(why, UnknownOutcome::NotUnderstood(StatusCode::OK)))]
#[case::twice("twice", |why: &UnknownOutcome| matches!(why, UnknownOutcome::NotUnderstood(StatusCode::OK)))]
#[case::fail("fail", |why: &UnknownOutcome| matches!(why, UnknownOutcome::NotUnderstood(StatusCode::INTERNAL_SERVER_ERROR)))]
#[case::huge("huge", |why: &UnknownOutcome| matches!(why, UnknownOutcome::TooLarge))]
#[case::flood("flood", |why: &UnknownOutcome| matches!(why, UnknownOutcome::TooLarge))]
#[case::endless("endless", |why: &UnknownOutcome| matches!(why, UnknownOutcome::NoAnswer(why) if why.is_timeout()))]
#[case::hang("hang", |why: &UnknownOutcome| matches!(why, UnknownOutcome::NoAnswer(why) if why.is_timeout()))]
#[tokio::test]
async fn an_answer_that_is_none_is_an_unknown_outcome_bounded_in_time_and_memory(
    #[case] behaviour: &'static str,
    #[case] is_expected: fn(&UnknownOutcome) -> bool,
) {
    let service = PaymentService::start(&[]).await;
    service.behave(1, behaviour).await;
    let client = PaymentClient::new(&service.url.parse().unwrap(), Duration::from_millis(500)).unwrap();
    let answered = timeout(TIMEOUT, client.charge(RESERVATION, 1))
        .await
        .expect("it gives up in time");
    let why = answered.expect_err("the fault did not strike");
    assert!(is_expected(&why), "{why}");
    let flooded = service.flooded().await;
    assert_eq!(flooded > 0, behaviour == "flood", "the fault did not strike");
    assert!(flooded < FLOOD_LIMIT, "{flooded} bytes were sent");
    // Another buyer's payment is not affected.
    let other = client.charge(Uuid::from_u128(8), 2).await.unwrap();
    assert_eq!(other, Charge::Approved);
}

#[tokio::test]
async fn the_payment_service_charges_again_what_has_no_key() {
    let service = PaymentService::start(&[]).await;
    for _ in 0..2 {
        let answered = status(service.post("/charges", None, body(1)).await).await;
        assert_eq!(answered.as_deref(), Some("approved"));
    }
    assert_eq!(service.entries(RESERVATION).await, [Entry::Charge, Entry::Charge]);
}

#[tokio::test]
async fn a_refund_is_the_last_word_about_its_key() {
    let service = PaymentService::start(&[]).await;
    let charge = async || status(service.post("/charges", Some("a"), body(1)).await).await;
    let refund = async |key| status(service.post("/refunds", Some(key), body(1)).await).await;
    assert_eq!(charge().await.as_deref(), Some("approved"));
    for _ in 0..2 {
        assert_eq!(refund("a").await.as_deref(), Some("refunded"));
    }
    assert_eq!(service.entries(RESERVATION).await, [Entry::Charge, Entry::Refund]);

    assert_eq!(refund("b").await.as_deref(), Some("refunded"));
    let late = status(service.post("/charges", Some("b"), body(1)).await).await;
    assert_eq!(late.as_deref(), Some("declined"), "it came after its refund");
    assert_eq!(service.ledger().await.len(), 2);
}

#[tokio::test]
async fn what_is_being_processed_cannot_be_refunded_yet() {
    let service = PaymentService::start(&["--late-ms", "8000"]).await;
    service.behave(1, "take-late").await;
    assert!(
        service.post("/charges", Some("a"), body(1)).await.is_err(),
        "it has no answer yet"
    );
    let refund = async || status(service.post("/refunds", Some("a"), body(1)).await).await;
    assert_eq!(refund().await.as_deref(), Some("processing"));
    until("the money is taken", async || !service.ledger().await.is_empty()).await;
    assert_eq!(refund().await.as_deref(), Some("refunded"));
    assert_eq!(service.entries(RESERVATION).await, [Entry::Charge, Entry::Refund]);
}

#[tokio::test]
async fn what_a_dying_payment_service_has_taken_is_in_its_ledger() {
    let mut service = PaymentService::start(&[]).await;
    service.behave(1, "die").await;
    assert!(service.post("/charges", Some("a"), body(1)).await.is_err());
    service.wait_until_dead().await;
    service.restart().await;
    assert_eq!(service.entries(RESERVATION).await, [Entry::Charge]);
    let repeated = status(service.post("/charges", Some("a"), body(1)).await).await;
    assert_eq!(repeated.as_deref(), Some("approved"));
    assert_eq!(service.entries(RESERVATION).await, [Entry::Charge]);
}
