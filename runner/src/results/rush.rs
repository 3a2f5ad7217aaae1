//! What `oversold rush --json` writes.

use std::fmt;

use box_office::Invariant;
use harness::{
    history::{Entry, Status},
    rush::{Answers, Latency, Report, Rush},
};
use serde::{Deserialize, Serialize};

use super::RunMetadata;
use crate::statistics::MedianRange;

/// The results of one run of `oversold rush`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct RushResults {
    /// How and where it was measured.
    #[serde(flatten)]
    pub metadata: RunMetadata,
    /// Tickets on sale.
    pub capacity: u32,
    /// Buyers.
    pub buyers: u32,
    /// Server processes.
    pub instances: u32,
    /// Simulated work inside the critical section, in milliseconds.
    pub work_ms: u32,
    /// Each strategy, in the order in which they ran.
    pub strategies: Vec<StrategyResult>,
}

/// The rush of one strategy; of several rounds, the one in the middle.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct StrategyResult {
    /// `lv1/read-then-write`.
    pub strategy: String,
    /// The guarantee on this number of instances, in words.
    pub promises: String,
    /// Requests that each buyer sent at once, each under its own key.
    pub clicks: u32,
    /// Requests in total, repeats included.
    pub requests: usize,
    /// Tickets sold.
    pub sold: u64,
    /// Stock at the end, as the sale's row has it.
    pub stock: Option<i64>,
    /// Tickets sold beyond the capacity.
    pub oversold_by: u64,
    /// Reservations beyond the first of a buyer.
    pub duplicates: u64,
    /// How many requests got which answer.
    pub answers: Answers,
    /// Answers per second until every buyer had one, most of which are refusals.
    pub requests_a_second: f64,
    /// From the opening of the gate until the last buyer left, in milliseconds.
    pub took_ms: f64,
    /// Latency from a buyer's first click to the last answer to it.
    pub answered: Latency,
    /// Clicks without any answer. No latency includes them.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub unanswered: u64,
    /// From the opening of the gate to the last answer, in milliseconds.
    pub all_answered_ms: f64,
    /// Latency from the first click to the final state; `None` where the answer is final.
    pub completed: Option<Latency>,
    /// From the opening of the gate to the last final state, in milliseconds; `None` where the answer is final.
    pub all_completed_ms: Option<f64>,
    /// From the opening of the gate until the last buyer with a ticket knew of it, in milliseconds; `None` in files that do not record it,
    /// and where nothing was sold. If the sale was oversold, the last of the buyers who were told "confirmed".
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_sale_ms: Option<f64>,
    /// The most requests that were in flight at once.
    pub greatest_overlap: u64,
    /// Retries of reservations on the server, after a conflict with others.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub retries: u64,
    /// What was paid, if the sale takes payments.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub payments: Option<Payments>,
    /// Who has a ticket, if some buyers had priority.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub priority: Option<ByPriority>,
    /// The clients' share of the machine's processors, from 0 to 1.
    pub client_share: f64,
    /// Every invariant that was violated.
    pub broken: Vec<Invariant>,
    /// What was observed, in one line.
    pub seen: String,
    /// Whether that is what the guarantee promises.
    pub verdict: String,
    /// All rounds, if there were several.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rounds: Option<Rounds>,
}

/// What the payment service was asked for, and what it did.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub struct Payments {
    /// Requests for a charge, repeats included.
    pub calls: u64,
    /// Charges that took money.
    pub charges: u64,
    /// Charges that were returned.
    pub refunds: u64,
}

impl Payments {
    /// The payments of a rush. `None`: it takes none.
    pub fn of(report: &Report) -> Option<Self> {
        let ledger = report.history.payments.as_ref()?;
        let count = |entry| ledger.iter().filter(|payment| payment.entry == entry).count() as u64;
        Some(Self {
            calls: report.payment_calls?,
            charges: count(Entry::Charge),
            refunds: count(Entry::Refund),
        })
    }
}

/// Who has a ticket, of the buyers with priority and of the others.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub struct ByPriority {
    /// Buyers with priority.
    pub vips: u32,
    /// Those of them with a ticket.
    pub vips_with_ticket: u64,
    /// The other buyers.
    pub others: u32,
    /// Those of them with a ticket.
    pub others_with_ticket: u64,
}

impl ByPriority {
    /// Who has a ticket after a rush. `None`: nobody had priority.
    pub fn of(rush: &Rush, report: &Report) -> Option<Self> {
        let rows = report.history.rows.as_ref().filter(|_| rush.vips > 0)?;
        let with_ticket = rows.iter().filter(|row| row.status == Status::Confirmed);
        let (vips, others): (Vec<_>, Vec<_>) = with_ticket.partition(|row| !rush.priority_of(row.buyer).is_normal());
        Some(Self {
            vips: rush.vips,
            vips_with_ticket: vips.len() as u64,
            others: rush.buyers - rush.vips,
            others_with_ticket: others.len() as u64,
        })
    }
}

/// Several rounds of one strategy.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Rounds {
    /// How many.
    pub times: usize,
    /// Answers per second.
    pub requests_a_second: MedianRange,
    /// 99th percentile of the latency of answers, in milliseconds.
    pub p99_ms: MedianRange,
    /// From the opening of the gate to the last answer, in milliseconds.
    pub all_answered_ms: MedianRange,
    /// From the opening of the gate to the last final state, in milliseconds; `None` where the answer is final.
    pub all_completed_ms: Option<MedianRange>,
    /// From the opening of the gate until the last buyer with a ticket knew of it, in milliseconds; `None` as in [`StrategyResult`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_sale_ms: Option<MedianRange>,
}

impl StrategyResult {
    /// From the opening of the gate until every buyer knew the result, in milliseconds.
    pub fn all_known_ms(&self) -> f64 {
        self.all_completed_ms.unwrap_or_default().max(self.all_answered_ms)
    }
}

impl Rounds {
    /// `None` with fewer than two rounds.
    pub(crate) fn of<'a>(results: impl Iterator<Item = &'a StrategyResult>) -> Option<Self> {
        let results: Vec<_> = results.collect();
        let of = |figure: fn(&StrategyResult) -> f64| MedianRange::of(results.iter().map(|&result| figure(result)));
        (results.len() > 1).then_some(())?;
        Some(Self {
            times: results.len(),
            requests_a_second: of(|result| result.requests_a_second)?,
            p99_ms: of(|result| result.answered.p99_ms)?,
            all_answered_ms: of(|result| result.all_answered_ms)?,
            all_completed_ms: MedianRange::of(results.iter().filter_map(|result| result.all_completed_ms)),
            last_sale_ms: MedianRange::of(results.iter().filter_map(|result| result.last_sale_ms)),
        })
    }
}

impl fmt::Display for Rounds {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "median (range) of {} rounds: {} req/s; all answered after {} ms",
            self.times, self.requests_a_second, self.all_answered_ms
        )?;
        match &self.all_completed_ms {
            Some(completed_ms) => write!(f, ", all completed after {completed_ms} ms"),
            None => Ok(()),
        }
    }
}

fn is_zero(number: &u64) -> bool {
    *number == 0
}
