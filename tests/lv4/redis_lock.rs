//! The Redis lock of `locked`: unknown outcomes, late releases, expired leases.

use harness::{
    DelayedCommits, assert_after_fault,
    backends::{self, Redis, Reply, TestEnvironment},
    proxy::{Cut, Proxy},
    rush::SALE,
    until,
};
use lv4_kafka::pipeline::{Ids, OrderMessage, PARTITIONS};
use rstest::rstest;

use crate::fixture::{
    Expected::{self, Breaks, Kept},
    OVERSOLD, PATIENCE, Place, TIME_FOR_A_MISTAKE, killed, order, seen_within, strategy,
};

/// The connection to Postgres breaks with a commit on its way, and then its consumer dies. Who comes after it must not decide on what was there before.
#[rstest]
#[case::locked("locked", Kept)]
#[case::commit_not_covered("mutants/commit-not-covered", OVERSOLD)]
#[tokio::test]
async fn a_commit_that_nobody_knows_the_end_of_is_covered_by_its_lock(#[case] name: &str, #[case] expected: Expected) {
    let place = Place::of(name).await.where_deaths_are_noticed();
    let (redis, postgres) = tokio::join!(backends::redis(), backends::postgres());
    let (redis, postgres) = (redis.unwrap(), postgres.unwrap());
    let proxy = Proxy::before(postgres.report().address.clone()).await.unwrap();
    let acceptor = place.acceptor(1).await;
    let held = DelayedCommits::on(&place.stand).await.unwrap();
    let orders = place.accepted(&acceptor, 1..=2).await;
    let lock = format!("{}lock:sale:{SALE}", place.stand.prefix().unwrap());
    let taken = async || redis.command(&["EXISTS", &lock]).await.unwrap() == Reply::Int(1);

    let behind = proxy.instead_of(&place.stand.database().url());
    // It ends when the test says so.
    let lease = ("LOCK_LEASE_MS", "60000");
    let first = place.instance(&[("DATABASE_URL", &*behind), lease]).await;
    until("the fault did not strike: nobody commits", async || {
        held.have_struck().await.unwrap()
    })
    .await;
    proxy.cuts(Cut::Everything);
    until("the fault did not strike: nobody came through the proxy", async || {
        proxy.has_struck()
    })
    .await;
    match expected {
        Kept => assert!(!seen_within(TIME_FOR_A_MISTAKE, async || !taken().await).await),
        Breaks(_) => until("the lock is given back", async || !taken().await).await,
    }
    killed(&first).await;
    if expected != Kept {
        // It may have died with the lock of its other order.
        redis.command(&["DEL", &lock]).await.unwrap();
    }
    let second = place.instance(&[lease]).await;
    match expected {
        // Two orders at once, and one of them again: it got no lock.
        Kept => place.is_tried(3).await,
        Breaks(_) => {
            until("the second waits for the row", async || {
                held.waiting("transactionid tuple").await.unwrap() > 0
            })
            .await
        }
    }
    held.go_on().await.unwrap();
    redis.command(&["DEL", &lock]).await.unwrap();
    place.quiet().await;

    place.hold(&second, &orders, expected).await;
    acceptor.stop().await.unwrap();
    second.stop().await.unwrap();
}

/// Redis carries out what it was asked once it goes on, and by then nobody waits for the answer.
#[tokio::test]
async fn a_lock_whose_answer_came_too_late_is_given_back() {
    let strategy = strategy("locked");
    let redis = Redis::private().await.unwrap();
    let (postgres, kafka) = tokio::join!(backends::postgres(), backends::kafka());
    let stand = TestEnvironment::on(&postgres.unwrap(), Some(&*redis), strategy.schema)
        .await
        .unwrap()
        .and_kafka(Some(&*kafka.unwrap()));
    let place = Place::on(strategy, stand).await;
    let acceptor = place.acceptor(1).await;
    // It would not end while anybody looks.
    let decider = place.instance(&[("LOCK_LEASE_MS", "600000")]).await;
    let says = async |words: &[&str]| {
        let answer = redis.command(words).await.unwrap();
        assert_eq!(answer, Reply::Status("OK".to_owned()));
    };
    says(&["CLIENT", "PAUSE", "60000", "WRITE"]).await;
    let orders = place.accepted(&acceptor, 1..=1).await;
    // More than once: the first time the answer did not come in time.
    place.is_tried(2).await;
    assert_eq!(place.rows().await, 0, "the fault did not strike: it got a lock");
    says(&["CLIENT", "UNPAUSE"]).await;
    place.quiet().await;

    place.hold(&decider, &orders, Kept).await;
    acceptor.stop().await.unwrap();
    decider.stop().await.unwrap();
}

/// Its lease was over long before it gave it back, and somebody else has it by then.
#[tokio::test]
async fn a_lock_that_is_given_back_late_is_left_to_its_holder() {
    let place = Place::of("locked").await;
    let redis = backends::redis().await.unwrap();
    let acceptor = place.acceptor(1).await;
    let orders = place.accepted(&acceptor, 1..=1).await;
    let first = place.stops_at("committed").await;
    let lock = format!("{}lock:sale:{SALE}", place.stand.prefix().unwrap());
    until("the lease has ended", async || {
        redis.command(&["EXISTS", &lock]).await.unwrap() == Reply::Int(0)
    })
    .await;
    let taken = redis
        .command(&["SET", &lock, "somebody else", "NX", "PX", "60000"])
        .await
        .unwrap();
    assert_eq!(taken, Reply::Status("OK".to_owned()));
    first.goes_on().await.unwrap();
    place.quiet().await;

    let holder = redis.command(&["GET", &lock]).await.unwrap();
    assert_eq!(holder, Reply::Bulk("somebody else".to_owned()));
    place.hold(&acceptor, &orders, Kept).await;
    acceptor.stop().await.unwrap();
    first.stop().await.unwrap();
}

/// The stated limit of a lock with a lease, with everybody in the group: Ann's order is decided on what was read while she still had the lock.
#[tokio::test]
async fn a_consumer_frozen_past_its_lease_sells_what_somebody_else_has_sold() {
    let place = Place::of("locked").await;
    let redis = backends::redis().await.unwrap();
    let acceptor = place.acceptor(1).await;
    // Long enough to be missed by nobody.
    let session = ("KAFKA_SESSION_MS", "10000");
    let lease = ("LOCK_LEASE_MS", "500");
    let first = place
        .instance(&[session, lease, ("OVERSOLD_STOP_AT", "decided to sell#1")])
        .await;
    place.shared_by(1).await;
    let firsts = place.members().await.into_keys().next().unwrap();
    let second = place.instance(&[session, lease]).await;
    place.shared_by(2).await;
    let members = place.members().await;
    let of_first = members[&firsts][0];
    let of_second = (0..PARTITIONS).find(|partition| !members[&firsts].contains(partition));

    let ids = Ids::load(&place.pool).await.unwrap();
    let [ann, bob] = [1, 2].map(|buyer| {
        let id = ids.for_order(&order(SALE, buyer));
        place.ledger.accepted_by_hand(buyer, id);
        OrderMessage::new(id, &order(SALE, buyer)).to_bytes()
    });
    place.puts(of_first, &[&ann]).await.unwrap();
    first.stands_still(PATIENCE).await.expect("the fault did not strike");
    let lock = format!("{}lock:sale:{SALE}", place.stand.prefix().unwrap());
    until("the lease has ended", async || {
        redis.command(&["EXISTS", &lock]).await.unwrap() == Reply::Int(0)
    })
    .await;
    place.puts(of_second.unwrap(), &[&bob]).await.unwrap();
    until("Bob has the ticket", async || place.rows().await == 1).await;
    first.goes_on().await.unwrap();
    until("Ann has it, too", async || place.rows().await == 2).await;

    assert_eq!(place.members().await, members, "nobody was missed");
    let Breaks(limit) = OVERSOLD else { unreachable!() };
    assert_after_fault(place.strategy, &place.verdict(&acceptor, PATIENCE).await, limit);
    acceptor.stop().await.unwrap();
    first.stop().await.unwrap();
    second.stop().await.unwrap();
}
