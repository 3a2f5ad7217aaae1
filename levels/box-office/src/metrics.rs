//! Prometheus metrics. Each server has a registry of its own, so two servers in one process share
//! no metric.

use std::{
    fmt, iter, mem,
    sync::{Mutex, PoisonError},
    time::{Duration, Instant},
};

use axum::http::StatusCode;
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

use crate::{Outcome, Priority, ProblemKind, ReserveError, Service, Strategy, sale_states::SaleState};

/// Histogram buckets, up to the longest that a reservation can take.
const LATENCY_BUCKETS_SECONDS: [f64; 14] = [
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0,
];

/// The same for the wait of an accepted order, which may outlast an outage.
const QUEUE_BUCKETS_SECONDS: [f64; 13] = [
    0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 15.0, 60.0, 300.0,
];

/// The method and the route that a buyer reserves a ticket with, as labels.
const RESERVE: (&str, &str) = ("POST", "/api/sales/{id}/reservations");

/// Histogram buckets for the messages of a batch.
const BATCH_BUCKETS: [f64; 11] = [1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0, 500.0, 1000.0, 2000.0];

/// The metrics that a strategy records.
#[derive(Clone, Debug, Default)]
pub struct StrategyMetrics {
    /// `oversold_retries_total`: retries after a conflict with a concurrent reservation.
    pub retries: Counter,
    /// `oversold_dead_letters_total`: messages published to the dead-letter topic.
    pub dead_letters: Counter,
    /// `oversold_consumer_lag`: consumer lag by partition, in messages.
    pub lag: ConsumerLag,
    /// `oversold_rate_limited_total`: requests answered 429, by the limit that was exceeded.
    pub rate_limited: RateLimitedRequests,
    /// `oversold_rate_limit_buyers`: buyers that are counted one by one.
    pub rate_limit_buyers: RateLimitBuyers,
    /// `oversold_orders_expired_total`: orders that were older than their time to live when they
    /// were decided.
    pub expired: ExpiredOrders,
    /// `oversold_circuit_breaker_state`, `…_transitions_total` and `…_rejected_total`.
    pub circuit_breakers: CircuitBreakerMetrics,
    /// `oversold_payment_calls_total`: calls of the payment service, by outcome.
    pub payment_calls: PaymentCalls,
    /// `oversold_payment_unknown_oldest_seconds`: the age of the oldest payment whose outcome is
    /// unknown.
    pub oldest_unknown_payment: OldestUnknownPayment,
    /// `oversold_leases_lost_total`: locks whose lease had ended before they were released.
    pub lost_leases: LostLeases,
    /// `oversold_order_queue_seconds`, `oversold_consumer_batch_messages` and
    /// `oversold_rebalances_total`.
    pub consumer: ConsumerMetrics,
    /// The metrics of the outbox relay, if this server runs one.
    pub relay: Option<RelayMetrics>,
    /// The metrics of priorities, if this server has them.
    pub priority: Option<PriorityMetrics>,
}

/// The metrics of a server whose orders have priorities.
#[derive(Clone, Debug, Default)]
pub struct PriorityMetrics {
    /// `oversold_vip_consumer_lag`: the lag of the VIP topic by partition. `oversold_consumer_lag` is
    /// that of the other orders.
    pub vip_lag: ConsumerLag,
    decided: Family<PriorityLabels, Counter>,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct PriorityLabels {
    priority: &'static str,
}

impl PriorityMetrics {
    /// `oversold_orders_decided_total`: counts orders of this priority that this server has decided.
    pub fn count_decided(&self, priority: Priority, orders: u64) {
        let labels = PriorityLabels {
            priority: priority.name(),
        };
        self.decided.get_or_create(&labels).inc_by(orders);
    }
}

/// The number of locks that their holder no longer held when it released them.
#[derive(Clone, Debug, Default)]
pub struct LostLeases(Counter);

impl LostLeases {
    /// Counts one lock.
    pub fn count(&self) {
        self.0.inc();
    }
}

/// What the consumers of a server receive.
#[derive(Clone, Debug)]
pub struct ConsumerMetrics {
    queue: Histogram,
    batch: Histogram,
    rebalances: Counter,
}

impl Default for ConsumerMetrics {
    fn default() -> Self {
        Self {
            queue: Histogram::new(QUEUE_BUCKETS_SECONDS),
            batch: Histogram::new(BATCH_BUCKETS),
            rebalances: Counter::default(),
        }
    }
}

impl ConsumerMetrics {
    /// Records how long a message has waited for its consumer.
    pub fn queued(&self, waited: Duration) {
        self.queue.observe(waited.as_secs_f64());
    }

    /// Records a batch of this number of messages.
    pub fn polled(&self, messages: usize) {
        self.batch.observe(messages as f64);
    }

    /// Counts partitions that were assigned to a consumer or revoked from it together.
    pub fn rebalanced(&self) {
        self.rebalances.inc();
    }
}

/// The age of the oldest payment whose outcome is unknown.
#[derive(Clone, Debug, Default)]
pub struct OldestUnknownPayment(Gauge);

impl OldestUnknownPayment {
    /// Sets the age; zero if every outcome is known.
    pub fn set(&self, age: Duration) {
        self.0.set(age.as_secs().try_into().unwrap_or(i64::MAX));
    }
}

/// The metrics of a relay of the outbox.
#[derive(Clone, Debug, Default)]
pub struct RelayMetrics {
    /// `oversold_outbox_relayed_total`: events that this server has relayed.
    pub relayed: Counter,
    /// `oversold_outbox_unsent`: events in the outbox that no server has relayed.
    pub unsent: Gauge,
}

/// The state of each circuit breaker, and its transitions, by backend. A server without circuit
/// breakers exports none.
#[derive(Clone, Debug, Default)]
pub struct CircuitBreakerMetrics {
    states: Family<Backend, Gauge>,
    transitions: Family<Transition, Counter>,
    rejected: Family<Backend, Counter>,
}

/// The state of a circuit breaker. The discriminant is the value of the metric.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CircuitState {
    /// Every call is admitted.
    Closed = 0,
    /// One call at a time is admitted, as a probe.
    HalfOpen = 1,
    /// Every call is rejected.
    Open = 2,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Backend {
    backend: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Transition {
    backend: &'static str,
    to: &'static str,
}

impl CircuitBreakerMetrics {
    /// Sets the state of a backend's circuit breaker.
    pub fn set(&self, backend: &'static str, state: CircuitState) {
        self.states.get_or_create(&Backend { backend }).set(state as i64);
    }

    /// Counts a call that was rejected.
    pub fn rejected(&self, backend: &'static str) {
        self.rejected.get_or_create(&Backend { backend }).inc();
    }

    /// Sets the state, and counts the transition to it.
    pub fn transition(&self, backend: &'static str, state: CircuitState) {
        self.set(backend, state);
        let to = match state {
            CircuitState::Closed => "closed",
            CircuitState::HalfOpen => "half-open",
            CircuitState::Open => "open",
        };
        self.transitions.get_or_create(&Transition { backend, to }).inc();
    }
}

/// The calls of the payment service, by outcome.
#[derive(Clone, Debug, Default)]
pub struct PaymentCalls(Family<PaymentLabels, Counter>);

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct PaymentLabels {
    outcome: &'static str,
}

impl PaymentCalls {
    /// Counts a call with this outcome: one of a few words, such as `approved`.
    pub fn count(&self, outcome: &'static str) {
        self.0.get_or_create(&PaymentLabels { outcome }).inc();
    }
}

/// The consumer lag of each partition: its end offset minus the committed offset of the consumer
/// group, in messages.
///
/// It is a property of the group. Every server exports it, so that it is known even while no
/// consumer runs.
#[derive(Clone, Debug, Default)]
pub struct ConsumerLag(Family<Partition, Gauge>);

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Partition {
    partition: i32,
}

impl ConsumerLag {
    /// Sets the lag of a partition, in messages.
    pub fn set(&self, partition: i32, messages: i64) {
        self.0.get_or_create(&Partition { partition }).set(messages);
    }

    /// The lag of all partitions, which Kafka numbers from 0.
    fn total(&self) -> Option<i64> {
        let lag = |partition| Some(self.0.get(&Partition { partition })?.get());
        let partitions: Vec<i64> = (0..).map_while(lag).collect();
        (!partitions.is_empty()).then(|| partitions.iter().sum())
    }

    /// Removes all partitions: the lag is unknown.
    pub fn clear(&self) {
        self.0.clear();
    }
}

/// The number of requests that were over a rate limit, by the scope of the limit.
#[derive(Clone, Debug, Default)]
pub struct RateLimitedRequests(Family<Scope, Counter>);

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Scope {
    scope: &'static str,
}

impl RateLimitedRequests {
    /// Counts one request that was over the limit of this scope.
    pub fn count(&self, scope: &'static str) {
        self.0.get_or_create(&Scope { scope }).inc();
    }
}

/// The number of buyers that a rate limit counts one by one.
#[derive(Clone, Debug, Default)]
pub struct RateLimitBuyers(Gauge);

impl RateLimitBuyers {
    /// Sets the number.
    pub fn set(&self, buyers: usize) {
        self.0.set(buyers.try_into().unwrap_or(i64::MAX));
    }

    /// The number.
    pub fn get(&self) -> i64 {
        self.0.get()
    }
}

/// The number of orders that have ended as expired.
#[derive(Clone, Debug, Default)]
pub struct ExpiredOrders(Counter);

impl ExpiredOrders {
    /// Counts this number of orders.
    pub fn count(&self, orders: u64) {
        self.0.inc_by(orders);
    }
}

/// All metrics of one server.
pub(crate) struct Metrics {
    registry: Registry,
    responses: Family<ResponseLabels, Histogram, fn() -> Histogram>,
    reservations: Family<ReservationLabels, Counter>,
    lag: ConsumerLag,
    steps: StepTimes,
    sales: SaleGauges,
}

/// The last step of a reservation that has a final answer, or that may be sent again: what comes
/// after its last scheduling point.
const ANSWERED: &str = "answered";

/// The last step of every other reservation: it waited in vain, for what it had not reached.
const OUTCOME_UNKNOWN: &str = "outcome unknown";

/// The time from one scheduling point of a reservation to the next, by the point that was reached,
/// and from the last one to the end.
type StepTimes = Family<StepLabels, Histogram, fn() -> Histogram>;

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct StepLabels {
    step: &'static str,
}

/// Measures how long one reservation takes from each scheduling point to the next, and from the last
/// one to its end.
pub(crate) struct StepClock {
    times: StepTimes,
    last: Mutex<Instant>,
}

impl StepClock {
    /// The reservation has reached a scheduling point.
    pub(crate) fn reached(&self, step: &'static str) {
        let now = Instant::now();
        let mut last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        let took = now.duration_since(mem::replace(&mut *last, now));
        self.times
            .get_or_create(&StepLabels { step })
            .observe(took.as_secs_f64());
    }

    /// The reservation has ended. `None`: it panicked.
    pub(crate) fn ended(&self, result: Option<&Result<Outcome, ReserveError>>) {
        self.reached(match result {
            Some(Ok(_) | Err(ReserveError::Refused(_) | ReserveError::RateLimited(_))) => ANSWERED,
            Some(Err(ReserveError::Indeterminate(_))) | None => OUTCOME_UNKNOWN,
        });
    }
}

/// The latest sales, as the database had them at the last scrape.
#[derive(Clone, Debug, Default)]
struct SaleGauges {
    capacity: Family<SaleLabels, Gauge>,
    stock: Family<SaleLabels, Gauge>,
    reservations: Family<SaleStatusLabels, Gauge>,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct SaleLabels {
    sale: i64,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct SaleStatusLabels {
    sale: i64,
    status: String,
}

/// Labels of bounded cardinality, with nothing that a client chooses: `route` is the route pattern,
/// an unknown method is `other`.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ResponseLabels {
    method: &'static str,
    route: String,
    status: u16,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ReservationLabels {
    answer: &'static str,
}

impl Metrics {
    /// Registers all metrics.
    ///
    /// `name` is that of the strategy, such as `lv1/read-then-write`. The Kafka metrics of
    /// `strategy_metrics` are registered only if the strategy needs Kafka. `clients` tracks the open
    /// connections, `in_flight` the running reservations.
    pub(crate) fn new(
        name: &str,
        instance: &str,
        strategy: &Strategy,
        strategy_metrics: StrategyMetrics,
        database: PgPool,
        clients: TaskTracker,
        in_flight: TaskTracker,
    ) -> Self {
        let mut registry = Registry::with_prefix("oversold");
        let server = [("strategy", name), ("instance_name", instance)];
        registry.register(
            "server",
            "The strategy and the instance of this server",
            Info::new(
                server
                    .map(|(label, value)| (label.to_owned(), value.to_owned()))
                    .to_vec(),
            ),
        );

        let responses = Family::<ResponseLabels, Histogram, fn() -> Histogram>::new_with_constructor(|| {
            Histogram::new(LATENCY_BUCKETS_SECONDS)
        });
        registry.register(
            "http_request_duration_seconds",
            "Latency of HTTP responses, by route and status",
            responses.clone(),
        );

        let reservations = Family::<ReservationLabels, Counter>::default();
        registry.register(
            "reservations",
            "Completed reservations, by answer",
            reservations.clone(),
        );

        let steps = StepTimes::new_with_constructor(|| Histogram::new(LATENCY_BUCKETS_SECONDS));
        registry.register(
            "step_seconds",
            "Time that a reservation took from its last scheduling point, or its start, to this one, or to its end",
            steps.clone(),
        );

        let asynchronous = strategy.needs.contains(&Service::Kafka);
        // From the start: Prometheus sees no increase from nothing to a first value, and a rush may
        // be over between two scrapes.
        for (answer, status) in answers_of_a_rush(asynchronous) {
            let (method, route) = RESERVE;
            drop(reservations.get_or_create(&ReservationLabels { answer }));
            drop(responses.get_or_create(&ResponseLabels {
                method,
                route: route.to_owned(),
                status: status.as_u16(),
            }));
        }
        for &step in strategy.steps.iter().chain(&[ANSWERED, OUTCOME_UNKNOWN]) {
            drop(steps.get_or_create(&StepLabels { step }));
        }

        let sales = SaleGauges::default();
        registry.register("sale_capacity", "Tickets of a sale", sales.capacity.clone());
        registry.register("sale_stock", "Tickets of a sale that are left", sales.stock.clone());
        registry.register(
            "sale_reservations",
            "Reservations of a sale, by status",
            sales.reservations.clone(),
        );

        registry.register(
            "retries",
            "Retries after a conflict with a concurrent reservation",
            strategy_metrics.retries,
        );
        if strategy.needs.contains(&Service::Redis) {
            registry.register(
                "leases_lost",
                "Locks whose lease had ended before they were released",
                strategy_metrics.lost_leases.0,
            );
        }
        let lag = strategy_metrics.lag.clone();
        if asynchronous {
            registry.register(
                "dead_letters",
                "Messages published to the dead-letter topic",
                strategy_metrics.dead_letters,
            );
            registry.register(
                "consumer_lag",
                "Messages that the consumer group has not committed, by partition",
                strategy_metrics.lag.0,
            );
            registry.register(
                "orders_expired",
                "Orders that were older than their time to live when they were decided",
                strategy_metrics.expired.0,
            );
            registry.register(
                "rate_limited",
                "Requests over a rate limit, by the scope of the limit",
                strategy_metrics.rate_limited.0,
            );
            registry.register(
                "rate_limit_buyers",
                "Buyers whose requests are counted one by one for the rate limit",
                strategy_metrics.rate_limit_buyers.0,
            );
            registry.register(
                "circuit_breaker_state",
                "The state of a circuit breaker, by backend: 0 closed, 1 half-open, 2 open",
                strategy_metrics.circuit_breakers.states,
            );
            registry.register(
                "circuit_breaker_transitions",
                "Transitions of a circuit breaker, by backend and new state",
                strategy_metrics.circuit_breakers.transitions,
            );
            registry.register(
                "circuit_breaker_rejected",
                "Calls that a circuit breaker has rejected, by backend",
                strategy_metrics.circuit_breakers.rejected,
            );
            registry.register(
                "payment_calls",
                "Calls of the payment service, by outcome",
                strategy_metrics.payment_calls.0,
            );
            registry.register(
                "payment_unknown_oldest_seconds",
                "Age of the oldest payment whose outcome is unknown; 0 if there is none",
                strategy_metrics.oldest_unknown_payment.0,
            );
            registry.register(
                "order_queue_seconds",
                "Time that a message was in the orders topic until a consumer received it",
                strategy_metrics.consumer.queue,
            );
            registry.register(
                "consumer_batch_messages",
                "Messages that a consumer received together",
                strategy_metrics.consumer.batch,
            );
            registry.register(
                "rebalances",
                "Changes of the partitions that are assigned to the consumers of this server",
                strategy_metrics.consumer.rebalances,
            );
        }
        if let Some(relay) = strategy_metrics.relay {
            registry.register(
                "outbox_relayed",
                "Events of the outbox that this server has relayed to Kafka",
                relay.relayed,
            );
            registry.register(
                "outbox_unsent",
                "Events of the outbox that are not relayed, as last counted",
                relay.unsent,
            );
        }

        if let Some(priority) = strategy_metrics.priority {
            registry.register(
                "vip_consumer_lag",
                "Messages of the VIP topic that the consumer group has not committed, by partition",
                priority.vip_lag.0,
            );
            registry.register(
                "orders_decided",
                "Orders that this server has decided, by priority",
                priority.decided,
            );
        }

        registry.register_collector(Box::new(CurrentState {
            database,
            clients,
            in_flight,
            asynchronous,
        }));
        Self {
            registry,
            responses,
            reservations,
            lag,
            steps,
            sales,
        }
    }

    /// The clock of a reservation that starts now.
    pub(crate) fn step_clock(&self) -> StepClock {
        StepClock {
            times: self.steps.clone(),
            last: Mutex::new(Instant::now()),
        }
    }

    /// Sets the gauges of the latest sales. Those of all other sales are removed.
    pub(crate) fn set_sales(&self, sales: &[SaleState]) {
        self.sales.capacity.clear();
        self.sales.stock.clear();
        self.sales.reservations.clear();
        for state in sales {
            let labels = SaleLabels { sale: state.sale_id };
            self.sales.capacity.get_or_create(&labels).set(state.capacity);
            self.sales.stock.get_or_create(&labels).set(state.stock);
            if let Some(status) = state.status.clone() {
                let labels = SaleStatusLabels {
                    sale: state.sale_id,
                    status,
                };
                self.sales.reservations.get_or_create(&labels).set(state.reservations);
            }
        }
    }

    /// The consumer lag of all partitions, in messages. `None`: it is unknown, or orders are not
    /// processed by consumers.
    pub(crate) fn lag(&self) -> Option<i64> {
        self.lag.total()
    }

    /// Records the latency of a response.
    pub(crate) fn observe_response(&self, method: &'static str, route: &str, status: u16, took: Duration) {
        let labels = ResponseLabels {
            method,
            route: route.to_owned(),
            status,
        };
        self.responses.get_or_create(&labels).observe(took.as_secs_f64());
    }

    /// Counts a completed reservation. `None`: it panicked.
    pub(crate) fn count_reservation(&self, result: Option<&Result<Outcome, ReserveError>>) {
        let answer = match result {
            Some(Ok(Outcome::Confirmed(_))) => "confirmed",
            Some(Ok(Outcome::Accepted(_))) => "accepted",
            Some(Err(error)) => ProblemKind::from(error).name(),
            None => ProblemKind::Crashed.name(),
        };
        self.reservations.get_or_create(&ReservationLabels { answer }).inc();
    }

    /// All metrics in the OpenMetrics text format.
    pub(crate) fn text(&self) -> Result<String, fmt::Error> {
        let mut text = String::new();
        text::encode(&mut text, &self.registry)?;
        Ok(text)
    }
}

/// The answers that a valid order may get, each with its status.
fn answers_of_a_rush(asynchronous: bool) -> impl Iterator<Item = (&'static str, StatusCode)> {
    let (ticket, problems) = match asynchronous {
        true => (
            ("accepted", StatusCode::ACCEPTED),
            [ProblemKind::Backlogged, ProblemKind::RateLimited].as_slice(),
        ),
        false => (
            ("confirmed", StatusCode::CREATED),
            [ProblemKind::AlreadyReserved].as_slice(),
        ),
    };
    let problems = problems.iter().copied().chain([
        ProblemKind::SoldOut,
        ProblemKind::Overloaded,
        ProblemKind::TimedOut,
        ProblemKind::BackendAway,
    ]);
    iter::once(ticket).chain(problems.map(|problem| (problem.name(), problem.status())))
}

/// Gauges that are computed at each scrape.
struct CurrentState {
    database: PgPool,
    clients: TaskTracker,
    in_flight: TaskTracker,
    /// Orders are processed by consumers: then a reservation waits for Kafka, and `pool_waiting`
    /// would mislead.
    asynchronous: bool,
}

impl fmt::Debug for CurrentState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CurrentState").finish_non_exhaustive()
    }
}

impl Collector for CurrentState {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let open = u64::from(self.database.size());
        let idle = (self.database.num_idle() as u64).min(open);
        let in_use = open - idle;
        let in_flight = self.in_flight.len() as u64;
        let mut gauges = vec![
            ("pool_connections_in_use", "Database connections in use", in_use),
            (
                "pool_connections_idle",
                "Database connections that are open and idle",
                idle,
            ),
            (
                "pool_connections_max",
                "Database connections that the pool may open",
                u64::from(self.database.options().get_max_connections()),
            ),
            ("connections_open", "Open client connections", self.clients.len() as u64),
            ("reservations_in_flight", "Reservations in flight", in_flight),
        ];
        if !self.asynchronous {
            gauges.push((
                "pool_waiting",
                "Reservations in flight without a database connection: they wait for one, or for a lock outside Postgres",
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
