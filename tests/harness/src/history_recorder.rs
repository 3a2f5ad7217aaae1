//! A few buyers that a test sends one by one, each to a server of its choice; what they are told is written down for the judge.

use std::{
    sync::{Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use box_office::{BuyerId, Strategy, trace::now_monotonic_us};
use tokio::time::timeout;
use uuid::Uuid;

use crate::{
    backends::TestEnvironment,
    history::{Answer, Ending, FORMAT_VERSION, Fault, Header, History, Micros, Request},
    http_contract::TestServer,
    judge::{Verdict, judge},
    rows,
    rush::{Classified, SALE, classify, decided},
};

/// What the buyers of [`SALE`] were told, and what befell the servers.
pub struct HistoryRecorder {
    strategy: &'static str,
    started_us: Micros,
    written: Mutex<Written>,
}

#[derive(Default)]
struct Written {
    requests: Vec<Request>,
    faults: Vec<Fault>,
}

impl HistoryRecorder {
    /// An empty one.
    pub fn new(strategy: &Strategy) -> Self {
        Self {
            strategy: strategy.name,
            started_us: now_monotonic_us(),
            written: Mutex::default(),
        }
    }

    /// A buyer asks this server for a ticket. Whoever asks again carries the same key. A connection that breaks is an answer too: undecided. An
    /// order that is accepted has no ending yet.
    pub async fn reserve(&self, server: &TestServer, buyer: BuyerId) -> Answer {
        let key = key_of(buyer);
        let number = {
            let mut written = self.written();
            let number = written.requests.len();
            written.requests.push(Request {
                request: number as u64,
                buyer,
                key: key.clone(),
                sent_us: self.now(),
                answered_us: None,
                answer: Answer::Indeterminate,
                steps: vec![],
            });
            number
        };
        let Ok(answered) = server.reserve(SALE, buyer, Some(&key)).await else {
            return Answer::Indeterminate;
        };
        let answer = match classify(&answered) {
            Classified::Final(answer) => answer,
            Classified::Accepted { reservation, .. } => Answer::Accepted {
                reservation,
                ending: None,
            },
        };
        let request = &mut self.written().requests[number];
        request.answered_us = Some(self.now());
        request.answer = answer.clone();
        answer
    }

    /// An order of this buyer was put into the topic by hand, as if a server had accepted it.
    pub fn record_accepted(&self, buyer: BuyerId, reservation: Uuid) {
        let now = self.now();
        let mut written = self.written();
        let request = Request {
            request: written.requests.len() as u64,
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
        written.requests.push(request);
    }

    /// Whoever has an order accepted asks this server what became of it, and hears it once more from the events, within `patience`. An order
    /// whose state is not final, or whose events do not tell so, has no ending.
    ///
    /// # Errors
    /// The server gives no answer.
    pub async fn record_outcomes(&self, server: &TestServer, within: Duration) -> anyhow::Result<()> {
        let accepted: Vec<(usize, Uuid)> = {
            let written = self.written();
            let accepted = written.requests.iter().enumerate();
            accepted
                .filter_map(|(number, request)| match request.answer {
                    Answer::Accepted { reservation, .. } => Some((number, reservation)),
                    _ => None,
                })
                .collect()
        };
        for (number, reservation) in accepted {
            let state = server.get(&format!("/api/reservations/{reservation}")).await?;
            let Some(refused) = decided(&state) else { continue };
            if !matches!(timeout(within, server.final_state(reservation)).await, Ok(Ok(_))) {
                continue;
            }
            let at_us = self.now();
            let mut written = self.written();
            let Answer::Accepted { ending, .. } = &mut written.requests[number].answer else {
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

    /// Something struck, and is not mended yet.
    pub fn record_fault(&self, fault: &str) {
        let struck_us = self.now();
        self.written().faults.push(Fault {
            fault: fault.to_owned(),
            struck_us,
            healed_us: None,
        });
    }

    /// All that struck is mended.
    pub fn record_recovery(&self) {
        let now = self.now();
        for fault in &mut self.written().faults {
            fault.healed_us.get_or_insert(now);
        }
    }

    /// Has it judged, with the rows as they are. Only meaningful once nothing moves any more.
    ///
    /// # Errors
    /// The rows can't be read.
    pub async fn verdict(&self, environment: &TestEnvironment) -> anyhow::Result<Verdict> {
        let pool = environment.database().pool(1).await?;
        let sold = rows::read(&pool, SALE).await?;
        pool.close().await;
        let written = self.written();
        Ok(judge(&History {
            header: Header {
                version: FORMAT_VERSION,
                strategy: self.strategy.to_owned(),
                sale: SALE,
                capacity: sold.capacity,
                // How long anybody waits is the test's own business.
                deadline_us: Micros::MAX / 2,
                expiry_us: None,
                stock: Some(sold.stock),
            },
            requests: written.requests.clone(),
            rows: Some(sold.rows),
            faults: written.faults.clone(),
        }))
    }

    fn now(&self) -> Micros {
        now_monotonic_us() - self.started_us
    }

    fn written(&self) -> MutexGuard<'_, Written> {
        self.written.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Every buyer has one key.
fn key_of(buyer: BuyerId) -> String {
    format!("buyer-{buyer}")
}
