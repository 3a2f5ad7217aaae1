//! Stops this process at a scheduling point, so that a test can kill, freeze or leave a server just there.

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

use crate::{Observer, Sighting, Steps};

/// A scheduling point, and which time of all the times that requests come to it: `stock read#1`.
#[derive(Clone, Debug)]
pub struct BreakpointSpec {
    point: String,
    time: u64,
}

impl FromStr for BreakpointSpec {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        const TAKES: &str = "a scheduling point and which time it is come to, such as stock read#1";
        let (point, time) = text.rsplit_once('#').ok_or(TAKES)?;
        match time.parse() {
            Ok(time) if time > 0 && !point.is_empty() => Ok(Self {
                point: point.to_owned(),
                time,
            }),
            _ => Err(TAKES),
        }
    }
}

/// Counts how often requests come to the point.
pub(crate) struct Breakpoint {
    at: BreakpointSpec,
    times: AtomicU64,
}

impl Breakpoint {
    pub(crate) fn new(at: BreakpointSpec) -> Arc<Self> {
        Arc::new(Self {
            at,
            times: AtomicU64::new(0),
        })
    }

    /// The steps of one request, at which the process may stop. Whoever else watches them is told first.
    pub(crate) fn watch(self: &Arc<Self>, steps: Steps) -> Steps {
        Steps::observed_by(Arc::new(BreakpointObserver {
            breakpoint: Arc::clone(self),
            steps,
        }))
    }

    async fn reached(&self, step: &str) {
        if step != self.at.point || self.times.fetch_add(1, Ordering::Relaxed) + 1 != self.at.time {
            return;
        }
        // Listened for before it can come. A stop takes the threads one after another, this one perhaps last: it must not run on by itself.
        let continued = signal(SignalKind::from_raw(Signal::CONT.as_raw()));
        let stopped = continued.and_then(|continued| Ok(kill_process(getpid(), Signal::STOP).map(|()| continued)?));
        match stopped {
            Ok(mut continued) => {
                continued.recv().await;
            }
            Err(why) => tracing::error!(%why, "the process could not be stopped at {step:?}"),
        }
    }
}

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
            self.breakpoint.reached(step).await;
        }
        .boxed()
    }

    fn blocked(&self, sighting: Sighting) {
        if let Some(observer) = self.steps.observer() {
            observer.blocked(sighting);
        }
    }
}
