//! LV.3: exact orders of steps of more than one sale, and of a clock that was set back.

use box_office::points;
use harness::{history::Answer, judge::judge, schedule::ScheduleRunner};
use rstest::rstest;

use super::contract::strategy;

/// A lock is one sale's: the buyer of another does not wait for it.
#[rstest]
#[case::spin("spin")]
#[case::rlock("rlock")]
#[case::fenced("fenced")]
#[tokio::test]
async fn the_buyers_of_one_sale_do_not_wait_for_those_of_another(#[case] name: &str) {
    let runner = ScheduleRunner::of(strategy(name)).await.unwrap();
    let (mut one, mut other) = (runner.sale(1).await.unwrap(), runner.sale(1).await.unwrap());
    let (ann, bob) = (one.buyer("Ann"), other.buyer("Bob"));

    one.run_until(ann, points::DECIDED_TO_SELL).await.unwrap();
    other.run_to_completion(bob).await.unwrap();
    one.run_to_completion(ann).await.unwrap();

    for schedule in [one, other] {
        let verdict = judge(&schedule.history().await.unwrap());
        assert!(verdict.findings.is_empty(), "{}\n{verdict}", schedule.trace());
        assert_eq!(verdict.tally.sold, 1);
    }
}

/// Redis has lost the last token and its clock is an hour behind that of the tokens before. Nothing is
/// sold until it has caught up.
#[tokio::test]
async fn a_token_from_a_clock_that_was_set_back_sells_nothing() {
    const HOUR_US: i64 = 3_600_000_000;

    let runner = ScheduleRunner::of(strategy("fenced")).await.unwrap();
    let pool = runner.environment().database().pool(1).await.unwrap();
    let mut schedule = runner.sale(1).await.unwrap();
    let move_fence = async |by: i64, sale: i64| {
        let moved = sqlx::query("update sale set fence = (extract(epoch from now()) * 1e6)::bigint + $1 where id = $2");
        let moved = moved.bind(by).bind(sale).execute(&pool).await.unwrap();
        assert_eq!(moved.rows_affected(), 1, "the fault did not strike");
    };
    let (early, late) = (schedule.buyer("Ann"), schedule.buyer("Bob"));

    move_fence(HOUR_US, schedule.sale()).await;
    schedule.run_to_completion(early).await.unwrap();
    move_fence(-HOUR_US, schedule.sale()).await;
    schedule.run_to_completion(late).await.unwrap();

    let history = schedule.history().await.unwrap();
    assert_eq!(
        history.requests[0].answer,
        Answer::Indeterminate,
        "{}",
        schedule.trace()
    );
    assert!(
        matches!(history.requests[1].answer, Answer::Confirmed { .. }),
        "{}",
        schedule.trace()
    );
    let verdict = judge(&history);
    assert!(verdict.findings.is_empty(), "{}\n{verdict}", schedule.trace());
}
