//! Scheduling points: named places in a strategy at which a test can suspend a request and a trace
//! is recorded. A server also measures how long its reservations take from each to the next, and from
//! the last to the answer.
//!
//! Without an observer, as in production, a scheduling point costs the update of a histogram.

use std::{
    fmt,
    future::{IntoFuture, Ready, ready},
    panic::Location,
    sync::Arc,
};

use futures_util::future::{BoxFuture, Either};

use crate::{Outcome, ReserveError, metrics::StepClock};

/// One arrival of a request at a scheduling point.
#[derive(Clone, Debug)]
pub struct Sighting {
    /// The name of the scheduling point, such as `stock read`.
    pub step: &'static str,
    /// The value that the strategy reports there, such as `1` at `stock read`.
    pub saw: Option<String>,
    /// The source location of the scheduling point.
    pub place: &'static Location<'static>,
}

/// Observes one request: a schedule that suspends it, or a recorder that writes a trace.
pub trait Observer: Send + Sync {
    /// The request has reached a scheduling point. It resumes when the future completes.
    fn at(&self, sighting: Sighting) -> BoxFuture<'_, ()>;

    /// The request is blocked: it waits for a lock that is held. The observer does not suspend it.
    fn blocked(&self, sighting: Sighting);
}

/// The scheduling points of one request.
#[derive(Clone, Default)]
pub struct Steps {
    observer: Option<Arc<dyn Observer>>,
    clock: Option<Arc<StepClock>>,
}

impl Steps {
    /// Scheduling points without an observer.
    pub fn unobserved() -> Self {
        Self::default()
    }

    /// Scheduling points that notify this observer.
    pub fn observed_by(observer: Arc<dyn Observer>) -> Self {
        Self {
            observer: Some(observer),
            clock: None,
        }
    }

    /// The same scheduling points, measured by this clock.
    pub(crate) fn timed(self, clock: StepClock) -> Self {
        Self {
            clock: Some(Arc::new(clock)),
            ..self
        }
    }

    /// The observer, if there is one.
    pub(crate) fn observer(&self) -> Option<&dyn Observer> {
        self.observer.as_deref()
    }

    /// Marks a scheduling point: `steps.at("stock read").await`.
    #[track_caller]
    pub fn at(&self, step: &'static str) -> Point<'_> {
        if let Some(clock) = &self.clock {
            clock.reached(step);
        }
        Point {
            observer: self.observer(),
            sighting: Sighting {
                step,
                saw: None,
                place: Location::caller(),
            },
        }
    }

    /// The reservation has ended. `None`: it panicked.
    pub(crate) fn ended(&self, result: Option<&Result<Outcome, ReserveError>>) {
        if let Some(clock) = &self.clock {
            clock.ended(result);
        }
    }

    /// Reports that the request waits for a lock that is held: `steps.blocked("waiting for the
    /// lock")`.
    #[track_caller]
    pub fn blocked(&self, step: &'static str) {
        if let Some(observer) = self.observer() {
            observer.blocked(Sighting {
                step,
                saw: None,
                place: Location::caller(),
            });
        }
    }
}

/// A scheduling point that the request has reached. The request passes it by awaiting it.
#[must_use = "a scheduling point does nothing until it is awaited"]
pub struct Point<'a> {
    observer: Option<&'a dyn Observer>,
    sighting: Sighting,
}

impl Point<'_> {
    /// Records a value with the point: `steps.at("stock read").saw(stock).await`.
    pub fn saw(mut self, value: impl fmt::Display) -> Self {
        if self.observer.is_some() {
            self.sighting.saw = Some(value.to_string());
        }
        self
    }
}

impl<'a> IntoFuture for Point<'a> {
    type Output = ();
    type IntoFuture = Either<Ready<()>, BoxFuture<'a, ()>>;

    fn into_future(self) -> Self::IntoFuture {
        match self.observer {
            None => Either::Left(ready(())),
            Some(observer) => Either::Right(observer.at(self.sighting)),
        }
    }
}
