//! The table of what each improvement of LV.4 is for: the same fault without it and with it, as the suite has measured it.

use std::{fmt::Write, fs};

use super::NOT_MEASURED;
use crate::root;

/// The folder of what the tests record.
const FOLDER: &str = "book/ablations";

/// The name of the record, the improvement with its page, its setting, and the fault.
const ABLATIONS: [[&str; 4]; 6] = [
    [
        "rate-limit",
        "[rate limiting](rate-limit.md)",
        "`RATE_LIMIT_PER_BUYER`",
        "one buyer sends 200 orders at once",
    ],
    [
        "ttl",
        "[time to live](ttl.md)",
        "`ORDER_TTL_MS`",
        "orders wait until their buyers have left",
    ],
    [
        "priority",
        "[priority](priority.md)",
        "`ORDER_PRIORITY`",
        "20 VIPs come after 40 others",
    ],
    [
        "circuit-breaker",
        "[circuit breaker](circuit-breaker.md)",
        "`CIRCUIT_BREAKER`",
        "Postgres is away while orders wait",
    ],
    [
        "relay",
        "[outbox relay](relay.md)",
        "`OUTBOX_RELAY`",
        "another service needs the decisions",
    ],
    [
        "saga",
        "[saga](saga.md)",
        "`PAYMENT_URL`",
        "the card of the buyer with the ticket is declined",
    ],
];

/// The table, or how to record it.
pub(super) fn all() -> impl Iterator<Item = (String, String)> {
    [("figures/lv4-ablations.md".to_owned(), table())].into_iter()
}

fn table() -> String {
    let mut table = "| improvement | setting | the fault | without | with |\n|---|---|---|---|---|\n".to_owned();
    for [name, improvement, setting, fault] in ABLATIONS {
        let [Some(without), Some(with)] = ["without", "with"].map(|side| recorded(name, side)) else {
            return format!("{NOT_MEASURED}: `make ablations`\n");
        };
        let _ = writeln!(table, "| {improvement} | {setting} | {fault} | {without} | {with} |");
    }
    table
}

fn recorded(name: &str, side: &str) -> Option<String> {
    let file = root().join(FOLDER).join(format!("{name}.{side}.txt"));
    Some(fs::read_to_string(file).ok()?.trim().to_owned())
}
