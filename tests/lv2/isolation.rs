//! What the book says of Postgres itself: stricter isolation levels, and two rows locked in two orders.

use super::{
    schedules::{TWO_BUYERS, TWO_CLICKS, none_broken},
    *,
};

/// Above READ COMMITTED the second of two writers is ended with an error, and nothing is sold on a
/// stale read. The buyer is told that the outcome is unknown: no strategy here retries that error.
#[rstest]
#[case::pessimistic("pessimistic")]
#[case::optimistic("optimistic")]
#[tokio::test]
async fn at_a_stricter_isolation_level_an_overtaken_transaction_ends_with_an_error(
    #[case] name: &str,
    #[values("repeatable read", "serializable")] level: &str,
) {
    let settings = [("default_transaction_isolation", level)];
    let runner = ScheduleRunner::with_settings(strategy(name), &settings).await.unwrap();
    for scenario in [TWO_BUYERS, TWO_CLICKS] {
        let explored = runner.explore(scenario).await.unwrap();
        none_broken(&explored);
        let indeterminate = explored
            .answers
            .iter()
            .filter(|answers| answers.contains(&Answer::Indeterminate));
        let (indeterminate, interleavings) = (indeterminate.count(), explored.interleavings);
        println!("{name}, {level}: an error in {indeterminate} of {interleavings} interleavings");
        assert!(indeterminate > 0, "no transaction was ended with an error");
    }
}

/// Two connections to a database with the sales 1 and 2.
async fn two_sales() -> (TestEnvironment, PgPool) {
    let environment = TestEnvironment::shared(strategy("pessimistic")).await.unwrap();
    let pool = environment.database().pool(3).await.unwrap();
    sqlx::query("insert into sale (id, name, capacity, stock) values (1, 'one', 1, 1), (2, 'other', 1, 1)")
        .execute(&pool)
        .await
        .unwrap();
    (environment, pool)
}

/// Locks the rows of these sales in the order of their ids.
async fn lock(tx: &mut PgTransaction<'_>, sales: &[SaleId]) -> sqlx::Result<()> {
    let locked = sqlx::query("select from sale where id = any($1) order by id for update").bind(sales);
    locked.execute(&mut **tx).await.map(drop)
}

async fn somebody_waits(pool: &PgPool) {
    until("a transaction waits for a row", async || {
        let waiting = sqlx::query_scalar(
            "select count(*)
               from pg_stat_activity
              where datname = current_database()
                and wait_event_type = 'Lock'",
        );
        let waiting: i64 = waiting.fetch_one(pool).await.unwrap();
        waiting > 0
    })
    .await;
}

#[tokio::test]
async fn two_rows_locked_in_two_orders_are_a_deadlock_and_postgres_ends_one_transaction() {
    /// SQLSTATE `deadlock_detected`.
    const DEADLOCK: &str = "40P01";

    let (_environment, pool) = two_sales().await;
    let (mut ann, mut bob) = (pool.begin().await.unwrap(), pool.begin().await.unwrap());
    lock(&mut ann, &[1]).await.unwrap();
    lock(&mut bob, &[2]).await.unwrap();
    let anns = tokio::spawn(async move {
        let second = lock(&mut ann, &[2]).await;
        (second, ann)
    });
    somebody_waits(&pool).await;
    let bobs = lock(&mut bob, &[1]).await;
    let (anns, _ann) = anns.await.unwrap();
    let ended: Vec<_> = [anns, bobs].into_iter().filter_map(Result::err).collect();
    let codes: Vec<_> = ended
        .iter()
        .map(|error| error.as_database_error().unwrap().code())
        .collect();
    assert_eq!(codes, [Some(DEADLOCK.into())]);
}

#[tokio::test]
async fn two_rows_locked_in_one_order_are_no_deadlock() {
    let (_environment, pool) = two_sales().await;
    let (mut ann, mut bob) = (pool.begin().await.unwrap(), pool.begin().await.unwrap());
    lock(&mut ann, &[2, 1]).await.unwrap();
    let bobs = tokio::spawn(async move { lock(&mut bob, &[1, 2]).await });
    somebody_waits(&pool).await;
    ann.commit().await.unwrap();
    bobs.await.unwrap().unwrap();
}
