//! What a server counts, for Prometheus. One registry per server: two servers in one process don't share a number.

use std::{fmt, time::Duration};

use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, EncodeLabelSet, EncodeMetric, text},
    metrics::{
        counter::Counter,
        family::Family,
        gauge::{ConstGauge, Gauge},
        histogram::Histogram,
        info::Info,
    },
    registry::Registry,
};
use sqlx::PgPool;
use tokio_util::task::TaskTracker;

use crate::{Outcome, ProblemKind, ReserveError, Service};

/// From a quick answer to the longest that a reservation can wait.
const LATENCY_BUCKETS_SECONDS: [f64; 14] = [
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0,
];

/// What a strategy counts.
#[derive(Clone, Debug, Default)]
pub struct StrategyMetrics {
    /// Raised each time a reservation starts again because another was quicker: `oversold_retries_total`.
    pub retries: Counter,
    /// Raised with each message that is dead-lettered: `oversold_dead_letters_total`.
    pub dead_letters: Counter,
    /// How far the group that decides is behind: `oversold_consumer_lag`.
    pub lag: ConsumerLag,
}

/// How many messages of each partition the group that decides has not passed. It is a figure of the group, and every server tells it, so that it is
/// there when no consumer is.
#[derive(Clone, Debug, Default)]
pub struct ConsumerLag(Family<Partition, Gauge>);

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Partition {
    partition: i32,
}

impl ConsumerLag {
    /// So many wait in a partition.
    pub fn set(&self, partition: i32, messages: i64) {
        self.0.get_or_create(&Partition { partition }).set(messages);
    }

    /// Nobody can say.
    pub fn clear(&self) {
        self.0.clear();
    }
}

/// Everything one server counts.
pub(crate) struct Metrics {
    registry: Registry,
    answers: Family<AnswerLabels, Histogram, fn() -> Histogram>,
    reservations: Family<ReservationLabels, Counter>,
}

/// No label ever holds what a client made up: the route is the pattern, an odd method is `other`.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct AnswerLabels {
    method: &'static str,
    route: String,
    status: u16,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ReservationLabels {
    answer: &'static str,
}

impl Metrics {
    /// `strategy` is `lv1/read-then-write`; `counts` is what the strategy counts, and `needs` tells which of it can be more than nothing;
    /// `clients` holds the open connections, `in_flight` the reservations that run.
    pub(crate) fn new(
        strategy: &str,
        instance: &str,
        counts: StrategyMetrics,
        needs: &[Service],
        database: PgPool,
        clients: TaskTracker,
        in_flight: TaskTracker,
    ) -> Self {
        let mut registry = Registry::with_prefix("oversold");
        let server = [("strategy", strategy), ("instance_name", instance)];
        registry.register(
            "server",
            "Which server this is",
            Info::new(
                server
                    .map(|(label, value)| (label.to_owned(), value.to_owned()))
                    .to_vec(),
            ),
        );

        let answers = Family::<AnswerLabels, Histogram, fn() -> Histogram>::new_with_constructor(|| {
            Histogram::new(LATENCY_BUCKETS_SECONDS)
        });
        registry.register(
            "http_request_duration_seconds",
            "How long answers took, by route and answer",
            answers.clone(),
        );

        let reservations = Family::<ReservationLabels, Counter>::default();
        registry.register(
            "reservations",
            "Reservations that came to their end, by what came out",
            reservations.clone(),
        );

        registry.register(
            "retries",
            "How often a reservation started again because another was quicker",
            counts.retries,
        );
        let decides_later = needs.contains(&Service::Kafka);
        if decides_later {
            registry.register("dead_letters", "Messages that were dead-lettered", counts.dead_letters);
            registry.register(
                "consumer_lag",
                "Messages that the group of all servers has not passed",
                counts.lag.0,
            );
        }

        registry.register_collector(Box::new(Now {
            database,
            clients,
            in_flight,
            decides_later,
        }));
        Self {
            registry,
            answers,
            reservations,
        }
    }

    /// An answer went out.
    pub(crate) fn answered(&self, method: &'static str, route: &str, status: u16, took: Duration) {
        let labels = AnswerLabels {
            method,
            route: route.to_owned(),
            status,
        };
        self.answers.get_or_create(&labels).observe(took.as_secs_f64());
    }

    /// A reservation came to its end; `None`: it panicked.
    pub(crate) fn reserved(&self, result: Option<&Result<Outcome, ReserveError>>) {
        let answer = match result {
            Some(Ok(Outcome::Confirmed(_))) => "confirmed",
            Some(Ok(Outcome::Accepted(_))) => "accepted",
            Some(Err(no)) => ProblemKind::from(no).name(),
            None => ProblemKind::Crashed.name(),
        };
        self.reservations.get_or_create(&ReservationLabels { answer }).inc();
    }

    /// Everything, in the text format of OpenMetrics.
    pub(crate) fn text(&self) -> Result<String, fmt::Error> {
        let mut text = String::new();
        text::encode(&mut text, &self.registry)?;
        Ok(text)
    }
}

/// What is going on, looked up when it is asked for.
struct Now {
    database: PgPool,
    clients: TaskTracker,
    in_flight: TaskTracker,
    /// Then a reservation waits for Kafka, and the connections are those of others.
    decides_later: bool,
}

impl fmt::Debug for Now {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Now").finish_non_exhaustive()
    }
}

impl Collector for Now {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let open = u64::from(self.database.size());
        let idle = (self.database.num_idle() as u64).min(open);
        let in_use = open - idle;
        let in_flight = self.in_flight.len() as u64;
        let mut gauges = vec![
            ("pool_connections_in_use", "Database connections in use", in_use),
            (
                "pool_connections_idle",
                "Database connections that are open and free",
                idle,
            ),
            (
                "connections_open",
                "Clients that are connected",
                self.clients.len() as u64,
            ),
            ("reservations_in_flight", "Reservations that run", in_flight),
        ];
        if !self.decides_later {
            gauges.push((
                "pool_waiting",
                "Reservations that run and have no database connection: they wait for one, or for a lock elsewhere",
                in_flight.saturating_sub(in_use),
            ));
        }
        for (name, help, value) in gauges {
            let gauge = ConstGauge::new(value);
            gauge.encode(encoder.encode_descriptor(name, help, None, gauge.metric_type())?)?;
        }
        Ok(())
    }
}
