//! Retries of `optimistic` under contention.

use super::*;

/// 64 buyers contend for one row, each on its own connection.
fn storm() -> Rush {
    Rush {
        capacity: 32,
        buyers: 64,
        work: Duration::from_millis(1),
        pool_size: Some(64),
        traced: true,
        ..Rush::default()
    }
}

#[tokio::test]
async fn in_a_version_storm_retries_are_bounded_and_every_ticket_is_sold() {
    let report = sold_in_a_version_storm(storm()).await;

    assert_eq!(report.verdict.tally.sold, 32, "{}", report.verdict);
    let most = report.history.requests.iter().map(|request| {
        let steps = request.steps.iter();
        steps.filter(|step| step.step == "overtaken").count()
    });
    let most = most.max().unwrap();
    println!("{} retries, at most {most} of one request", report.retries);
    assert!(most < 200, "one request tried {most} times");
}

#[tokio::test]
#[should_panic(expected = "did not strike")]
async fn a_buyer_alone_is_no_version_storm() {
    let alone = Rush { buyers: 1, ..storm() };
    sold_in_a_version_storm(alone).await;
}

/// Runs the rush, asserts that the contract is kept, and that conflicts occurred: Postgres rolled
/// back more transactions than requests were refused.
async fn sold_in_a_version_storm(rush: Rush) -> Report {
    let strategy = strategy("optimistic");
    let environment = TestEnvironment::shared(strategy).await.unwrap();
    let report = rush.run_on(&environment, &program(), &LEVEL, strategy).await.unwrap();
    assert_eq!(
        report.verdict.conclude(&required(KEEPS)),
        Conclusion::AsPromised,
        "{}",
        report.verdict
    );

    let pool = environment.database().pool(1).await.unwrap();
    // A Postgres backend reports its statistics with a delay, and at the latest before it exits.
    until("the servers' connections to be gone", async || {
        let others: i64 = sqlx::query_scalar(
            "select count(*)
               from pg_stat_activity
              where datname = current_database()
                and backend_type = 'client backend'
                and pid <> pg_backend_pid()",
        )
        .fetch_one(&pool)
        .await
        .unwrap();
        others == 0
    })
    .await;
    let rolled_back: i64 = sqlx::query_scalar(
        "select xact_rollback
           from pg_stat_database
          where datname = current_database()",
    )
    .fetch_one(&pool)
    .await
    .unwrap();
    let refused = report.answers.sold_out + report.answers.already_reserved;
    println!(
        "{rolled_back} rolled back, {refused} refused, {} retries",
        report.retries
    );
    let overtaken = rolled_back.cast_unsigned() - refused;
    assert!(overtaken > 0, "the fault did not strike: no request was overtaken");
    assert_eq!(report.retries, overtaken, "not every retry was counted");
    report
}

#[tokio::test]
async fn a_request_overtaken_too_often_is_indeterminate_and_never_sold_out() {
    let runner = ScheduleRunner::of(strategy("optimistic")).await.unwrap();
    let pool = runner.environment().database().pool(1).await.unwrap();
    let mut schedule = runner.sale(1).await.unwrap();
    let ann = schedule.buyer("Ann");

    let mut overtaken = 0;
    loop {
        schedule.run_towards(ann, "decided to sell").await.unwrap();
        if schedule.movable().is_empty() {
            break;
        }
        sqlx::query("update sale set version = version + 1 where id = $1")
            .bind(schedule.sale())
            .execute(&pool)
            .await
            .unwrap();
        overtaken += 1;
    }

    println!("overtaken {overtaken} times");
    let history = schedule.history().await.unwrap();
    assert_eq!(
        history.requests[0].answer,
        Answer::Indeterminate,
        "{}",
        schedule.trace()
    );
    assert_eq!(history.rows.as_deref(), Some(&[][..]), "{}", schedule.trace());
    assert_eq!(history.header.stock, Some(1));
    assert!(overtaken > 1, "it tried only once");
}

#[tokio::test]
async fn in_a_version_storm_a_retry_that_reuses_its_read_oversells() {
    contract(&program(), &LEVEL, "mutants/retry-reuses-the-read", storm(), OVERSELLS).await;
}
