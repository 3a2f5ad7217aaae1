//! Exact orders of steps: every feasible order of two requests, and single ones by hand.

use super::*;

// ANCHOR: orders
/// Points without an effect that another request could see: pausing there would repeat the same
/// order.
const PASSES: &[&str] = &[
    "mutex taken",
    "transaction begun",
    "decided to sell",
    "reservation written",
    "committed",
];

/// Two buyers, every feasible order.
pub(crate) const TWO_BUYERS: Scenario = Scenario {
    capacity: 1,
    clicks: &[1, 1],
    passes: PASSES,
    preemptions: None,
};

/// One buyer clicks twice, every feasible order.
pub(crate) const TWO_CLICKS: Scenario = Scenario {
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

/// `at_least`: with fewer orders of two buyers, the strategy has lost a scheduling point.
#[rstest]
#[case::mutex("mutex", true, 34)]
#[case::pessimistic("pessimistic", true, 8)]
#[case::optimistic("optimistic", true, 50)]
#[case::conditional_update("conditional-update", false, 2)]
#[tokio::test]
async fn no_order_of_steps_breaks_it(#[case] name: &str, #[case] waits: bool, #[case] at_least: usize) {
    let runner = ScheduleRunner::of(strategy(name)).await.unwrap();
    for scenario in [TWO_BUYERS, TWO_CLICKS, THREE] {
        let explored = runner.explore(scenario).await.unwrap();
        println!(
            "{name}, {scenario:?}: {} interleavings, {} with a wait",
            explored.interleavings, explored.blocked
        );
        assert!(
            explored.interleavings >= at_least,
            "only {} interleavings",
            explored.interleavings
        );
        assert_eq!(
            explored.blocked > 0,
            waits,
            "{} interleavings with a wait",
            explored.blocked
        );
        none_broken(&explored);
    }
}
// ANCHOR_END: orders

pub(crate) fn none_broken(explored: &Exploration) {
    if let Some(broken) = explored.broken.first() {
        panic!(
            "{} of {} interleavings break it, such as\n{}\n{}",
            explored.broken.len(),
            explored.interleavings,
            broken.trace,
            broken.verdict
        );
    }
}

#[rstest]
#[case::mutex("mutex")]
#[case::pessimistic("pessimistic")]
#[case::optimistic("optimistic")]
#[case::conditional_update("conditional-update")]
#[tokio::test]
async fn in_no_order_do_two_requests_under_one_key_get_two_reservations(#[case] name: &str) {
    let runner = ScheduleRunner::of(strategy(name)).await.unwrap();

    let explored = runner.explore_under_one_key(TWO_CLICKS).await.unwrap();
    println!("{name}, one buyer: {} interleavings", explored.interleavings);
    none_broken(&explored);
    for answers in &explored.answers {
        assert!(matches!(answers[0], Answer::Confirmed { .. }), "{answers:?}");
        assert_eq!(answers[0], answers[1]);
    }

    let two_tickets = Scenario {
        capacity: 2,
        ..TWO_BUYERS
    };
    let explored = runner.explore_under_one_key(two_tickets).await.unwrap();
    println!("{name}, two buyers: {} interleavings", explored.interleavings);
    none_broken(&explored);
    for answers in &explored.answers {
        let confirmed = answers
            .iter()
            .filter(|answer| matches!(answer, Answer::Confirmed { .. }));
        assert_eq!(confirmed.count(), 1, "{answers:?}");
        assert!(
            answers.contains(&Answer::Refused(Refused::KeyOfAnotherBuyer)),
            "{answers:?}"
        );
    }
}

/// Asserts that Postgres sees one open transaction, that of the paused request.
pub(crate) async fn a_transaction_is_open(runner: &ScheduleRunner) {
    let pool = runner.environment().database().pool(1).await.unwrap();
    let open: i64 = sqlx::query_scalar(
        "select count(*)
           from pg_stat_activity
          where datname = current_database()
            and state = 'idle in transaction'",
    )
    .fetch_one(&pool)
    .await
    .unwrap();
    assert_eq!(open, 1, "the fault did not strike: no transaction is open");
}

#[tokio::test]
#[should_panic(expected = "did not strike")]
async fn a_guard_dropped_after_the_commit_leaves_nothing_to_strike() {
    let runner = ScheduleRunner::of(strategy("mutex")).await.unwrap();
    let mut schedule = runner.sale(1).await.unwrap();
    let ann = schedule.buyer("Ann");

    schedule.run_until(ann, "lock released").await.unwrap();
    a_transaction_is_open(&runner).await;
}

// ANCHOR: guard-kept
#[tokio::test]
async fn a_guard_kept_until_the_commit_makes_the_next_buyer_wait() {
    let runner = ScheduleRunner::of(strategy("mutex")).await.unwrap();
    let mut schedule = runner.sale(1).await.unwrap();
    let (ann, bob) = (schedule.buyer("Ann"), schedule.buyer("Bob"));

    schedule.run_until(ann, "stock written").await.unwrap();
    schedule.run_until_blocked(bob).await.unwrap();
    schedule.run_to_completion(ann).await.unwrap();
    schedule.run_to_completion(bob).await.unwrap();

    let verdict = judge(&schedule.history().await.unwrap());
    assert!(verdict.findings.is_empty(), "{}\n{verdict}", schedule.trace());
}
// ANCHOR_END: guard-kept

/// Locks the row of this sale, as the administration's or a colleague's transaction could.
pub(crate) async fn lock_row(pool: &PgPool, sale: SaleId) -> PgTransaction<'static> {
    let mut holder = pool.begin().await.unwrap();
    sqlx::query("select from sale where id = $1 for update")
        .bind(sale)
        .execute(&mut *holder)
        .await
        .unwrap();
    holder
}

/// Both clicks of a buyer have begun, and wait for the row, before either can write.
#[rstest]
#[case::pessimistic("pessimistic", 1, KEEPS)]
#[case::optimistic("optimistic", 1, KEEPS)]
#[case::conditional_update("conditional-update", 1, KEEPS)]
#[case::look_up_before_lock("mutants/look-up-before-lock", 1, DUPLICATES)]
#[case::not_exists("mutants/not-exists", 1, DUPLICATES)]
#[tokio::test]
async fn a_sale_keeps_its_guarantee_if_two_clicks_wait_for_the_row(
    #[case] name: &str,
    #[case] _instances: usize,
    #[case] expected: Promises,
) {
    let runner = ScheduleRunner::of(strategy(name)).await.unwrap();
    let pool = runner.environment().database().pool(1).await.unwrap();
    let mut schedule = runner.sale(2).await.unwrap();
    let first = schedule.buyer("Ann");
    let second = schedule.click(first);

    let holder = lock_row(&pool, schedule.sale()).await;
    schedule.run_until_blocked(first).await.unwrap();
    schedule.run_until_blocked(second).await.unwrap();
    holder.commit().await.unwrap();
    schedule.step(first).await.unwrap(); // resumes, with the row
    schedule.run_all_to_completion().await.unwrap();

    let verdict = judge(&schedule.history().await.unwrap());
    let conclusion = verdict.conclude(&required(expected));
    let kept = matches!(conclusion, Conclusion::AsPromised);
    assert!(kept, "lv2/{name}: {conclusion}\n\n{}\n{verdict}", schedule.trace());
    assert_eq!(strategy(name).guarantee.single_instance, expected);
}

/// The buyer of one sale waits; the buyer of another does not notice.
#[rstest]
#[case::mutex("mutex")]
#[case::pessimistic("pessimistic")]
#[case::optimistic("optimistic")]
#[case::conditional_update("conditional-update")]
#[tokio::test]
async fn the_buyers_of_one_sale_do_not_wait_for_those_of_another(#[case] name: &str) {
    let runner = ScheduleRunner::of(strategy(name)).await.unwrap();
    let pool = runner.environment().database().pool(1).await.unwrap();
    let (mut one, mut other) = (runner.sale(1).await.unwrap(), runner.sale(1).await.unwrap());
    let (ann, bob) = (one.buyer("Ann"), other.buyer("Bob"));

    let holder = lock_row(&pool, one.sale()).await;
    one.run_until_blocked(ann).await.unwrap();
    other.run_to_completion(bob).await.unwrap();
    holder.commit().await.unwrap();
    one.run_to_completion(ann).await.unwrap();

    for schedule in [one, other] {
        let history = schedule.history().await.unwrap();
        let verdict = judge(&history);
        assert!(verdict.findings.is_empty(), "{}\n{verdict}", schedule.trace());
        assert_eq!(verdict.tally.sold, 1);
    }
}
