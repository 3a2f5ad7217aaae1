//! The saga: a ticket is held, paid for, and confirmed; or it is released.
//!
//! An order is three transactions that cannot be one: a ticket of this database, money in another
//! system, and the ticket again. The saga is the row that remembers how far they are (`store.rs`):
//! `held → charging → confirmed`, or `→ releasing → released`. Each step is written before it is
//! taken, and each can be taken again.
//!
//! - **Hold.** The sale's writer takes the ticket, in the transaction that decides the order.
//! - **Charge.** The payment service is asked (`payments.rs`). The reservation's id is the
//!   idempotency key. A timeout is an unknown outcome: it is asked again, until the hold ends.
//! - **Confirm**, if it is paid while it is held. That changes no stock.
//! - **Release**, if the payment is declined, the hold ends, or the buyer cancels. A ticket that
//!   comes back changes the stock, so it is a command in the sale's own partition: the writer takes
//!   it, in the same transaction as the orders of its batch. There is no `stock + 1` anywhere else.
//! - **Refund**, the compensation, if money may have been taken for a ticket that has been released. It
//!   is asked for until the service has answered.
//!
//! **Who takes a step.** Any instance that is alive and has consumers: it claims sagas that are due with
//! `for update skip locked`, and marks them as due again later. If it dies, another takes the step
//! again then. The owner of the partition would be the alternative, but a payment takes seconds, and
//! a rebalance would find it half-way. A claim is no lock: two instances may take the same step. So
//! every write names the state that it follows, and the first one wins.
//!
//! **A command has no authority.** Any client of the broker can write one. It names a reservation,
//! and a writer releases that if, and only if, its row says `releasing`. A repeated command changes
//! nothing, a forged one nothing that is not due, and a lost one is sent again.
//!
//! Guarantee: every ticket that was held is confirmed and paid for once, or released once and not
//! paid for in the end (I2, I11), whichever instances die, as long as Postgres keeps its rows and
//! the payment service keeps its word about keys: a repeat is the same charge, and a refund is the
//! last word.
//!
//! Limits: between the release and the refund the buyer has neither ticket nor money. Instances with
//! and without `PAYMENT_URL` must not decide orders of the same sales. The URL is `http`: for TLS, a
//! proxy of the same machine.
//!
//! Costs: two more writes of each reservation, one more row, and a command for each ticket that
//! comes back.
//!
//! Sources: H. Garcia-Molina, K. Salem, "Sagas", SIGMOD 1987; Stripe, "Idempotent requests";
//! PostgreSQL documentation, `SELECT`, "The Locking Clause". Book: LV.4, "Hold, pay, confirm or
//! release".

mod payments;
pub mod store;

use std::{future::pending, sync::Arc, time::Duration};

use box_office::{BuyerId, CauseLog, PaymentSettings, Priority, ReserveError, SaleId, Steps, Transaction};
use rdkafka::producer::FutureRecord;
use tokio::{
    sync::Notify,
    task::JoinSet,
    time::{sleep, timeout},
};
use uuid::Uuid;

pub use payments::{Charge, PaymentClient, UnknownOutcome};
use store::{Claimed, Due, State};
pub use store::{cancel, release};

use crate::pipeline::{ConsumedMessage, Ids, OrderPipeline, ReleaseCommand};

/// The maximum number of charges, and of releases, that are in flight on an instance.
const MAX_CALLS: usize = 256;

/// The maximum number of refunds that are in flight on an instance: nobody waits for one as for a
/// ticket.
const MAX_REFUNDS: usize = 64;

/// The interval at which sagas that are due are looked for: another instance may have held them, or
/// have died.
const POLL_INTERVAL: Duration = Duration::from_millis(200);

/// The interval at which the age of the oldest unknown outcome is reported.
const REPORT_INTERVAL: Duration = Duration::from_secs(2);

/// How much longer than the timeout of its step a claim lasts.
const CLAIM_MARGIN: Duration = Duration::from_secs(1);

/// How long a release may take until its command is sent again, the first time.
const RELEASE_TIMEOUT: Duration = Duration::from_secs(6);

/// How long a shutdown waits for the calls in flight. Those that are left are taken up when their
/// claims have expired.
const SHUTDOWN_TIMEOUT: Duration = Duration::from_secs(2);

/// The sagas of an instance: their settings, and what wakes its workers.
#[derive(Debug)]
pub struct Sagas {
    settings: PaymentSettings,
    charges: Notify,
    releases: Notify,
}

impl Sagas {
    /// Starts to take the steps of sagas. `None`: tickets are confirmed as soon as they are taken.
    ///
    /// A server without consumers leaves the steps to other servers.
    ///
    /// # Errors
    /// If the client of the payment service cannot be created.
    pub fn start(pipeline: &Arc<OrderPipeline>) -> anyhow::Result<Option<Arc<Self>>> {
        let Some(settings) = pipeline.context.improvements.payment() else {
            return Ok(None);
        };
        let payments = PaymentClient::new(&settings.url, settings.timeout)?;
        let sagas = Arc::new(Self {
            settings,
            charges: Notify::new(),
            releases: Notify::new(),
        });
        if pipeline.kafka.consumers > 0 {
            let steps = pipeline.context.instrumentation.steps("saga");
            let worker = Worker {
                pipeline: Arc::clone(pipeline),
                sagas: Arc::clone(&sagas),
                payments,
                causes: Arc::new(CauseLog::default()),
            };
            pipeline.spawn_worker(report_unknown(worker.clone()));
            for what in Due::ALL {
                pipeline.spawn_worker(run(worker.clone(), what, steps.clone()));
            }
        }
        Ok(Some(sagas))
    }

    /// Begins the sagas of tickets that were taken in this transaction.
    ///
    /// # Errors
    /// The error of the database.
    pub async fn hold(&self, tx: &mut Transaction, held: &[(Uuid, SaleId, BuyerId)]) -> Result<(), ReserveError> {
        store::hold(tx, held, self.settings.hold).await
    }

    /// Wakes this instance's worker for charges, once that transaction is committed.
    pub fn wake(&self) {
        self.charges.notify_one();
    }
}

/// Takes the release commands out of a batch, and returns their reservations.
pub fn take_releases(batch: &mut Vec<ConsumedMessage>, ids: &Ids) -> Vec<Uuid> {
    let mut releases = vec![];
    batch.retain(|message| {
        let release = message.release(ids);
        releases.extend(release.iter().map(|release| release.id));
        release.is_none()
    });
    releases
}

/// What came of the step of a saga.
#[derive(Debug)]
enum Step {
    Charged(Charge),
    /// The outcome is unknown.
    Unanswered,
    /// The release was commanded, if it was due.
    WoundDown {
        /// Whether what was charged has been returned.
        refunded: bool,
    },
}

/// Takes the steps of sagas that are due, until shutdown. The calls in flight are finished then, if
/// they end soon.
async fn run(worker: Worker, what: Due, steps: Steps) {
    let limit = match what {
        Due::Charges | Due::Releases => MAX_CALLS,
        Due::Refunds => MAX_REFUNDS,
    };
    let woken = async || match what {
        Due::Charges => worker.sagas.charges.notified().await,
        Due::Releases => worker.sagas.releases.notified().await,
        Due::Refunds => pending().await,
    };
    let mut calls = JoinSet::new();
    while !worker.pipeline.stop.is_cancelled() {
        let room = limit - calls.len();
        let claimed = worker.claim(what, room, &steps).await;
        let all_claimed = claimed.len() < room;
        for saga in claimed {
            let worker = worker.clone();
            calls.spawn(async move { (saga.reservation, worker.take_step(saga).await) });
        }
        tokio::select! {
            Some(first) = calls.join_next() => {
                let mut taken = Vec::from_iter(first.ok());
                while let Some(next) = calls.try_join_next() {
                    taken.extend(next.ok());
                }
                steps.at("saga step taken").saw(taken.len()).await;
                worker.settle(taken, &steps).await;
            }
            () = woken(), if all_claimed => {}
            () = sleep(POLL_INTERVAL), if all_claimed => {}
            () = worker.pipeline.stop.cancelled() => {}
        }
    }
    let mut taken = vec![];
    let finished = async {
        while let Some(next) = calls.join_next().await {
            taken.extend(next.ok());
        }
    };
    // What is not finished by then is abandoned with the set.
    let _ = timeout(SHUTDOWN_TIMEOUT, finished).await;
    worker.settle(taken, &steps).await;
}

/// Reports the age of the oldest payment whose outcome is unknown, until shutdown. It is a property
/// of all instances: each reports it.
async fn report_unknown(worker: Worker) {
    let context = &worker.pipeline.context;
    let stop = &worker.pipeline.stop;
    while stop.run_until_cancelled(sleep(REPORT_INTERVAL)).await.is_some() {
        match store::oldest_unknown(&context.database, worker.sagas.settings.hold).await {
            Ok(age) => context.metrics.oldest_unknown_payment.set(age),
            Err(why) => worker
                .causes
                .warn("the payments without an outcome cannot be read", &why),
        }
    }
}

#[derive(Clone)]
struct Worker {
    pipeline: Arc<OrderPipeline>,
    sagas: Arc<Sagas>,
    payments: PaymentClient,
    causes: Arc<CauseLog>,
}

impl Worker {
    /// Claims at most this many sagas that are due.
    async fn claim(&self, what: Due, limit: usize, steps: &Steps) -> Vec<Claimed> {
        if limit == 0 {
            return vec![];
        }
        let timeout = match what {
            Due::Charges | Due::Refunds => self.sagas.settings.timeout,
            Due::Releases => RELEASE_TIMEOUT,
        };
        let lease = timeout + CLAIM_MARGIN;
        match store::claim(&self.pipeline.context.database, what, limit, lease).await {
            Ok(claimed) => {
                if !claimed.is_empty() {
                    steps.at("sagas claimed").saw(claimed.len()).await;
                }
                claimed
            }
            Err(why) => {
                self.causes.warn("the sagas that are due cannot be read", &why);
                vec![]
            }
        }
    }

    // ANCHOR: step
    /// Takes the next step of a saga.
    async fn take_step(&self, saga: Claimed) -> Step {
        match saga.state {
            State::Charging => match self.payments.charge(saga.reservation, saga.buyer).await {
                Ok(charge) => {
                    self.count(match charge {
                        Charge::Approved => "approved",
                        Charge::Declined => "declined",
                    });
                    Step::Charged(charge)
                }
                Err(why) => {
                    self.count("unknown");
                    self.causes
                        .warn("a payment has an unknown outcome, and is asked for again", &why);
                    Step::Unanswered
                }
            },
            State::Releasing => {
                self.command_release(&saga).await;
                Step::WoundDown { refunded: false }
            }
            State::Released => Step::WoundDown {
                refunded: self.refund(&saga).await,
            },
        }
    }
    // ANCHOR_END: step

    /// Sends the command to release the ticket to the sale's partition. If it fails, the saga is due
    /// again.
    async fn command_release(&self, saga: &Claimed) {
        let message = ReleaseCommand::new(saga.reservation, saga.sale).to_bytes();
        let sale = saga.sale.to_be_bytes();
        let record = FutureRecord::to(self.pipeline.topics.of(Priority::Normal))
            .key(&sale)
            .payload(&message)
            .headers(ReleaseCommand::headers());
        if let Err((why, _)) = self.pipeline.producer.send(record, Duration::ZERO).await {
            self.causes.warn(
                "the release of a ticket could not be commanded, and is commanded again",
                &why,
            );
        }
    }

    /// Refunds what may have been charged. Returns whether it is done.
    async fn refund(&self, saga: &Claimed) -> bool {
        if !saga.refund_due {
            return false;
        }
        match self.payments.refund(saga.reservation).await {
            Ok(()) => {
                self.count("refunded");
                true
            }
            Err(why) => {
                self.count("unknown");
                self.causes
                    .warn("a refund has an unknown outcome, and is asked for again", &why);
                false
            }
        }
    }

    fn count(&self, outcome: &'static str) {
        self.pipeline.context.metrics.payment_calls.count(outcome);
    }

    /// Stores what came of the steps. What cannot be stored is done again, when its claim has
    /// expired.
    async fn settle(&self, taken: Vec<(Uuid, Step)>, steps: &Steps) {
        if taken.is_empty() {
            return;
        }
        if let Err(why) = self.try_settle(&taken).await {
            self.causes.warn("the steps of sagas could not be stored", &why);
        }
        steps.at("saga step stored").await;
    }

    async fn try_settle(&self, taken: &[(Uuid, Step)]) -> Result<(), ReserveError> {
        let those = |wanted: fn(&Step) -> bool| -> Vec<Uuid> {
            let wanted = taken.iter().filter(|(_, step)| wanted(step));
            wanted.map(|(id, _)| *id).collect()
        };
        let approved = those(|step| matches!(step, Step::Charged(Charge::Approved)));
        let declined = those(|step| matches!(step, Step::Charged(Charge::Declined)));
        let unanswered = those(|step| matches!(step, Step::Unanswered));
        let wound_down = those(|step| matches!(step, Step::WoundDown { .. }));
        let refunded = those(|step| matches!(step, Step::WoundDown { refunded: true }));

        let mut tx = self.pipeline.context.begin().await?;
        store::lock(&mut tx, &those(|_| true)).await?;
        store::approved(&mut tx, &approved).await?;
        store::declined(&mut tx, &declined).await?;
        store::unanswered(&mut tx, &unanswered).await?;
        store::wound_down(&mut tx, &wound_down, &refunded, RELEASE_TIMEOUT).await?;
        tx.commit().await?;
        if !declined.is_empty() {
            self.sagas.releases.notify_one();
        }
        Ok(())
    }
}
