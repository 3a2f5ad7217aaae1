//! LV.4: what befalls an order on its way. Every fault is real, and seen from outside to have struck.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

use box_office::{
    Instrumentation,
    Invariant::{self, Conservation, NoDuplicate, NoOversell, NothingLost, Progress},
    KafkaConfig, Order, ProblemKind, RequestKey, SaleId, Strategy, StrategyContext, StrategyMetrics,
};
use futures_util::future::join_all;
use harness::{
    DelayedCommits, assert_after_fault, assert_failure_mode,
    backends::{self, Durability, Kafka, Postgres, Redis, Reply, TestEnvironment},
    history::Answer,
    history_recorder::HistoryRecorder,
    http_contract::TestServer,
    judge::Verdict,
    proxy::{Cut, Proxy},
    rush::{Program, Rush, SALE},
    until,
};
use lv4_kafka::{
    LEVEL,
    pipeline::{
        Ids, OrderMessage, OrderPipeline, OutboxReader, PARTITIONS, consumer_group, dead_letter_topic,
        list_dead_letters, orders_topic, producer, replay, replay_all,
    },
};
use rdkafka::{
    ClientConfig, Offset, TopicPartitionList,
    admin::{AdminClient, AdminOptions},
    client::DefaultClientContext,
    consumer::{BaseConsumer, Consumer},
    error::{KafkaError, RDKafkaErrorCode},
    producer::{FutureProducer, FutureRecord},
};
use rstest::rstest;
use sqlx::PgPool;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    sync::{oneshot, watch},
    task::JoinSet,
    time::{sleep, timeout},
};
use uuid::Uuid;

/// How long anything may take that is done at once, on a machine that has other things to do.
const PATIENCE: Duration = Duration::from_secs(20);

/// How often a test looks whether what it waits for is so.
const LOOK_EVERY: Duration = Duration::from_millis(20);

/// How long the group waits for a silent consumer: so long that no death is noticed, on a machine that has other things to do.
const SESSION: Duration = Duration::from_secs(30);

/// The same where a death has to be noticed.
const SHORT_SESSION: Duration = Duration::from_secs(1);

/// How long a mistake is given to show itself, where a right strategy does nothing that could be waited for.
const TIME_FOR_A_MISTAKE: Duration = Duration::from_secs(3);

fn strategy(name: &str) -> &'static Strategy {
    LEVEL
        .strategy(name)
        .unwrap_or_else(|| panic!("LV.4 has no strategy {name}"))
}

/// A place to sell at: a strategy on its backends.
struct Place {
    strategy: &'static Strategy,
    stand: TestEnvironment,
    pool: PgPool,
    session: Duration,
    /// What the buyers of [`SALE`] were told.
    ledger: HistoryRecorder,
    /// Asks the broker, as anybody could.
    asks: Arc<BaseConsumer>,
}

impl Place {
    async fn of(name: &str) -> Self {
        let strategy = strategy(name);
        Self::on(strategy, TestEnvironment::shared(strategy).await.unwrap()).await
    }

    async fn on(strategy: &'static Strategy, stand: TestEnvironment) -> Self {
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
    fn where_deaths_are_noticed(self) -> Self {
        Self {
            session: SHORT_SESSION,
            ..self
        }
    }

    /// Starts an instance.
    async fn instance(&self, settings: &[(&'static str, &str)]) -> TestServer {
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
    async fn acceptor(&self, capacity: u32) -> TestServer {
        let talk = self.instance(&[("KAFKA_CONSUMERS", "0")]).await;
        talk.opens_a_sale(capacity).await.unwrap();
        talk
    }

    /// One that stops (SIGSTOP) when its consumer comes to this point for the first time.
    async fn stops_at(&self, point: &str) -> TestServer {
        let stopping = self.instance(&[("OVERSOLD_STOP_AT", &format!("{point}#1"))]).await;
        stopping.stands_still(PATIENCE).await.expect("the fault did not strike");
        stopping
    }

    fn kafka(&self) -> KafkaConfig {
        self.stand
            .kafka(0, self.session)
            .expect("a strategy of this level has a place in Kafka")
    }

    /// Asks the broker something, on a thread that may wait.
    async fn ask<A: Send + 'static>(&self, what: impl FnOnce(&BaseConsumer) -> A + Send + 'static) -> A {
        let asks = Arc::clone(&self.asks);
        tokio::task::spawn_blocking(move || what(&asks)).await.unwrap()
    }

    /// How far each partition is decided, as the group has committed it, and where it ends.
    async fn offsets(&self) -> BTreeMap<i32, (i64, i64)> {
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

    async fn committed(&self) -> i64 {
        self.offsets().await.values().map(|(done, _)| done).sum()
    }

    async fn lag(&self) -> i64 {
        self.offsets().await.values().map(|(done, end)| end - done).sum()
    }

    /// Waits until every message is passed.
    async fn quiet(&self) {
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
    async fn members(&self) -> BTreeMap<String, Vec<i32>> {
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
    async fn shared_by(&self, consumers: usize) {
        let each = PARTITIONS as usize / consumers;
        until("the partitions are shared", async || {
            let members = self.members().await;
            members.len() == consumers && members.values().all(|partitions| partitions.len() == each)
        })
        .await;
    }

    /// Puts messages into a partition, as anybody could who reaches the broker.
    async fn puts(&self, partition: i32, payloads: &[&[u8]]) -> Result<(), KafkaError> {
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
    async fn written_to_dead_letters(&self) -> i64 {
        let topic = dead_letter_topic(&self.kafka());
        let asked = self.ask(move |client| client.fetch_watermarks(&topic, 0, PATIENCE));
        asked.await.unwrap().1
    }

    fn admin(&self) -> AdminClient<DefaultClientContext> {
        let servers = self.kafka().bootstrap_servers;
        ClientConfig::new().set("bootstrap.servers", servers).create().unwrap()
    }

    /// The transactions that are open in the database, each by its connection and its beginning: those in such a state.
    async fn transactions(&self, state: &str) -> BTreeSet<String> {
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
    async fn in_hand(&self) -> BTreeSet<String> {
        self.transactions("idle in transaction").await
    }

    /// Waits until somebody has an order in hand: read, and not written. Returns the transactions that do.
    async fn an_order_is_in_hand(&self) -> BTreeSet<String> {
        let mut in_hand = BTreeSet::new();
        until("an order is in hand", async || {
            in_hand = self.in_hand().await;
            !in_hand.is_empty()
        })
        .await;
        in_hand
    }

    /// Waits until orders were tried so many times, as the database sees it, each in a transaction of its own.
    async fn is_tried(&self, times: usize) {
        let mut seen = BTreeSet::new();
        let gave_up = Instant::now() + PATIENCE;
        while seen.len() < times {
            assert!(Instant::now() < gave_up, "after {PATIENCE:?} it was tried in {seen:?}");
            seen.append(&mut self.in_hand().await);
            sleep(LOOK_EVERY).await;
        }
    }

    async fn rows(&self) -> i64 {
        sqlx::query_scalar("select count(*) from reservation")
            .fetch_one(&self.pool)
            .await
            .unwrap()
    }

    /// Orders of these buyers, all accepted.
    async fn accepted(&self, talk: &TestServer, buyers: impl Iterator<Item = i64>) -> Vec<Uuid> {
        let mut orders = vec![];
        for buyer in buyers {
            orders.push(self.accepts(talk, buyer).await);
        }
        orders
    }

    async fn accepts(&self, talk: &TestServer, buyer: i64) -> Uuid {
        match self.ledger.ask(talk, buyer).await {
            Answer::Accepted { reservation, .. } => reservation,
            other => panic!("buyer {buyer} is told {other:?}"),
        }
    }

    /// The orders of which not just one row and one event are there, and what is wrong with the sales that no ledger is kept of.
    async fn not_decided_and_told_once(&self, orders: &[Uuid]) -> Vec<String> {
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
    async fn verdict(&self, talk: &TestServer, patience: Duration) -> Verdict {
        self.ledger.ask_how_they_ended(talk, patience).await.unwrap();
        self.ledger.verdict(&self.stand).await.unwrap()
    }

    /// Holds the outcome against what is expected of this strategy, as its rows and events tell it, and as this server tells those who ask.
    async fn hold(&self, talk: &TestServer, orders: &[Uuid], expected: Expected) {
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
fn assigned(given: &[u8]) -> Vec<i32> {
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
fn order(sale: SaleId, buyer: i64) -> Order {
    Order {
        sale,
        buyer,
        key: RequestKey::try_from(format!("buyer-{buyer}")).unwrap(),
    }
}

/// What a test expects of a strategy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Expected {
    Kept,
    /// Its mistake is seen, and breaks this at least. Nothing: the damage is beside the sale.
    Breaks(&'static [Invariant]),
}
use Expected::{Breaks, Kept};

const OVERSOLD: Expected = Breaks(&[NoOversell, Conservation]);

/// An order was accepted, and its buyer is never told what became of it.
const LOST: Expected = Breaks(&[NothingLost, Progress]);

/// A buyer has the same ticket twice.
const TWICE: Expected = Breaks(&[NoDuplicate, NothingLost]);

/// Gives a mistake the time to show itself: until it is seen, or for so long.
async fn seen_within(time: Duration, is_so: impl AsyncFn() -> bool) -> bool {
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
async fn is_away(address: &str) {
    let connected = TcpStream::connect(address).await;
    let refused = connected.map(drop).map_err(|why| why.kind());
    assert_eq!(
        refused,
        Err(std::io::ErrorKind::ConnectionRefused),
        "the fault did not strike: {address}"
    );
}

/// Where a URL leads: `host:port`.
fn address_in(url: &str) -> String {
    let (_, behind) = url.split_once("://").unwrap();
    let address = behind.split(['/', '?']).next().unwrap();
    address.rsplit('@').next().unwrap().to_owned()
}

/// Orders, and is told that nobody knows: whatever it was that took too long.
async fn is_told_undecided(talk: &TestServer, buyer: i64) {
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
async fn follows(talk: &TestServer, order: Uuid) -> TcpStream {
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

async fn killed(talk: &TestServer) {
    let status = talk.kill().await.unwrap();
    assert!(
        status.to_string().contains("signal: 9"),
        "the fault did not strike: {status}"
    );
}

#[rstest]
#[case::locked("locked", Kept)]
#[case::single_writer("single-writer", Kept)]
#[case::no_dedupe("mutants/no-dedupe", Breaks(&[]))]
#[tokio::test]
async fn a_consumer_killed_between_its_commit_and_its_offset_decides_nothing_twice(
    #[case] name: &str,
    #[case] expected: Expected,
) {
    let place = Place::of(name).await.where_deaths_are_noticed();
    let acceptor = place.acceptor(2).await;
    let orders = place.accepted(&acceptor, 1..=3).await;

    let first = place.stops_at("committed").await;
    assert!(place.rows().await > 0, "the fault did not strike: nothing is committed");
    assert_eq!(
        place.committed().await,
        0,
        "the fault did not strike: the offset is committed"
    );
    place.ledger.ask_how_they_ended(&acceptor, PATIENCE).await.unwrap();
    killed(&first).await;
    let second = place.instance(&[]).await;
    place.quiet().await;

    place.hold(&second, &orders, expected).await;
    second.stop().await.unwrap();
}

/// Whoever sends again what the broker did not confirm in time may have sent it twice.
#[rstest]
#[case::locked("locked", Kept)]
#[case::single_writer("single-writer", Kept)]
#[case::no_dedupe("mutants/no-dedupe", Breaks(&[]))]
#[tokio::test]
async fn an_order_that_lies_in_the_topic_many_times_is_decided_once(#[case] name: &str, #[case] expected: Expected) {
    let place = Place::of(name).await;
    let acceptor = place.acceptor(2).await;
    let orders = place.accepted(&acceptor, 1..=1).await;
    let message = OrderMessage::new(orders[0], &order(SALE, 1)).to_bytes();
    // Some come in one batch, and one comes later.
    let offsets = place.offsets().await;
    let (&partition, _) = offsets.iter().find(|(_, (_, end))| *end > 0).unwrap();
    place.puts(partition, &[&message, &message]).await.unwrap();
    let decider = place.instance(&[]).await;
    place.quiet().await;
    place.ledger.ask_how_they_ended(&decider, PATIENCE).await.unwrap();
    place.puts(partition, &[&message]).await.unwrap();
    place.quiet().await;

    assert_eq!(place.committed().await, 4, "the fault did not strike");
    place.hold(&decider, &orders, expected).await;
    acceptor.stop().await.unwrap();
    decider.stop().await.unwrap();
}

#[rstest]
#[case::locked("locked", "decided to sell")]
#[case::single_writer("single-writer", "rows written")]
#[tokio::test]
async fn what_a_consumer_had_in_hand_when_it_was_killed_is_decided_by_another(#[case] name: &str, #[case] point: &str) {
    let place = Place::of(name).await.where_deaths_are_noticed();
    let acceptor = place.acceptor(2).await;
    let orders = place.accepted(&acceptor, 1..=3).await;

    let first = place.stops_at(point).await;
    assert_eq!(place.rows().await, 0, "the fault did not strike: it is committed");
    killed(&first).await;
    let second = place.instance(&[]).await;
    place.quiet().await;

    place.hold(&second, &orders, Kept).await;
    second.stop().await.unwrap();
}

/// The same, killed while the business takes its time: as long as an automatic commit needs.
#[rstest]
#[case::locked("locked", Kept)]
#[case::single_writer("single-writer", Kept)]
#[case::auto_commit("mutants/auto-commit", LOST)]
#[tokio::test]
async fn an_offset_is_not_committed_while_its_order_is_in_hand(#[case] name: &str, #[case] expected: Expected) {
    let place = Place::of(name).await.where_deaths_are_noticed();
    let acceptor = place.acceptor(2).await;
    let orders = place.accepted(&acceptor, 1..=1).await;

    let first = place.instance(&[("WORK_MS", "10000")]).await;
    place.an_order_is_in_hand().await;
    let committed = async || place.committed().await > 0;
    match expected {
        // There is nothing to wait for but time. It is thirty times what the mistake needs.
        Kept => assert!(!seen_within(TIME_FOR_A_MISTAKE, committed).await),
        Breaks(_) => until("the offset is committed", committed).await,
    }
    killed(&first).await;
    let second = place.instance(&[]).await;
    place.quiet().await;

    place.hold(&second, &orders, expected).await;
    second.stop().await.unwrap();
}

/// The connection to Postgres breaks with a commit on its way, and then its consumer dies. Who comes after it must not decide on what was there before.
#[rstest]
#[case::locked("locked", Kept)]
#[case::commit_not_covered("mutants/commit-not-covered", OVERSOLD)]
#[tokio::test]
async fn a_commit_that_nobody_knows_the_end_of_is_covered_by_its_lock(#[case] name: &str, #[case] expected: Expected) {
    let place = Place::of(name).await.where_deaths_are_noticed();
    let (redis, postgres) = tokio::join!(backends::redis(), backends::postgres());
    let (redis, postgres) = (redis.unwrap(), postgres.unwrap());
    let proxy = Proxy::before(postgres.report().address.clone()).await.unwrap();
    let acceptor = place.acceptor(1).await;
    let held = DelayedCommits::on(&place.stand).await.unwrap();
    let orders = place.accepted(&acceptor, 1..=2).await;
    let lock = format!("{}lock:sale:{SALE}", place.stand.prefix().unwrap());
    let taken = async || redis.command(&["EXISTS", &lock]).await.unwrap() == Reply::Int(1);

    let behind = proxy.instead_of(&place.stand.database().url());
    // It ends when the test says so.
    let lease = ("LOCK_LEASE_MS", "60000");
    let first = place.instance(&[("DATABASE_URL", &*behind), lease]).await;
    until("the fault did not strike: nobody commits", async || {
        held.have_struck().await.unwrap()
    })
    .await;
    proxy.cuts(Cut::Everything);
    until("the fault did not strike: nobody came through the proxy", async || {
        proxy.has_struck()
    })
    .await;
    match expected {
        Kept => assert!(!seen_within(TIME_FOR_A_MISTAKE, async || !taken().await).await),
        Breaks(_) => until("the lock is given back", async || !taken().await).await,
    }
    killed(&first).await;
    if expected != Kept {
        // It may have died with the lock of its other order.
        redis.command(&["DEL", &lock]).await.unwrap();
    }
    let second = place.instance(&[lease]).await;
    match expected {
        // Two orders at once, and one of them again: it got no lock.
        Kept => place.is_tried(3).await,
        Breaks(_) => {
            until("the second waits for the row", async || {
                held.waiting("transactionid tuple").await.unwrap() > 0
            })
            .await
        }
    }
    held.go_on().await.unwrap();
    redis.command(&["DEL", &lock]).await.unwrap();
    place.quiet().await;

    place.hold(&second, &orders, expected).await;
    acceptor.stop().await.unwrap();
    second.stop().await.unwrap();
}

/// Redis carries out what it was asked once it goes on, and by then nobody waits for the answer.
#[tokio::test]
async fn a_lock_whose_answer_came_too_late_is_given_back() {
    let strategy = strategy("locked");
    let redis = Redis::private().await.unwrap();
    let (postgres, kafka) = tokio::join!(backends::postgres(), backends::kafka());
    let stand = TestEnvironment::on(&postgres.unwrap(), Some(&*redis), strategy.schema)
        .await
        .unwrap()
        .and_kafka(Some(&*kafka.unwrap()));
    let place = Place::on(strategy, stand).await;
    let acceptor = place.acceptor(1).await;
    // It would not end while anybody looks.
    let decider = place.instance(&[("LOCK_LEASE_MS", "600000")]).await;
    let says = async |words: &[&str]| {
        let answer = redis.command(words).await.unwrap();
        assert_eq!(answer, Reply::Status("OK".to_owned()));
    };
    says(&["CLIENT", "PAUSE", "60000", "WRITE"]).await;
    let orders = place.accepted(&acceptor, 1..=1).await;
    // More than once: the first time the answer did not come in time.
    place.is_tried(2).await;
    assert_eq!(place.rows().await, 0, "the fault did not strike: it got a lock");
    says(&["CLIENT", "UNPAUSE"]).await;
    place.quiet().await;

    place.hold(&decider, &orders, Kept).await;
    acceptor.stop().await.unwrap();
    decider.stop().await.unwrap();
}

/// Its lease was over long before it gave it back, and somebody else has it by then.
#[tokio::test]
async fn a_lock_that_is_given_back_late_is_left_to_its_holder() {
    let place = Place::of("locked").await;
    let redis = backends::redis().await.unwrap();
    let acceptor = place.acceptor(1).await;
    let orders = place.accepted(&acceptor, 1..=1).await;
    let first = place.stops_at("committed").await;
    let lock = format!("{}lock:sale:{SALE}", place.stand.prefix().unwrap());
    until("the lease has ended", async || {
        redis.command(&["EXISTS", &lock]).await.unwrap() == Reply::Int(0)
    })
    .await;
    let taken = redis
        .command(&["SET", &lock, "somebody else", "NX", "PX", "60000"])
        .await
        .unwrap();
    assert_eq!(taken, Reply::Status("OK".to_owned()));
    first.goes_on().await.unwrap();
    place.quiet().await;

    let holder = redis.command(&["GET", &lock]).await.unwrap();
    assert_eq!(holder, Reply::Bulk("somebody else".to_owned()));
    place.hold(&acceptor, &orders, Kept).await;
    acceptor.stop().await.unwrap();
    first.stop().await.unwrap();
}

/// Postgres takes a commit back in the very end. Whoever decided those orders decides them again.
#[rstest]
#[case::locked("locked")]
#[case::single_writer("single-writer")]
#[tokio::test]
async fn a_commit_that_fails_loses_no_order(#[case] name: &str) {
    let place = Place::of(name).await;
    let acceptor = place.acceptor(2).await;
    let orders = place.accepted(&acceptor, 1..=3).await;
    let held = DelayedCommits::on(&place.stand).await.unwrap();
    let decider = place.instance(&[]).await;
    until("the fault did not strike: nobody commits", async || {
        held.have_struck().await.unwrap()
    })
    .await;
    assert!(held.fail().await.unwrap() > 0, "the fault did not strike");
    held.go_on().await.unwrap();
    place.quiet().await;

    place.hold(&decider, &orders, Kept).await;
    acceptor.stop().await.unwrap();
    decider.stop().await.unwrap();
}

/// How an instance leaves its group.
enum Leaves {
    /// The group misses it when its session is over.
    Killed,
    /// It says that it goes, after another one has joined.
    InPeace,
}

/// One order can't be decided for now, as somebody else holds its lock. One that lies behind it, of another sale, can.
#[rstest]
#[case::locked("locked", Leaves::Killed, Kept)]
#[case::locked_in_a_rebalance("locked", Leaves::InPeace, Kept)]
#[case::highest_offset("mutants/highest-offset", Leaves::Killed, LOST)]
#[case::highest_offset_in_a_rebalance("mutants/highest-offset", Leaves::InPeace, LOST)]
#[tokio::test]
async fn an_offset_does_not_pass_an_order_that_was_put_off(
    #[case] name: &str,
    #[case] leaves: Leaves,
    #[case] expected: Expected,
) {
    const OTHER: SaleId = 2;
    let place = Place::of(name).await.where_deaths_are_noticed();
    let redis = backends::redis().await.unwrap();
    let acceptor = place.acceptor(1).await;
    acceptor.opens(OTHER, 100).await.unwrap();
    let lock = format!("{}lock:sale:{SALE}", place.stand.prefix().unwrap());
    redis
        .command(&["SET", &lock, "somebody else", "PX", "60000"])
        .await
        .unwrap();

    let mut orders = vec![place.accepts(&acceptor, 1).await];
    let partition = *place.offsets().await.iter().find(|(_, (_, end))| *end > 0).unwrap().0;
    for buyer in 2.. {
        let answered = acceptor.reserve(OTHER, buyer, None).await.unwrap();
        orders.push(answered.json::<box_office::api::Reservation>().unwrap().id);
        if place.offsets().await[&partition].1 >= 2 {
            break;
        }
    }
    let first = place.instance(&[]).await;
    let others = i64::try_from(orders.len() - 1).unwrap();
    until("the others are decided", async || place.rows().await == others).await;
    let passed = async || place.offsets().await[&partition].0 > 0;
    match expected {
        // By the third time, the offsets of the first two are committed.
        Kept => {
            place.is_tried(3).await;
            assert!(!passed().await);
        }
        Breaks(_) => until("the offset has passed it", passed).await,
    }
    let second = match leaves {
        Leaves::Killed => {
            killed(&first).await;
            place.instance(&[]).await
        }
        // Partitions change hands twice: when the second joins, and when the first leaves.
        Leaves::InPeace => {
            let second = place.instance(&[]).await;
            place.shared_by(2).await;
            first.stop().await.unwrap();
            place.shared_by(1).await;
            second
        }
    };
    redis.command(&["DEL", &lock]).await.unwrap();
    place.quiet().await;

    place.hold(&second, &orders, expected).await;
    second.stop().await.unwrap();
}

/// Instances come and go while orders do. Each goes in peace: it finishes what it has in hand.
///
/// Here no offset runs ahead but by luck: what `mutants/auto-commit` and `mutants/highest-offset` do wrong shows where an order is in hand, or
/// is put off in a rebalance, for as long as the test likes. So they are caught there.
#[rstest]
#[case::locked("locked")]
#[case::single_writer("single-writer")]
#[tokio::test]
async fn instances_that_join_and_leave_lose_nothing_and_do_nothing_twice(#[case] name: &str) {
    let place = Place::of(name).await;
    let acceptor = place.acceptor(50).await;
    let all_have_come = AtomicBool::new(false);
    let buyers = async {
        let mut orders = vec![];
        for buyer in 1.. {
            if all_have_come.load(Relaxed) {
                break;
            }
            orders.push(place.accepts(&acceptor, buyer).await);
        }
        orders
    };
    let instances = async {
        let first = place.instance(&[]).await;
        until("some are decided", async || place.rows().await > 0).await;
        let second = place.instance(&[]).await;
        place.shared_by(2).await;
        first.stop().await.unwrap();
        place.shared_by(1).await;
        let third = place.instance(&[]).await;
        place.shared_by(2).await;
        second.stop().await.unwrap();
        place.shared_by(1).await;
        all_have_come.store(true, Relaxed);
        third
    };
    let looks = async {
        while !all_have_come.load(Relaxed) {
            // In this order: what is decided in between is no offset that ran ahead.
            let committed = place.committed().await;
            let decided = place.rows().await;
            assert!(committed <= decided, "{committed} are passed, and {decided} decided");
        }
    };
    let (orders, third, ()) = tokio::join!(buyers, instances, looks);
    place.quiet().await;

    place.hold(&third, &orders, Kept).await;
    let offsets = place.offsets().await;
    let messages: i64 = offsets.values().map(|(_, end)| end).sum();
    let accepted = i64::try_from(orders.len()).unwrap();
    assert_eq!((messages, place.rows().await), (accepted, accepted));
    third.stop().await.unwrap();
}

#[rstest]
#[case::locked("locked")]
#[case::single_writer("single-writer")]
#[tokio::test]
async fn a_server_that_is_told_to_stop_finishes_what_it_has_in_hand(#[case] name: &str) {
    let place = Place::of(name).await;
    let acceptor = place.acceptor(2).await;
    let orders = place.accepted(&acceptor, 1..=1).await;
    let decider = place.instance(&[("WORK_MS", "3000")]).await;
    place.an_order_is_in_hand().await;
    let told = std::process::Command::new("kill")
        .arg(decider.pid().await.unwrap().to_string())
        .status();
    assert!(told.unwrap().success());
    assert_eq!(place.rows().await, 0, "the fault did not strike: it was decided before");
    decider.stop().await.unwrap();

    place.hold(&acceptor, &orders, Kept).await;
    assert_eq!(place.lag().await, 0, "its offset is not committed");
}

/// While the broker is away nobody is told that an order is accepted. Then the instance dies, and the broker comes back.
#[rstest]
#[case::locked("locked", Kept)]
#[case::single_writer("single-writer", Kept)]
#[case::answer_before_ack("mutants/answer-before-ack", LOST)]
#[tokio::test]
async fn an_order_is_accepted_only_when_the_broker_has_it(#[case] name: &str, #[case] expected: Expected) {
    let strategy = strategy(name);
    let kafka = Kafka::private().await.unwrap();
    let (postgres, redis) = (backends::postgres().await.unwrap(), backends::redis().await.unwrap());
    let stand = TestEnvironment::on(&postgres, Some(&redis), strategy.schema)
        .await
        .unwrap()
        .and_kafka(Some(&kafka));
    let place = Place::on(strategy, stand).await;
    let acceptor = place.acceptor(3).await;
    let mut orders = place.accepted(&acceptor, 1..=1).await;

    kafka.kill().await.unwrap();
    is_away(kafka.bootstrap_servers()).await;
    match expected {
        Kept => is_told_undecided(&acceptor, 2).await,
        Breaks(_) => orders.push(place.accepts(&acceptor, 2).await),
    }
    killed(&acceptor).await;
    kafka.start().await.unwrap();
    let second = place.instance(&[]).await;
    if expected == Kept {
        // Whether or not the broker has the first message: the same key is the same order.
        orders.push(place.accepts(&second, 2).await);
    }
    orders.push(place.accepts(&second, 3).await);
    place.quiet().await;

    place.hold(&second, &orders, expected).await;
    second.stop().await.unwrap();
}

/// A broker that is there and says nothing has acknowledged nothing.
#[rstest]
#[case::locked("locked")]
#[case::single_writer("single-writer")]
#[tokio::test]
async fn an_order_that_a_broker_took_and_did_not_acknowledge_is_not_accepted(#[case] name: &str) {
    let strategy = strategy(name);
    let kafka = Kafka::private().await.unwrap();
    let (postgres, redis) = (backends::postgres().await.unwrap(), backends::redis().await.unwrap());
    let stand = TestEnvironment::on(&postgres, Some(&redis), strategy.schema)
        .await
        .unwrap()
        .and_kafka(Some(&kafka));
    let place = Place::on(strategy, stand).await;
    let acceptor = place.acceptor(3).await;
    let mut orders = place.accepted(&acceptor, 1..=1).await;

    kafka.freeze().await.unwrap();
    is_told_undecided(&acceptor, 2).await;
    killed(&acceptor).await;
    // What it was sent is lost with it.
    kafka.kill().await.unwrap();
    is_away(kafka.bootstrap_servers()).await;
    kafka.start().await.unwrap();
    let second = place.instance(&[]).await;
    orders.extend(place.accepted(&second, 2..=3).await);
    place.quiet().await;

    place.hold(&second, &orders, Kept).await;
    second.stop().await.unwrap();
}

/// The topic's limit is one on what travels together: a batch that is larger is refused, with every order in it.
#[tokio::test]
async fn orders_that_come_at_once_travel_in_batches_that_the_topic_takes() {
    const ORDERS: usize = 2_000;
    let place = Place::of("single-writer").await;
    let acceptor = place.acceptor(1).await;
    let sender = producer(&place.kafka()).unwrap();
    let (topic, order) = (orders_topic(&place.kafka()), [b' '; 200]);
    let sent = (0..ORDERS).map(|_| sender.send(FutureRecord::to(&topic).key("").payload(&order), Duration::ZERO));
    let refused: Vec<String> = join_all(sent)
        .await
        .into_iter()
        .filter_map(|sent| sent.err().map(|(why, _)| why.to_string()))
        .collect();
    assert!(
        refused.is_empty(),
        "{} of {ORDERS} were refused: {}",
        refused.len(),
        refused[0]
    );
    acceptor.stop().await.unwrap();
}

/// The broker goes, with nobody else: the same instance accepts and decides again once it is back.
#[rstest]
#[case::locked("locked")]
#[case::single_writer("single-writer")]
#[tokio::test]
async fn an_instance_finds_the_broker_again(#[case] name: &str) {
    let strategy = strategy(name);
    let kafka = Kafka::private().await.unwrap();
    let (postgres, redis) = (backends::postgres().await.unwrap(), backends::redis().await.unwrap());
    let stand = TestEnvironment::on(&postgres, Some(&redis), strategy.schema)
        .await
        .unwrap()
        .and_kafka(Some(&kafka));
    let place = Place::on(strategy, stand).await;
    let talk = place.instance(&[]).await;
    talk.opens_a_sale(10).await.unwrap();
    let mut orders = place.accepted(&talk, 1..=2).await;
    place.quiet().await;
    let pid = talk.pid().await.unwrap();

    kafka.stop().await.unwrap();
    is_away(kafka.bootstrap_servers()).await;
    is_told_undecided(&talk, 3).await;
    assert_eq!(talk.get("/readyz").await.unwrap().status, 503);
    kafka.start().await.unwrap();
    // A buyer who was told "undecided" repeats, with the same key.
    until("an order is accepted again", async || {
        talk.reserve(SALE, 3, Some("buyer-3")).await.unwrap().status == 202
    })
    .await;
    orders.extend(place.accepted(&talk, 3..=5).await);
    place.quiet().await;

    place.hold(&talk, &orders, Kept).await;
    assert_eq!(talk.get("/readyz").await.unwrap().status, 200);
    assert_eq!(talk.pid().await.unwrap(), pid, "it is another process");
    talk.stop().await.unwrap();
}

/// What `next_offset` is made to say of orders that it knows nothing of.
#[derive(Clone, Copy, Debug)]
enum Again {
    /// The broker has lost the end of its log, and counts from an earlier number.
    Lost,
    /// The topic was made anew, and counts from nothing.
    Remade,
}

#[rstest]
#[case::single_writer("single-writer", Again::Lost)]
#[case::single_writer_in_a_new_topic("single-writer", Again::Remade)]
#[case::locked_in_a_new_topic("locked", Again::Remade)]
#[tokio::test]
async fn an_order_whose_offset_was_another_ones_before_is_decided(#[case] name: &str, #[case] again: Again) {
    let place = Place::of(name).await;
    let first = place.instance(&[]).await;
    first.opens_a_sale(10).await.unwrap();
    let mut orders = place.accepted(&first, 1..=3).await;
    place.quiet().await;
    first.stop().await.unwrap();

    match again {
        // Seen from here, that is the same as an offset that is ahead of the broker's.
        Again::Lost => {
            let raised = sqlx::query("update partition_offset set next_offset = next_offset + 100")
                .execute(&place.pool)
                .await
                .unwrap();
            assert!(raised.rows_affected() > 0, "the fault did not strike");
        }
        Again::Remade => {
            let topic = orders_topic(&place.kafka());
            let deleted = place.admin().delete_topics(&[&topic], &AdminOptions::new()).await;
            deleted.unwrap()[0].as_ref().unwrap();
        }
    }
    let second = place.instance(&[]).await;
    // In a topic that was just made, the broker may not lead every partition yet.
    orders.extend(place.accepted(&second, 4..=6).await);
    place.quiet().await;
    if let Again::Remade = again {
        let ends = place.offsets().await;
        assert_eq!(
            ends.values().map(|(_, end)| end).sum::<i64>(),
            3,
            "the fault did not strike"
        );
    }
    place.hold(&second, &orders, Kept).await;
    orders.extend(place.accepted(&second, 7..=8).await);
    place.quiet().await;

    place.hold(&second, &orders, Kept).await;
    second.stop().await.unwrap();
}

/// The database is one that was restored from a backup, or a replica that had not heard of the last orders when it took over.
#[rstest]
#[case::single_writer("single-writer", false)]
#[case::single_writer_where_the_topic_has_forgotten("single-writer", true)]
#[tokio::test]
async fn orders_that_the_database_has_lost_are_decided_again(#[case] name: &str, #[case] forgotten: bool) {
    let place = Place::of(name).await;
    let talk = place.instance(&[]).await;
    talk.opens_a_sale(10).await.unwrap();
    let mut orders = place.accepted(&talk, 1..=1).await;
    place.quiet().await;
    let backup: Vec<(i32, i64)> = sqlx::query_as("select partition, next_offset from partition_offset")
        .fetch_all(&place.pool)
        .await
        .unwrap();
    let [(partition, then)] = backup[..] else {
        panic!("{backup:?}")
    };
    orders.extend(place.accepted(&talk, 2..=4).await);
    place.quiet().await;

    let lost = sqlx::query("delete from reservation where id <> $1")
        .bind(orders[0])
        .execute(&place.pool)
        .await;
    assert_eq!(lost.unwrap().rows_affected(), 3, "the fault did not strike");
    sqlx::raw_sql(sqlx::AssertSqlSafe(format!(
        "delete from outbox where not exists (select from reservation where id = reservation_id);
         update sale set stock = 9;
         update partition_offset set next_offset = {then};"
    )))
    .execute(&place.pool)
    .await
    .unwrap();
    if forgotten {
        let mut gone = TopicPartitionList::new();
        gone.add_partition_offset(&orders_topic(&place.kafka()), partition, Offset::Offset(then + 2))
            .unwrap();
        place.admin().delete_records(&gone, &AdminOptions::new()).await.unwrap();
    }
    let nobody_has: Vec<Uuid> = if forgotten {
        orders.drain(1..3).collect()
    } else {
        vec![]
    };
    orders.extend(place.accepted(&talk, 5..=6).await);
    place.quiet().await;
    until("what was lost is decided", async || {
        place.rows().await >= orders.len() as i64
    })
    .await;

    if forgotten {
        // No strategy can decide what neither of the two has any more. All the others are as they should be.
        assert_eq!(place.not_decided_and_told_once(&orders).await, [""; 0]);
        let verdict = place.verdict(&talk, PATIENCE).await;
        let broken: Vec<_> = verdict
            .findings
            .iter()
            .map(|found| (found.invariant, found.count))
            .collect();
        assert_eq!(broken, [(NothingLost, 2), (Progress, 2)], "{nobody_has:?}\n{verdict}");
    } else {
        place.hold(&talk, &orders, Kept).await;
    }
    talk.stop().await.unwrap();
}

/// It has three orders in hand. Whoever moved the fence has decided one of them at most.
#[tokio::test]
async fn who_comes_too_late_passes_nothing() {
    let place = Place::of("single-writer").await;
    let acceptor = place.acceptor(5).await;
    let orders = place.accepted(&acceptor, 1..=3).await;
    let decider = place.stops_at("batch decided").await;
    let moved = sqlx::query("update partition_offset set next_offset = next_offset + 1")
        .execute(&place.pool)
        .await
        .unwrap();
    assert_eq!(
        (moved.rows_affected(), place.rows().await),
        (1, 0),
        "the fault did not strike"
    );
    decider.goes_on().await.unwrap();
    place.quiet().await;

    place.hold(&decider, &orders, Kept).await;
    decider.stop().await.unwrap();
}

#[tokio::test]
async fn a_server_is_ready_once_each_of_its_consumers_has_partitions() {
    let place = Place::of("single-writer").await;
    let mut talks = vec![];
    for instances in 1..=3 {
        talks.push(place.instance(&[]).await);
        let members = place.members().await;
        let shares: Vec<usize> = members.values().map(Vec::len).collect();
        assert!(
            shares.len() == instances && shares.iter().all(|&share| share > 0),
            "{members:?}"
        );
    }
    // And where there are more consumers than partitions, it is ready all the same.
    talks.push(place.instance(&[("KAFKA_CONSUMERS", "8")]).await);
    for talk in talks {
        talk.stop().await.unwrap();
    }
}

/// One connection for all orders in hand would be none for those who ask.
#[tokio::test]
async fn who_asks_is_answered_while_orders_take_their_time() {
    let place = Place::of("locked").await;
    let talk = place
        .instance(&[("DATABASE_POOL_SIZE", "2"), ("WORK_MS", "10000")])
        .await;
    talk.opens_a_sale(10).await.unwrap();
    let orders = place.accepted(&talk, 1..=8).await;
    let in_hand = place.an_order_is_in_hand().await;
    let state = talk.get(&format!("/api/reservations/{}", orders[0])).await.unwrap();
    let open = place.transactions("%").await;
    assert!(
        !open.is_disjoint(&in_hand),
        "the fault did not strike: {in_hand:?} are over, and {open:?} have begun"
    );
    assert_eq!(
        state.status,
        200,
        "{}, with {open:?}",
        String::from_utf8_lossy(&state.body)
    );
    killed(&talk).await;
}

/// A fault that strikes one order strikes the next one as well. Only those that were begun together find it out.
#[tokio::test]
async fn an_outage_is_not_tried_with_every_order_of_a_batch() {
    const AT_ONCE: usize = 4;
    let strategy = strategy("locked");
    let (postgres, kafka) = (backends::postgres().await.unwrap(), backends::kafka().await.unwrap());
    let redis = Redis::private().await.unwrap();
    let stand = TestEnvironment::on(&postgres, Some(&redis), strategy.schema)
        .await
        .unwrap()
        .and_kafka(Some(&kafka));
    let place = Place::on(strategy, stand).await;
    let acceptor = place.acceptor(100).await;
    let orders = place.accepted(&acceptor, 1..=60).await;
    let trace = std::env::temp_dir().join(format!("oversold-trace-{}", Uuid::new_v4()));
    let decider = place
        .instance(&[("OVERSOLD_TRACE_FILE", trace.to_str().unwrap()), ("WORK_MS", "50")])
        .await;
    until("some are decided", async || place.rows().await > 0).await;
    redis.stop().await.unwrap();
    is_away(&address_in(redis.url())).await;
    let decided = place.rows().await;
    assert!(decided < 60, "the fault did not strike: all are decided");
    place.is_tried(2 * AT_ONCE).await;
    redis.start().await.unwrap();
    place.quiet().await;
    place.hold(&decider, &orders, Kept).await;
    decider.stop().await.unwrap();

    let steps = std::fs::read_to_string(&trace).unwrap();
    std::fs::remove_file(trace).unwrap();
    let steps: Vec<String> = steps
        .lines()
        .map(|line| {
            serde_json::from_str::<serde_json::Value>(line).unwrap()["step"]
                .as_str()
                .unwrap()
                .to_owned()
        })
        .collect();
    let count = |batch: &[String], step: &str| batch.iter().filter(|other| *other == step).count();
    let in_vain: Vec<usize> = steps
        .split(|step| step == "batch decided")
        .map(|batch| count(batch, "message taken") - count(batch, "lock taken"))
        .filter(|&in_vain| in_vain > 0)
        .collect();
    assert!(!in_vain.is_empty(), "the fault did not strike: {steps:?}");
    assert!(in_vain.iter().all(|&in_vain| in_vain <= AT_ONCE), "{in_vain:?}");
}

/// A connection that listens is lost while buyers come without a pause: it is made again all the same.
#[tokio::test]
async fn who_listens_comes_back_however_many_come_to_wait() {
    let place = Place::of("single-writer").await;
    let pool = place.stand.database().pool(2).await.unwrap();
    let stop = tokio_util::sync::CancellationToken::new();
    let events = Arc::new(OutboxReader::open(&pool, stop.clone()).await.unwrap());
    let listening = async || -> Option<i32> {
        sqlx::query_scalar(
            "select pid from pg_stat_activity where datname = current_database() and query ilike 'listen%'",
        )
        .fetch_optional(&place.pool)
        .await
        .unwrap()
    };
    let first = listening().await.expect("somebody listens");
    let mut coming = JoinSet::new();
    for _ in 0..32 {
        let events = Arc::clone(&events);
        coming.spawn(async move {
            loop {
                let _ = events.events_after(Uuid::new_v4(), 0, Duration::ZERO).await;
            }
        });
    }
    let struck: bool = sqlx::query_scalar("select pg_terminate_backend($1)")
        .bind(first)
        .fetch_one(&place.pool)
        .await
        .unwrap();
    assert!(struck, "the fault did not strike");
    until("somebody listens again", async || {
        listening().await.is_some_and(|pid| pid != first)
    })
    .await;
    coming.shutdown().await;
    stop.cancel();
}

#[tokio::test]
#[should_panic(expected = "the fault did not strike")]
async fn a_fault_that_does_not_strike_is_noticed() {
    let redis = backends::redis().await.unwrap();
    is_away(&address_in(redis.url())).await;
}

/// What came compressed may be larger than anything that the dead-letter topic takes.
#[rstest]
#[case::locked("locked")]
#[case::single_writer("single-writer")]
#[tokio::test]
async fn poison_that_grew_on_its_way_is_buried_and_the_rest_flows_on(#[case] name: &str) {
    const LENGTH: usize = 2_000_000;
    let place = Place::of(name).await;
    let acceptor = place.acceptor(5).await;
    let sender: FutureProducer = ClientConfig::new()
        .set("bootstrap.servers", &place.kafka().bootstrap_servers)
        .set("message.max.bytes", "3000000")
        .set("compression.type", "gzip")
        .create()
        .unwrap();
    let (topic, bomb) = (orders_topic(&place.kafka()), vec![b'x'; LENGTH]);
    for partition in 0..PARTITIONS {
        let record = FutureRecord::to(&topic).partition(partition).key("").payload(&bomb);
        sender.send(record, PATIENCE).await.unwrap();
    }
    let orders = place.accepted(&acceptor, 1..=4).await;
    let decider = place.instance(&[]).await;
    place.quiet().await;
    place.hold(&decider, &orders, Kept).await;

    let kafka = place.kafka();
    let letters = tokio::task::spawn_blocking(move || list_dead_letters(&kafka, PATIENCE));
    let letters = letters.await.unwrap().unwrap();
    assert_eq!(letters.len(), PARTITIONS as usize);
    // None of them stands in the way of those that can be tried again.
    place.puts(0, &[b"not an order, and small"]).await.unwrap();
    place.quiet().await;
    let kafka = place.kafka();
    assert_eq!(replay_all(&kafka, PATIENCE).await.unwrap(), 1);
    let refused = replay(&kafka, &letters[0].origin, PATIENCE).await.unwrap_err();
    assert!(
        refused.to_string().contains("larger than the orders topic accepts"),
        "{refused}"
    );
    for letter in letters {
        assert!(letter.reason.contains("not an order"), "{}", letter.reason);
        assert!(bomb.starts_with(letter.payload.as_bytes()) && letter.payload.len() < LENGTH);
    }
    acceptor.stop().await.unwrap();
    decider.stop().await.unwrap();
}

/// Its consumers are what it is there for. One that has ended, by a panic, comes back with the process only.
#[tokio::test]
async fn a_server_is_not_ready_any_more_when_a_consumer_has_ended() {
    let place = Place::of("single-writer").await;
    let context = StrategyContext {
        database: place.stand.database().pool(2).await.unwrap(),
        work: Duration::ZERO,
        counts: StrategyMetrics::default(),
        redis: None,
        kafka: Some(place.kafka()),
        watch: Instrumentation::default(),
    };
    let path = OrderPipeline::open(context).await.unwrap();
    let (_joins, joined) = watch::channel(true);
    let (ends, end) = oneshot::channel::<()>();
    path.spawn_consumer(joined, async move { drop(end.await) });
    path.ready().await.unwrap();
    drop(ends);
    until("it is not ready", async || path.ready().await.is_err()).await;
    path.close().await;
}

/// It can't say what became of the order. Another instance can, and the client has to be let go to it.
#[tokio::test]
async fn who_follows_is_let_go_when_the_database_can_not_be_read() {
    let place = Place::of("single-writer").await;
    let postgres = backends::postgres().await.unwrap();
    let proxy = Proxy::before(postgres.report().address.clone()).await.unwrap();
    let acceptor = place.acceptor(1).await;
    let behind = proxy.instead_of(&place.stand.database().url());
    let cut_off = place
        .instance(&[("KAFKA_CONSUMERS", "0"), ("DATABASE_URL", &*behind)])
        .await;
    let orders = place.accepted(&acceptor, 1..=1).await;
    let mut follower = follows(&cut_off, orders[0]).await;
    proxy.cuts(Cut::Everything);
    let mut told = String::new();
    timeout(PATIENCE, follower.read_to_string(&mut told))
        .await
        .expect("it is let go")
        .unwrap();
    assert!(proxy.has_struck(), "the fault did not strike");
    assert!(!told.contains("event:"), "{told}");
    let decider = place.instance(&[]).await;
    place.quiet().await;

    place.hold(&acceptor, &orders, Kept).await;
    proxy.cuts(Cut::Nothing);
    acceptor.stop().await.unwrap();
    cut_off.stop().await.unwrap();
    decider.stop().await.unwrap();
}

/// Every server tells it, also one that decides nothing.
#[tokio::test]
async fn the_metrics_tell_how_far_the_group_is_behind() {
    let place = Place::of("single-writer").await;
    let acceptor = place.acceptor(10).await;
    let orders = place.accepted(&acceptor, 1..=5).await;
    let told = async |talk: &TestServer| metric(talk, "oversold_consumer_lag").await;
    until("five wait", async || told(&acceptor).await == Some(5)).await;
    let decider = place.instance(&[]).await;
    place.quiet().await;
    until("nothing waits any more", async || {
        told(&acceptor).await == Some(0) && told(&decider).await == Some(0)
    })
    .await;

    place.hold(&decider, &orders, Kept).await;
    acceptor.stop().await.unwrap();
    decider.stop().await.unwrap();
}

/// A figure of a server's metrics, summed over its labels. `None`: it is not told.
async fn metric(server: &TestServer, name: &str) -> Option<i64> {
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

#[rstest]
#[case::locked("locked", Kept)]
#[case::single_writer("single-writer", Kept)]
#[case::endless_retry("mutants/endless-retry", Breaks(&[]))]
#[case::poison_skipped("mutants/poison-skipped", Breaks(&[]))]
#[tokio::test]
async fn poison_goes_to_the_dead_letters_once_and_the_rest_flows_on(#[case] name: &str, #[case] expected: Expected) {
    const LATER: SaleId = 77;
    let place = Place::of(name).await;
    let acceptor = place.acceptor(5).await;
    let kafka = place.kafka();
    let mut orders = place.accepted(&acceptor, 1..=2).await;

    let ids = Ids::load(&place.pool).await.unwrap();
    let of_no_sale = order(LATER, 9);
    let good = OrderMessage::new(ids.for_order(&order(SALE, 3)), &order(SALE, 3)).to_bytes();
    let later = OrderMessage::new(ids.for_order(&of_no_sale), &of_no_sale).to_bytes();
    let wrong_id = OrderMessage::new(Uuid::new_v4(), &order(SALE, 4)).to_bytes();
    let wrong_version = String::from_utf8(good.clone())
        .unwrap()
        .replace("\"version\":1", "\"version\":2");
    let key_with_nul = String::from_utf8(good.clone())
        .unwrap()
        .replace("buyer-3", "buyer\\u0000");
    let large = vec![b'x'; 60_000];
    let poison: [(&[u8], &str); 6] = [
        (b"\xff\x00 not JSON", "not an order"),
        (wrong_version.as_bytes(), "version 2"),
        (key_with_nul.as_bytes(), "not an order"),
        (&wrong_id, "is not that of this order"),
        (&later, "there is no sale 77"),
        (&large, "not an order"),
    ];
    // Where an order of the sale lies, others will.
    let offsets = place.offsets().await;
    let (&first, &(_, offset)) = offsets.iter().find(|(_, (_, end))| *end > 0).unwrap();
    place.puts(first, &poison.map(|(payload, _)| payload)).await.unwrap();
    // One that is as large as the broker takes by default would no longer fit with the reason beside it.
    let too_large = place.puts(first, &[&vec![b'x'; 1_048_000]]).await.unwrap_err();
    assert_eq!(
        too_large.rdkafka_error_code(),
        Some(RDKafkaErrorCode::MessageSizeTooLarge)
    );
    let behind = offset + i64::try_from(poison.len()).unwrap();
    for buyer in 3.. {
        orders.push(place.accepts(&acceptor, buyer).await);
        if place.offsets().await[&first].1 > behind {
            break;
        }
    }
    let decider = place.instance(&[]).await;
    let list = async || {
        let kafka = place.kafka();
        tokio::task::spawn_blocking(move || list_dead_letters(&kafka, PATIENCE))
            .await
            .unwrap()
            .unwrap()
    };
    if name == "mutants/endless-retry" {
        until("the other partitions are decided", async || {
            let offsets = place.offsets().await;
            offsets
                .iter()
                .all(|(&partition, (done, end))| partition == first || done == end)
        })
        .await;
        let passed = seen_within(TIME_FOR_A_MISTAKE, async || place.offsets().await[&first].0 > offset).await;
        assert!(!passed, "the mistake of {name} was not seen");
        assert_failure_mode(place.strategy, &[]);
        return killed(&decider).await;
    }
    place.quiet().await;
    place.hold(&decider, &orders, Kept).await;

    let mut letters = list().await;
    if expected != Kept {
        assert_eq!(letters.len(), 1, "the mistake of {name} was not seen");
        assert_failure_mode(place.strategy, &[]);
        return decider.stop().await.unwrap();
    }
    // Orders of one partition that are decided at the same time may be buried in any order.
    letters.sort_by(|one, other| one.origin.cmp(&other.origin));
    assert_eq!(letters.len(), poison.len());
    assert_eq!(place.written_to_dead_letters().await, 6, "each is buried once");
    assert_eq!(metric(&decider, "oversold_dead_letters_total").await, Some(6));
    for (number, (letter, (payload, reason))) in letters.iter().zip(poison).enumerate() {
        assert!(letter.reason.contains(reason), "{}", letter.reason);
        let number = offset + i64::try_from(number).unwrap();
        assert_eq!(letter.origin, format!("{}/{first}/{number}", orders_topic(&kafka)));
        assert_eq!(
            (letter.attempts, &*letter.payload),
            (1, &*String::from_utf8_lossy(payload))
        );
    }

    // What was wrong with one is mended; another one is as bad as it was.
    acceptor.opens(LATER, 1).await.unwrap();
    replay(&kafka, &letters[4].origin, PATIENCE).await.unwrap();
    replay(&kafka, &letters[0].origin, PATIENCE).await.unwrap();
    replay(&kafka, &letters[0].origin, PATIENCE).await.unwrap_err();
    place.quiet().await;
    place.hold(&decider, &[ids.for_order(&of_no_sale)], Kept).await;
    let left = list().await;
    let tried: Vec<(&str, u32)> = left.iter().map(|letter| (&*letter.payload, letter.attempts)).collect();
    assert_eq!(left.len(), 5);
    assert_eq!(tried[4], (&*String::from_utf8_lossy(poison[0].0), 2));
    // One more letter, and two notes.
    assert_eq!(place.written_to_dead_letters().await, 9);
    // All at once: each comes back, as bad as it was.
    assert_eq!(replay_all(&kafka, PATIENCE).await.unwrap(), 5);
    place.quiet().await;
    let left = list().await;
    assert_eq!(left.iter().map(|letter| letter.attempts).sum::<u32>(), 4 * 2 + 3);
    decider.stop().await.unwrap();
}

/// The message behind an order that is put off comes again with it each time. It was buried the first time.
#[tokio::test]
async fn poison_behind_an_order_that_is_put_off_is_buried_once() {
    let place = Place::of("locked").await;
    let redis = backends::redis().await.unwrap();
    let acceptor = place.acceptor(1).await;
    let orders = place.accepted(&acceptor, 1..=1).await;
    let offsets = place.offsets().await;
    let (&partition, _) = offsets.iter().find(|(_, (_, end))| *end > 0).unwrap();
    place.puts(partition, &[b"not an order"]).await.unwrap();
    let lock = format!("{}lock:sale:{SALE}", place.stand.prefix().unwrap());
    redis
        .command(&["SET", &lock, "somebody else", "PX", "60000"])
        .await
        .unwrap();
    let decider = place.instance(&[]).await;
    place.is_tried(3).await;
    assert_eq!(place.written_to_dead_letters().await, 1);
    redis.command(&["DEL", &lock]).await.unwrap();
    place.quiet().await;

    place.hold(&decider, &orders, Kept).await;
    assert_eq!(place.written_to_dead_letters().await, 1);
    assert_eq!(metric(&decider, "oversold_dead_letters_total").await, Some(1));
    acceptor.stop().await.unwrap();
    decider.stop().await.unwrap();
}

/// What goes away for a while.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Away {
    Database,
    Locks,
}

#[rstest]
#[case::locked("locked", Away::Database, Kept)]
#[case::locked_without_redis("locked", Away::Locks, Kept)]
#[case::single_writer("single-writer", Away::Database, Kept)]
#[case::dead_letter_on_fault("mutants/dead-letter-on-fault", Away::Database, LOST)]
#[case::errors_swallowed("mutants/errors-swallowed", Away::Locks, LOST)]
#[case::errors_swallowed_without_postgres("mutants/errors-swallowed", Away::Database, LOST)]
#[tokio::test]
async fn a_fault_that_passes_loses_no_order_and_buries_none(
    #[case] name: &str,
    #[case] away: Away,
    #[case] expected: Expected,
) {
    let strategy = strategy(name);
    let kafka = backends::kafka().await.unwrap();
    let redis = Redis::private().await.unwrap();
    let postgres = Postgres::private(Durability::Fast).await.unwrap();
    let stand = TestEnvironment::on(&postgres, Some(&redis), strategy.schema)
        .await
        .unwrap()
        .and_kafka(Some(&kafka));
    let place = Place::on(strategy, stand).await;
    let talk = place.instance(&[]).await;
    talk.opens_a_sale(10).await.unwrap();
    let mut orders = place.accepted(&talk, 1..=2).await;
    place.quiet().await;

    match away {
        Away::Database => {
            postgres.stop().await.unwrap();
            is_away(&address_in(&place.stand.database().url())).await;
        }
        Away::Locks => {
            redis.stop().await.unwrap();
            is_away(&address_in(redis.url())).await;
        }
    }
    // An instance that knows the sale goes on to accept.
    orders.extend(place.accepted(&talk, 3..=6).await);
    match expected {
        // Longer than anybody waits for a connection: each order was put off at least once.
        Kept => assert!(!seen_within(2 * TIME_FOR_A_MISTAKE, async || place.lag().await == 0).await),
        Breaks(_) => place.quiet().await,
    }
    match away {
        Away::Database => postgres.start().await.unwrap(),
        Away::Locks => redis.start().await.unwrap(),
    }
    place.quiet().await;

    place.hold(&talk, &orders, expected).await;
    let kafka = place.kafka();
    let buried = tokio::task::spawn_blocking(move || list_dead_letters(&kafka, PATIENCE));
    assert_eq!(
        !buried.await.unwrap().unwrap().is_empty(),
        name == "mutants/dead-letter-on-fault"
    );
    talk.stop().await.unwrap();
}

#[rstest]
#[case::single_writer("single-writer", Kept)]
#[case::locked("locked", Kept)]
#[case::notify_outside("mutants/notify-outside", LOST)]
#[tokio::test]
async fn the_news_goes_out_although_who_decided_is_killed_before_telling(
    #[case] name: &str,
    #[case] expected: Expected,
) {
    let place = Place::of(name).await.where_deaths_are_noticed();
    let acceptor = place.acceptor(1).await;
    let orders = place.accepted(&acceptor, 1..=1).await;
    let first = place.stops_at("committed").await;
    assert_eq!(place.rows().await, 1, "the fault did not strike: nothing is committed");
    killed(&first).await;
    let second = place.instance(&[]).await;
    place.quiet().await;

    match expected {
        Kept => {
            let told = timeout(PATIENCE, second.final_state(orders[0])).await;
            assert_eq!(told.expect("the news goes out").unwrap().status, "confirmed");
        }
        Breaks(_) => {
            let told = timeout(TIME_FOR_A_MISTAKE, second.final_state(orders[0])).await;
            assert!(told.is_err(), "{told:?}");
        }
    }
    place.hold(&second, &orders, expected).await;
    killed(&second).await;
}

/// Neither the instance that accepted the order nor the one that decided it is there any more.
#[rstest]
#[case::locked("locked")]
#[case::single_writer("single-writer")]
#[tokio::test]
async fn any_instance_tells_how_an_order_ended_and_no_event_is_missed(#[case] name: &str) {
    let place = Place::of(name).await;
    let acceptor = place.acceptor(1).await;
    let other = place.instance(&[("KAFKA_CONSUMERS", "0")]).await;
    let orders = place.accepted(&acceptor, 1..=2).await;
    let state = other.get(&format!("/api/reservations/{}", orders[0])).await.unwrap();
    assert_eq!(state.json::<box_office::api::Reservation>().unwrap().status, "accepted");

    // A client follows, sees that its order is accepted, and is cut off.
    drop(follows(&other, orders[0]).await);
    killed(&acceptor).await;
    // Another one is back before its order is decided, and waits.
    let (told, decider) = tokio::join!(other.events(orders[1], Some(0)), async {
        let decider = place.instance(&[]).await;
        place.quiet().await;
        decider
    });
    let told = told.unwrap();
    assert!(matches!(&told[..], [(_, only)] if only.is_final()), "{told:?}");
    killed(&decider).await;

    let told = other.events(orders[0], Some(0)).await.unwrap();
    let [(number, last)] = &told[..] else {
        panic!("{told:?}")
    };
    assert!(last.is_final(), "{last:?}");
    assert_eq!(
        other.events(orders[0], Some(*number)).await.unwrap(),
        [],
        "and then there is nothing more to come"
    );
    for &order in &orders {
        other.final_state(order).await.unwrap();
    }
    place.hold(&other, &orders, Kept).await;
    other.stop().await.unwrap();
}

/// What one of them may hold back is measured where the events are told: `levels/box-office/tests/events.rs`.
#[tokio::test]
async fn clients_that_follow_and_never_read_cost_little() {
    const CLIENTS: u64 = 500;
    const MOST_KIB_EACH: u64 = 64;
    let place = Place::of("single-writer").await;
    let acceptor = place.acceptor(1).await;
    let orders = place.accepted(&acceptor, 1..=1).await;
    let memory_kib = async || {
        let pid = acceptor.pid().await.unwrap();
        let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
        line.trim().trim_end_matches(" kB").parse::<u64>().unwrap()
    };
    let before_kib = memory_kib().await;
    let request = format!("GET /api/reservations/{}/events HTTP/1.1\r\nHost: x\r\n\r\n", orders[0]);
    let mut stalled = vec![];
    for _ in 0..CLIENTS {
        let mut stream = TcpStream::connect(acceptor.address()).await.unwrap();
        stream.write_all(request.as_bytes()).await.unwrap();
        stalled.push(stream);
    }
    for stream in &stalled {
        stream.readable().await.unwrap();
    }
    let decider = place.instance(&[]).await;
    acceptor.final_state(orders[0]).await.unwrap();
    let grown_kib = memory_kib().await - before_kib;
    println!("{CLIENTS} clients cost {grown_kib} KiB");
    assert!(grown_kib < CLIENTS * MOST_KIB_EACH, "{grown_kib} KiB");
    acceptor.stop().await.unwrap();
    decider.stop().await.unwrap();
}

/// It stands still for longer than its session, and its partitions are given away. Then it wakes up, with its batch decided and not written.
#[rstest]
#[case::single_writer("single-writer", "batch decided", Kept)]
#[case::offset_not_in_transaction("mutants/offset-not-in-transaction", "batch decided", TWICE)]
// A lock with a lease has the limit that LV.3 shows.
#[case::locked("locked", "decided to sell", Breaks(&[Conservation, NoDuplicate, NothingLost]))]
#[tokio::test]
async fn a_batch_that_comes_too_late_writes_nothing(
    #[case] name: &str,
    #[case] point: &str,
    #[case] expected: Expected,
) {
    let place = Place::of(name).await.where_deaths_are_noticed();
    let acceptor = place.acceptor(2).await;
    let orders = place.accepted(&acceptor, 1..=1).await;
    let first = place.stops_at(point).await;
    assert_eq!(place.rows().await, 0, "the fault did not strike: it is committed");
    let second = place.instance(&[]).await;
    until("the other one has decided", async || place.rows().await == 1).await;
    first.goes_on().await.unwrap();
    first.stop().await.unwrap();

    place.hold(&second, &orders, expected).await;
    second.stop().await.unwrap();
}

/// The stated limit of a lock with a lease, with everybody in the group: Ann's order is decided on what was read while she still had the lock.
#[tokio::test]
async fn a_consumer_frozen_past_its_lease_sells_what_somebody_else_has_sold() {
    let place = Place::of("locked").await;
    let redis = backends::redis().await.unwrap();
    let acceptor = place.acceptor(1).await;
    // Long enough to be missed by nobody.
    let session = ("KAFKA_SESSION_MS", "10000");
    let lease = ("LOCK_LEASE_MS", "500");
    let first = place
        .instance(&[session, lease, ("OVERSOLD_STOP_AT", "decided to sell#1")])
        .await;
    place.shared_by(1).await;
    let firsts = place.members().await.into_keys().next().unwrap();
    let second = place.instance(&[session, lease]).await;
    place.shared_by(2).await;
    let members = place.members().await;
    let of_first = members[&firsts][0];
    let of_second = (0..PARTITIONS).find(|partition| !members[&firsts].contains(partition));

    let ids = Ids::load(&place.pool).await.unwrap();
    let [ann, bob] = [1, 2].map(|buyer| {
        let id = ids.for_order(&order(SALE, buyer));
        place.ledger.accepted_by_hand(buyer, id);
        OrderMessage::new(id, &order(SALE, buyer)).to_bytes()
    });
    place.puts(of_first, &[&ann]).await.unwrap();
    first.stands_still(PATIENCE).await.expect("the fault did not strike");
    let lock = format!("{}lock:sale:{SALE}", place.stand.prefix().unwrap());
    until("the lease has ended", async || {
        redis.command(&["EXISTS", &lock]).await.unwrap() == Reply::Int(0)
    })
    .await;
    place.puts(of_second.unwrap(), &[&bob]).await.unwrap();
    until("Bob has the ticket", async || place.rows().await == 1).await;
    first.goes_on().await.unwrap();
    until("Ann has it, too", async || place.rows().await == 2).await;

    assert_eq!(place.members().await, members, "nobody was missed");
    let Breaks(limit) = OVERSOLD else { unreachable!() };
    assert_after_fault(place.strategy, &place.verdict(&acceptor, PATIENCE).await, limit);
    acceptor.stop().await.unwrap();
    first.stop().await.unwrap();
    second.stop().await.unwrap();
}

/// That is what the lock is for. With the orders of a sale in one partition, no lock would be needed.
#[tokio::test]
async fn orders_of_one_sale_are_decided_by_several_instances() {
    let strategy = strategy("locked");
    let stand = TestEnvironment::shared(strategy).await.unwrap();
    let rush = Rush {
        buyers: 60,
        instances: 3,
        ..Rush::default()
    };
    let report = rush
        .traced()
        .run_on(&stand, &Program::new(env!("CARGO_BIN_EXE_lv4-kafka")), &LEVEL, strategy)
        .await
        .unwrap();
    let decided: Vec<usize> = report
        .beside_requests
        .iter()
        .map(|steps| steps.iter().filter(|record| record.step == "committed").count())
        .collect();
    println!("{decided:?}");
    assert_eq!(decided.iter().sum::<usize>(), 60);
    assert!(
        decided.iter().filter(|&&decided| decided > 0).count() >= 2,
        "{decided:?}"
    );
}
