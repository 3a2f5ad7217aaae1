//! The ledger of the payment service: whether everybody's money agrees with how the order ended (I11).

use std::{
    collections::{HashMap, HashSet},
    time::{Duration, Instant},
};

use box_office::Invariant;
use harness::{
    history::{Answer, Entry, History, Payment},
    judge::Finding,
    payments,
};
use tokio::time::sleep;
use uuid::Uuid;

use crate::sale::Host;

/// Between two reads of the ledger while refunds are on their way.
const PAUSE: Duration = Duration::from_millis(100);

/// The ledger of a payment service.
pub(crate) struct Ledger {
    host: Host,
    /// The reservations that were in it before the rush.
    before: HashSet<Uuid>,
}

/// What the ledger says of a rush.
pub(crate) struct Money {
    pub(crate) charges: u64,
    pub(crate) refunds: u64,
    /// The reservations that are not paid for as they ended, each in words.
    wrong: Vec<String>,
}

/// How an order ended, as far as its buyer knows.
#[derive(Clone, Copy, PartialEq, Eq)]
enum End {
    Ticket,
    NoTicket,
    Unknown,
}

impl Ledger {
    /// Remembers what is in the ledger before the rush.
    pub(crate) async fn open(host: &Host) -> anyhow::Result<Self> {
        let payments = payments::ledger(host.address().await?).await?;
        Ok(Self {
            host: host.clone(),
            before: payments.into_iter().map(|payment| payment.reservation).collect(),
        })
    }

    /// Compares the ledger with the history, until they agree or the time is over: refunds come after the answers to the buyers.
    pub(crate) async fn compare(&self, history: &History, within: Duration) -> anyhow::Result<Money> {
        let ends = ends(history);
        let began = Instant::now();
        loop {
            let mut payments = payments::ledger(self.host.address().await?).await?;
            payments.retain(|payment| !self.before.contains(&payment.reservation));
            let money = Money::of(&payments, &ends);
            if money.wrong.is_empty() || began.elapsed() > within {
                return Ok(money);
            }
            sleep(PAUSE).await;
        }
    }
}

impl Money {
    fn of(payments: &[Payment], ends: &HashMap<Uuid, End>) -> Self {
        let mut counts: HashMap<Uuid, (u64, u64)> = ends.keys().map(|&id| (id, (0, 0))).collect();
        let (mut all_charges, mut all_refunds) = (0, 0);
        for Payment { reservation, entry } in payments {
            let (charges, refunds) = counts.entry(*reservation).or_default();
            let (of_reservation, of_all) = match entry {
                Entry::Charge => (charges, &mut all_charges),
                Entry::Refund => (refunds, &mut all_refunds),
            };
            *of_reservation += 1;
            *of_all += 1;
        }
        let wrong = counts.into_iter().filter_map(|(id, (charges, refunds))| {
            // No buyer was told of this reservation: a request whose outcome is unknown may have made it.
            let end = ends.get(&id).copied().unwrap_or(End::Unknown);
            let (is_right, ended) = match end {
                End::Ticket => (charges == refunds + 1, "has a ticket"),
                End::NoTicket => (charges == refunds, "has no ticket"),
                End::Unknown => (refunds <= charges && charges <= refunds + 1, "has no final state"),
            };
            (!is_right).then(|| format!("reservation {id} {ended}: {charges} charges, {refunds} refunds"))
        });
        let mut wrong: Vec<String> = wrong.collect();
        wrong.sort_unstable();
        Self {
            charges: all_charges,
            refunds: all_refunds,
            wrong,
        }
    }

    /// What is wrong with it, if anything is.
    pub(crate) fn finding(&self) -> Option<Finding> {
        let first = self.wrong.first()?;
        let count = self.wrong.len();
        Some(Finding {
            invariant: Invariant::PaidOnce,
            count: count as u64,
            summary: format!("{count} reservations are not paid for as they ended, such as this: {first}"),
            evidence: None,
            question: "What did the server take for granted when it got no answer?",
        })
    }
}

/// How each reservation ended. A buyer whose outcome is unknown was told of none.
fn ends(history: &History) -> HashMap<Uuid, End> {
    let mut ends = HashMap::new();
    for request in &history.requests {
        let (reservation, end) = match &request.answer {
            Answer::Confirmed { reservation } => (*reservation, End::Ticket),
            Answer::Accepted { reservation, ending } => match ending {
                Some(ending) if ending.refused.is_none() => (*reservation, End::Ticket),
                Some(_) => (*reservation, End::NoTicket),
                None => (*reservation, End::Unknown),
            },
            _ => continue,
        };
        let known = ends.entry(reservation).or_insert(end);
        if *known == End::Unknown {
            *known = end;
        }
    }
    ends
}
