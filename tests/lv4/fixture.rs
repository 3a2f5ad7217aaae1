//! What the fault tests share: a strategy on its backends, the order history, and the assertions.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::{Duration, Instant, SystemTime},
};

use box_office::{
    Improvements, Instrumentation,
    Invariant::{self, Conservation, NoDuplicate, NoOversell, NothingLost, Progress},
    KafkaConfig, Order, Priority, ProblemKind, RequestKey, SaleId, Strategy, StrategyContext, StrategyMetrics,
};
use harness::{
    assert_after_fault, assert_failure_mode,
    backends::{self, Kafka, Postgres, Redis, Reply, TestEnvironment},
    history::Answer,
    history_recorder::HistoryRecorder,
    judge::Verdict,
    rush::{Program, SALE},
    test_server::TestServer,
    until,
};
use lv4_kafka::{
    LEVEL,
    pipeline::{
        Ids, OrderMessage, PARTITIONS, ReleaseCommand, consumer_group, dead_letter_topic, orders_topic, vips_topic,
    },
};
use rdkafka::{
    ClientConfig, Offset, TopicPartitionList,
    admin::{AdminClient, AdminOptions, AlterConfig, ResourceSpecifier},
    client::DefaultClientContext,
    consumer::{BaseConsumer, Consumer},
    error::KafkaError,
    producer::{FutureProducer, FutureRecord},
};
use sqlx::PgPool;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    time::sleep,
};
use uuid::Uuid;

/// The timeout of anything that normally happens at once, generous for a busy machine.
pub(crate) const TIMEOUT: Duration = Duration::from_secs(20);

/// The interval at which a condition is polled.
pub(crate) const POLL_INTERVAL: Duration = Duration::from_millis(20);

/// The consumer session timeout by default: so long that no consumer is expelled on a busy machine.
pub(crate) const SESSION: Duration = Duration::from_secs(30);

/// The session timeout of tests in which a dead consumer has to be expelled.
pub(crate) const SHORT_SESSION: Duration = Duration::from_secs(1);

/// How long a test observes that something does not happen.
pub(crate) const OBSERVATION_TIME: Duration = Duration::from_secs(3);

pub(crate) fn strategy(name: &str) -> &'static Strategy {
    LEVEL
        .strategy(name)
        .unwrap_or_else(|| panic!("LV.4 has no strategy {name}"))
}

/// Sends Redis a command that it answers with OK.
pub(crate) async fn ok(redis: &Redis, words: &[&str]) {
    assert_eq!(redis.command(words).await.unwrap(), Reply::Status("OK".to_owned()));
}

/// A strategy on its backends, with what a test observes of it.
pub(crate) struct Fixture {
    pub(crate) strategy: &'static Strategy,
    pub(crate) environment: TestEnvironment,
    pub(crate) pool: PgPool,
    session: Duration,
    /// Whether there is a topic of VIPs.
    has_priority: bool,
    /// The history of the requests for [`SALE`].
    pub(crate) history: HistoryRecorder,
    /// Queries the broker from outside, without joining the group.
    broker: Arc<BaseConsumer>,
}

impl Fixture {
    pub(crate) async fn new(name: &str) -> Self {
        let strategy = strategy(name);
        Self::in_environment(strategy, TestEnvironment::shared(strategy).await.unwrap()).await
    }

    /// On these servers, some of which are the test's own.
    pub(crate) async fn on(strategy: &'static Strategy, postgres: &Postgres, redis: &Redis, kafka: &Kafka) -> Self {
        let environment = TestEnvironment::on(postgres, Some(redis), strategy.schema)
            .await
            .unwrap();
        Self::in_environment(strategy, environment.with_kafka(Some(kafka))).await
    }

    async fn in_environment(strategy: &'static Strategy, environment: TestEnvironment) -> Self {
        let pool = environment.database().pool(1).await.unwrap();
        let kafka = environment
            .kafka(0, SESSION)
            .expect("a strategy of this level is configured for Kafka");
        let broker = ClientConfig::new()
            .set("bootstrap.servers", &kafka.bootstrap_servers)
            .set("group.id", consumer_group(&kafka))
            .create()
            .unwrap();
        Self {
            strategy,
            environment,
            pool,
            session: SESSION,
            has_priority: false,
            history: HistoryRecorder::new(strategy),
            broker: Arc::new(broker),
        }
    }

    /// With a session so short that a dead consumer is expelled soon.
    pub(crate) fn with_short_session(self) -> Self {
        Self {
            session: SHORT_SESSION,
            ..self
        }
    }

    /// With servers that are started with `ORDER_PRIORITY`.
    pub(crate) fn with_priority(self) -> Self {
        Self {
            has_priority: true,
            ..self
        }
    }

    /// Starts an instance.
    pub(crate) async fn start_instance(&self, settings: &[(&'static str, &str)]) -> TestServer {
        let program = Program::new(env!("CARGO_BIN_EXE_lv4-kafka"))
            .variable("KAFKA_SESSION_MS", self.session.as_millis().to_string())
            .variable("LOCK_LEASE_MS", "1000");
        let program = settings
            .iter()
            .fold(program, |program, &(name, value)| program.variable(name, value));
        TestServer::start(&self.environment, &program, &LEVEL, self.strategy)
            .await
            .unwrap()
    }

    /// Starts an instance that accepts orders and has no consumers, and creates the sale.
    pub(crate) async fn start_acceptor(&self, capacity: u32) -> TestServer {
        let server = self.start_instance(&[("KAFKA_CONSUMERS", "0")]).await;
        server.create_rush_sale(capacity).await.unwrap();
        server
    }

    /// Starts an instance that is stopped (SIGSTOP) when its consumer first reaches this point.
    pub(crate) async fn start_stopped_at(&self, point: &str) -> TestServer {
        let stopping = self
            .start_instance(&[("OVERSOLD_STOP_AT", &format!("{point}#1"))])
            .await;
        stopping
            .wait_until_stopped(TIMEOUT)
            .await
            .expect("the fault did not strike");
        stopping
    }

    pub(crate) fn kafka(&self) -> KafkaConfig {
        self.environment
            .kafka(0, self.session)
            .expect("a strategy of this level is configured for Kafka")
    }

    /// What the pipeline of an instance without consumers is opened with.
    pub(crate) async fn context(&self) -> StrategyContext {
        StrategyContext {
            database: self.environment.database().pool(2).await.unwrap().into(),
            work: Duration::ZERO,
            metrics: StrategyMetrics::default(),
            redis: None,
            kafka: Some(self.kafka()),
            improvements: Improvements::default(),
            instrumentation: Instrumentation::default(),
        }
    }

    /// The ids of this database.
    pub(crate) async fn ids(&self) -> Ids {
        Ids::load(&self.pool.clone().into()).await.unwrap()
    }

    /// Runs a blocking query of the broker on a thread of its own.
    pub(crate) async fn query_broker<A: Send + 'static>(
        &self,
        what: impl FnOnce(&BaseConsumer) -> A + Send + 'static,
    ) -> A {
        let broker = Arc::clone(&self.broker);
        tokio::task::spawn_blocking(move || what(&broker)).await.unwrap()
    }

    /// For each partition of the orders topic, the group's committed offset and the end of the log.
    pub(crate) async fn offsets(&self) -> BTreeMap<i32, (i64, i64)> {
        self.offsets_of(orders_topic(&self.kafka())).await
    }

    async fn offsets_of(&self, topic: String) -> BTreeMap<i32, (i64, i64)> {
        let read_offsets = move |client: &BaseConsumer| {
            let mut partitions = TopicPartitionList::new();
            partitions.add_partition_range(&topic, 0, PARTITIONS - 1);
            let mut offsets = BTreeMap::new();
            for partition in client.committed_offsets(partitions, TIMEOUT)?.elements() {
                let (_, end) = client.fetch_watermarks(&topic, partition.partition(), TIMEOUT)?;
                let done = match partition.offset() {
                    Offset::Offset(offset) => offset,
                    _ => 0,
                };
                offsets.insert(partition.partition(), (done, end));
            }
            rdkafka::error::KafkaResult::Ok(offsets)
        };
        let asked = self.query_broker(move |client| {
            // A new group or topic has no coordinator or leader for a moment.
            let deadline = Instant::now() + TIMEOUT;
            loop {
                match read_offsets(client) {
                    Err(_) if Instant::now() < deadline => std::thread::sleep(POLL_INTERVAL),
                    result => break result,
                }
            }
        });
        asked.await.unwrap()
    }

    pub(crate) async fn total_committed(&self) -> i64 {
        self.offsets().await.values().map(|(done, _)| done).sum()
    }

    pub(crate) async fn lag(&self) -> i64 {
        let lag = |offsets: BTreeMap<i32, (i64, i64)>| offsets.values().map(|(done, end)| end - done).sum::<i64>();
        let vips = match self.has_priority {
            true => lag(self.offsets_of(vips_topic(&self.kafka())).await),
            false => 0,
        };
        lag(self.offsets().await) + vips
    }

    /// Waits until the group has committed every message.
    pub(crate) async fn wait_until_processed(&self) {
        if !happens_within(TIMEOUT, async || self.lag().await == 0).await {
            panic!(
                "after {TIMEOUT:?} not every message is committed: {:?}, {} rows, {:?}",
                self.offsets().await,
                self.rows().await,
                self.group_members().await
            );
        }
    }

    /// The members of the group, each with its partitions, as the broker reports them.
    pub(crate) async fn group_members(&self) -> BTreeMap<String, Vec<i32>> {
        let group = consumer_group(&self.kafka());
        self.query_broker(move |client| {
            // Before the first member joins, the group has no coordinator, and this is an error.
            let groups = client.fetch_group_list(Some(&group), TIMEOUT).ok();
            let members = groups
                .iter()
                .flat_map(|groups| groups.groups())
                .flat_map(|group| group.members());
            members
                .map(|member| {
                    (
                        member.id().to_owned(),
                        decode_assignment(member.assignment().unwrap_or_default()),
                    )
                })
                .collect()
        })
        .await
    }

    /// Waits until this number of consumers share the partitions evenly.
    pub(crate) async fn wait_until_shared_by(&self, consumers: usize) {
        let each = PARTITIONS as usize / consumers;
        until("the partitions are shared", async || {
            let members = self.group_members().await;
            members.len() == consumers && members.values().all(|partitions| partitions.len() == each)
        })
        .await;
    }

    /// Judges orders that may expire after this time.
    pub(crate) fn with_expiry(self, expiry: Duration) -> Self {
        Self {
            history: self.history.with_expiry(expiry),
            ..self
        }
    }

    /// Appends the order of a buyer to the topic, as an instance does that has accepted it just before
    /// a fault.
    pub(crate) async fn append_order(&self, ids: &Ids, buyer: i64) -> Uuid {
        self.append_order_of_age(ids, buyer, Duration::ZERO).await
    }

    /// Appends such an order of a VIP to a partition.
    pub(crate) async fn append_vip_order(&self, ids: &Ids, partition: i32, buyer: i64) -> Uuid {
        self.append_to(&vips_topic(&self.kafka()), partition, ids, buyer, Duration::ZERO)
            .await
    }

    /// Appends such an order that was accepted this time ago.
    pub(crate) async fn append_order_of_age(&self, ids: &Ids, buyer: i64, age: Duration) -> Uuid {
        self.append_to(&orders_topic(&self.kafka()), 0, ids, buyer, age).await
    }

    async fn append_to(&self, topic: &str, partition: i32, ids: &Ids, buyer: i64, age: Duration) -> Uuid {
        let order = order(SALE, buyer);
        let id = ids.for_order(&order);
        self.history.record_accepted_before(buyer, id, age);
        let message = OrderMessage::new(id, &order).to_bytes();
        self.produce_sent_at(SystemTime::now() - age, topic, partition, &[&message])
            .await
            .unwrap();
        id
    }

    /// Produces messages to a partition, as any client of the broker could.
    pub(crate) async fn produce(&self, partition: i32, payloads: &[&[u8]]) -> Result<(), KafkaError> {
        self.produce_to(&orders_topic(&self.kafka()), partition, payloads).await
    }

    /// Produces a release command to the partition of its sale, as any client of the broker could.
    pub(crate) async fn produce_command(&self, command: &ReleaseCommand) {
        let servers = self.kafka().bootstrap_servers;
        let sender: FutureProducer = ClientConfig::new().set("bootstrap.servers", servers).create().unwrap();
        let (topic, payload) = (orders_topic(&self.kafka()), command.to_bytes());
        let sale = command.sale_id.to_be_bytes();
        let record = FutureRecord::to(&topic)
            .key(&sale)
            .payload(&payload)
            .headers(ReleaseCommand::headers());
        sender.send(record, TIMEOUT).await.unwrap();
    }

    /// Produces messages to a partition of any topic.
    pub(crate) async fn produce_to(&self, topic: &str, partition: i32, payloads: &[&[u8]]) -> Result<(), KafkaError> {
        self.produce_sent_at(SystemTime::now(), topic, partition, payloads)
            .await
    }

    async fn produce_sent_at(
        &self,
        sent_at: SystemTime,
        topic: &str,
        partition: i32,
        payloads: &[&[u8]],
    ) -> Result<(), KafkaError> {
        let sent_ms = sent_at.duration_since(SystemTime::UNIX_EPOCH).unwrap().as_millis() as i64;
        let sender: FutureProducer = ClientConfig::new()
            .set("bootstrap.servers", self.kafka().bootstrap_servers)
            .set("message.max.bytes", "2000000")
            .create()?;
        for payload in payloads {
            let record = FutureRecord::to(topic)
                .partition(partition)
                .key("")
                .payload(*payload)
                .timestamp(sent_ms);
            sender.send(record, TIMEOUT).await.map_err(|(why, _)| why)?;
        }
        Ok(())
    }

    /// Sets the maximum size of a message of the dead-letter topic; `None` is the broker's default.
    pub(crate) async fn limit_dead_letters(&self, max_bytes: Option<&str>) {
        let topic = dead_letter_topic(&self.kafka());
        let mut config = AlterConfig::new(ResourceSpecifier::Topic(&topic));
        if let Some(max_bytes) = max_bytes {
            config = config.set("max.message.bytes", max_bytes);
        }
        let altered = self.admin().alter_configs([&config], &AdminOptions::new()).await;
        altered.unwrap()[0].as_ref().unwrap();
    }

    /// The number of messages in the dead-letter topic, resolution markers included.
    pub(crate) async fn dead_letter_topic_size(&self) -> i64 {
        let topic = dead_letter_topic(&self.kafka());
        let asked = self.query_broker(move |client| client.fetch_watermarks(&topic, 0, TIMEOUT));
        asked.await.unwrap().1
    }

    pub(crate) fn admin(&self) -> AdminClient<DefaultClientContext> {
        let servers = self.kafka().bootstrap_servers;
        ClientConfig::new().set("bootstrap.servers", servers).create().unwrap()
    }

    /// The open transactions in the database in this state, each identified by its connection and
    /// start.
    pub(crate) async fn open_transactions(&self, state: &str) -> BTreeSet<String> {
        let open: Vec<String> = sqlx::query_scalar(
            "select pid || ' ' || xact_start from pg_stat_activity
              where datname = current_database() and state like $1 and xact_start is not null",
        )
        .bind(state)
        .fetch_all(&self.pool)
        .await
        .unwrap();
        open.into_iter().collect()
    }

    /// The number of statements that wait for a lock.
    pub(crate) async fn lock_waits(&self) -> i64 {
        sqlx::query_scalar(
            "select count(*) from pg_stat_activity
              where datname = current_database() and wait_event_type = 'Lock'",
        )
        .fetch_one(&self.pool)
        .await
        .unwrap()
    }

    /// The transactions of orders in flight: those between two statements.
    pub(crate) async fn transactions_in_flight(&self) -> BTreeSet<String> {
        self.open_transactions("idle in transaction").await
    }

    /// Waits until an order is in flight: read, and not written. Returns the transactions.
    pub(crate) async fn wait_for_order_in_flight(&self) -> BTreeSet<String> {
        let mut in_flight = BTreeSet::new();
        until("an order is in flight", async || {
            in_flight = self.transactions_in_flight().await;
            !in_flight.is_empty()
        })
        .await;
        in_flight
    }

    /// Waits for this number of attempts, as the database sees them: each is a transaction of its
    /// own.
    pub(crate) async fn wait_for_attempts(&self, times: usize) {
        let mut seen = BTreeSet::new();
        let deadline = Instant::now() + TIMEOUT;
        while seen.len() < times {
            assert!(
                Instant::now() < deadline,
                "after {TIMEOUT:?} the attempts were {seen:?}"
            );
            seen.append(&mut self.transactions_in_flight().await);
            sleep(POLL_INTERVAL).await;
        }
    }

    pub(crate) async fn rows(&self) -> i64 {
        sqlx::query_scalar("select count(*) from reservation")
            .fetch_one(&self.pool)
            .await
            .unwrap()
    }

    /// Orders for each of these buyers. Every order must be accepted.
    pub(crate) async fn accept_all(&self, server: &TestServer, buyers: impl Iterator<Item = i64>) -> Vec<Uuid> {
        let mut orders = vec![];
        for buyer in buyers {
            orders.push(self.accept(server, buyer).await);
        }
        orders
    }

    pub(crate) async fn accept(&self, server: &TestServer, buyer: i64) -> Uuid {
        match self.history.reserve(server, buyer).await {
            Answer::Accepted { reservation, .. } => reservation,
            other => panic!("buyer {buyer} is answered {other:?}"),
        }
    }

    /// The orders that do not have exactly one row and one event, and what is wrong with the sales
    /// that have no recorded history.
    pub(crate) async fn deviations(&self, orders: &[Uuid]) -> Vec<String> {
        let mut wrong = vec![];
        for id in orders {
            let (decided, events): (i64, i64) = sqlx::query_as(
                "select (select count(*) from reservation where id = $1),
                        (select count(*) from outbox where reservation_id = $1)",
            )
            .bind(id)
            .fetch_one(&self.pool)
            .await
            .unwrap();
            if (decided, events) != (1, 1) {
                wrong.push(format!("order {id} has {decided} rows and {events} events"));
            }
        }
        let others: Vec<(SaleId, i64, i64, i64, i64)> = sqlx::query_as(
            "select sale.id, capacity, stock, count(buyer_id), count(distinct buyer_id)
               from sale
               left join reservation on sale_id = sale.id and status = 'confirmed'
              where sale.id <> $1
              group by sale.id",
        )
        .bind(SALE)
        .fetch_all(&self.pool)
        .await
        .unwrap();
        for (sale, capacity, stock, confirmed, buyers) in others {
            if stock + confirmed != capacity || stock < 0 || confirmed != buyers {
                wrong.push(format!(
                    "sale {sale}: {confirmed} sold of {capacity} to {buyers} buyers, and {stock} are left"
                ));
            }
        }
        wrong
    }

    /// The judge's verdict, after every buyer has read the outcome of the order from this server.
    pub(crate) async fn verdict(&self, server: &TestServer, timeout: Duration) -> Verdict {
        self.history.record_outcomes(server, timeout).await.unwrap();
        self.history.verdict(&self.environment).await.unwrap()
    }

    /// Asserts what is expected of the strategy: of the rows and events, and of what this server
    /// tells the buyers.
    pub(crate) async fn assert_outcome(&self, server: &TestServer, orders: &[Uuid], expected: Expected) {
        let wrong = self.deviations(orders).await;
        match expected {
            Kept => {
                assert!(wrong.is_empty(), "{wrong:#?}");
                assert_after_fault(self.strategy, &self.verdict(server, TIMEOUT).await, &[]);
            }
            // The judge sees nothing of such a mistake in the sale.
            Breaks([]) => {
                assert!(!wrong.is_empty(), "the mistake of {} was not seen", self.strategy.name);
                println!("{}: {wrong:?}", self.strategy.name);
                assert_failure_mode(self.strategy, &[]);
            }
            Breaks(invariants) => {
                assert_after_fault(self.strategy, &self.verdict(server, OBSERVATION_TIME).await, invariants);
            }
        }
    }
}

/// Decodes the partitions of a member's assignment: a version, then topics with their partitions
/// (Kafka protocol, `ConsumerProtocolAssignment`).
pub(crate) fn decode_assignment(given: &[u8]) -> Vec<i32> {
    let number = |at: usize| Some(i32::from_be_bytes(given.get(at..at + 4)?.try_into().ok()?));
    let read = || {
        if number(2)? == 0 {
            return None;
        }
        let name = usize::from(u16::from_be_bytes(given.get(6..8)?.try_into().ok()?));
        let partitions = usize::try_from(number(8 + name)?).ok()?;
        (0..partitions).map(|index| number(12 + name + 4 * index)).collect()
    };
    read().unwrap_or_default()
}

/// An order of this buyer, with the buyer's own request key.
pub(crate) fn order(sale: SaleId, buyer: i64) -> Order {
    Order {
        sale,
        buyer,
        key: RequestKey::try_from(format!("buyer-{buyer}")).unwrap(),
        priority: Priority::Normal,
    }
}

/// What a test expects of a strategy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Expected {
    Kept,
    /// The mutant's mistake is observed and breaks at least these invariants. An empty list: the
    /// damage is outside the sale.
    Breaks(&'static [Invariant]),
}
pub(crate) use Expected::{Breaks, Kept};

pub(crate) const OVERSOLD: Expected = Breaks(&[NoOversell, Conservation]);

/// An order is accepted, and its buyer never learns the outcome.
pub(crate) const LOST: Expected = Breaks(&[NothingLost, Progress]);

/// A buyer gets two tickets for one order.
pub(crate) const TWICE: Expected = Breaks(&[NoDuplicate, NothingLost]);

/// Polls until the condition holds or the time is over. Returns whether it held.
pub(crate) async fn happens_within(time: Duration, condition: impl AsyncFn() -> bool) -> bool {
    let deadline = Instant::now() + time;
    while Instant::now() < deadline {
        if condition().await {
            return true;
        }
        sleep(POLL_INTERVAL).await;
    }
    false
}

/// Asserts that a backend which was stopped refuses connections.
pub(crate) async fn assert_unreachable(address: &str) {
    let connected = TcpStream::connect(address).await;
    let refused = connected.map(drop).map_err(|why| why.kind());
    assert_eq!(
        refused,
        Err(std::io::ErrorKind::ConnectionRefused),
        "the fault did not strike: {address}"
    );
}

/// The `host:port` of a URL.
pub(crate) fn host_and_port(url: &str) -> String {
    let (_, behind) = url.split_once("://").unwrap();
    let address = behind.split(['/', '?']).next().unwrap();
    address.rsplit('@').next().unwrap().to_owned()
}

/// Places an order, and asserts that its outcome is unknown: a timeout or an unreachable backend.
pub(crate) async fn assert_indeterminate(server: &TestServer, buyer: i64) {
    let answered = server
        .reserve(SALE, buyer, Some(&format!("buyer-{buyer}")))
        .await
        .unwrap();
    answered
        .is(ProblemKind::TimedOut)
        .or_else(|_| answered.is(ProblemKind::BackendAway))
        .unwrap();
}

/// A client of the event stream of an order that has received the event `accepted`.
pub(crate) async fn follow_events(server: &TestServer, order: Uuid) -> TcpStream {
    let mut stream = TcpStream::connect(server.address()).await.unwrap();
    let request = format!("GET /api/reservations/{order}/events HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut seen = String::new();
    while !seen.contains("event: accepted") {
        let mut some = [0; 256];
        let read = stream.read(&mut some).await.unwrap();
        assert!(read > 0, "{seen}");
        seen.push_str(&String::from_utf8_lossy(&some[..read]));
    }
    stream
}

pub(crate) async fn kill_instance(server: &TestServer) {
    let status = server.kill().await.unwrap();
    assert!(
        status.to_string().contains("signal: 9"),
        "the fault did not strike: {status}"
    );
}

#[tokio::test]
#[should_panic(expected = "the fault did not strike")]
async fn a_fault_that_does_not_strike_is_noticed() {
    let redis = backends::redis().await.unwrap();
    assert_unreachable(&host_and_port(redis.url())).await;
}

/// The value of a server's metric, summed over its labels. `None`: it is not exported.
pub(crate) async fn metric(server: &TestServer, name: &str) -> Option<i64> {
    let answer = server.get("/metrics").await.unwrap();
    let text = String::from_utf8(answer.body.to_vec()).unwrap();
    let named = text.lines().filter(|line| {
        let rest = line.strip_prefix(name);
        rest.is_some_and(|rest| rest.starts_with([' ', '{']))
    });
    let values: Vec<i64> = named
        .map(|line| line.rsplit(' ').next().unwrap().parse().unwrap())
        .collect();
    (!values.is_empty()).then(|| values.iter().sum())
}
