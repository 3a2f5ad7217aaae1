//! What the fault tests share: a strategy on its backends, the order history, and the assertions.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::{Duration, Instant},
};

use box_office::{
    Invariant::{self, Conservation, NoDuplicate, NoOversell, NothingLost, Progress},
    KafkaConfig, Order, ProblemKind, RequestKey, SaleId, Strategy,
};
use harness::{
    assert_after_fault, assert_failure_mode,
    backends::{self, TestEnvironment},
    history::Answer,
    history_recorder::HistoryRecorder,
    http_contract::TestServer,
    judge::Verdict,
    rush::{Program, SALE},
    until,
};
use lv4_kafka::{
    LEVEL,
    pipeline::{PARTITIONS, consumer_group, dead_letter_topic, orders_topic},
};
use rdkafka::{
    ClientConfig, Offset, TopicPartitionList,
    admin::AdminClient,
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

/// How long anything may take that is done at once, on a machine that has other things to do.
pub(crate) const PATIENCE: Duration = Duration::from_secs(20);

/// How often a test looks whether what it waits for is so.
pub(crate) const LOOK_EVERY: Duration = Duration::from_millis(20);

/// How long the group waits for a silent consumer: so long that no death is noticed, on a machine that has other things to do.
pub(crate) const SESSION: Duration = Duration::from_secs(30);

/// The same where a death has to be noticed.
pub(crate) const SHORT_SESSION: Duration = Duration::from_secs(1);

/// How long a mistake is given to show itself, where a right strategy does nothing that could be waited for.
pub(crate) const TIME_FOR_A_MISTAKE: Duration = Duration::from_secs(3);

pub(crate) fn strategy(name: &str) -> &'static Strategy {
    LEVEL
        .strategy(name)
        .unwrap_or_else(|| panic!("LV.4 has no strategy {name}"))
}

/// A place to sell at: a strategy on its backends.
pub(crate) struct Place {
    pub(crate) strategy: &'static Strategy,
    pub(crate) stand: TestEnvironment,
    pub(crate) pool: PgPool,
    session: Duration,
    /// What the buyers of [`SALE`] were told.
    pub(crate) ledger: HistoryRecorder,
    /// Asks the broker, as anybody could.
    asks: Arc<BaseConsumer>,
}

impl Place {
    pub(crate) async fn of(name: &str) -> Self {
        let strategy = strategy(name);
        Self::on(strategy, TestEnvironment::shared(strategy).await.unwrap()).await
    }

    pub(crate) async fn on(strategy: &'static Strategy, stand: TestEnvironment) -> Self {
        let pool = stand.database().pool(1).await.unwrap();
        let kafka = stand
            .kafka(0, SESSION)
            .expect("a strategy of this level has a place in Kafka");
        let asks = ClientConfig::new()
            .set("bootstrap.servers", &kafka.bootstrap_servers)
            .set("group.id", consumer_group(&kafka))
            .create()
            .unwrap();
        Self {
            strategy,
            stand,
            pool,
            session: SESSION,
            ledger: HistoryRecorder::new(strategy),
            asks: Arc::new(asks),
        }
    }

    /// The same, and whoever dies is missed soon.
    pub(crate) fn where_deaths_are_noticed(self) -> Self {
        Self {
            session: SHORT_SESSION,
            ..self
        }
    }

    /// Starts an instance.
    pub(crate) async fn instance(&self, settings: &[(&'static str, &str)]) -> TestServer {
        let program = Program::new(env!("CARGO_BIN_EXE_lv4-kafka"))
            .variable("KAFKA_SESSION_MS", self.session.as_millis().to_string())
            .variable("LOCK_LEASE_MS", "1000");
        let program = settings
            .iter()
            .fold(program, |program, &(name, value)| program.variable(name, value));
        TestServer::with(&self.stand, &program, &LEVEL, self.strategy)
            .await
            .unwrap()
    }

    /// One that accepts orders and decides none, with a sale.
    pub(crate) async fn acceptor(&self, capacity: u32) -> TestServer {
        let talk = self.instance(&[("KAFKA_CONSUMERS", "0")]).await;
        talk.opens_a_sale(capacity).await.unwrap();
        talk
    }

    /// One that stops (SIGSTOP) when its consumer comes to this point for the first time.
    pub(crate) async fn stops_at(&self, point: &str) -> TestServer {
        let stopping = self.instance(&[("OVERSOLD_STOP_AT", &format!("{point}#1"))]).await;
        stopping.stands_still(PATIENCE).await.expect("the fault did not strike");
        stopping
    }

    pub(crate) fn kafka(&self) -> KafkaConfig {
        self.stand
            .kafka(0, self.session)
            .expect("a strategy of this level has a place in Kafka")
    }

    /// Asks the broker something, on a thread that may wait.
    pub(crate) async fn ask<A: Send + 'static>(&self, what: impl FnOnce(&BaseConsumer) -> A + Send + 'static) -> A {
        let asks = Arc::clone(&self.asks);
        tokio::task::spawn_blocking(move || what(&asks)).await.unwrap()
    }

    /// How far each partition is decided, as the group has committed it, and where it ends.
    pub(crate) async fn offsets(&self) -> BTreeMap<i32, (i64, i64)> {
        let topic = orders_topic(&self.kafka());
        let look = move |client: &BaseConsumer| {
            let mut partitions = TopicPartitionList::new();
            partitions.add_partition_range(&topic, 0, PARTITIONS - 1);
            let mut offsets = BTreeMap::new();
            for partition in client.committed_offsets(partitions, PATIENCE)?.elements() {
                let (_, end) = client.fetch_watermarks(&topic, partition.partition(), PATIENCE)?;
                let done = match partition.offset() {
                    Offset::Offset(offset) => offset,
                    _ => 0,
                };
                offsets.insert(partition.partition(), (done, end));
            }
            rdkafka::error::KafkaResult::Ok(offsets)
        };
        let asked = self.ask(move |client| {
            // For a moment no broker cares for a group or a topic that is new.
            let gave_up = Instant::now() + PATIENCE;
            loop {
                match look(client) {
                    Err(_) if Instant::now() < gave_up => std::thread::sleep(LOOK_EVERY),
                    looked => break looked,
                }
            }
        });
        asked.await.unwrap()
    }

    pub(crate) async fn committed(&self) -> i64 {
        self.offsets().await.values().map(|(done, _)| done).sum()
    }

    pub(crate) async fn lag(&self) -> i64 {
        self.offsets().await.values().map(|(done, end)| end - done).sum()
    }

    /// Waits until every message is passed.
    pub(crate) async fn quiet(&self) {
        if !seen_within(PATIENCE, async || self.lag().await == 0).await {
            panic!(
                "after {PATIENCE:?} not every message is passed: {:?}, {} rows, {:?}",
                self.offsets().await,
                self.rows().await,
                self.members().await
            );
        }
    }

    /// The members of the group, each with its partitions, as the broker tells of them.
    pub(crate) async fn members(&self) -> BTreeMap<String, Vec<i32>> {
        let group = consumer_group(&self.kafka());
        self.ask(move |client| {
            // No broker cares for the group before somebody joins it, and then this is an error.
            let groups = client.fetch_group_list(Some(&group), PATIENCE).ok();
            let members = groups
                .iter()
                .flat_map(|groups| groups.groups())
                .flat_map(|group| group.members());
            members
                .map(|member| {
                    (
                        member.id().to_owned(),
                        assigned(member.assignment().unwrap_or_default()),
                    )
                })
                .collect()
        })
        .await
    }

    /// Waits until so many consumers share the partitions evenly.
    pub(crate) async fn shared_by(&self, consumers: usize) {
        let each = PARTITIONS as usize / consumers;
        until("the partitions are shared", async || {
            let members = self.members().await;
            members.len() == consumers && members.values().all(|partitions| partitions.len() == each)
        })
        .await;
    }

    /// Puts messages into a partition, as anybody could who reaches the broker.
    pub(crate) async fn puts(&self, partition: i32, payloads: &[&[u8]]) -> Result<(), KafkaError> {
        let place = self.kafka();
        let sender: FutureProducer = ClientConfig::new()
            .set("bootstrap.servers", &place.bootstrap_servers)
            .set("message.max.bytes", "2000000")
            .create()?;
        let topic = orders_topic(&place);
        for payload in payloads {
            let record = FutureRecord::to(&topic).partition(partition).key("").payload(*payload);
            sender.send(record, PATIENCE).await.map_err(|(why, _)| why)?;
        }
        Ok(())
    }

    /// How many messages the dead-letter topic holds, the notes of replays among them.
    pub(crate) async fn written_to_dead_letters(&self) -> i64 {
        let topic = dead_letter_topic(&self.kafka());
        let asked = self.ask(move |client| client.fetch_watermarks(&topic, 0, PATIENCE));
        asked.await.unwrap().1
    }

    pub(crate) fn admin(&self) -> AdminClient<DefaultClientContext> {
        let servers = self.kafka().bootstrap_servers;
        ClientConfig::new().set("bootstrap.servers", servers).create().unwrap()
    }

    /// The transactions that are open in the database, each by its connection and its beginning: those in such a state.
    pub(crate) async fn transactions(&self, state: &str) -> BTreeSet<String> {
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

    /// The transactions that hold an order and are between two statements.
    pub(crate) async fn in_hand(&self) -> BTreeSet<String> {
        self.transactions("idle in transaction").await
    }

    /// Waits until somebody has an order in hand: read, and not written. Returns the transactions that do.
    pub(crate) async fn an_order_is_in_hand(&self) -> BTreeSet<String> {
        let mut in_hand = BTreeSet::new();
        until("an order is in hand", async || {
            in_hand = self.in_hand().await;
            !in_hand.is_empty()
        })
        .await;
        in_hand
    }

    /// Waits until orders were tried so many times, as the database sees it, each in a transaction of its own.
    pub(crate) async fn is_tried(&self, times: usize) {
        let mut seen = BTreeSet::new();
        let gave_up = Instant::now() + PATIENCE;
        while seen.len() < times {
            assert!(Instant::now() < gave_up, "after {PATIENCE:?} it was tried in {seen:?}");
            seen.append(&mut self.in_hand().await);
            sleep(LOOK_EVERY).await;
        }
    }

    pub(crate) async fn rows(&self) -> i64 {
        sqlx::query_scalar("select count(*) from reservation")
            .fetch_one(&self.pool)
            .await
            .unwrap()
    }

    /// Orders of these buyers, all accepted.
    pub(crate) async fn accepted(&self, talk: &TestServer, buyers: impl Iterator<Item = i64>) -> Vec<Uuid> {
        let mut orders = vec![];
        for buyer in buyers {
            orders.push(self.accepts(talk, buyer).await);
        }
        orders
    }

    pub(crate) async fn accepts(&self, talk: &TestServer, buyer: i64) -> Uuid {
        match self.ledger.ask(talk, buyer).await {
            Answer::Accepted { reservation, .. } => reservation,
            other => panic!("buyer {buyer} is told {other:?}"),
        }
    }

    /// The orders of which not just one row and one event are there, and what is wrong with the sales that no ledger is kept of.
    pub(crate) async fn not_decided_and_told_once(&self, orders: &[Uuid]) -> Vec<String> {
        let mut wrong = vec![];
        for id in orders {
            let (decided, told): (i64, i64) = sqlx::query_as(
                "select (select count(*) from reservation where id = $1),
                        (select count(*) from outbox where reservation_id = $1)",
            )
            .bind(id)
            .fetch_one(&self.pool)
            .await
            .unwrap();
            if (decided, told) != (1, 1) {
                wrong.push(format!("order {id} was decided {decided} times and told {told} times"));
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

    /// What the judge finds, once every buyer has asked this server what became of the order.
    pub(crate) async fn verdict(&self, talk: &TestServer, patience: Duration) -> Verdict {
        self.ledger.ask_how_they_ended(talk, patience).await.unwrap();
        self.ledger.verdict(&self.stand).await.unwrap()
    }

    /// Holds the outcome against what is expected of this strategy, as its rows and events tell it, and as this server tells those who ask.
    pub(crate) async fn hold(&self, talk: &TestServer, orders: &[Uuid], expected: Expected) {
        let wrong = self.not_decided_and_told_once(orders).await;
        match expected {
            Kept => {
                assert!(wrong.is_empty(), "{wrong:#?}");
                assert_after_fault(self.strategy, &self.verdict(talk, PATIENCE).await, &[]);
            }
            // Then there is nothing that a judge could say of the sale.
            Breaks([]) => {
                assert!(!wrong.is_empty(), "the mistake of {} was not seen", self.strategy.name);
                println!("{}: {wrong:?}", self.strategy.name);
                assert_failure_mode(self.strategy, &[]);
            }
            Breaks(invariants) => {
                assert_after_fault(self.strategy, &self.verdict(talk, TIME_FOR_A_MISTAKE).await, invariants);
            }
        }
    }
}

/// The partitions in what the leader of a group has given a member: a version, and topics with their partitions.
pub(crate) fn assigned(given: &[u8]) -> Vec<i32> {
    let number = |at: usize| Some(i32::from_be_bytes(given.get(at..at + 4)?.try_into().ok()?));
    let read = || {
        if number(2)? == 0 {
            return None;
        }
        let name = usize::from(u16::from_be_bytes(given.get(6..8)?.try_into().ok()?));
        let partitions = usize::try_from(number(8 + name)?).ok()?;
        (0..partitions).map(|place| number(12 + name + 4 * place)).collect()
    };
    read().unwrap_or_default()
}

/// An order of this buyer, under a key of its own.
pub(crate) fn order(sale: SaleId, buyer: i64) -> Order {
    Order {
        sale,
        buyer,
        key: RequestKey::try_from(format!("buyer-{buyer}")).unwrap(),
    }
}

/// What a test expects of a strategy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Expected {
    Kept,
    /// Its mistake is seen, and breaks this at least. Nothing: the damage is beside the sale.
    Breaks(&'static [Invariant]),
}
pub(crate) use Expected::{Breaks, Kept};

pub(crate) const OVERSOLD: Expected = Breaks(&[NoOversell, Conservation]);

/// An order was accepted, and its buyer is never told what became of it.
pub(crate) const LOST: Expected = Breaks(&[NothingLost, Progress]);

/// A buyer has the same ticket twice.
pub(crate) const TWICE: Expected = Breaks(&[NoDuplicate, NothingLost]);

/// Gives a mistake the time to show itself: until it is seen, or for so long.
pub(crate) async fn seen_within(time: Duration, is_so: impl AsyncFn() -> bool) -> bool {
    let gave_up = Instant::now() + time;
    while Instant::now() < gave_up {
        if is_so().await {
            return true;
        }
        sleep(LOOK_EVERY).await;
    }
    false
}

/// A backend that was taken away, as anybody sees it who comes to its door.
pub(crate) async fn is_away(address: &str) {
    let connected = TcpStream::connect(address).await;
    let refused = connected.map(drop).map_err(|why| why.kind());
    assert_eq!(
        refused,
        Err(std::io::ErrorKind::ConnectionRefused),
        "the fault did not strike: {address}"
    );
}

/// Where a URL leads: `host:port`.
pub(crate) fn address_in(url: &str) -> String {
    let (_, behind) = url.split_once("://").unwrap();
    let address = behind.split(['/', '?']).next().unwrap();
    address.rsplit('@').next().unwrap().to_owned()
}

/// Orders, and is told that nobody knows: whatever it was that took too long.
pub(crate) async fn is_told_undecided(talk: &TestServer, buyer: i64) {
    let answered = talk
        .reserve(SALE, buyer, Some(&format!("buyer-{buyer}")))
        .await
        .unwrap();
    answered
        .is(ProblemKind::TimedOut)
        .or_else(|_| answered.is(ProblemKind::BackendAway))
        .unwrap();
}

/// A client that follows an order and has been told that it is accepted.
pub(crate) async fn follows(talk: &TestServer, order: Uuid) -> TcpStream {
    let mut stream = TcpStream::connect(talk.address()).await.unwrap();
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

pub(crate) async fn killed(talk: &TestServer) {
    let status = talk.kill().await.unwrap();
    assert!(
        status.to_string().contains("signal: 9"),
        "the fault did not strike: {status}"
    );
}

#[tokio::test]
#[should_panic(expected = "the fault did not strike")]
async fn a_fault_that_does_not_strike_is_noticed() {
    let redis = backends::redis().await.unwrap();
    is_away(&address_in(redis.url())).await;
}

/// A figure of a server's metrics, summed over its labels. `None`: it is not told.
pub(crate) async fn metric(server: &TestServer, name: &str) -> Option<i64> {
    let answer = server.get("/metrics").await.unwrap();
    let text = String::from_utf8(answer.body.to_vec()).unwrap();
    let named = text.lines().filter(|line| {
        let rest = line.strip_prefix(name);
        rest.is_some_and(|rest| rest.starts_with([' ', '{']))
    });
    let figures: Vec<i64> = named
        .map(|line| line.rsplit(' ').next().unwrap().parse().unwrap())
        .collect();
    (!figures.is_empty()).then(|| figures.iter().sum())
}
