//! Instances that die or are replaced while they sell.

use box_office::{Invariant, Level, Strategy};

use crate::{
    history::{Answer, History, Micros, Request},
    rush::{FaultKind, PlannedFault, Program, Report, Rush},
};

/// How many instances sell.
const INSTANCES: usize = 3;

/// So few that on a slow machine, too, nobody waits so long for the sale's lock as to be undecided for that.
const BUYERS: u32 = 300;

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
    let rush = rush().fault(PlannedFault {
        after_answers: 50,
        instance: 1,
        kind: FaultKind::Kill,
    });
    let report = run(&rush, program, level, strategy, keeps).await;

    let [fault] = &report.history.faults[..] else {
        panic!("one fault was planned: {:?}", report.history.faults)
    };
    assert!(
        fault.fault.contains("signal: 9"),
        "the fault did not strike: {}",
        fault.fault
    );
    let undecided = undecided(&report.history);
    // An order that was accepted is in flight until it is decided, and nobody has to be undecided about it.
    let accepted = report.history.requests.iter().any(|request| match &request.answer {
        Answer::Accepted { ending, .. } => {
            let ended_us = ending.as_ref().map_or(Micros::MAX, |ending| ending.at_us);
            request.sent_us <= fault.struck_us && fault.struck_us < ended_us
        }
        _ => false,
    });
    assert!(
        !undecided.is_empty() || accepted,
        "the fault did not strike: nothing was in flight on the instance"
    );
    assert!(
        undecided.len() <= report.history.requests.len() / INSTANCES + 1,
        "{} undecided",
        undecided.len()
    );
    for request in undecided {
        assert!(
            request.sent_us <= fault.struck_us,
            "sent after the kill, and yet undecided: {request:?}"
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
    let mut rush = rush();
    for instance in 0..INSTANCES {
        rush = rush.fault(PlannedFault {
            after_answers: 50 * (instance as u64 + 1),
            instance,
            kind: FaultKind::Restart,
        });
    }
    let report = run(&rush, program, level, strategy, keeps).await;

    assert_eq!(report.history.faults.len(), INSTANCES);
    for fault in &report.history.faults {
        assert!(
            fault.fault.contains("exit status: 0"),
            "SIGTERM did not end it in peace: {}",
            fault.fault
        );
    }
    assert_eq!(undecided(&report.history).len(), 0, "{}", report.verdict);
}

fn rush() -> Rush {
    Rush {
        buyers: BUYERS,
        instances: INSTANCES,
        ..Rush::default()
    }
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

fn undecided(history: &History) -> Vec<&Request> {
    history
        .requests
        .iter()
        .filter(|request| request.answer == Answer::Undecided)
        .collect()
}
