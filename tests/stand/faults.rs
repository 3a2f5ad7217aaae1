//! Instances that go away behind nginx.

use std::panic::AssertUnwindSafe;

use box_office::{Invariant, Level, ProblemKind, Promise, Strategy};
use futures_util::FutureExt;
use harness::{
    backends::{Nginx, TestEnvironment},
    history::Answer,
    rush::{Connection, FaultKind, Program, Rush, SALE},
    shared_tests::instance_faults::{ROLLING_RESTART, rush_with_faults, strike},
    test_server::TestServer,
};
use http_body_util::Full;
use hyper::{Request, header};

use crate::{nginx, program};

/// One instance is killed in mid-rush and another drained: what the strategy keeps on several instances, it keeps.
pub(crate) async fn an_instance_killed_and_one_drained_lose_nothing(level: &Level, strategy: &Strategy) {
    rush(&[FaultKind::Kill, FaultKind::Restart], level, strategy).await;
}

/// Instance after instance is drained and replaced. nginx itself would answer 502 for an instance that is gone, and 504 for one that is
/// late.
pub(crate) async fn a_rolling_restart_answers_no_5xx_but_503(level: &Level, strategy: &Strategy) {
    rush(&ROLLING_RESTART, level, strategy).await;
}

/// Runs a rush through nginx. Every answer is one of the contract, and among those of a 5xx status only 503 is.
async fn rush(faults: &[FaultKind], level: &Level, strategy: &Strategy) {
    let rush = Rush {
        nginx: Some(nginx()),
        ..rush_with_faults(faults)
    };
    let keeps: Vec<Invariant> = strategy.guarantee.multi_instance.those(Promise::Keeps).collect();
    let report = strike(&rush, faults, &slow_program(level), level, strategy, &keeps).await;
    for request in &report.history.requests {
        assert!(!matches!(request.answer, Answer::Unexpected { .. }), "{request:?}");
    }
}

/// The control run: a rush through nginx in which nothing is killed does not count as one.
pub(crate) async fn a_rush_in_which_nobody_is_killed_says_nothing_of_kills() {
    let (level, strategy) = (&lv2_db_lock::LEVEL, lv2_db_lock::LEVEL.strategy("pessimistic").unwrap());
    let rush = Rush {
        nginx: Some(nginx()),
        ..rush_with_faults(&[])
    };
    let program = program(level);
    let control = strike(&rush, &[FaultKind::Kill], &program, level, strategy, &[]);
    let panic = AssertUnwindSafe(control).catch_unwind().await.unwrap_err();
    let message = panic.downcast_ref::<String>().unwrap();
    assert!(message.contains("the fault did not strike"), "{message}");
}

/// LV.4 would decide the whole rush within milliseconds, in two batches. Each takes this long.
fn slow_program(level: &Level) -> Program {
    match level.name {
        "lv4" => program(level).variable("WORK_MS", "200"),
        _ => program(level),
    }
}

pub(crate) async fn with_all_instances_down_a_buyer_is_told_503_as_a_problem() {
    let level = &lv2_db_lock::LEVEL;
    let strategy = level.strategy("pessimistic").unwrap();
    let environment = TestEnvironment::shared(strategy).await.unwrap();
    let mut instances = vec![];
    for _ in 0..3 {
        let server = TestServer::start(&environment, &program(level), level, strategy).await;
        instances.push(server.unwrap());
    }
    instances[0].create_rush_sale(1).await.unwrap();
    let addresses: Vec<_> = instances.iter().map(TestServer::address).collect();
    let nginx = Nginx::start(&nginx(), &addresses).await.unwrap();
    let order = |buyer: u32| {
        Request::post(format!("/api/sales/{SALE}/reservations"))
            .header(header::CONTENT_TYPE, "application/json")
            .header("x-request-id", format!("buyer-{buyer}"))
            .body(Full::from(format!("{{\"buyer_id\": {buyer}}}")))
            .unwrap()
    };
    let mut connection = Connection::open(nginx.address()).await.unwrap();
    assert_eq!(connection.send(order(1)).await.unwrap().status, 201);

    for instance in &instances {
        let status = instance.kill().await.unwrap();
        assert!(status.to_string().contains("signal: 9"), "did not strike: {status}");
    }

    // `is` also checks the media type, `Retry-After` and the request id.
    for buyer in 2..5 {
        let answered = connection.send(order(buyer)).await.unwrap();
        let problem = answered.is(ProblemKind::BackendAway).unwrap();
        assert_eq!(problem.request_id, format!("buyer-{buyer}"));
    }
}
