//! A rush: N buyers, released at once through a gate, against one sale.
//!
//! Servers are real processes and buyers talk HTTP, each over a connection of its own that is open and warm before the gate opens.
//! What happened is written down as a [`History`]; the judge reads nothing else.

mod buyers;
mod connection;
mod report;
mod servers;

use std::{net::SocketAddr, sync::Arc, time::Duration};

use anyhow::{Context, bail, ensure};
use box_office::{Level, SaleId, Strategy, trace::now_monotonic_us};
use tokio::{
    sync::{Mutex, watch},
    time::{Instant, sleep},
};

pub use buyers::{Classified, classify, decided, is_event_stream, jittered, recheck, retry_after};
pub use connection::{Answered, Connection};
pub use report::{Answers, Clock, Latency, Report};
pub use servers::{Program, Servers, Steps};

use crate::{
    backends::{Database, TestEnvironment},
    history::{FORMAT_VERSION, Fault, Header, History, Micros},
    rows,
};

/// Two rushes at once would be each other's load, and where a lock is waited for by a thousand buyers, the patience of the last would end with it.
static ONE_AT_A_TIME: Mutex<()> = Mutex::const_new(());

/// The sale that a rush opens.
pub const SALE: SaleId = 1;

/// How a rush is run. The defaults are the question of this workbook: 1,000 buyers, 100 tickets, one instant.
#[derive(Clone, Debug)]
pub struct Rush {
    /// Tickets on sale.
    pub capacity: u32,
    /// Buyers, all at once.
    pub buyers: u32,
    /// Requests each buyer sends at once, each under its own key.
    pub clicks: u32,
    /// Server processes that the buyers are spread over.
    pub instances: usize,
    /// Business time inside the critical section.
    pub work: Duration,
    /// How long the commit of a reservation takes at least. The suite's Postgres does not wait for a disk, as one that is durable does.
    pub commit: Duration,
    /// Connections in each server's pool. `None`: the server's own default.
    pub pool_size: Option<u32>,
    /// How long a buyer repeats an undecided request before giving up; also the deadline of a single request.
    pub timeout: Duration,
    /// Whether the servers write down every step of every request, for the evidence of a verdict.
    pub traced: bool,
    /// What to do to the servers while they sell. With faults, buyers come in waves: the first when the gate opens, one more when each fault
    /// has been mended, or has struck where it is not mended.
    pub faults: Vec<PlannedFault>,
}

impl Default for Rush {
    fn default() -> Self {
        Self {
            capacity: 100,
            buyers: 1000,
            clicks: 1,
            instances: 1,
            work: Duration::ZERO,
            commit: Duration::ZERO,
            pool_size: None,
            timeout: Duration::from_secs(20),
            traced: false,
            faults: vec![],
        }
    }
}

/// Something to do to a server while it sells.
#[derive(Clone, Copy, Debug)]
pub struct PlannedFault {
    /// Strikes as soon as so many requests have their answer, be it only that their order is accepted, counted from the gate's opening or the
    /// mending of the fault before.
    pub after_answers: u64,
    /// Which instance, counted from 0.
    pub instance: usize,
    /// What happens to it.
    pub kind: FaultKind,
}

/// An instance that a fault struck.
#[derive(Clone, Copy, Debug)]
pub struct Struck {
    /// Where it listened.
    pub address: SocketAddr,
    /// Where the one listens that took its place. `None`: none did.
    pub replaced_by: Option<SocketAddr>,
}

/// What happens to an instance.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FaultKind {
    /// SIGKILL, and it stays away.
    Kill,
    /// SIGTERM; once it has left, a new one takes its place.
    Restart,
}

impl Rush {
    /// The rush that tries a strategy's guarantee: the defaults, with the clicks that it needs.
    pub fn for_strategy(strategy: &Strategy) -> Self {
        Self {
            clicks: strategy.clicks,
            ..Self::default()
        }
    }

    /// The same, over so many instances.
    pub fn instances(self, instances: usize) -> Self {
        Self { instances, ..self }
    }

    /// The same, with every step written down.
    pub fn traced(self) -> Self {
        Self { traced: true, ..self }
    }

    /// The same, with one more fault.
    pub fn fault(mut self, fault: PlannedFault) -> Self {
        self.faults.push(fault);
        self
    }

    /// How many waves the buyers come in.
    fn waves(&self) -> usize {
        self.faults.len() + 1
    }

    /// Starts the servers on a fresh database of the shared backends, and runs the rush.
    ///
    /// # Errors
    /// A backend is missing, or a server does not start or stop as it should. What buyers are told is never an error here: the judge
    /// decides about that.
    pub async fn run(&self, program: &Program, level: &Level, strategy: &Strategy) -> anyhow::Result<Report> {
        let environment = TestEnvironment::shared(strategy).await?;
        self.run_on(&environment, program, level, strategy).await
    }

    /// The same, and from when its buyers come it has the machine to itself, as far as other rushes of this process go that are run like this.
    ///
    /// # Errors
    /// As [`run`](Self::run).
    pub async fn run_alone(&self, program: &Program, level: &Level, strategy: &Strategy) -> anyhow::Result<Report> {
        let environment = TestEnvironment::shared(strategy).await?;
        self.run_in_turn(Some(&ONE_AT_A_TIME), &environment, program, level, strategy)
            .await
    }

    /// The same, on backends of the caller's.
    ///
    /// # Errors
    /// As [`run`](Self::run).
    pub async fn run_on(
        &self,
        environment: &TestEnvironment,
        program: &Program,
        level: &Level,
        strategy: &Strategy,
    ) -> anyhow::Result<Report> {
        self.run_in_turn(None, environment, program, level, strategy).await
    }

    async fn run_in_turn(
        &self,
        turns: Option<&Mutex<()>>,
        environment: &TestEnvironment,
        program: &Program,
        level: &Level,
        strategy: &Strategy,
    ) -> anyhow::Result<Report> {
        ensure!(self.instances > 0, "a rush needs an instance to run against");
        let fewest = u64::from(self.buyers) / self.waves() as u64 * u64::from(self.clicks);
        for fault in &self.faults {
            ensure!(
                fault.after_answers <= fewest,
                "a fault after {} answers of a wave of {fewest} requests may never strike",
                fault.after_answers
            );
        }
        let servers = Servers::start(self, environment, program, level, strategy).await?;
        servers.open_sale(SALE, self.capacity).await?;
        if !self.commit.is_zero() {
            slow_commits_down(environment.database(), self.commit).await?;
        }

        let turn = match turns {
            Some(turns) => Some(turns.lock().await),
            None => None,
        };
        let gate = buyers::Gate::new(self, &servers)
            .await
            .context("connecting the buyers")?;
        let (answered, answers) = watch::channel(0);
        let (healed, healings) = watch::channel(0);
        let started_us = now_monotonic_us();
        let (released, faults) = tokio::join!(
            gate.open(started_us, Arc::new(answered), healings),
            strike(&self.faults, answers, healed, &servers, started_us)
        );
        let (faults, struck) = faults?.into_iter().unzip();

        let mut requests = released.requests;
        nothing_waits(level, environment, self.timeout).await?;
        let retries = servers.retries().await?;
        drop(turn);
        let steps = servers.stop().await?;
        let beside_requests = steps.add_to(&mut requests, started_us);

        let pool = environment.database().pool(1).await?;
        let sold = rows::read(&pool, SALE).await?;
        pool.close().await;
        let history = History {
            header: Header {
                version: FORMAT_VERSION,
                strategy: format!("{}/{}", level.name, strategy.name),
                sale: SALE,
                capacity: self.capacity.into(),
                deadline_us: micros(self.timeout),
                expiry_us: None,
                stock: Some(sold.stock),
            },
            requests,
            rows: Some(sold.rows),
            faults,
        };
        let mut report = Report::new(self.instances, history, retries, &released.clock);
        report.beside_requests = beside_requests;
        report.sent_to = released.sent_to;
        report.struck = struck;
        Ok(report)
    }
}

/// Waits until every message is passed by the group that decides. What is decided after the rows were read would be an oversell that nobody has seen.
async fn nothing_waits(level: &Level, environment: &TestEnvironment, timeout: Duration) -> anyhow::Result<()> {
    const ANSWER: Duration = Duration::from_secs(5);
    const POLL_INTERVAL: Duration = Duration::from_millis(20);

    let (Some(lag), Some(place)) = (level.lag, environment.kafka(0, ANSWER)) else {
        return Ok(());
    };
    let gave_up = Instant::now() + timeout;
    loop {
        let place = place.clone();
        let waiting = tokio::task::spawn_blocking(move || lag(&place, ANSWER)).await?;
        if let Ok(0) = waiting {
            return Ok(());
        }
        // An error may pass: for a moment the broker knows nothing of a group or a topic that is new.
        if gave_up <= Instant::now() {
            let waiting = waiting.context("nobody can say whether messages wait to be decided")?;
            bail!(
                "{timeout:?} after the last answer {waiting} messages still wait to be decided, so nobody can say what was sold"
            );
        }
        sleep(POLL_INTERVAL).await;
    }
}

/// From here on whoever commits a reservation waits for so long, in Postgres, before anybody else can see it.
async fn slow_commits_down(database: &Database, by: Duration) -> anyhow::Result<()> {
    let pool = database.pool(1).await?;
    sqlx::raw_sql(sqlx::AssertSqlSafe(format!(
        "create function take_time() returns trigger language plpgsql
             as 'begin perform pg_sleep({}); return null; end';
         create constraint trigger a_commit_takes_time after insert on reservation
             deferrable initially deferred for each row execute function take_time();",
        by.as_secs_f64()
    )))
    .execute(&pool)
    .await?;
    pool.close().await;
    Ok(())
}

/// Carries out the plan, each fault at its moment, writes down when it struck and when it was mended, and lets the next buyers come.
async fn strike(
    plan: &[PlannedFault],
    mut answers: watch::Receiver<u64>,
    healed: watch::Sender<usize>,
    servers: &Servers,
    started_us: Micros,
) -> anyhow::Result<Vec<(Fault, Struck)>> {
    let mut faults = vec![];
    for planned in plan {
        let before = if faults.is_empty() { 0 } else { *answers.borrow() };
        answers
            .wait_for(|answered| *answered >= before + planned.after_answers)
            .await
            .with_context(|| {
                format!(
                    "the rush was over before {} answers: the fault did not strike",
                    planned.after_answers
                )
            })?;
        let number = planned.instance + 1;
        let address = servers.address(planned.instance).await?;
        let (fault, struck_us, healed_us) = match planned.kind {
            FaultKind::Kill => {
                let status = servers.kill(planned.instance).await?;
                (format!("instance {number} killed ({status})"), now_monotonic_us(), None)
            }
            FaultKind::Restart => {
                let struck_us = now_monotonic_us();
                let status = servers.restart(planned.instance).await?;
                (
                    format!("instance {number} restarted ({status})"),
                    struck_us,
                    Some(now_monotonic_us()),
                )
            }
        };
        let replaced_by = match healed_us {
            Some(_) => Some(servers.address(planned.instance).await?),
            None => None,
        };
        let fault = Fault {
            fault,
            struck_us: struck_us - started_us,
            healed_us: healed_us.map(|healed_us| healed_us - started_us),
        };
        faults.push((fault, Struck { address, replaced_by }));
        healed.send_modify(|healed| *healed += 1);
    }
    Ok(faults)
}

fn micros(duration: Duration) -> Micros {
    u64::try_from(duration.as_micros()).unwrap_or(Micros::MAX)
}
