//! One move of a schedule: lets a request go on, and waits until no request runs any more.

use std::{sync::Arc, time::Duration};

use anyhow::{Context, anyhow};
use box_office::{Steps, trace::now_monotonic_us};

use super::{
    blocked::{Blocked, CURRENT_REQUEST, Holder},
    runner::answer_of,
    state::{HoldingObserver, RequestStatus, StepOutcome},
    stepping::Schedule,
    trace::{Event, EventKind},
};
use crate::judge::in_words;

/// How long a step may take before the schedule gives up and says what it waited for.
pub(super) const TIMEOUT: Duration = Duration::from_secs(10);

/// How long to leave Postgres alone between two looks at who is blocked.
const POLL_INTERVAL: Duration = Duration::from_millis(1);

impl Schedule<'_> {
    /// Lets one request move, and waits until everything stands still again.
    pub(super) async fn advance(&mut self, lane: usize) -> anyhow::Result<StepOutcome> {
        let (status, before) = {
            let state = self.shared.state();
            (state.lanes[lane].status, state.trace.events.len())
        };
        match status {
            RequestStatus::Answered => return Ok(StepOutcome::Answered),
            RequestStatus::NotStarted => self.start(lane),
            RequestStatus::Held(_) => {
                self.shared.state().lanes[lane].status = RequestStatus::Running;
                self.requests[lane].permits.add_permits(1);
            }
            // It is blocked, unless somebody else's move has freed it.
            RequestStatus::Running | RequestStatus::Waiting => {}
        }
        let moved = tokio::time::timeout(TIMEOUT, self.settle(lane)).await.map_err(|_| {
            anyhow!(
                "after {TIMEOUT:?} {} had not reached a point, answered, or been seen blocked by a held request\n{}",
                self.name(lane),
                self.trace()
            )
        })?;
        // Whoever was set free by this move runs beside it; in the table, cause comes before effect.
        self.shared.state().trace.events[before..].sort_by_key(|event| event.lane != lane);
        moved
    }

    /// Ends when no request moves any more.
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
                .context("asking Postgres who is blocked")?;
            // Nobody moved while Postgres was looking, and all that run wait for one that is held.
            if self.running() == running
                && let Some(waits) = self.waits_on_held_requests(&blocked, &running)
            {
                self.record_waits(&waits);
                break;
            }
            // Either way we look again; the pause only spares Postgres.
            let _ = tokio::time::timeout(POLL_INTERVAL, changed).await;
        }
        Ok(match self.shared.state().lanes[moved].status {
            RequestStatus::Held(step) => StepOutcome::Held(step),
            RequestStatus::Answered => StepOutcome::Answered,
            RequestStatus::Running | RequestStatus::Waiting | RequestStatus::NotStarted => StepOutcome::Blocked,
        })
    }

    /// Whether something is sure to happen by itself: a lock was given back and one who waited for it has not said yet that it got it, or
    /// a request has its answer and its transaction is still being rolled back.
    fn is_unsettled(&self) -> bool {
        let state = self.shared.state();
        let answered = state
            .lanes
            .iter()
            .enumerate()
            .filter(|(_, state)| state.status == RequestStatus::Answered);
        state.releases > 0
            || answered
                .into_iter()
                .any(|(lane, _)| self.runner.holders.holds(self.holder(lane)))
    }

    /// Who of those that run waits for whom, as lanes, if each of them does wait, and in the end for one that is held.
    fn waits_on_held_requests(&self, blocked: &Blocked, running: &[usize]) -> Option<Vec<(usize, usize)>> {
        let lane_of = |pid| {
            let holder = self.runner.holders.of(pid)?;
            (holder.schedule == self.sale).then_some(holder.lane)
        };
        let waits: Vec<(usize, usize)> = blocked
            .pids()
            .filter_map(|pid| Some((lane_of(pid)?, lane_of(blocked.root(pid)?)?)))
            .collect();
        let state = self.shared.state();
        let each = running
            .iter()
            .all(|lane| waits.iter().any(|(waiting, _)| waiting == lane));
        let held = waits.iter().all(|&(_, root)| {
            !matches!(
                state.lanes[root].status,
                RequestStatus::Running | RequestStatus::Answered
            )
        });
        (each && held).then_some(waits)
    }

    /// Writes a row of the trace for each that was not blocked before.
    fn record_waits(&mut self, waits: &[(usize, usize)]) {
        let mut state = self.shared.state();
        self.blocked
            .retain(|lane| waits.iter().any(|(waiting, _)| waiting == lane));
        for &(lane, root) in waits {
            if self.blocked.insert(lane) {
                let why = format!("waits for {}'s row lock", state.trace.lanes[root]);
                state.trace.events.push(Event {
                    lane,
                    kind: EventKind::Waits { why },
                });
            }
        }
    }

    fn holder(&self, lane: usize) -> Holder {
        Holder {
            schedule: self.sale,
            lane,
        }
    }

    fn running(&self) -> Vec<usize> {
        let state = self.shared.state();
        let lanes = state.lanes.iter().enumerate();
        lanes
            .filter(|(_, state)| state.status == RequestStatus::Running)
            .map(|(lane, _)| lane)
            .collect()
    }

    fn start(&mut self, lane: usize) {
        let now = now_monotonic_us() - self.started_us;
        {
            let mut state = self.shared.state();
            state.lanes[lane].status = RequestStatus::Running;
            state.lanes[lane].sent_us = now;
        }
        let steps = Steps::observed_by(Arc::new(HoldingObserver {
            lane,
            shared: self.shared.clone(),
            permits: self.requests[lane].permits.clone(),
            started_us: self.started_us,
        }));
        let order = self.requests[lane].order.clone();
        let (reserve, shared, started_us) = (self.runner.reserve.clone(), self.shared.clone(), self.started_us);
        let answering = async move {
            let answer = answer_of(reserve.reserve(&order, &steps).await);
            {
                let mut state = shared.state();
                state.transition(lane, RequestStatus::Answered);
                state.lanes[lane].answered_us = Some(now_monotonic_us() - started_us);
                let words = in_words(&answer);
                state.lanes[lane].answer = Some(answer);
                state.trace.events.push(Event {
                    lane,
                    kind: EventKind::Answered { answer: words },
                });
            }
            shared.changed.notify_one();
        };
        tokio::spawn(CURRENT_REQUEST.scope(self.holder(lane), answering));
    }
}
