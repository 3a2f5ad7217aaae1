//! Faults that strike a saga at its worst moment: a backend is away, the buyer cancels, the writer is
//! busy or is fenced.

use box_office::{
    Database,
    Invariant::{self, Conservation, NoOversell, NothingLost, PaidOnce, Progress},
    points,
};
use harness::{
    backends::{self, Durability, Kafka, Postgres},
    history::{
        Answer,
        Entry::{Charge, Refund},
    },
    rush::SALE,
    until,
};
use lv4_kafka::{pipeline::ReleaseCommand, saga::store};
use rstest::rstest;
use uuid::Uuid;

use super::{
    fixture::{Fixture, TIMEOUT, assert_unreachable, happens_within, host_and_port, kill_instance, metric, strategy},
    saga::{LONG_HOLD, PATIENT, Shop},
};

impl Shop {
    /// The buyer of a held order cancels it.
    async fn cancel(&self, order: Uuid) {
        let answer = self
            .acceptor
            .delete(&format!("/api/reservations/{order}"))
            .await
            .unwrap();
        assert!(matches!(answer.status.as_u16(), 200 | 202), "{}", answer.status);
    }

    /// Whether somebody waits for the sale's row behind one who waits already: the first in the queue
    /// has the lock on the tuple, and waits for a transaction.
    async fn waits_behind_the_writer(&self) -> bool {
        sqlx::query_scalar(
            "select exists (
                 select from pg_locks
                   join pg_database on pg_database.oid = database and datname = current_database()
                  where locktype = 'tuple' and relation = 'sale'::regclass and not granted)",
        )
        .fetch_one(&self.fixture.pool)
        .await
        .unwrap()
    }

    /// The state of an order's saga, how often its step was tried, and whether it is due again.
    async fn saga(&self, order: Uuid) -> (String, i32, bool) {
        sqlx::query_as("select state, attempts, due_at is not null from saga where reservation_id = $1")
            .bind(order)
            .fetch_one(&self.fixture.pool)
            .await
            .unwrap()
    }
}

/// An instance dies with a charge, or with a refund, that it has claimed. The claim lasts as long as the
/// payment service may take to answer: not as long as that of a release, which waits for the broker.
#[rstest]
#[case::charge(false)]
#[case::refund(true)]
#[tokio::test]
async fn what_a_dead_instance_was_to_ask_for_is_asked_for_soon(#[case] is_refund: bool) {
    let hold = [("HOLD_MS", "600000"), ("PAYMENT_TIMEOUT_MS", "1000")];
    let shop = Shop::open("single-writer", 1, &[], hold).await;
    let order = shop.order(1).await;
    let mut dying = shop.start_stopped_at("sagas claimed#1").await;
    shop.fixture.history.record_fault("an instance is killed");
    if is_refund {
        kill_instance(&dying).await;
        shop.cancel(order).await;
        // No instance is left that has consumers: the test is the writer.
        let mut tx = Database::from(shop.fixture.pool.clone()).begin().await.unwrap();
        store::release(&mut tx, &[order]).await.unwrap();
        tx.commit().await.unwrap();
        dying = shop.start_stopped_at("sagas claimed#1").await;
    }
    let (state, due_in_ms): (String, i64) = sqlx::query_as(
        "select state, (1000 * extract(epoch from due_at - clock_timestamp()))::bigint
           from saga
          where reservation_id = $1",
    )
    .bind(order)
    .fetch_one(&shop.fixture.pool)
    .await
    .unwrap();
    let (step, status) = match is_refund {
        false => ("charging", "confirmed"),
        true => ("released", "cancelled"),
    };
    assert_eq!(state, step, "the fault did not strike");
    assert!(
        due_in_ms <= 2000,
        "due in {due_in_ms} ms: the timeout is 1000 ms, and the margin as much"
    );
    kill_instance(&dying).await;
    let server = shop.start_instance(&[]).await;
    shop.wait_for_status(order, status).await;
    shop.fixture.history.record_recovery();
    shop.judge(&[]).await;
    server.stop().await.unwrap();
}

/// The buyer cancels when the money is taken and the answer is on its way. An instance dies at each step
/// of the way back; another one takes it up.
#[rstest]
#[case::release_claimed_and_not_commanded("sagas claimed", 2)]
#[case::release_commanded_and_not_stored("saga step taken", 1)]
#[case::release_stored("saga step stored", 1)]
#[case::the_release_is_not_committed(points::ROWS_WRITTEN, 2)]
#[case::refund_claimed_and_not_asked_for("sagas claimed", 3)]
#[case::refunded_and_not_stored("saga step taken", 2)]
#[case::refund_stored("saga step stored", 2)]
#[tokio::test]
async fn a_cancelled_saga_outlives_the_instance_that_took_its_last_step(#[case] point: &str, #[case] hit: u32) {
    let shop = Shop::open("single-writer", 1, &["--late-ms", "60000"], PATIENT).await;
    shop.payments.behave(1, "answer-late").await;
    let order = shop.order(1).await;
    let dying = shop
        .start_instance(&[("OVERSOLD_STOP_AT", &format!("{point}#{hit}"))])
        .await;
    until("the money is taken", async || {
        shop.payments.entries(order).await == [Charge]
    })
    .await;
    shop.cancel(order).await;
    dying
        .wait_until_stopped(TIMEOUT)
        .await
        .expect("the fault did not strike");
    shop.fixture.history.record_fault("an instance is killed");
    kill_instance(&dying).await;
    // As if its claims had expired.
    sqlx::query("update saga set due_at = clock_timestamp() where due_at is not null")
        .execute(&shop.fixture.pool)
        .await
        .unwrap();
    let server = shop.start_instance(&[]).await;
    shop.wait_for_status(order, "cancelled").await;
    shop.fixture.history.record_recovery();
    shop.judge(&[]).await;
    assert_eq!(shop.payments.entries(order).await, [Charge, Refund]);
    server.stop().await.unwrap();
}

/// The money is taken, and Postgres is away when that is to be stored. So the outcome is lost, and the
/// payment service is asked again.
#[rstest]
#[case::single_writer("single-writer", &[])]
#[case::no_idempotency_key("mutants/no-idempotency-key", &[PaidOnce])]
#[tokio::test]
async fn a_charge_is_made_once_though_postgres_is_away_when_it_is_to_be_stored(
    #[case] name: &str,
    #[case] breaks: &[Invariant],
) {
    let postgres = Postgres::private(Durability::Fast).await.unwrap();
    let (redis, kafka) = (backends::redis().await.unwrap(), backends::kafka().await.unwrap());
    let fixture = Fixture::on(strategy(name), &postgres, &redis, &kafka).await;
    // Long enough for every payment, and its claim expires soon.
    let hold = [("HOLD_MS", "600000"), ("PAYMENT_TIMEOUT_MS", "5000")];
    let shop = Shop::open_on(fixture, 1, &[], hold).await;
    let order = shop.order(1).await;
    let server = shop.start_stopped_at("saga step taken#1").await;
    assert_eq!(shop.payments.entries(order).await, [Charge], "the fault did not strike");
    assert_eq!(shop.status(order).await, "held", "the fault did not strike");
    shop.fixture.history.record_fault("Postgres is away");
    postgres.stop().await.unwrap();
    assert_unreachable(&host_and_port(&shop.fixture.environment.database().url())).await;
    server.resume().await.unwrap();
    until("the outcome could not be stored", async || {
        server.log().await.unwrap().contains("could not be stored")
    })
    .await;
    postgres.start().await.unwrap();
    shop.fixture.history.record_recovery();
    // Not before its claim has expired.
    until("the saga is finished", async || shop.unfinished().await == 0).await;
    assert_eq!(
        shop.payments.calls().await,
        2,
        "the fault did not strike: the first outcome was not lost"
    );
    shop.wait_for_status(order, "confirmed").await;
    shop.judge(breaks).await;
    server.stop().await.unwrap();
}

/// A payment is declined while Kafka is away, so the release cannot be commanded.
#[rstest]
#[case::single_writer("single-writer", &[])]
#[case::release_commanded_once("mutants/release-commanded-once", &[Conservation, NothingLost, Progress])]
#[tokio::test]
async fn a_ticket_comes_back_once_though_kafka_is_away_when_it_is_to_be_released(
    #[case] name: &str,
    #[case] breaks: &[Invariant],
) {
    let kafka = Kafka::private().await.unwrap();
    let (postgres, redis) = (backends::postgres().await.unwrap(), backends::redis().await.unwrap());
    let fixture = Fixture::on(strategy(name), &postgres, &redis, &kafka).await;
    let shop = Shop::open_on(fixture, 1, &[], LONG_HOLD).await;
    shop.payments.behave(1, "decline").await;
    shop.payments.freeze().await;
    let order = shop.order(1).await;
    let server = shop.start_instance(&[]).await;
    shop.wait_for_status(order, "held").await;
    shop.fixture.wait_until_processed().await;
    shop.fixture.history.record_fault("Kafka is away");
    kafka.stop().await.unwrap();
    assert_unreachable(kafka.bootstrap_servers()).await;
    shop.payments.thaw().await;
    // The first command has failed by then, after the producer's delivery timeout.
    let commanded_again = happens_within(2 * TIMEOUT, async || {
        let (state, attempts, is_due) = shop.saga(order).await;
        state == "releasing" && (attempts > 1 || !is_due)
    });
    assert!(commanded_again.await, "the release is not commanded again");
    assert_eq!(
        shop.acceptor.sale(SALE).await.unwrap().stock,
        0,
        "the fault did not strike"
    );
    kafka.start().await.unwrap();
    shop.fixture.history.record_recovery();
    // What is due again is due now: the delay grows with each attempt.
    sqlx::query("update saga set due_at = clock_timestamp() where state = 'releasing' and due_at is not null")
        .execute(&shop.fixture.pool)
        .await
        .unwrap();

    if breaks.is_empty() {
        shop.wait_for_status(order, "declined").await;
        let accepted = happens_within(TIMEOUT, async || {
            matches!(
                shop.fixture.history.reserve(&shop.acceptor, 2).await,
                Answer::Accepted { .. }
            )
        });
        assert!(accepted.await, "Kafka is back, and no order is accepted");
        until("the ticket is sold again", async || {
            shop.payments.ledger().await.len() == 1
        })
        .await;
    }
    shop.judge(breaks).await;
    server.stop().await.unwrap();
}

/// A ticket comes back while the writer sells another: it has read the stock, and waits to write it.
#[rstest]
#[case::single_writer("single-writer", &[])]
#[case::release_bypasses_writer("mutants/release-bypasses-writer", &[NoOversell, Conservation])]
#[tokio::test]
async fn a_ticket_that_comes_back_and_one_that_is_sold_are_both_counted(
    #[case] name: &str,
    #[case] breaks: &[Invariant],
) {
    let shop = Shop::open(name, 2, &[], LONG_HOLD).await;
    shop.payments.behave(1, "hang").await;
    let held = shop.order(1).await;
    let server = shop.start_instance(&[]).await;
    shop.wait_for_status(held, "held").await;
    shop.fixture.wait_until_processed().await;

    let other = shop.fixture.environment.database().pool(1).await.unwrap();
    let mut lock = other.begin().await.unwrap();
    sqlx::query("select from sale for update")
        .execute(&mut *lock)
        .await
        .unwrap();
    shop.order(2).await;
    until("the writer waits to write the stock", async || {
        shop.fixture.lock_waits().await == 1
    })
    .await;
    shop.cancel(held).await;
    until("the release waits for the writer", async || {
        // Behind it in the partition, or, of the mutant, behind it for the same row.
        shop.fixture.lag().await == 2 || shop.waits_behind_the_writer().await
    })
    .await;
    lock.rollback().await.unwrap();
    shop.wait_for_status(held, "cancelled").await;
    shop.fixture.wait_until_processed().await;

    for buyer in 3..=4 {
        shop.order(buyer).await;
    }
    shop.judge(breaks).await;
    server.stop().await.unwrap();
}

/// The buyer cancels when the money is taken and the server does not know it yet. The ticket is sold
/// to another. Then the answer to the charge arrives, or never does.
#[rstest]
#[case::answered_late("single-writer", "answer-late", &[])]
#[case::not_answered("single-writer", "fail", &[])]
#[case::late_approval_confirms(
    "mutants/late-approval-confirms", "answer-late", &[NoOversell, Conservation, PaidOnce]
)]
#[case::cancelled_without_refund("mutants/cancelled-without-refund", "fail", &[PaidOnce])]
#[tokio::test]
async fn a_buyer_who_cancels_while_the_charge_is_on_its_way_gets_the_money_back(
    #[case] name: &str,
    #[case] behaviour: &'static str,
    #[case] breaks: &[Invariant],
) {
    let shop = Shop::open(name, 1, &["--late-ms", "5000"], PATIENT).await;
    shop.payments.behave(1, behaviour).await;
    let order = shop.order(1).await;
    let server = shop.start_instance(&[]).await;
    until("the money is taken", async || {
        shop.payments.entries(order).await == [Charge]
    })
    .await;
    assert_eq!(shop.status(order).await, "held", "the fault did not strike");
    shop.cancel(order).await;
    shop.wait_for_status(order, "cancelled").await;
    let next = shop.order(2).await;
    shop.wait_for_status(next, "confirmed").await;
    if behaviour == "answer-late" {
        // A charge and a refund are answered by then. The late answer is one more, and makes a refund
        // due again: the service repeats its answer.
        until("the late answer is stored", async || {
            let calls = metric(&server, "oversold_payment_calls_total").await;
            calls >= Some(4) || shop.status(order).await == "confirmed"
        })
        .await;
    }
    shop.judge(breaks).await;
    if breaks.is_empty() {
        assert_eq!(shop.payments.entries(order).await, [Charge, Refund]);
        assert_eq!(shop.payments.entries(next).await, [Charge]);
    }
    kill_instance(&server).await;
}

/// A consumer is frozen with a batch that has one order. Its successor has the same order, and a
/// release behind it, and is frozen with its locks. Both resume: the first waits for the locks.
#[tokio::test]
async fn a_fenced_consumer_and_its_successor_do_not_deadlock_over_a_release() {
    let shop = Shop::open("single-writer", 2, &[], LONG_HOLD).await;
    shop.payments.behave(1, "hang").await;
    let cancelled = shop.order(1).await;
    let server = shop.start_instance(&[]).await;
    shop.wait_for_status(cancelled, "held").await;
    shop.fixture.wait_until_processed().await;
    server.stop().await.unwrap();
    shop.cancel(cancelled).await;
    // The test itself sends the command, when the first consumer has its batch.
    sqlx::query("update saga set due_at = clock_timestamp() + interval '1 hour'")
        .execute(&shop.fixture.pool)
        .await
        .unwrap();

    let next = shop.order(2).await;
    let first = shop.start_stopped_at("batch decided#1").await;
    shop.fixture
        .produce_command(&ReleaseCommand::new(cancelled, SALE))
        .await;
    let second = shop.start_stopped_at("batch decided#1").await;
    let locks_the_sale: bool = sqlx::query_scalar(
        "select exists (
             select from pg_locks
               join pg_database on pg_database.oid = database and datname = current_database()
              where relation = 'sale'::regclass and mode = 'RowExclusiveLock')",
    )
    .fetch_one(&shop.fixture.pool)
    .await
    .unwrap();
    assert!(
        locks_the_sale,
        "the fault did not strike: there is no release in the batch"
    );
    first.resume().await.unwrap();
    until("the first consumer waits for the second", async || {
        shop.fixture.lock_waits().await > 0
    })
    .await;
    second.resume().await.unwrap();
    shop.wait_for_status(cancelled, "cancelled").await;
    shop.wait_for_status(next, "confirmed").await;
    shop.judge(&[]).await;
    first.stop().await.unwrap();
    second.stop().await.unwrap();

    // Connections report what they have counted when they are closed, at the latest.
    let deadlocks: i64 =
        sqlx::query_scalar("select deadlocks from pg_stat_database where datname = current_database()")
            .fetch_one(&shop.fixture.pool)
            .await
            .unwrap();
    assert_eq!(deadlocks, 0);
}
