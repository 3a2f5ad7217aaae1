//! Benchmark of the judge: time and memory for 1,000,000 requests.
//!
//! `cargo run --release -p harness --example judge_benchmark`; with `-- --bound` it fails above its
//! limits.
//!
//! The history is correct, so that every rule reads all of it: a third of a million tickets, sold
//! at once or accepted first, with repeats after unknown outcomes, second clicks, and refusals for
//! all other buyers. Writing and reading the JSON lines is measured separately.

use std::{
    env, fs,
    io::{BufReader, BufWriter, Seek, Write},
    time::{Duration, Instant},
};

use anyhow::ensure;
use harness::{
    history::{Answer, Ending, FORMAT_VERSION, Header, History, Micros, Refused, Request, Row, Status},
    judge::judge,
};
use uuid::Uuid;

const REQUESTS: u64 = 1_000_000;
const CAPACITY: u64 = 333_333;
/// Time limit of the judge, for a release build on an idle machine.
const BOUND: Duration = Duration::from_secs(2);
/// Memory limit of this process.
const BOUND_MIB: u64 = 1024;
/// Time from sent to answered: a hundred times the interval between two requests.
const TOOK_US: Micros = 100;

fn main() -> anyhow::Result<()> {
    let bound = env::args().any(|argument| argument == "--bound");
    ensure!(!bound || !cfg!(debug_assertions), "--bound takes a build in release");
    let history = history();
    let rows = history.rows.as_ref().map_or(0, Vec::len);
    println!("{} requests, {rows} rows", history.requests.len());
    let before_mib = peak_mib();

    let started = Instant::now();
    let verdict = judge(&history);
    let took = started.elapsed();
    ensure!(verdict.findings.is_empty(), "the history is right, but:\n{verdict}");
    println!("judged in {:.3} s", took.as_secs_f64());
    let peak_mib = peak_mib();
    if let (Some(before), Some(after)) = (before_mib, peak_mib) {
        println!("peak memory {after} MiB, {before} MiB of it with the history alone");
    }
    if bound {
        ensure!(took < BOUND, "it took {took:?}, and may take {BOUND:?}");
        ensure!(
            peak_mib.is_none_or(|peak| peak < BOUND_MIB),
            "it may hold {BOUND_MIB} MiB"
        );
        println!("within the bounds of {BOUND:?} and {BOUND_MIB} MiB");
    }

    let mut file = tempfile::tempfile()?;
    let started = Instant::now();
    let mut out = BufWriter::new(&file);
    history.write(&mut out)?;
    out.flush()?;
    drop(out);
    let written = started.elapsed();
    file.rewind()?;
    let mib = file.metadata()?.len() >> 20;
    let started = Instant::now();
    let read = History::read(BufReader::new(&file))?;
    println!(
        "{mib} MiB of JSON lines: written in {:.3} s, read in {:.3} s",
        written.as_secs_f64(),
        started.elapsed().as_secs_f64()
    );
    ensure!(read == history, "what was read is not what was written");
    Ok(())
}

fn history() -> History {
    let mut requests: Vec<Request> = vec![];
    let mut rows: Vec<Row> = vec![];
    let mut turn = 0_u64;
    while requests.len() < REQUESTS as usize {
        turn += 1;
        // Numbers in no particular order, so that no table is read in the order in which it was
        // filled.
        let scattered = u64::wrapping_mul(turn, 0x9E37_79B9_7F4A_7C15);
        let buyer = (scattered >> 24) as i64;
        let key = format!("buyer-{buyer}-click-1");
        let reservation = Uuid::from_u64_pair(scattered, turn);
        let is_sold = (rows.len() as u64) < CAPACITY;
        let kind = turn % 10;
        let refused = (!is_sold).then_some(Refused::SoldOut);
        let answer = |at_us: Micros| match (kind, &refused) {
            (0..3, _) => Answer::Accepted {
                reservation,
                ending: Some(Ending {
                    at_us: at_us + TOOK_US,
                    refused: refused.clone(),
                    changed_to: None,
                }),
            },
            (_, None) => Answer::Confirmed { reservation },
            (_, Some(refused)) => Answer::Refused(refused.clone()),
        };
        let mut ask = |key: &str, answer: &dyn Fn(Micros) -> Answer| {
            let sent_us = requests.len() as Micros;
            requests.push(Request {
                request: sent_us,
                buyer,
                key: key.to_owned(),
                sent_us,
                answered_us: Some(sent_us + TOOK_US),
                answer: answer(sent_us + TOOK_US),
                steps: vec![],
            });
        };
        if kind == 3 {
            ask(&key, &|_| Answer::Indeterminate);
        }
        ask(&key, &answer);
        if !is_sold {
            continue;
        }
        if kind == 4 {
            let earlier = reservation;
            ask(&format!("buyer-{buyer}-click-2"), &|_| {
                Answer::Refused(Refused::AlreadyReserved { earlier })
            });
        }
        rows.push(Row {
            reservation,
            buyer,
            key,
            status: Status::Confirmed,
            taken_us: 1_700_000_000_000_000 + turn,
            released_us: None,
        });
    }
    requests.truncate(REQUESTS as usize);
    History {
        header: Header {
            version: FORMAT_VERSION,
            strategy: "benchmark".to_owned(),
            sale: 1,
            capacity: CAPACITY,
            deadline_us: 20_000_000,
            expiry_us: None,
            stock: Some(CAPACITY as i64 - rows.len() as i64),
        },
        requests,
        rows: Some(rows),
        faults: vec![],
        payments: None,
        decisions: None,
    }
}

/// The peak memory of this process, if the system reports it.
fn peak_mib() -> Option<u64> {
    let status = fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    let kib: u64 = line.trim().trim_end_matches(" kB").parse().ok()?;
    Some(kib >> 10)
}
