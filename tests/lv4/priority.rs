//! Priority: the orders of named buyers are decided first, within a bound, and the others are not
//! starved (`ORDER_PRIORITY`).

use std::{num::NonZeroU32, time::Duration};

use box_office::{
    Improvements,
    Invariant::{self, Order},
    KafkaConfig, Priority, ProblemKind, Promises, points,
};
use futures_util::future::join_all;
use harness::{
    assert_after_fault, assert_failure_mode, contract,
    history::Answer,
    judge::Verdict,
    rush::{Program, Rush, SALE},
    test_server::TestServer,
    until,
};
use lv4_kafka::{
    LEVEL,
    pipeline::{PARTITIONS, list_dead_letters, orders_topic, replay, vips_topic},
};
use rdkafka::{
    admin::{AdminOptions, NewTopic, TopicReplication},
    consumer::Consumer,
};
use rstest::rstest;
use sqlx::{Postgres, Transaction};
use uuid::Uuid;

use super::{
    ablation::{
        Improvement::{Off, On},
        record,
    },
    contract::{KEEPS, program, strategy},
    fixture::{
        self,
        Expected::{self, Breaks, Kept},
        Fixture, LOST, OBSERVATION_TIME, OVERSOLD, TIMEOUT, happens_within, kill_instance, metric,
    },
    payments::PROGRAM,
};

/// VIPs for each other order that waits.
const WEIGHT: usize = 4;
const PRIORITY: (&str, &str) = ("ORDER_PRIORITY", "4");

/// What the variant promises: also the order of service, within each priority.
const KEEPS_THE_ORDER: Promises = KEEPS.keeps(&[Order]);

fn weight() -> Option<NonZeroU32> {
    NonZeroU32::new(WEIGHT as u32)
}

// ANCHOR: contract
/// The contract of every level, and the order of service with it, in a sale with VIPs.
#[rstest]
#[case::on_one(1, None)]
#[case::on_three(3, None)]
#[case::with_payments(3, Some("approve=80,decline=20"))]
#[tokio::test]
async fn a_sale_with_priority_keeps_its_guarantee(#[case] instances: usize, #[case] payments: Option<&str>) {
    let rush = Rush {
        vips: 100,
        payments: payments.map(|mix| Program::new(PROGRAM).argument("--behave").argument(mix)),
        improvements: Improvements {
            order_priority: weight(),
            ..Improvements::default()
        },
        ..Rush::for_strategy(strategy("single-writer")).instances(instances)
    };
    let report = contract(&program(), &LEVEL, "single-writer", rush, KEEPS_THE_ORDER).await;
    let not_checked = report.verdict.not_checked.iter();
    let not_checked: Vec<Invariant> = not_checked.map(|part| part.invariant).collect();
    assert!(!not_checked.contains(&Order), "{}", report.verdict);
    let decisions = report.history.decisions.unwrap_or_default();
    let vips = decisions
        .iter()
        .filter(|decision| decision.topic.ends_with("orders.vip"));
    assert_eq!(vips.count(), 200, "two clicks of each VIP");
}
// ANCHOR_END: contract

/// Sends an order for priority, which must be accepted.
async fn accept_vip(fixture: &Fixture, server: &TestServer, buyer: i64) -> Uuid {
    match fixture.history.reserve_as_vip(server, buyer).await {
        Answer::Accepted { reservation, .. } => reservation,
        other => panic!("VIP {buyer} is answered {other:?}"),
    }
}

/// Starts an instance with priority that accepts orders and decides none, and opens the sale with
/// these VIPs.
async fn acceptor(fixture: &Fixture, capacity: u32, vips: &[i64]) -> TestServer {
    let server = fixture.start_instance(&[PRIORITY, ("KAFKA_CONSUMERS", "0")]).await;
    server.create_rush_sale(capacity).await.unwrap();
    server.name_vips(vips).await.unwrap();
    server
}

/// The buyers of the mixed load: the others come first.
const OTHERS: std::ops::RangeInclusive<i64> = 1..=40;
const VIPS: std::ops::RangeInclusive<i64> = 41..=60;

/// Who comes before them: an order of each priority, and the one whose batch is held up meanwhile.
const EARLY: i64 = 101;
const EARLY_VIP: i64 = 102;
const HELD_UP: i64 = 103;

/// The tickets that are left for the mixed load.
const TICKETS: usize = 25;

/// What came of a mixed load.
struct Mixed {
    /// Whether each order of it was a VIP's, in the order of the decisions.
    decided: Vec<bool>,
    /// VIPs with a ticket.
    vips_with_ticket: usize,
    verdict: Verdict,
}

impl Mixed {
    /// For each VIP, the others that were decided before.
    fn others_before_vips(&self) -> Vec<usize> {
        self.before(true)
    }

    /// For each of the others, the VIPs that were decided before.
    fn vips_before_others(&self) -> Vec<usize> {
        self.before(false)
    }

    fn before(&self, vip: bool) -> Vec<usize> {
        let mut other = 0;
        let mut before = vec![];
        for &is_vip in &self.decided {
            if is_vip == vip {
                before.push(other);
            } else {
                other += 1;
            }
        }
        before
    }

    fn is_within_the_bound_for_vips(&self) -> bool {
        let mut before = self.others_before_vips().into_iter().enumerate();
        before.all(|(vips_before, others)| others <= vips_before / WEIGHT)
    }

    fn is_within_the_bound_for_others(&self) -> bool {
        let mut before = self.vips_before_others().into_iter().enumerate();
        before.all(|(others_before, vips)| vips <= WEIGHT * (others_before + 1))
    }
}

/// Locks the offsets, so that no batch can be written.
async fn hold_offsets(fixture: &Fixture) -> Transaction<'static, Postgres> {
    let pool = fixture.environment.database().pool(1).await.unwrap();
    let mut tx = pool.begin().await.unwrap();
    sqlx::query("select from partition_offset for update")
        .execute(&mut *tx)
        .await
        .unwrap();
    tx
}

/// The others order, then the VIPs, and all of them wait: the batch before them is held up. Without
/// priority VIPs order as anybody does.
async fn mixed_load(name: &str, has_priority: bool) -> Mixed {
    let mut fixture = Fixture::new(name).await;
    if has_priority {
        fixture = fixture.with_priority();
    }
    let settings = if has_priority { &[PRIORITY][..] } else { &[] };
    let acceptor = fixture
        .start_instance(&[&[("KAFKA_CONSUMERS", "0")][..], settings].concat())
        .await;
    acceptor.create_rush_sale(TICKETS as u32 + 3).await.unwrap();
    if has_priority {
        let vips: Vec<i64> = VIPS.chain([EARLY_VIP]).collect();
        acceptor.name_vips(&vips).await.unwrap();
    }
    let order = async |buyer: i64| match has_priority && (VIPS.contains(&buyer) || buyer == EARLY_VIP) {
        true => accept_vip(&fixture, &acceptor, buyer).await,
        false => fixture.accept(&acceptor, buyer).await,
    };
    let consumer = fixture.start_instance(settings).await;
    // Both topics are being read.
    order(EARLY).await;
    order(EARLY_VIP).await;
    fixture.wait_until_processed().await;

    let held = hold_offsets(&fixture).await;
    order(HELD_UP).await;
    until("a batch is held up", async || fixture.lock_waits().await > 0).await;
    join_all(OTHERS.map(&order)).await;
    let vips = join_all(VIPS.map(&order)).await;
    for &id in &vips {
        let state = acceptor.get(&format!("/api/reservations/{id}")).await.unwrap();
        let state: box_office::api::Reservation = state.json().unwrap();
        assert_eq!(state.status, "accepted", "the fault did not strike: a VIP is decided");
    }
    held.rollback().await.unwrap();
    fixture.wait_until_processed().await;

    let decided: Vec<(i64, String)> = sqlx::query_as(
        "select buyer_id, reservation.status
           from outbox
           join reservation on reservation.id = reservation_id
          order by number",
    )
    .fetch_all(&fixture.pool)
    .await
    .unwrap();
    let is_vip = |buyer: &i64| VIPS.contains(buyer);
    let with_ticket = decided
        .iter()
        .filter(|(buyer, status)| is_vip(buyer) && status == "confirmed");
    let of_load = decided
        .iter()
        .filter(|(buyer, _)| OTHERS.contains(buyer) || is_vip(buyer));
    let counted = metric(&consumer, "oversold_orders_decided_total").await;
    assert_eq!(counted, has_priority.then_some(decided.len() as i64), "the metric");
    let mixed = Mixed {
        decided: of_load.map(|(buyer, _)| is_vip(buyer)).collect(),
        vips_with_ticket: with_ticket.count(),
        verdict: fixture.verdict(&acceptor, TIMEOUT).await,
    };
    let order: String = mixed.decided.iter().map(|&vip| if vip { 'V' } else { '.' }).collect();
    println!("{name}, priority {has_priority}: {order}");
    for server in [acceptor, consumer] {
        server.stop().await.unwrap();
    }
    mixed
}

// ANCHOR: ablation
/// The ablation: the same load without priority and with it. What counts is the order of the
/// decisions, and not the time that they took.
#[tokio::test]
async fn vips_are_decided_first_and_the_others_are_not_starved() {
    let off = mixed_load("single-writer", false).await;
    assert_eq!(
        off.others_before_vips(),
        [OTHERS.count(); 20],
        "the fault did not strike"
    );
    assert_eq!(off.vips_with_ticket, 0);

    let on = mixed_load("single-writer", true).await;
    assert!(on.is_within_the_bound_for_vips(), "{:?}", on.others_before_vips());
    assert!(on.is_within_the_bound_for_others(), "{:?}", on.vips_before_others());
    assert_eq!(on.vips_with_ticket, 20);
    for (improvement, mixed) in [(Off, &off), (On, &on)] {
        let (before, vips) = (mixed.others_before_vips(), VIPS.count());
        let last = before.last().unwrap();
        record(
            "priority",
            improvement,
            "single-writer",
            format!(
                "the last VIP waits for {last} of 40; {} of {vips} get a ticket",
                mixed.vips_with_ticket
            ),
        );
        assert_after_fault(strategy("single-writer"), &mixed.verdict, &[]);
    }
}
// ANCHOR_END: ablation

/// VIPs who come faster than they are decided would keep everybody else waiting for ever.
#[tokio::test]
async fn a_mixed_load_catches_vips_that_are_drained_first() {
    let mixed = mixed_load("mutants/vips-without-bound", true).await;
    assert!(
        !mixed.is_within_the_bound_for_others(),
        "the mutant was not caught: {:?}",
        mixed.vips_before_others()
    );
    assert_failure_mode(strategy("mutants/vips-without-bound"), &[]);
}

/// The judge reads the order of service from the record of offsets.
#[tokio::test]
async fn a_mixed_load_catches_a_batch_that_is_decided_from_its_end() {
    let mixed = mixed_load("mutants/newest-first", true).await;
    assert_after_fault(strategy("mutants/newest-first"), &mixed.verdict, &[Order]);
}

/// A VIP is who is named, in the sale in which they are, and nobody else, whatever the request says.
#[rstest]
#[case::single_writer("single-writer", true)]
#[case::mutant("mutants/vip-by-request", false)]
#[tokio::test]
async fn only_a_buyer_whom_the_admin_has_named_is_a_vip(#[case] name: &str, #[case] keeps: bool) {
    let fixture = Fixture::new(name).await.with_priority();
    let server = acceptor(&fixture, 10, &[]).await;
    let ask = async |sale, key| server.reserve_with(Priority::Vip, sale, 1, Some(key)).await.unwrap();
    let refused = ask(SALE, "before").await;
    if !keeps {
        assert_eq!(refused.status, 202, "the mutant was not caught");
        assert_failure_mode(fixture.strategy, &[]);
        kill_instance(&server).await;
        return;
    }
    refused.is(ProblemKind::NotVip).unwrap();
    assert_eq!(fixture.lag().await, 0, "it was refused, and is a message");

    server.create_sale(2, 10).await.unwrap();
    for _ in 0..2 {
        server.name_vips(&[1, 2, 2]).await.unwrap();
    }
    assert_eq!(ask(SALE, "after").await.status, 202, "the buyer is named");
    ask(2, "elsewhere").await.is(ProblemKind::NotVip).unwrap();
    ask(99, "nowhere").await.is(ProblemKind::UnknownSale).unwrap();
    server.stop().await.unwrap();
}

/// Without the setting priority is refused and not ignored, and nothing is added: no topic, no
/// record, no metric.
#[tokio::test]
async fn without_the_setting_nothing_is_added_and_priority_is_refused() {
    let fixture = Fixture::new("single-writer").await;
    let server = fixture.start_instance(&[]).await;
    server.create_rush_sale(2).await.unwrap();
    let refused = server.reserve_with(Priority::Vip, SALE, 1, None).await.unwrap();
    refused.is(ProblemKind::NoPriority).unwrap();
    let why = server.name_vips(&[1]).await.unwrap_err().to_string();
    assert!(why.contains("no-priority"), "{why}");
    let orders = fixture.accept_all(&server, 1..=3).await;
    fixture.wait_until_processed().await;

    let recorded: i64 = sqlx::query_scalar("select count(*) from decision")
        .fetch_one(&fixture.pool)
        .await
        .unwrap();
    let topic = vips_topic(&fixture.kafka());
    let described = fixture.query_broker(move |client| {
        let described = client.fetch_metadata(Some(&topic), TIMEOUT).unwrap();
        described.topics()[0].error().is_none()
    });
    assert_eq!((recorded, described.await), (0, false));
    assert_eq!(metric(&server, "oversold_vip_consumer_lag").await, None);
    fixture.assert_outcome(&server, &orders, Kept).await;
    server.stop().await.unwrap();
}

// ANCHOR: fence
/// A consumer is frozen with a VIP's order for the last ticket, and its partitions are given to an
/// instance that reads no VIPs. That one sells the ticket to somebody else. The offset of the VIP
/// topic is what it was.
#[rstest]
#[case::single_writer("single-writer", Kept)]
#[case::fenced_alone("mutants/vips-fenced-alone", OVERSOLD)]
#[tokio::test]
async fn a_batch_of_vips_that_comes_too_late_writes_nothing(#[case] name: &str, #[case] expected: Expected) {
    let fixture = Fixture::new(name).await.with_priority().with_short_session();
    let acceptor = acceptor(&fixture, 1, &[1]).await;
    let mut orders = vec![accept_vip(&fixture, &acceptor, 1).await];
    let stop = format!("{}#1", points::BATCH_DECIDED);
    let first = fixture.start_instance(&[PRIORITY, ("OVERSOLD_STOP_AT", &stop)]).await;
    first
        .wait_until_stopped(TIMEOUT)
        .await
        .expect("the fault did not strike");
    orders.push(fixture.accept(&acceptor, 2).await);
    let second = fixture.start_instance(&[]).await;
    until("the other consumer has decided", async || fixture.rows().await == 1).await;

    first.resume().await.unwrap();
    // The VIP is decided by whoever reads that topic: the first, once it is alone again.
    second.stop().await.unwrap();
    fixture.wait_until_processed().await;
    fixture.assert_outcome(&first, &orders, expected).await;
    for server in [first, acceptor] {
        server.stop().await.unwrap();
    }
}
// ANCHOR_END: fence

/// Sells the last ticket to a VIP whose order is the next of its topic, as a consumer does that takes
/// over the partition: in one transaction, which moves the offset of that topic only.
async fn sell_last_ticket(fixture: &Fixture, order: Uuid, vip: i64) {
    let mut tx = fixture.pool.begin().await.unwrap();
    let recorded = sqlx::query(
        "with moved as (
            update partition_offset
               set next_offset = next_offset + 1
             where topic = $2
         returning topic, partition, next_offset - 1 as log_offset
         )
         insert into decision (reservation_id, topic, partition, log_offset)
            select $1, topic, partition, log_offset
              from moved",
    )
    .bind(order)
    .bind(vips_topic(&fixture.kafka()))
    .execute(&mut *tx)
    .await
    .unwrap();
    assert_eq!(recorded.rows_affected(), 1, "the fault did not strike");
    let sold = sqlx::query("update sale set stock = 0 where stock = 1")
        .execute(&mut *tx)
        .await
        .unwrap();
    assert_eq!(sold.rows_affected(), 1, "the fault did not strike");
    sqlx::query("insert into reservation (id, sale_id, buyer_id, request_key) values ($1, $2, $3, $4)")
        .bind(order)
        .bind(SALE)
        .bind(vip)
        .bind(fixture::order(SALE, vip).key.as_str())
        .execute(&mut *tx)
        .await
        .unwrap();
    sqlx::query("insert into outbox (reservation_id) values ($1)")
        .bind(order)
        .execute(&mut *tx)
        .await
        .unwrap();
    tx.commit().await.unwrap();
}

/// The other way round: a consumer is frozen with somebody else's order for the last ticket, and the
/// ticket is sold to a VIP. The offset of the orders topic is what it was. (The test plays the
/// successor: an instance would read the order that waits as well, and move both offsets.)
#[rstest]
#[case::single_writer("single-writer", Kept)]
#[case::orders_fenced_alone("mutants/orders-fenced-alone", OVERSOLD)]
#[tokio::test]
async fn a_batch_without_vips_that_comes_too_late_writes_nothing(#[case] name: &str, #[case] expected: Expected) {
    let fixture = Fixture::new(name).await.with_priority();
    let acceptor = acceptor(&fixture, 1, &[1]).await;
    let mut orders = vec![fixture.accept(&acceptor, 2).await];
    let stop = format!("{}#1", points::BATCH_DECIDED);
    let consumer = fixture.start_instance(&[PRIORITY, ("OVERSOLD_STOP_AT", &stop)]).await;
    consumer
        .wait_until_stopped(TIMEOUT)
        .await
        .expect("the fault did not strike");
    orders.push(accept_vip(&fixture, &acceptor, 1).await);
    sell_last_ticket(&fixture, orders[1], 1).await;
    assert_eq!(
        fixture.rows().await,
        1,
        "the fault did not strike: its batch is committed"
    );

    consumer.resume().await.unwrap();
    fixture.wait_until_processed().await;
    fixture.assert_outcome(&consumer, &orders, expected).await;
    for server in [consumer, acceptor] {
        server.stop().await.unwrap();
    }
}

/// The offsets of the two topics are compared with one row: no batch with other orders fits. (One of
/// VIPs alone does: its comparison is the last.)
#[tokio::test]
async fn an_order_catches_offsets_that_are_kept_by_the_number_of_the_partition_only() {
    let fixture = Fixture::new("mutants/offset-of-both-topics").await.with_priority();
    let acceptor = acceptor(&fixture, 5, &[1]).await;
    let orders = fixture.accept_all(&acceptor, 1..=2).await;
    let consumer = fixture.start_instance(&[PRIORITY, ("WORK_MS", "50")]).await;
    fixture.wait_for_attempts(3).await;
    fixture.assert_outcome(&acceptor, &orders, LOST).await;
    for server in [consumer, acceptor] {
        kill_instance(&server).await;
    }
}

/// A consumer is killed with orders of both priorities in flight, or written and not committed.
#[rstest]
#[case::before_the_commit(points::ROWS_WRITTEN)]
#[case::before_the_offsets("committed")]
#[tokio::test]
async fn orders_of_both_priorities_survive_a_killed_consumer(#[case] point: &str) {
    let fixture = Fixture::new("single-writer").await.with_priority().with_short_session();
    let acceptor = acceptor(&fixture, 3, &[1, 2]).await;
    let mut orders = fixture.accept_all(&acceptor, 3..=4).await;
    for vip in 1..=2 {
        orders.push(accept_vip(&fixture, &acceptor, vip).await);
    }
    let stop = format!("{point}#1");
    let first = fixture.start_instance(&[PRIORITY, ("OVERSOLD_STOP_AT", &stop)]).await;
    first
        .wait_until_stopped(TIMEOUT)
        .await
        .expect("the fault did not strike");
    kill_instance(&first).await;
    let second = fixture.start_instance(&[PRIORITY]).await;
    fixture.wait_until_processed().await;

    fixture.assert_outcome(&second, &orders, Kept).await;
    for server in [second, acceptor] {
        server.stop().await.unwrap();
    }
}

/// Instances join and leave while orders of both priorities arrive: the VIP partitions go with the
/// others, and each order is decided once, in turn.
#[tokio::test]
async fn vip_partitions_follow_the_others_when_instances_join_and_leave() {
    /// VIPs. Once they all have ordered, nobody else comes.
    const NAMED: i64 = 5000;

    let fixture = Fixture::new("single-writer").await.with_priority();
    let acceptor = acceptor(&fixture, 50, &(1..=NAMED).collect::<Vec<_>>()).await;
    let all_have_come = std::sync::atomic::AtomicBool::new(false);
    let done = || all_have_come.load(std::sync::atomic::Ordering::Relaxed);
    let buyers = async {
        let mut orders = vec![];
        for buyer in 1.. {
            if done() {
                break;
            }
            if buyer > NAMED {
                tokio::time::sleep(Duration::from_millis(10)).await;
                continue;
            }
            orders.push(accept_vip(&fixture, &acceptor, buyer).await);
            orders.push(fixture.accept(&acceptor, 10_000 + buyer).await);
        }
        orders
    };
    let instances = async {
        let first = fixture.start_instance(&[PRIORITY]).await;
        until("some are decided", async || fixture.rows().await > 0).await;
        let second = fixture.start_instance(&[PRIORITY]).await;
        fixture.wait_until_shared_by(2).await;
        first.stop().await.unwrap();
        fixture.wait_until_shared_by(1).await;
        let third = fixture.start_instance(&[PRIORITY]).await;
        fixture.wait_until_shared_by(2).await;
        second.stop().await.unwrap();
        fixture.wait_until_shared_by(1).await;
        all_have_come.store(true, std::sync::atomic::Ordering::Relaxed);
        third
    };
    let (orders, third) = tokio::join!(buyers, instances);
    fixture.wait_until_processed().await;
    fixture.assert_outcome(&third, &orders, Kept).await;
    for server in [third, acceptor] {
        server.stop().await.unwrap();
    }
}

/// A partition changes hands, and its new owner is frozen with a VIP's order. The former owner must not
/// read it any more.
#[rstest]
#[case::single_writer("single-writer", Kept)]
#[case::vips_never_revoked("mutants/vips-never-revoked", Breaks(&[]))]
#[tokio::test]
async fn vips_of_a_partition_that_was_revoked_are_left_to_its_new_owner(
    #[case] name: &str,
    #[case] expected: Expected,
) {
    let fixture = Fixture::new(name).await.with_priority();
    let acceptor = acceptor(&fixture, 1, &[1]).await;
    let former = fixture.start_instance(&[PRIORITY]).await;
    let before = fixture.group_members().await;
    let owner = fixture
        .start_instance(&[PRIORITY, ("OVERSOLD_STOP_AT", "batch taken#1")])
        .await;
    fixture.wait_until_shared_by(2).await;
    let mut members = fixture.group_members().await;
    members.retain(|member, _| !before.contains_key(member));
    let moved = members.into_values().flatten().next();
    let moved = moved.expect("the fault did not strike: no partition has changed hands");

    let ids = fixture.ids().await;
    let order = fixture.append_vip_order(&ids, moved, 1).await;
    owner
        .wait_until_stopped(TIMEOUT)
        .await
        .expect("the new owner does not read the VIPs of its partitions");
    let decides = happens_within(OBSERVATION_TIME, async || fixture.rows().await > 0).await;
    match expected {
        Kept => assert!(!decides, "the former owner has decided it"),
        Breaks(_) => {
            assert!(decides, "the mistake of {name} was not seen");
            assert_failure_mode(fixture.strategy, &[]);
        }
    }
    owner.resume().await.unwrap();
    fixture.wait_until_processed().await;
    if expected == Kept {
        fixture.assert_outcome(&owner, &[order], Kept).await;
    }
    for server in [former, owner, acceptor] {
        server.stop().await.unwrap();
    }
}

/// Poison of both topics has places of its own, and goes back to where it came from.
#[tokio::test]
async fn dead_letters_of_vips_are_replayed_as_vips() {
    let fixture = Fixture::new("single-writer").await.with_priority();
    let acceptor = acceptor(&fixture, 5, &[1]).await;
    let kafka: KafkaConfig = fixture.kafka();
    let (orders, vips) = (orders_topic(&kafka), vips_topic(&kafka));
    for (topic, payload) in [(&orders, b"of anybody".as_slice()), (&vips, b"of a VIP")] {
        fixture.produce_to(topic, 3, &[payload]).await.unwrap();
    }
    let consumer = fixture.start_instance(&[PRIORITY]).await;
    fixture.wait_until_processed().await;
    let list = async || {
        let kafka = kafka.clone();
        let listed = tokio::task::spawn_blocking(move || list_dead_letters(&kafka, TIMEOUT));
        let listed = listed.await.unwrap().unwrap().into_iter();
        let mut origins: Vec<String> = listed.map(|dead_letter| dead_letter.origin).collect();
        origins.sort_unstable();
        origins
    };
    let origins = [format!("{vips}/3/0"), format!("{orders}/3/0")];
    assert_eq!(list().await, origins);

    replay(&kafka, &format!("{vips}/3/0"), TIMEOUT).await.unwrap();
    fixture.wait_until_processed().await;
    let listed = list().await;
    assert_eq!(
        (listed.len(), &listed[1]),
        (2, &origins[1]),
        "it is poison still: {listed:?}"
    );
    assert!(listed[0].starts_with(&vips) && listed[0] != origins[0], "{listed:?}");
    for server in [consumer, acceptor] {
        server.stop().await.unwrap();
    }
}

/// A server with priority accepts nothing that it cannot get decided: also no order of anybody else.
#[tokio::test]
async fn without_its_vip_topic_a_server_is_not_ready() {
    let fixture = Fixture::new("single-writer").await.with_priority();
    let server = fixture.start_instance(&[PRIORITY]).await;
    server.create_rush_sale(5).await.unwrap();
    let topic = vips_topic(&fixture.kafka());
    let (admin, options) = (fixture.admin(), AdminOptions::new());
    let unready = async || {
        let answer = server.get("/readyz").await.unwrap();
        String::from_utf8_lossy(&answer.body).into_owned()
    };
    let deleted = admin.delete_topics(&[&topic], &options).await.unwrap();
    assert_eq!(deleted, [Ok(topic.clone())], "the fault did not strike");
    until("the server says why it is not ready", async || {
        unready().await.contains("orders.vip")
    })
    .await;
    until("no order is accepted", async || {
        server.reserve(SALE, 1, None).await.unwrap().status == 503
    })
    .await;

    let again = NewTopic::new(&topic, PARTITIONS, TopicReplication::Fixed(1));
    until("the topic is made again", async || {
        admin.create_topics([&again], &options).await.unwrap()[0].is_ok()
    })
    .await;
    until("the server is ready again", async || unready().await == "ready\n").await;
    let order = fixture.accept(&server, 2).await;
    assert_eq!(server.final_state(order).await.unwrap().status, "confirmed");
    server.stop().await.unwrap();
}

/// Both priorities wait out an outage of Postgres, paused, and are decided after it.
#[tokio::test]
async fn a_circuit_breaker_pauses_both_priorities() {
    let strategy = strategy("single-writer");
    let (redis, kafka) = (
        harness::backends::redis().await.unwrap(),
        harness::backends::kafka().await.unwrap(),
    );
    let postgres = harness::backends::Postgres::private(harness::backends::Durability::Fast)
        .await
        .unwrap();
    let fixture = Fixture::on(strategy, &postgres, &redis, &kafka).await.with_priority();
    let settings = [PRIORITY, ("CIRCUIT_BREAKER", "true")];
    let server = fixture.start_instance(&settings).await;
    server.create_rush_sale(5).await.unwrap();
    server.name_vips(&[1, 2]).await.unwrap();
    let mut orders = vec![accept_vip(&fixture, &server, 1).await, fixture.accept(&server, 3).await];
    fixture.wait_until_processed().await;
    let ids = fixture.ids().await;

    postgres.stop().await.unwrap();
    orders.push(fixture.append_order(&ids, 4).await);
    orders.push(fixture.append_vip_order(&ids, 0, 2).await);
    until("the consumer pauses", async || {
        metric(&server, "oversold_circuit_breaker_transitions_total").await > Some(0)
    })
    .await;
    postgres.start().await.unwrap();
    fixture.wait_until_processed().await;
    assert_eq!(fixture.dead_letter_topic_size().await, 0);
    fixture.assert_outcome(&server, &orders, Kept).await;
    server.stop().await.unwrap();
}
