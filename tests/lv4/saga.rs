//! The saga: hold, pay, confirm or release (`PAYMENT_URL`). Everybody's money is right in the end,
//! whatever the payment service does, and whichever instance dies.

use std::{process::Command, time::Duration};

use box_office::{
    Improvements,
    Invariant::{self, Conservation, NothingLost, PaidOnce, Progress},
    ProblemKind, api, points,
};
use harness::{
    assert_after_fault, assert_failure_mode, contract,
    history::{
        Entry::{self, Charge, Refund},
        Status,
    },
    payments::unfinished,
    rush::{Answers, Program, Rush, SALE},
    test_server::TestServer,
    until,
};
use lv4_kafka::{LEVEL, pipeline::ReleaseCommand};
use rstest::rstest;
use uuid::Uuid;

use super::{
    ablation::{
        Improvement::{Off, On},
        record,
    },
    contract::{KEEPS, program, strategy},
    fixture::{Fixture, OBSERVATION_TIME, TIMEOUT, happens_within, kill_instance, metric},
    outbox_relay::published,
    payments::{PROGRAM, PaymentService},
};

/// How long a ticket is held, and how long a payment may take, in tests whose holds end.
const SHORT_HOLD: [(&str, &str); 2] = [("HOLD_MS", "2000"), ("PAYMENT_TIMEOUT_MS", "300")];

/// The same where each payment has all the time that it needs.
pub(crate) const PATIENT: [(&str, &str); 2] = [("HOLD_MS", "600000"), ("PAYMENT_TIMEOUT_MS", "20000")];

/// The same in tests whose holds must not end.
pub(crate) const LONG_HOLD: [(&str, &str); 2] = [("HOLD_MS", "600000"), ("PAYMENT_TIMEOUT_MS", "300")];

/// A sale with payments.
pub(crate) struct Shop {
    pub(crate) fixture: Fixture,
    pub(crate) payments: PaymentService,
    /// Accepts orders and decides none.
    pub(crate) acceptor: TestServer,
    hold: [(&'static str, &'static str); 2],
}

impl Shop {
    pub(crate) async fn open(
        name: &str,
        capacity: u32,
        flags: &[&str],
        hold: [(&'static str, &'static str); 2],
    ) -> Self {
        Self::open_on(Fixture::new(name).await, capacity, flags, hold).await
    }

    /// Opens the sale on these backends, with a payment service that is started with these flags.
    pub(crate) async fn open_on(
        fixture: Fixture,
        capacity: u32,
        flags: &[&str],
        hold: [(&'static str, &'static str); 2],
    ) -> Self {
        let fixture = fixture.with_short_session();
        let payments = PaymentService::start(flags).await;
        let url = ("PAYMENT_URL", payments.url.as_str());
        let settings = [&[url, ("KAFKA_CONSUMERS", "0")][..], &hold].concat();
        let acceptor = fixture.start_instance(&settings).await;
        acceptor.create_rush_sale(capacity).await.unwrap();
        let [(_, hold_ms), _] = hold;
        fixture
            .history
            .record_expiry(Duration::from_millis(hold_ms.parse().unwrap()));
        Self {
            fixture,
            payments,
            acceptor,
            hold,
        }
    }

    /// Starts an instance that is stopped (SIGSTOP) at this hit of a point, and waits until it is.
    pub(crate) async fn start_stopped_at(&self, point: &str) -> TestServer {
        let stopping = self.start_instance(&[("OVERSOLD_STOP_AT", point)]).await;
        stopping
            .wait_until_stopped(TIMEOUT)
            .await
            .expect("the fault did not strike");
        stopping
    }

    /// Starts an instance that decides orders.
    pub(crate) async fn start_instance(&self, settings: &[(&'static str, &str)]) -> TestServer {
        let url = ("PAYMENT_URL", self.payments.url.as_str());
        let settings = [&[url], &self.hold[..], settings].concat();
        self.fixture.start_instance(&settings).await
    }

    pub(crate) async fn order(&self, buyer: i64) -> Uuid {
        self.fixture.accept(&self.acceptor, buyer).await
    }

    pub(crate) async fn status(&self, order: Uuid) -> String {
        let answer = self.acceptor.get(&format!("/api/reservations/{order}")).await;
        answer.unwrap().json::<api::Reservation>().unwrap().status
    }

    pub(crate) async fn wait_for_status(&self, order: Uuid, status: &str) {
        until(&format!("{order} is {status}"), async || {
            self.status(order).await == status
        })
        .await;
    }

    /// The number of sagas that are not finished.
    pub(crate) async fn unfinished(&self) -> i64 {
        unfinished(&self.fixture.pool).await.unwrap()
    }

    /// Waits until every order is decided and every saga is finished, then judges the sale with the
    /// ledger of the payment service: every invariant is kept but these.
    pub(crate) async fn judge(&self, breaks: &[Invariant]) {
        self.fixture.wait_until_processed().await;
        let finished = async || self.unfinished().await == 0 && self.fixture.lag().await == 0;
        // A mutant may never finish.
        let within = if breaks.is_empty() { TIMEOUT } else { OBSERVATION_TIME };
        let is_quiet = happens_within(within, finished).await;
        assert!(
            is_quiet || !breaks.is_empty(),
            "after {TIMEOUT:?} {} sagas are not finished",
            self.unfinished().await
        );
        self.fixture.history.record_payments(self.payments.ledger().await);
        let verdict = self.fixture.verdict(&self.acceptor, TIMEOUT).await;
        assert_after_fault(self.fixture.strategy, &verdict, breaks);
    }
}

// ANCHOR: contract
/// The contract of every level, in a sale whose tickets have to be paid for.
#[rstest]
#[case::on_one(1)]
#[case::on_three(3)]
#[tokio::test]
async fn a_sale_with_payments_keeps_its_guarantee(#[case] instances: usize) {
    let mix = "approve=70,decline=10,hang=10,answer-late=10";
    let payments = Program::new(PROGRAM).argument("--behave").argument(mix);
    let rush = Rush {
        payments: Some(payments),
        improvements: Improvements {
            hold: Some(Duration::from_secs(3)),
            payment_timeout: Some(Duration::from_millis(500)),
            ..Improvements::default()
        },
        ..Rush::for_strategy(strategy("single-writer")).instances(instances)
    };
    let report = contract(&program(), &LEVEL, "single-writer", rush, KEEPS).await;
    // Of those who hold the first hundred tickets, about eighty pay, some of them at the second request.
    // Nearly everybody else has been refused by then, so what comes back may stay unsold.
    let rows = report.history.rows.iter().flatten();
    let sold = rows.filter(|row| row.status == Status::Confirmed).count();
    assert!(sold >= 50, "{sold} of 100 are sold");
    let Answers { declined, expired, .. } = report.answers;
    assert!(
        declined > 0 && expired > 0,
        "the fault did not strike: {:?}",
        report.answers
    );
    let held = report.history.rows.iter().flatten().count() as u64;
    assert!(
        report.payment_calls > Some(held),
        "the fault did not strike: each of {held} payments was answered at once"
    );
}
// ANCHOR_END: contract

/// Every behaviour of the payment service, for a buyer of its own in one sale: how the order ends,
/// and what the ledger says of it.
#[rstest]
#[case::on_one(1)]
#[case::on_three(3)]
#[tokio::test]
async fn whatever_the_payment_service_does_tickets_and_money_agree(#[case] instances: usize) {
    const ENDINGS: [(&str, &str, &[Entry]); 11] = [
        ("approve", "confirmed", &[Charge]),
        ("decline", "declined", &[]),
        ("hang", "expired", &[]),
        ("answer-late", "confirmed", &[Charge]),
        ("take-late", "expired", &[Charge, Refund]),
        ("twice", "confirmed", &[Charge]),
        ("fail", "expired", &[Charge, Refund]),
        ("garbage", "expired", &[Charge, Refund]),
        ("huge", "expired", &[Charge, Refund]),
        ("endless", "expired", &[Charge, Refund]),
        ("flood", "expired", &[Charge, Refund]),
    ];
    // So long that who pays at once is in time on a busy machine; and so late that the holds have ended.
    let hold = [("HOLD_MS", "6000"), ("PAYMENT_TIMEOUT_MS", "500")];
    let shop = Shop::open("single-writer", 11, &["--late-ms", "10000"], hold).await;
    let mut orders = vec![];
    for (buyer, (behaviour, ..)) in (1..).zip(ENDINGS) {
        shop.payments.behave(buyer, behaviour).await;
        orders.push(shop.order(buyer).await);
    }
    let mut servers = vec![];
    for _ in 0..instances {
        servers.push(shop.start_instance(&[]).await);
    }
    for (order, (_, status, _)) in orders.iter().zip(ENDINGS) {
        shop.wait_for_status(*order, status).await;
    }

    // What came back is sold again.
    for buyer in 21..=29 {
        orders.push(shop.order(buyer).await);
    }
    shop.judge(&[]).await;
    let sale = shop.acceptor.sale(SALE).await.unwrap();
    assert_eq!(
        (sale.stock, sale.reserved),
        (0, 11),
        "3 were paid for at first, and 8 of 9 got what came back"
    );
    for (order, (behaviour, _, entries)) in orders.iter().zip(ENDINGS) {
        assert_eq!(shop.payments.entries(*order).await, entries, "{behaviour}");
    }
    for server in servers {
        server.stop().await.unwrap();
    }
}

/// Each payment takes a second, and three instances look for sagas that are due. A charge that one has
/// claimed is not due for the others, and not for itself.
#[rstest]
#[case::single_writer("single-writer", true)]
#[case::claim_claims_nothing("mutants/claim-claims-nothing", false)]
#[tokio::test]
async fn three_instances_ask_for_each_payment_once(#[case] name: &str, #[case] is_asked_once: bool) {
    const ORDERS: u32 = 30;
    let shop = Shop::open(name, ORDERS, &["--behave", "answer-late", "--late-ms", "1000"], PATIENT).await;
    let mut orders = vec![];
    for buyer in 1..=ORDERS {
        orders.push(shop.order(buyer.into()).await);
    }
    let mut servers = vec![];
    for _ in 0..3 {
        servers.push(shop.start_instance(&[]).await);
    }
    for order in orders {
        shop.wait_for_status(order, "confirmed").await;
    }
    // The keys keep the money right all the same.
    shop.judge(&[]).await;
    let calls = shop.payments.calls().await;
    assert_eq!(
        calls == u64::from(ORDERS),
        is_asked_once,
        "{name}: {calls} requests for {ORDERS} payments"
    );
    if !is_asked_once {
        assert_failure_mode(shop.fixture.strategy, &[]);
    }
    for server in servers {
        server.stop().await.unwrap();
    }
}

// ANCHOR: ablation
/// The ablation: a card is declined. Without the saga its owner keeps the ticket, and nobody has paid.
/// With it the ticket comes back, and is sold to somebody who pays.
#[tokio::test]
async fn a_ticket_is_sold_to_whoever_pays_for_it() {
    let paid = async |shop: &Shop| {
        let sale = shop.acceptor.sale(SALE).await.unwrap();
        format!(
            "{} sold, {} paid for",
            sale.reserved,
            shop.payments.ledger().await.len()
        )
    };
    let shop = Shop::open("single-writer", 1, &[], LONG_HOLD).await;
    let orders = [shop.order(1).await, shop.order(2).await];
    let server = shop.fixture.start_instance(&[]).await;
    shop.wait_for_status(orders[0], "confirmed").await;
    shop.wait_for_status(orders[1], "refused").await;
    let off = paid(&shop).await;
    server.stop().await.unwrap();

    let shop = Shop::open("single-writer", 1, &["--behave", "approve"], LONG_HOLD).await;
    shop.payments.behave(1, "decline").await;
    let declined = shop.order(1).await;
    let server = shop.start_instance(&[]).await;
    shop.wait_for_status(declined, "declined").await;
    let next = shop.order(2).await;
    shop.wait_for_status(next, "confirmed").await;
    shop.judge(&[]).await;
    let on = paid(&shop).await;
    server.stop().await.unwrap();

    assert_eq!(
        (off.as_str(), on.as_str()),
        ("1 sold, 0 paid for", "1 sold, 1 paid for")
    );
    record("saga", Off, "single-writer", off);
    record("saga", On, "single-writer", on);
}
// ANCHOR_END: ablation

/// Events report each state once, and resume where a client left off.
#[tokio::test]
async fn a_buyer_sees_each_state_once_and_in_order() {
    let shop = Shop::open("single-writer", 3, &[], PATIENT).await;
    shop.payments.behave(2, "decline").await;
    let server = shop.start_instance(&[]).await;
    for (buyer, last) in [(1, "confirmed"), (2, "declined")] {
        let order = shop.order(buyer).await;
        // The client has seen "accepted", which is no stored event.
        let events = server.events(order, Some(0)).await.unwrap();
        let statuses: Vec<&str> = events.iter().map(|(_, event)| event.status.as_str()).collect();
        assert_eq!(statuses, ["held", last]);
        let [(held, _), (ended, _)] = events[..] else {
            panic!("{events:?}")
        };
        assert!(held < ended);
        assert_eq!(server.events(order, Some(held)).await.unwrap(), events[1..]);
        assert!(server.events(order, Some(ended)).await.unwrap().is_empty());
    }
    shop.judge(&[]).await;
    assert_eq!(
        shop.payments.calls().await,
        2,
        "without a fault, each order is one charge"
    );
    assert_eq!(metric(&server, "oversold_payment_calls_total").await, Some(2));
    server.stop().await.unwrap();
}

/// An event that is relayed late has the status that it reports, and not the one of its row by then.
#[tokio::test]
async fn the_relay_publishes_each_state_once_and_in_order() {
    let shop = Shop::open("single-writer", 1, &[], LONG_HOLD).await;
    let order = shop.order(1).await;
    let server = shop.start_instance(&[]).await;
    shop.wait_for_status(order, "confirmed").await;
    let relay = shop.start_instance(&[("OUTBOX_RELAY", "true")]).await;
    until("both events are published", async || {
        published(&shop.fixture).await.len() >= 2
    })
    .await;
    let events = published(&shop.fixture).await;
    let statuses: Vec<&str> = events.iter().map(|event| event.status.as_str()).collect();
    assert_eq!(statuses, ["held", "confirmed"], "{events:?}");
    shop.judge(&[]).await;
    server.stop().await.unwrap();
    relay.stop().await.unwrap();
}

#[tokio::test]
async fn a_held_order_can_be_cancelled_once_and_no_other() {
    let shop = Shop::open("single-writer", 2, &[], LONG_HOLD).await;
    shop.payments.behave(1, "hang").await;
    let (held, paid) = (shop.order(1).await, shop.order(2).await);
    let cancel = async |id: Uuid| shop.acceptor.delete(&format!("/api/reservations/{id}")).await.unwrap();
    cancel(held).await.is(ProblemKind::NotHeld).unwrap();

    let server = shop.start_instance(&[]).await;
    shop.wait_for_status(held, "held").await;
    shop.wait_for_status(paid, "confirmed").await;
    cancel(paid).await.is(ProblemKind::NotHeld).unwrap();
    for unknown in [Uuid::nil(), Uuid::from_u128(held.as_u128() ^ 1)] {
        cancel(unknown).await.is(ProblemKind::UnknownReservation).unwrap();
    }
    // 200 if the release is done by then.
    assert!(matches!(cancel(held).await.status.as_u16(), 200 | 202));
    shop.wait_for_status(held, "cancelled").await;
    let again = cancel(held).await;
    assert_eq!(again.status.as_u16(), 200);
    assert_eq!(again.json::<api::Reservation>().unwrap().status, "cancelled");
    let next = shop.order(3).await;
    shop.wait_for_status(next, "confirmed").await;
    shop.judge(&[]).await;
    assert!(shop.payments.entries(held).await.is_empty());
    server.stop().await.unwrap();
}

/// An instance dies at each step of a saga; another one takes it up.
#[rstest]
#[case::the_hold_is_not_committed(points::ROWS_WRITTEN)]
#[case::claimed_and_not_charged("sagas claimed")]
#[case::charged_and_not_stored("saga step taken")]
#[case::stored("saga step stored")]
#[tokio::test]
async fn a_saga_outlives_the_instance_that_took_its_last_step(#[case] point: &str) {
    let shop = Shop::open(
        "single-writer",
        2,
        &[],
        [("HOLD_MS", "600000"), ("PAYMENT_TIMEOUT_MS", "100")],
    )
    .await;
    shop.payments.behave(2, "decline").await;
    let orders = [shop.order(1).await, shop.order(2).await];
    let dying = shop.start_stopped_at(&format!("{point}#1")).await;
    shop.fixture.history.record_fault("an instance is killed");
    kill_instance(&dying).await;
    let server = shop.start_instance(&[]).await;
    shop.wait_for_status(orders[0], "confirmed").await;
    shop.wait_for_status(orders[1], "declined").await;
    shop.fixture.history.record_recovery();
    shop.judge(&[]).await;
    assert_eq!(shop.payments.ledger().await.len(), 1);
    server.stop().await.unwrap();
}

#[tokio::test]
async fn a_payment_service_that_dies_is_asked_again() {
    let mut shop = Shop::open("single-writer", 1, &[], LONG_HOLD).await;
    shop.payments.behave(1, "die").await;
    let order = shop.order(1).await;
    let server = shop.start_instance(&[]).await;
    shop.payments.wait_until_dead().await;
    assert_eq!(shop.status(order).await, "held");
    shop.payments.restart().await;
    shop.wait_for_status(order, "confirmed").await;
    shop.judge(&[]).await;
    assert_eq!(shop.payments.entries(order).await, [Charge]);
    server.stop().await.unwrap();
}

/// Any client of the broker can write a command. It releases nothing that is not to be released.
#[tokio::test]
async fn a_forged_or_repeated_command_releases_nothing() {
    let shop = Shop::open("single-writer", 3, &[], LONG_HOLD).await;
    shop.payments.behave(1, "hang").await;
    shop.payments.behave(3, "decline").await;
    let orders = [shop.order(1).await, shop.order(2).await, shop.order(3).await];
    let server = shop.start_instance(&[]).await;
    for (order, status) in orders.into_iter().zip(["held", "confirmed", "declined"]) {
        shop.wait_for_status(order, status).await;
    }
    shop.fixture.wait_until_processed().await;
    let before = shop.acceptor.sale(SALE).await.unwrap();
    let accepted_only = shop.fixture.ids().await.for_order(&super::fixture::order(SALE, 99));
    for id in orders.into_iter().chain([accepted_only]) {
        for _ in 0..2 {
            shop.fixture.produce_command(&ReleaseCommand::new(id, SALE)).await;
        }
    }
    shop.fixture
        .produce_command(&ReleaseCommand::new(Uuid::nil(), SALE))
        .await;
    shop.fixture.wait_until_processed().await;
    assert_eq!(shop.acceptor.sale(SALE).await.unwrap(), before);
    assert_eq!(
        shop.fixture.dead_letter_topic_size().await,
        1,
        "the one that names no reservation of this database"
    );
    for (order, status) in orders.into_iter().zip(["held", "confirmed", "declined"]) {
        assert_eq!(shop.status(order).await, status);
    }
    server.stop().await.unwrap();
}

/// A mutant, the behaviour of the payment service that shows its mistake, and what it breaks.
#[rstest]
#[case::timeout_is_a_no("mutants/timeout-is-a-no", "answer-late", &[PaidOnce])]
#[case::no_idempotency_key("mutants/no-idempotency-key", "answer-late", &[PaidOnce])]
#[case::late_payment_kept("mutants/late-payment-kept", "fail", &[PaidOnce])]
#[case::hold_without_end("mutants/hold-without-end", "hang", &[Conservation, NothingLost, Progress])]
#[case::release_repeated("mutants/release-repeated", "decline", &[Conservation])]
#[case::refund_asked_once("mutants/refund-asked-once", "take-late", &[PaidOnce])]
#[tokio::test]
async fn a_mistake_in_the_saga_is_caught(
    #[case] name: &str,
    #[case] behaviour: &'static str,
    #[case] breaks: &[Invariant],
) {
    // What is late comes after the hold has ended: an answer never, money soon.
    let late_ms = if behaviour == "take-late" { "4000" } else { "60000" };
    for (name, breaks) in [("single-writer", &[][..]), (name, breaks)] {
        let shop = Shop::open(name, 1, &["--late-ms", late_ms], SHORT_HOLD).await;
        shop.payments.behave(1, behaviour).await;
        let order = shop.order(1).await;
        let server = shop.start_instance(&[]).await;
        until("a ticket is held", async || shop.status(order).await != "accepted").await;
        // Until the hold is over, at least.
        happens_within(OBSERVATION_TIME, async || false).await;
        if behaviour == "decline" {
            shop.wait_for_status(order, "declined").await;
            shop.fixture.produce_command(&ReleaseCommand::new(order, SALE)).await;
        }
        if behaviour == "take-late" {
            until("the money is taken", async || {
                !shop.payments.entries(order).await.is_empty()
            })
            .await;
            assert_eq!(shop.status(order).await, "expired", "the fault did not strike");
        }
        shop.judge(breaks).await;
        kill_instance(&server).await;
    }
}

/// Settings that contradict each other or the strategy are one line and exit code 2.
#[rstest]
#[case::locked(
    "locked", &["--payment-url", "http://127.0.0.1:1"],
    "PAYMENT_URL (--payment-url) is set, but lv4/locked does not support it: saga"
)]
#[case::a_hold_without_payment(
    "single-writer", &["--hold-ms", "5000"], "HOLD_MS (--hold-ms) is set, but PAYMENT_URL (--payment-url) is not"
)]
#[case::a_hold_that_ends_before_the_payment(
    "single-writer", &["--payment-url", "http://127.0.0.1:1", "--hold-ms", "2000"],
    "HOLD_MS (--hold-ms) is 2000, and PAYMENT_TIMEOUT_MS (--payment-timeout-ms) 2000"
)]
#[case::an_order_that_dies_before_the_payment(
    "single-writer", &["--payment-url", "http://127.0.0.1:1", "--order-ttl-ms", "1999"],
    "ORDER_TTL_MS (--order-ttl-ms) is 1999, and PAYMENT_TIMEOUT_MS (--payment-timeout-ms) 2000"
)]
fn settings_that_contradict_each_other_are_one_line(
    #[case] strategy: &str,
    #[case] flags: &[&str],
    #[case] line: &str,
) {
    let program = Command::new(env!("CARGO_BIN_EXE_lv4-kafka"))
        .args(["--strategy", strategy])
        .args(flags)
        .output()
        .unwrap();
    let printed = String::from_utf8(program.stderr).unwrap();
    assert_eq!(program.status.code(), Some(2), "{printed}");
    assert!(printed.contains(line) && printed.lines().count() == 1, "{printed}");
}
