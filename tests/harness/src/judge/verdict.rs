//! The verdict of the judge.

use std::fmt;

use box_office::{Invariant, Promise, Promises};
use serde::Serialize;

use super::Evidence;

/// The broken invariants of a history, the coverage of the run, and what could not be checked.
#[derive(Clone, Debug, Serialize)]
pub struct Verdict {
    /// At most one for each invariant, in the order of their codes.
    pub findings: Vec<Finding>,
    /// The sale in numbers.
    pub tally: Tally,
    /// How hard the system was stressed.
    pub coverage: Coverage,
    /// What could not be checked on this history.
    pub not_checked: Vec<NotChecked>,
}

/// A broken invariant.
#[derive(Clone, Debug, Serialize)]
pub struct Finding {
    /// The invariant.
    pub invariant: Invariant,
    /// The number of cases.
    pub count: u64,
    /// One sentence with the numbers.
    pub summary: String,
    /// The smallest case of it.
    pub evidence: Option<Evidence>,
    /// A question for the reader that leads to the cause.
    pub question: &'static str,
}

/// The sale in numbers.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Tally {
    /// Tickets on sale.
    pub capacity: u64,
    /// Reservations that hold a ticket; without rows, those that were confirmed to buyers.
    pub sold: u64,
    /// The stock at quiescence.
    pub stock: Option<i64>,
    /// Tickets sold beyond the capacity.
    pub oversold_by: u64,
    /// Reservations beyond one per buyer.
    pub duplicates: u64,
}

/// How hard the system was stressed.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Coverage {
    /// Requests sent.
    pub requests: u64,
    /// The maximum number of requests in flight.
    pub greatest_overlap: u64,
    /// Faults that struck.
    pub faults: u64,
}

/// An invariant that could not be checked on this history, or only in part.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct NotChecked {
    /// The invariant.
    pub invariant: Invariant,
    /// The reason.
    pub why: &'static str,
}

/// A verdict compared with a strategy's promises.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Conclusion {
    /// The strategy kept what it promises to keep, and was observed to break what it declares to
    /// break.
    AsPromised,
    /// The strategy broke these invariants, which it promises to keep.
    Broken(Vec<Invariant>),
    /// The run did not stress the strategy enough to show that it breaks these invariants.
    Inconclusive(Vec<Invariant>),
}

impl Verdict {
    /// Whether this invariant is broken.
    pub fn breaks(&self, invariant: Invariant) -> bool {
        self.findings.iter().any(|finding| finding.invariant == invariant)
    }

    /// Compares the verdict with the promises.
    pub fn conclude(&self, promises: &Promises) -> Conclusion {
        Conclusion::of(promises, |invariant| self.breaks(invariant))
    }
}

impl Conclusion {
    /// Compares the observed violations with the promises.
    pub fn of(promises: &Promises, breaks: impl Fn(Invariant) -> bool) -> Self {
        let broken: Vec<Invariant> = promises
            .those(Promise::Keeps)
            .filter(|&invariant| breaks(invariant))
            .collect();
        let unseen: Vec<Invariant> = promises
            .those(Promise::Breaks)
            .filter(|&invariant| !breaks(invariant))
            .collect();
        match (broken.is_empty(), unseen.is_empty()) {
            (false, _) => Self::Broken(broken),
            (true, false) => Self::Inconclusive(unseen),
            (true, true) => Self::AsPromised,
        }
    }
}

impl fmt::Display for Conclusion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let codes = |invariants: &[Invariant]| {
            invariants
                .iter()
                .map(|invariant| invariant.code())
                .collect::<Vec<_>>()
                .join(", ")
        };
        match self {
            Self::AsPromised => f.write_str("as promised"),
            Self::Broken(broken) => write!(f, "guarantee broken: {}", codes(broken)),
            Self::Inconclusive(unseen) => write!(f, "inconclusive: {} was not seen to break", codes(unseen)),
        }
    }
}

impl fmt::Display for Verdict {
    /// A readable report.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Tally {
            capacity, sold, stock, ..
        } = self.tally;
        let Coverage {
            requests,
            greatest_overlap,
            faults,
        } = self.coverage;
        write!(f, "{sold} sold of {capacity}")?;
        if let Some(stock) = stock {
            write!(f, ", stock {stock}")?;
        }
        writeln!(
            f,
            "; {requests} requests, at most {greatest_overlap} at once, {faults} faults"
        )?;
        if self.findings.is_empty() {
            writeln!(f, "nothing broken")?;
        }
        for finding in &self.findings {
            let Finding {
                invariant,
                summary,
                evidence,
                question,
                ..
            } = finding;
            writeln!(f, "\nBROKEN {} ({}): {summary}", invariant.code(), invariant.title())?;
            if let Some(evidence) = evidence {
                writeln!(f, "{evidence}")?;
            }
            writeln!(f, "Ask yourself: {question}")?;
        }
        for NotChecked { invariant, why } in &self.not_checked {
            writeln!(f, "not checked: {} ({}): {why}", invariant.code(), invariant.title())?;
        }
        Ok(())
    }
}
