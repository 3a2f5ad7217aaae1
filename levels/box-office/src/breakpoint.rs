//! A breakpoint: pauses this process (SIGSTOP) at a scheduling point, so that a test can kill or
//! resume it there.

use std::{
    str::FromStr,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use futures_util::future::{BoxFuture, FutureExt};
use rustix::process::{Signal, getpid, kill_process};
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;

use crate::{Observer, Sighting, Steps};

/// A scheduling point and the hit at which to pause, counted from 1 over all requests: `stock
/// read#1`.
#[derive(Clone, Debug)]
pub struct BreakpointSpec {
    point: String,
    hit: u64,
}

impl FromStr for BreakpointSpec {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        const EXPECTED: &str = "a scheduling point and the number of the hit, such as stock read#1";
        let (point, hit) = text.rsplit_once('#').ok_or(EXPECTED)?;
        match hit.parse() {
            Ok(hit) if hit > 0 && !point.is_empty() => Ok(Self {
                point: point.to_owned(),
                hit,
            }),
            _ => Err(EXPECTED),
        }
    }
}

/// A breakpoint with its hit count.
pub(crate) struct Breakpoint {
    spec: BreakpointSpec,
    hits: AtomicU64,
    /// Cancelled once the process may be paused.
    armed: CancellationToken,
}

impl Breakpoint {
    pub(crate) fn new(spec: BreakpointSpec) -> Arc<Self> {
        Arc::new(Self {
            spec,
            hits: AtomicU64::new(0),
            armed: CancellationToken::new(),
        })
    }

    /// Adds the breakpoint to the scheduling points of one request. Their existing observer comes
    /// first.
    pub(crate) fn observe(self: &Arc<Self>, steps: Steps) -> Steps {
        Steps::observed_by(Arc::new(BreakpointObserver {
            breakpoint: Arc::clone(self),
            steps,
        }))
    }

    /// Allows the process to be paused. What arrives before waits for it: a server that is paused
    /// before it has told its address could not be found.
    pub(crate) fn arm(&self) {
        self.armed.cancel();
    }

    /// Counts the arrival, and pauses the process if it is the specified hit.
    async fn arrive(&self, step: &str) {
        if step != self.spec.point || self.hits.fetch_add(1, Ordering::Relaxed) + 1 != self.spec.hit {
            return;
        }
        self.armed.cancelled().await;
        // Subscribe to SIGCONT before SIGSTOP. The kernel stops the threads one by one, this one
        // perhaps last: awaiting SIGCONT keeps the request from running on until then.
        let continued = signal(SignalKind::from_raw(Signal::CONT.as_raw()));
        let stopped = continued.and_then(|continued| Ok(kill_process(getpid(), Signal::STOP).map(|()| continued)?));
        match stopped {
            Ok(mut continued) => {
                continued.recv().await;
            }
            Err(why) => tracing::error!(%why, "the process could not be paused at {step:?}"),
        }
    }
}

/// The observer of one request.
struct BreakpointObserver {
    breakpoint: Arc<Breakpoint>,
    steps: Steps,
}

impl Observer for BreakpointObserver {
    fn at(&self, sighting: Sighting) -> BoxFuture<'_, ()> {
        async move {
            let step = sighting.step;
            if let Some(observer) = self.steps.observer() {
                observer.at(sighting).await;
            }
            self.breakpoint.arrive(step).await;
        }
        .boxed()
    }

    fn blocked(&self, sighting: Sighting) {
        if let Some(observer) = self.steps.observer() {
            observer.blocked(sighting);
        }
    }
}
