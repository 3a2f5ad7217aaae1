//! The table of `oversold rush`, and the lines below it.

use std::io::{IsTerminal, stdout};

use comfy_table::{ColumnConstraint, ContentArrangement, Table, presets};
use harness::rush::{Answers, Latency};

use crate::results::rush::{ByPriority, Payments, StrategyResult};

const COLUMNS: [&str; 12] = [
    "strategy",
    "sold",
    "oversold\nby",
    "stock",
    "duplicates",
    "201, 202 /\n409 / 503",
    "req/s",
    "answered, ms\np50 / p95 / p99",
    "completed, ms\np50 / p95",
    "overlap",
    "client",
    "verdict",
];

/// A count of answers that only some rushes have.
type Count = fn(&Answers) -> u64;

/// The columns of such counts, which stand behind the other answers where they are used.
const USED_ONLY: [(&str, Count); 3] = [
    ("429", |answers| answers.rate_limited),
    ("expired", |answers| answers.expired),
    ("declined", |answers| answers.declined),
];

/// The column behind which they stand.
const ANSWERS: usize = 5;

/// The width of the table with all columns, which it has where the output is no terminal.
const FULL_WIDTH: u16 = 170;

/// The columns that a narrower terminal does without.
const OPTIONAL: [&str; 3] = ["stock", "overlap", "client"];

/// Prints a row for each strategy.
pub(super) fn print(results: &[StrategyResult]) {
    let mut table = Table::new();
    table
        .load_style(presets::UTF8_FULL_CONDENSED)
        .set_content_arrangement(ContentArrangement::Dynamic);
    if !stdout().is_terminal() {
        table.set_width(FULL_WIDTH);
    }
    let wide = table.width().is_none_or(|width| width >= FULL_WIDTH);
    let shown = |column: &str| wide || !OPTIONAL.contains(&column);
    let is_used = |count: Count| results.iter().any(|result| count(&result.answers) > 0);
    let used: Vec<(&str, Count)> = USED_ONLY.into_iter().filter(|&(_, count)| is_used(count)).collect();
    let mut columns = COLUMNS.to_vec();
    columns.splice(ANSWERS + 1..ANSWERS + 1, used.iter().map(|&(name, _)| name));
    table.set_header(columns.iter().filter(|column| shown(column)));
    for number in 1..table.column_count() - 1 {
        let column = table.column_mut(number).expect("the header has it");
        column.set_constraint(ColumnConstraint::ContentWidth);
    }
    for result in results {
        let mut row = row(result).to_vec();
        let counts = used.iter().map(|&(_, count)| count(&result.answers).to_string());
        row.splice(ANSWERS + 1..ANSWERS + 1, counts);
        let row = columns.iter().zip(row).filter(|(column, _)| shown(column));
        table.add_row(row.map(|(_, cell)| cell));
    }
    println!("{table}");
}

fn row(result: &StrategyResult) -> [String; COLUMNS.len()] {
    let Answers {
        confirmed,
        accepted,
        sold_out,
        already_reserved,
        otherwise_refused,
        undecided: indeterminate,
        ..
    } = result.answers;
    let Latency {
        p50_ms, p95_ms, p99_ms, ..
    } = result.answered;
    [
        result.strategy.clone(),
        result.sold.to_string(),
        result.oversold_by.to_string(),
        result.stock.map_or_else(|| "?".to_owned(), |stock| stock.to_string()),
        result.duplicates.to_string(),
        format!(
            "{} / {} / {indeterminate}",
            confirmed + accepted,
            sold_out + already_reserved + otherwise_refused
        ),
        format!("{:.0}", result.requests_a_second),
        format!("{p50_ms:.0} / {p95_ms:.0} / {p99_ms:.0}"),
        // Where the answer is final, both clocks are one.
        result.completed.map_or_else(
            || "as answered".to_owned(),
            |Latency { p50_ms, p95_ms, .. }| format!("{p50_ms:.0} / {p95_ms:.0}"),
        ),
        result.greatest_overlap.to_string(),
        format!("{:.0} %", result.client_share * 100.0),
        result.verdict.clone(),
    ]
}

/// Prints what was observed of each strategy, and what its guarantee says of it.
pub(super) fn print_verdicts(results: &[StrategyResult]) {
    for result in results {
        let retries = match result.retries {
            0 => String::new(),
            retries => format!(", {retries} retries"),
        };
        println!("{}: {}{retries}", result.strategy, result.seen);
        if let Some(completed_ms) = result.all_completed_ms {
            println!(
                "    all answered after {:.0} ms, all completed after {completed_ms:.0} ms",
                result.all_answered_ms
            );
        }
        if let Some(Payments {
            calls,
            charges,
            refunds,
        }) = result.payments
        {
            println!("    payments: {calls} requests for a charge, {charges} charged, {refunds} refunded");
        }
        if let Some(ByPriority {
            vips,
            vips_with_ticket,
            others,
            others_with_ticket,
        }) = result.priority
        {
            println!(
                "    priority: {vips_with_ticket} of {vips} VIPs have a ticket, and {others_with_ticket} of {others} others"
            );
        }
        if let Some(rounds) = &result.rounds {
            println!("    {rounds}");
        }
        if result.unanswered > 0 {
            println!(
                "    {} clicks never got an answer; no latency includes them",
                result.unanswered
            );
        }
        println!("    promised: {}; verdict: {}", result.promises, result.verdict);
    }
}
