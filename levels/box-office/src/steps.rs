//! Scheduling points: the named places of a strategy where a test can hold a request, and a trace is written.
//!
//! In production nobody watches, and a point is one branch.

use std::{
    fmt,
    future::{IntoFuture, Ready, ready},
    panic::Location,
    sync::Arc,
};

use futures_util::future::{BoxFuture, Either};

/// What a request did, and where in the source it says so.
#[derive(Clone, Debug)]
pub struct Sighting {
    /// The point's name, such as `stock read`.
    pub step: &'static str,
    /// What was found there, if the strategy tells: `1` beside `stock read`.
    pub saw: Option<String>,
    /// The line that marks the point.
    pub place: &'static Location<'static>,
}

/// Watches one request: a schedule that holds it, or a recorder that writes a trace.
pub trait Observer: Send + Sync {
    /// The request came to a point. It goes on when the future ends.
    fn at(&self, sighting: Sighting) -> BoxFuture<'_, ()>;

    /// The request failed to get a lock and waits for it. It is not held.
    fn blocked(&self, sighting: Sighting);
}

/// The scheduling points of one request.
#[derive(Clone, Default)]
pub struct Steps(Option<Arc<dyn Observer>>);

impl Steps {
    /// Nobody watches.
    pub fn unobserved() -> Self {
        Self(None)
    }

    /// The observer is told of every point.
    pub fn observed_by(observer: Arc<dyn Observer>) -> Self {
        Self(Some(observer))
    }

    /// Whoever watches.
    pub(crate) fn observer(&self) -> Option<&dyn Observer> {
        self.0.as_deref()
    }

    /// Marks a point: `steps.at("stock read").await`.
    #[track_caller]
    pub fn at(&self, step: &'static str) -> Point<'_> {
        Point {
            observer: self.0.as_deref(),
            sighting: Sighting {
                step,
                saw: None,
                place: Location::caller(),
            },
        }
    }

    /// Tells that a lock was not free and the request waits for it: `steps.blocked("waiting for the lock")`.
    #[track_caller]
    pub fn blocked(&self, step: &'static str) {
        if let Some(observer) = self.0.as_deref() {
            observer.blocked(Sighting {
                step,
                saw: None,
                place: Location::caller(),
            });
        }
    }
}

/// A scheduling point on its way to being passed. Await it.
#[must_use = "a scheduling point does nothing until it is awaited"]
pub struct Point<'a> {
    observer: Option<&'a dyn Observer>,
    sighting: Sighting,
}

impl Point<'_> {
    /// Adds what was found there to the trace: `steps.at("stock read").saw(stock).await`.
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
