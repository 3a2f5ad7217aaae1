//! What came of a rush: the judge's verdict on what the clients saw, held against what was promised.

use std::path::Path;

use anyhow::Context;
use box_office::{Invariant, Promise, Promises, api::Sale};
use comfy_table::{ContentArrangement, Table, presets};
use serde::Deserialize;
use suite::{
    history::{Answer, History, Refused},
    judge::{Conclusion, Finding, NotChecked, Verdict},
    rush::{Answers, Latency, Report},
};

use crate::Rush;

/// How a command ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Ended {
    /// Everything did what it promises.
    AsPromised = 0,
    /// The run did not stress a server enough to tell.
    Inconclusive = 4,
    /// A guarantee was broken.
    Broken = 1,
}

/// What came of one rush, by one generator.
pub(crate) struct Outcome {
    name: String,
    generator: &'static str,
    requests: u64,
    sold: u64,
    capacity: u64,
    stock: i64,
    duplicates: u64,
    /// 201, 409, 503 or no answer.
    answers: [u64; 3],
    /// p50, p95, p99.
    latency_ms: [f64; 3],
    /// Each broken invariant, with a sentence that has the numbers.
    broken: Vec<(Invariant, String)>,
    conclusion: Conclusion,
    on_purpose: bool,
}

/// What `load/k6/rush.js` writes at its end. It is described there.
#[derive(Deserialize)]
struct Summary {
    requests: u64,
    confirmed: u64,
    refused: u64,
    undecided: u64,
    duplicates: u64,
    capacity: u64,
    stock: i64,
    reserved: u64,
    p50_ms: f64,
    p95_ms: f64,
    p99_ms: f64,
    broken: Vec<Broken>,
}

#[derive(Deserialize)]
struct Broken {
    invariant: Invariant,
    summary: String,
}
