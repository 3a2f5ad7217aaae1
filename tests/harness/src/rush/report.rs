//! The report of a rush: its history, the verdict and the measurements.

use std::{collections::HashMap, net::SocketAddr, time::Duration};

use hdrhistogram::Histogram;
use rustix::time::{ClockId, clock_gettime};
use serde::{Deserialize, Serialize};

use box_office::trace::Record;

use super::Struck;
use crate::{
    history::{Answer, History, Micros, Refused, Request},
    judge::{Verdict, judge},
};

/// A judged and measured rush.
#[derive(Debug)]
pub struct Report {
    /// The recorded history.
    pub history: History,
    /// The judge's verdict.
    pub verdict: Verdict,
    /// The number of requests by answer.
    pub answers: Answers,
    /// Latency from the first sending of a click to its last answer. Clicks without an answer are
    /// left out.
    pub answered: Latency,
    /// The number of clicks without an answer.
    pub unanswered: usize,
    /// Latency from the first sending of a click to its final state, if orders are accepted first.
    pub completed: Option<Latency>,
    /// Time from the opening of the gate until every buyer had an answer.
    pub all_answered: Duration,
    /// Time from the opening of the gate until the last order reached its final state, if orders
    /// are accepted first.
    pub all_completed: Option<Duration>,
    /// Time from the opening of the gate until the last buyer had finished.
    pub took: Duration,
    /// The clients' share of this machine's processor time during the rush, from 0 to 1.
    pub client_share: f64,
    /// The number of retries after a conflict, on the servers that were alive at the end.
    pub retries: u64,
    /// The number of server processes.
    pub instances: usize,
    /// For each server, its traced steps outside requests, such as those of consumers.
    pub beside_requests: Vec<Vec<Record>>,
    /// The instance that each request was sent to, by request id.
    pub sent_to: HashMap<u64, SocketAddr>,
    /// The instances that the faults struck, in the order of the history's faults.
    pub struck: Vec<Struck>,
}

/// The number of requests by answer.
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize)]
pub struct Answers {
    /// 201.
    pub confirmed: u64,
    /// 202.
    pub accepted: u64,
    /// 409: every ticket is taken.
    pub sold_out: u64,
    /// 409: the buyer has a reservation.
    pub already_reserved: u64,
    /// Every other refusal.
    pub otherwise_refused: u64,
    /// 503, or no answer.
    pub undecided: u64,
    /// A response outside the HTTP contract.
    pub unexpected: u64,
}

/// Latency percentiles in milliseconds.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub struct Latency {
    /// Median.
    pub p50_ms: f64,
    /// 95th percentile.
    pub p95_ms: f64,
    /// 99th percentile.
    pub p99_ms: f64,
    /// Maximum.
    pub max_ms: f64,
}

/// Wall-clock and processor time of the clients' process.
pub struct Clock {
    wall: Duration,
    processor: Duration,
}

impl Clock {
    /// Starts the clock.
    pub fn start() -> Self {
        Self {
            wall: read(ClockId::Monotonic),
            processor: read(ClockId::ProcessCPUTime),
        }
    }

    /// Stops the clock: holds the times since [`start`](Self::start).
    #[must_use]
    pub fn stop(self) -> Self {
        Self {
            wall: read(ClockId::Monotonic).saturating_sub(self.wall),
            processor: read(ClockId::ProcessCPUTime).saturating_sub(self.processor),
        }
    }
}

fn read(clock: ClockId) -> Duration {
    let time = clock_gettime(clock);
    Duration::new(
        u64::try_from(time.tv_sec).unwrap_or_default(),
        u32::try_from(time.tv_nsec).unwrap_or_default(),
    )
}

impl Report {
    /// Judges and measures a history that was recorded while `clock` ran. `retries` is the servers'
    /// count.
    pub fn new(instances: usize, history: History, retries: u64, clock: &Clock) -> Self {
        let processors = std::thread::available_parallelism().map_or(1, usize::from);
        let Waits {
            answered,
            completed,
            unanswered,
        } = Waits::of(&history);
        Self {
            all_answered: last(history.requests.iter().filter_map(|request| request.answered_us)).unwrap_or(clock.wall),
            all_completed: last(history.requests.iter().filter_map(ended_us)),
            verdict: judge(&history),
            answers: Answers::count(&history),
            answered: Latency::of(&answered),
            unanswered,
            completed: (!completed.is_empty()).then(|| Latency::of(&completed)),
            took: clock.wall,
            client_share: clock.processor.as_secs_f64() / (clock.wall.as_secs_f64() * processors as f64),
            retries,
            instances,
            beside_requests: vec![],
            sent_to: HashMap::new(),
            struck: vec![],
            history,
        }
    }

    /// Requests per second, from the opening of the gate to the last answer.
    pub fn requests_a_second(&self) -> f64 {
        self.history.requests.len() as f64 / self.all_answered.as_secs_f64()
    }

    /// Tickets sold per second, from the opening of the gate until no buyer was waiting.
    pub fn sales_a_second(&self) -> f64 {
        let all = self.all_completed.unwrap_or_default().max(self.all_answered);
        self.verdict.tally.sold as f64 / all.as_secs_f64()
    }
}

impl Answers {
    fn count(history: &History) -> Self {
        let mut answers = Self::default();
        for request in &history.requests {
            *match &request.answer {
                Answer::Confirmed { .. } => &mut answers.confirmed,
                Answer::Accepted { .. } => &mut answers.accepted,
                Answer::Refused(Refused::SoldOut) => &mut answers.sold_out,
                Answer::Refused(Refused::AlreadyReserved { .. }) => &mut answers.already_reserved,
                Answer::Refused(_) => &mut answers.otherwise_refused,
                Answer::Indeterminate => &mut answers.undecided,
                Answer::Unexpected { .. } => &mut answers.unexpected,
            } += 1;
        }
        answers
    }
}

impl Latency {
    fn of(waits_us: &[Micros]) -> Self {
        let mut histogram = Histogram::<u64>::new(3).expect("three digits are a valid precision");
        for &wait_us in waits_us {
            histogram.record(wait_us).expect("the histogram grows by itself");
        }
        let at = |quantile| histogram.value_at_quantile(quantile) as f64 / 1000.0;
        Self {
            p50_ms: at(0.50),
            p95_ms: at(0.95),
            p99_ms: at(0.99),
            max_ms: histogram.max() as f64 / 1000.0,
        }
    }
}

fn last(moments: impl Iterator<Item = Micros>) -> Option<Duration> {
    moments.max().map(Duration::from_micros)
}

/// When an accepted order reached its final state.
fn ended_us(request: &Request) -> Option<Micros> {
    match &request.answer {
        Answer::Accepted { ending, .. } => ending.as_ref().map(|ending| ending.at_us),
        _ => None,
    }
}

/// The time from a click's first sending to its last answer and to its final state, repeats
/// included.
struct Waits {
    answered: Vec<Micros>,
    completed: Vec<Micros>,
    unanswered: usize,
}

impl Waits {
    fn of(history: &History) -> Self {
        #[derive(Default)]
        struct Click {
            first_sent_us: Option<Micros>,
            answered_us: Option<Micros>,
            ended_us: Option<Micros>,
        }
        let mut clicks: HashMap<&str, Click> = HashMap::new();
        for request in &history.requests {
            let click = clicks.entry(&request.key).or_default();
            let first = click.first_sent_us.get_or_insert(request.sent_us);
            *first = request.sent_us.min(*first);
            click.answered_us = click.answered_us.max(request.answered_us);
            click.ended_us = click.ended_us.max(ended_us(request));
        }
        let since_first = |click: &Click, at: Option<Micros>| Some(at?.saturating_sub(click.first_sent_us?));
        let answered: Vec<_> = clicks
            .values()
            .filter_map(|click| since_first(click, click.answered_us))
            .collect();
        Self {
            unanswered: clicks.len() - answered.len(),
            answered,
            completed: clicks
                .values()
                .filter_map(|click| since_first(click, click.ended_us))
                .collect(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::history::{FORMAT_VERSION, Header};

    #[test]
    fn a_click_that_never_got_an_answer_is_counted_beside_the_latency() {
        let mut requests = vec![];
        for (key, sent_us, answered_us) in [
            ("answered", 0, Some(2_000)),
            ("repeated", 1_000, None),
            ("repeated", 3_000, Some(9_000)),
            ("given up", 0, None),
            ("given up", 5_000, None),
        ] {
            requests.push(Request {
                request: requests.len() as u64,
                buyer: 1,
                key: key.to_owned(),
                sent_us,
                answered_us,
                answer: Answer::Indeterminate,
                steps: vec![],
            });
        }
        let history = History {
            header: Header {
                version: FORMAT_VERSION,
                strategy: "lv0/nothing".to_owned(),
                sale: 1,
                capacity: 1,
                deadline_us: 0,
                expiry_us: None,
                stock: None,
            },
            requests,
            rows: None,
            faults: vec![],
        };
        let report = Report::new(1, history, 0, &Clock::start().stop());
        assert_eq!(report.unanswered, 1);
        assert!((8.0..8.1).contains(&report.answered.max_ms), "{:?}", report.answered);
    }
}
