//! Requests that are cancelled, and buyers who hang up.

use super::*;

// ANCHOR: cancelled
/// `at_least`: the number of statements, each of which is an await point.
#[rstest]
#[case::mutex("mutex", 6)]
#[case::pessimistic("pessimistic", 6)]
#[case::optimistic("optimistic", 6)]
#[case::conditional_update("conditional-update", 1)]
#[tokio::test]
async fn a_reservation_can_be_cancelled_anywhere(#[case] name: &str, #[case] at_least: usize) {
    let cancelled = cancelled_after_every_poll(strategy(name)).await.unwrap();
    println!("{name}: cancelled {cancelled} times");
    assert!(cancelled > at_least, "cancelled only {cancelled} times");
}
// ANCHOR_END: cancelled

#[tokio::test]
#[should_panic(expected = "did not strike")]
async fn a_reservation_that_nobody_cancels_says_nothing() {
    never_cancelled(strategy("pessimistic")).await.unwrap();
}

#[tokio::test]
async fn a_transaction_begun_by_hand_is_left_open_when_its_request_is_cancelled() {
    let strategy = strategy("mutants/transaction-left-open");
    let error = cancelled_after_every_poll(strategy).await.unwrap_err();
    assert!(
        format!("{error:#}").contains("a transaction is still open"),
        "{error:#}"
    );
    assert_failure_mode(strategy, &[Progress]);
}

#[rstest]
#[case::mutex("mutex")]
#[case::pessimistic("pessimistic")]
#[case::optimistic("optimistic")]
#[case::conditional_update("conditional-update")]
#[case::one_that_could_not_bear_to_be_cancelled("mutants/transaction-left-open")]
#[tokio::test]
async fn a_buyer_who_hangs_up_anywhere_cuts_nothing(#[case] name: &str) {
    let points = disconnected_at_every_point(&program(), &LEVEL, strategy(name))
        .await
        .unwrap();
    println!("{name}: hung up at {points:?}");
    assert!(points.contains(&"committed".to_owned()), "{points:?}");
}

#[tokio::test]
#[should_panic(expected = "did not strike")]
async fn a_server_that_never_pauses_says_nothing_about_buyers_who_hang_up() {
    never_disconnected(&program(), &LEVEL, strategy("pessimistic"))
        .await
        .unwrap();
}
