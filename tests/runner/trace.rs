//! `oversold trace`.

use rstest::rstest;

use crate::{err, out, oversold};

#[test]
fn the_forced_interleaving_is_the_same_each_time_and_shows_the_oversell() {
    let [first, second] = [0, 1].map(|_| oversold(&["trace", "lv1/read-then-write"]));
    assert_eq!(first.status.code(), Some(0), "{}", err(&first));
    assert_eq!(out(&first), out(&second));
    assert!(out(&first).contains("2 sold of 1, stock 0"), "{}", out(&first));
    assert!(out(&first).contains("BROKEN I1"), "{}", out(&first));
}

#[rstest]
#[case::one_after_another("lv1/read-then-write", "AAAAAAAABBBBBBBB", "1 sold of 1, stock 0\nnothing broken")]
#[case::in_turn("lv1/read-then-write", "ABABAB", "2 sold of 1, stock 0\nBROKEN I1")]
#[case::two_clicks("lv1/check-then-insert", "AaAaAaAa", "BROKEN I3")]
#[case::behind_a_lock("lv2/pessimistic", "ABABABAB", "1 sold of 1, stock 0\nnothing broken")]
fn a_reader_chooses_the_order(#[case] strategy: &str, #[case] order: &str, #[case] says: &str) {
    let output = oversold(&["trace", strategy, "--order", order]);
    assert_eq!(output.status.code(), Some(0), "{}", err(&output));
    assert!(out(&output).contains(says), "{}\n{}", out(&output), err(&output));
}
