//! What the judge says.

use std::fmt;

use box_office::{Invariant, Promise, Promises};
use serde::Serialize;

use super::Evidence;

/// What a history breaks, what was looked at to say so, and what could not be looked at.
#[derive(Clone, Debug, Serialize)]
pub struct Verdict {
    /// At most one for each invariant, in the order of their codes.
    pub findings: Vec<Finding>,
    /// The sale in numbers.
    pub tally: Tally,
    /// How hard the system was tried.
    pub coverage: Coverage,
    /// What this history can't show.
    pub not_checked: Vec<NotChecked>,
}

/// A broken invariant.
#[derive(Clone, Debug, Serialize)]
pub struct Finding {
    /// Which.
    pub invariant: Invariant,
    /// How often.
    pub count: u64,
    /// One sentence with the numbers.
    pub summary: String,
    /// The smallest case of it.
    pub evidence: Option<Evidence>,
    /// A question for the reader; the answer is the reader's.
    pub question: &'static str,
}

/// The sale in numbers.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Tally {
    /// Tickets on sale.
    pub capacity: u64,
    /// Reservations that hold a ticket; where rows could not be read, those that buyers were told of.
    pub sold: u64,
    /// The stock at quiescence.
    pub stock: Option<i64>,
    /// Tickets sold that were not there.
    pub oversold_by: u64,
    /// Reservations too many for their buyer.
    pub duplicates: u64,
}

/// How hard the system was tried.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Coverage {
    /// Requests sent.
    pub requests: u64,
    /// Requests under way at the same time, at most.
    pub greatest_overlap: u64,
    /// Faults that struck.
    pub faults: u64,
}

/// Something that this history can't show.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct NotChecked {
    /// The invariant, or a part of it.
    pub invariant: Invariant,
    /// Why not.
    pub why: &'static str,
}

/// What a verdict means for a strategy that made promises.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Conclusion {
    /// It kept what it keeps, and was seen to break what it breaks.
    AsPromised,
    /// It broke these, and had promised to keep them.
    Broken(Vec<Invariant>),
    /// The run did not stress it enough to show what it breaks.
    Inconclusive(Vec<Invariant>),
}

impl Verdict {
    /// Whether this invariant is broken.
    pub fn breaks(&self, invariant: Invariant) -> bool {
        self.findings.iter().any(|finding| finding.invariant == invariant)
    }

    /// Holds the verdict against what was promised.
    pub fn conclude(&self, promises: &Promises) -> Conclusion {
        Conclusion::of(promises, |invariant| self.breaks(invariant))
    }
}

impl Conclusion {
    /// Holds what was seen to break against what was promised.
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
    /// A report for people.
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
