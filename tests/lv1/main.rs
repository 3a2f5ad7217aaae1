//! LV.1: the contract, broken; how it breaks; and the exact order of steps that breaks it.

#![allow(clippy::unwrap_used)]

use box_office::{
    Invariant::{self, Conservation, NoDuplicate, NoOversell, OneAnswer},
    ProblemKind, Promise, Promises, Strategy, points,
};
use harness::{
    assert_declared,
    backends::{Durability, Postgres, TestEnvironment},
    contract,
    history::{Answer, Refused},
    judge::judge,
    rush::{Program, Rush, SALE},
    schedule::{Scenario, ScheduleRunner},
    shared_tests::{http_contract, instance_faults, slow_clients},
    test_server::TestServer,
    until,
};
use lv1_race_condition::{BARE, LEVEL};
use rstest::rstest;

fn program() -> Program {
    Program::new(env!("CARGO_BIN_EXE_lv1-race-condition"))
}

fn strategy(name: &str) -> &'static Strategy {
    LEVEL.strategy(name).unwrap()
}

/// More tickets sold than there are, and a stock that does not tell.
const OVERSELLS: Promises = Promises::ALL_KEPT
    .breaks(&[NoOversell, Conservation])
    .leaves_open(&[NoDuplicate, OneAnswer]);

/// Two tickets for one buyer.
const DUPLICATES: Promises = Promises::ALL_KEPT.breaks(&[NoDuplicate]).leaves_open(&[OneAnswer]);

// ANCHOR: contract
#[rstest]
#[case::read_then_write("read-then-write", 1, OVERSELLS)]
#[case::read_then_write_on_three("read-then-write", 3, OVERSELLS)]
#[case::check_then_decrement("check-then-decrement", 1, OVERSELLS)]
#[case::check_then_decrement_on_three("check-then-decrement", 3, OVERSELLS)]
#[case::check_then_insert("check-then-insert", 1, DUPLICATES)]
#[case::check_then_insert_on_three("check-then-insert", 3, DUPLICATES)]
#[tokio::test]
async fn a_sale_keeps_its_guarantee(#[case] name: &str, #[case] instances: usize, #[case] expected: Promises) {
    let rush = Rush::for_strategy(strategy(name)).instances(instances);
    // A commit takes 1 ms, as on a disk, so other transactions read before it completes.
    let rush = Rush {
        commit: std::time::Duration::from_millis(1),
        ..rush
    };
    contract(&program(), &LEVEL, name, rush, expected).await;
}
// ANCHOR_END: contract

#[test]
fn every_strategy_declares_what_the_table_says() {
    assert_declared(
        &LEVEL,
        &[
            ("read-then-write", OVERSELLS, OVERSELLS),
            ("check-then-decrement", OVERSELLS, OVERSELLS),
            ("check-then-insert", DUPLICATES, DUPLICATES),
        ],
    );
}

// ANCHOR: forced
/// How often each forced order is run: it does not break by luck.
const RUNS: usize = 100;

#[rstest]
#[case::read_then_write("read-then-write", 2, 0)]
#[case::check_then_decrement("check-then-decrement", 2, -1)]
#[tokio::test]
async fn one_ticket_is_sold_twice_in_every_run(#[case] name: &str, #[case] sold: usize, #[case] stock: i64) {
    let runner = ScheduleRunner::of(strategy(name)).await.unwrap();
    for _ in 0..RUNS {
        let schedule = runner.both_read_before_either_writes().await.unwrap();
        let history = schedule.history().await.unwrap();

        assert_eq!(history.rows.as_ref().unwrap().len(), sold, "{}", schedule.trace());
        assert_eq!(history.header.stock, Some(stock), "{}", schedule.trace());
        assert!(judge(&history).breaks(NoOversell), "{}", schedule.trace());
    }
}
// ANCHOR_END: forced

// ANCHOR: clicks
#[tokio::test]
async fn two_clicks_of_one_buyer_take_two_tickets_in_every_run() {
    let runner = ScheduleRunner::of(strategy("check-then-insert")).await.unwrap();
    for _ in 0..RUNS {
        let schedule = runner.both_read_before_either_writes().await.unwrap();
        let verdict = judge(&schedule.history().await.unwrap());

        assert!(verdict.breaks(NoDuplicate), "{}", schedule.trace());
        assert!(!verdict.breaks(NoOversell), "{}", schedule.trace());
    }
}
// ANCHOR_END: clicks

/// One order that is sent twice, and a stranger who uses its key.
#[rstest]
#[case::read_then_write("read-then-write")]
#[case::check_then_decrement("check-then-decrement")]
#[case::check_then_insert("check-then-insert")]
#[tokio::test]
async fn one_key_gets_two_reservations_when_both_look_before_either_writes(
    #[case] name: &str,
    #[values(true, false)] same_buyer: bool,
) {
    let runner = ScheduleRunner::of(strategy(name)).await.unwrap();
    for at_once in [false, true] {
        let mut schedule = runner.sale(2).await.unwrap();
        let first = schedule.buyer("Ann");
        let second = if same_buyer {
            schedule.click(first)
        } else {
            schedule.buyer("Bob")
        };
        schedule.use_key_of(second, first);
        if at_once {
            schedule.run_towards(first, points::DECIDED_TO_SELL).await.unwrap();
            schedule.run_towards(second, points::DECIDED_TO_SELL).await.unwrap();
        }
        schedule.run_to_completion(first).await.unwrap();
        schedule.run_to_completion(second).await.unwrap();

        let history = schedule.history().await.unwrap();
        let verdict = judge(&history);
        assert_eq!(verdict.breaks(NoDuplicate), at_once, "{}\n{verdict}", schedule.trace());
        match &history.requests[1].answer {
            Answer::Refused(Refused::KeyOfAnotherBuyer) => assert!(!at_once && !same_buyer),
            repeated if !at_once => assert_eq!(*repeated, history.requests[0].answer),
            _ => {}
        }
    }
}

// ANCHOR: waits
/// The update waits for the row's lock, the check before it does not: that is why no update is lost, and the stock is negative all the same.
#[tokio::test]
async fn a_decrement_waits_for_the_one_before_it_but_its_check_did_not() {
    let runner = ScheduleRunner::of(strategy("check-then-decrement")).await.unwrap();
    let mut schedule = runner.sale(1).await.unwrap();
    let (ann, bob) = (schedule.buyer("Ann"), schedule.buyer("Bob"));

    schedule.run_until(bob, points::DECIDED_TO_SELL).await.unwrap();
    schedule.run_until(ann, points::STOCK_WRITTEN).await.unwrap();
    schedule.run_until_blocked(bob).await.unwrap();
    schedule.run_to_completion(ann).await.unwrap();
    schedule.run_to_completion(bob).await.unwrap();

    let history = schedule.history().await.unwrap();
    assert_eq!(history.header.stock, Some(-1), "{}", schedule.trace());
    assert!(
        schedule.trace().to_string().contains("waits for Ann's row lock"),
        "{}",
        schedule.trace()
    );
}
// ANCHOR_END: waits

// ANCHOR: alone
/// One after the other, each of them is right: nobody finds these bugs by trying.
#[rstest]
#[case::read_then_write("read-then-write")]
#[case::check_then_decrement("check-then-decrement")]
#[case::check_then_insert("check-then-insert")]
#[tokio::test]
async fn nothing_breaks_when_the_buyers_come_one_after_another(#[case] name: &str) {
    let runner = ScheduleRunner::of(strategy(name)).await.unwrap();
    let mut schedule = runner.sale(2).await.unwrap();
    let ann = schedule.buyer("Ann");
    let again = schedule.click(ann);
    let requests = [ann, again, schedule.buyer("Bob"), schedule.buyer("Carol")];
    for request in requests {
        schedule.run_to_completion(request).await.unwrap();
    }
    let verdict = judge(&schedule.history().await.unwrap());
    assert!(verdict.findings.is_empty(), "{verdict}\n{}", schedule.trace());
}
// ANCHOR_END: alone

/// Points without an effect that another request could see.
const PASSES: &[&str] = &[
    "transaction begun",
    "decided to sell",
    "reservation written",
    "committed",
];

/// Two buyers of the last ticket.
const TWO_BUYERS: Scenario = Scenario {
    capacity: 1,
    clicks: &[1, 1],
    passes: PASSES,
    preemptions: None,
};

/// Two clicks of one buyer, and a ticket for each.
const TWO_CLICKS: Scenario = Scenario {
    capacity: 2,
    clicks: &[2],
    ..TWO_BUYERS
};

/// The second of two writers of the sale's row is ended with an error, in `check-then-insert` as
/// well: both of its clicks write that row.
#[rstest]
#[case::read_then_write("read-then-write", TWO_BUYERS)]
#[case::check_then_decrement("check-then-decrement", TWO_BUYERS)]
#[case::check_then_insert("check-then-insert", TWO_CLICKS)]
#[tokio::test]
async fn a_stricter_isolation_level_breaks_nothing_and_ends_transactions_with_an_error(
    #[case] name: &str,
    #[case] scenario: Scenario,
    #[values("read committed", "repeatable read", "serializable")] level: &str,
) {
    let settings = [("default_transaction_isolation", level)];
    let runner = ScheduleRunner::with_settings(strategy(name), &settings).await.unwrap();
    let explored = runner.explore(scenario).await.unwrap();
    let indeterminate = explored
        .answers
        .iter()
        .filter(|answers| answers.contains(&Answer::Indeterminate));
    let (broken, indeterminate) = (explored.broken.len(), indeterminate.count());
    println!(
        "{name}, {level}: of {} interleavings, {broken} break it and {indeterminate} end with an error",
        explored.interleavings
    );
    if level == "read committed" {
        assert!(
            broken > 0 && indeterminate == 0,
            "{broken} break it, {indeterminate} errors"
        );
    } else {
        assert!(
            broken == 0 && indeterminate > 0,
            "{broken} break it, {indeterminate} errors"
        );
    }
}

/// Write skew: the row that each of two transactions has looked for is one that the other inserts.
#[rstest]
#[case::repeatable_read("repeatable read", 2)]
#[case::serializable("serializable", 1)]
#[tokio::test]
async fn two_inserts_after_two_looks_are_two_rows_below_serializable(#[case] level: &str, #[case] rows: usize) {
    /// SQLSTATE `serialization_failure`.
    const SERIALIZATION_FAILURE: &str = "40001";

    let environment = TestEnvironment::shared(strategy("check-then-insert")).await.unwrap();
    let pool = environment.database().pool(2).await.unwrap();
    let begin = format!("begin isolation level {level}");
    let mut clicks = vec![];
    for _ in 0..2 {
        let mut click = pool.begin_with(sqlx::AssertSqlSafe(begin.clone())).await.unwrap();
        let found = sqlx::query("select from reservation where sale_id = 1 and buyer_id = 1")
            .fetch_all(&mut *click)
            .await
            .unwrap();
        assert!(found.is_empty());
        clicks.push(click);
    }
    let mut committed = 0;
    for (number, mut click) in clicks.into_iter().enumerate() {
        let inserted = sqlx::query(
            "insert into reservation (id, sale_id, buyer_id, request_key)
             values (gen_random_uuid(), 1, 1, $1)",
        )
        .bind(number.to_string())
        .execute(&mut *click)
        .await;
        let ended = match inserted {
            Ok(_) => click.commit().await,
            Err(why) => Err(why),
        };
        match ended {
            Ok(()) => committed += 1,
            Err(why) => assert_eq!(why.as_database_error().unwrap().code().unwrap(), SERIALIZATION_FAILURE),
        }
    }
    assert_eq!(committed, rows);
}

#[rstest]
#[case::read_then_write("read-then-write")]
#[case::check_then_decrement("check-then-decrement")]
#[case::check_then_insert("check-then-insert")]
#[tokio::test]
async fn the_http_contract_holds(#[case] name: &str) {
    http_contract::holds(&program(), &LEVEL, strategy(name)).await.unwrap();
}

#[tokio::test]
async fn without_its_database_a_server_is_undecided_and_recovers_by_itself() {
    let postgres = Postgres::private(Durability::Fast).await.unwrap();
    let environment = TestEnvironment::on(&postgres, None, BARE).await.unwrap();
    let server = TestServer::start(&environment, &program(), &LEVEL, strategy("read-then-write"))
        .await
        .unwrap();
    server.create_rush_sale(1).await.unwrap();
    assert_eq!(server.get("/readyz").await.unwrap().status, 200);

    postgres.stop().await.unwrap();
    let away = server.reserve(SALE, 1, Some("a")).await.unwrap();
    away.is(ProblemKind::BackendAway)
        .or_else(|_| away.is(ProblemKind::Overloaded))
        .unwrap();
    assert_eq!(server.get("/readyz").await.unwrap().status, 503);
    assert_eq!(server.get("/livez").await.unwrap().status, 200);

    postgres.start().await.unwrap();
    assert_eq!(server.reserve(SALE, 1, Some("a")).await.unwrap().status, 201);
    server.stop().await.unwrap();
}

/// A Postgres that has restarted has closed every connection; a server need not have noticed.
#[tokio::test]
async fn a_connection_that_was_closed_while_it_rested_is_handed_to_nobody() {
    let strategy = strategy("read-then-write");
    let environment = TestEnvironment::shared(strategy).await.unwrap();
    let server = TestServer::start(&environment, &program(), &LEVEL, strategy)
        .await
        .unwrap();
    let pool = environment.database().pool(1).await.unwrap();
    server.create_rush_sale(1).await.unwrap();

    // Each once it has rested: no Postgres restarts in less.
    let mut closed = 0;
    until("the server's connections to be gone", async || {
        let open = sqlx::query_scalar(
            "select case when state_change < now() - interval '100 ms' then pg_terminate_backend(pid) else false end
               from pg_stat_activity
              where datname = current_database()
                and application_name like 'lv1/%'",
        );
        let open: Vec<bool> = open.fetch_all(&pool).await.unwrap();
        closed += open.iter().filter(|&&closed| closed).count();
        open.is_empty()
    })
    .await;
    assert!(closed > 0, "the fault did not strike");

    assert_eq!(server.reserve(SALE, 1, Some("a")).await.unwrap().status, 201);
    server.stop().await.unwrap();
}

/// What a rush of `read-then-write` keeps in which instances come and go: the same as without.
fn kept() -> Vec<Invariant> {
    OVERSELLS.those(Promise::Keeps).collect()
}

#[tokio::test]
async fn an_instance_killed_in_mid_rush_leaves_only_what_was_in_flight_on_it_undecided() {
    let strategy = strategy("read-then-write");
    instance_faults::a_kill_leaves_only_what_was_in_flight_undecided(&program(), &LEVEL, strategy, &kept()).await;
}

#[tokio::test]
async fn a_rolling_restart_leaves_nobody_undecided() {
    let strategy = strategy("read-then-write");
    instance_faults::a_rolling_restart_leaves_nobody_undecided(&program(), &LEVEL, strategy, &kept()).await;
}

#[tokio::test]
async fn idle_slow_and_endless_clients_keep_nobody_waiting() {
    slow_clients::keep_nobody_waiting(&program(), &LEVEL, strategy("read-then-write"))
        .await
        .unwrap();
}
