//! A few buyers that a test sends one by one, each to a server of its choice; what they are told is written down for the judge.

use std::sync::{Mutex, MutexGuard, PoisonError};

use anyhow::bail;
use box_office::{BuyerId, Strategy, trace::now_monotonic_us};

use crate::{
    backends::Stand,
    history::{Answer, FORMAT_VERSION, Fault, Header, History, Micros, Request},
    http_contract::Talk,
    judge::{Verdict, judge},
    rows,
    rush::{SALE, Understood, understand},
};

/// What the buyers of [`SALE`] were told, and what befell the servers.
pub struct Ledger {
    strategy: &'static str,
    capacity: u32,
    started_us: Micros,
    written: Mutex<Written>,
}

#[derive(Default)]
struct Written {
    requests: Vec<Request>,
    faults: Vec<Fault>,
}

impl Ledger {
    /// An empty one, for a sale with so many tickets.
    pub fn new(strategy: &Strategy, capacity: u32) -> Self {
        Self {
            strategy: strategy.name,
            capacity,
            started_us: now_monotonic_us(),
            written: Mutex::default(),
        }
    }

    /// A buyer asks this server for a ticket. Whoever asks again carries the same key. A connection that breaks is an answer too: undecided.
    ///
    /// # Errors
    /// The server answers as none does that has no order in hand.
    pub async fn ask(&self, talk: &Talk, buyer: BuyerId) -> anyhow::Result<Answer> {
        let key = format!("buyer-{buyer}");
        let number = {
            let mut written = self.written();
            let number = written.requests.len();
            written.requests.push(Request {
                request: number as u64,
                buyer,
                key: key.clone(),
                sent_us: self.now(),
                answered_us: None,
                answer: Answer::Undecided,
                steps: vec![],
            });
            number
        };
        let Ok(answered) = talk.reserve(SALE, buyer, Some(&key)).await else {
            return Ok(Answer::Undecided);
        };
        let Understood::Final(answer) = understand(&answered) else {
            bail!("buyer {buyer} is to come again for the answer");
        };
        let request = &mut self.written().requests[number];
        request.answered_us = Some(self.now());
        request.answer = answer.clone();
        Ok(answer)
    }

    /// Something struck, and is not mended yet.
    pub fn struck(&self, fault: &str) {
        let struck_us = self.now();
        self.written().faults.push(Fault {
            fault: fault.to_owned(),
            struck_us,
            healed_us: None,
        });
    }

    /// All that struck is mended.
    pub fn healed(&self) {
        let now = self.now();
        for fault in &mut self.written().faults {
            fault.healed_us.get_or_insert(now);
        }
    }

    /// Has it judged, with the rows as they are. Only meaningful once nothing moves any more.
    ///
    /// # Errors
    /// The rows can't be read.
    pub async fn verdict(&self, stand: &Stand) -> anyhow::Result<Verdict> {
        let pool = stand.database().pool(1).await?;
        let sold = rows::read(&pool, SALE).await?;
        pool.close().await;
        let written = self.written();
        Ok(judge(&History {
            header: Header {
                version: FORMAT_VERSION,
                strategy: self.strategy.to_owned(),
                sale: SALE,
                capacity: self.capacity.into(),
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
