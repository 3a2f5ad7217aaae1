//! Instance faults: server processes that are killed or replaced during a sale.
//!
//! Buyers come in waves, one more after each fault, so that a restarted instance also receives
//! requests. The client records the instance of each request, and the exit status shows how an
//! instance ended.

use std::time::Duration;

use box_office::{Invariant, Level, Strategy};

use crate::{
    history::{Answer, Fault, Micros, Request},
    rush::{FaultKind, PlannedFault, Program, Report, Rush, Struck},
};

/// The number of instances.
const INSTANCES: usize = 3;

/// One instance after another.
pub const ROLLING_RESTART: [FaultKind; INSTANCES] = [FaultKind::Restart; INSTANCES];

/// Buyers in a wave. Few enough that no request times out on the sale's lock, even on a slow
/// machine; enough that some buyers whose instance is gone connect to its replacement.
const WAVE: u32 = 100;

/// Answers in a wave after which its fault strikes. The other requests are in flight, a third of
/// them on that instance.
const AFTER_ANSWERS: u64 = 10;

/// Kills one of three instances (SIGKILL) during the rush: only requests in flight on it may have
/// an unknown outcome, and `keeps` must hold.
///
/// # Panics
/// Panics if the fault did not strike, another request has an unknown outcome, or an invariant is
/// broken.
pub async fn a_kill_leaves_only_what_was_in_flight_undecided(
    program: &Program,
    level: &Level,
    strategy: &Strategy,
    keeps: &[Invariant],
) {
    kill(&rush_with_faults(&[FaultKind::Kill]), program, level, strategy, keeps).await;
}

/// The control run of [`a_kill_leaves_only_what_was_in_flight_undecided`], without any kill.
///
/// # Panics
/// Always panics: the fault did not strike.
pub async fn nobody_is_killed(program: &Program, level: &Level, strategy: &Strategy) {
    kill(&rush_with_faults(&[]), program, level, strategy, &[]).await;
}

async fn kill(rush: &Rush, program: &Program, level: &Level, strategy: &Strategy, keeps: &[Invariant]) {
    let report = strike(rush, &[FaultKind::Kill], program, level, strategy, keeps).await;
    let (fault, killed) = (&report.history.faults[0], report.struck[0]);
    for request in indeterminate(&report) {
        assert!(
            request.sent_us <= fault.struck_us,
            "sent after the kill, and yet indeterminate: {request:?}"
        );
        assert_eq!(
            report.sent_to[&request.request], killed.address,
            "indeterminate on a running instance: {request:?}"
        );
    }
}

/// Restarts one instance after another (SIGTERM) during the rush: no request may have an unknown
/// outcome, and `keeps` must hold.
///
/// # Panics
/// Panics if a fault did not strike, a request has an unknown outcome, or an invariant is broken.
pub async fn a_rolling_restart_leaves_nobody_undecided(
    program: &Program,
    level: &Level,
    strategy: &Strategy,
    keeps: &[Invariant],
) {
    restart(&rush_with_faults(&ROLLING_RESTART), program, level, strategy, keeps).await;
}

/// The control run of [`a_rolling_restart_leaves_nobody_undecided`], without any restart.
///
/// # Panics
/// Always panics: the fault did not strike.
pub async fn nobody_is_replaced(program: &Program, level: &Level, strategy: &Strategy) {
    restart(&rush_with_faults(&[]), program, level, strategy, &[]).await;
}

async fn restart(rush: &Rush, program: &Program, level: &Level, strategy: &Strategy, keeps: &[Invariant]) {
    let report = strike(rush, &ROLLING_RESTART, program, level, strategy, keeps).await;
    if let Some(first) = indeterminate(&report).next() {
        panic!(
            "a request has an unknown outcome: an instance exited before it had answered {first:?}, sent to {}\n{:?}\n{:?}\n{}",
            report.sent_to[&first.request], report.struck, report.history.faults, report.verdict
        );
    }
}

/// Runs a rush, and checks that these faults struck instances that had requests in flight, that a
/// restarted instance had exited gracefully, and that its replacement served requests.
///
/// # Panics
/// Panics if a fault did not strike, or an invariant of `keeps` is broken.
pub async fn strike(
    rush: &Rush,
    faults: &[FaultKind],
    program: &Program,
    level: &Level,
    strategy: &Strategy,
    keeps: &[Invariant],
) -> Report {
    let report = run(rush, program, level, strategy, keeps).await;
    for ((fault, struck), kind) in struck(&report, faults.len()).into_iter().zip(faults) {
        let exit = match kind {
            FaultKind::Kill => "signal: 9",
            FaultKind::Restart => "exit status: 0",
        };
        assert!(
            fault.fault.contains(exit),
            "the fault did not strike: expected {exit}, got {}",
            fault.fault
        );
        assert!(
            in_flight(&report, struck) > 0,
            "the fault did not strike: nothing was in flight on the instance: {}",
            fault.fault
        );
        let (Some(healed_us), Some(came)) = (fault.healed_us, struck.replaced_by) else {
            assert_eq!(*kind, FaultKind::Kill, "nothing replaced it: {}", fault.fault);
            continue;
        };
        let served = report.history.requests.iter().any(|request| {
            report.sent_to[&request.request] == came
                && request.sent_us >= healed_us
                && !matches!(request.answer, Answer::Indeterminate | Answer::Unexpected { .. })
        });
        assert!(served, "the new instance served no request: {}", fault.fault);
    }
    report
}

/// A server without graceful shutdown: `executable` below a shell that kills it on SIGTERM instead
/// of forwarding the signal, as the first process of a container may do.
pub fn without_drain(executable: &str) -> Program {
    const SHELL: &str = r#""$0" & server=$!; trap 'kill -KILL $server; exit 0' TERM; wait $server"#;

    Program::new("/bin/sh")
        .argument("-c")
        .argument(SHELL)
        .argument(executable)
}

/// A rush on three instances, each of which one of these faults strikes, in their order. There is
/// one wave of buyers, and one more after each fault. Every wave finds tickets, and the last
/// exhausts them.
///
/// # Panics
/// Panics if there are more faults than instances.
pub fn rush_with_faults(faults: &[FaultKind]) -> Rush {
    assert!(faults.len() <= INSTANCES, "one fault for each instance");
    let waves = u32::try_from(faults.len() + 1).expect("there are few faults");
    let rush = Rush {
        capacity: WAVE * waves - WAVE / 2,
        buyers: WAVE * waves,
        instances: INSTANCES,
        work: Duration::from_millis(3),
        ..Rush::default()
    };
    faults.iter().enumerate().fold(rush, |rush, (instance, &kind)| {
        rush.fault(PlannedFault {
            after_answers: AFTER_ANSWERS,
            instance,
            kind,
        })
    })
}

async fn run(rush: &Rush, program: &Program, level: &Level, strategy: &Strategy, keeps: &[Invariant]) -> Report {
    let report = rush
        .run(program, level, strategy)
        .await
        .unwrap_or_else(|error| panic!("the rush could not be run: {error:?}"));
    for &invariant in keeps {
        assert!(!report.verdict.breaks(invariant), "{}", report.verdict);
    }
    report
}

/// The faults, whose number must be `planned`, each with the instance that it struck.
fn struck(report: &Report, planned: usize) -> Vec<(&Fault, Struck)> {
    let faults = &report.history.faults;
    assert_eq!(
        faults.len(),
        planned,
        "the fault did not strike: {planned} were to come"
    );
    faults.iter().zip(report.struck.iter().copied()).collect()
}

/// The number of requests in flight on the instance when it was signalled.
fn in_flight(report: &Report, struck: Struck) -> usize {
    let requests = report.history.requests.iter();
    requests
        .filter(|request| {
            report.sent_to[&request.request] == struck.address
                && request.sent_us < struck.signalled_us
                && struck.signalled_us < ended_us(request)
        })
        .count()
}

/// When a request ended for its client. An accepted order is pending until it is decided.
fn ended_us(request: &Request) -> Micros {
    let ended_us = match &request.answer {
        Answer::Accepted { ending, .. } => ending.as_ref().map(|ending| ending.at_us),
        _ => request.answered_us,
    };
    ended_us.unwrap_or(Micros::MAX)
}

fn indeterminate(report: &Report) -> impl Iterator<Item = &Request> {
    let requests = report.history.requests.iter();
    requests.filter(|request| request.answer == Answer::Indeterminate)
}
