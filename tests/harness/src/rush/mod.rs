//! A rush: N buyers, released at once through a gate, compete for one sale.
//!
//! Servers are real processes. Each buyer sends HTTP requests over its own connection, which is
//! open and warm before the gate opens. The rush records a [`History`], which is the judge's only
//! input.

mod buyers;
mod connection;
mod report;
mod servers;

use std::{net::SocketAddr, sync::Arc, time::Duration};

use anyhow::{Context, bail, ensure};
use box_office::{BuyerId, Improvements, Level, Priority, SaleId, Strategy, trace::now_monotonic_us};
use tokio::{
    sync::{Mutex, watch},
    time::{Instant, sleep},
};

pub use buyers::{Classified, classify, final_state, is_event_stream, jittered, recheck, retry_after};
pub use connection::{Connection, HttpResponse};
pub use report::{Answers, Clock, Latency, Report};
pub(crate) use servers::until_stopped;
pub use servers::{Program, Servers, Steps};

use crate::{
    backends::{Database, NginxSettings, TestEnvironment},
    final_state,
    history::{FORMAT_VERSION, Fault, Header, History, Micros},
    payments::{self, PaymentService},
};

/// Serialises rushes. Concurrent rushes would load each other, and if a thousand buyers wait for a
/// lock, the last ones would time out.
static ONE_AT_A_TIME: Mutex<()> = Mutex::const_new(());

/// The id of the sale that a rush opens.
pub const SALE: SaleId = 1;

/// The parameters of a rush. The defaults are this workbook's question: 1,000 buyers, 100 tickets,
/// one instant.
#[derive(Clone, Debug)]
pub struct Rush {
    /// Tickets on sale.
    pub capacity: u32,
    /// Number of buyers, all released at once.
    pub buyers: u32,
    /// Number of requests that each buyer sends at once, each under its own key.
    pub clicks: u32,
    /// Number of server processes that the buyers are distributed over.
    pub instances: usize,
    /// How to start an nginx in front of the servers, which distributes the requests. `None`: each
    /// buyer connects to a server itself, and to another one once its server is gone.
    pub nginx: Option<NginxSettings>,
    /// Simulated work inside the critical section.
    pub work: Duration,
    /// Minimum duration of a reservation's commit. Simulates the disk, which the harness's Postgres
    /// does not wait for.
    pub commit: Duration,
    /// Size of each server's connection pool. `None`: the server's default.
    pub pool_size: Option<u32>,
    /// Time for which a buyer repeats a request with unknown outcome; also the deadline of a single
    /// request.
    pub timeout: Duration,
    /// The improvements of LV.4 that the servers are started with.
    pub improvements: Improvements,
    /// Number of buyers whom the admin has named as VIPs, and who ask for priority: the last ones.
    pub vips: u32,
    /// How to start a payment service, which buyers pay at: a ticket is held until it is paid for.
    pub payments: Option<Program>,
    /// Whether the servers trace every step of every request, as evidence for a verdict.
    pub traced: bool,
    /// Faults to inject during the sale. With faults, buyers come in waves: the first when the gate
    /// opens, and one more when each fault is healed or, if it is permanent, has struck.
    pub faults: Vec<PlannedFault>,
}

impl Default for Rush {
    fn default() -> Self {
        Self {
            capacity: 100,
            buyers: 1000,
            clicks: 1,
            instances: 1,
            nginx: None,
            work: Duration::ZERO,
            commit: Duration::ZERO,
            pool_size: None,
            timeout: Duration::from_secs(20),
            improvements: Improvements::default(),
            vips: 0,
            payments: None,
            traced: false,
            faults: vec![],
        }
    }
}

/// A fault to inject into an instance during a sale.
#[derive(Clone, Copy, Debug)]
pub struct PlannedFault {
    /// Strikes once this number of requests are answered (a 202 counts), counted from the opening
    /// of the gate or the healing of the previous fault.
    pub after_answers: u64,
    /// Index of the instance, from 0.
    pub instance: usize,
    /// The kind of fault.
    pub kind: FaultKind,
}

/// An instance that a fault struck.
#[derive(Clone, Copy, Debug)]
pub struct Struck {
    /// The address of the instance.
    pub address: SocketAddr,
    /// When it was sent the signal; a history's fault has struck once the instance has exited.
    pub signalled_us: Micros,
    /// The address of its replacement, if any.
    pub replaced_by: Option<SocketAddr>,
}

/// The kind of a fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FaultKind {
    /// SIGKILL without replacement.
    Kill,
    /// SIGTERM; a new instance replaces it once it has exited.
    Restart,
}

impl Rush {
    /// One click each for as many tickets as there are buyers: every "sold out" is false.
    pub fn one_ticket_each(buyers: u32) -> Self {
        Self {
            capacity: buyers,
            buyers,
            clicks: 1,
            work: Duration::from_millis(1),
            ..Self::default()
        }
    }

    /// The rush that tests a strategy's guarantee: the defaults, with the strategy's number of
    /// clicks.
    pub fn for_strategy(strategy: &Strategy) -> Self {
        Self {
            clicks: strategy.clicks,
            ..Self::default()
        }
    }

    /// Sets the number of instances.
    pub fn instances(self, instances: usize) -> Self {
        Self { instances, ..self }
    }

    /// The priority that a buyer asks for.
    pub fn priority_of(&self, buyer: BuyerId) -> Priority {
        if buyer > BuyerId::from(self.buyers.saturating_sub(self.vips)) {
            Priority::Vip
        } else {
            Priority::Normal
        }
    }

    /// The time after which an order may expire: too old when it is decided, or not paid for while
    /// its ticket was held.
    fn expiry(&self) -> Option<Duration> {
        let hold = self.improvements.payment().map(|payment| payment.hold);
        self.improvements.order_ttl.into_iter().chain(hold).min()
    }

    /// Traces every step.
    pub fn traced(self) -> Self {
        Self { traced: true, ..self }
    }

    /// Adds a fault.
    pub fn fault(mut self, fault: PlannedFault) -> Self {
        self.faults.push(fault);
        self
    }

    /// The number of waves of buyers.
    fn waves(&self) -> usize {
        self.faults.len() + 1
    }

    /// Starts the servers on a new database of the shared backends, and runs the rush.
    ///
    /// # Errors
    /// Fails if a backend is missing, or a server does not start or stop as it should. Answers to
    /// buyers are never an error here; the judge checks them.
    pub async fn run(&self, program: &Program, level: &Level, strategy: &Strategy) -> anyhow::Result<Report> {
        let environment = TestEnvironment::shared(strategy).await?;
        self.run_on(&environment, program, level, strategy).await
    }

    /// Runs the rush like [`run`](Self::run), but not concurrently with other rushes that this
    /// process runs through this method.
    ///
    /// # Errors
    /// As [`run`](Self::run).
    pub async fn run_alone(&self, program: &Program, level: &Level, strategy: &Strategy) -> anyhow::Result<Report> {
        let environment = TestEnvironment::shared(strategy).await?;
        self.run_in_turn(Some(&ONE_AT_A_TIME), &environment, program, level, strategy)
            .await
    }

    /// Runs the rush like [`run`](Self::run), on the caller's backends.
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
        let Some(payments) = &self.payments else {
            return self.run_with(None, turns, environment, program, level, strategy).await;
        };
        let payments = PaymentService::start(payments).await?;
        let mut rush = self.clone();
        rush.improvements.payment_url = Some(payments.url().parse()?);
        rush.run_with(Some(&payments), turns, environment, program, level, strategy)
            .await
    }

    async fn run_with(
        &self,
        payments: Option<&PaymentService>,
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
        let mut servers = Servers::start(self, environment, program, level, strategy).await?;
        servers.open_sale(SALE, self.capacity).await?;
        let vips = (1..=BuyerId::from(self.buyers)).filter(|&buyer| self.priority_of(buyer) == Priority::Vip);
        servers.name_vips(SALE, &vips.collect::<Vec<_>>()).await?;
        if !self.commit.is_zero() {
            delay_commits(environment.database(), self.commit).await?;
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
            inject_faults(&self.faults, answers, healed, &servers, started_us)
        );
        let (faults, struck) = faults?.into_iter().unzip();

        let mut requests = released.requests;
        wait_for_zero_lag(level, environment, self.timeout).await?;
        let pool = environment.database().pool(1).await?;
        if payments.is_some() {
            payments::wait_until_settled(&pool, self.timeout).await?;
        }
        let retries = servers.retries().await?;
        drop(turn);
        let mut sent_to = released.sent_to;
        sent_to.extend(servers.stop_nginx().await?);
        let steps = servers.stop().await?;
        let beside_requests = steps.add_to(&mut requests, started_us);

        let sold = final_state::read(&pool, SALE).await?;
        pool.close().await;
        let (paid, payment_calls) = match payments {
            Some(payments) => (Some(payments.ledger().await?), Some(payments.calls().await?)),
            None => (None, None),
        };
        let history = History {
            header: Header {
                version: FORMAT_VERSION,
                strategy: format!("{}/{}", level.name, strategy.name),
                sale: SALE,
                capacity: self.capacity.into(),
                deadline_us: micros(self.timeout),
                expiry_us: self.expiry().map(micros),
                stock: Some(sold.stock),
            },
            requests,
            rows: Some(sold.rows),
            faults,
            payments: paid,
            decisions: sold.decisions,
        };
        let mut report = Report::new(self.instances, history, retries, &released.clock);
        report.beside_requests = beside_requests;
        report.sent_to = sent_to;
        report.payment_calls = payment_calls;
        report.struck = struck;
        Ok(report)
    }
}

/// Waits until the consumer lag is 0. An order decided after the rows were read could be an
/// unnoticed oversell.
async fn wait_for_zero_lag(level: &Level, environment: &TestEnvironment, timeout: Duration) -> anyhow::Result<()> {
    const REQUEST_TIMEOUT: Duration = Duration::from_secs(5);
    const POLL_INTERVAL: Duration = Duration::from_millis(20);

    let (Some(lag), Some(config)) = (level.lag, environment.kafka(0, REQUEST_TIMEOUT)) else {
        return Ok(());
    };
    let deadline = Instant::now() + timeout;
    loop {
        let config = config.clone();
        let waiting = tokio::task::spawn_blocking(move || lag(&config, REQUEST_TIMEOUT)).await?;
        if let Ok(0) = waiting {
            return Ok(());
        }
        // An error may be transient: for a moment the broker does not know a new group or topic.
        if deadline <= Instant::now() {
            let waiting = waiting.context("the consumer lag is unknown")?;
            bail!(
                "{timeout:?} after the last answer the consumer lag is still {waiting} messages, so the number of tickets sold is unknown"
            );
        }
        sleep(POLL_INTERVAL).await;
    }
}

/// Delays every commit of a reservation in Postgres by this time, before its changes are visible.
async fn delay_commits(database: &Database, by: Duration) -> anyhow::Result<()> {
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

/// Injects the planned faults in order, records when each struck and healed, and starts the next
/// wave of buyers after each.
async fn inject_faults(
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
        let signalled_us = now_monotonic_us();
        let (fault, struck_us, healed_us) = match planned.kind {
            FaultKind::Kill => {
                let status = servers.kill(planned.instance).await?;
                (format!("instance {number} killed ({status})"), now_monotonic_us(), None)
            }
            FaultKind::Restart => {
                let status = servers.restart(planned.instance).await?;
                (
                    format!("instance {number} restarted ({status})"),
                    signalled_us,
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
        let struck = Struck {
            address,
            signalled_us: signalled_us - started_us,
            replaced_by,
        };
        faults.push((fault, struck));
        healed.send_modify(|healed| *healed += 1);
    }
    Ok(faults)
}

fn micros(duration: Duration) -> Micros {
    u64::try_from(duration.as_micros()).unwrap_or(Micros::MAX)
}
