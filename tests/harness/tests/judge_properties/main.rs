//! Property tests: the judge against a brute-force checker that shares only the history format with
//! it.
//!
//! Small histories come from a correct model server; then mistakes are planted in them.

mod brute_force;
mod mistakes;
mod model_server;

use std::{
    cell::{Cell, RefCell},
    collections::{BTreeMap, BTreeSet},
};

use harness::{
    history::{Answer, History, Status},
    judge::{Verdict, judge},
};
use proptest::{
    collection::vec,
    prelude::*,
    test_runner::{Config, RngAlgorithm, TestRng, TestRunner},
};

use crate::{
    mistakes::plant,
    model_server::{asks, sell},
};

const CASES: u32 = 4000;

fn has_releases(history: &History) -> bool {
    history.rows.iter().flatten().any(|row| row.status == Status::Released)
}

fn found(verdict: &Verdict) -> BTreeSet<&'static str> {
    verdict
        .findings
        .iter()
        .map(|finding| finding.invariant.code())
        .collect()
}

/// A deterministic runner: the same cases in every run.
fn runner() -> TestRunner {
    let config = Config {
        cases: CASES,
        failure_persistence: None,
        ..Config::default()
    };
    TestRunner::new_with_rng(config, TestRng::deterministic_rng(RngAlgorithm::ChaCha))
}

#[test]
fn it_finds_what_a_search_of_everything_finds() {
    let (broken, whole, released) = (Cell::new(0), Cell::new(0), Cell::new(0));
    let times: RefCell<BTreeMap<&str, u32>> = RefCell::default();
    let mistakes = prop_oneof![
        1 => Just(vec![]),
        3 => vec((0..18_u8, any::<prop::sample::Index>(), any::<u8>()), 1..=3),
    ];
    runner()
        .run(&(1..=3_u64, asks(), mistakes), |(capacity, asks, mistakes)| {
            let mut history = sell(capacity, &asks);
            mistakes.iter().for_each(|mistake| plant(&mut history, mistake));

            let expected = brute_force::broken(&history);
            let verdict = judge(&history);
            let found = found(&verdict);

            let count = if expected.is_empty() { &whole } else { &broken };
            count.set(count.get() + 1);
            for code in &expected {
                *times.borrow_mut().entry(code).or_default() += 1;
            }
            released.set(released.get() + u32::from(has_releases(&history)));
            prop_assert_eq!(&found, &expected, "found and expected differ:\n{}", verdict);
            Ok(())
        })
        .expect("every case holds");
    let (broken, whole, released) = (broken.get(), whole.get(), released.get());
    let times = times.into_inner();
    println!("{broken} of {CASES} histories broke something, {released} gave a ticket back; broken: {times:?}");
    assert!(
        broken * 3 >= CASES,
        "only {broken} of {CASES} histories broke something"
    );
    assert!(whole * 3 >= CASES, "only {whole} of {CASES} histories broke nothing");
    assert!(
        (CASES / 10..=CASES / 2).contains(&released),
        "{released} of {CASES} histories gave a ticket back"
    );
    assert!(
        times.len() == 10 && times.values().all(|&times| times >= 50),
        "too few of some: {times:?}"
    );
}

/// The other direction needs no second judge: a correct server breaks nothing. Only unknown
/// outcomes, which no fault excuses here, may break I10.
#[test]
fn it_never_accuses_a_right_server() {
    runner()
        .run(&(1..=3_u64, asks(), any::<bool>()), |(capacity, asks, foreign)| {
            let mut history = sell(capacity, &asks);
            if foreign {
                history.rows = None;
                history.header.stock = None;
            }
            let verdict = judge(&history);
            let undecided = history
                .requests
                .iter()
                .any(|request| request.answer == Answer::Indeterminate);
            let accused = found(&verdict).into_iter().find(|code| *code != "I10" || !undecided);
            prop_assert_eq!(accused, None, "{}", verdict);
            Ok(())
        })
        .expect("every case holds");
}
