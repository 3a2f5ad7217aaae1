//! LV.2: the contract that LV.1 breaks, kept; and where each strategy stops keeping it.

#![allow(clippy::unwrap_used)]

use std::{path::Path, time::Duration};

use box_office::{
    Invariant::{self, Conservation, NoDuplicate, NoOversell, NoUndersell, OneAnswer, Progress},
    Place, Promises, Strategy,
};
use lv2_db_lock::LEVEL;
use rstest::rstest;
use suite::{
    backends::Stand,
    contract,
    crowd::bears_idle_and_slow_clients,
    http_contract::{Talk, refuses_bad_input, sells_refuses_and_repeats},
    judge::judge,
    restarts,
    rush::{Program, Rush, SALE},
    schedule::{Rehearsal, Scenario, cancelled_after_every_poll, hung_up_at_every_point},
    twins::differ_by_one_mistake,
};

fn program() -> Program {
    Program::new(env!("CARGO_BIN_EXE_lv2-db-lock"))
}

fn strategy(name: &str) -> &'static Strategy {
    LEVEL
        .strategy(name)
        .unwrap_or_else(|| panic!("LV.2 has no strategy {name}"))
}

const KEEPS: Promises = Promises::ALL_KEPT;
const OVERSELLS: Promises = Promises::ALL_KEPT
    .breaks(&[NoOversell, Conservation])
    .leaves_open(&[NoDuplicate, OneAnswer]);
const DUPLICATES: Promises = Promises::ALL_KEPT.breaks(&[NoDuplicate]).leaves_open(&[OneAnswer]);
const STARVES: Promises = Promises::ALL_KEPT.breaks(&[Progress]).leaves_open(&[NoUndersell]);

// ANCHOR: contract
#[rstest]
// ANCHOR: mutex-cases
#[case::mutex("mutex", 1, KEEPS)]
#[case::mutex_ends_at_its_process("mutex", 3, OVERSELLS)]
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
#[case::mutex_does_nothing("broken/mutex-does-nothing", 1, OVERSELLS)]
#[case::mutex_wrong_key("broken/mutex-wrong-key", 1, OVERSELLS)]
#[case::guard_before_commit("broken/guard-before-commit", 1, OVERSELLS)]
#[case::for_update_does_nothing("broken/for-update-does-nothing", 1, OVERSELLS)]
#[case::for_update_wrong_key("broken/for-update-wrong-key", 1, OVERSELLS)]
#[case::look_up_before_lock("broken/look-up-before-lock", 1, DUPLICATES)]
#[case::version_not_compared("broken/version-not-compared", 1, OVERSELLS)]
#[case::retry_reuses_the_read("broken/retry-reuses-the-read", 1, OVERSELLS)]
#[tokio::test]
async fn a_sale_keeps_its_guarantee(#[case] name: &str, #[case] instances: usize, #[case] expected: Promises) {
    let rush = Rush {
        // As long as a disk would make it: a lock that is given back before the commit must be seen to be.
        commit: Duration::from_millis(1),
        ..Rush::for_strategy(strategy(name)).instances(instances)
    };
    contract(&program(), &LEVEL, name, rush, expected).await;
}
// ANCHOR_END: contract

// ANCHOR: orders
/// Where nothing happens that another request could see: holding a request there only tries the same order again.
const PASSES: &[&str] = &["mutex taken", "transaction begun", "reservation written", "committed"];

/// Two requests, every feasible order.
const TWO_BUYERS: Scenario = Scenario {
    capacity: 1,
    clicks: &[1, 1],
    passes: PASSES,
    preemptions: None,
};
/// One buyer clicks twice, every feasible order.
const TWO_CLICKS: Scenario = Scenario {
    capacity: 2,
    clicks: &[2],
    passes: PASSES,
    preemptions: None,
};
/// Three requests, two of them of one buyer, at most two preemptions.
const THREE: Scenario = Scenario {
    capacity: 2,
    clicks: &[2, 1],
    passes: PASSES,
    preemptions: Some(2),
};

#[rstest]
#[case::mutex("mutex")]
#[case::pessimistic("pessimistic")]
#[case::optimistic("optimistic")]
#[case::conditional_update("conditional-update")]
#[tokio::test]
async fn no_order_of_steps_breaks_it(#[case] name: &str) {
    let rehearsal = Rehearsal::of(strategy(name)).await.unwrap();
    for scenario in [TWO_BUYERS, TWO_CLICKS, THREE] {
        let explored = rehearsal.explore(scenario).await.unwrap();
        println!(
            "{name}, {scenario:?}: {} orders, {} with a wait",
            explored.orders, explored.blocked
        );
        if let Some(broken) = explored.broken.first() {
            panic!(
                "{} of {} orders break it, such as\n{}\n{}",
                explored.broken.len(),
                explored.orders,
                broken.trace,
                broken.verdict
            );
        }
    }
}
// ANCHOR_END: orders

#[rstest]
#[case::mutex_does_nothing("broken/mutex-does-nothing", TWO_BUYERS)]
#[case::mutex_wrong_key("broken/mutex-wrong-key", TWO_BUYERS)]
#[case::guard_before_commit("broken/guard-before-commit", TWO_BUYERS)]
#[case::for_update_does_nothing("broken/for-update-does-nothing", TWO_BUYERS)]
#[case::for_update_wrong_key("broken/for-update-wrong-key", TWO_BUYERS)]
#[case::look_up_before_lock("broken/look-up-before-lock", TWO_CLICKS)]
#[case::version_not_compared("broken/version-not-compared", TWO_BUYERS)]
#[case::retry_reuses_the_read("broken/retry-reuses-the-read", TWO_BUYERS)]
#[tokio::test]
async fn some_order_of_steps_breaks_its_broken_twin(#[case] name: &str, #[case] scenario: Scenario) {
    let rehearsal = Rehearsal::of(strategy(name)).await.unwrap();
    let explored = rehearsal.explore(scenario).await.unwrap();
    println!(
        "{name}: {} of {} orders break it",
        explored.broken.len(),
        explored.orders
    );
    assert!(
        !explored.broken.is_empty(),
        "none of {} orders breaks it",
        explored.orders
    );
}

// ANCHOR: guard
#[tokio::test]
async fn a_guard_dropped_before_the_commit_sells_the_last_ticket_twice() {
    let rehearsal = Rehearsal::of(strategy("broken/guard-before-commit")).await.unwrap();
    let mut script = rehearsal.sale(1).await.unwrap();
    let (ann, bob) = (script.buyer("Ann"), script.buyer("Bob"));

    script.run_until(ann, "lock released").await.unwrap();
    script.run_until(bob, "decided to sell").await.unwrap(); // has read the stock that Ann has not committed yet
    script.run_to_its_answer(ann).await.unwrap();
    script.run_to_its_answer(bob).await.unwrap();

    let verdict = judge(&script.history().await.unwrap());
    assert!(verdict.breaks(NoOversell), "{}\n{verdict}", script.trace());
}
// ANCHOR_END: guard

// ANCHOR: guard-kept
#[tokio::test]
async fn a_guard_kept_until_the_commit_makes_the_next_buyer_wait() {
    let rehearsal = Rehearsal::of(strategy("mutex")).await.unwrap();
    let mut script = rehearsal.sale(1).await.unwrap();
    let (ann, bob) = (script.buyer("Ann"), script.buyer("Bob"));

    script.run_until(ann, "stock written").await.unwrap();
    script.run_until_blocked(bob).await.unwrap();
    script.run_to_its_answer(ann).await.unwrap();
    script.run_to_its_answer(bob).await.unwrap();

    let verdict = judge(&script.history().await.unwrap());
    assert!(verdict.findings.is_empty(), "{}\n{verdict}", script.trace());
}
// ANCHOR_END: guard-kept

// ANCHOR: fifty-clicks
/// One reservation, however often the buyer clicks at once.
#[rstest]
#[case::pessimistic("pessimistic", 3)]
#[case::optimistic("optimistic", 3)]
#[case::conditional_update("conditional-update", 3)]
#[case::mutex("mutex", 1)]
#[tokio::test]
async fn fifty_clicks_at_once_are_one_reservation(#[case] name: &str, #[case] instances: usize) {
    let rush = Rush {
        buyers: 4,
        clicks: 50,
        instances,
        ..Rush::default()
    };
    let report = contract(&program(), &LEVEL, name, rush, KEEPS).await;
    assert_eq!(report.verdict.tally.sold, 4);
}
// ANCHOR_END: fifty-clicks

// ANCHOR: many-tickets
#[tokio::test]
async fn a_mutex_on_two_instances_sells_one_buyer_many_tickets() {
    let rush = Rush {
        buyers: 1,
        clicks: 50,
        instances: 2,
        // Both instances are in their first reservation at the same time, even if one gets its click late.
        hold: Duration::from_millis(100),
        ..Rush::default()
    };
    let report = rush.run(&program(), &LEVEL, strategy("mutex")).await.unwrap();
    assert!(report.verdict.breaks(NoDuplicate), "{}", report.verdict);
}
// ANCHOR_END: many-tickets

// ANCHOR: pool
/// Fewer connections than callers, by far.
#[tokio::test]
async fn a_thousand_callers_share_a_pool_of_eight() {
    let rush = Rush {
        pool_size: Some(8),
        ..Rush::default()
    };
    contract(&program(), &LEVEL, "pessimistic", rush, KEEPS).await;
}
// ANCHOR_END: pool

// ANCHOR: second-connection
#[tokio::test]
async fn a_second_connection_taken_while_one_is_held_starves_the_pool() {
    let rush = Rush {
        pool_size: Some(8),
        patience: Duration::from_secs(6),
        ..Rush::default()
    };
    contract(&program(), &LEVEL, "broken/second-connection", rush, STARVES).await;
}
// ANCHOR_END: second-connection

// ANCHOR: cancelled
#[rstest]
#[case::mutex("mutex")]
#[case::pessimistic("pessimistic")]
#[case::optimistic("optimistic")]
#[case::conditional_update("conditional-update")]
#[tokio::test]
async fn a_reservation_can_be_cancelled_anywhere(#[case] name: &str) {
    let cancelled = cancelled_after_every_poll(strategy(name)).await.unwrap();
    println!("{name}: cancelled {cancelled} times");
}
// ANCHOR_END: cancelled

#[tokio::test]
async fn a_transaction_begun_by_hand_is_left_open_when_its_request_is_cancelled() {
    let error = cancelled_after_every_poll(strategy("broken/transaction-left-open"))
        .await
        .unwrap_err();
    assert!(
        format!("{error:#}").contains("a transaction is still open"),
        "{error:#}"
    );
}

#[rstest]
#[case::mutex("mutex")]
#[case::pessimistic("pessimistic")]
#[case::optimistic("optimistic")]
#[case::conditional_update("conditional-update")]
#[case::one_that_could_not_bear_to_be_cancelled("broken/transaction-left-open")]
#[tokio::test]
async fn a_buyer_who_hangs_up_anywhere_cuts_nothing(#[case] name: &str) {
    let points = hung_up_at_every_point(&program(), &LEVEL, strategy(name))
        .await
        .unwrap();
    println!("{name}: hung up at {points:?}");
    assert!(points.contains(&"committed".to_owned()), "{points:?}");
}

#[test]
fn every_broken_twin_differs_by_its_one_mistake() {
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let pairs = differ_by_one_mistake(&source).unwrap_or_else(|error| panic!("{error:#}"));
    let listed = LEVEL
        .strategies
        .iter()
        .filter(|strategy| strategy.place == Place::Broken);
    assert_eq!(pairs, listed.count());
}

#[rstest]
#[case::mutex("mutex")]
#[case::pessimistic("pessimistic")]
#[case::optimistic("optimistic")]
#[case::conditional_update("conditional-update")]
#[tokio::test]
async fn the_http_contract_holds(#[case] name: &str) {
    let strategy = strategy(name);
    let stand = Stand::shared(strategy).await.unwrap();
    let talk = Talk::with(&stand, &program(), &LEVEL, strategy).await.unwrap();

    sells_refuses_and_repeats(&talk).await.unwrap();
    refuses_bad_input(&talk).await.unwrap();
    let sale = talk.sale(SALE).await.unwrap();
    assert_eq!((sale.stock, sale.reserved), (0, 2), "bad input sold something");
    talk.stop().await.unwrap();
}

#[tokio::test]
async fn idle_slow_and_endless_clients_keep_nobody_waiting() {
    let strategy = strategy("pessimistic");
    let stand = Stand::shared(strategy).await.unwrap();
    let talk = Talk::with(&stand, &program(), &LEVEL, strategy).await.unwrap();
    let kib = bears_idle_and_slow_clients(&talk).await.unwrap();
    println!("they cost {kib} KiB");
    talk.stop().await.unwrap();
}

#[tokio::test]
async fn an_instance_killed_in_mid_rush_leaves_only_what_was_in_flight_on_it_undecided() {
    let strategy = strategy("pessimistic");
    restarts::a_kill_leaves_only_what_was_in_flight_undecided(&program(), &LEVEL, strategy, &Invariant::ALL).await;
}

#[tokio::test]
async fn a_rolling_restart_leaves_nobody_undecided() {
    let strategy = strategy("pessimistic");
    restarts::a_rolling_restart_leaves_nobody_undecided(&program(), &LEVEL, strategy, &Invariant::ALL).await;
}

/// 64 buyers on one row, each on a connection of its own.
const STORM: Rush = Rush {
    capacity: 32,
    buyers: 64,
    clicks: 1,
    instances: 1,
    hold: Duration::from_millis(1),
    commit: Duration::ZERO,
    pool_size: Some(64),
    patience: Duration::from_secs(20),
    traced: true,
    faults: vec![],
};

#[tokio::test]
async fn in_a_version_storm_retries_are_bounded_and_every_ticket_is_sold() {
    let report = contract(&program(), &LEVEL, "optimistic", STORM, KEEPS).await;

    assert_eq!(report.verdict.tally.sold, 32, "{}", report.verdict);
    let overtaken = report.history.requests.iter().map(|request| {
        let steps = request.steps.iter();
        steps.filter(|step| step.step == "overtaken").count()
    });
    let (retries, most) = overtaken.fold((0, 0), |(sum, most), times| (sum + times, most.max(times)));
    println!("{retries} retries, at most {most} of one request");
    assert!(retries > 0, "the fault did not strike: nobody was overtaken");
    assert!(most < 200, "one request tried {most} times");
}

#[tokio::test]
async fn in_a_version_storm_a_retry_that_reuses_its_read_oversells() {
    contract(&program(), &LEVEL, "broken/retry-reuses-the-read", STORM, OVERSELLS).await;
}
