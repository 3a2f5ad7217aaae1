//! The contract that LV.1 breaks, the table of all strategies, and many clicks of one buyer.

use super::*;

// ANCHOR: contract
#[rstest]
// ANCHOR: mutex-cases
#[case::mutex("mutex", 1, KEEPS)]
#[case::mutex_ends_at_its_process("mutex", 2, OVERSELLS)]
#[case::mutex_on_three("mutex", 3, OVERSELLS)]
// ANCHOR_END: mutex-cases
// ANCHOR: pessimistic-cases
#[case::pessimistic("pessimistic", 1, KEEPS)]
#[case::pessimistic_on_three("pessimistic", 3, KEEPS)]
// ANCHOR_END: pessimistic-cases
// ANCHOR: optimistic-cases
#[case::optimistic("optimistic", 1, KEEPS)]
#[case::optimistic_on_three("optimistic", 3, KEEPS)]
// ANCHOR_END: optimistic-cases
// ANCHOR: conditional-update-cases
#[case::conditional_update("conditional-update", 1, KEEPS)]
#[case::conditional_update_on_three("conditional-update", 3, KEEPS)]
// ANCHOR_END: conditional-update-cases
#[case::transaction_left_open_if_nobody_cancels("mutants/transaction-left-open", 1, KEEPS)]
#[tokio::test]
async fn a_sale_keeps_its_guarantee(#[case] name: &str, #[case] instances: usize, #[case] expected: Promises) {
    let rush = Rush {
        // As slow as a commit to disk, so that a lock released before the commit is detected.
        commit: Duration::from_millis(1),
        ..Rush::for_strategy(strategy(name)).instances(instances)
    };
    contract(&program(), &LEVEL, name, rush, expected).await;
}
// ANCHOR_END: contract

#[test]
fn every_strategy_declares_what_the_table_says() {
    assert_declared(
        &LEVEL,
        &[
            ("mutex", KEEPS, OVERSELLS),
            ("pessimistic", KEEPS, KEEPS),
            ("optimistic", KEEPS, KEEPS),
            ("conditional-update", KEEPS, KEEPS),
            ("mutants/second-connection", STARVES, STARVES),
            ("mutants/transaction-left-open", KEEPS, OVERSELLS),
        ],
    );
}

// ANCHOR: fifty-clicks
/// 50 concurrent clicks of one buyer are one reservation.
#[rstest]
#[case::pessimistic("pessimistic", 3)]
#[case::optimistic("optimistic", 3)]
#[case::conditional_update("conditional-update", 3)]
#[case::mutex("mutex", 1)]
#[tokio::test]
async fn fifty_clicks_at_once_are_one_reservation(#[case] name: &str, #[case] instances: usize) {
    let report = contract(&program(), &LEVEL, name, fifty_clicks(instances), KEEPS).await;
    assert_eq!(report.verdict.tally.sold, 4);
}

pub(crate) fn fifty_clicks(instances: usize) -> Rush {
    Rush {
        buyers: 4,
        clicks: 50,
        instances,
        // Long enough that all other clicks read before the first one commits, unless a lock
        // prevents it.
        work: Duration::from_millis(50),
        ..Rush::default()
    }
}
// ANCHOR_END: fifty-clicks

// ANCHOR: many-tickets
#[tokio::test]
async fn a_mutex_on_two_instances_sells_one_buyer_many_tickets() {
    let report = one_buyer_clicks_at(2).await;
    assert!(report.verdict.breaks(NoDuplicate), "{}", report.verdict);
}

#[tokio::test]
#[should_panic(expected = "did not strike")]
async fn on_one_instance_there_is_no_second_mutex() {
    one_buyer_clicks_at(1).await;
}

async fn one_buyer_clicks_at(instances: usize) -> Report {
    let rush = Rush {
        buyers: 1,
        clicks: 50,
        instances,
        // Long enough for the first reservations of both instances to overlap, even if one click
        // arrives late.
        work: Duration::from_millis(100),
        ..Rush::default()
    };
    let report = rush.run(&program(), &LEVEL, strategy("mutex")).await.unwrap();
    let instances: HashSet<_> = report.sent_to.values().collect();
    assert_eq!(
        instances.len(),
        2,
        "the fault did not strike: the clicks went to {instances:?}"
    );
    report
}
// ANCHOR_END: many-tickets
