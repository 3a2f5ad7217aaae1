//! Statistics over the rounds of a measurement.

use std::fmt;

use serde::{Deserialize, Serialize};

/// The median of several measurements, and their range.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct MedianRange {
    /// The middle one, or the mean of the two in the middle.
    pub median: f64,
    /// The minimum.
    pub least: f64,
    /// The maximum.
    pub most: f64,
}

impl MedianRange {
    /// `None` without a measurement.
    pub fn of(measured: impl IntoIterator<Item = f64>) -> Option<Self> {
        let mut sorted: Vec<f64> = measured.into_iter().collect();
        sorted.sort_by(f64::total_cmp);
        let (least, most) = (*sorted.first()?, *sorted.last()?);
        let middle = sorted.len() / 2;
        let median = if sorted.len() % 2 == 1 {
            sorted[middle]
        } else {
            f64::midpoint(sorted[middle - 1], sorted[middle])
        };
        Some(Self { median, least, most })
    }

    /// Of one figure of every round.
    ///
    /// # Errors
    /// There was no round.
    pub fn over<T>(rounds: &[T], figure: impl Fn(&T) -> f64) -> anyhow::Result<Self> {
        Self::of(rounds.iter().map(figure)).ok_or_else(|| anyhow::anyhow!("there was no round"))
    }

    /// Of the ratios of two measurements that took turns: `ours` to `theirs`, round by round.
    pub fn of_ratios(ours: impl IntoIterator<Item = f64>, theirs: impl IntoIterator<Item = f64>) -> Option<Self> {
        Self::of(ours.into_iter().zip(theirs).map(|(ours, theirs)| ours / theirs))
    }
}

impl fmt::Display for MedianRange {
    /// With as many decimals as asked for: `{:.2}`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let digits = f.precision().unwrap_or(0);
        let Self { median, least, most } = self;
        write!(f, "{median:.digits$} ({least:.digits$} to {most:.digits$})")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_median_range_is_the_middle_and_both_ends() {
        let of = |measured: &[f64]| MedianRange::of(measured.iter().copied());
        assert_eq!(of(&[]), None);
        assert_eq!(
            format!("{:.1}", of(&[3.0, 1.0, 2.0]).expect("three")),
            "2.0 (1.0 to 3.0)"
        );
        assert_eq!(of(&[4.0, 1.0, 2.0, 3.0]).expect("four").median, 2.5);
    }

    #[test]
    fn ratios_are_those_of_rounds_that_took_turns() {
        let ratios = MedianRange::of_ratios([1.0, 6.0, 9.0], [2.0, 2.0, 3.0]);
        assert_eq!(ratios.expect("three").to_string(), "3 (0 to 3)");
    }
}
