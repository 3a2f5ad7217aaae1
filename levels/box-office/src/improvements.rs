//! The improvements of LV.4: each is off unless its setting is given, and a strategy says which it
//! supports.

use std::{num::NonZeroU32, time::Duration};

use url::Url;

use crate::{Invariant, Level, Promises, StartError, Strategy, settings::whole_number};

/// The settings of the improvements. The doc comments of the fields are the text of `--help`.
#[derive(Clone, Debug, Default, clap::Args)]
#[command(next_help_heading = "Improvements (LV.4)")]
pub struct Improvements {
    /// The number of orders a second that this server accepts from all buyers together; as many may
    /// come at once. More are answered 429
    #[arg(long, env = "RATE_LIMIT", value_name = "N", value_parser = rate)]
    pub rate_limit: Option<NonZeroU32>,
    /// The number of orders a second that this server accepts from one buyer; as many may come at
    /// once. More are answered 429
    #[arg(long, env = "RATE_LIMIT_PER_BUYER", value_name = "N", value_parser = rate)]
    pub rate_limit_per_buyer: Option<NonZeroU32>,
    /// The time to live of an accepted order, in milliseconds: an order that is older when its
    /// ticket would be taken takes none, and ends as expired
    #[arg(long = "order-ttl-ms", visible_alias = "ttl-ms", env = "ORDER_TTL_MS", value_name = "MS", value_parser = order_ttl)]
    pub order_ttl: Option<Duration>,
    /// Circuit breakers: while Postgres is away consumers pause, and while Kafka acknowledges
    /// nothing orders are answered 503 at once
    #[arg(long = "circuit-breaker", env = "CIRCUIT_BREAKER", value_parser = switch)]
    pub circuit_breaker: bool,
    /// The relay of the outbox: publishes the event of every decided order to the Kafka topic
    /// orders.decided
    #[arg(long = "outbox-relay", env = "OUTBOX_RELAY", value_parser = switch)]
    pub outbox_relay: bool,
    /// Priority: buyers whom the admin has named as VIPs of a sale may ask for it. At most this many
    /// of their orders are decided for each other order that waits
    #[arg(long = "order-priority", env = "ORDER_PRIORITY", value_name = "N", value_parser = order_priority)]
    pub order_priority: Option<NonZeroU32>,
    /// The URL of the payment service: a ticket is held until it is paid for, and released if it is
    /// not
    #[arg(long = "payment-url", env = "PAYMENT_URL", hide_env_values = true, value_name = "URL", value_parser = payment_url)]
    pub payment_url: Option<Url>,
    /// How long a ticket is held for its payment, in milliseconds [default: 60000]
    #[arg(long = "hold-ms", env = "HOLD_MS", value_name = "MS", value_parser = hold)]
    pub hold: Option<Duration>,
    /// The timeout of each call of the payment service, in milliseconds: after it the outcome is
    /// unknown, and the service is asked again [default: 2000]
    #[arg(long = "payment-timeout-ms", env = "PAYMENT_TIMEOUT_MS", value_name = "MS", value_parser = payment_timeout)]
    pub payment_timeout: Option<Duration>,
}

/// The settings of the payment for a held ticket.
#[derive(Clone, Debug)]
pub struct PaymentSettings {
    /// The URL of the payment service.
    pub url: Url,
    /// How long a ticket is held.
    pub hold: Duration,
    /// The timeout of each call.
    pub timeout: Duration,
}

const HOLD: Duration = Duration::from_secs(60);
const PAYMENT_TIMEOUT: Duration = Duration::from_secs(2);

/// An improvement that a strategy may [support](Strategy::improvements).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Improvement {
    /// A flood is refused before its orders are accepted.
    RateLimiting,
    /// An order that is decided too late takes no ticket.
    MessageTtl,
    /// A backend that is away is not called.
    CircuitBreaker,
    /// Decided orders are published to Kafka.
    OutboxRelay,
    /// Orders of named buyers are decided first.
    Priority,
    /// A ticket is held until it is paid for, or released.
    Saga,
}

impl Improvement {
    /// The name in messages.
    pub const fn name(self) -> &'static str {
        match self {
            Self::RateLimiting => "rate limiting",
            Self::MessageTtl => "message TTL",
            Self::CircuitBreaker => "circuit breaker",
            Self::OutboxRelay => "outbox relay",
            Self::Priority => "priority",
            Self::Saga => "saga",
        }
    }
}

/// A setting that is given.
struct Given {
    improvement: Improvement,
    variable: &'static str,
    flag: &'static str,
    value: String,
}

impl Improvements {
    /// Every setting that is given.
    fn given(&self) -> Vec<Given> {
        let given = |improvement, variable, flag, value: Option<String>| {
            value.map(|value| Given {
                improvement,
                variable,
                flag,
                value,
            })
        };
        let on = |switch: bool| switch.then(|| "true".to_owned());
        [
            given(
                Improvement::RateLimiting,
                "RATE_LIMIT",
                "--rate-limit",
                self.rate_limit.map(|rate| rate.to_string()),
            ),
            given(
                Improvement::RateLimiting,
                "RATE_LIMIT_PER_BUYER",
                "--rate-limit-per-buyer",
                self.rate_limit_per_buyer.map(|rate| rate.to_string()),
            ),
            given(
                Improvement::MessageTtl,
                "ORDER_TTL_MS",
                "--order-ttl-ms",
                self.order_ttl.map(milliseconds),
            ),
            given(
                Improvement::CircuitBreaker,
                "CIRCUIT_BREAKER",
                "--circuit-breaker",
                on(self.circuit_breaker),
            ),
            given(
                Improvement::OutboxRelay,
                "OUTBOX_RELAY",
                "--outbox-relay",
                on(self.outbox_relay),
            ),
            given(
                Improvement::Priority,
                "ORDER_PRIORITY",
                "--order-priority",
                self.order_priority.map(|vips| vips.to_string()),
            ),
            given(
                Improvement::Saga,
                "PAYMENT_URL",
                "--payment-url",
                self.payment_url.as_ref().map(Url::to_string),
            ),
            given(Improvement::Saga, "HOLD_MS", "--hold-ms", self.hold.map(milliseconds)),
            given(
                Improvement::Saga,
                "PAYMENT_TIMEOUT_MS",
                "--payment-timeout-ms",
                self.payment_timeout.map(milliseconds),
            ),
        ]
        .into_iter()
        .flatten()
        .collect()
    }

    /// The environment variables of the settings that are given, for a server in a process of its
    /// own.
    pub fn variables(&self) -> Vec<(&'static str, String)> {
        let given = self.given().into_iter();
        given.map(|given| (given.variable, given.value)).collect()
    }

    /// Checks that the strategy supports every improvement whose setting is given, and that the
    /// settings do not contradict each other.
    ///
    /// # Errors
    /// [`StartError::Unsupported`] or [`StartError::Contradiction`].
    pub fn check(&self, level: &Level, strategy: &Strategy) -> Result<(), StartError> {
        for given in self.given() {
            if !strategy.improvements.contains(&given.improvement) {
                return Err(StartError::Unsupported {
                    variable: given.variable,
                    flag: given.flag,
                    improvement: given.improvement.name(),
                    strategy: format!("{}/{}", level.name, strategy.name),
                });
            }
        }
        match self.contradiction() {
            None => Ok(()),
            Some(settings) => Err(StartError::Contradiction(settings)),
        }
    }

    /// Two settings that contradict each other, in one line.
    fn contradiction(&self) -> Option<String> {
        if let (Some(overall), Some(buyer)) = (self.rate_limit, self.rate_limit_per_buyer)
            && buyer > overall
        {
            return Some(format!(
                "RATE_LIMIT_PER_BUYER (--rate-limit-per-buyer) is {buyer}, and RATE_LIMIT (--rate-limit) only {overall} for all buyers"
            ));
        }
        let Some(PaymentSettings { hold, timeout, .. }) = self.payment() else {
            let alone = self.given().into_iter();
            let mut alone = alone.filter(|given| given.improvement == Improvement::Saga);
            return alone.next().map(|Given { variable, flag, .. }| {
                format!("{variable} ({flag}) is set, but PAYMENT_URL (--payment-url) is not")
            });
        };
        let timeout_ms = timeout.as_millis();
        if hold <= timeout {
            return Some(format!(
                "HOLD_MS (--hold-ms) is {}, and PAYMENT_TIMEOUT_MS (--payment-timeout-ms) {timeout_ms}; expected a \
                 ticket to be held for longer than a payment may take",
                hold.as_millis(),
            ));
        }
        let order_ttl = self.order_ttl.filter(|order_ttl| *order_ttl < timeout)?;
        Some(format!(
            "ORDER_TTL_MS (--order-ttl-ms) is {}, and PAYMENT_TIMEOUT_MS (--payment-timeout-ms) {timeout_ms}; expected an \
             order to live at least as long as a payment may take",
            order_ttl.as_millis(),
        ))
    }

    /// The promises of a strategy with these improvements. With priority the order of service is one:
    /// within each priority, orders are decided in the order in which they were accepted.
    pub const fn promises(&self, promises: Promises) -> Promises {
        match self.order_priority {
            Some(_) => promises.keeps(&[Invariant::Order]),
            None => promises,
        }
    }

    /// The settings of the payment. `None`: a ticket is confirmed as soon as it is taken.
    pub fn payment(&self) -> Option<PaymentSettings> {
        Some(PaymentSettings {
            url: self.payment_url.clone()?,
            hold: self.hold.unwrap_or(HOLD),
            timeout: self.payment_timeout.unwrap_or(PAYMENT_TIMEOUT),
        })
    }
}

fn milliseconds(duration: Duration) -> String {
    duration.as_millis().to_string()
}

fn rate(text: &str) -> Result<NonZeroU32, &'static str> {
    const EXPECTED: &str = "a number of requests a second, 1 to 1000000";
    let rate = whole_number(text, 1..=1_000_000, EXPECTED)?;
    NonZeroU32::new(rate).ok_or(EXPECTED)
}

fn switch(text: &str) -> Result<bool, &'static str> {
    text.parse().map_err(|_| "true or false")
}

fn order_ttl(text: &str) -> Result<Duration, &'static str> {
    whole_number(text, 1..=86_400_000, "a number of milliseconds, 1 to 86400000").map(Duration::from_millis)
}

fn order_priority(text: &str) -> Result<NonZeroU32, &'static str> {
    const EXPECTED: &str = "the number of VIP orders for each other order, 1 to 100";
    let vips = whole_number(text, 1..=100, EXPECTED)?;
    NonZeroU32::new(vips).ok_or(EXPECTED)
}

/// Parses the URL of a payment service. It must not contain a password: it is logged.
fn payment_url(text: &str) -> Result<Url, &'static str> {
    const EXPECTED: &str = "http://HOST:PORT, without user and password";
    let url = Url::parse(text).map_err(|_| EXPECTED)?;
    let is_plain = url.username().is_empty() && url.password().is_none() && url.query().is_none();
    if url.scheme() == "http" && url.has_host() && is_plain {
        Ok(url)
    } else {
        Err(EXPECTED)
    }
}

fn hold(text: &str) -> Result<Duration, &'static str> {
    whole_number(text, 100..=86_400_000, "a number of milliseconds, 100 to 86400000").map(Duration::from_millis)
}

fn payment_timeout(text: &str) -> Result<Duration, &'static str> {
    whole_number(text, 10..=60_000, "a number of milliseconds, 10 to 60000").map(Duration::from_millis)
}
