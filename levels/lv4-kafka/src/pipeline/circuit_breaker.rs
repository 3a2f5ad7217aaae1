//! A circuit breaker: while a backend is away, calls to it are rejected at once instead of waiting
//! for a timeout each.
//!
//! *Closed*: every call is admitted, and consecutive failures are counted. *Open*: after too many,
//! every call is rejected for a while. *Half-open*: then a single call is admitted, the probe. If it
//! succeeds the breaker closes, if it fails the breaker opens again, and if it ends without a result
//! the next call is the probe.
//!
//! Guarantee: while the breaker is not closed, at most one admitted call is in flight. A result
//! counts only in the state in which its call was admitted: an answer that arrives late neither
//! closes nor opens it.
//!
//! Limit: each instance learns of an outage by itself, from calls that fail. The first ones take as
//! long as their own timeouts. A slow backend is no outage, as long as its answers arrive in time.
//!
//! Cost: a mutex of this process for each call.
//!
//! M. Nygard, "Release It!", 2nd edition, 2018, "Circuit Breaker". Book: LV.4, "Circuit breaker".

use std::{
    sync::{Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use box_office::{CircuitBreakerMetrics, CircuitState, Indeterminate};

/// When a circuit breaker opens, and for how long.
#[derive(Clone, Copy, Debug)]
pub(super) struct Policy {
    /// The number of consecutive failures that open it.
    pub(super) failures: u32,
    /// How long it rejects every call before it admits a probe.
    pub(super) open_for: Duration,
}

/// The circuit breaker of one backend. All callers of this process share it.
pub(super) struct CircuitBreaker {
    backend: &'static str,
    machine: Mutex<Machine>,
    metrics: CircuitBreakerMetrics,
}

/// The error of a call that was rejected: the backend was not called.
#[derive(Clone, Copy, Debug, thiserror::Error)]
#[error("the circuit breaker of {backend} is open")]
pub(super) struct Rejected {
    backend: &'static str,
    /// When it is worth trying again.
    pub(super) retry_after: Duration,
}

impl From<Rejected> for Indeterminate {
    fn from(rejected: Rejected) -> Self {
        Self::BackendAway(rejected.into())
    }
}

impl CircuitBreaker {
    /// A closed circuit breaker. `backend` is its name in metrics and logs.
    pub(super) fn new(backend: &'static str, policy: Policy, metrics: CircuitBreakerMetrics) -> Self {
        metrics.set(backend, CircuitState::Closed);
        Self {
            backend,
            machine: Mutex::new(Machine::new(policy)),
            metrics,
        }
    }

    // ANCHOR: try_acquire
    /// Asks for permission to call the backend. A permit that is dropped has no result.
    ///
    /// # Errors
    /// [`Rejected`] if the breaker is open, or half-open and a probe is in flight.
    pub(super) fn try_acquire(&self) -> Result<Permit<'_>, Rejected> {
        let admitted = self.update(|machine| machine.try_acquire(Instant::now()));
        match admitted {
            Ok(generation) => Ok(Permit {
                breaker: self,
                generation,
                result: CallResult::Abandoned,
            }),
            Err(retry_after) => {
                self.metrics.rejected(self.backend);
                Err(Rejected {
                    backend: self.backend,
                    retry_after,
                })
            }
        }
    }
    // ANCHOR_END: try_acquire

    /// Whether every call is admitted.
    pub(super) fn is_closed(&self) -> bool {
        matches!(self.machine().state, State::Closed { .. })
    }

    fn machine(&self) -> MutexGuard<'_, Machine> {
        self.machine.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Updates the state machine, and reports a transition.
    fn update<T>(&self, update: impl FnOnce(&mut Machine) -> T) -> T {
        let mut machine = self.machine();
        let before = machine.generation;
        let result = update(&mut machine);
        if machine.generation != before {
            let state = machine.state.name();
            self.metrics.transition(self.backend, state);
            tracing::info!(backend = self.backend, ?state, "circuit breaker");
        }
        result
    }
}

/// The permission for one call to the backend.
#[must_use = "a permit that is dropped is a call without a result"]
pub(super) struct Permit<'a> {
    breaker: &'a CircuitBreaker,
    generation: u64,
    result: CallResult,
}

/// How a call ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum CallResult {
    Succeeded,
    Failed,
    /// Cancelled, or ended before it reached the backend.
    Abandoned,
}

impl Permit<'_> {
    /// The backend answered, whatever the answer.
    pub(super) fn succeeded(mut self) {
        self.result = CallResult::Succeeded;
    }

    /// The backend was away.
    pub(super) fn failed(mut self) {
        self.result = CallResult::Failed;
    }
}

impl Drop for Permit<'_> {
    fn drop(&mut self) {
        let (generation, result) = (self.generation, self.result);
        self.breaker
            .update(|machine| machine.ended(generation, result, Instant::now()));
    }
}

// ANCHOR: machine
/// The state machine. It reads no clock: the caller passes the time.
#[derive(Debug)]
struct Machine {
    policy: Policy,
    state: State,
    /// Counts the transitions. A call belongs to the generation in which it was admitted.
    generation: u64,
}

#[derive(Debug)]
enum State {
    Closed {
        /// Consecutive failures.
        failures: u32,
    },
    Open {
        until: Instant,
    },
    /// The probe is in flight.
    HalfOpen,
}

impl Machine {
    fn new(policy: Policy) -> Self {
        Self {
            policy,
            state: State::Closed { failures: 0 },
            generation: 0,
        }
    }

    /// Admits a call to the current generation, or returns when to try again.
    fn try_acquire(&mut self, now: Instant) -> Result<u64, Duration> {
        match self.state {
            State::Closed { .. } => {}
            State::Open { until } if now >= until => self.enter(State::HalfOpen),
            State::Open { until } => return Err(until - now),
            State::HalfOpen => return Err(self.policy.open_for),
        }
        Ok(self.generation)
    }

    /// A call of this generation has ended.
    fn ended(&mut self, generation: u64, result: CallResult, now: Instant) {
        if generation != self.generation {
            return;
        }
        match (&mut self.state, result) {
            (State::Closed { failures }, CallResult::Succeeded) => *failures = 0,
            (State::Closed { failures }, CallResult::Failed) => {
                *failures += 1;
                if *failures >= self.policy.failures {
                    self.open(now);
                }
            }
            (State::HalfOpen, CallResult::Succeeded) => self.enter(State::Closed { failures: 0 }),
            (State::HalfOpen, CallResult::Failed) => self.open(now),
            (State::HalfOpen, CallResult::Abandoned) => self.enter(State::Open { until: now }),
            // No call is admitted in the open state.
            (State::Open { .. }, _) | (State::Closed { .. }, CallResult::Abandoned) => {}
        }
    }

    fn open(&mut self, now: Instant) {
        self.enter(State::Open {
            until: now + self.policy.open_for,
        });
    }

    fn enter(&mut self, state: State) {
        self.state = state;
        self.generation += 1;
    }
}
// ANCHOR_END: machine

impl State {
    fn name(&self) -> CircuitState {
        match self {
            Self::Closed { .. } => CircuitState::Closed,
            Self::HalfOpen => CircuitState::HalfOpen,
            Self::Open { .. } => CircuitState::Open,
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::{collection::vec, prelude::*, sample::Index};

    use super::*;

    const OPEN_FOR: u64 = 10;

    /// What a circuit breaker is for its callers. It knows two states, and no third: a backend is
    /// up, or it is down and perhaps somebody probes it.
    enum Model {
        Up { period: usize, last_results: Vec<bool> },
        Down { next_probe_at: u64, probe: Option<usize> },
    }

    #[derive(Clone, Debug)]
    enum Operation {
        Acquire,
        End(Index, CallResult),
        Wait(u64),
    }

    fn operation() -> impl Strategy<Value = Operation> {
        use CallResult::{Abandoned, Failed, Succeeded};
        let result = prop_oneof![3 => Just(Failed), 2 => Just(Succeeded), 1 => Just(Abandoned)];
        prop_oneof![
            4 => Just(Operation::Acquire),
            4 => (any::<Index>(), result).prop_map(|(call, result)| Operation::End(call, result)),
            2 => (0..=OPEN_FOR + 2).prop_map(Operation::Wait),
        ]
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(2_000))]

        #[test]
        fn it_admits_what_the_model_admits(failures in 1..4_u32, operations in vec(operation(), 1..120)) {
            let open_for = Duration::from_millis(OPEN_FOR);
            let mut machine = Machine::new(Policy { failures, open_for });
            let start = Instant::now();
            let at = |now: u64| start + Duration::from_millis(now);
            let (mut now, mut periods, mut calls) = (0, 0, 0);
            let mut model = Model::Up { period: 0, last_results: vec![] };
            // Of each call in flight: its number, its generation, and the period of the model in
            // which it was admitted; a probe has none.
            let mut in_flight: Vec<(usize, u64, Option<usize>)> = vec![];
            for operation in operations {
                match operation {
                    Operation::Wait(time) => now += time,
                    Operation::Acquire => {
                        calls += 1;
                        let expected = match &mut model {
                            Model::Up { period, .. } => Some(Some(*period)),
                            Model::Down { next_probe_at, probe } if probe.is_none() && now >= *next_probe_at => {
                                *probe = Some(calls);
                                Some(None)
                            }
                            Model::Down { .. } => None,
                        };
                        let admitted = machine.try_acquire(at(now));
                        prop_assert_eq!(admitted.is_ok(), expected.is_some(), "{:?}", machine);
                        if let (Ok(generation), Some(period)) = (admitted, expected) {
                            in_flight.push((calls, generation, period));
                        }
                    }
                    Operation::End(..) if in_flight.is_empty() => {}
                    Operation::End(which, result) => {
                        let (call, generation, admitted_in) = in_flight.swap_remove(which.index(in_flight.len()));
                        machine.ended(generation, result, at(now));
                        let next = match &mut model {
                            Model::Up { period, last_results } if admitted_in == Some(*period) => {
                                last_results.extend(match result {
                                    CallResult::Succeeded => Some(true),
                                    CallResult::Failed => Some(false),
                                    CallResult::Abandoned => None,
                                });
                                let run = last_results.iter().rev().take_while(|succeeded| !**succeeded);
                                (run.count() >= failures as usize).then_some(Model::Down { next_probe_at: now + OPEN_FOR, probe: None })
                            }
                            Model::Down { probe, .. } if *probe == Some(call) => Some(match result {
                                CallResult::Succeeded => {
                                    periods += 1;
                                    Model::Up { period: periods, last_results: vec![] }
                                }
                                CallResult::Failed => Model::Down { next_probe_at: now + OPEN_FOR, probe: None },
                                CallResult::Abandoned => Model::Down { next_probe_at: now, probe: None },
                            }),
                            _ => None,
                        };
                        model = next.unwrap_or(model);
                    }
                }
                let expected = match &model {
                    Model::Up { .. } => CircuitState::Closed,
                    Model::Down { probe: Some(_), .. } => CircuitState::HalfOpen,
                    Model::Down { probe: None, .. } => CircuitState::Open,
                };
                prop_assert_eq!(machine.state.name(), expected, "{:?}", machine);
            }
        }
    }

    /// Of many threads that ask at once, one is the probe.
    #[test]
    fn a_thousand_callers_send_one_probe() {
        let policy = Policy {
            failures: 1,
            open_for: Duration::ZERO,
        };
        let breaker = CircuitBreaker::new("kafka", policy, CircuitBreakerMetrics::default());
        breaker.try_acquire().expect("it is closed").failed();
        let admitted = std::thread::scope(|scope| {
            let threads: Vec<_> = (0..8)
                .map(|_| scope.spawn(|| (0..125).filter_map(|_| breaker.try_acquire().ok()).collect::<Vec<_>>()))
                .collect();
            let permits = threads.into_iter().map(|thread| thread.join().expect("no panic"));
            permits.flatten().collect::<Vec<_>>()
        });
        assert_eq!(admitted.len(), 1);
        admitted.into_iter().for_each(Permit::succeeded);
        assert!(breaker.is_closed());
    }
}
