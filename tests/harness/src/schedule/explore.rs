//! Exploration: every feasible interleaving of a few requests.
//!
//! The search is depth first, by replay. A run follows the choices of its prefix, then always moves
//! the first request that can move. The next run changes the last choice that had an untried
//! alternative. A decision of Postgres or Redis, such as which waiter gets a lock, is not a choice: a
//! replay that meets another set of movable requests continues with that set.

use anyhow::ensure;

use super::{RequestHandle, Schedule, ScheduleRunner, Trace};
use crate::{
    history::{Answer, History},
    judge::{Verdict, judge},
};

/// Upper bound of the search: more runs are a mistake in the test.
const MAX_RUNS: usize = 5_000;

/// The requests that are run in every interleaving.
#[derive(Clone, Copy, Debug)]
pub struct Scenario {
    /// Tickets on sale.
    pub capacity: u32,
    /// For each buyer, the number of requests, each under its own key.
    pub clicks: &'static [u32],
    /// Points at which requests are not held: what precedes and follows them is one step.
    pub passes: &'static [&'static str],
    /// Maximum number of preemptions: switches away from a request that could move. `None`:
    /// unlimited.
    pub preemptions: Option<usize>,
}

/// The results of all interleavings.
#[derive(Debug)]
pub struct Exploration {
    /// The number of interleavings.
    pub interleavings: usize,
    /// The number of those in which a request was blocked, so that the run deviated from the
    /// choices.
    pub blocked: usize,
    /// The interleavings that broke an invariant.
    pub broken: Vec<Broken>,
    /// For each interleaving, the answer to each request, in the order of the buyers.
    pub answers: Vec<Vec<Answer>>,
}

/// An interleaving that broke an invariant.
#[derive(Debug)]
pub struct Broken {
    /// The judge's verdict.
    pub verdict: Verdict,
    /// The order of the steps.
    pub trace: Trace,
}

/// The request keys of a scenario.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Keys {
    Own,
    First,
}

/// One decision of a run: the request that was moved, and all that could have been.
struct Decision {
    chosen: usize,
    movable: Vec<RequestHandle>,
}

impl ScheduleRunner {
    /// Runs the scenario in every feasible interleaving.
    ///
    /// # Errors
    /// Fails if a step times out or there are too many interleavings.
    pub async fn explore(&self, scenario: Scenario) -> anyhow::Result<Exploration> {
        self.every_interleaving(scenario, Keys::Own).await
    }

    /// Runs the scenario in every feasible interleaving, with the key of the first request for all
    /// requests.
    ///
    /// # Errors
    /// As [`explore`](Self::explore).
    pub async fn explore_under_one_key(&self, scenario: Scenario) -> anyhow::Result<Exploration> {
        self.every_interleaving(scenario, Keys::First).await
    }

    async fn every_interleaving(&self, scenario: Scenario, keys: Keys) -> anyhow::Result<Exploration> {
        let mut explored = Exploration {
            interleavings: 0,
            blocked: 0,
            broken: vec![],
            answers: vec![],
        };
        let mut prefix: Vec<usize> = vec![];
        loop {
            ensure!(
                explored.interleavings < MAX_RUNS,
                "more than {MAX_RUNS} interleavings: take fewer requests or preemptions"
            );
            let (schedule, decisions) = self.one_interleaving(scenario, keys, &prefix).await?;
            explored.interleavings += 1;
            explored.blocked += usize::from(schedule.was_blocked());
            let history: History = schedule.history().await?;
            let verdict = judge(&history);
            if !verdict.findings.is_empty() {
                explored.broken.push(Broken {
                    verdict,
                    trace: schedule.trace(),
                });
            }
            let answers = history.requests.into_iter().map(|request| request.answer);
            explored.answers.push(answers.collect());
            // The last decision with an untried alternative.
            let Some(last) = decisions
                .iter()
                .rposition(|decision| decision.chosen + 1 < decision.movable.len())
            else {
                return Ok(explored);
            };
            prefix = decisions[..=last].iter().map(|decision| decision.chosen).collect();
            prefix[last] += 1;
        }
    }

    async fn one_interleaving(
        &self,
        scenario: Scenario,
        keys: Keys,
        prefix: &[usize],
    ) -> anyhow::Result<(Schedule<'_>, Vec<Decision>)> {
        const NAMES: [&str; 3] = ["Ann", "Bob", "Carol"];

        let mut schedule = self.sale(scenario.capacity).await?;
        schedule.passes(scenario.passes);
        for (&clicks, name) in scenario.clicks.iter().zip(NAMES) {
            let first = schedule.buyer(name);
            for _ in 1..clicks {
                schedule.click(first);
            }
        }
        if keys == Keys::First {
            let requests = schedule.movable();
            for &request in &requests[1..] {
                schedule.use_key_of(request, requests[0]);
            }
        }
        let mut decisions: Vec<Decision> = vec![];
        let mut moving: Option<RequestHandle> = None;
        let mut preemptions = 0;
        loop {
            let mut movable = schedule.movable();
            if movable.is_empty() {
                break;
            }
            // The moving request comes first, so that the first run has no preemption.
            if let Some(at) = moving.and_then(|request| movable.iter().position(|&other| other == request)) {
                movable.swap(0, at);
                if scenario.preemptions.is_some_and(|most| preemptions == most) {
                    movable.truncate(1);
                }
            }
            let wanted = prefix.get(decisions.len()).copied().unwrap_or(0);
            let chosen = wanted.min(movable.len() - 1);
            let next = movable[chosen];
            preemptions += usize::from(moving.is_some_and(|request| request != next && movable.contains(&request)));
            moving = Some(next);
            decisions.push(Decision { chosen, movable });
            schedule.step(next).await?;
        }
        schedule.ensure_all_answered()?;
        Ok((schedule, decisions))
    }
}
