//! Each order in a transaction of its own, under the distributed lock of its sale.
//!
//! Orders are spread over the partitions, so that every instance decides orders of the same sale at the same time. What keeps them apart is
//! a lock in Redis, taken for each message, with LV.1's `read_then_write` under it. It is the answer of many tutorials: a queue before, a
//! lock behind.
//!
//! Guarantee: keeps everything but an order of service, on any number of instances, as long as nobody holds the lock longer than its lease.
//! Where it ends: with the lease, as in LV.3. And it is slow: a lock, a transaction and a durable commit for each order, one after another,
//! whatever the number of consumers. The queue takes orders in faster than they are decided, so the buyers wait for longer than in LV.3. And
//! only Kafka knows how far it is done: a database that is restored from a backup does not get back what was decided since.
//!
//! Apache Kafka documentation, 4.6 "Message Delivery Semantics". Book: LV.4, "locked".

use std::{
    collections::BTreeMap,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    time::Duration,
};

use async_trait::async_trait;
use box_office::{
    Event, Indeterminate, Open, Order, Outcome, Refusal, Reservation, Reserve, ReserveError, Steps, StrategyContext,
};
use futures_util::{StreamExt, stream};
use rdkafka::producer::FutureRecord;
use sqlx::postgres::PgTransaction;
use uuid::Uuid;

use crate::{
    lock::Locks,
    path::{Backoff, DECIDED, Inbox, OrderMessage, Path, Poison, Taken, Undelivered, member},
    reason::Reason,
};

/// How many messages are taken at once at most, and how many of them are in work at the same time.
const MOST: usize = 64;
const AT_ONCE: u32 = 4;

/// How long a message waits for its lock before it is put off.
const WAIT: Duration = Duration::from_secs(2);

/// Decides each order under a lock.
#[derive(Clone)]
pub struct Locked {
    path: Arc<Path>,
    locks: Locks,
}

impl Open for Locked {
    async fn open(context: StrategyContext) -> anyhow::Result<Self> {
        let locks = Locks::on(&context).await?;
        let path = Path::open(context).await?;
        let locked = Self { path, locks };
        for number in 1..=locked.path.place.consumers {
            // ANCHOR: consumer
            // Offsets are committed by hand, once the rows are durable.
            let mut config = member(&locked.path.place);
            config.set("enable.auto.commit", "false");
            // ANCHOR_END: consumer
            let inbox = Inbox::open(&locked.path.place, &config)?;
            let steps = locked.path.context.instrumentation.steps(&format!("consumer {number}"));
            locked
                .path
                .work(inbox.joined(), locked.clone().decide_all(inbox, steps));
        }
        Ok(locked)
    }
}

impl Locked {
    // ANCHOR: loop
    /// Decides what comes, until it is time to stop.
    async fn decide_all(self, inbox: Inbox, steps: Steps) {
        let mut backoff = Backoff::default();
        while let Some(batch) = inbox.batch(MOST, &self.path.stop).await {
            let outage = AtomicBool::new(false);
            let decisions: Vec<_> = batch.iter().map(|taken| self.decide(taken, &outage, &steps)).collect();
            let results: Vec<Result<(), ReserveError>> =
                stream::iter(decisions).buffered(self.at_once()).collect().await;

            // Only the done prefix: up to the first of a partition that could not be decided.
            let (mut done, mut again) = (BTreeMap::new(), BTreeMap::new());
            for (&Taken { partition, offset, .. }, result) in batch.iter().zip(results) {
                match result {
                    Ok(()) if !again.contains_key(&partition) => {
                        done.insert(partition, offset + 1);
                    }
                    Ok(()) => {} // decided, and decided again after the one before it: its id is known by then
                    Err(why) => {
                        tracing::warn!(%why, partition, offset, "put off");
                        again.entry(partition).or_insert(offset);
                    }
                }
            }
            steps.at("batch decided").await;
            for (partition, offset) in done {
                inbox.done_before(partition, offset);
                self.path.dead_letters.passed(partition, offset);
            }
            steps.at("offsets committed").await;
            if again.is_empty() {
                backoff.reset();
            } else {
                inbox.again(again, backoff.pause(), &self.path.stop).await;
            }
        }
        inbox.close().await;
    }
    // ANCHOR_END: loop

    /// How many orders are in work at the same time. Each holds a connection, and those who ask how an order ended need one, too.
    fn at_once(&self) -> usize {
        let spare = self
            .path
            .context
            .database
            .options()
            .get_max_connections()
            .saturating_sub(1);
        (spare / self.path.place.consumers.max(1)).clamp(1, AT_ONCE) as usize
    }

    // ANCHOR: decide
    /// Decides one order, or says why it can't be decided now.
    ///
    /// Once the database or the lock service has failed one, the rest of the batch is not begun: each would wait for what is away.
    async fn decide(&self, taken: &Taken, outage: &AtomicBool, steps: &Steps) -> Result<(), ReserveError> {
        if outage.load(Relaxed) || self.path.stop.is_cancelled() {
            return Err(Indeterminate::Overloaded.into());
        }
        let order = match taken.order(&self.path.ids) {
            Ok(order) => order,
            Err(poison) => return Ok(self.path.dead_letters.bury(taken, &poison).await?),
        };
        steps.at("message taken").await;
        let decided = self.decide_under_lock(&order, steps).await;
        // A lock that is somebody else's says nothing about the next order.
        if let Err(ReserveError::Indeterminate(Indeterminate::BackendAway(_) | Indeterminate::TimedOut)) = decided {
            outage.store(true, Relaxed);
        }
        match decided {
            Err(ReserveError::Refused(Refusal::UnknownSale)) => {
                let poison = Poison::UnknownSale(order.sale_id);
                Ok(self.path.dead_letters.bury(taken, &poison).await?)
            }
            decided => decided,
        }
    }

    /// Takes the sale's lock, and gives it back after the commit.
    ///
    /// If that fails, nobody can say whether it was carried out, or still is, and the next one would decide on what was there before it. So the lock is
    /// not given back then, and ends with its lease.
    async fn decide_under_lock(&self, order: &OrderMessage, steps: &Steps) -> Result<(), ReserveError> {
        // The connection first: with the lock in hand, a wait for one would run into its lease.
        let begun = self.path.context.begin().await;
        let mut tx = begun.map_err(|why| Indeterminate::BackendAway(why.into()))?;
        let held = self.locks.acquire(&format!("sale:{}", order.sale_id), WAIT).await?;
        steps.at("lock taken").await;
        let written = self.decide_alone(&mut tx, order, steps).await;
        if let Ok(true) = written {
            tx.commit().await?;
            steps.at("committed").await;
        }
        self.locks.release(held).await;
        written.map(drop)
    }

    /// LV.1's `read_then_write`, in a transaction with the outbox: right as long as nobody else is in it. Tells whether anything was written.
    async fn decide_alone(
        &self,
        tx: &mut PgTransaction<'_>,
        order: &OrderMessage,
        steps: &Steps,
    ) -> Result<bool, ReserveError> {
        let known: bool = sqlx::query_scalar("select exists (select from reservation where id = $1)")
            .bind(order.id)
            .fetch_one(&mut **tx)
            .await?;
        if known {
            return Ok(false); // a replay, or the buyer's own repeat: decided once is decided
        }
        let refused = self.sell(tx, order, steps).await?;
        write(tx, order, refused).await?;
        tell(tx, order.id).await?;
        Ok(true)
    }
    // ANCHOR_END: decide

    /// Takes a ticket, or says why not.
    async fn sell(
        &self,
        tx: &mut PgTransaction<'_>,
        order: &OrderMessage,
        steps: &Steps,
    ) -> Result<Option<Refusal>, ReserveError> {
        let stock: i64 = sqlx::query_scalar(
            "select stock
               from sale
              where id = $1",
        )
        .bind(order.sale_id)
        .fetch_optional(&mut **tx)
        .await?
        .ok_or(Refusal::UnknownSale)?;
        steps.at("stock read").saw(stock).await;

        let earlier: Option<(Uuid, bool)> = sqlx::query_as(
            "select id, buyer_id = $2
               from reservation
              where sale_id = $1
                and (buyer_id = $2 and status = 'confirmed' or buyer_id <> $2 and request_key = $3)
              order by request_key = $3 desc
              limit 1",
        )
        .bind(order.sale_id)
        .bind(order.buyer_id)
        .bind(order.request_key.as_str())
        .fetch_optional(&mut **tx)
        .await?;
        let refused = match earlier {
            Some((_, false)) => Refusal::KeyOfAnotherBuyer,
            Some((id, true)) => Refusal::AlreadyReserved {
                earlier: Reservation { id },
            },
            None if stock <= 0 => Refusal::SoldOut,
            None => {
                steps.at("decided to sell").await;
                self.path.context.simulate_work().await;
                sqlx::query(
                    "update sale
                        set stock = $2
                      where id = $1",
                )
                .bind(order.sale_id)
                .bind(stock - 1)
                .execute(&mut **tx)
                .await?;
                return Ok(None);
            }
        };
        Ok(Some(refused))
    }
}

/// Writes what was decided: the row that answers every later question.
async fn write(tx: &mut PgTransaction<'_>, order: &OrderMessage, refused: Option<Refusal>) -> Result<(), ReserveError> {
    let Reason {
        status,
        reason,
        earlier,
    } = refused.into();
    sqlx::query(
        "insert into reservation (id, sale_id, buyer_id, request_key, status, reason, earlier)
         values ($1, $2, $3, $4, $5, $6, $7)",
    )
    .bind(order.id)
    .bind(order.sale_id)
    .bind(order.buyer_id)
    .bind(order.request_key.as_str())
    .bind(status)
    .bind(reason)
    .bind(earlier)
    .execute(&mut **tx)
    .await?;
    Ok(())
}

// ANCHOR: outbox
/// Puts the news into the outbox. In the transaction of the row: they are both there, or neither is.
async fn tell(tx: &mut PgTransaction<'_>, id: Uuid) -> Result<(), ReserveError> {
    sqlx::query("insert into outbox (reservation_id) values ($1)")
        .bind(id)
        .execute(&mut **tx)
        .await?;
    sqlx::query("select pg_notify($1, $2)")
        .bind(DECIDED)
        .bind(id.to_string())
        .execute(&mut **tx)
        .await?;
    Ok(())
}
// ANCHOR_END: outbox

#[async_trait]
impl Reserve for Locked {
    async fn reserve(&self, order: &Order, steps: &Steps) -> Result<Outcome, ReserveError> {
        // ANCHOR: accept
        self.path.knows(order.sale).await?;
        let id = self.path.ids.id(order);
        let message = OrderMessage::new(id, order).to_bytes();
        steps.at("order checked").await;

        // By its own id: the orders of a sale are spread over all partitions.
        let record = FutureRecord::to(&self.path.topic).key(id.as_bytes()).payload(&message);
        let sent = self.path.producer.send(record, Duration::ZERO).await;
        sent.map_err(|(why, _)| Undelivered(why))?;
        steps.at("acknowledged").await;
        Ok(Outcome::Accepted(Reservation { id }))
        // ANCHOR_END: accept
    }

    async fn ready(&self) -> Result<(), ReserveError> {
        self.locks.ready().await?;
        self.path.ready().await
    }

    fn accepted(&self, id: Uuid) -> bool {
        self.path.ids.made(id)
    }

    async fn events(&self, id: Uuid, after: i64, patience: Duration) -> Result<Option<Vec<Event>>, ReserveError> {
        self.path.events.after(id, after, patience).await.map(Some)
    }

    async fn close(&self) {
        self.path.close().await;
    }
}
