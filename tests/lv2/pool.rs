//! The connection pool: many callers on few connections.

use super::*;

// ANCHOR: pool
/// Far fewer connections than callers.
fn on_a_pool_of_eight() -> Rush {
    Rush {
        capacity: 100,
        buyers: 1000,
        commit: Duration::from_millis(1),
        pool_size: Some(8),
        traced: true,
        ..Rush::default()
    }
}

#[tokio::test]
async fn a_thousand_callers_share_a_pool_of_eight() {
    kept_over_a_pool_of_eight(on_a_pool_of_eight()).await;
}
// ANCHOR_END: pool

#[tokio::test]
async fn a_thousand_callers_over_a_pool_of_eight_are_too_many_for_a_lock_that_does_nothing() {
    contract(
        &program(),
        &LEVEL,
        "mutants/for-update-does-nothing",
        on_a_pool_of_eight(),
        OVERSELLS,
    )
    .await;
}

#[tokio::test]
#[should_panic(expected = "did not strike")]
async fn eight_callers_leave_a_pool_of_eight_with_nobody_waiting() {
    let rush = Rush {
        buyers: 8,
        ..on_a_pool_of_eight()
    };
    kept_over_a_pool_of_eight(rush).await;
}

/// Runs the rush, asserts that the contract is kept, and that far more callers were concurrent than
/// Postgres saw connections.
async fn kept_over_a_pool_of_eight(rush: Rush) -> Report {
    let strategy = strategy("pessimistic");
    let environment = TestEnvironment::shared(strategy).await.unwrap();
    let (over, is_over) = oneshot::channel();
    let selling = async {
        let report = rush.run_on(&environment, &program(), &LEVEL, strategy).await.unwrap();
        over.send(()).unwrap();
        report
    };
    let (report, seen) = tokio::join!(selling, most_connections(environment.database(), is_over));
    assert_eq!(
        report.verdict.conclude(&required(KEEPS)),
        Conclusion::AsPromised,
        "{}",
        report.verdict
    );
    let callers = report.verdict.coverage.greatest_overlap;
    println!("{callers} callers at once, {seen} connections");
    assert!(
        callers > 100,
        "the fault did not strike: {callers} callers at once on {seen} connections"
    );
    assert_eq!(seen, 8, "{callers} callers at once, and not on 8 connections");
    report
}

/// The greatest number of connections of the server that Postgres sees until the rush is over.
async fn most_connections(database: &Database, mut is_over: oneshot::Receiver<()>) -> i64 {
    let pool = database.pool(1).await.unwrap();
    let mut most = 0;
    while is_over.try_recv().is_err() {
        let seen: i64 = sqlx::query_scalar(
            "select count(*)
               from pg_stat_activity
              where datname = current_database()
                and application_name = 'lv2/pessimistic 1'",
        )
        .fetch_one(&pool)
        .await
        .unwrap();
        most = most.max(seen);
        sleep(Duration::from_millis(1)).await;
    }
    most
}

/// The time-out of the pool, and then that of the row lock, which starts once a connection is
/// acquired.
const WAITS_AT_MOST: Duration = Duration::from_secs(5 + 5);

#[tokio::test]
async fn a_request_that_waits_for_the_pool_beyond_its_time_out_ends_as_indeterminate() {
    let rush = Rush {
        capacity: 24,
        buyers: 200,
        work: Duration::from_millis(300),
        commit: Duration::ZERO,
        ..on_a_pool_of_eight()
    };
    let report = kept_over_a_pool_of_eight(rush).await;

    let waited_of = |request: &Request| {
        let answered_us = request.answered_us.expect("everybody is answered");
        Duration::from_micros(answered_us - request.sent_us)
    };
    let requests = &report.history.requests;
    let indeterminate = requests
        .iter()
        .filter(|request| request.answer == Answer::Indeterminate);
    let indeterminate: Vec<Duration> = indeterminate.map(waited_of).collect();
    println!(
        "{} were indeterminate, after {:?}",
        indeterminate.len(),
        indeterminate.iter().max()
    );
    assert!(
        !indeterminate.is_empty(),
        "the fault did not strike: no request waited too long"
    );
    for waited in indeterminate {
        assert!(waited >= Duration::from_secs(5), "indeterminate after {waited:?}");
    }
    for request in requests {
        assert!(waited_of(request) < WAITS_AT_MOST, "{request:?}");
    }
}

// ANCHOR: second-connection
#[tokio::test]
async fn a_second_connection_taken_while_one_is_held_starves_the_pool() {
    let rush = Rush {
        buyers: 100,
        pool_size: Some(8),
        timeout: Duration::from_secs(6),
        ..Rush::default()
    };
    let strategy = strategy("mutants/second-connection");
    let report = rush.run(&program(), &LEVEL, strategy).await.unwrap();
    let conclusion = report.verdict.conclude(&required(STARVES));
    assert_eq!(conclusion, Conclusion::AsPromised, "{}", report.verdict);
}
// ANCHOR_END: second-connection
