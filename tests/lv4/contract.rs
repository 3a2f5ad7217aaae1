//! LV.4: the contract kept by orders that are accepted first and decided later, on any number of
//! instances.

use std::{
    sync::atomic::{AtomicU64, Ordering::Relaxed},
    time::Duration,
};

use box_office::{
    Invariant::{self, Conservation, NoDuplicate, NoOversell, NothingLost, OneAnswer, Progress},
    KafkaConfig, Level, Promises, Strategy, points,
};
use harness::{
    contract,
    judge::Conclusion,
    required,
    rush::{Program, Rush},
    shared_tests::{http_contract, instance_faults, slow_clients},
    until,
};
use lv4_kafka::{LEVEL, pipeline::lag};
use rstest::rstest;

use super::fixture::{Expected::Kept, Fixture, TIMEOUT};

pub(crate) fn program() -> Program {
    Program::new(env!("CARGO_BIN_EXE_lv4-kafka"))
}

/// With a short session and lease: a dead instance is expelled from the group, and its lock
/// expires, soon.
fn program_with_short_timeouts() -> Program {
    program()
        .variable("KAFKA_SESSION_MS", "1000")
        .variable("LOCK_LEASE_MS", "2000")
}

/// The same for a rush in which instances are killed or restarted: accepted orders stay in flight
/// for some time.
fn program_for_instance_faults(name: &str) -> Program {
    let program = program_with_short_timeouts();
    match name {
        // It would process the whole rush within milliseconds, in two batches. Each takes this
        // long.
        "single-writer" => program.variable("WORK_MS", "200"),
        _ => program,
    }
}

pub(crate) fn strategy(name: &str) -> &'static Strategy {
    LEVEL
        .strategy(name)
        .unwrap_or_else(|| panic!("LV.4 has no strategy {name}"))
}

pub(crate) const KEEPS: Promises = Promises::ALL_KEPT;
pub(crate) const OVERSELLS: Promises = Promises::ALL_KEPT
    .breaks(&[NoOversell, Conservation])
    .leaves_open(&[NoDuplicate, OneAnswer]);

const SEVERAL_WRITERS: Promises = Promises::ALL_KEPT.breaks(&[NoOversell, Conservation]);

// ANCHOR: contract
#[rstest]
// ANCHOR: locked-cases
#[case::locked("locked", 1, KEEPS)]
#[case::locked_on_three("locked", 3, KEEPS)]
// ANCHOR_END: locked-cases
// ANCHOR: single-writer-cases
#[case::single_writer("single-writer", 1, KEEPS)]
#[case::single_writer_on_three("single-writer", 3, KEEPS)]
// ANCHOR_END: single-writer-cases
#[tokio::test]
async fn a_sale_keeps_its_guarantee(#[case] name: &str, #[case] instances: usize, #[case] expected: Promises) {
    let rush = Rush::for_strategy(strategy(name)).instances(instances);
    contract(&program(), &LEVEL, name, rush, expected).await;
}
// ANCHOR_END: contract

/// Every instance that has orders of the sale is stopped when it has decided its first batch: each
/// has read the stock before any has written it. Then they go on.
#[rstest]
#[case::partition_by_buyer("mutants/partition-by-buyer", 3, SEVERAL_WRITERS)]
#[case::partition_by_buyer_alone("mutants/partition-by-buyer", 1, KEEPS)]
#[case::single_writer_on_three("single-writer", 3, KEEPS)]
#[tokio::test]
async fn a_sale_keeps_its_guarantee_when_batches_overlap(
    #[case] name: &str,
    #[case] instances: usize,
    #[case] expected: Promises,
) {
    /// So many that with any key but the sale's the orders are spread over all instances.
    const BUYERS: i64 = 24;

    assert_eq!(strategy(name).guarantee.on(instances), expected);
    let fixture = Fixture::new(name).await;
    let acceptor = fixture.start_acceptor(1).await;
    let stop = format!("{}#1", points::BATCH_DECIDED);
    let mut consumers = vec![];
    for _ in 0..instances {
        consumers.push(fixture.start_instance(&[("OVERSOLD_STOP_AT", &stop)]).await);
    }
    fixture.wait_until_shared_by(instances).await;
    let members = fixture.group_members().await;
    let orders = fixture.accept_all(&acceptor, 1..=BUYERS).await;
    let offsets = fixture.offsets().await;
    let has_orders = |partitions: &&Vec<i32>| partitions.iter().any(|partition| offsets[partition].1 > 0);
    let writers = members.values().filter(has_orders).count();
    until("every instance that has orders has decided a batch", async || {
        let mut stopped = 0;
        for consumer in &consumers {
            stopped += usize::from(consumer.wait_until_stopped(Duration::ZERO).await.is_ok());
        }
        stopped == writers
    })
    .await;
    assert_eq!(
        fixture.rows().await,
        0,
        "the fault did not strike: a batch is committed"
    );
    for consumer in &consumers {
        consumer.resume().await.unwrap();
    }
    fixture.wait_until_processed().await;

    let wrong = fixture.deviations(&orders).await;
    assert!(wrong.is_empty(), "{wrong:#?}");
    let verdict = fixture.verdict(&acceptor, TIMEOUT).await;
    let conclusion = verdict.conclude(&required(expected));
    let kept = matches!(conclusion, Conclusion::AsPromised);
    assert!(
        kept,
        "lv4/{name} on {instances} instance(s), {writers} of them with orders: {conclusion}\n\n{verdict}"
    );
    for consumer in consumers {
        consumer.stop().await.unwrap();
    }
    acceptor.stop().await.unwrap();
}

/// The orders of several sales, some in one partition and some not: each sale has its own stock.
#[rstest]
#[case::locked("locked")]
#[case::single_writer("single-writer")]
#[tokio::test]
async fn several_sales_at_a_time_are_each_sold_by_their_own_stock(#[case] name: &str) {
    /// More than there are partitions.
    const SALES: std::ops::RangeInclusive<i64> = 2..=9;
    const BUYERS: i64 = 5;

    let fixture = Fixture::new(name).await;
    let acceptor = fixture.start_acceptor(2).await;
    let mut orders = vec![];
    for sale in SALES {
        acceptor.create_sale(sale, 2).await.unwrap();
    }
    for buyer in 1..=BUYERS {
        orders.push(fixture.accept(&acceptor, buyer).await);
        for sale in SALES {
            let answered = acceptor.reserve(sale, buyer, None).await.unwrap();
            orders.push(answered.json::<box_office::api::Reservation>().unwrap().id);
        }
    }
    let consumers = [fixture.start_instance(&[]).await, fixture.start_instance(&[]).await];
    fixture.wait_until_processed().await;

    fixture.assert_outcome(&acceptor, &orders, Kept).await;
    for sale in SALES {
        let sale = acceptor.sale(sale).await.unwrap();
        assert_eq!((sale.stock, sale.reserved), (0, 2), "sale {}", sale.id);
    }
    for consumer in consumers {
        consumer.stop().await.unwrap();
    }
    acceptor.stop().await.unwrap();
}

/// Few buyers with a short timeout: they wait in vain until it ends.
#[tokio::test]
async fn an_order_that_is_not_even_sent_is_lost() {
    let rush = Rush {
        buyers: 20,
        timeout: Duration::from_secs(2),
        ..Rush::default()
    };
    let breaks = Promises::ALL_KEPT.breaks(&[NothingLost, Progress]);
    contract(&program(), &LEVEL, "mutants/produce-nothing", rush.clone(), breaks).await;
    contract(&program(), &LEVEL, "single-writer", rush, KEEPS).await;
}

/// One reservation for each buyer, however many concurrent clicks, on whichever instance.
#[rstest]
#[case::locked("locked")]
#[case::single_writer("single-writer")]
#[tokio::test]
async fn fifty_clicks_at_once_are_one_reservation(#[case] name: &str) {
    let report = contract(&program(), &LEVEL, name, fifty_clicks(), KEEPS).await;
    assert_eq!(report.verdict.tally.sold, 4);
}

pub(crate) fn fifty_clicks() -> Rush {
    Rush {
        buyers: 4,
        clicks: 50,
        instances: 3,
        // While the first click sells, the other ones have read, if nothing stops them.
        work: Duration::from_millis(50),
        ..Rush::default()
    }
}

/// The judge reads the rows once no order waits: an order decided later could oversell unobserved.
#[tokio::test]
async fn a_rush_is_judged_when_no_order_waits_any_more() {
    static WAITING: AtomicU64 = AtomicU64::new(3);
    fn decreasing_lag(kafka: &KafkaConfig, timeout: Duration) -> anyhow::Result<u64> {
        let waiting = WAITING.load(Relaxed);
        WAITING.store(waiting.saturating_sub(1), Relaxed);
        Ok(waiting + lag(kafka, timeout)?)
    }
    let rush = Rush {
        buyers: 10,
        ..Rush::default()
    };
    let level = Level {
        lag: Some(decreasing_lag),
        ..LEVEL
    };
    rush.run(&program(), &level, strategy("single-writer")).await.unwrap();
    assert_eq!(WAITING.load(Relaxed), 0);
}

#[tokio::test]
async fn a_rush_whose_orders_wait_for_ever_is_not_judged() {
    let rush = Rush {
        buyers: 1,
        timeout: Duration::from_secs(2),
        ..Rush::default()
    };
    let level = Level {
        lag: Some(|_, _| Ok(7)),
        ..LEVEL
    };
    let run = rush.run(&program(), &level, strategy("single-writer")).await;
    let why = run.expect_err("it was judged").to_string();
    assert!(why.contains("the consumer lag is still 7 messages"), "{why}");
}

#[rstest]
#[case::locked("locked")]
#[case::single_writer("single-writer")]
#[tokio::test]
async fn the_http_contract_holds(#[case] name: &str) {
    http_contract::holds(&program(), &LEVEL, strategy(name)).await.unwrap();
}

#[tokio::test]
async fn idle_slow_and_endless_clients_keep_nobody_waiting() {
    slow_clients::keep_nobody_waiting(&program(), &LEVEL, strategy("single-writer"))
        .await
        .unwrap();
}

#[rstest]
#[case::locked("locked")]
#[case::single_writer("single-writer")]
#[tokio::test]
async fn an_instance_killed_in_mid_rush_leaves_only_what_was_in_flight_on_it_undecided(#[case] name: &str) {
    instance_faults::a_kill_leaves_only_what_was_in_flight_undecided(
        &program_for_instance_faults(name),
        &LEVEL,
        strategy(name),
        &Invariant::ALL,
    )
    .await;
}

#[rstest]
#[case::locked("locked")]
#[case::single_writer("single-writer")]
#[tokio::test]
async fn a_rolling_restart_leaves_nobody_undecided(#[case] name: &str) {
    instance_faults::a_rolling_restart_leaves_nobody_undecided(
        &program_for_instance_faults(name),
        &LEVEL,
        strategy(name),
        &Invariant::ALL,
    )
    .await;
}
