//! What the service does with the charge of a buyer.

use std::{collections::HashMap, fmt, str::FromStr};

use clap::ValueEnum;
use rand::{RngExt, SeedableRng, rngs::SmallRng};

/// How the service treats the charges of a buyer. A refund is always answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, ValueEnum)]
pub enum Behaviour {
    /// Takes the money, and says so.
    Approve,
    /// Takes nothing, and says so.
    Decline,
    /// Takes nothing, and never answers.
    Hang,
    /// Takes the money at once, and answers the first request long after. A repeat is answered at
    /// once.
    AnswerLate,
    /// Takes the money long after the request has arrived, and answers then.
    TakeLate,
    /// Takes the money once, and answers the first request with two answers in one body.
    Twice,
    /// Takes the money, and exits before it has answered.
    Die,
    /// Takes the money, and answers 500.
    Fail,
    /// Takes the money, and answers with a web page.
    Garbage,
    /// Takes the money, and answers with 10 MB.
    Huge,
    /// Takes the money, and never ends its answer: a byte at a time.
    Endless,
    /// Takes the money, and never ends its answer: as fast as it is read.
    Flood,
}

/// How often each behaviour is chosen, such as `approve=90,decline=8,hang=2`.
#[derive(Clone, Debug)]
pub struct Mix(Vec<(Behaviour, u32)>);

impl FromStr for Mix {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let expected = || "weights as in approve=90,decline=8,hang=2, not all of them 0".to_owned();
        let parse = |part: &str| {
            let (name, weight) = part.split_once('=').unwrap_or((part, "1"));
            let behaviour = <Behaviour as ValueEnum>::from_str(name.trim(), false).ok()?;
            Some((behaviour, weight.trim().parse::<u16>().ok()?.into()))
        };
        let weights: Option<Vec<_>> = text.split(',').map(parse).collect();
        let weights = weights.ok_or_else(expected)?;
        if weights.iter().all(|(_, weight)| *weight == 0) {
            return Err(expected());
        }
        Ok(Self(weights))
    }
}

impl fmt::Display for Mix {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (number, (behaviour, weight)) in self.0.iter().enumerate() {
            let name = behaviour.to_possible_value().expect("no behaviour is skipped");
            let comma = if number == 0 { "" } else { "," };
            write!(f, "{comma}{}={weight}", name.get_name())?;
        }
        Ok(())
    }
}

/// The behaviour for each buyer: one that was set, else one that the seed chooses.
pub(crate) struct Behaviours {
    pub(crate) mix: Mix,
    pub(crate) seed: u64,
    pub(crate) set: HashMap<i64, Behaviour>,
}

impl Behaviours {
    /// The behaviour for a buyer: the same for each of their requests, in every run with this seed.
    pub(crate) fn of(&self, buyer: i64) -> Behaviour {
        if let Some(&set) = self.set.get(&buyer) {
            return set;
        }
        let Mix(weights) = &self.mix;
        let total: u32 = weights.iter().map(|(_, weight)| weight).sum();
        let seed = self.seed.rotate_left(32) ^ buyer.cast_unsigned();
        let mut at = SmallRng::seed_from_u64(seed).random_range(0..total);
        for &(behaviour, weight) in weights {
            if at < weight {
                return behaviour;
            }
            at -= weight;
        }
        unreachable!("the weights add up to {total}")
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    fn behaviours(mix: &str, seed: u64) -> Behaviours {
        Behaviours {
            mix: mix.parse().unwrap(),
            seed,
            set: HashMap::from([(7, Behaviour::Hang)]),
        }
    }

    #[test]
    fn a_seed_chooses_the_same_behaviour_again_and_each_about_as_often_as_it_weighs() {
        let chosen = |seed| {
            let behaviours = behaviours("approve=90, decline=8,hang=2", seed);
            (100..10_100).map(|buyer| behaviours.of(buyer)).collect::<Vec<_>>()
        };
        assert_eq!(chosen(1), chosen(1));
        assert!(chosen(1) != chosen(2));
        let count = |behaviour| chosen(1).into_iter().filter(|other| *other == behaviour).count();
        assert!((8_800..9_200).contains(&count(Behaviour::Approve)));
        assert!((650..950).contains(&count(Behaviour::Decline)));
        assert_eq!(
            behaviours("approve", 1).of(7),
            Behaviour::Hang,
            "it is set for this buyer"
        );
    }

    #[test]
    fn a_mix_is_written_as_it_is_read() {
        let mix: Mix = "approve=90, answer-late,hang=2".parse().unwrap();
        assert_eq!(mix.to_string(), "approve=90,answer-late=1,hang=2");
    }

    #[test]
    fn a_mix_that_cannot_be_meant_is_rejected() {
        for wrong in [
            "",
            "approve=",
            "approve=-1",
            "aprove=1",
            "approve=0",
            "approve=1,,decline=1",
            "approve=65536",
        ] {
            let why = wrong.parse::<Mix>().unwrap_err();
            assert!(why.contains("approve=90"), "{why}");
        }
    }
}
