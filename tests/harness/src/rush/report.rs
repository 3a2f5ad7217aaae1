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
    /// Time from the opening of the gate until the last buyer who got a ticket knew it. `None`: no
    /// buyer was told so.
    pub last_sale: Option<Duration>,
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
    /// The instance that each request was sent to, by request id; nginx, if it reached none.
    pub sent_to: HashMap<u64, SocketAddr>,
    /// The number of requests for a charge, repeats included. `None`: the sale takes no payments.
    pub payment_calls: Option<u64>,
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
    /// 429: over a rate limit.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub rate_limited: u64,
    /// 202, and the order ended as expired.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub expired: u64,
    /// 202, and the payment was declined.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub declined: u64,
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
            last_sale: last(history.requests.iter().filter_map(confirmed_us)),
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
            payment_calls: None,
            struck: vec![],
            history,
        }
    }

    /// Requests per second, from the opening of the gate to the last answer.
    pub fn requests_a_second(&self) -> f64 {
        self.history.requests.len() as f64 / self.all_answered.as_secs_f64()
    }
}

/// Whether a count that few rushes have is left out of the results.
#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde calls it")]
fn is_zero(count: &u64) -> bool {
    *count == 0
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
                Answer::Refused(Refused::RateLimited) => &mut answers.rate_limited,
                Answer::Refused(_) => &mut answers.otherwise_refused,
                Answer::Indeterminate => &mut answers.undecided,
                Answer::Unexpected { .. } => &mut answers.unexpected,
            } += 1;
            if let Answer::Accepted {
                ending: Some(ending), ..
            } = &request.answer
            {
                match ending.refused {
                    Some(Refused::Expired) => answers.expired += 1,
                    Some(Refused::Declined) => answers.declined += 1,
                    _ => {}
                }
            }
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
        // A histogram of three digits rounds up: no percentile may come after the last answer.
        let max_us = waits_us.iter().copied().max().unwrap_or_default();
        let at = |quantile| histogram.value_at_quantile(quantile).min(max_us) as f64 / 1000.0;
        Self {
            p50_ms: at(0.50),
            p95_ms: at(0.95),
            p99_ms: at(0.99),
            max_ms: max_us as f64 / 1000.0,
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

/// When a buyer knew of a ticket: by a 201, or by the final state of an accepted order.
fn confirmed_us(request: &Request) -> Option<Micros> {
    match &request.answer {
        Answer::Confirmed { .. } => request.answered_us,
        Answer::Accepted {
            ending: Some(ending), ..
        } if ending.refused.is_none() => Some(ending.at_us),
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
    use uuid::Uuid;

    use super::*;
    use crate::history::{Ending, FORMAT_VERSION, Header};

    fn history(requests: Vec<Request>) -> History {
        History {
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
            payments: None,
            decisions: None,
        }
    }

    fn request(number: u64, key: &str, sent_us: Micros, answered_us: Option<Micros>, answer: Answer) -> Request {
        Request {
            request: number,
            buyer: 1,
            key: key.to_owned(),
            sent_us,
            answered_us,
            answer,
            steps: vec![],
        }
    }

    #[test]
    fn a_click_that_never_got_an_answer_is_counted_beside_the_latency() {
        let requests = [
            ("answered", 0, Some(2_000)),
            ("repeated", 1_000, None),
            ("repeated", 3_000, Some(9_000)),
            ("given up", 0, None),
            ("given up", 5_000, None),
        ];
        let requests = (0..).zip(requests).map(|(number, (key, sent_us, answered_us))| {
            request(number, key, sent_us, answered_us, Answer::Indeterminate)
        });
        let report = Report::new(1, history(requests.collect()), 0, &Clock::start().stop());
        assert_eq!(report.unanswered, 1);
        assert_eq!(report.answered.max_ms, 8.0);
    }

    #[test]
    fn the_last_sale_is_the_last_buyer_who_learns_of_a_ticket_and_no_refusal() {
        let reservation = Uuid::nil();
        let accepted = |at_us, refused| Answer::Accepted {
            reservation,
            ending: Some(Ending {
                at_us,
                refused,
                changed_to: None,
            }),
        };
        let requests = [
            (1_000, Answer::Confirmed { reservation }),
            (2_000, accepted(7_000, None)),
            (3_000, accepted(8_000, Some(Refused::SoldOut))),
            (9_000, Answer::Refused(Refused::SoldOut)),
        ];
        let requests = (0..)
            .zip(requests)
            .map(|(number, (answered_us, answer))| request(number, &number.to_string(), 0, Some(answered_us), answer));
        let report = Report::new(1, history(requests.collect()), 0, &Clock::start().stop());
        assert_eq!(report.last_sale, Some(Duration::from_millis(7)));
    }

    #[test]
    fn no_percentile_comes_after_the_last_answer() {
        // Three digits round this up to 1,000,447.
        let latency = Latency::of(&[1_000_001]);
        for at in [latency.p50_ms, latency.p95_ms, latency.p99_ms, latency.max_ms] {
            assert_eq!(at, 1000.001);
        }
    }
}
