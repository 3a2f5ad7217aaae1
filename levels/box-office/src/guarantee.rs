//! What a strategy promises, written beside the strategy, so that the suite can hold it to that.

use serde::{Deserialize, Serialize};

/// What must be true of every sale. The suite's judge checks each against what buyers saw and what the rows say.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Invariant {
    /// At every moment, the reservations that hold a ticket are at most the capacity.
    #[serde(rename = "I1")]
    NoOversell,
    /// Stock + held + confirmed = capacity, stock is never negative, and nothing is held at quiescence.
    #[serde(rename = "I2")]
    Conservation,
    /// A buyer has at most one live reservation in a sale, and a request key has at most one ever.
    #[serde(rename = "I3")]
    NoDuplicate,
    /// Every confirmed answer has exactly one row; every accepted one reaches exactly one final state.
    #[serde(rename = "I4")]
    NothingLost,
    /// Every row was asked for, with the same buyer and key, and not only by requests that were refused.
    #[serde(rename = "I5")]
    NothingInvented,
    /// Every refusal was true at some moment of its request.
    #[serde(rename = "I6")]
    NoFalseRefusal,
    /// When every buyer has a final answer, min(capacity, buyers) tickets are sold.
    #[serde(rename = "I7")]
    NoUndersell,
    /// Requests are served in order, within a stated bound on overtaking.
    #[serde(rename = "I8")]
    Order,
    /// Once a key is confirmed, every later final answer to it is that reservation.
    #[serde(rename = "I9")]
    OneAnswer,
    /// Every request ends by its deadline; after the last fault is healed, whoever repeats gets a final answer.
    #[serde(rename = "I10")]
    Progress,
}

impl Invariant {
    /// All of them, in the order of their codes.
    pub const ALL: [Self; 10] = [
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
    ];

    /// The short code: `I1` to `I10`.
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
        }
    }

    /// The name in words.
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
        }
    }
}

/// What a strategy says about one invariant.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Promise {
    /// It holds, whatever the load.
    Keeps,
    /// It does not hold, and the strategy's own stress must show it.
    Breaks,
    /// It may or may not hold: nobody should build on it.
    NotPromised,
}

/// One promise for every invariant.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Promises([Promise; Invariant::ALL.len()]);

impl Promises {
    /// Every invariant but the order of service, which only a queue can promise.
    pub const ALL_KEPT: Self =
        Self([Promise::Keeps; Invariant::ALL.len()]).with(&[Invariant::Order], Promise::NotPromised);

    /// The same, but these are broken, and must be seen to be.
    pub const fn breaks(self, invariants: &[Invariant]) -> Self {
        self.with(invariants, Promise::Breaks)
    }

    /// The same, but nothing is said about these.
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

    /// What is promised about one invariant.
    pub const fn about(&self, invariant: Invariant) -> Promise {
        self.0[invariant as usize]
    }

    /// The invariants with this promise, in the order of their codes.
    pub fn those(&self, promise: Promise) -> impl Iterator<Item = Invariant> {
        Invariant::ALL
            .into_iter()
            .filter(move |&invariant| self.about(invariant) == promise)
    }
}

/// What a strategy keeps and what it breaks, on one instance and on any number of them, and what ends that.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Guarantee {
    /// With one instance of the server.
    pub single_instance: Promises,
    /// With several.
    pub multi_instance: Promises,
    /// What the strategy does not survive. No rush shows it: a test brings it about, on purpose.
    pub failure_modes: &'static [FailureMode],
}

/// An event that a strategy does not survive.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FailureMode {
    /// What happens, such as "a holder stands still for longer than its lease".
    pub trigger: &'static str,
    /// What it breaks then, at least, in the order of the codes. Nothing, where the damage is beside the sale.
    pub violates: &'static [Invariant],
}

impl Guarantee {
    /// The same promises however many instances there are.
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

    /// The promises for so many instances.
    pub const fn on(&self, instances: usize) -> Promises {
        if instances == 1 {
            self.single_instance
        } else {
            self.multi_instance
        }
    }
}
