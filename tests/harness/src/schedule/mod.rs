//! Exact schedules: every request is held at its scheduling points, and one moves at a time.
//!
//! A [`Schedule`] of a [`ScheduleRunner`] calls the strategy directly, in this process, on a real
//! database. Nothing depends on timing: a step ends when every request that is not held has reached
//! its next point, has answered, or is observed to be blocked by one that is held.

mod advance;
mod blocked;
mod cancellation;
mod disconnect;
mod explore;
mod runner;
mod state;
mod trace;

pub use cancellation::{cancelled_after_every_poll, never_cancelled};
pub use disconnect::{disconnected_at_every_point, never_disconnected};
pub use explore::{Broken, Exploration, Scenario};
pub use runner::ScheduleRunner;
pub use trace::{Event, EventKind, Trace};

use std::{collections::HashSet, sync::Arc, time::Duration};

use anyhow::{anyhow, bail};
use box_office::{BuyerId, Order, Priority, RequestKey, SaleId};
use tokio::sync::Semaphore;

use advance::TIMEOUT;
use state::{RequestState, RequestStatus, Shared, StepOutcome};

use crate::{
    final_state,
    history::{FORMAT_VERSION, Header, History, Micros, Request},
};

/// Identifies a request of a schedule.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RequestHandle(usize);

/// A sale whose requests are held at their scheduling points.
pub struct Schedule<'a> {
    runner: &'a ScheduleRunner,
    sale: SaleId,
    capacity: u32,
    requests: Vec<PlannedRequest>,
    shared: Arc<Shared>,
    started_us: Micros,
    /// The requests that waited for a row lock at the last query of Postgres.
    blocked: HashSet<usize>,
}

struct PlannedRequest {
    order: Order,
    permits: Arc<Semaphore>,
}

impl Schedule<'_> {
    /// Stops holding requests at these points. The trace still lists them.
    pub fn passes(&mut self, points: &'static [&'static str]) {
        self.shared.state().passes = points;
    }

    /// The id of the sale.
    pub fn sale(&self) -> SaleId {
        self.sale
    }

    /// Adds a buyer with one request under a new key.
    pub fn buyer(&mut self, name: &str) -> RequestHandle {
        let buyer = 1 + self
            .requests
            .iter()
            .map(|request| request.order.buyer)
            .max()
            .unwrap_or(0);
        self.request(name.to_owned(), buyer)
    }

    /// Adds another click of the same buyer: one more request under a new key.
    pub fn click(&mut self, of: RequestHandle) -> RequestHandle {
        let buyer = self.requests[of.0].order.buyer;
        let clicks = self
            .requests
            .iter()
            .filter(|request| request.order.buyer == buyer)
            .count();
        let name = format!("{}, click {}", self.name(of.0), clicks + 1);
        self.request(name, buyer)
    }

    /// Gives a request that has not started the key of another: a repeated order, or another
    /// buyer's request under the same key.
    pub fn use_key_of(&mut self, request: RequestHandle, other: RequestHandle) {
        self.requests[request.0].order.key = self.requests[other.0].order.key.clone();
    }

    fn request(&mut self, name: String, buyer: BuyerId) -> RequestHandle {
        let request = self.requests.len();
        self.requests.push(PlannedRequest {
            order: Order {
                sale: self.sale,
                buyer,
                key: RequestKey::fresh(),
                priority: Priority::Normal,
            },
            permits: Arc::new(Semaphore::new(0)),
        });
        let mut state = self.shared.state();
        state.trace.requests.push(name);
        state.requests.push(RequestState {
            status: RequestStatus::NotStarted,
            sent_us: 0,
            answered_us: None,
            answer: None,
            steps: vec![],
        });
        RequestHandle(request)
    }

    /// Moves a request until it reaches the point `step`.
    ///
    /// # Errors
    /// Fails if the request answers or is blocked first. The error contains the trace.
    pub async fn run_until(&mut self, request: RequestHandle, step: &'static str) -> anyhow::Result<()> {
        loop {
            match self.advance(request.0).await? {
                StepOutcome::Held(reached) if reached == step => return Ok(()),
                StepOutcome::Held(_) => {}
                StepOutcome::Answered => bail!(
                    "{} answered and never reached \"{step}\"\n{}",
                    self.name(request.0),
                    self.trace()
                ),
                StepOutcome::Blocked => bail!(
                    "{} is blocked and did not reach \"{step}\"\n{}",
                    self.name(request.0),
                    self.trace()
                ),
            }
        }
    }

    /// Moves a request until it reaches the point `step`, is blocked, or has answered, whichever
    /// comes first.
    ///
    /// # Errors
    /// Fails if a step times out.
    pub async fn run_towards(&mut self, request: RequestHandle, step: &'static str) -> anyhow::Result<()> {
        while let StepOutcome::Held(reached) = self.advance(request.0).await? {
            if reached == step {
                break;
            }
        }
        Ok(())
    }

    /// Moves a request until it is blocked by one that is held, or by a lock that the test holds on a
    /// connection of its own.
    ///
    /// # Errors
    /// Fails if the request answers without being blocked.
    pub async fn run_until_blocked(&mut self, request: RequestHandle) -> anyhow::Result<()> {
        loop {
            match self.advance(request.0).await? {
                StepOutcome::Blocked => return Ok(()),
                StepOutcome::Held(_) => {}
                StepOutcome::Answered => {
                    bail!(
                        "{} answered and was never blocked\n{}",
                        self.name(request.0),
                        self.trace()
                    )
                }
            }
        }
    }

    /// Moves a request until it has its answer.
    ///
    /// # Errors
    /// Fails if the request is blocked by one that is held. Move that one first.
    pub async fn run_to_completion(&mut self, request: RequestHandle) -> anyhow::Result<()> {
        loop {
            match self.advance(request.0).await? {
                StepOutcome::Answered => return Ok(()),
                StepOutcome::Held(_) => {}
                StepOutcome::Blocked => bail!(
                    "{} is blocked and can't complete\n{}",
                    self.name(request.0),
                    self.trace()
                ),
            }
        }
    }

    /// Moves a request to its next point, and waits until no request is running.
    ///
    /// # Errors
    /// Fails if the step times out.
    pub async fn step(&mut self, request: RequestHandle) -> anyhow::Result<()> {
        self.advance(request.0).await.map(drop)
    }

    /// The requests that can move: neither answered nor blocked.
    pub fn movable(&self) -> Vec<RequestHandle> {
        let state = self.shared.state();
        let requests = state.requests.iter().enumerate();
        requests
            .filter(|(_, state)| matches!(state.status, RequestStatus::NotStarted | RequestStatus::Held(_)))
            .map(|(request, _)| RequestHandle(request))
            .collect()
    }

    /// Moves all requests to their answers, in the order in which they were added.
    ///
    /// # Errors
    /// Fails if a step times out or a request gets no answer.
    pub async fn run_all_to_completion(&mut self) -> anyhow::Result<()> {
        while let Some(&first) = self.movable().first() {
            self.step(first).await?;
        }
        self.ensure_all_answered()
    }

    /// Whether any request has waited for another.
    pub fn was_blocked(&self) -> bool {
        let state = self.shared.state();
        state
            .trace
            .events
            .iter()
            .any(|event| matches!(event.kind, EventKind::Waits { .. }))
    }

    /// Checks that every request has its answer.
    ///
    /// # Errors
    /// Names the first request without one.
    pub fn ensure_all_answered(&self) -> anyhow::Result<()> {
        let state = self.shared.state();
        match state
            .requests
            .iter()
            .position(|state| state.status != RequestStatus::Answered)
        {
            None => Ok(()),
            Some(request) => bail!(
                "{} never gets an answer\n{}",
                state.trace.requests[request],
                state.trace
            ),
        }
    }

    /// The trace so far.
    pub fn trace(&self) -> Trace {
        self.shared.state().trace.clone()
    }

    /// The history of the schedule, with the current rows.
    ///
    /// # Errors
    /// Fails if a request has no answer or the rows can't be read.
    pub async fn history(&self) -> anyhow::Result<History> {
        let sold = final_state::read(&self.runner.observer, self.sale).await?;
        let state = self.shared.state();
        let requests = state
            .requests
            .iter()
            .zip(&self.requests)
            .enumerate()
            .map(|(index, (progress, planned))| {
                let answer = progress.answer.clone();
                Ok(Request {
                    request: index as u64,
                    buyer: planned.order.buyer,
                    key: planned.order.key.to_string(),
                    sent_us: progress.sent_us,
                    answered_us: progress.answered_us,
                    answer: answer.ok_or_else(|| anyhow!("{} has no answer yet", state.trace.requests[index]))?,
                    steps: progress.steps.clone(),
                })
            });
        Ok(History {
            header: Header {
                version: FORMAT_VERSION,
                strategy: self.runner.strategy.name.to_owned(),
                sale: self.sale,
                capacity: u64::from(self.capacity),
                deadline_us: micros(TIMEOUT) * self.requests.len() as Micros,
                expiry_us: None,
                stock: Some(sold.stock),
            },
            requests: requests.collect::<anyhow::Result<_>>()?,
            rows: Some(sold.rows),
            faults: vec![],
            payments: None,
            decisions: None,
        })
    }

    fn name(&self, request: usize) -> String {
        self.shared.state().trace.requests[request].clone()
    }
}

fn micros(duration: Duration) -> Micros {
    u64::try_from(duration.as_micros()).unwrap_or(Micros::MAX)
}
