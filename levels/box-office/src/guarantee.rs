//! The guarantee of a strategy, declared in code, so that the tests can verify it.

use serde::{Deserialize, Serialize};

/// An invariant of a sale. The harness's judge checks each against the clients' observations and
/// the rows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Invariant {
    /// At any moment, at most `capacity` reservations hold a ticket.
    #[serde(rename = "I1")]
    NoOversell,
    /// Stock + held + confirmed = capacity, stock is never negative, and nothing is held at
    /// quiescence.
    #[serde(rename = "I2")]
    Conservation,
    /// A buyer has at most one live reservation in a sale, and a request key at most one ever.
    #[serde(rename = "I3")]
    NoDuplicate,
    /// Every confirmed answer has exactly one row; every accepted order reaches exactly one final
    /// state.
    #[serde(rename = "I4")]
    NothingLost,
    /// Every row belongs to a request with the same buyer and key that was not refused.
    #[serde(rename = "I5")]
    NothingInvented,
    /// Every refusal was true at some moment during its request.
    #[serde(rename = "I6")]
    NoFalseRefusal,
    /// Once every buyer has a final answer, min(capacity, buyers) tickets are sold.
    #[serde(rename = "I7")]
    NoUndersell,
    /// Requests are served first come, first served, within a stated bound on overtaking
    /// (fairness).
    #[serde(rename = "I8")]
    Order,
    /// Once a key is confirmed, every later final answer to it is that reservation (idempotency).
    #[serde(rename = "I9")]
    OneAnswer,
    /// Every request ends by its deadline; after the last fault is healed, every retry gets a final
    /// answer (liveness).
    #[serde(rename = "I10")]
    Progress,
    /// Every ticket is paid for once, and every other charge is refunded once. A sale that takes no
    /// payments keeps it.
    #[serde(rename = "I11")]
    PaidOnce,
}

impl Invariant {
    /// All invariants, ordered by code.
    pub const ALL: [Self; 11] = [
        Self::NoOversell,
        Self::Conservation,
        Self::NoDuplicate,
        Self::NothingLost,
        Self::NothingInvented,
        Self::NoFalseRefusal,
        Self::NoUndersell,
        Self::Order,
        Self::OneAnswer,
        Self::Progress,
        Self::PaidOnce,
    ];

    /// The short code: `I1` to `I11`.
    pub const fn code(self) -> &'static str {
        match self {
            Self::NoOversell => "I1",
            Self::Conservation => "I2",
            Self::NoDuplicate => "I3",
            Self::NothingLost => "I4",
            Self::NothingInvented => "I5",
            Self::NoFalseRefusal => "I6",
            Self::NoUndersell => "I7",
            Self::Order => "I8",
            Self::OneAnswer => "I9",
            Self::Progress => "I10",
            Self::PaidOnce => "I11",
        }
    }

    /// The name in prose, such as `no oversell`.
    pub const fn title(self) -> &'static str {
        match self {
            Self::NoOversell => "no oversell",
            Self::Conservation => "conservation",
            Self::NoDuplicate => "no duplicate reservation",
            Self::NothingLost => "nothing lost",
            Self::NothingInvented => "nothing invented",
            Self::NoFalseRefusal => "no false refusal",
            Self::NoUndersell => "no undersell",
            Self::Order => "order",
            Self::OneAnswer => "one answer",
            Self::Progress => "progress",
            Self::PaidOnce => "paid once",
        }
    }
}

/// The promise of a strategy about one invariant.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Promise {
    /// The invariant holds under any load.
    Keeps,
    /// The invariant is violated, and the strategy's own stress test must show it.
    Breaks,
    /// The invariant may or may not hold; no client may rely on it.
    NotPromised,
}

/// A promise for each invariant.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Promises([Promise; Invariant::ALL.len()]);

impl Promises {
    /// Keeps every invariant except [`Invariant::Order`], which only a queue can promise.
    pub const ALL_KEPT: Self =
        Self([Promise::Keeps; Invariant::ALL.len()]).with(&[Invariant::Order], Promise::NotPromised);

    /// The same, but these are [`Promise::Keeps`].
    pub const fn keeps(self, invariants: &[Invariant]) -> Self {
        self.with(invariants, Promise::Keeps)
    }

    /// The same, but these are [`Promise::Breaks`].
    pub const fn breaks(self, invariants: &[Invariant]) -> Self {
        self.with(invariants, Promise::Breaks)
    }

    /// The same, but these are [`Promise::NotPromised`].
    pub const fn leaves_open(self, invariants: &[Invariant]) -> Self {
        self.with(invariants, Promise::NotPromised)
    }

    const fn with(mut self, invariants: &[Invariant], promise: Promise) -> Self {
        let mut i = 0;
        while i < invariants.len() {
            self.0[invariants[i] as usize] = promise;
            i += 1;
        }
        self
    }

    /// The promise about one invariant.
    pub const fn about(&self, invariant: Invariant) -> Promise {
        self.0[invariant as usize]
    }

    /// The invariants with this promise, ordered by code.
    pub fn those(&self, promise: Promise) -> impl Iterator<Item = Invariant> {
        Invariant::ALL
            .into_iter()
            .filter(move |&invariant| self.about(invariant) == promise)
    }
}

/// The guarantee of a strategy: its promises on one and on several instances, and its failure
/// modes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Guarantee {
    /// The promises with one instance of the server.
    pub single_instance: Promises,
    /// The promises with several instances.
    pub multi_instance: Promises,
    /// The faults under which the guarantee ends. Load alone does not show them: tests inject them.
    pub failure_modes: &'static [FailureMode],
}

/// A fault under which the guarantee of a strategy ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FailureMode {
    /// The fault, such as "a holder is paused for longer than its lease".
    pub trigger: &'static str,
    /// The invariants that are violated then, at least, ordered by code. Empty if the damage is
    /// outside the sale.
    pub violates: &'static [Invariant],
}

impl Guarantee {
    /// The same promises on any number of instances.
    pub const fn uniform(promises: Promises) -> Self {
        Self {
            single_instance: promises,
            multi_instance: promises,
            failure_modes: &[],
        }
    }

    /// The same, except in these failure modes.
    pub const fn except(self, failure_modes: &'static [FailureMode]) -> Self {
        Self { failure_modes, ..self }
    }

    /// The promises for this number of instances.
    pub const fn on(&self, instances: usize) -> Promises {
        if instances == 1 {
            self.single_instance
        } else {
            self.multi_instance
        }
    }
}
