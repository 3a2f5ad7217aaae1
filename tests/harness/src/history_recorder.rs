//! A recorder for tests that send requests one by one: collects the history of one sale for the
//! judge.

use std::{
    sync::{Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use box_office::{BuyerId, Priority, Strategy, trace::now_monotonic_us};
use tokio::time::timeout;
use uuid::Uuid;

use crate::{
    backends::TestEnvironment,
    final_state,
    history::{Answer, Ending, FORMAT_VERSION, Fault, Header, History, Micros, Payment, Request},
    judge::{Verdict, judge},
    rush::{Classified, SALE, classify, final_state},
    test_server::TestServer,
};

/// Records the answers to the buyers of [`SALE`], and the faults.
pub struct HistoryRecorder {
    strategy: &'static str,
    started_us: Micros,
    recorded: Mutex<Recorded>,
}

#[derive(Default)]
struct Recorded {
    requests: Vec<Request>,
    faults: Vec<Fault>,
    payments: Option<Vec<Payment>>,
    expiry_us: Option<Micros>,
}

impl HistoryRecorder {
    /// Creates an empty recorder.
    pub fn new(strategy: &Strategy) -> Self {
        Self {
            strategy: strategy.name,
            started_us: now_monotonic_us(),
            recorded: Mutex::default(),
        }
    }

    /// A recorder of orders that may be answered "expired" after this time. Some may have been
    /// accepted before it began, up to this time and twice as long.
    pub fn with_expiry(self, expiry: Duration) -> Self {
        self.record_expiry(expiry);
        Self {
            started_us: self.started_us.saturating_sub(3 * micros(expiry)),
            ..self
        }
    }

    /// Sends a buyer's request to a server and records the answer, as
    /// [`reserve_under`](Self::reserve_under) does. A buyer uses the same key for every request.
    pub async fn reserve(&self, server: &TestServer, buyer: BuyerId) -> Answer {
        self.reserve_under(server, buyer, &key_of(buyer)).await
    }

    /// Sends a buyer's request for priority, as [`reserve`](Self::reserve) does.
    pub async fn reserve_as_vip(&self, server: &TestServer, buyer: BuyerId) -> Answer {
        self.reserve_with(Priority::Vip, server, buyer, &key_of(buyer)).await
    }

    /// Sends a buyer's request under this key to a server and records the answer. A broken
    /// connection is an unknown outcome. An accepted order has no ending yet.
    pub async fn reserve_under(&self, server: &TestServer, buyer: BuyerId, key: &str) -> Answer {
        self.reserve_with(Priority::Normal, server, buyer, key).await
    }

    async fn reserve_with(&self, priority: Priority, server: &TestServer, buyer: BuyerId, key: &str) -> Answer {
        let number = {
            let mut recorded = self.recorded();
            let number = recorded.requests.len();
            recorded.requests.push(Request {
                request: number as u64,
                buyer,
                key: key.to_owned(),
                sent_us: self.now(),
                answered_us: None,
                answer: Answer::Indeterminate,
                steps: vec![],
            });
            number
        };
        let Ok(answered) = server.reserve_with(priority, SALE, buyer, Some(key)).await else {
            return Answer::Indeterminate;
        };
        let answer = match classify(&answered) {
            Classified::Final(answer) => answer,
            Classified::Accepted { reservation, .. } => Answer::Accepted {
                reservation,
                ending: None,
            },
        };
        let request = &mut self.recorded().requests[number];
        request.answered_us = Some(self.now());
        request.answer = answer.clone();
        answer
    }

    /// Records an order that the test itself produced to the topic, as if a server had accepted it.
    pub fn record_accepted(&self, buyer: BuyerId, reservation: Uuid) {
        self.record_accepted_before(buyer, reservation, Duration::ZERO);
    }

    /// Records such an order that was accepted this time ago.
    pub fn record_accepted_before(&self, buyer: BuyerId, reservation: Uuid, ago: Duration) {
        let now = self.now().saturating_sub(micros(ago));
        let mut recorded = self.recorded();
        let request = Request {
            request: recorded.requests.len() as u64,
            buyer,
            key: key_of(buyer),
            sent_us: now,
            answered_us: Some(now),
            answer: Answer::Accepted {
                reservation,
                ending: None,
            },
            steps: vec![],
        };
        recorded.requests.push(request);
    }

    /// Records the final state of every accepted order, read from a server and confirmed by the
    /// order's events `within` this time. An order whose state is not final, or whose events do not
    /// confirm it, gets no ending.
    ///
    /// # Errors
    /// Fails if the server does not answer.
    pub async fn record_outcomes(&self, server: &TestServer, within: Duration) -> anyhow::Result<()> {
        let accepted: Vec<(usize, Uuid)> = {
            let recorded = self.recorded();
            let accepted = recorded.requests.iter().enumerate();
            accepted
                .filter_map(|(number, request)| match request.answer {
                    Answer::Accepted { reservation, .. } => Some((number, reservation)),
                    _ => None,
                })
                .collect()
        };
        for (number, reservation) in accepted {
            let state = server.get(&format!("/api/reservations/{reservation}")).await?;
            let Some(refused) = final_state(&state) else { continue };
            if !matches!(timeout(within, server.final_state(reservation)).await, Ok(Ok(_))) {
                continue;
            }
            let at_us = self.now();
            let mut recorded = self.recorded();
            let Answer::Accepted { ending, .. } = &mut recorded.requests[number].answer else {
                continue;
            };
            match ending {
                None => {
                    *ending = Some(Ending {
                        at_us,
                        refused,
                        changed_to: None,
                    });
                }
                Some(before) if before.refused != refused => {
                    before.changed_to = Some(Box::new(Ending {
                        at_us,
                        refused,
                        changed_to: None,
                    }));
                }
                Some(_) => {}
            }
        }
        Ok(())
    }

    /// Records that a fault has struck.
    pub fn record_fault(&self, fault: &str) {
        let struck_us = self.now();
        self.recorded().faults.push(Fault {
            fault: fault.to_owned(),
            struck_us,
            healed_us: None,
        });
    }

    /// Records that orders may expire: this long after they were sent, or later.
    pub fn record_expiry(&self, after: Duration) {
        self.recorded().expiry_us = Some(micros(after));
    }

    /// Records the ledger of the payment service, as it is at quiescence.
    pub fn record_payments(&self, payments: Vec<Payment>) {
        self.recorded().payments = Some(payments);
    }

    /// Records that all faults are healed.
    pub fn record_recovery(&self) {
        let now = self.now();
        for fault in &mut self.recorded().faults {
            fault.healed_us.get_or_insert(now);
        }
    }

    /// Judges the recorded history with the current rows. The result is meaningful only at
    /// quiescence.
    ///
    /// # Errors
    /// Fails if the rows can't be read.
    pub async fn verdict(&self, environment: &TestEnvironment) -> anyhow::Result<Verdict> {
        let pool = environment.database().pool(1).await?;
        let sold = final_state::read(&pool, SALE).await?;
        pool.close().await;
        let recorded = self.recorded();
        Ok(judge(&History {
            header: Header {
                version: FORMAT_VERSION,
                strategy: self.strategy.to_owned(),
                sale: SALE,
                capacity: sold.capacity,
                // The test itself limits waits.
                deadline_us: Micros::MAX / 2,
                expiry_us: recorded.expiry_us,
                stock: Some(sold.stock),
            },
            requests: recorded.requests.clone(),
            rows: Some(sold.rows),
            faults: recorded.faults.clone(),
            payments: recorded.payments.clone(),
            decisions: sold.decisions,
        }))
    }

    fn now(&self) -> Micros {
        now_monotonic_us() - self.started_us
    }

    fn recorded(&self) -> MutexGuard<'_, Recorded> {
        self.recorded.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn micros(duration: Duration) -> Micros {
    Micros::try_from(duration.as_micros()).unwrap_or(Micros::MAX)
}

/// The one key of a buyer.
fn key_of(buyer: BuyerId) -> String {
    format!("buyer-{buyer}")
}
