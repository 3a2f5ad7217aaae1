//! Rate limiting: a flood is refused before its orders are accepted, and no repeat of an accepted
//! order is.

use std::{num::NonZeroU32, time::Instant};

use box_office::{
    Database, Improvements,
    Invariant::{NoFalseRefusal, NothingInvented},
    ProblemKind, ReserveError, Steps, StrategyMetrics,
};
use futures_util::future::join_all;
use harness::{
    assert_after_fault, assert_failure_mode,
    history::{Answer, Refused},
    rush::SALE,
    test_server::TestServer,
    until,
};
use lv4_kafka::pipeline::{MAX_BUYERS, MAX_LOOKUPS, RateLimit};
use rstest::rstest;
use uuid::Uuid;

use crate::{
    ablation::{
        Improvement::{Off, On},
        record,
    },
    fixture::{Breaks, Expected, Fixture, Kept, TIMEOUT, kill_instance, metric, order, strategy},
};

/// The requests of the flood.
const FLOOD: u32 = 200;

/// The limit of one buyer, in requests a second.
const LIMIT: u32 = 5;

/// The buyer who floods, and those who send one request each.
const FLOODER: i64 = 1;
const OTHERS: std::ops::RangeInclusive<i64> = 2..=11;

const PER_BUYER: &[(&str, &str)] = &[("RATE_LIMIT_PER_BUYER", "5")];

/// What a flood of one buyer did to a server.
struct Flooded {
    /// Orders of the flooding buyer that were accepted, and those that were answered 429.
    accepted: u32,
    limited: u32,
    /// The most that a limit of [`LIMIT`] lets pass in the time that it took.
    bound: u32,
    /// Orders of the other buyers that were accepted.
    others: usize,
    /// Messages in the topic, and what the server counts as over the limit.
    messages: i64,
    counted: i64,
    verdict: harness::judge::Verdict,
}

/// One buyer sends [`FLOOD`] orders at once, each under its own key; the others send one each,
/// meanwhile.
async fn flood(name: &str, settings: &[(&'static str, &str)]) -> Flooded {
    let fixture = Fixture::new(name).await;
    let server = fixture.start_instance(settings).await;
    // More tickets than orders: every "sold out" is false.
    server.create_rush_sale(FLOOD + 100).await.unwrap();
    let began = Instant::now();
    let flooding = (0..FLOOD).map(|number| {
        let (fixture, server) = (&fixture, &server);
        async move {
            fixture
                .history
                .reserve_under(server, FLOODER, &format!("key-{number}"))
                .await
        }
    });
    let others = OTHERS.map(|buyer| fixture.history.reserve(&server, buyer));
    let (flooding, others) = tokio::join!(join_all(flooding), join_all(others));
    let took = began.elapsed().as_secs_f64();
    let count = |matching: fn(&Answer) -> bool| flooding.iter().filter(|answer| matching(answer)).count() as u32;
    let accepted = |answer: &Answer| matches!(answer, Answer::Accepted { .. });

    fixture.wait_until_processed().await;
    let flooded = Flooded {
        accepted: count(|answer| matches!(answer, Answer::Accepted { .. })),
        limited: count(|answer| *answer == Answer::Refused(Refused::RateLimited)),
        bound: LIMIT + (f64::from(LIMIT) * took).ceil() as u32,
        others: others.iter().filter(|answer| accepted(answer)).count(),
        messages: fixture.total_committed().await,
        counted: metric(&server, "oversold_rate_limited_total").await.unwrap_or(0),
        verdict: fixture.verdict(&server, TIMEOUT).await,
    };
    println!(
        "{name} {settings:?}: {} accepted of {FLOOD}, {} limited, bound {}, in {took:.2} s",
        flooded.accepted, flooded.limited, flooded.bound
    );
    server.stop().await.unwrap();
    flooded
}

// ANCHOR: ablation
/// The ablation: without the limit every order of the flood is a message and a decision. With it, no
/// more than the limit lets pass, and the others do not notice.
#[rstest]
#[case::locked("locked")]
#[case::single_writer("single-writer")]
#[tokio::test]
async fn a_flood_of_one_buyer_is_accepted_up_to_the_limit_and_the_others_are_served(#[case] name: &str) {
    let off = flood(name, &[]).await;
    assert_eq!(
        (off.accepted, off.limited, off.counted),
        (FLOOD, 0, 0),
        "the flood did not strike"
    );

    let on = flood(name, PER_BUYER).await;
    assert!(
        on.accepted >= LIMIT && on.accepted <= on.bound,
        "{} were accepted",
        on.accepted
    );
    assert_eq!(on.accepted + on.limited, FLOOD);
    for (improvement, flooded) in [(Off, &off), (On, &on)] {
        record(
            "rate-limit",
            improvement,
            name,
            format!("{} of {FLOOD} accepted", flooded.accepted),
        );
    }
    for (flooded, what) in [(&off, "off"), (&on, "on")] {
        assert_eq!(flooded.others, OTHERS.count(), "{what}: other buyers were refused");
        // Of what was not accepted there is no message.
        assert_eq!(
            flooded.messages,
            i64::from(flooded.accepted) + OTHERS.count() as i64,
            "{what}"
        );
        assert_eq!(flooded.counted, i64::from(flooded.limited), "{what}: the metric");
        assert_after_fault(strategy(name), &flooded.verdict, &[]);
    }
}
// ANCHOR_END: ablation

/// The flood is told about its own requests, and nothing about the sale.
#[tokio::test]
async fn a_flood_catches_a_429_that_is_answered_as_sold_out() {
    let flooded = flood("mutants/rate-limited-is-sold-out", PER_BUYER).await;
    assert_after_fault(
        strategy("mutants/rate-limited-is-sold-out"),
        &flooded.verdict,
        &[NoFalseRefusal],
    );
}

/// All that a client needs to come back at the right time.
#[tokio::test]
async fn a_429_says_which_limit_and_when_to_come_back() {
    let fixture = Fixture::new("single-writer").await;
    let server = fixture
        .start_instance(&[("RATE_LIMIT", "50"), ("RATE_LIMIT_PER_BUYER", "1")])
        .await;
    server.create_rush_sale(10).await.unwrap();
    over_the_limit(&fixture, &server, FLOODER).await;
    let answered = server.reserve(SALE, FLOODER, None).await.unwrap();
    answered.is(ProblemKind::RateLimited).unwrap();
    let header = |name: &str| answered.headers.get(name).map(|value| value.to_str().unwrap());
    assert_eq!(header("retry-after"), Some("1"));
    assert_eq!(
        header("ratelimit-policy"),
        Some(r#""buyer";q=1;w=1, "overall";q=50;w=1"#)
    );
    assert_eq!(header("ratelimit"), Some(r#""buyer";r=0;t=1"#));
    // An order for a sale that does not exist counts as well: to find out costs a query.
    let unknown = server.reserve(99, FLOODER, Some("unknown")).await.unwrap();
    assert!(unknown.is(ProblemKind::RateLimited).is_ok() || unknown.is(ProblemKind::UnknownSale).is_ok());
    server.stop().await.unwrap();
}

/// Buyers who send one order each are held to the limit of all. Whoever is over it has no row.
#[rstest]
#[case::locked("locked", Kept)]
#[case::single_writer("single-writer", Kept)]
#[case::produced_before_the_limit("mutants/rate-limit-after-produce", Breaks(&[NothingInvented]))]
#[tokio::test]
async fn a_flood_of_many_buyers_is_accepted_up_to_the_limit_of_all(#[case] name: &str, #[case] expected: Expected) {
    const LIMIT: u32 = 20;
    let fixture = Fixture::new(name).await;
    let server = fixture.start_instance(&[("RATE_LIMIT", "20")]).await;
    server.create_rush_sale(1000).await.unwrap();
    let began = Instant::now();
    let answers = join_all((1..=i64::from(FLOOD)).map(|buyer| fixture.history.reserve(&server, buyer))).await;
    let bound = LIMIT + (f64::from(LIMIT) * began.elapsed().as_secs_f64()).ceil() as u32;
    let accepted = answers
        .iter()
        .filter(|answer| matches!(answer, Answer::Accepted { .. }));
    let accepted = accepted.count() as u32;
    assert!(
        (LIMIT..=bound).contains(&accepted),
        "{accepted} were accepted, at most {bound} may be"
    );
    let limited = metric(&server, r#"oversold_rate_limited_total{scope="overall"}"#).await;
    assert_eq!(limited, Some(i64::from(FLOOD - accepted)));
    fixture.wait_until_processed().await;
    fixture.assert_outcome(&server, &[], expected).await;
    server.stop().await.unwrap();
}

/// Sends orders of this buyer, each under a new key, until one is over the limit.
async fn over_the_limit(fixture: &Fixture, server: &TestServer, buyer: i64) {
    until("an order is over the limit", async || {
        let key = Uuid::new_v4().to_string();
        let answer = fixture.history.reserve_under(server, buyer, &key).await;
        answer == Answer::Refused(Refused::RateLimited)
    })
    .await;
}

/// What a repeat of the buyer's first order is answered right after an order over the limit.
async fn repeat(fixture: &Fixture, server: &TestServer, buyer: i64) -> Answer {
    over_the_limit(fixture, server, buyer).await;
    fixture.history.reserve(server, buyer).await
}

/// A repeat that is accepted as this reservation.
fn accepted_as(reservation: Uuid) -> Answer {
    Answer::Accepted {
        reservation,
        ending: None,
    }
}

/// A buyer who repeats what was accepted is told what became of it, however many new orders they
/// have sent: by the instance that accepted it at once, and by any other once it is decided.
#[rstest]
#[case::locked("locked", true)]
#[case::single_writer("single-writer", true)]
#[case::mutant("mutants/repeat-is-rate-limited", false)]
#[tokio::test]
async fn a_repeat_of_an_accepted_order_is_not_refused(#[case] name: &str, #[case] keeps: bool) {
    const SETTINGS: &[(&str, &str)] = &[("RATE_LIMIT_PER_BUYER", "1")];
    let fixture = Fixture::new(name).await;
    let acceptor = fixture
        .start_instance(&[("RATE_LIMIT_PER_BUYER", "1"), ("KAFKA_CONSUMERS", "0")])
        .await;
    acceptor.create_rush_sale(100).await.unwrap();
    let accepted = fixture.accept(&acceptor, FLOODER).await;

    let mut answers = vec![];
    for _ in 0..5 {
        answers.push(repeat(&fixture, &acceptor, FLOODER).await);
    }
    let known = answers.iter().all(|answer| *answer == accepted_as(accepted));
    assert_eq!(known, keeps, "not decided: {answers:?}");
    kill_instance(&acceptor).await;

    // An instance that has not accepted it reads its row.
    let other = fixture.start_instance(SETTINGS).await;
    fixture.wait_until_processed().await;
    let mut answers = vec![];
    for _ in 0..5 {
        answers.push(repeat(&fixture, &other, FLOODER).await);
    }
    let known = answers.iter().all(|answer| *answer == accepted_as(accepted));
    assert_eq!(known, keeps, "decided, after a restart: {answers:?}");
    if keeps {
        fixture.wait_until_processed().await;
        assert_after_fault(fixture.strategy, &fixture.verdict(&other, TIMEOUT).await, &[]);
    } else {
        assert_failure_mode(fixture.strategy, &[]);
    }
    other.stop().await.unwrap();
}

/// The stated limit: an order that another instance has accepted and that is not decided yet is
/// known to its message only. A 429 is not final: the same key is told the truth later.
#[tokio::test]
async fn a_repeat_elsewhere_of_an_undecided_order_may_be_refused_and_loses_nothing() {
    const SETTINGS: &[(&str, &str)] = &[("RATE_LIMIT_PER_BUYER", "1"), ("KAFKA_CONSUMERS", "0")];
    let fixture = Fixture::new("single-writer").await;
    let first = fixture.start_instance(SETTINGS).await;
    first.create_rush_sale(100).await.unwrap();
    let second = fixture.start_instance(SETTINGS).await;
    let accepted = fixture.accept(&first, FLOODER).await;
    until("a repeat is over the limit", async || {
        repeat(&fixture, &second, FLOODER).await == Answer::Refused(Refused::RateLimited)
    })
    .await;
    let consumer = fixture.start_instance(&[]).await;
    fixture.wait_until_processed().await;
    until("the buyer is told", async || {
        repeat(&fixture, &second, FLOODER).await == accepted_as(accepted)
    })
    .await;
    fixture.wait_until_processed().await;
    assert_after_fault(fixture.strategy, &fixture.verdict(&consumer, TIMEOUT).await, &[]);
    for server in [first, second, consumer] {
        server.stop().await.unwrap();
    }
}

/// What is over the limit does not become load on the database instead.
#[rstest]
#[case::single_writer("single-writer", true)]
#[case::mutant("mutants/row-read-for-each-refusal", false)]
#[tokio::test]
async fn a_flood_over_the_limit_does_not_read_the_rows_for_each_request(#[case] name: &str, #[case] keeps: bool) {
    let fixture = Fixture::new(name).await;
    // No consumer: nobody else reads the rows.
    let server = fixture
        .start_instance(&[("RATE_LIMIT", "1"), ("KAFKA_CONSUMERS", "0")])
        .await;
    server.create_rush_sale(1000).await.unwrap();
    let began = Instant::now();
    // Each is another buyer: none is held to the look-ups of one.
    let answers = join_all((1..=600).map(|buyer| fixture.history.reserve(&server, buyer))).await;
    let limited = answers.iter().filter(|answer| matches!(answer, Answer::Refused(_)));
    let limited = limited.count() as i64;
    let bound = f64::from(MAX_LOOKUPS.get()) * (1.0 + began.elapsed().as_secs_f64());
    let bound = bound.ceil() as i64;
    assert!(
        limited > bound,
        "the flood did not strike: {limited} over the limit, {bound} may be looked up"
    );
    // A connection reports what it has read when it is closed.
    server.stop().await.unwrap();
    let mut reads = 0;
    until("the reads are reported", async || {
        reads = sqlx::query_scalar(
            "select coalesce(seq_scan, 0) + coalesce(idx_scan, 0)
               from pg_stat_user_tables
              where relname = 'reservation'",
        )
        .fetch_one(&fixture.pool)
        .await
        .unwrap();
        reads > 0
    })
    .await;
    println!("{name}: {reads} reads for {limited} requests over the limit, at most {bound} may be");
    assert_eq!(reads <= bound, keeps, "{reads} reads, at most {bound} may be");
}

/// A million distinct buyers do not take memory without bound, nor is one of them refused for it.
#[tokio::test]
async fn a_million_distinct_buyers_do_not_take_memory_without_bound() {
    let metrics = StrategyMetrics::default();
    let database = Database::lazy("postgres://127.0.0.1:1/nowhere".parse().unwrap(), 1);
    let limit = RateLimit::new(Some(NonZeroU32::MIN), None, database, &metrics).unwrap();
    for buyer in 0..1_000_000_i64 {
        let id = Uuid::from_u128(buyer.unsigned_abs().into());
        let admitted = limit.admit(&order(SALE, buyer), id).await;
        assert!(admitted.is_ok(), "buyer {buyer}: {admitted:?}");
    }
    let buyers = metrics.rate_limit_buyers.get();
    assert!(buyers <= MAX_BUYERS as i64, "{buyers} buyers are counted one by one");
}

/// The table of buyers is bounded also where a strategy uses it.
#[rstest]
#[case::single_writer("single-writer", true)]
#[case::mutant("mutants/unbounded-buyers", false)]
#[tokio::test]
async fn more_buyers_than_the_table_has_places_are_not_counted(#[case] name: &str, #[case] keeps: bool) {
    let fixture = Fixture::new(name).await;
    fixture.start_acceptor(1).await.stop().await.unwrap();
    let mut context = fixture.context().await;
    context.improvements = Improvements {
        rate_limit_per_buyer: Some(NonZeroU32::MIN),
        rate_limit: Some(NonZeroU32::MIN),
        ..Improvements::default()
    };
    let buyers = context.metrics.rate_limit_buyers.clone();
    let reserve = (fixture.strategy.open)(context).await.unwrap();
    for buyer in 0..MAX_BUYERS as i64 + 1000 {
        // Over the limit of all buyers, none over their own.
        let answered = reserve.reserve(&order(SALE, buyer), &Steps::default()).await;
        match answered {
            Ok(_) => {}
            Err(ReserveError::RateLimited(limited)) => assert_eq!(limited.exceeded, "overall"),
            Err(other) => panic!("buyer {buyer}: {other:?}"),
        }
    }
    reserve.close().await;
    let buyers = buyers.get();
    assert_eq!(
        buyers <= MAX_BUYERS as i64,
        keeps,
        "{buyers} buyers are counted one by one"
    );
}
