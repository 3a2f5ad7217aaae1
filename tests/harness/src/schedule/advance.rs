//! One step of a schedule: resumes a request, and waits until no request is running.

use std::{sync::Arc, time::Duration};

use anyhow::{Context, anyhow};
use box_office::{Steps, trace::now_monotonic_us};

use super::{
    Schedule,
    blocked::{Blocked, CURRENT_REQUEST, Holder},
    runner::answer_of,
    state::{HoldingObserver, RequestStatus, StepOutcome},
    trace::{Event, EventKind},
};
use crate::judge::in_words;

/// Time limit of one step.
pub(super) const TIMEOUT: Duration = Duration::from_secs(10);

/// Interval between two queries of the blocked backends.
const POLL_INTERVAL: Duration = Duration::from_millis(1);

impl Schedule<'_> {
    /// Resumes one request, and waits until no request is running.
    pub(super) async fn advance(&mut self, request: usize) -> anyhow::Result<StepOutcome> {
        let (status, before) = {
            let state = self.shared.state();
            (state.requests[request].status, state.trace.events.len())
        };
        match status {
            RequestStatus::Answered => return Ok(StepOutcome::Answered),
            RequestStatus::NotStarted => self.start(request),
            RequestStatus::Held(_) => {
                self.shared.state().requests[request].status = RequestStatus::Running;
                self.requests[request].permits.add_permits(1);
            }
            // Blocked, unless another request's step has unblocked it.
            RequestStatus::Running | RequestStatus::Waiting => {}
        }
        let moved = tokio::time::timeout(TIMEOUT, self.settle(request)).await.map_err(|_| {
            anyhow!(
                "after {TIMEOUT:?} {} had not reached a point, answered, or been seen blocked by a held request\n{}",
                self.name(request),
                self.trace()
            )
        })?;
        // A request that this step unblocked runs concurrently. In the trace, cause precedes
        // effect.
        self.shared.state().trace.events[before..].sort_by_key(|event| event.request != request);
        moved
    }

    /// Waits until no request is running.
    async fn settle(&mut self, moved: usize) -> anyhow::Result<StepOutcome> {
        let shared = self.shared.clone();
        loop {
            let changed = shared.changed.notified();
            if self.is_unsettled() {
                let _ = tokio::time::timeout(POLL_INTERVAL, changed).await;
                continue;
            }
            let running = self.running();
            if running.is_empty() {
                break;
            }
            let blocked = Blocked::query(&self.runner.observer)
                .await
                .context("querying Postgres for blocked backends")?;
            // No request moved during the query, and all that run wait for one that is held.
            if self.running() == running
                && let Some(waits) = self.waits_on_held_requests(&blocked, &running)
            {
                self.record_waits(&waits);
                break;
            }
            // Correctness does not depend on this pause; it only limits the load on Postgres.
            let _ = tokio::time::timeout(POLL_INTERVAL, changed).await;
        }
        Ok(match self.shared.state().requests[moved].status {
            RequestStatus::Held(step) => StepOutcome::Held(step),
            RequestStatus::Answered => StepOutcome::Answered,
            RequestStatus::Running | RequestStatus::Waiting | RequestStatus::NotStarted => StepOutcome::Blocked,
        })
    }

    /// Whether an event is pending: a waiter has not yet reported a released lock as taken, or an
    /// answered request still holds a connection, whose transaction is being rolled back.
    fn is_unsettled(&self) -> bool {
        let state = self.shared.state();
        let answered = state
            .requests
            .iter()
            .enumerate()
            .filter(|(_, state)| state.status == RequestStatus::Answered);
        state.releases > 0
            || answered
                .into_iter()
                .any(|(request, _)| self.runner.holders.holds(self.holder(request)))
    }

    /// The waits of the running requests as pairs of requests (waiter, root blocker; `None` is a
    /// connection of the test itself). `None` unless each of them waits for a held request or for
    /// the test, directly or indirectly.
    fn waits_on_held_requests(&self, blocked: &Blocked, running: &[usize]) -> Option<Vec<(usize, Option<usize>)>> {
        let request_of = |pid| {
            let holder = self.runner.holders.of(pid)?;
            (holder.schedule == self.sale).then_some(holder.request)
        };
        let waits: Vec<(usize, Option<usize>)> = blocked
            .pids()
            .filter_map(|pid| {
                let root = blocked.root(pid)?;
                let root_request = request_of(root);
                (root_request.is_some() || blocked.is_idle(root)).then_some((request_of(pid)?, root_request))
            })
            .collect();
        let state = self.shared.state();
        let each = running
            .iter()
            .all(|request| waits.iter().any(|(waiting, _)| waiting == request));
        let held = waits.iter().filter_map(|&(_, root)| root).all(|root| {
            !matches!(
                state.requests[root].status,
                RequestStatus::Running | RequestStatus::Answered
            )
        });
        (each && held).then_some(waits)
    }

    /// Adds a trace event for each request that was not blocked before.
    fn record_waits(&mut self, waits: &[(usize, Option<usize>)]) {
        let mut state = self.shared.state();
        self.blocked
            .retain(|request| waits.iter().any(|(waiting, _)| waiting == request));
        for &(request, root) in waits {
            if self.blocked.insert(request) {
                let holder = root.map_or("another transaction", |root| state.trace.requests[root].as_str());
                let why = format!("waits for {holder}'s row lock");
                state.trace.events.push(Event {
                    request,
                    kind: EventKind::Waits { why },
                });
            }
        }
    }

    fn holder(&self, request: usize) -> Holder {
        Holder {
            schedule: self.sale,
            request,
        }
    }

    fn running(&self) -> Vec<usize> {
        let state = self.shared.state();
        let requests = state.requests.iter().enumerate();
        requests
            .filter(|(_, state)| state.status == RequestStatus::Running)
            .map(|(request, _)| request)
            .collect()
    }

    fn start(&mut self, request: usize) {
        let now = now_monotonic_us() - self.started_us;
        {
            let mut state = self.shared.state();
            state.requests[request].status = RequestStatus::Running;
            state.requests[request].sent_us = now;
        }
        let steps = Steps::observed_by(Arc::new(HoldingObserver {
            request,
            shared: self.shared.clone(),
            permits: self.requests[request].permits.clone(),
            started_us: self.started_us,
        }));
        let order = self.requests[request].order.clone();
        let (reserve, shared, started_us) = (self.runner.reserve.clone(), self.shared.clone(), self.started_us);
        let answering = async move {
            let answer = answer_of(reserve.reserve(&order, &steps).await);
            {
                let mut state = shared.state();
                state.transition(request, RequestStatus::Answered);
                state.requests[request].answered_us = Some(now_monotonic_us() - started_us);
                let words = in_words(&answer);
                state.requests[request].answer = Some(answer);
                state.trace.events.push(Event {
                    request,
                    kind: EventKind::Answered { answer: words },
                });
            }
            shared.changed.notify_one();
        };
        tokio::spawn(CURRENT_REQUEST.scope(self.holder(request), answering));
    }
}
