//! A sale with payments under one fault after another: instances die all the time, and each backend
//! is away once.

use std::{collections::VecDeque, env, time::Duration};

use futures_util::{StreamExt, stream};
use harness::{
    backends::{Durability, Kafka, Postgres, Private, Redis},
    history::{Answer, Entry},
    rush::SALE,
    test_server::TestServer,
};
use tokio::time::{Instant, MissedTickBehavior, interval, sleep, sleep_until};

use super::{
    fixture::{Fixture, TIMEOUT, assert_unreachable, happens_within, host_and_port, kill_instance, strategy},
    outbox_relay::assert_all_published,
    saga::Shop,
};

/// The number of orders, unless `OVERSOLD_SOAK_ORDERS` says otherwise: one for each buyer.
const ORDERS: u32 = 3000;

/// How many orders are sent a second.
const RATE: u32 = 200;

/// An instance dies at this interval.
const LIFE: Duration = Duration::from_secs(5);

/// How long a backend is away.
const AWAY: Duration = Duration::from_secs(1);

/// How long buyers wait before they repeat a request that has no answer.
const REPEAT_AFTER: Duration = Duration::from_millis(200);

/// How many buyers wait for their answer at a time.
const MAX_WAITING: usize = 256;

/// The instances that decide orders.
const INSTANCES: usize = 2;

/// A ticket is held for longer than a backend is away, and a payment is asked for again soon.
const HOLD: [(&str, &str); 2] = [("HOLD_MS", "8000"), ("PAYMENT_TIMEOUT_MS", "500")];

/// What each instance runs with, besides payments.
const IMPROVEMENTS: [(&str, &str); 2] = [("CIRCUIT_BREAKER", "true"), ("OUTBOX_RELAY", "true")];

/// A sale and the servers that it is made on.
struct Soak {
    shop: Shop,
    postgres: Private,
    kafka: Private<Kafka>,
}

impl Soak {
    /// Every buyer orders, and repeats the request until it is accepted.
    async fn buyers(&self, orders: u32) {
        let mut tick = interval(Duration::from_secs(1) / RATE);
        tick.set_missed_tick_behavior(MissedTickBehavior::Burst);
        let ticks = stream::unfold(tick, async |mut tick| {
            tick.tick().await;
            Some(((), tick))
        });
        let buyers = stream::iter(1..=i64::from(orders)).zip(ticks);
        buyers
            .for_each_concurrent(MAX_WAITING, async |(buyer, ())| {
                let accepted = happens_within(3 * TIMEOUT, async || {
                    let answer = self.shop.fixture.history.reserve(&self.shop.acceptor, buyer).await;
                    let accepted = matches!(answer, Answer::Accepted { .. });
                    if !accepted {
                        sleep(REPEAT_AFTER).await;
                    }
                    accepted
                });
                assert!(accepted.await, "the order of buyer {buyer} is not accepted");
            })
            .await;
    }

    async fn start_instance(&self) -> TestServer {
        self.shop.start_instance(&IMPROVEMENTS).await
    }

    /// An instance dies in each period, and a backend is away in each of the first three.
    async fn faults(&self, periods: u32) -> VecDeque<TestServer> {
        let mut instances = VecDeque::new();
        for _ in 0..INSTANCES {
            instances.push_back(self.start_instance().await);
        }
        let started = Instant::now();
        for period in 0..periods {
            sleep_until(started + LIFE * period + LIFE / 2).await;
            let oldest = instances.pop_front().unwrap();
            self.shop.fixture.history.record_fault("an instance is killed");
            kill_instance(&oldest).await;
            match period {
                0 => {
                    self.shop.fixture.history.record_fault("the payment service hangs");
                    self.shop.payments.freeze().await;
                    sleep(AWAY).await;
                    self.shop.payments.thaw().await;
                }
                1 => {
                    self.shop.fixture.history.record_fault("Postgres is away");
                    let address = host_and_port(&self.shop.fixture.environment.database().url());
                    self.postgres.stop().await.unwrap();
                    assert_unreachable(&address).await;
                    sleep(AWAY).await;
                    self.postgres.start().await.unwrap();
                }
                2 => {
                    self.shop.fixture.history.record_fault("the broker bounces");
                    self.kafka.stop().await.unwrap();
                    assert_unreachable(self.kafka.bootstrap_servers()).await;
                    self.kafka.start().await.unwrap();
                }
                _ => {}
            }
            instances.push_back(self.start_instance().await);
        }
        self.shop.fixture.history.record_recovery();
        instances
    }
}

/// Every order that was accepted reaches exactly one final state, every charge is a ticket or is
/// refunded, nearly all tickets are sold in the end, and every event is published.
#[tokio::test]
async fn a_sale_outlives_one_fault_after_another() {
    let orders = env::var("OVERSOLD_SOAK_ORDERS").map_or(ORDERS, |orders| orders.parse().unwrap());
    let periods = (orders / RATE).div_ceil(LIFE.as_secs().try_into().unwrap()).max(3);
    // As many tickets as orders that are paid for at once, so that some go to what comes back.
    let capacity = orders * 4 / 5;
    let kafka = Kafka::private().await.unwrap();
    let postgres = Postgres::private(Durability::Fast).await.unwrap();
    let redis = Redis::find().await.unwrap();
    let fixture = Fixture::on(strategy("single-writer"), &postgres, &redis, &kafka).await;
    let mix = "approve=86,decline=8,hang=2,answer-late=2,twice=1,fail=1";
    let shop = Shop::open_on(fixture, capacity, &["--behave", mix, "--late-ms", "2000"], HOLD).await;
    let soak = Soak { shop, postgres, kafka };

    let started = Instant::now();
    let (instances, ()) = tokio::join!(soak.faults(periods), soak.buyers(orders));
    let shop = &soak.shop;
    // What the last holds wait for is their end.
    let quiet = happens_within(3 * TIMEOUT, async || {
        shop.fixture.lag().await == 0 && shop.unfinished().await == 0
    });
    assert!(quiet.await, "{} sagas are not finished", shop.unfinished().await);
    let took = started.elapsed();
    shop.judge(&[]).await;

    let payments = shop.payments.ledger().await;
    let count = |entry| payments.iter().filter(|payment| payment.entry == entry).count();
    let sale = shop.acceptor.sale(SALE).await.unwrap();
    println!(
        "{orders} orders in {took:.0?}, {periods} instances killed: {} sold of {capacity}, {} charges, {} refunds, {} calls",
        sale.reserved,
        count(Entry::Charge),
        count(Entry::Refund),
        shop.payments.calls().await,
    );
    assert_eq!(
        count(Entry::Charge) - count(Entry::Refund),
        usize::try_from(sale.reserved).unwrap()
    );
    assert!(
        10 * sale.reserved >= 9 * i64::from(capacity),
        "{} sold of {capacity}, and more buyers than that would have paid",
        sale.reserved
    );
    assert!(
        count(Entry::Refund) > 0,
        "nobody was refunded: the faults of the payments did not strike"
    );
    assert_all_published(&shop.fixture).await;
    for instance in instances {
        instance.stop().await.unwrap();
    }
}
