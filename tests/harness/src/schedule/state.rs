//! What the tasks of the requests tell the schedule, and the observer that holds each of them at its points.

use std::sync::{Arc, Mutex, MutexGuard};

use box_office::{Observer, Sighting, trace::now_monotonic_us};
use futures_util::{
    FutureExt,
    future::{BoxFuture, ready},
};
use tokio::sync::{Notify, Semaphore};

use super::trace::{Event, Happened, Trace};
use crate::history::{Answer, Micros, Step};

/// The point that a strategy marks after it has given back a lock of its own, one that it reports waiting for by [`Steps::blocked`].
const LOCK_RELEASED: &str = "lock released";

/// What the requests' tasks tell the script.
pub(super) struct Shared {
    pub(super) board: Mutex<Board>,
    pub(super) changed: Notify,
}

#[derive(Default)]
pub(super) struct Board {
    pub(super) trace: Trace,
    pub(super) lanes: Vec<LaneState>,
    /// Locks that were given back while somebody waited, each of which one waiter is about to get. Below zero where a waiter was seen to get its
    /// lock before the one who gave it back came to say so.
    pub(super) releases: isize,
    /// Points where nobody is held.
    pub(super) passes: &'static [&'static str],
}

pub(super) struct LaneState {
    pub(super) standing: Standing,
    pub(super) sent_us: Micros,
    pub(super) answered_us: Option<Micros>,
    pub(super) answer: Option<Answer>,
    pub(super) steps: Vec<Step>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Standing {
    NotStarted,
    Running,
    Held(&'static str),
    /// It has said so itself: it waits for a lock that Postgres knows nothing of.
    Waiting,
    Answered,
}

/// How a move ended for the request that was moved.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Moved {
    Held(&'static str),
    Answered,
    Blocked,
}

impl Shared {
    pub(super) fn board(&self) -> MutexGuard<'_, Board> {
        self.board.lock().expect("nobody panics while writing on the board")
    }
}

/// Holds one request at every point until the script lets it go.
pub(super) struct Held {
    pub(super) lane: usize,
    pub(super) shared: Arc<Shared>,
    pub(super) go: Arc<Semaphore>,
    pub(super) started_us: Micros,
}

impl Observer for Held {
    fn at(&self, sighting: Sighting) -> BoxFuture<'_, ()> {
        let passes = {
            let mut board = self.shared.board();
            let place = format!("{}:{}", sighting.place.file(), sighting.place.line());
            let passes = board.passes.contains(&sighting.step);
            let standing = if passes {
                Standing::Running
            } else {
                Standing::Held(sighting.step)
            };
            board.got_on(self.lane, standing);
            if sighting.step == LOCK_RELEASED {
                board.releases += 1;
                board.releases = board.releases.min(board.waiting().cast_signed());
            }
            board.lanes[self.lane].steps.push(Step {
                at_us: now_monotonic_us() - self.started_us,
                step: sighting.step.to_owned(),
                saw: sighting.saw.clone(),
                place: place.clone(),
            });
            board.trace.events.push(Event {
                lane: self.lane,
                happened: Happened::Passed {
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
            let permit = self.go.acquire().await.expect("the script never closes it");
            permit.forget();
        })
    }

    fn blocked(&self, sighting: Sighting) {
        {
            let mut board = self.shared.board();
            board.lanes[self.lane].standing = Standing::Waiting;
            board.trace.events.push(Event {
                lane: self.lane,
                happened: Happened::Waits {
                    why: sighting.step.to_owned(),
                },
            });
        }
        self.shared.changed.notify_one();
    }
}

impl Board {
    /// A request came to a new standing by itself. If it was waiting, it has got the lock.
    pub(super) fn got_on(&mut self, lane: usize, standing: Standing) {
        if self.lanes[lane].standing == Standing::Waiting {
            self.releases -= 1;
        }
        self.lanes[lane].standing = standing;
    }

    pub(super) fn waiting(&self) -> usize {
        self.lanes
            .iter()
            .filter(|lane| lane.standing == Standing::Waiting)
            .count()
    }
}
