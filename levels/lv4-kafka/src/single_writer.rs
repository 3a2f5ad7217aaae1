//! One writer for each sale: all orders of a sale lie in one partition, and a partition has one consumer.
//!
//! So nobody has to be kept apart. What has arrived is one batch: it is read, decided in memory in the order of the partition, and written
//! in one transaction, which also moves the partition's offset in the database. A lock is paid for with every order; a batch is paid for
//! once, and it gets larger the more there is to do.
//!
//! "A partition has one consumer" is what Kafka's group means, not what it can enforce: a consumer that stood still for longer than its
//! session wakes up and believes that the partition is still its own. Its batch moves the offset from where it began, and by then the offset
//! is somewhere else: no row is touched, and the whole transaction is given up. The offset is the fence.
//!
//! It is no more than that. That an order was decided, only its row says: a topic that is made anew counts from nothing again, and a database
//! that is restored knows less than the group has committed.
//!
//! Guarantee: keeps everything but an order of service, on any number of instances. Orders are decided in the order in which the broker
//! wrote them. Where it ends: one sale is decided by one consumer; more instances help only where there are more sales. And `pg_notify` takes a
//! lock that all databases of the server share, from then until the commit is durable: consumers commit one after another.
//!
//! Apache Kafka documentation, 4.6 "Message Delivery Semantics" (storing the offset with the output). Book: LV.4, "single-writer".

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    sync::Arc,
    time::Duration,
};

use async_trait::async_trait;
use box_office::{
    BuyerId, Event, Open, Order, Outcome, Refusal, Reservation, Reserve, ReserveError, SaleId, Steps, StrategyContext,
};
use rdkafka::producer::FutureRecord;
use sqlx::postgres::PgTransaction;
use uuid::Uuid;

use crate::{
    path::{Backoff, DECIDED, Inbox, OrderMessage, Path, Poison, Taken, Undelivered, announcements, member},
    reason::Reason,
};

/// How many messages are decided at once at most.
const MOST: usize = 2000;

/// Decides what has arrived for a sale, all at once.
#[derive(Clone)]
pub struct SingleWriter {
    path: Arc<Path>,
}

/// What there is to know before a batch can be decided.
struct Before {
    stock: HashMap<SaleId, i64>,
    decided: HashSet<Uuid>,
    tickets: HashMap<(SaleId, BuyerId), Uuid>,
    keys: HashMap<(SaleId, String), BuyerId>,
}

impl Before {
    /// Whether this order is one of a sale, and not decided.
    fn lacks(&self, order: &OrderMessage) -> bool {
        self.stock.contains_key(&order.sale_id) && !self.decided.contains(&order.id)
    }
}

/// An order with its answer.
type Decision = (OrderMessage, Option<Refusal>);

impl Open for SingleWriter {
    async fn open(context: StrategyContext) -> anyhow::Result<Self> {
        let writer = Self {
            path: Path::open(context).await?,
        };
        for number in 1..=writer.path.place.consumers {
            let mut config = member(&writer.path.place);
            config.set("enable.auto.commit", "false");
            let inbox = Inbox::open(&writer.path.place, &config)?;
            let steps = writer.path.context.instrumentation.steps(&format!("consumer {number}"));
            writer
                .path
                .work(inbox.joined(), writer.clone().decide_all(inbox, steps));
        }
        Ok(writer)
    }
}

impl SingleWriter {
    // ANCHOR: loop
    /// Decides what comes, until it is time to stop.
    async fn decide_all(self, inbox: Inbox, steps: Steps) {
        let mut backoff = Backoff::default();
        while let Some(arrived) = inbox.batch(MOST, &self.path.stop).await {
            let mut batches: BTreeMap<i32, Vec<Taken>> = BTreeMap::new();
            for taken in arrived {
                batches.entry(taken.partition).or_default().push(taken);
            }
            let mut again = BTreeMap::new();
            for (partition, batch) in batches {
                if self.path.stop.is_cancelled() {
                    break; // what is not begun is for others
                }
                let (first, next) = (batch[0].offset, batch[batch.len() - 1].offset + 1);
                match self.decide(partition, batch, &inbox, &steps).await {
                    Ok(done) if done == next => {
                        inbox.done_before(partition, next);
                        self.path.dead_letters.passed(partition, next);
                        steps.at("offsets committed").await;
                    }
                    Ok(back) => {
                        again.insert(partition, back);
                    }
                    Err(why) => {
                        tracing::warn!(%why, partition, first, "put off");
                        again.insert(partition, first);
                    }
                }
            }
            if again.is_empty() {
                backoff.reset();
            } else {
                inbox.again(again, backoff.pause(), &self.path.stop).await;
            }
        }
        inbox.close().await;
    }
    // ANCHOR_END: loop

    // ANCHOR: decide
    /// Decides what has arrived in one partition, in one transaction. Returns where to go on: after it, or further back.
    async fn decide(
        &self,
        partition: i32,
        batch: Vec<Taken>,
        inbox: &Inbox,
        steps: &Steps,
    ) -> Result<i64, ReserveError> {
        steps.at("batch taken").saw(batch.len()).await;
        let (first, last) = (batch[0].offset, batch[batch.len() - 1].offset);
        let fence = self.next_offset(partition, inbox).await?;
        // Orders in between were never decided here, whatever the group has committed: this database was restored from a backup, or is a
        // replica that had not heard of the last ones when it took over.
        if fence < first && !inbox.went_back_to(partition, fence) {
            tracing::warn!(
                partition,
                fence,
                first,
                "some before these are not decided: back to them"
            );
            return Ok(fence);
        }
        if fence < first {
            tracing::error!(
                partition,
                fence,
                first,
                "what lay in between is not decided, and the topic has it no more"
            );
        }

        let orders = self.orders(batch).await?;
        let mut tx = self.path.context.begin().await?;
        let before = read(&mut tx, &orders).await?;
        // What lies before the fence has been decided; only Kafka had not heard of it. Its id says so: an offset alone may be used again, in a
        // topic that was made anew, or by a broker that has lost the end of its log.
        let came_again = orders
            .iter()
            .any(|(taken, order)| taken.offset < fence && before.lacks(order));
        if came_again {
            tracing::error!(
                partition,
                first,
                fence,
                "offsets have come again, with orders that nobody has decided"
            );
        }
        let next = if came_again { last + 1 } else { fence.max(last + 1) };
        let decisions = self.decided(before, orders).await?;
        steps.at("batch decided").saw(decisions.len()).await;
        self.path.context.simulate_work().await;

        let moved = sqlx::query(
            "update partition_offset
                set next_offset = $4
              where topic = $1
                and partition = $2
                and next_offset = $3",
        )
        .bind(&self.path.topic)
        .bind(partition)
        .bind(fence)
        .bind(next)
        .execute(&mut *tx)
        .await?;
        if moved.rows_affected() == 0 {
            tracing::warn!(partition, fence, "too late: somebody else has decided in the meantime");
            return Ok(first);
        }
        write(&mut tx, &decisions).await?;
        tell(&mut tx, &decisions).await?;
        steps.at("rows written").await;
        tx.commit().await?;
        steps.at("committed").await;
        Ok(last + 1)
    }
    // ANCHOR_END: decide

    // ANCHOR: next-offset
    /// The next offset of a partition to decide. Of a new one: the first that it holds.
    async fn next_offset(&self, partition: i32, inbox: &Inbox) -> Result<i64, ReserveError> {
        let next = sqlx::query_scalar(
            "select next_offset
               from partition_offset
              where topic = $1
                and partition = $2",
        )
        .bind(&self.path.topic)
        .bind(partition)
        .fetch_optional(&self.path.context.database)
        .await?;
        if let Some(next) = next {
            return Ok(next);
        }
        let earliest = inbox.earliest(partition).await?;
        sqlx::query(
            "insert into partition_offset (topic, partition, next_offset)
             values ($1, $2, $3)
                 on conflict do nothing",
        )
        .bind(&self.path.topic)
        .bind(partition)
        .bind(earliest)
        .execute(&self.path.context.database)
        .await?;
        Ok(earliest)
    }
    // ANCHOR_END: next-offset

    /// The orders in a batch. What is none goes to the dead letters.
    async fn orders(&self, batch: Vec<Taken>) -> Result<Vec<(Taken, OrderMessage)>, ReserveError> {
        let mut orders = Vec::with_capacity(batch.len());
        for taken in batch {
            match taken.order(&self.path.ids) {
                Ok(order) => orders.push((taken, order)),
                Err(poison) => self.path.dead_letters.bury(&taken, &poison).await?,
            }
        }
        Ok(orders)
    }

    // ANCHOR: decided
    /// Decides one order after the other, in the order of the partition. Nobody else does it for these sales.
    async fn decided(
        &self,
        mut before: Before,
        orders: Vec<(Taken, OrderMessage)>,
    ) -> Result<Vec<Decision>, ReserveError> {
        let mut decisions = Vec::with_capacity(orders.len());
        for (taken, order) in orders {
            let sale = order.sale_id;
            let Some(stock) = before.stock.get_mut(&sale) else {
                let poison = Poison::UnknownSale(sale);
                self.path.dead_letters.bury(&taken, &poison).await?;
                continue;
            };
            if !before.decided.insert(order.id) {
                continue; // the buyer's own repeat: decided once is decided
            }
            let key_of = before.keys.entry((sale, order.request_key.to_string()));
            let key_of = *key_of.or_insert(order.buyer_id);
            let refused = match before.tickets.get(&(sale, order.buyer_id)) {
                _ if key_of != order.buyer_id => Some(Refusal::KeyOfAnotherBuyer),
                Some(&id) => Some(Refusal::AlreadyReserved {
                    earlier: Reservation { id },
                }),
                None if *stock <= 0 => Some(Refusal::SoldOut),
                None => {
                    *stock -= 1;
                    before.tickets.insert((sale, order.buyer_id), order.id);
                    None
                }
            };
            decisions.push((order, refused));
        }
        Ok(decisions)
    }
    // ANCHOR_END: decided
}

/// Reads what the orders of a batch depend on.
async fn read(tx: &mut PgTransaction<'_>, orders: &[(Taken, OrderMessage)]) -> Result<Before, ReserveError> {
    let sales: Vec<SaleId> = orders.iter().map(|(_, order)| order.sale_id).collect();
    let buyers: Vec<BuyerId> = orders.iter().map(|(_, order)| order.buyer_id).collect();
    let keys: Vec<&str> = orders.iter().map(|(_, order)| order.request_key.as_str()).collect();
    let stock: Vec<(SaleId, i64)> = sqlx::query_as(
        "select id, stock
           from sale
          where id = any($1)",
    )
    .bind(&sales)
    .fetch_all(&mut **tx)
    .await?;
    let rows: Vec<(Uuid, SaleId, BuyerId, String, bool)> = sqlx::query_as(
        "select r.id, r.sale_id, r.buyer_id, r.request_key, r.status = 'confirmed'
           from unnest($1::bigint[], $2::bigint[]) as o (sale_id, buyer_id)
           join reservation r using (sale_id, buyer_id)
          union
         select r.id, r.sale_id, r.buyer_id, r.request_key, r.status = 'confirmed'
           from unnest($1::bigint[], $3::text[]) as o (sale_id, request_key)
           join reservation r using (sale_id, request_key)",
    )
    .bind(&sales)
    .bind(&buyers)
    .bind(&keys)
    .fetch_all(&mut **tx)
    .await?;
    let mut before = Before {
        stock: stock.into_iter().collect(),
        decided: HashSet::new(),
        tickets: HashMap::new(),
        keys: HashMap::new(),
    };
    for (id, sale, buyer, key, confirmed) in rows {
        before.decided.insert(id);
        before.keys.entry((sale, key)).or_insert(buyer);
        if confirmed {
            before.tickets.insert((sale, buyer), id);
        }
    }
    Ok(before)
}

/// Writes what was decided, and takes the tickets.
async fn write(tx: &mut PgTransaction<'_>, decisions: &[Decision]) -> Result<(), ReserveError> {
    let mut taken: HashMap<SaleId, i64> = HashMap::new();
    for (order, _) in decisions.iter().filter(|(_, refused)| refused.is_none()) {
        *taken.entry(order.sale_id).or_default() += 1;
    }
    let (sales, counts): (Vec<SaleId>, Vec<i64>) = taken.into_iter().unzip();
    sqlx::query(
        "update sale
            set stock = stock - taken.count
           from unnest($1::bigint[], $2::bigint[]) as taken (sale_id, count)
          where id = taken.sale_id",
    )
    .bind(sales)
    .bind(counts)
    .execute(&mut **tx)
    .await?;

    let orders = || decisions.iter().map(|(order, _)| order);
    let reasons: Vec<Reason> = decisions.iter().map(|&(_, refused)| refused.into()).collect();
    sqlx::query(
        "insert into reservation (id, sale_id, buyer_id, request_key, status, reason, earlier)
            select *
              from unnest($1::uuid[], $2::bigint[], $3::bigint[], $4::text[], $5::text[], $6::text[], $7::uuid[])",
    )
    .bind(orders().map(|order| order.id).collect::<Vec<_>>())
    .bind(orders().map(|order| order.sale_id).collect::<Vec<_>>())
    .bind(orders().map(|order| order.buyer_id).collect::<Vec<_>>())
    .bind(orders().map(|order| order.request_key.as_str()).collect::<Vec<_>>())
    .bind(reasons.iter().map(|reason| reason.status).collect::<Vec<_>>())
    .bind(reasons.iter().map(|reason| reason.reason).collect::<Vec<_>>())
    .bind(reasons.iter().map(|reason| reason.earlier).collect::<Vec<_>>())
    .execute(&mut **tx)
    .await?;
    Ok(())
}

/// Puts the news into the outbox. In the transaction of the rows: they are all there, or none is.
async fn tell(tx: &mut PgTransaction<'_>, decisions: &[Decision]) -> Result<(), ReserveError> {
    let ids: Vec<Uuid> = decisions.iter().map(|(order, _)| order.id).collect();
    sqlx::query("insert into outbox (reservation_id) select unnest($1::uuid[])")
        .bind(&ids)
        .execute(&mut **tx)
        .await?;
    sqlx::query("select pg_notify($1, named) from unnest($2::text[]) as named")
        .bind(DECIDED)
        .bind(announcements(&ids))
        .execute(&mut **tx)
        .await?;
    Ok(())
}

#[async_trait]
impl Reserve for SingleWriter {
    async fn reserve(&self, order: &Order, steps: &Steps) -> Result<Outcome, ReserveError> {
        // ANCHOR: accept
        self.path.knows(order.sale).await?;
        let id = self.path.ids.id(order);
        let message = OrderMessage::new(id, order).to_bytes();
        steps.at("order checked").await;

        // By its sale: all orders of a sale lie in one partition, in the order in which the broker wrote them.
        let sale = order.sale.to_be_bytes();
        let record = FutureRecord::to(&self.path.topic).key(&sale).payload(&message);
        let sent = self.path.producer.send(record, Duration::ZERO).await;
        sent.map_err(|(why, _)| Undelivered(why))?;
        steps.at("acknowledged").await;
        Ok(Outcome::Accepted(Reservation { id }))
        // ANCHOR_END: accept
    }

    async fn ready(&self) -> Result<(), ReserveError> {
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
