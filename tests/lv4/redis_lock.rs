//! The Redis lock of `locked`: unknown outcomes, late releases, expired leases.

use harness::{
    DelayedCommits, assert_after_fault,
    backends::{self, Redis, Reply},
    proxy::{Fault, Proxy},
    rush::SALE,
    until,
};
use lv4_kafka::pipeline::{OrderMessage, PARTITIONS};
use rstest::rstest;

use crate::fixture::{
    Expected::{self, Breaks, Kept},
    Fixture, OBSERVATION_TIME, OVERSOLD, TIMEOUT, happens_within, kill_instance, ok, order, strategy,
};

/// The connection to Postgres breaks with a commit in flight, and then the consumer is killed. The
/// next consumer must not decide on the state from before that commit.
#[rstest]
#[case::locked("locked", Kept)]
#[case::unlock_after_unknown_commit("mutants/unlock-after-unknown-commit", OVERSOLD)]
#[tokio::test]
async fn a_commit_that_nobody_knows_the_end_of_is_covered_by_its_lock(#[case] name: &str, #[case] expected: Expected) {
    let fixture = Fixture::new(name).await.with_short_session();
    let (redis, postgres) = tokio::join!(backends::redis(), backends::postgres());
    let (redis, postgres) = (redis.unwrap(), postgres.unwrap());
    let proxy = Proxy::before(postgres.report().address.clone()).await.unwrap();
    let acceptor = fixture.start_acceptor(1).await;
    let held = DelayedCommits::on(&fixture.environment).await.unwrap();
    let orders = fixture.accept_all(&acceptor, 1..=2).await;
    let lock = format!("{}lock:sale:{SALE}", fixture.environment.prefix().unwrap());
    let taken = async || redis.command(&["EXISTS", &lock]).await.unwrap() == Reply::Int(1);

    let proxied_url = proxy.url_through(&fixture.environment.database().url());
    // The lease must not expire before the test deletes the lock.
    let lease = ("LOCK_LEASE_MS", "60000");
    let first = fixture.start_instance(&[("DATABASE_URL", &*proxied_url), lease]).await;
    until("the fault did not strike: no commit is in flight", async || {
        held.has_struck().await.unwrap()
    })
    .await;
    proxy.inject(Fault::CloseAll);
    until("the fault did not strike: no connection was closed", async || {
        proxy.has_struck()
    })
    .await;
    match expected {
        Kept => assert!(!happens_within(OBSERVATION_TIME, async || !taken().await).await),
        Breaks(_) => until("the lock is released", async || !taken().await).await,
    }
    kill_instance(&first).await;
    if expected != Kept {
        // The killed consumer may hold the lock for its other order.
        redis.command(&["DEL", &lock]).await.unwrap();
    }
    let second = fixture.start_instance(&[lease]).await;
    match expected {
        // Two orders concurrently, and one of them retried: the lock is not free.
        Kept => fixture.wait_for_attempts(3).await,
        Breaks(_) => {
            until("the second waits for the row", async || {
                held.waiting("transactionid tuple").await.unwrap() > 0
            })
            .await
        }
    }
    held.release().await.unwrap();
    redis.command(&["DEL", &lock]).await.unwrap();
    fixture.wait_until_processed().await;

    fixture.assert_outcome(&second, &orders, expected).await;
    acceptor.stop().await.unwrap();
    second.stop().await.unwrap();
}

/// Redis grants the lock after a pause, when the client has given up waiting for the answer.
#[tokio::test]
async fn a_lock_granted_after_the_timeout_is_released() {
    let strategy = strategy("locked");
    let redis = Redis::private().await.unwrap();
    let (postgres, kafka) = tokio::join!(backends::postgres(), backends::kafka());
    let fixture = Fixture::on(strategy, &postgres.unwrap(), &redis, &kafka.unwrap()).await;
    let acceptor = fixture.start_acceptor(1).await;
    // The lease does not expire during the test.
    let consumer = fixture.start_instance(&[("LOCK_LEASE_MS", "600000")]).await;
    let ids = fixture.ids().await;
    ok(&redis, &["CLIENT", "PAUSE", "60000", "WRITE"]).await;
    let orders = [fixture.append_order(&ids, 1).await];
    // Twice: the first attempt ended with a timeout.
    fixture.wait_for_attempts(2).await;
    assert_eq!(fixture.rows().await, 0, "the fault did not strike: a lock was acquired");
    ok(&redis, &["CLIENT", "UNPAUSE"]).await;
    fixture.wait_until_processed().await;

    fixture.assert_outcome(&consumer, &orders, Kept).await;
    acceptor.stop().await.unwrap();
    consumer.stop().await.unwrap();
}

/// No bytes pass on the open connection to Redis any more, and nobody closes it. Redis answers new
/// connections.
#[tokio::test]
async fn a_connection_to_redis_that_fell_silent_is_replaced() {
    let fixture = Fixture::new("locked").await;
    let redis = backends::redis().await.unwrap();
    let proxy = Proxy::before(redis.report().address.clone()).await.unwrap();
    let acceptor = fixture.start_acceptor(2).await;
    let proxied_url = proxy.url_through(redis.url());
    let consumer = fixture.start_instance(&[("REDIS_URL", &*proxied_url)]).await;
    let mut orders = fixture.accept_all(&acceptor, 1..=1).await;
    fixture.wait_until_processed().await;
    assert!(proxy.silence_open_connections().await > 0, "the fault did not strike");
    orders.extend(fixture.accept_all(&acceptor, 2..=2).await);
    fixture.wait_until_processed().await;
    assert!(
        proxy.chunks_discarded() > 0,
        "the fault did not strike: the silent connection was not tried"
    );

    fixture.assert_outcome(&consumer, &orders, Kept).await;
    acceptor.stop().await.unwrap();
    consumer.stop().await.unwrap();
}

/// The lease has expired before the release, and another owner holds the lock by then.
#[tokio::test]
async fn a_late_release_leaves_the_lock_to_its_next_holder() {
    let fixture = Fixture::new("locked").await;
    let redis = backends::redis().await.unwrap();
    let acceptor = fixture.start_acceptor(1).await;
    let orders = fixture.accept_all(&acceptor, 1..=1).await;
    let first = fixture.start_stopped_at("committed").await;
    let lock = format!("{}lock:sale:{SALE}", fixture.environment.prefix().unwrap());
    until("the lease has expired", async || {
        redis.command(&["EXISTS", &lock]).await.unwrap() == Reply::Int(0)
    })
    .await;
    let taken = redis
        .command(&["SET", &lock, "another owner", "NX", "PX", "60000"])
        .await
        .unwrap();
    assert_eq!(taken, Reply::Status("OK".to_owned()));
    first.resume().await.unwrap();
    fixture.wait_until_processed().await;

    let holder = redis.command(&["GET", &lock]).await.unwrap();
    assert_eq!(holder, Reply::Bulk("another owner".to_owned()));
    fixture.assert_outcome(&acceptor, &orders, Kept).await;
    acceptor.stop().await.unwrap();
    first.stop().await.unwrap();
}

/// The declared failure mode of a lock with a lease. No consumer is expelled: Ann's order is
/// decided on a stock that was read before her lease expired.
#[tokio::test]
async fn a_consumer_frozen_past_its_lease_sells_a_ticket_again() {
    let fixture = Fixture::new("locked").await;
    let redis = backends::redis().await.unwrap();
    let acceptor = fixture.start_acceptor(1).await;
    // Long enough that no consumer is expelled.
    let session = ("KAFKA_SESSION_MS", "10000");
    let lease = ("LOCK_LEASE_MS", "500");
    let first = fixture
        .start_instance(&[session, lease, ("OVERSOLD_STOP_AT", "decided to sell#1")])
        .await;
    fixture.wait_until_shared_by(1).await;
    let firsts = fixture.group_members().await.into_keys().next().unwrap();
    let second = fixture.start_instance(&[session, lease]).await;
    fixture.wait_until_shared_by(2).await;
    let members = fixture.group_members().await;
    let of_first = members[&firsts][0];
    let of_second = (0..PARTITIONS).find(|partition| !members[&firsts].contains(partition));

    let ids = fixture.ids().await;
    let [ann, bob] = [1, 2].map(|buyer| {
        let id = ids.for_order(&order(SALE, buyer));
        fixture.history.record_accepted(buyer, id);
        OrderMessage::new(id, &order(SALE, buyer)).to_bytes()
    });
    fixture.produce(of_first, &[&ann]).await.unwrap();
    first
        .wait_until_stopped(TIMEOUT)
        .await
        .expect("the fault did not strike");
    let lock = format!("{}lock:sale:{SALE}", fixture.environment.prefix().unwrap());
    until("the lease has expired", async || {
        redis.command(&["EXISTS", &lock]).await.unwrap() == Reply::Int(0)
    })
    .await;
    fixture.produce(of_second.unwrap(), &[&bob]).await.unwrap();
    until("Bob has the ticket", async || fixture.rows().await == 1).await;
    first.resume().await.unwrap();
    until("Ann has it, too", async || fixture.rows().await == 2).await;

    assert_eq!(fixture.group_members().await, members, "a consumer was expelled");
    let Breaks(limit) = OVERSOLD else { unreachable!() };
    assert_after_fault(fixture.strategy, &fixture.verdict(&acceptor, TIMEOUT).await, limit);
    acceptor.stop().await.unwrap();
    first.stop().await.unwrap();
    second.stop().await.unwrap();
}
