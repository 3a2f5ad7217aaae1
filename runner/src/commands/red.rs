//! `oversold red`: the contract test of a level as it fails.
//!
//! The test runs with [`RED`] set, as if every strategy had to keep every invariant. A test that fails is the intended result here.

use std::process::{Output, Stdio};

use anyhow::{Context, ensure};
use harness::RED;

use crate::{
    checkout::{cargo_test, root},
    exit::ExitKind,
    levels,
};

/// The contract test of every level. A variant, such as one in an exact order of steps, continues the name.
pub(crate) const CONTRACT_TEST: &str = "a_sale_keeps_its_guarantee";

/// The same contract for the mutants that a rush catches.
const MUTANT_TEST: &str = "a_rush_catches_it";

/// Runs the contract test of a level or of one of its strategies, and prints how it fails.
pub(crate) fn run(name: &str) -> anyhow::Result<ExitKind> {
    let (level, strategy) = levels::parse(name)?;
    let listed = cargo_test(root(), level)
        .env(RED, "1")
        .args(["--list", "--format", "terse"])
        .stderr(Stdio::inherit())
        .output()
        .context("running cargo")?;
    ensure!(
        listed.status.success(),
        "cargo test of {} failed ({})",
        level.package,
        listed.status
    );
    let listed = String::from_utf8(listed.stdout)?;
    let tests = contract_tests(&listed);
    let names = level.strategies.iter().map(|strategy| strategy.name);
    let selected_tests: Vec<&str> = match strategy {
        Some(selected) => cases_of(selected.strategy.name, &tests),
        None => names.clone().flat_map(|name| cases_of(name, &tests)).collect(),
    };
    if selected_tests.is_empty() {
        let with_cases: Vec<&str> = names.filter(|name| !cases_of(name, &tests).is_empty()).collect();
        anyhow::bail!(
            "the contract of {} has no case for {name}; it has {}",
            level.package,
            with_cases.join(", ")
        );
    }
    let output = cargo_test(root(), level)
        .env(RED, "1")
        .arg("--exact")
        .args(selected_tests)
        .output()
        .context("running cargo")?;
    Ok(report(&output))
}

/// A case of the contract test.
pub(crate) struct ContractTest<'a> {
    /// The full name: `contract::a_sale_keeps_its_guarantee::case_01_read_then_write`.
    pub(crate) name: &'a str,
    /// The name of the case: `read_then_write`.
    pub(crate) case: &'a str,
}

/// The cases of the contract test, out of a list of all tests.
fn contract_tests(listed: &str) -> Vec<ContractTest<'_>> {
    let mut tests = tests_of(CONTRACT_TEST, listed);
    tests.extend(tests_of(MUTANT_TEST, listed));
    tests
}

/// The cases of the test functions whose names begin so, out of a list of all tests.
pub(crate) fn tests_of<'a>(function_prefix: &str, listed: &'a str) -> Vec<ContractTest<'a>> {
    let tests = listed.lines().filter_map(|line| line.strip_suffix(": test"));
    tests
        .filter_map(|name| {
            let (function, case) = name.rsplit_once("::case_")?;
            let function = function.rsplit("::").next()?;
            function.starts_with(function_prefix).then_some(())?;
            // `01_read_then_write`
            let (_, case) = case.split_once('_')?;
            Some(ContractTest { name, case })
        })
        .collect()
}

/// The tests of a strategy, by the first name of a case that names it: the same case on another number of instances adds nothing to see.
fn cases_of<'a>(strategy: &str, tests: &[ContractTest<'a>]) -> Vec<&'a str> {
    // Mutants are in a folder of their own, which the case leaves out.
    let strategy = strategy.rsplit('/').next().unwrap_or(strategy).replace('-', "_");
    let variant = format!("{strategy}_");
    let exact = tests.iter().find(|test| test.case == strategy);
    let first = exact.or_else(|| tests.iter().find(|test| test.case.starts_with(&variant)));
    let Some(ContractTest { case, .. }) = first else {
        return vec![];
    };
    let same_case = tests.iter().filter(|test| test.case == *case);
    same_case.map(|test| test.name).collect()
}

/// Prints what failed and why.
fn report(output: &Output) -> ExitKind {
    let printed = String::from_utf8_lossy(&output.stdout);
    for line in failures(&printed) {
        println!("{line}");
    }
    println!();
    if printed.lines().any(|line| line.starts_with("test result: ok")) {
        println!("Nothing is red: this keeps the contract.");
    } else if printed.contains(": guarantee broken: ") {
        println!("This failure is expected: `make red` requires every invariant. See above for what broke and why.");
    } else {
        eprintln!("This failed, but not because of a broken guarantee:");
        eprint!("{printed}{}", String::from_utf8_lossy(&output.stderr));
        return ExitKind::Broken;
    }
    ExitKind::AsPromised
}

/// The failed tests with their messages, and the result, out of the output of the test runner.
fn failures(printed: &str) -> Vec<String> {
    let mut shown = vec![];
    let mut in_message = false;
    for line in printed.lines() {
        let header = line
            .strip_prefix("---- ")
            .and_then(|line| line.strip_suffix(" stdout ----"));
        if let Some(test) = header {
            shown.push(format!("test {test} ... FAILED"));
            continue;
        }
        if line.contains(" panicked at ") {
            in_message = true;
            continue;
        }
        if line.starts_with("note: run with") || line == "failures:" {
            in_message = false;
        }
        if in_message {
            shown.push(line.to_owned());
        }
        if line.starts_with("test result: ") {
            let result = line.split("; 0 ignored").next().unwrap_or(line);
            shown.push(result.to_owned());
        }
    }
    shown
}

#[cfg(test)]
mod tests {
    use super::*;

    const LISTED: &str = "\
contract::a_sale_keeps_its_guarantee::case_01_mutex: test
contract::a_sale_keeps_its_guarantee::case_02_mutex_on_three: test
contract::a_sale_keeps_its_guarantee::case_03_conditional_update: test
contract::a_sale_keeps_its_guarantee::case_04_left_open_if_nobody_cancels: test
contract::a_sale_keeps_its_guarantee_when_batches_overlap::case_1_mutex: test
contract::a_sale_keeps_its_guarantee_when_batches_overlap::case_2_left_open_if_nobody_cancels: test
contract::a_reservation_can_be_cancelled_anywhere::case_1_mutex: test
mutants::a_rush_catches_it::case_01_skip_locked: test
no_order_of_steps_breaks_it: test
";

    #[test]
    fn a_strategy_has_the_first_case_that_names_it_in_every_contract_test() {
        let tests = contract_tests(LISTED);
        let cases = |strategy| cases_of(strategy, &tests).join(" ");
        assert_eq!(
            cases("mutex"),
            "contract::a_sale_keeps_its_guarantee::case_01_mutex \
             contract::a_sale_keeps_its_guarantee_when_batches_overlap::case_1_mutex"
        );
        assert_eq!(
            cases("conditional-update"),
            "contract::a_sale_keeps_its_guarantee::case_03_conditional_update"
        );
        assert_eq!(
            cases("mutants/left-open"),
            "contract::a_sale_keeps_its_guarantee::case_04_left_open_if_nobody_cancels \
             contract::a_sale_keeps_its_guarantee_when_batches_overlap::case_2_left_open_if_nobody_cancels"
        );
        assert_eq!(
            cases("mutants/skip-locked"),
            "mutants::a_rush_catches_it::case_01_skip_locked"
        );
        assert_eq!(cases("conditional"), cases("conditional-update"));
        assert_eq!(cases("optimistic"), "");
    }

    #[test]
    fn only_the_message_and_the_result_of_a_failed_test_are_shown() {
        let printed = "
running 1 test
F
failures:

---- contract::a_sale_keeps_its_guarantee::case_1_read_then_write stdout ----

thread 'contract::a_sale_keeps_its_guarantee::case_1_read_then_write' (7) panicked at tests/lv1/main.rs:52:5:
lv1/read-then-write on 1 instance(s): guarantee broken: I1

436 sold of 100
note: run with `RUST_BACKTRACE=1` environment variable to display a backtrace


failures:
    contract::a_sale_keeps_its_guarantee::case_1_read_then_write

test result: FAILED. 0 passed; 1 failed; 0 ignored; 0 measured; 9 filtered out; finished in 2.09s
";
        assert_eq!(
            failures(printed),
            [
                "test contract::a_sale_keeps_its_guarantee::case_1_read_then_write ... FAILED",
                "lv1/read-then-write on 1 instance(s): guarantee broken: I1",
                "",
                "436 sold of 100",
                "test result: FAILED. 0 passed; 1 failed",
            ]
        );
    }
}
