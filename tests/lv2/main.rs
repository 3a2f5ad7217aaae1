//! LV.2: the contract that LV.1 breaks, kept; and where each strategy stops keeping it.

#![allow(clippy::unwrap_used)]

mod mutants;

use std::{collections::HashSet, net::SocketAddr, time::Duration};

use box_office::{
    Invariant::{self, Conservation, NoDuplicate, NoOversell, NoUndersell, OneAnswer, Progress},
    ProblemKind, Promises, Strategy,
};
use harness::{
    DelayedCommits, assert_after_fault, assert_declared, assert_failure_mode,
    backends::{self, Database, Durability, Postgres, TestEnvironment},
    contract,
    history::{Answer, Refused, Request},
    history_recorder::HistoryRecorder,
    http_contract::{refuses_bad_input, sells_refuses_and_repeats},
    instance_faults,
    judge::{Conclusion, judge},
    proxy::{Fault, Proxy},
    required,
    rush::{Program, Report, Rush, SALE},
    schedule::{
        Exploration, Scenario, ScheduleRunner, cancelled_after_every_poll, disconnected_at_every_point,
        never_cancelled, never_disconnected,
    },
    slow_clients::withstands_idle_and_slow_clients,
    test_server::TestServer,
    until,
};
use lv2_db_lock::{BARE, LEVEL};
use rstest::rstest;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    sync::oneshot,
    task::JoinSet,
    time::{sleep, timeout},
};

fn program() -> Program {
    Program::new(env!("CARGO_BIN_EXE_lv2-db-lock"))
}

fn strategy(name: &str) -> &'static Strategy {
    LEVEL
        .strategy(name)
        .unwrap_or_else(|| panic!("LV.2 has no strategy {name}"))
}

const KEEPS: Promises = Promises::ALL_KEPT;
const OVERSELLS: Promises = Promises::ALL_KEPT
    .breaks(&[NoOversell, Conservation])
    .leaves_open(&[NoDuplicate, OneAnswer]);
const DUPLICATES: Promises = Promises::ALL_KEPT.breaks(&[NoDuplicate]).leaves_open(&[OneAnswer]);
const STARVES: Promises = Promises::ALL_KEPT.breaks(&[Progress]).leaves_open(&[NoUndersell]);

// ANCHOR: contract
#[rstest]
// ANCHOR: mutex-cases
#[case::mutex("mutex", 1, KEEPS)]
#[case::mutex_ends_at_its_process("mutex", 2, OVERSELLS)]
#[case::mutex_on_three("mutex", 3, OVERSELLS)]
// ANCHOR_END: mutex-cases
// ANCHOR: pessimistic-cases
#[case::pessimistic("pessimistic", 1, KEEPS)]
#[case::pessimistic_on_three("pessimistic", 3, KEEPS)]
// ANCHOR_END: pessimistic-cases
// ANCHOR: optimistic-cases
#[case::optimistic("optimistic", 1, KEEPS)]
#[case::optimistic_on_three("optimistic", 3, KEEPS)]
// ANCHOR_END: optimistic-cases
// ANCHOR: conditional-update-cases
#[case::conditional_update("conditional-update", 1, KEEPS)]
#[case::conditional_update_on_three("conditional-update", 3, KEEPS)]
// ANCHOR_END: conditional-update-cases
#[case::mutex_does_nothing("mutants/mutex-does-nothing", 1, OVERSELLS)]
#[case::mutex_wrong_key("mutants/mutex-wrong-key", 1, OVERSELLS)]
#[case::guard_before_commit("mutants/guard-before-commit", 1, OVERSELLS)]
#[case::for_update_does_nothing("mutants/for-update-does-nothing", 1, OVERSELLS)]
#[case::for_update_wrong_key("mutants/for-update-wrong-key", 1, OVERSELLS)]
#[case::look_up_before_lock("mutants/look-up-before-lock", 1, DUPLICATES)]
#[case::version_not_compared("mutants/version-not-compared", 1, OVERSELLS)]
#[case::retry_reuses_the_read("mutants/retry-reuses-the-read", 1, OVERSELLS)]
#[case::transaction_left_open_if_nobody_cancels("mutants/transaction-left-open", 1, KEEPS)]
#[tokio::test]
async fn a_sale_keeps_its_guarantee(#[case] name: &str, #[case] instances: usize, #[case] expected: Promises) {
    let rush = Rush {
        // As long as a disk would make it: a lock that is given back before the commit must be seen to be.
        commit: Duration::from_millis(1),
        ..Rush::for_strategy(strategy(name)).instances(instances)
    };
    contract(&program(), &LEVEL, name, rush, expected).await;
}
// ANCHOR_END: contract

#[test]
fn every_strategy_declares_what_the_table_says() {
    assert_declared(
        &LEVEL,
        &[
            ("mutex", KEEPS, OVERSELLS),
            ("pessimistic", KEEPS, KEEPS),
            ("optimistic", KEEPS, KEEPS),
            ("conditional-update", KEEPS, KEEPS),
            ("mutants/mutex-does-nothing", OVERSELLS, OVERSELLS),
            ("mutants/mutex-wrong-key", OVERSELLS, OVERSELLS),
            ("mutants/guard-before-commit", OVERSELLS, OVERSELLS),
            ("mutants/for-update-does-nothing", OVERSELLS, OVERSELLS),
            ("mutants/for-update-wrong-key", OVERSELLS, OVERSELLS),
            ("mutants/look-up-before-lock", DUPLICATES, DUPLICATES),
            ("mutants/second-connection", STARVES, STARVES),
            ("mutants/transaction-left-open", KEEPS, OVERSELLS),
            ("mutants/version-not-compared", OVERSELLS, OVERSELLS),
            ("mutants/retry-reuses-the-read", OVERSELLS, OVERSELLS),
        ],
    );
}

// ANCHOR: orders
/// Where nothing happens that another request could see: holding a request there only tries the same order again.
const PASSES: &[&str] = &["mutex taken", "transaction begun", "reservation written", "committed"];

/// Two requests, every feasible order.
const TWO_BUYERS: Scenario = Scenario {
    capacity: 1,
    clicks: &[1, 1],
    passes: PASSES,
    preemptions: None,
};
/// One buyer clicks twice, every feasible order.
const TWO_CLICKS: Scenario = Scenario {
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

/// The last number: fewer orders than this of two buyers, and the strategy passes a point unseen.
#[rstest]
#[case::mutex("mutex", true, 26)]
#[case::pessimistic("pessimistic", true, 8)]
#[case::optimistic("optimistic", true, 50)]
#[case::conditional_update("conditional-update", false, 2)]
#[tokio::test]
async fn no_order_of_steps_breaks_it(#[case] name: &str, #[case] waits: bool, #[case] at_least: usize) {
    let rehearsal = ScheduleRunner::of(strategy(name)).await.unwrap();
    for scenario in [TWO_BUYERS, TWO_CLICKS, THREE] {
        let explored = rehearsal.explore(scenario).await.unwrap();
        println!(
            "{name}, {scenario:?}: {} orders, {} with a wait",
            explored.orders, explored.blocked
        );
        assert!(explored.orders >= at_least, "only {} orders", explored.orders);
        assert_eq!(explored.blocked > 0, waits, "{} orders with a wait", explored.blocked);
        none_broken(&explored);
    }
}
// ANCHOR_END: orders

fn none_broken(explored: &Exploration) {
    if let Some(broken) = explored.broken.first() {
        panic!(
            "{} of {} orders break it, such as\n{}\n{}",
            explored.broken.len(),
            explored.orders,
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
    let rehearsal = ScheduleRunner::of(strategy(name)).await.unwrap();

    let explored = rehearsal.explore_under_one_key(TWO_CLICKS).await.unwrap();
    println!("{name}, one buyer: {} orders", explored.orders);
    none_broken(&explored);
    for answers in &explored.answers {
        assert!(matches!(answers[0], Answer::Confirmed { .. }), "{answers:?}");
        assert_eq!(answers[0], answers[1]);
    }

    let two_tickets = Scenario {
        capacity: 2,
        ..TWO_BUYERS
    };
    let explored = rehearsal.explore_under_one_key(two_tickets).await.unwrap();
    println!("{name}, two buyers: {} orders", explored.orders);
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

#[tokio::test]
async fn some_order_of_two_requests_under_one_key_breaks_a_look_up_before_the_lock() {
    let rehearsal = ScheduleRunner::of(strategy("mutants/look-up-before-lock"))
        .await
        .unwrap();
    for scenario in [
        TWO_CLICKS,
        Scenario {
            capacity: 2,
            ..TWO_BUYERS
        },
    ] {
        let explored = rehearsal.explore_under_one_key(scenario).await.unwrap();
        let broken = explored.broken.iter().filter(|order| order.verdict.breaks(NoDuplicate));
        assert!(broken.count() > 0, "none of {} orders breaks it", explored.orders);
    }
}

#[rstest]
#[case::mutex_does_nothing("mutants/mutex-does-nothing", TWO_BUYERS)]
#[case::mutex_wrong_key("mutants/mutex-wrong-key", TWO_BUYERS)]
#[case::guard_before_commit("mutants/guard-before-commit", TWO_BUYERS)]
#[case::for_update_does_nothing("mutants/for-update-does-nothing", TWO_BUYERS)]
#[case::for_update_wrong_key("mutants/for-update-wrong-key", TWO_BUYERS)]
#[case::look_up_before_lock("mutants/look-up-before-lock", TWO_CLICKS)]
#[case::version_not_compared("mutants/version-not-compared", TWO_BUYERS)]
#[case::retry_reuses_the_read("mutants/retry-reuses-the-read", TWO_BUYERS)]
#[tokio::test]
async fn some_order_of_steps_breaks_its_broken_twin(#[case] name: &str, #[case] scenario: Scenario) {
    let rehearsal = ScheduleRunner::of(strategy(name)).await.unwrap();
    let explored = rehearsal.explore(scenario).await.unwrap();
    println!(
        "{name}: {} of {} orders break it",
        explored.broken.len(),
        explored.orders
    );
    assert!(
        !explored.broken.is_empty(),
        "none of {} orders breaks it",
        explored.orders
    );
}

// ANCHOR: guard
#[tokio::test]
async fn a_guard_dropped_before_the_commit_sells_the_last_ticket_twice() {
    let rehearsal = ScheduleRunner::of(strategy("mutants/guard-before-commit"))
        .await
        .unwrap();
    let mut script = rehearsal.sale(1).await.unwrap();
    let (ann, bob) = (script.buyer("Ann"), script.buyer("Bob"));

    script.run_until(ann, "lock released").await.unwrap();
    a_transaction_is_open(&rehearsal).await; // Ann's
    script.run_until(bob, "decided to sell").await.unwrap(); // has read the stock that Ann has not committed yet
    script.run_to_completion(ann).await.unwrap();
    script.run_to_completion(bob).await.unwrap();

    let verdict = judge(&script.history().await.unwrap());
    assert!(verdict.breaks(NoOversell), "{}\n{verdict}", script.trace());
}
// ANCHOR_END: guard

/// Somebody's transaction is open while its request is held, as Postgres sees it.
async fn a_transaction_is_open(rehearsal: &ScheduleRunner) {
    let pool = rehearsal.environment().database().pool(1).await.unwrap();
    let open: i64 = sqlx::query_scalar(
        "select count(*)
           from pg_stat_activity
          where datname = current_database()
            and state = 'idle in transaction'",
    )
    .fetch_one(&pool)
    .await
    .unwrap();
    assert_eq!(open, 1, "the fault did not strike: nobody has still to commit");
}

#[tokio::test]
#[should_panic(expected = "did not strike")]
async fn a_guard_dropped_after_the_commit_leaves_nothing_to_strike() {
    let rehearsal = ScheduleRunner::of(strategy("mutex")).await.unwrap();
    let mut script = rehearsal.sale(1).await.unwrap();
    let ann = script.buyer("Ann");

    script.run_until(ann, "lock released").await.unwrap();
    a_transaction_is_open(&rehearsal).await;
}

// ANCHOR: guard-kept
#[tokio::test]
async fn a_guard_kept_until_the_commit_makes_the_next_buyer_wait() {
    let rehearsal = ScheduleRunner::of(strategy("mutex")).await.unwrap();
    let mut script = rehearsal.sale(1).await.unwrap();
    let (ann, bob) = (script.buyer("Ann"), script.buyer("Bob"));

    script.run_until(ann, "stock written").await.unwrap();
    script.run_until_blocked(bob).await.unwrap();
    script.run_to_completion(ann).await.unwrap();
    script.run_to_completion(bob).await.unwrap();

    let verdict = judge(&script.history().await.unwrap());
    assert!(verdict.findings.is_empty(), "{}\n{verdict}", script.trace());
}
// ANCHOR_END: guard-kept

// ANCHOR: fifty-clicks
/// One reservation, however often the buyer clicks at once.
#[rstest]
#[case::pessimistic("pessimistic", 3)]
#[case::optimistic("optimistic", 3)]
#[case::conditional_update("conditional-update", 3)]
#[case::mutex("mutex", 1)]
#[tokio::test]
async fn fifty_clicks_at_once_are_one_reservation(#[case] name: &str, #[case] instances: usize) {
    let report = contract(&program(), &LEVEL, name, fifty_clicks(instances), KEEPS).await;
    assert_eq!(report.verdict.tally.sold, 4);
}

#[rstest]
#[case::on_one(1)]
#[case::on_three(3)]
#[tokio::test]
async fn fifty_clicks_at_once_are_too_many_for_a_look_up_before_the_lock(#[case] instances: usize) {
    let rush = fifty_clicks(instances);
    contract(&program(), &LEVEL, "mutants/look-up-before-lock", rush, DUPLICATES).await;
}

fn fifty_clicks(instances: usize) -> Rush {
    Rush {
        buyers: 4,
        clicks: 50,
        instances,
        // While the first click sells, the others have long looked, where they are let.
        work: Duration::from_millis(50),
        ..Rush::default()
    }
}
// ANCHOR_END: fifty-clicks

// ANCHOR: many-tickets
#[tokio::test]
async fn a_mutex_on_two_instances_sells_one_buyer_many_tickets() {
    let report = one_buyer_clicks_at(2).await;
    assert!(report.verdict.breaks(NoDuplicate), "{}", report.verdict);
}

#[tokio::test]
#[should_panic(expected = "did not strike")]
async fn on_one_instance_there_is_no_second_mutex() {
    one_buyer_clicks_at(1).await;
}

async fn one_buyer_clicks_at(instances: usize) -> Report {
    let rush = Rush {
        buyers: 1,
        clicks: 50,
        instances,
        // Both instances are in their first reservation at the same time, even if one gets its click late.
        work: Duration::from_millis(100),
        ..Rush::default()
    };
    let report = rush.run(&program(), &LEVEL, strategy("mutex")).await.unwrap();
    let asked: HashSet<_> = report.sent_to.values().collect();
    assert_eq!(asked.len(), 2, "the fault did not strike: the clicks went to {asked:?}");
    report
}
// ANCHOR_END: many-tickets

// ANCHOR: pool
/// Fewer connections than callers, by far.
const POOL_OF_EIGHT: Rush = Rush {
    capacity: 100,
    buyers: 1000,
    clicks: 1,
    instances: 1,
    work: Duration::ZERO,
    commit: Duration::from_millis(1),
    pool_size: Some(8),
    timeout: Duration::from_secs(20),
    traced: true,
    faults: vec![],
};

#[tokio::test]
async fn a_thousand_callers_share_a_pool_of_eight() {
    kept_over_a_pool_of_eight(POOL_OF_EIGHT).await;
}
// ANCHOR_END: pool

#[tokio::test]
async fn a_thousand_callers_over_a_pool_of_eight_are_too_many_for_a_lock_that_does_nothing() {
    contract(
        &program(),
        &LEVEL,
        "mutants/for-update-does-nothing",
        POOL_OF_EIGHT,
        OVERSELLS,
    )
    .await;
}

#[tokio::test]
#[should_panic(expected = "did not strike")]
async fn eight_callers_leave_a_pool_of_eight_with_nobody_waiting() {
    let rush = Rush {
        buyers: 8,
        ..POOL_OF_EIGHT
    };
    kept_over_a_pool_of_eight(rush).await;
}

/// Runs the rush and keeps the contract, and the callers wait for the pool: there are many more of them than Postgres sees connections.
async fn kept_over_a_pool_of_eight(rush: Rush) -> Report {
    let strategy = strategy("pessimistic");
    let stand = TestEnvironment::shared(strategy).await.unwrap();
    let (over, is_over) = oneshot::channel();
    let selling = async {
        let report = rush.run_on(&stand, &program(), &LEVEL, strategy).await.unwrap();
        over.send(()).unwrap();
        report
    };
    let (report, seen) = tokio::join!(selling, most_connections(stand.database(), is_over));
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

/// How many connections of a server Postgres sees, at most, until the rush is over.
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

/// The pool's own deadline, and that of the row's lock, of which nobody who waits for a connection has had any yet.
const WAITS_AT_MOST: Duration = Duration::from_secs(5 + 5);

#[tokio::test]
async fn who_waits_for_the_pool_beyond_its_deadline_is_undecided_and_does_not_hang() {
    let rush = Rush {
        capacity: 24,
        buyers: 200,
        work: Duration::from_millis(300),
        commit: Duration::ZERO,
        ..POOL_OF_EIGHT
    };
    let report = kept_over_a_pool_of_eight(rush).await;

    let waited_of = |request: &Request| {
        let answered_us = request.answered_us.expect("everybody is answered");
        Duration::from_micros(answered_us - request.sent_us)
    };
    let requests = &report.history.requests;
    let undecided = requests
        .iter()
        .filter(|request| request.answer == Answer::Indeterminate);
    let undecided: Vec<Duration> = undecided.map(waited_of).collect();
    println!("{} were undecided, after {:?}", undecided.len(), undecided.iter().max());
    assert!(
        !undecided.is_empty(),
        "the fault did not strike: nobody waited too long"
    );
    for waited in undecided {
        assert!(waited >= Duration::from_secs(5), "undecided after {waited:?}");
    }
    for request in requests {
        assert!(waited_of(request) < WAITS_AT_MOST, "{request:?}");
    }
}

#[tokio::test]
async fn without_its_database_everybody_who_waits_for_the_mutex_is_undecided_in_time() {
    /// Whoever gets the mutex last waits as long for a connection.
    const IN_TIME: Duration = Duration::from_secs(5 + 5);
    /// What 50 answers may take besides waiting.
    const BESIDES: Duration = Duration::from_secs(5);

    let postgres = Postgres::private(Durability::Fast).await.unwrap();
    let stand = TestEnvironment::on(&postgres, None, BARE).await.unwrap();
    let talk = TestServer::start(&stand, &program(), &LEVEL, strategy("mutex"))
        .await
        .unwrap();
    talk.create_rush_sale(1).await.unwrap();

    postgres.stop().await.unwrap();
    let asking: JoinSet<_> = (1..=50).map(|buyer| status_of(talk.address(), buyer)).collect();
    let answers = timeout(IN_TIME + BESIDES, asking.join_all())
        .await
        .expect("somebody still waits for the mutex");
    for answer in answers {
        assert_eq!(answer.unwrap(), "503");
    }

    postgres.start().await.unwrap();
    assert_eq!(talk.reserve(SALE, 1, Some("again")).await.unwrap().status, 201);
    talk.stop().await.unwrap();
}

/// Postgres takes a commit back in the very end. Nobody may have been told that it was carried out, and who asks again gets the ticket.
#[rstest]
#[case::mutex("mutex")]
#[case::pessimistic("pessimistic")]
#[case::optimistic("optimistic")]
#[case::conditional_update("conditional-update")]
#[tokio::test]
async fn a_commit_that_fails_confirms_nobody(#[case] name: &str) {
    let strategy = strategy(name);
    let stand = TestEnvironment::shared(strategy).await.unwrap();
    let talk = TestServer::start(&stand, &program(), &LEVEL, strategy).await.unwrap();
    talk.create_rush_sale(1).await.unwrap();
    let held = DelayedCommits::on(&stand).await.unwrap();
    let ledger = HistoryRecorder::new(strategy);

    let (ann, ()) = tokio::join!(ledger.reserve(&talk, 1), async {
        until("the fault did not strike: nobody commits", async || {
            held.has_struck().await.unwrap()
        })
        .await;
        ledger.record_fault("a commit taken back");
        assert_eq!(held.fail().await.unwrap(), 1, "the fault did not strike");
        held.release().await.unwrap();
        ledger.record_recovery();
    });
    assert_eq!(ann, Answer::Indeterminate);
    assert!(matches!(ledger.reserve(&talk, 1).await, Answer::Confirmed { .. }));
    assert_eq!(ledger.reserve(&talk, 2).await, Answer::Refused(Refused::SoldOut));
    talk.stop().await.unwrap();
    assert_after_fault(strategy, &ledger.verdict(&stand).await.unwrap(), &[]);
}

/// The connection breaks with Ann's commit on its way, and with it ends her hold of the mutex. Bob reads what was there before her, and Postgres
/// carries out both.
#[tokio::test]
async fn a_mutex_does_not_cover_a_commit_that_lost_its_connection() {
    let strategy = strategy("mutex");
    let stand = TestEnvironment::shared(strategy).await.unwrap();
    let postgres = backends::postgres().await.unwrap();
    let proxy = Proxy::before(postgres.report().address.clone()).await.unwrap();
    let behind = program().variable("DATABASE_URL", proxy.url_through(&stand.database().url()));
    let talk = TestServer::start(&stand, &behind, &LEVEL, strategy).await.unwrap();
    talk.create_rush_sale(1).await.unwrap();
    let held = DelayedCommits::on(&stand).await.unwrap();
    let ledger = HistoryRecorder::new(strategy);

    let (ann, ()) = tokio::join!(ledger.reserve(&talk, 1), async {
        until("the fault did not strike: nobody commits", async || {
            held.has_struck().await.unwrap()
        })
        .await;
        proxy.inject(Fault::CloseAll);
        until("the fault did not strike: nobody came through the proxy", async || {
            proxy.has_struck()
        })
        .await;
        ledger.record_fault("a commit has lost its connection");
    });
    assert_eq!(ann, Answer::Indeterminate);
    proxy.inject(Fault::None);
    ledger.record_recovery();
    let bob = async {
        // He may get a connection of the pool that was cut as well, and asks again.
        loop {
            match ledger.reserve(&talk, 2).await {
                Answer::Indeterminate => {}
                told => break told,
            }
        }
    };
    let (bob, ()) = tokio::join!(bob, async {
        until("Bob waits for the row", async || {
            held.waiting("transactionid tuple").await.unwrap() > 0
        })
        .await;
        held.release().await.unwrap();
    });
    assert!(matches!(bob, Answer::Confirmed { .. }), "{bob:?}");
    assert!(matches!(ledger.reserve(&talk, 1).await, Answer::Confirmed { .. }));
    talk.stop().await.unwrap();
    assert_after_fault(
        strategy,
        &ledger.verdict(&stand).await.unwrap(),
        &[NoOversell, Conservation],
    );
}

/// "Sold out" is a statement about the sale. Whoever could not look at it may not make it.
#[rstest]
#[case::mutex("mutex")]
#[case::pessimistic("pessimistic")]
#[case::optimistic("optimistic")]
#[case::conditional_update("conditional-update")]
#[tokio::test]
async fn a_row_that_somebody_else_holds_for_too_long_leaves_a_buyer_undecided(#[case] name: &str) {
    let strategy = strategy(name);
    let stand = TestEnvironment::shared(strategy).await.unwrap();
    let talk = TestServer::start(&stand, &program(), &LEVEL, strategy).await.unwrap();
    talk.create_rush_sale(1).await.unwrap();
    let observer = stand.database().pool(1).await.unwrap();
    let mut somebody = observer.begin().await.unwrap();
    sqlx::query("select from sale where id = $1 for update")
        .bind(SALE)
        .execute(&mut *somebody)
        .await
        .unwrap();

    talk.reserve(SALE, 1, Some("a"))
        .await
        .unwrap()
        .is(ProblemKind::Overloaded)
        .unwrap();
    somebody.rollback().await.unwrap();
    let again = talk.reserve(SALE, 1, Some("a")).await.unwrap();
    talk.expect_confirmed(&again).await.unwrap();
    talk.stop().await.unwrap();
}

/// Asks for a ticket, however long it takes.
async fn status_of(address: SocketAddr, buyer: i64) -> std::io::Result<String> {
    let body = format!("{{\"buyer_id\": {buyer}}}");
    let request = format!(
        "POST /api/sales/{SALE}/reservations HTTP/1.1\r\nHost: {address}\r\nContent-Type: application/json\r\n\
         Content-Length: {}\r\n\r\n{body}",
        body.len()
    );
    let mut stream = TcpStream::connect(address).await?;
    stream.write_all(request.as_bytes()).await?;
    let mut start = [0; 12]; // HTTP/1.1 503
    stream.read_exact(&mut start).await?;
    Ok(String::from_utf8_lossy(&start[9..]).into_owned())
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

// ANCHOR: cancelled
/// The number is that of the statements, each of which is waited for.
#[rstest]
#[case::mutex("mutex", 6)]
#[case::pessimistic("pessimistic", 6)]
#[case::optimistic("optimistic", 6)]
#[case::conditional_update("conditional-update", 1)]
#[tokio::test]
async fn a_reservation_can_be_cancelled_anywhere(#[case] name: &str, #[case] at_least: usize) {
    let cancelled = cancelled_after_every_poll(strategy(name)).await.unwrap();
    println!("{name}: cancelled {cancelled} times");
    assert!(cancelled > at_least, "cancelled only {cancelled} times");
}
// ANCHOR_END: cancelled

#[tokio::test]
#[should_panic(expected = "did not strike")]
async fn a_reservation_that_nobody_cancels_says_nothing() {
    never_cancelled(strategy("pessimistic")).await.unwrap();
}

#[tokio::test]
async fn a_transaction_begun_by_hand_is_left_open_when_its_request_is_cancelled() {
    let strategy = strategy("mutants/transaction-left-open");
    let error = cancelled_after_every_poll(strategy).await.unwrap_err();
    assert!(
        format!("{error:#}").contains("a transaction is still open"),
        "{error:#}"
    );
    assert_failure_mode(strategy, &[Progress]);
}

#[rstest]
#[case::mutex("mutex")]
#[case::pessimistic("pessimistic")]
#[case::optimistic("optimistic")]
#[case::conditional_update("conditional-update")]
#[case::one_that_could_not_bear_to_be_cancelled("mutants/transaction-left-open")]
#[tokio::test]
async fn a_buyer_who_hangs_up_anywhere_cuts_nothing(#[case] name: &str) {
    let points = disconnected_at_every_point(&program(), &LEVEL, strategy(name))
        .await
        .unwrap();
    println!("{name}: hung up at {points:?}");
    assert!(points.contains(&"committed".to_owned()), "{points:?}");
}

#[tokio::test]
#[should_panic(expected = "did not strike")]
async fn a_server_that_stands_still_nowhere_says_nothing_of_buyers_who_hang_up() {
    never_disconnected(&program(), &LEVEL, strategy("pessimistic"))
        .await
        .unwrap();
}

#[rstest]
#[case::mutex("mutex")]
#[case::pessimistic("pessimistic")]
#[case::optimistic("optimistic")]
#[case::conditional_update("conditional-update")]
#[tokio::test]
async fn the_http_contract_holds(#[case] name: &str) {
    let strategy = strategy(name);
    let stand = TestEnvironment::shared(strategy).await.unwrap();
    let talk = TestServer::start(&stand, &program(), &LEVEL, strategy).await.unwrap();

    sells_refuses_and_repeats(&talk).await.unwrap();
    refuses_bad_input(&talk).await.unwrap();
    let sale = talk.sale(SALE).await.unwrap();
    assert_eq!((sale.stock, sale.reserved), (0, 2), "bad input sold something");
    talk.stop().await.unwrap();
}

#[tokio::test]
async fn idle_slow_and_endless_clients_keep_nobody_waiting() {
    let strategy = strategy("pessimistic");
    let stand = TestEnvironment::shared(strategy).await.unwrap();
    let talk = TestServer::start(&stand, &program(), &LEVEL, strategy).await.unwrap();
    let kib = withstands_idle_and_slow_clients(&talk).await.unwrap();
    println!("they cost {kib} KiB");
    talk.stop().await.unwrap();
}

#[tokio::test]
async fn an_instance_killed_in_mid_rush_leaves_only_what_was_in_flight_on_it_undecided() {
    let strategy = strategy("pessimistic");
    instance_faults::a_kill_leaves_only_what_was_in_flight_undecided(&program(), &LEVEL, strategy, &Invariant::ALL)
        .await;
}

#[tokio::test]
async fn a_rolling_restart_leaves_nobody_undecided() {
    let strategy = strategy("pessimistic");
    instance_faults::a_rolling_restart_leaves_nobody_undecided(&program(), &LEVEL, strategy, &Invariant::ALL).await;
}

#[tokio::test]
#[should_panic(expected = "somebody is undecided: an instance left before it had answered")]
async fn a_rolling_restart_of_servers_that_do_not_drain_is_noticed() {
    let program = instance_faults::without_drain(env!("CARGO_BIN_EXE_lv2-db-lock"));
    let strategy = strategy("pessimistic");
    instance_faults::a_rolling_restart_leaves_nobody_undecided(&program, &LEVEL, strategy, &Invariant::ALL).await;
}

#[tokio::test]
#[should_panic(expected = "did not strike")]
async fn a_rush_in_which_nobody_is_killed_says_nothing_of_kills() {
    instance_faults::nobody_is_killed(&program(), &LEVEL, strategy("pessimistic")).await;
}

#[tokio::test]
#[should_panic(expected = "did not strike")]
async fn a_rush_in_which_nobody_is_replaced_says_nothing_of_restarts() {
    instance_faults::nobody_is_replaced(&program(), &LEVEL, strategy("pessimistic")).await;
}

/// 64 buyers on one row, each on a connection of its own.
const STORM: Rush = Rush {
    capacity: 32,
    buyers: 64,
    clicks: 1,
    instances: 1,
    work: Duration::from_millis(1),
    commit: Duration::ZERO,
    pool_size: Some(64),
    timeout: Duration::from_secs(20),
    traced: true,
    faults: vec![],
};

#[tokio::test]
async fn in_a_version_storm_retries_are_bounded_and_every_ticket_is_sold() {
    let report = sold_in_a_version_storm(STORM).await;

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
    let alone = Rush { buyers: 1, ..STORM };
    sold_in_a_version_storm(alone).await;
}

/// Keeps the contract, and somebody was overtaken: Postgres has rolled back more transactions than there are buyers who were refused.
async fn sold_in_a_version_storm(rush: Rush) -> Report {
    let strategy = strategy("optimistic");
    let stand = TestEnvironment::shared(strategy).await.unwrap();
    let report = rush.run_on(&stand, &program(), &LEVEL, strategy).await.unwrap();
    assert_eq!(
        report.verdict.conclude(&required(KEEPS)),
        Conclusion::AsPromised,
        "{}",
        report.verdict
    );

    let pool = stand.database().pool(1).await.unwrap();
    // A connection of Postgres tells what it has counted when it has time, and at the latest before it is gone.
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
    assert!(overtaken > 0, "the fault did not strike: nobody was overtaken");
    assert_eq!(report.retries, overtaken, "not every retry was counted");
    report
}

#[tokio::test]
async fn who_is_overtaken_too_often_is_undecided_and_never_told_that_all_is_sold() {
    let rehearsal = ScheduleRunner::of(strategy("optimistic")).await.unwrap();
    let pool = rehearsal.environment().database().pool(1).await.unwrap();
    let mut script = rehearsal.sale(1).await.unwrap();
    let ann = script.buyer("Ann");

    let mut overtaken = 0;
    loop {
        script.run_towards(ann, "decided to sell").await.unwrap();
        if script.movable().is_empty() {
            break;
        }
        sqlx::query("update sale set version = version + 1 where id = $1")
            .bind(script.sale())
            .execute(&pool)
            .await
            .unwrap();
        overtaken += 1;
    }

    println!("overtaken {overtaken} times");
    let history = script.history().await.unwrap();
    assert_eq!(history.requests[0].answer, Answer::Indeterminate, "{}", script.trace());
    assert_eq!(history.rows.as_deref(), Some(&[][..]), "{}", script.trace());
    assert_eq!(history.header.stock, Some(1));
    assert!(overtaken > 1, "it tried only once");
}

#[tokio::test]
async fn in_a_version_storm_a_retry_that_reuses_its_read_oversells() {
    contract(&program(), &LEVEL, "mutants/retry-reuses-the-read", STORM, OVERSELLS).await;
}
