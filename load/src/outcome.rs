//! The result of a rush: what the clients observed, checked against the guarantee.

use std::{collections::HashSet, path::Path};

use anyhow::Context;
use box_office::{Invariant, Promises, api::Sale};
use comfy_table::{ContentArrangement, Table, presets};
use harness::{
    history::{Answer, History, Refused},
    judge::{Conclusion, Finding, Verdict},
    rush::{Answers, Latency, Report},
};
use serde::Deserialize;

use crate::{Rush, payments::Money};

/// How a command ended; the discriminant is the exit code.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum ExitKind {
    /// Every guarantee held, and every expected break was observed.
    AsPromised = 0,
    /// A guarantee was broken.
    Broken = 1,
    /// An expected break was not observed, or the run is void.
    Inconclusive = 4,
}

/// The result of one rush.
pub(crate) struct Outcome {
    name: String,
    generator: &'static str,
    summary: Summary,
    promises: Promises,
}

/// The measurements of one rush. `load/k6/rush.js` writes the same as JSON.
#[derive(Deserialize)]
struct Summary {
    requests: u64,
    /// 201.
    confirmed: u64,
    /// 202: the final state follows later.
    accepted: u64,
    /// 409, and every other refusal.
    refused: u64,
    /// 503, no answer, or one that the HTTP contract does not know.
    unknown: u64,
    /// Confirmed reservations beyond the first of a buyer.
    duplicates: u64,
    capacity: u64,
    /// As the sale shows it afterwards.
    stock: i64,
    /// As the sale shows it afterwards.
    reserved: i64,
    p50_ms: f64,
    p95_ms: f64,
    p99_ms: f64,
    /// From the first click to the final state, where orders are accepted first and decided later.
    completed: Option<Completed>,
    /// If the ledger of the payment service was read.
    payments: Option<Payments>,
    broken: Vec<Broken>,
    /// Why the run says nothing about the server: what the client could not send. Empty if it sent everything.
    void: Vec<String>,
}

/// The second clock.
#[derive(Deserialize)]
struct Completed {
    p50_ms: f64,
    p95_ms: f64,
    p99_ms: f64,
}

/// What the payment service has done.
#[derive(Deserialize)]
struct Payments {
    charges: u64,
    refunds: u64,
    /// The orders that were declined, expired or cancelled.
    unpaid: u64,
}

#[derive(Deserialize)]
struct Broken {
    invariant: Invariant,
    /// One sentence with the numbers.
    summary: String,
}

/// What was seen of a sale beside its history.
pub(crate) struct Seen {
    /// The sale after the rush.
    pub(crate) sale: Sale,
    /// The most reservations with a ticket, held or confirmed, that a buyer has seen the sale have. `None`: nobody has looked.
    pub(crate) most_reserved: Option<i64>,
    /// What the ledger of the payment service says. `None`: it was not read.
    pub(crate) money: Option<Money>,
}

impl Outcome {
    /// Of a rush by Goose: the harness's judge checks its history.
    pub(crate) fn of_goose(rush: &Rush, report: &Report, seen: &Seen, void: Vec<String>) -> Self {
        let Seen { sale, money, .. } = seen;
        let mut verdict = report.verdict.clone();
        check_sale(seen, &report.history, &mut verdict);
        let Answers {
            confirmed,
            accepted,
            sold_out,
            already_reserved,
            otherwise_refused,
            rate_limited,
            expired: _,
            declined: _,
            undecided,
            unexpected,
        } = report.answers;
        let Latency {
            p50_ms, p95_ms, p99_ms, ..
        } = report.answered;
        Self {
            name: rush.name.clone(),
            generator: "Goose",
            summary: Summary {
                requests: report.history.requests.len() as u64,
                confirmed,
                accepted,
                refused: sold_out + already_reserved + otherwise_refused + rate_limited,
                unknown: undecided + unexpected,
                duplicates: verdict.tally.duplicates,
                capacity: verdict.tally.capacity,
                stock: sale.stock,
                reserved: sale.reserved,
                p50_ms,
                p95_ms,
                p99_ms,
                completed: report.completed.map(|completed| Completed {
                    p50_ms: completed.p50_ms,
                    p95_ms: completed.p95_ms,
                    p99_ms: completed.p99_ms,
                }),
                payments: money.as_ref().map(|money| Payments {
                    charges: money.charges,
                    refunds: money.refunds,
                    unpaid: unpaid(&report.history) as u64,
                }),
                broken: verdict
                    .findings
                    .into_iter()
                    .map(|Finding { invariant, summary, .. }| Broken { invariant, summary })
                    .collect(),
                void,
            },
            promises: rush.promises,
        }
    }

    /// Of a rush by k6: its script has checked what it saw.
    pub(crate) fn of_k6(rush: &Rush, summary: &Path) -> anyhow::Result<Self> {
        let text = std::fs::read_to_string(summary).context("k6 wrote no summary")?;
        Ok(Self {
            name: rush.name.clone(),
            generator: "k6",
            summary: serde_json::from_str(&text).context("the summary of k6")?,
            promises: rush.promises,
        })
    }

    /// Whether every guarantee held and every expected break was observed, in a run that says something about the server.
    pub(crate) fn passes(&self) -> bool {
        !self.is_void() && self.conclusion() == Conclusion::AsPromised
    }

    fn is_void(&self) -> bool {
        !self.summary.void.is_empty()
    }

    /// The verdict.
    fn conclusion(&self) -> Conclusion {
        Conclusion::of(&self.promises, |invariant| self.breaks(invariant))
    }

    fn breaks(&self, invariant: Invariant) -> bool {
        self.summary.broken.iter().any(|broken| broken.invariant == invariant)
    }

    /// Prints all of them, and returns how the command ends.
    pub(crate) fn print(outcomes: &[Self]) -> ExitKind {
        let mut table = Table::new();
        table
            .load_style(presets::UTF8_FULL_CONDENSED)
            .set_content_arrangement(ContentArrangement::Disabled)
            .set_header(COLUMNS)
            .add_rows(outcomes.iter().map(Self::row));
        println!("{table}");
        for outcome in outcomes {
            println!("{}, {}: {}", outcome.name, outcome.generator, outcome.observation());
            if let Some(Payments {
                charges,
                refunds,
                unpaid,
            }) = outcome.summary.payments
            {
                println!("    payments: {charges} charged, {refunds} refunded; {unpaid} orders ended unpaid");
            }
            for Broken { invariant, summary } in &outcome.summary.broken {
                println!("    {} ({}): {summary}", invariant.code(), invariant.title());
            }
            for reason in &outcome.summary.void {
                println!("    VOID: {reason}");
            }
        }
        println!("{CLOSED_LOOP}");
        // What a void run broke may be its own doing.
        let mut valid = outcomes.iter().filter(|outcome| !outcome.is_void());
        if valid.any(|outcome| matches!(outcome.conclusion(), Conclusion::Broken(_))) {
            ExitKind::Broken
        } else if outcomes.iter().all(Self::passes) {
            ExitKind::AsPromised
        } else {
            ExitKind::Inconclusive
        }
    }

    fn row(&self) -> [String; COLUMNS.len()] {
        let Summary {
            requests,
            confirmed,
            accepted,
            refused,
            unknown,
            duplicates,
            capacity,
            stock,
            reserved,
            p50_ms,
            p95_ms,
            p99_ms,
            completed,
            ..
        } = &self.summary;
        [
            self.name.clone(),
            self.generator.to_owned(),
            requests.to_string(),
            format!("{} / {refused} / {unknown}", confirmed + accepted),
            format!("{reserved} of {capacity}"),
            stock.to_string(),
            duplicates.to_string(),
            format!("{p50_ms:.0} / {p95_ms:.0} / {p99_ms:.0}"),
            match completed {
                Some(Completed { p50_ms, p95_ms, p99_ms }) => format!("{p50_ms:.0} / {p95_ms:.0} / {p99_ms:.0}"),
                // Where the answer is final, both clocks are one.
                None if *accepted == 0 => "as answered".to_owned(),
                None => "never".to_owned(),
            },
            match self.is_void() {
                true => "void".to_owned(),
                false => self.conclusion().to_string(),
            },
        ]
    }

    /// What the rush showed, in one line.
    fn observation(&self) -> String {
        let Summary { capacity, reserved, .. } = self.summary;
        let codes: Vec<&str> = self
            .summary
            .broken
            .iter()
            .map(|broken| broken.invariant.code())
            .collect();
        let codes = codes.join(", ");
        match self.conclusion() {
            _ if self.is_void() => format!("{reserved} sold of {capacity}; void"),
            Conclusion::AsPromised if codes.is_empty() => format!("{reserved} sold of {capacity}, nothing broken"),
            Conclusion::AsPromised => format!("BROKEN ({codes}), as {} exists to show", self.name),
            other if codes.is_empty() => format!("{reserved} sold of {capacity}; {other}"),
            other => format!("BROKEN ({codes}); {other}"),
        }
    }
}

const COLUMNS: [&str; 10] = [
    "strategy",
    "sent by",
    "requests",
    "201, 202 / 409 / 503",
    "sold",
    "stock",
    "duplicates",
    "answered, ms\np50 / p95 / p99",
    "completed, ms\np50 / p95 / p99",
    "verdict",
];

/// A caveat about the percentiles.
const CLOSED_LOOP: &str = "\
Goose is a closed loop, and so is k6 unless SCENARIO=arrivals: who waits for an answer sends nothing meanwhile. A server that stalls holds back
the requests that would have met the stall, so they are missing from the percentiles (coordinated omission).";

/// Adds the findings from what was seen of the sale and of the payments. A history without rows does not let the judge compare these numbers.
fn check_sale(seen: &Seen, history: &History, verdict: &mut Verdict) {
    let (stock, reserved) = (seen.sale.stock, seen.sale.reserved);
    let most_reserved = seen.most_reserved.unwrap_or(reserved).max(reserved);
    let capacity = i64::try_from(verdict.tally.capacity).unwrap_or(i64::MAX);
    let confirmed = i64::try_from(verdict.tally.sold).unwrap_or(i64::MAX);
    // A request without a final answer may have a reservation all the same.
    let open = i64::try_from(without_an_answer(history)).unwrap_or(i64::MAX);
    // Each may have released its ticket after the last buyer had asked.
    let unpaid = i64::try_from(unpaid(history)).unwrap_or(i64::MAX);
    let buyers: HashSet<_> = history.requests.iter().map(|request| request.buyer).collect();
    let buyers = i64::try_from(buyers.len()).unwrap_or(i64::MAX);
    let found = [
        (
            Invariant::NoOversell,
            most_reserved - capacity,
            format!("the sale says {most_reserved} reserved, of {capacity} tickets"),
            "Which reservation was one too many?",
        ),
        (
            Invariant::Conservation,
            (stock + reserved - capacity).abs().max(-stock),
            format!("the sale says stock {stock} and {reserved} reserved, of {capacity} tickets"),
            "Is a write missing in the stock, or is there one that its check should have stopped?",
        ),
        (
            Invariant::NothingLost,
            confirmed - reserved,
            format!("the sale says {reserved} reserved, and {confirmed} reservations were confirmed to buyers"),
            "What had happened when the buyer was told, and what had not?",
        ),
        (
            Invariant::NothingInvented,
            reserved - confirmed - open,
            format!(
                "the sale says {reserved} reserved, and {confirmed} reservations were confirmed to buyers; {open} got no final answer"
            ),
            "Who wrote this row, and for whom?",
        ),
        (
            Invariant::NoUndersell,
            capacity.min(buyers) - confirmed.max(reserved) - open - unpaid,
            format!(
                "{} sold, and {buyers} buyers came for {capacity} tickets",
                confirmed.max(reserved)
            ),
            "Who was told no while this ticket was there?",
        ),
    ];
    for (invariant, off, summary, question) in found {
        if off > 0 && !verdict.breaks(invariant) {
            verdict.findings.push(Finding {
                invariant,
                count: off.unsigned_abs(),
                summary,
                evidence: None,
                question,
            });
        }
    }
    verdict.findings.extend(seen.money.as_ref().and_then(Money::finding));
    verdict.findings.sort_by_key(|finding| finding.invariant);
}

/// How many orders were declined, expired or cancelled.
fn unpaid(history: &History) -> usize {
    let unpaid = history.requests.iter().filter(|request| {
        let Answer::Accepted {
            ending: Some(ending), ..
        } = &request.answer
        else {
            return false;
        };
        let refused = ending.refused.as_ref();
        refused.is_some_and(|refused| matches!(refused, Refused::Declined | Refused::Expired | Refused::Cancelled))
    });
    let keys: HashSet<&str> = unpaid.map(|request| request.key.as_str()).collect();
    keys.len()
}

/// How many request keys never got a final answer.
fn without_an_answer(history: &History) -> usize {
    let answered = |answer: &Answer| {
        matches!(
            answer,
            Answer::Confirmed { .. } | Answer::Refused(_) | Answer::Accepted { ending: Some(_), .. }
        )
    };
    let (answered, open): (Vec<_>, Vec<_>) = history.requests.iter().partition(|request| answered(&request.answer));
    let answered: HashSet<&str> = answered.iter().map(|request| request.key.as_str()).collect();
    let open: HashSet<&str> = open.iter().map(|request| request.key.as_str()).collect();
    open.difference(&answered).count()
}
