//! Rebalances: consumers join and leave the group.

use std::sync::atomic::{AtomicBool, Ordering::Relaxed};

use harness::{
    backends::TestEnvironment,
    rush::{Program, Rush},
    until,
};
use lv4_kafka::LEVEL;
use rstest::rstest;

use crate::fixture::{Expected::Kept, Place, strategy};

/// Instances come and go while orders do. Each goes in peace: it finishes what it has in hand.
///
/// Here no offset runs ahead but by luck: what `mutants/auto-commit` and `mutants/highest-offset` do wrong shows where an order is in hand, or
/// is put off in a rebalance, for as long as the test likes. So they are caught there.
#[rstest]
#[case::locked("locked")]
#[case::single_writer("single-writer")]
#[tokio::test]
async fn instances_that_join_and_leave_lose_nothing_and_do_nothing_twice(#[case] name: &str) {
    let place = Place::of(name).await;
    let acceptor = place.acceptor(50).await;
    let all_have_come = AtomicBool::new(false);
    let buyers = async {
        let mut orders = vec![];
        for buyer in 1.. {
            if all_have_come.load(Relaxed) {
                break;
            }
            orders.push(place.accepts(&acceptor, buyer).await);
        }
        orders
    };
    let instances = async {
        let first = place.instance(&[]).await;
        until("some are decided", async || place.rows().await > 0).await;
        let second = place.instance(&[]).await;
        place.shared_by(2).await;
        first.stop().await.unwrap();
        place.shared_by(1).await;
        let third = place.instance(&[]).await;
        place.shared_by(2).await;
        second.stop().await.unwrap();
        place.shared_by(1).await;
        all_have_come.store(true, Relaxed);
        third
    };
    let looks = async {
        while !all_have_come.load(Relaxed) {
            // In this order: what is decided in between is no offset that ran ahead.
            let committed = place.committed().await;
            let decided = place.rows().await;
            assert!(committed <= decided, "{committed} are passed, and {decided} decided");
        }
    };
    let (orders, third, ()) = tokio::join!(buyers, instances, looks);
    place.quiet().await;

    place.hold(&third, &orders, Kept).await;
    let offsets = place.offsets().await;
    let messages: i64 = offsets.values().map(|(_, end)| end).sum();
    let accepted = i64::try_from(orders.len()).unwrap();
    assert_eq!((messages, place.rows().await), (accepted, accepted));
    third.stop().await.unwrap();
}

#[tokio::test]
async fn a_server_is_ready_once_each_of_its_consumers_has_partitions() {
    let place = Place::of("single-writer").await;
    let mut talks = vec![];
    for instances in 1..=3 {
        talks.push(place.instance(&[]).await);
        let members = place.members().await;
        let shares: Vec<usize> = members.values().map(Vec::len).collect();
        assert!(
            shares.len() == instances && shares.iter().all(|&share| share > 0),
            "{members:?}"
        );
    }
    // And where there are more consumers than partitions, it is ready all the same.
    talks.push(place.instance(&[("KAFKA_CONSUMERS", "8")]).await);
    for talk in talks {
        talk.stop().await.unwrap();
    }
}

/// That is what the lock is for. With the orders of a sale in one partition, no lock would be needed.
#[tokio::test]
async fn orders_of_one_sale_are_decided_by_several_instances() {
    let strategy = strategy("locked");
    let stand = TestEnvironment::shared(strategy).await.unwrap();
    let rush = Rush {
        buyers: 60,
        instances: 3,
        ..Rush::default()
    };
    let report = rush
        .traced()
        .run_on(&stand, &Program::new(env!("CARGO_BIN_EXE_lv4-kafka")), &LEVEL, strategy)
        .await
        .unwrap();
    let decided: Vec<usize> = report
        .beside_requests
        .iter()
        .map(|steps| steps.iter().filter(|record| record.step == "committed").count())
        .collect();
    println!("{decided:?}");
    assert_eq!(decided.iter().sum::<usize>(), 60);
    assert!(
        decided.iter().filter(|&&decided| decided > 0).count() >= 2,
        "{decided:?}"
    );
}
