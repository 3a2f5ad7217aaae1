//! Every feasible order of a few requests, one after another.
//!
//! The search is depth first, by replay: a run follows the choices of its prefix, then always takes the first request that can move; the
//! last choice that had an alternative is changed for the next run. What the engine decides by itself, such as who wins among waiters, is
//! not a choice: a replay that meets another set of movable requests goes on from what it finds.

use anyhow::ensure;

use super::{RequestHandle, Schedule, ScheduleRunner, Trace};
use crate::{
    history::{Answer, History},
    judge::{Verdict, judge},
};

/// A bound on the search: more runs than this are a mistake in the test, not a longer wait.
const MOST_RUNS: usize = 5_000;

/// What is tried in every order.
#[derive(Clone, Copy, Debug)]
pub struct Scenario {
    /// Tickets on sale.
    pub capacity: u32,
    /// One for each buyer: how many requests that buyer sends, each under its own key.
    pub clicks: &'static [u32],
    /// Points that a request passes without being held: what happens right before and right after them is one step.
    pub passes: &'static [&'static str],
    /// How often a request may be interrupted while it could go on. `None`: as often as there are points.
    pub preemptions: Option<usize>,
}

/// What came of every order.
#[derive(Debug)]
pub struct Exploration {
    /// How many orders there were.
    pub orders: usize,
    /// In how many of them somebody was blocked, so that the order went on differently than was chosen.
    pub blocked: usize,
    /// Those in which something was broken.
    pub broken: Vec<Broken>,
    /// For each order, what each request was told: those of the first buyer first.
    pub answers: Vec<Vec<Answer>>,
}

/// An order that broke something.
#[derive(Debug)]
pub struct Broken {
    /// What the judge says.
    pub verdict: Verdict,
    /// How it came about.
    pub trace: Trace,
}

/// Whose keys the requests of a scenario carry.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Keys {
    Own,
    TheFirstOnes,
}

/// One decision of a run: who was moved, and who could have been.
struct Decision {
    chosen: usize,
    movable: Vec<RequestHandle>,
}

impl ScheduleRunner {
    /// Runs the scenario in every feasible order.
    ///
    /// # Errors
    /// A step did not end in time, or there are too many orders.
    pub async fn explore(&self, scenario: Scenario) -> anyhow::Result<Exploration> {
        self.every_order(scenario, Keys::Own).await
    }

    /// The same, but all requests carry one key, that of the first.
    ///
    /// # Errors
    /// As [`explore`](Self::explore).
    pub async fn explore_under_one_key(&self, scenario: Scenario) -> anyhow::Result<Exploration> {
        self.every_order(scenario, Keys::TheFirstOnes).await
    }

    async fn every_order(&self, scenario: Scenario, keys: Keys) -> anyhow::Result<Exploration> {
        let mut explored = Exploration {
            orders: 0,
            blocked: 0,
            broken: vec![],
            answers: vec![],
        };
        let mut prefix: Vec<usize> = vec![];
        loop {
            ensure!(
                explored.orders < MOST_RUNS,
                "more than {MOST_RUNS} orders: take fewer requests or preemptions"
            );
            let (schedule, decisions) = self.one_order(scenario, keys, &prefix).await?;
            explored.orders += 1;
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
            // The last decision with an alternative that was not tried yet.
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

    async fn one_order(
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
        if keys == Keys::TheFirstOnes {
            let lanes = schedule.movable();
            for &lane in &lanes[1..] {
                schedule.use_key_of(lane, lanes[0]);
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
            // The one that is on its way comes first, so that the first run is the one without preemption.
            if let Some(at) = moving.and_then(|lane| movable.iter().position(|&other| other == lane)) {
                movable.swap(0, at);
                if scenario.preemptions.is_some_and(|most| preemptions == most) {
                    movable.truncate(1);
                }
            }
            let wanted = prefix.get(decisions.len()).copied().unwrap_or(0);
            let chosen = wanted.min(movable.len() - 1);
            let next = movable[chosen];
            preemptions += usize::from(moving.is_some_and(|lane| lane != next && movable.contains(&lane)));
            moving = Some(next);
            decisions.push(Decision { chosen, movable });
            schedule.step(next).await?;
        }
        schedule.ensure_all_answered()?;
        Ok((schedule, decisions))
    }
}
