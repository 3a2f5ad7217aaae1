//! Rebalances: consumers join and leave the group.

use std::sync::atomic::{AtomicBool, Ordering::Relaxed};

use harness::{
    backends::TestEnvironment,
    rush::{Program, Rush},
    until,
};
use lv4_kafka::LEVEL;
use rstest::rstest;

use crate::fixture::{Expected::Kept, Fixture, strategy};

/// Instances join and leave while orders arrive. Each shuts down gracefully.
///
/// No mutant is run here: `mutants/auto-commit` and `mutants/highest-offset` would commit too early
/// only by chance. The tests of `offsets` keep an order in flight, or failing, for as long as they
/// need, and catch them.
#[rstest]
#[case::locked("locked")]
#[case::single_writer("single-writer")]
#[tokio::test]
async fn instances_that_join_and_leave_lose_no_order_and_decide_none_twice(#[case] name: &str) {
    let fixture = Fixture::new(name).await;
    let acceptor = fixture.start_acceptor(50).await;
    let all_have_come = AtomicBool::new(false);
    let buyers = async {
        let mut orders = vec![];
        for buyer in 1.. {
            if all_have_come.load(Relaxed) {
                break;
            }
            orders.push(fixture.accept(&acceptor, buyer).await);
        }
        orders
    };
    let instances = async {
        let first = fixture.start_instance(&[]).await;
        until("some are decided", async || fixture.rows().await > 0).await;
        let second = fixture.start_instance(&[]).await;
        fixture.wait_until_shared_by(2).await;
        first.stop().await.unwrap();
        fixture.wait_until_shared_by(1).await;
        let third = fixture.start_instance(&[]).await;
        fixture.wait_until_shared_by(2).await;
        second.stop().await.unwrap();
        fixture.wait_until_shared_by(1).await;
        all_have_come.store(true, Relaxed);
        third
    };
    let looks = async {
        while !all_have_come.load(Relaxed) {
            // Read in this order: an order decided in between must not look like an early commit.
            let committed = fixture.total_committed().await;
            let decided = fixture.rows().await;
            assert!(committed <= decided, "{committed} are committed, and {decided} decided");
        }
    };
    let (orders, third, ()) = tokio::join!(buyers, instances, looks);
    fixture.wait_until_processed().await;

    fixture.assert_outcome(&third, &orders, Kept).await;
    let offsets = fixture.offsets().await;
    let messages: i64 = offsets.values().map(|(_, end)| end).sum();
    let accepted = i64::try_from(orders.len()).unwrap();
    assert_eq!((messages, fixture.rows().await), (accepted, accepted));
    third.stop().await.unwrap();
}

#[tokio::test]
async fn a_server_is_ready_once_each_of_its_consumers_has_partitions() {
    let fixture = Fixture::new("single-writer").await;
    let mut servers = vec![];
    for instances in 1..=3 {
        servers.push(fixture.start_instance(&[]).await);
        let members = fixture.group_members().await;
        let shares: Vec<usize> = members.values().map(Vec::len).collect();
        assert!(
            shares.len() == instances && shares.iter().all(|&share| share > 0),
            "{members:?}"
        );
    }
    // With more consumers than partitions, it is ready all the same.
    servers.push(fixture.start_instance(&[("KAFKA_CONSUMERS", "8")]).await);
    for server in servers {
        server.stop().await.unwrap();
    }
}

/// This is why `locked` needs a lock. With all orders of a sale in one partition, it would need
/// none.
#[tokio::test]
async fn orders_of_one_sale_are_decided_by_several_instances() {
    let strategy = strategy("locked");
    let environment = TestEnvironment::shared(strategy).await.unwrap();
    let rush = Rush {
        buyers: 60,
        instances: 3,
        ..Rush::default()
    };
    let report = rush
        .traced()
        .run_on(
            &environment,
            &Program::new(env!("CARGO_BIN_EXE_lv4-kafka")),
            &LEVEL,
            strategy,
        )
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
