//! Instances that die or are replaced while they sell.
//!
//! Buyers come in waves, one more after each fault, so that a restarted instance is asked as well. Which instance a request went to, its client
//! knows; whether an instance died, and how, its exit status tells.

use std::{net::SocketAddr, time::Duration};

use box_office::{Invariant, Level, Strategy};

use crate::{
    history::{Answer, Fault, Micros, Request},
    rush::{FaultKind, PlannedFault, Program, Report, Rush, Struck},
};

/// How many instances sell.
const INSTANCES: usize = 3;

/// How many buyers come at once. So few that on a slow machine, too, nobody waits so long for the sale's lock as to be undecided for that; and so
/// many that some of those who lost their instance come to the one that took its place.
const WAVE: u32 = 100;

/// A fault strikes when so many of its wave have their answer. The others are under way: a third of them on the instance that it strikes.
const AFTER_ANSWERS: u64 = 10;

/// Kills one of three instances (SIGKILL) in mid-rush: only what was in flight on it may be undecided, and `keeps` must hold.
///
/// # Panics
/// The fault did not strike, or it did more than that.
pub async fn a_kill_leaves_only_what_was_in_flight_undecided(
    program: &Program,
    level: &Level,
    strategy: &Strategy,
    keeps: &[Invariant],
) {
    kill(&rush(1, FaultKind::Kill), program, level, strategy, keeps).await;
}

/// The same with its fault off: nobody is killed.
///
/// # Panics
/// The fault did not strike.
pub async fn nobody_is_killed(program: &Program, level: &Level, strategy: &Strategy) {
    kill(&rush(0, FaultKind::Kill), program, level, strategy, &[]).await;
}

async fn kill(rush: &Rush, program: &Program, level: &Level, strategy: &Strategy, keeps: &[Invariant]) {
    let report = run(rush, program, level, strategy, keeps).await;
    let struck = struck(&report, 1);

    let (fault, killed) = struck[0];
    assert!(
        fault.fault.contains("signal: 9"),
        "the fault did not strike: {}",
        fault.fault
    );
    assert!(
        in_flight(&report, fault, killed.address) > 0,
        "the fault did not strike: nothing was in flight on the instance"
    );
    for request in undecided(&report) {
        assert!(
            request.sent_us <= fault.struck_us,
            "sent after the kill, and yet undecided: {request:?}"
        );
        assert_eq!(
            report.sent_to[&request.request], killed.address,
            "undecided on an instance that lives: {request:?}"
        );
    }
}

/// Replaces one instance after another (SIGTERM) in mid-rush: nobody may be left undecided, and `keeps` must hold.
///
/// # Panics
/// The fault did not strike, or somebody was.
pub async fn a_rolling_restart_leaves_nobody_undecided(
    program: &Program,
    level: &Level,
    strategy: &Strategy,
    keeps: &[Invariant],
) {
    restart(&rush(INSTANCES, FaultKind::Restart), program, level, strategy, keeps).await;
}

/// The same with its fault off: nobody is replaced.
///
/// # Panics
/// The fault did not strike.
pub async fn nobody_is_replaced(program: &Program, level: &Level, strategy: &Strategy) {
    restart(&rush(0, FaultKind::Restart), program, level, strategy, &[]).await;
}

async fn restart(rush: &Rush, program: &Program, level: &Level, strategy: &Strategy, keeps: &[Invariant]) {
    let report = run(rush, program, level, strategy, keeps).await;

    for (fault, replaced) in struck(&report, INSTANCES) {
        assert!(
            fault.fault.contains("exit status: 0"),
            "SIGTERM did not end it in peace: {}",
            fault.fault
        );
        assert!(
            in_flight(&report, fault, replaced.address) > 0,
            "the fault did not strike: nothing was in flight on the instance: {}",
            fault.fault
        );
        let healed_us = fault.healed_us.expect("it was replaced");
        let came = replaced.replaced_by.expect("another took its place");
        let served = report.history.requests.iter().any(|request| {
            report.sent_to[&request.request] == came
                && request.sent_us >= healed_us
                && !matches!(request.answer, Answer::Indeterminate | Answer::Unexpected { .. })
        });
        assert!(served, "nobody was served by the new instance: {}", fault.fault);
    }
    if let Some(first) = undecided(&report).next() {
        panic!(
            "somebody is undecided: an instance left before it had answered {first:?}, sent to {}\n{:?}\n{:?}\n{}",
            report.sent_to[&first.request], report.struck, report.history.faults, report.verdict
        );
    }
}

/// A server that leaves on SIGTERM at once, and with it all that is in flight: `executable` below a shell that does not pass the signal on, as
/// the first process of a container may be.
pub fn without_drain(executable: &str) -> Program {
    const SHELL: &str = r#""$0" & server=$!; trap 'kill -KILL $server; exit 0' TERM; wait $server"#;

    Program::new("/bin/sh")
        .argument("-c")
        .argument(SHELL)
        .argument(executable)
}

/// A wave of buyers, and one more after each fault. Every wave finds tickets, and the last sees them go.
fn rush(faults: usize, kind: FaultKind) -> Rush {
    let waves = u32::try_from(faults + 1).expect("there are few faults");
    let rush = Rush {
        capacity: WAVE * waves - WAVE / 2,
        buyers: WAVE * waves,
        instances: INSTANCES,
        work: Duration::from_millis(3),
        ..Rush::default()
    };
    (0..faults).fold(rush, |rush, instance| {
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

/// The faults, of which there must be so many, each with the instance that it struck.
fn struck(report: &Report, planned: usize) -> Vec<(&Fault, Struck)> {
    let faults = &report.history.faults;
    assert_eq!(
        faults.len(),
        planned,
        "the fault did not strike: {planned} were to come"
    );
    faults.iter().zip(report.struck.iter().copied()).collect()
}

/// How many requests were under way on the instance when the fault struck.
fn in_flight(report: &Report, fault: &Fault, instance: SocketAddr) -> usize {
    let requests = report.history.requests.iter();
    requests
        .filter(|request| {
            report.sent_to[&request.request] == instance
                && request.sent_us < fault.struck_us
                && fault.struck_us < ended_us(request)
        })
        .count()
}

/// When a request was over for its client. An order that was accepted is under way until it is decided.
fn ended_us(request: &Request) -> Micros {
    let ended_us = match &request.answer {
        Answer::Accepted { ending, .. } => ending.as_ref().map(|ending| ending.at_us),
        _ => request.answered_us,
    };
    ended_us.unwrap_or(Micros::MAX)
}

fn undecided(report: &Report) -> impl Iterator<Item = &Request> {
    let requests = report.history.requests.iter();
    requests.filter(|request| request.answer == Answer::Indeterminate)
}
