//! Message TTL: an order that is decided too late takes no ticket and says so, and none is accepted
//! that would be.

use std::time::Duration;

use box_office::{
    Invariant::{Conservation, NoFalseRefusal, NoUndersell},
    ProblemKind,
};
use harness::{
    assert_after_fault, assert_failure_mode,
    rush::{SALE, retry_after},
    test_server::TestServer,
    until,
};
use rstest::rstest;
use uuid::Uuid;

use crate::{
    ablation::{
        Improvement::{Off, On},
        record,
    },
    fixture::{
        Breaks, Expected, Fixture, Kept, LOST, OBSERVATION_TIME, TIMEOUT, happens_within, kill_instance, metric,
    },
};

/// The time to live in these tests: far longer than an order takes to be decided.
const TTL: Duration = TIMEOUT;
const TTL_MS: &str = "20000";

/// The age of the orders that are too old.
const OLD: Duration = Duration::from_secs(40);

/// Buyers whose orders are too old, and those whose orders have just been accepted.
const OLD_BUYERS: std::ops::RangeInclusive<i64> = 1..=5;
const NEW_BUYERS: std::ops::RangeInclusive<i64> = 6..=10;

/// A sale beside [`SALE`].
const OTHER: i64 = 2;

/// One more than there are new orders: every "sold out" is false.
const TICKETS: u32 = 6;

/// How the orders ended.
#[derive(Debug, PartialEq, Eq)]
struct Endings {
    old: Vec<String>,
    new: Vec<String>,
}

impl Endings {
    /// The number of tickets that were sold to orders which were too old.
    fn sold_too_late(&self) -> usize {
        self.old.iter().filter(|status| *status == "confirmed").count()
    }
}

async fn statuses(server: &TestServer, orders: &[Uuid]) -> Vec<String> {
    let mut statuses = vec![];
    for id in orders {
        let state: box_office::api::Reservation = server
            .get(&format!("/api/reservations/{id}"))
            .await
            .unwrap()
            .json()
            .unwrap();
        statuses.push(state.status);
    }
    statuses
}

/// Orders wait in the topic, the first of them for longer than the TTL, when a consumer starts.
async fn decided_after_a_wait(name: &str, settings: &[(&'static str, &str)], expected: Expected) -> Endings {
    let fixture = Fixture::new(name).await.with_expiry(TTL);
    let acceptor = fixture.start_acceptor(TICKETS).await;
    let ids = fixture.ids().await;
    let (mut old, mut new) = (vec![], vec![]);
    for buyer in OLD_BUYERS {
        old.push(fixture.append_order_of_age(&ids, buyer, OLD).await);
    }
    for buyer in NEW_BUYERS {
        new.push(fixture.append_order_of_age(&ids, buyer, Duration::ZERO).await);
    }
    kill_instance(&acceptor).await;

    let server = fixture.start_instance(settings).await;
    fixture.wait_until_processed().await;
    let endings = Endings {
        old: statuses(&server, &old).await,
        new: statuses(&server, &new).await,
    };
    println!("{name} {settings:?}: {endings:?}");
    let expired = endings.old.iter().filter(|status| *status == "expired").count() as i64;
    if expected == Kept {
        assert_eq!(
            metric(&server, "oversold_orders_expired_total").await.unwrap_or(0),
            expired
        );
    }
    assert_eq!(
        fixture.dead_letter_topic_size().await,
        0,
        "an expired order is no dead letter"
    );
    fixture.assert_outcome(&server, &[old, new].concat(), expected).await;
    server.stop().await.unwrap();
    endings
}

// ANCHOR: ablation
/// The ablation: without the TTL the tickets go to whoever has waited longest, though they may have
/// left long ago. With it they go to those who still wait, and the others are told.
#[rstest]
#[case::locked("locked")]
#[case::single_writer("single-writer")]
#[tokio::test]
async fn an_order_past_its_ttl_takes_no_ticket_and_says_so(#[case] name: &str) {
    let off = decided_after_a_wait(name, &[], Kept).await;
    // `locked` decides four at a time, in any order.
    assert!(off.sold_too_late() >= 2, "the fault did not strike: {off:?}");

    let on = decided_after_a_wait(name, &[("ORDER_TTL_MS", TTL_MS)], Kept).await;
    assert_eq!(on.sold_too_late(), 0);
    assert_eq!(on.old, ["expired"; 5]);
    assert_eq!(on.new, ["confirmed"; 5]);
    for (improvement, endings) in [(Off, &off), (On, &on)] {
        let late = endings.sold_too_late();
        record(
            "ttl",
            improvement,
            name,
            format!("{late} of 5 old orders sold a ticket"),
        );
    }
}
// ANCHOR_END: ablation

/// Mutants of the TTL that the same wait catches.
#[rstest]
#[case::takes_a_ticket("mutants/expired-takes-a-ticket", Breaks(&[Conservation]))]
#[case::without_event("mutants/expired-without-event", LOST)]
#[case::told_that_it_is_sold_out("mutants/expired-is-sold-out", Breaks(&[NoFalseRefusal, NoUndersell]))]
#[tokio::test]
async fn a_wait_beyond_the_ttl_catches_it(#[case] name: &str, #[case] expected: Expected) {
    let endings = decided_after_a_wait(name, &[("ORDER_TTL_MS", TTL_MS)], expected).await;
    assert_eq!(endings.sold_too_late(), 0, "it has another mistake: {endings:?}");
}

/// An order is young when it is accepted: it is the queue that makes it old.
#[tokio::test]
async fn a_wait_beyond_the_ttl_catches_a_ttl_that_is_checked_at_produce_only() {
    let endings = decided_after_a_wait("mutants/ttl-at-produce-only", &[("ORDER_TTL_MS", TTL_MS)], Kept).await;
    assert_eq!(endings.sold_too_late(), 5, "the mutant was not caught: {endings:?}");
    assert_failure_mode(crate::fixture::strategy("mutants/ttl-at-produce-only"), &[]);
}

/// An order is decided once: a message that is redelivered, or repeated by the buyer, when the other
/// is old or when it is not, changes nothing.
#[rstest]
#[case::locked("locked", Kept)]
#[case::single_writer("single-writer", Kept)]
#[case::mutant("mutants/expired-before-deduplicated", Breaks(&[]))]
#[tokio::test]
async fn an_order_that_is_decided_does_not_expire_and_an_expired_one_stays_expired(
    #[case] name: &str,
    #[case] expected: Expected,
) {
    let fixture = Fixture::new(name).await.with_expiry(TTL);
    let server = fixture.start_instance(&[("ORDER_TTL_MS", TTL_MS)]).await;
    server.create_rush_sale(TICKETS).await.unwrap();
    let ids = fixture.ids().await;
    let expired = fixture.append_order_of_age(&ids, 1, OLD).await;
    let confirmed = fixture.append_order_of_age(&ids, 2, Duration::ZERO).await;
    fixture.wait_until_processed().await;
    fixture.history.record_outcomes(&server, TIMEOUT).await.unwrap();
    assert_eq!(statuses(&server, &[expired, confirmed]).await, ["expired", "confirmed"]);

    fixture.append_order_of_age(&ids, 1, Duration::ZERO).await;
    fixture.append_order_of_age(&ids, 2, OLD).await;
    fixture.wait_until_processed().await;
    if expected == Kept {
        assert_eq!(statuses(&server, &[expired, confirmed]).await, ["expired", "confirmed"]);
    }
    fixture.assert_outcome(&server, &[expired, confirmed], expected).await;
    server.stop().await.unwrap();
}

/// Nobody decides orders: as soon as that has lasted for the TTL, no order is accepted which would
/// expire. Once they are decided again, orders are.
#[rstest]
#[case::locked("locked", true)]
#[case::single_writer("single-writer", true)]
#[case::mutant("mutants/backlog-not-checked", false)]
#[tokio::test]
async fn while_nothing_is_decided_no_order_is_accepted_that_would_expire(#[case] name: &str, #[case] keeps: bool) {
    let fixture = Fixture::new(name).await.with_expiry(Duration::from_millis(500));
    let acceptor = fixture
        .start_instance(&[("ORDER_TTL_MS", "500"), ("KAFKA_CONSUMERS", "0")])
        .await;
    acceptor.create_rush_sale(100).await.unwrap();
    let order = fixture.accept(&acceptor, 1).await;
    let reserve = async |buyer: i64| {
        acceptor
            .reserve(SALE, buyer, Some(&format!("buyer-{buyer}")))
            .await
            .unwrap()
    };
    let within = if keeps { TIMEOUT } else { OBSERVATION_TIME };
    let refused = happens_within(within, async || reserve(2).await.status == 503).await;
    assert_eq!(refused, keeps, "{name}");
    if !keeps {
        assert_failure_mode(fixture.strategy, &[]);
        kill_instance(&acceptor).await;
        return;
    }
    let refused = reserve(2).await;
    refused.is(ProblemKind::Backlogged).unwrap();
    assert!(retry_after(&refused.headers).is_some_and(|pause| pause >= Duration::from_secs(1)));

    // Where the orders of another sale are, this instance learns from the first that it accepts.
    acceptor.create_sale(OTHER, 100).await.unwrap();
    let other = acceptor.reserve(OTHER, 1, Some("buyer-1")).await.unwrap();
    if name == "locked" {
        other.is(ProblemKind::Backlogged).unwrap(); // it may come behind the one that waits
    } else {
        assert_eq!(other.status, 202);
    }

    let consumer = fixture.start_instance(&[("ORDER_TTL_MS", "500")]).await;
    fixture.wait_until_processed().await;
    until("an order is accepted again", async || reserve(3).await.status == 202).await;
    assert_eq!(consumer.final_state(order).await.unwrap().status, "expired");
    for server in [acceptor, consumer] {
        server.stop().await.unwrap();
    }
}

/// The ablation: consumers that are slower than the orders come. Without backpressure all orders are
/// accepted, whatever becomes of them.
#[tokio::test]
async fn a_backlog_longer_than_the_ttl_is_not_added_to() {
    let fixture = Fixture::new("locked").await.with_expiry(Duration::from_millis(1000));
    // At most 20 orders a second.
    let server = fixture
        .start_instance(&[("ORDER_TTL_MS", "1000"), ("WORK_MS", "50")])
        .await;
    let blind = fixture.start_instance(&[("KAFKA_CONSUMERS", "0")]).await;
    server.create_rush_sale(10_000).await.unwrap();
    let mut buyer = 0;
    until("the backlog is longer than the TTL", async || {
        buyer += 1;
        let order = fixture.history.reserve(&server, buyer);
        matches!(order.await, harness::history::Answer::Indeterminate)
    })
    .await;
    // A server without the setting accepts all the same.
    fixture.accept(&blind, buyer + 1).await;
    fixture.wait_until_processed().await;
    until("an order is accepted again", async || {
        let order = fixture.history.reserve(&server, buyer);
        matches!(order.await, harness::history::Answer::Accepted { .. })
    })
    .await;
    fixture.wait_until_processed().await;
    assert_after_fault(fixture.strategy, &fixture.verdict(&server, TIMEOUT).await, &[]);
    for server in [server, blind] {
        server.stop().await.unwrap();
    }
}
