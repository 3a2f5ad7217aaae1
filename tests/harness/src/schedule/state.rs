//! The state that the requests' tasks share with the schedule, and the observer that holds a
//! request at its points.

use std::sync::{Arc, Mutex, MutexGuard};

use box_office::{Observer, Sighting, points, trace::now_monotonic_us};
use futures_util::{
    FutureExt,
    future::{BoxFuture, ready},
};
use tokio::sync::{Notify, Semaphore};

use super::trace::{Event, EventKind, Trace};
use crate::history::{Answer, Micros, Step};

/// The state that the requests' tasks share with the schedule.
pub(super) struct Shared {
    pub(super) state: Mutex<State>,
    pub(super) changed: Notify,
}

#[derive(Default)]
pub(super) struct State {
    pub(super) trace: Trace,
    pub(super) requests: Vec<RequestState>,
    /// Locks that were released while a request waited, each of which one waiter is about to take.
    /// Negative if a waiter reported its lock before the holder reported the release.
    pub(super) releases: isize,
    /// Points at which no request is held.
    pub(super) passes: &'static [&'static str],
}

pub(super) struct RequestState {
    pub(super) status: RequestStatus,
    pub(super) sent_us: Micros,
    pub(super) answered_us: Option<Micros>,
    pub(super) answer: Option<Answer>,
    pub(super) steps: Vec<Step>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum RequestStatus {
    NotStarted,
    Running,
    Held(&'static str),
    /// Waits for a lock outside Postgres, as the strategy reported.
    Waiting,
    Answered,
}

/// The result of a step for the request that was moved.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum StepOutcome {
    Held(&'static str),
    Answered,
    Blocked,
}

impl Shared {
    pub(super) fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("no task panics while it holds the lock")
    }
}

/// Holds one request at every point until the schedule resumes it.
pub(super) struct HoldingObserver {
    pub(super) request: usize,
    pub(super) shared: Arc<Shared>,
    pub(super) permits: Arc<Semaphore>,
    pub(super) started_us: Micros,
}

impl Observer for HoldingObserver {
    fn at(&self, sighting: Sighting) -> BoxFuture<'_, ()> {
        let passes = {
            let mut state = self.shared.state();
            let place = format!("{}:{}", sighting.place.file(), sighting.place.line());
            let passes = state.passes.contains(&sighting.step);
            let status = if passes {
                RequestStatus::Running
            } else {
                RequestStatus::Held(sighting.step)
            };
            state.transition(self.request, status);
            if sighting.step == points::LOCK_RELEASED {
                state.releases += 1;
                state.releases = state.releases.min(state.waiting().cast_signed());
            }
            state.requests[self.request].steps.push(Step {
                at_us: now_monotonic_us() - self.started_us,
                step: sighting.step.to_owned(),
                saw: sighting.saw.clone(),
                place: place.clone(),
            });
            state.trace.events.push(Event {
                request: self.request,
                kind: EventKind::Passed {
                    step: sighting.step,
                    saw: sighting.saw,
                    place,
                },
            });
            passes
        };
        self.shared.changed.notify_one();
        if passes {
            return ready(()).boxed();
        }
        Box::pin(async {
            let permit = self.permits.acquire().await.expect("the schedule never closes it");
            permit.forget();
        })
    }

    fn blocked(&self, sighting: Sighting) {
        {
            let mut state = self.shared.state();
            state.requests[self.request].status = RequestStatus::Waiting;
            state.trace.events.push(Event {
                request: self.request,
                kind: EventKind::Waits {
                    why: sighting.step.to_owned(),
                },
            });
        }
        self.shared.changed.notify_one();
    }
}

impl State {
    /// Sets the status of a request that moved by itself. If it was waiting, it has taken the lock.
    pub(super) fn transition(&mut self, request: usize, status: RequestStatus) {
        if self.requests[request].status == RequestStatus::Waiting {
            self.releases -= 1;
        }
        self.requests[request].status = status;
    }

    pub(super) fn waiting(&self) -> usize {
        self.requests
            .iter()
            .filter(|request| request.status == RequestStatus::Waiting)
            .count()
    }
}
