//! The script: a handful of requests, moved one at a time.

use std::{
    collections::HashSet,
    sync::{
        Arc, Mutex, MutexGuard,
        atomic::{AtomicI64, Ordering},
    },
    time::Duration,
};

use anyhow::{Context, anyhow, bail};
use box_office::{
    BuyerId, Instrumentation, Invariant, Observer, Order, Outcome, Promise, RequestKey, Reserve, ReserveError, SaleId,
    Sighting, Steps, Strategy, StrategyContext, StrategyMetrics, trace::now_monotonic_us,
};
use futures_util::{
    FutureExt,
    future::{BoxFuture, ready},
};
use sqlx::PgPool;
use tokio::sync::{Notify, Semaphore};

use super::{
    blocked::{Blocked, Holder, Holders, WORKS_FOR},
    trace::{Event, Happened, Trace},
};
use crate::{
    backends::TestEnvironment,
    history::{Answer, FORMAT_VERSION, Header, History, Micros, Request, Step},
    judge::in_words,
    rows,
};

/// The point that a strategy marks after it has given back a lock of its own, one that it reports waiting for by [`Steps::blocked`].
const LOCK_RELEASED: &str = "lock released";

/// How long a step may take before the script gives up and says what it waited for.
const PATIENCE: Duration = Duration::from_secs(10);

/// How long a lock in Redis outlives its holder: longer than any script. Here a lease ends when a test ends it, not by itself.
const LEASE: Duration = Duration::from_secs(600);

/// How long to leave Postgres alone between two looks at who is blocked.
const LOOK_AGAIN: Duration = Duration::from_millis(1);

/// One request of a script, by which it is told apart from the others.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RequestHandle(usize);

/// A strategy on a database of its own, on which one script after another can be run.
pub struct ScheduleRunner {
    strategy: &'static Strategy,
    reserve: Arc<dyn Reserve>,
    /// The script's own connection. Requests never use it.
    observer: PgPool,
    holders: Holders,
    sales: AtomicI64,
    stand: TestEnvironment,
}

/// A sale of which every request is held at its scheduling points.
pub struct Script<'a> {
    rehearsal: &'a ScheduleRunner,
    sale: SaleId,
    capacity: u32,
    requests: Vec<Requested>,
    shared: Arc<Shared>,
    started_us: Micros,
    /// The requests that were blocked by Postgres when last it was asked.
    blocked: HashSet<usize>,
}

struct Requested {
    order: Order,
    go: Arc<Semaphore>,
}

/// What the requests' tasks tell the script.
struct Shared {
    board: Mutex<Board>,
    changed: Notify,
}

#[derive(Default)]
struct Board {
    trace: Trace,
    lanes: Vec<LaneState>,
    /// Locks that were given back while somebody waited, each of which one waiter is about to get. Below zero where a waiter was seen to get its
    /// lock before the one who gave it back came to say so.
    releases: isize,
    /// Points where nobody is held.
    passes: &'static [&'static str],
}

struct LaneState {
    standing: Standing,
    sent_us: Micros,
    answered_us: Option<Micros>,
    answer: Option<Answer>,
    steps: Vec<Step>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Standing {
    NotStarted,
    Running,
    Held(&'static str),
    /// It has said so itself: it waits for a lock that Postgres knows nothing of.
    Waiting,
    Answered,
}

/// How a move ended for the request that was moved.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Moved {
    Held(&'static str),
    Answered,
    Blocked,
}

impl ScheduleRunner {
    /// Opens a strategy on a fresh database.
    ///
    /// # Errors
    /// No Postgres, or the strategy can't be opened.
    pub async fn of(strategy: &'static Strategy) -> anyhow::Result<Self> {
        /// More requests than this at once make no schedule that a person can read.
        const CONNECTIONS: u32 = 8;

        let stand = TestEnvironment::shared(strategy).await?;
        let database = stand.database();
        let holders = Holders::default();
        let context = StrategyContext {
            database: holders.pool(database.url().parse()?, CONNECTIONS).await?,
            work: Duration::ZERO,
            metrics: StrategyMetrics::default(),
            redis: stand.redis(LEASE)?,
            kafka: None,
            instrumentation: Instrumentation::default(),
        };
        Ok(Self {
            strategy,
            reserve: (strategy.open)(context).await?.into(),
            observer: database.pool(1).await?,
            holders,
            sales: AtomicI64::new(0),
            stand,
        })
    }

    /// What the strategy stands on.
    pub fn stand(&self) -> &TestEnvironment {
        &self.stand
    }

    /// Opens a new sale with so many tickets, for a script that nobody is in yet.
    ///
    /// # Errors
    /// The database can't be written.
    pub async fn sale(&self, capacity: u32) -> anyhow::Result<Script<'_>> {
        let sale = 1 + self.sales.fetch_add(1, Ordering::Relaxed);
        open_sale(&self.observer, sale, capacity).await?;
        Ok(Script {
            rehearsal: self,
            sale,
            capacity,
            requests: vec![],
            shared: Arc::new(Shared {
                board: Mutex::default(),
                changed: Notify::new(),
            }),
            started_us: now_monotonic_us(),
            blocked: HashSet::new(),
        })
    }

    /// The forced run that the book shows for a strategy: both look before either writes.
    ///
    /// Two buyers and one ticket; or, for a strategy that fails at one buyer's second click, two clicks and two tickets. The first request
    /// runs until it has decided to sell, then the second as far as it gets, then the first to its answer, then the second.
    ///
    /// # Errors
    /// Whatever moving a request fails with.
    pub async fn both_look_before_either_writes(&self) -> anyhow::Result<Script<'_>> {
        const DECIDED: &str = "decided to sell";
        let promised = self.strategy.guarantee.single_instance;
        let by_clicks = promised.about(Invariant::NoDuplicate) == Promise::Breaks
            && promised.about(Invariant::NoOversell) == Promise::Keeps;
        let mut script = self.sale(if by_clicks { 2 } else { 1 }).await?;
        let first = script.buyer("Ann");
        let second = if by_clicks {
            script.click(first)
        } else {
            script.buyer("Bob")
        };
        script.run_towards(first, DECIDED).await?;
        script.run_towards(second, DECIDED).await?;
        script.run_to_its_answer(first).await?;
        script.run_to_its_answer(second).await?;
        Ok(script)
    }
}

impl Script<'_> {
    /// Nobody is held at these points any more; they are written down all the same.
    pub fn passes(&mut self, points: &'static [&'static str]) {
        self.shared.board().passes = points;
    }

    /// The number of its sale.
    pub fn sale(&self) -> SaleId {
        self.sale
    }

    /// A new buyer, who will send one request under a key of its own.
    pub fn buyer(&mut self, name: &str) -> RequestHandle {
        let buyer = 1 + self
            .requests
            .iter()
            .map(|request| request.order.buyer)
            .max()
            .unwrap_or(0);
        self.request(name.to_owned(), buyer)
    }

    /// Another click of the same buyer: one more request, under another key.
    pub fn click(&mut self, of: RequestHandle) -> RequestHandle {
        let buyer = self.requests[of.0].order.buyer;
        let clicks = self
            .requests
            .iter()
            .filter(|request| request.order.buyer == buyer)
            .count();
        let name = format!("{}, click {}", self.name(of.0), clicks + 1);
        self.request(name, buyer)
    }

    /// Gives a request that has not been moved yet the key of another: one order sent twice, or a stranger who uses its key.
    pub fn takes_the_key_of(&mut self, lane: RequestHandle, other: RequestHandle) {
        self.requests[lane.0].order.key = self.requests[other.0].order.key.clone();
    }

    fn request(&mut self, name: String, buyer: BuyerId) -> RequestHandle {
        let lane = self.requests.len();
        self.requests.push(Requested {
            order: Order {
                sale: self.sale,
                buyer,
                key: RequestKey::fresh(),
            },
            go: Arc::new(Semaphore::new(0)),
        });
        let mut board = self.shared.board();
        board.trace.lanes.push(name);
        board.lanes.push(LaneState {
            standing: Standing::NotStarted,
            sent_us: 0,
            answered_us: None,
            answer: None,
            steps: vec![],
        });
        RequestHandle(lane)
    }

    /// Moves a request until it stands at the point `step`.
    ///
    /// # Errors
    /// It answered or was blocked before it came there; the error names the point and shows the trace.
    pub async fn run_until(&mut self, lane: RequestHandle, step: &'static str) -> anyhow::Result<()> {
        loop {
            match self.advance(lane.0).await? {
                Moved::Held(reached) if reached == step => return Ok(()),
                Moved::Held(_) => {}
                Moved::Answered => bail!(
                    "{} answered and never reached \"{step}\"\n{}",
                    self.name(lane.0),
                    self.trace()
                ),
                Moved::Blocked => bail!(
                    "{} is blocked and did not reach \"{step}\"\n{}",
                    self.name(lane.0),
                    self.trace()
                ),
            }
        }
    }

    /// Moves a request until it stands at the point `step`, or is blocked, or has answered: whichever comes first.
    ///
    /// # Errors
    /// A step did not end in time.
    pub async fn run_towards(&mut self, lane: RequestHandle, step: &'static str) -> anyhow::Result<()> {
        while let Moved::Held(reached) = self.advance(lane.0).await? {
            if reached == step {
                break;
            }
        }
        Ok(())
    }

    /// Moves a request until it is blocked by one that is held.
    ///
    /// # Errors
    /// It answered without ever being blocked.
    pub async fn run_until_blocked(&mut self, lane: RequestHandle) -> anyhow::Result<()> {
        loop {
            match self.advance(lane.0).await? {
                Moved::Blocked => return Ok(()),
                Moved::Held(_) => {}
                Moved::Answered => bail!("{} answered and was never blocked\n{}", self.name(lane.0), self.trace()),
            }
        }
    }

    /// Moves a request until it has its answer.
    ///
    /// # Errors
    /// It is blocked by a request that is held: move that one first.
    pub async fn run_to_its_answer(&mut self, lane: RequestHandle) -> anyhow::Result<()> {
        loop {
            match self.advance(lane.0).await? {
                Moved::Answered => return Ok(()),
                Moved::Held(_) => {}
                Moved::Blocked => bail!(
                    "{} is blocked and can't come to its answer\n{}",
                    self.name(lane.0),
                    self.trace()
                ),
            }
        }
    }

    /// Lets a request pass one point, and waits until everything stands still again.
    ///
    /// # Errors
    /// The step did not end in time.
    pub async fn step(&mut self, lane: RequestHandle) -> anyhow::Result<()> {
        self.advance(lane.0).await.map(drop)
    }

    /// The requests that would move if they were let: neither answered nor blocked.
    pub fn movable(&self) -> Vec<RequestHandle> {
        let board = self.shared.board();
        let lanes = board.lanes.iter().enumerate();
        lanes
            .filter(|(_, state)| matches!(state.standing, Standing::NotStarted | Standing::Held(_)))
            .map(|(lane, _)| RequestHandle(lane))
            .collect()
    }

    /// Lets everybody who can move go on to an answer, in the order in which they came.
    ///
    /// # Errors
    /// A step did not end in time, or somebody never got an answer.
    pub async fn run_everybody_to_an_answer(&mut self) -> anyhow::Result<()> {
        while let Some(&first) = self.movable().first() {
            self.step(first).await?;
        }
        self.everybody_has_answered()
    }

    /// Whether a request ever had to wait for another.
    pub fn was_anybody_blocked(&self) -> bool {
        let board = self.shared.board();
        board
            .trace
            .events
            .iter()
            .any(|event| matches!(event.happened, Happened::Waits { .. }))
    }

    /// Nobody is left who waits for somebody that is gone.
    ///
    /// # Errors
    /// Names who is.
    pub fn everybody_has_answered(&self) -> anyhow::Result<()> {
        let board = self.shared.board();
        match board
            .lanes
            .iter()
            .position(|state| state.standing != Standing::Answered)
        {
            None => Ok(()),
            Some(lane) => bail!("{} never gets an answer\n{}", board.trace.lanes[lane], board.trace),
        }
    }

    /// What has happened so far.
    pub fn trace(&self) -> Trace {
        self.shared.board().trace.clone()
    }

    /// The history of the script, with the rows as they are.
    ///
    /// # Errors
    /// A request has no answer yet, or the rows can't be read.
    pub async fn history(&self) -> anyhow::Result<History> {
        let sold = rows::read(&self.rehearsal.observer, self.sale).await?;
        let board = self.shared.board();
        let requests = board
            .lanes
            .iter()
            .zip(&self.requests)
            .enumerate()
            .map(|(index, (lane, request))| {
                let answer = lane.answer.clone();
                Ok(Request {
                    request: index as u64,
                    buyer: request.order.buyer,
                    key: request.order.key.to_string(),
                    sent_us: lane.sent_us,
                    answered_us: lane.answered_us,
                    answer: answer.ok_or_else(|| anyhow!("{} has no answer yet", board.trace.lanes[index]))?,
                    steps: lane.steps.clone(),
                })
            });
        Ok(History {
            header: Header {
                version: FORMAT_VERSION,
                strategy: self.rehearsal.strategy.name.to_owned(),
                sale: self.sale,
                capacity: u64::from(self.capacity),
                deadline_us: micros(PATIENCE) * self.requests.len() as Micros,
                expiry_us: None,
                stock: Some(sold.stock),
            },
            requests: requests.collect::<anyhow::Result<_>>()?,
            rows: Some(sold.rows),
            faults: vec![],
        })
    }

    /// Lets one request move, and waits until everything stands still again.
    async fn advance(&mut self, lane: usize) -> anyhow::Result<Moved> {
        let (standing, before) = {
            let board = self.shared.board();
            (board.lanes[lane].standing, board.trace.events.len())
        };
        match standing {
            Standing::Answered => return Ok(Moved::Answered),
            Standing::NotStarted => self.start(lane),
            Standing::Held(_) => {
                self.shared.board().lanes[lane].standing = Standing::Running;
                self.requests[lane].go.add_permits(1);
            }
            // It is blocked, unless somebody else's move has freed it.
            Standing::Running | Standing::Waiting => {}
        }
        let moved = tokio::time::timeout(PATIENCE, self.standstill(lane)).await.map_err(|_| {
            anyhow!(
                "after {PATIENCE:?} {} had not reached a point, answered, or been seen blocked by a held request\n{}",
                self.name(lane),
                self.trace()
            )
        })?;
        // Whoever was set free by this move runs beside it; in the table, cause comes before effect.
        self.shared.board().trace.events[before..].sort_by_key(|event| event.lane != lane);
        moved
    }

    /// Ends when no request moves any more.
    async fn standstill(&mut self, moved: usize) -> anyhow::Result<Moved> {
        let shared = self.shared.clone();
        loop {
            let changed = shared.changed.notified();
            if self.is_still_to_come() {
                let _ = tokio::time::timeout(LOOK_AGAIN, changed).await;
                continue;
            }
            let running = self.running();
            if running.is_empty() {
                break;
            }
            let blocked = Blocked::look(&self.rehearsal.observer)
                .await
                .context("asking Postgres who is blocked")?;
            // Nobody moved while Postgres was looking, and all that run wait for one that is held.
            if self.running() == running
                && let Some(waits) = self.all_wait_for_held_ones(&blocked, &running)
            {
                self.note(&waits);
                break;
            }
            // Either way we look again; the pause only spares Postgres.
            let _ = tokio::time::timeout(LOOK_AGAIN, changed).await;
        }
        Ok(match self.shared.board().lanes[moved].standing {
            Standing::Held(step) => Moved::Held(step),
            Standing::Answered => Moved::Answered,
            Standing::Running | Standing::Waiting | Standing::NotStarted => Moved::Blocked,
        })
    }

    /// Whether something is sure to happen by itself: a lock was given back and one who waited for it has not said yet that it got it, or
    /// a request has its answer and its transaction is still being rolled back.
    fn is_still_to_come(&self) -> bool {
        let board = self.shared.board();
        let answered = board
            .lanes
            .iter()
            .enumerate()
            .filter(|(_, state)| state.standing == Standing::Answered);
        board.releases > 0
            || answered
                .into_iter()
                .any(|(lane, _)| self.rehearsal.holders.holds(self.holder(lane)))
    }

    /// Who of those that run waits for whom, as lanes, if each of them does wait, and in the end for one that is held.
    fn all_wait_for_held_ones(&self, blocked: &Blocked, running: &[usize]) -> Option<Vec<(usize, usize)>> {
        let lane_of = |pid| {
            let holder = self.rehearsal.holders.of(pid)?;
            (holder.script == self.sale).then_some(holder.lane)
        };
        let waits: Vec<(usize, usize)> = blocked
            .pids()
            .filter_map(|pid| Some((lane_of(pid)?, lane_of(blocked.root(pid)?)?)))
            .collect();
        let board = self.shared.board();
        let each = running
            .iter()
            .all(|lane| waits.iter().any(|(waiting, _)| waiting == lane));
        let held = waits
            .iter()
            .all(|&(_, root)| !matches!(board.lanes[root].standing, Standing::Running | Standing::Answered));
        (each && held).then_some(waits)
    }

    /// Writes a row of the trace for each that was not blocked before.
    fn note(&mut self, waits: &[(usize, usize)]) {
        let mut board = self.shared.board();
        self.blocked
            .retain(|lane| waits.iter().any(|(waiting, _)| waiting == lane));
        for &(lane, root) in waits {
            if self.blocked.insert(lane) {
                let why = format!("waits for {}'s row lock", board.trace.lanes[root]);
                board.trace.events.push(Event {
                    lane,
                    happened: Happened::Waits { why },
                });
            }
        }
    }

    fn holder(&self, lane: usize) -> Holder {
        Holder {
            script: self.sale,
            lane,
        }
    }

    fn running(&self) -> Vec<usize> {
        let board = self.shared.board();
        let lanes = board.lanes.iter().enumerate();
        lanes
            .filter(|(_, state)| state.standing == Standing::Running)
            .map(|(lane, _)| lane)
            .collect()
    }

    fn start(&mut self, lane: usize) {
        let now = now_monotonic_us() - self.started_us;
        {
            let mut board = self.shared.board();
            board.lanes[lane].standing = Standing::Running;
            board.lanes[lane].sent_us = now;
        }
        let steps = Steps::observed_by(Arc::new(Held {
            lane,
            shared: self.shared.clone(),
            go: self.requests[lane].go.clone(),
            started_us: self.started_us,
        }));
        let order = self.requests[lane].order.clone();
        let (reserve, shared, started_us) = (self.rehearsal.reserve.clone(), self.shared.clone(), self.started_us);
        let answering = async move {
            let answer = answer_of(reserve.reserve(&order, &steps).await);
            {
                let mut board = shared.board();
                board.got_on(lane, Standing::Answered);
                board.lanes[lane].answered_us = Some(now_monotonic_us() - started_us);
                let words = in_words(&answer);
                board.lanes[lane].answer = Some(answer);
                board.trace.events.push(Event {
                    lane,
                    happened: Happened::Answered { answer: words },
                });
            }
            shared.changed.notify_one();
        };
        tokio::spawn(WORKS_FOR.scope(self.holder(lane), answering));
    }

    fn name(&self, lane: usize) -> String {
        self.shared.board().trace.lanes[lane].clone()
    }
}

impl Shared {
    fn board(&self) -> MutexGuard<'_, Board> {
        self.board.lock().expect("nobody panics while writing on the board")
    }
}

/// Holds one request at every point until the script lets it go.
struct Held {
    lane: usize,
    shared: Arc<Shared>,
    go: Arc<Semaphore>,
    started_us: Micros,
}

impl Observer for Held {
    fn at(&self, sighting: Sighting) -> BoxFuture<'_, ()> {
        let passes = {
            let mut board = self.shared.board();
            let place = format!("{}:{}", sighting.place.file(), sighting.place.line());
            let passes = board.passes.contains(&sighting.step);
            let standing = if passes {
                Standing::Running
            } else {
                Standing::Held(sighting.step)
            };
            board.got_on(self.lane, standing);
            if sighting.step == LOCK_RELEASED {
                board.releases += 1;
                board.releases = board.releases.min(board.waiting().cast_signed());
            }
            board.lanes[self.lane].steps.push(Step {
                at_us: now_monotonic_us() - self.started_us,
                step: sighting.step.to_owned(),
                saw: sighting.saw.clone(),
                place: place.clone(),
            });
            board.trace.events.push(Event {
                lane: self.lane,
                happened: Happened::Passed {
                    step: sighting.step,
                    saw: sighting.saw,
                    place,
                },
            });
            passes
        };
        self.shared.changed.notify_one();
        if passes {
            return ready(()).boxed();
        }
        Box::pin(async {
            let permit = self.go.acquire().await.expect("the script never closes it");
            permit.forget();
        })
    }

    fn blocked(&self, sighting: Sighting) {
        {
            let mut board = self.shared.board();
            board.lanes[self.lane].standing = Standing::Waiting;
            board.trace.events.push(Event {
                lane: self.lane,
                happened: Happened::Waits {
                    why: sighting.step.to_owned(),
                },
            });
        }
        self.shared.changed.notify_one();
    }
}

impl Board {
    /// A request came to a new standing by itself. If it was waiting, it has got the lock.
    fn got_on(&mut self, lane: usize, standing: Standing) {
        if self.lanes[lane].standing == Standing::Waiting {
            self.releases -= 1;
        }
        self.lanes[lane].standing = standing;
    }

    fn waiting(&self) -> usize {
        self.lanes
            .iter()
            .filter(|lane| lane.standing == Standing::Waiting)
            .count()
    }
}

fn micros(duration: Duration) -> Micros {
    u64::try_from(duration.as_micros()).unwrap_or(Micros::MAX)
}

/// Opens a sale as the theatre does.
pub(super) async fn open_sale(pool: &PgPool, sale: SaleId, capacity: u32) -> sqlx::Result<()> {
    sqlx::query("insert into sale (id, name, capacity, stock) values ($1, 'the last tickets', $2, $2)")
        .bind(sale)
        .bind(i64::from(capacity))
        .execute(pool)
        .await
        .map(drop)
}

pub(super) fn answer_of(result: Result<Outcome, ReserveError>) -> Answer {
    match result {
        Ok(Outcome::Confirmed(reservation)) => Answer::Confirmed {
            reservation: reservation.id,
        },
        Ok(Outcome::Accepted(reservation)) => Answer::Accepted {
            reservation: reservation.id,
            ending: None,
        },
        Err(ReserveError::Refused(refusal)) => Answer::Refused(refusal.into()),
        Err(ReserveError::Indeterminate(_)) => Answer::Indeterminate,
    }
}
