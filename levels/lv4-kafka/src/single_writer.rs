//! One writer for each sale: all orders of a sale are in one partition, and a partition has one
//! consumer.
//!
//! So no lock is needed. The messages that have arrived are one batch: its state is read, its
//! orders are decided in memory in the order of the partition, and the rows are written in one
//! transaction, which also advances the partition's offset in the database. A lock costs a round
//! trip for every order; a batch costs one transaction, and it grows with the backlog.
//!
//! "A partition has one consumer" is what Kafka's group assigns, not what it can enforce: a
//! consumer that was frozen for longer than its session resumes and still believes that it owns the
//! partition. Its transaction advances the offset from the value it has read. By then the offset
//! has moved, the update matches no row, and the transaction is rolled back. The offset is the
//! fence.
//!
//! It is no more than that. Whether an order was decided is known from its row only: a recreated
//! topic counts from zero again, and a restored database lags behind the committed offsets.
//!
//! With `PAYMENT_URL` a ticket is held first, and may come back ([`saga`]). That is a message
//! in the same partition, so this is still the only place that changes a stock. Nothing here relies
//! on a stock that never rises: the stock is read in the transaction of each batch. An order that
//! was refused stays refused, though a ticket comes back later; its buyer may order again.
//!
//! With `ORDER_PRIORITY` the orders of VIPs are in a second topic, and are decided first. A sale has
//! the same partition number in both, and one consumer owns both partitions (`priority.rs`); a batch
//! moves the offsets of both, so both together are the fence.
//!
//! Guarantee: keeps every invariant except the order of arrival, on any number of instances. Orders
//! are decided in the order in which the broker appended them.
//!
//! Limits: the orders of a sale are processed by one consumer; more instances help only with more
//! sales. `pg_notify` takes a lock that is global to the Postgres server and held until the commit
//! is durable, so consumers commit one after another.
//!
//! Apache Kafka documentation, 4.6 "Message Delivery Semantics" (storing the offset with the
//! output). Book: LV.4, "single-writer".

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, HashSet},
    sync::Arc,
    time::Duration,
};

use async_trait::async_trait;
use box_office::{
    BuyerId, Event, Indeterminate, Open, Order, Outcome, Refusal, Reservation, Reserve, ReserveError, SaleId, Steps,
    StrategyContext, Transaction, api,
};
use rdkafka::producer::FutureRecord;
use uuid::Uuid;

use crate::{
    decision_row::DecisionRow,
    pipeline::{
        Admission, Backoff, ConsumedMessage, NOTIFY_CHANNEL, OrderConsumer, OrderMessage, OrderPartition,
        OrderPipeline, Partitioning, PoisonMessage, consumer_config, notify_payloads,
    },
    saga::{self, Sagas},
};

/// The maximum number of messages of a batch.
const MAX_BATCH: usize = 2000;

/// The same with priority: a VIP waits for the batch that has been begun.
const MAX_BATCH_WITH_PRIORITY: usize = 200;

/// Processes the orders of a partition in batches, one transaction each.
#[derive(Clone)]
pub struct SingleWriter {
    pipeline: Arc<OrderPipeline>,
    /// `None`: tickets are confirmed as soon as they are taken.
    sagas: Option<Arc<Sagas>>,
}

/// The state of the database on which a batch is decided.
struct BatchState {
    /// The tickets left of each sale.
    stock: HashMap<SaleId, i64>,
    /// The orders that have a row.
    decided: HashSet<Uuid>,
    /// The reservation of each buyer who has a ticket.
    tickets: HashMap<(SaleId, BuyerId), Uuid>,
    /// The buyer of each request key.
    keys: HashMap<(SaleId, String), BuyerId>,
}

impl BatchState {
    /// Whether the sale exists and the order is not decided.
    fn is_pending(&self, order: &OrderMessage) -> bool {
        self.stock.contains_key(&order.sale_id) && !self.decided.contains(&order.id)
    }
}

/// An offset of each partition of a batch.
type Offsets = BTreeMap<OrderPartition, i64>;

/// The first offset of each partition of a batch, and the offset behind its last.
fn offsets(batch: &[ConsumedMessage]) -> (Offsets, Offsets) {
    let (mut first, mut next) = (Offsets::new(), Offsets::new());
    for message in batch {
        first.entry(message.partition).or_insert(message.offset);
        next.insert(message.partition, message.offset + 1);
    }
    (first, next)
}

/// An order and its refusal, or `None`: it gets a ticket.
type Decision = (OrderMessage, Option<Refusal>);

impl Open for SingleWriter {
    async fn open(context: StrategyContext) -> anyhow::Result<Self> {
        let pipeline = OrderPipeline::open(context, Partitioning::BySale).await?;
        let sagas = Sagas::start(&pipeline)?;
        let writer = Self { pipeline, sagas };
        writer.start_consumers()?;
        Ok(writer)
    }
}

impl SingleWriter {
    fn start_consumers(&self) -> anyhow::Result<()> {
        for number in 1..=self.pipeline.kafka.consumers {
            let mut config = consumer_config(&self.pipeline.kafka);
            config.set("enable.auto.commit", "false");
            let consumer = self.pipeline.subscribe(&config)?;
            let steps = self
                .pipeline
                .context
                .instrumentation
                .steps(&format!("consumer {number}"));
            self.pipeline
                .spawn_consumer(consumer.joined(), self.clone().run_consumer(consumer, steps));
        }
        Ok(())
    }

    // ANCHOR: loop
    /// Processes batches until shutdown.
    async fn run_consumer(self, consumer: OrderConsumer, steps: Steps) {
        let mut backoff = Backoff::default();
        while let Some(arrived) = consumer.poll_batch(self.max_batch(), &self.pipeline.stop).await {
            // By their numbers: with priority, a sale has messages of two topics in one batch.
            let mut batches: BTreeMap<i32, Vec<ConsumedMessage>> = BTreeMap::new();
            for message in arrived {
                batches.entry(message.partition.number).or_default().push(message);
            }
            let mut retry_from = Offsets::new();
            for (number, batch) in batches {
                if self.pipeline.stop.is_cancelled() {
                    break; // messages not begun are redelivered to the partition's next owner
                }
                let (first, next) = offsets(&batch);
                let processed = self.process(number, batch, &consumer, &steps);
                match self.pipeline.on_postgres(processed).await {
                    Ok(resume_at) if resume_at == next => {
                        for (partition, next) in next {
                            consumer.commit_offset(partition, next);
                            self.pipeline.dead_letters.forget_below(partition, next);
                        }
                        steps.at("offsets committed").await;
                    }
                    Ok(resume_at) => retry_from.extend(resume_at),
                    Err(why) => {
                        self.pipeline.log_retry(&why);
                        retry_from.extend(first);
                    }
                }
            }
            if retry_from.is_empty() {
                backoff.reset();
            } else if self.pipeline.postgres_is_away() {
                let back = self.pipeline.postgres_is_back();
                consumer.pause_until(retry_from, back, &self.pipeline.stop).await;
            } else {
                consumer
                    .seek_back(retry_from, backoff.next_delay(), &self.pipeline.stop)
                    .await;
            }
        }
        consumer.close().await;
    }
    // ANCHOR_END: loop

    fn max_batch(&self) -> usize {
        match self.pipeline.context.improvements.order_priority {
            None => MAX_BATCH,
            Some(_) => MAX_BATCH_WITH_PRIORITY,
        }
    }

    // ANCHOR: process
    /// Processes a batch of the partitions of one number in one transaction. Returns the offsets at
    /// which to resume: after the batch, or further back.
    ///
    /// # Errors
    /// [`Indeterminate`](ReserveError::Indeterminate) if the batch must be retried.
    async fn process(
        &self,
        number: i32,
        mut batch: Vec<ConsumedMessage>,
        consumer: &OrderConsumer,
        steps: &Steps,
    ) -> Result<Offsets, ReserveError> {
        steps.at("batch taken").saw(batch.len()).await;
        let (first, next) = offsets(&batch);
        let mut fences = Offsets::new();
        for &priority in self.pipeline.priorities() {
            let partition = OrderPartition { priority, number };
            fences.insert(partition, self.next_offset(partition, consumer).await?);
        }
        if let Some(resume_at) = missed(&fences, &first, consumer) {
            return Ok(resume_at);
        }

        let releases = saga::take_releases(&mut batch, &self.pipeline.ids);
        let orders = self.orders(batch).await?;
        let mut tx = self.pipeline.context.begin().await?;
        if !releases.is_empty() && !self.lock_offsets(&mut tx, &fences).await? {
            return Ok(first);
        }
        // First: what comes back may be taken by an order of the same batch.
        saga::release(&mut tx, &releases).await?;
        let state = read(&mut tx, &orders).await?;
        steps.at("state read").await;
        // Orders below the fence are decided, and only their commit to Kafka is missing. Their ids
        // prove it, not their offsets: a recreated topic, or a broker that has lost the end of its
        // log, reuses offsets.
        let reused = orders
            .iter()
            .filter(|(message, order)| message.offset < fences[&message.partition] && state.is_pending(order));
        let reused: BTreeSet<OrderPartition> = reused.map(|(message, _)| message.partition).collect();
        if !reused.is_empty() {
            tracing::error!(
                ?first,
                ?fences,
                "offsets are reused: the topic was recreated, or its log truncated; orders below the database's offset are decided all the same"
            );
        }
        let decisions = self.decide_batch(state, orders).await?;
        let granted = self.granted();
        steps.at("batch decided").saw(decisions.len()).await;
        self.pipeline.context.simulate_work().await;

        // With priority both, in this order: also that of a topic from which nothing has come.
        for (partition, fence) in fences {
            let moved = sqlx::query(
                "update partition_offset
                    set next_offset = $4
                  where topic = $1
                    and partition = $2
                    and next_offset = $3",
            )
            .bind(self.pipeline.topics.of(partition.priority))
            .bind(partition.number)
            .bind(fence)
            .bind(match next.get(&partition) {
                None => fence,
                Some(&next) if reused.contains(&partition) => next,
                Some(&next) => fence.max(next),
            })
            .execute(&mut *tx)
            .await?;
            if moved.rows_affected() == 0 {
                tracing::warn!(%partition, fence, "fenced: another consumer has processed orders of these sales");
                return Ok(first);
            }
        }
        write(&mut tx, &decisions, granted).await?;
        self.hold(&mut tx, &decisions).await?;
        append_to_outbox(&mut tx, &decisions, granted).await?;
        if self.pipeline.vips.is_some() {
            record_order(&mut tx, &decisions, &self.pipeline).await?;
        }
        steps.at("rows written").await;
        tx.commit().await?;
        self.sagas.iter().for_each(|sagas| sagas.wake());
        steps.at("committed").await;
        let expired = decisions
            .iter()
            .filter(|(_, refused)| *refused == Some(Refusal::Expired));
        self.pipeline.count_expired(expired.count());
        self.count_decided(&decisions);
        Ok(next)
    }
    // ANCHOR_END: process

    // ANCHOR: next-offset
    /// The next offset of a partition to process, as the database has it. Of a new partition: its
    /// log start offset.
    async fn next_offset(&self, partition: OrderPartition, consumer: &OrderConsumer) -> Result<i64, ReserveError> {
        let topic = self.pipeline.topics.of(partition.priority);
        let next = sqlx::query_scalar(
            "select next_offset
               from partition_offset
              where topic = $1
                and partition = $2",
        )
        .bind(topic)
        .bind(partition.number)
        .fetch_optional(&self.pipeline.context.database)
        .await
        // For a consumer, a pool without a connection is no load: Postgres is away.
        .map_err(|why| Indeterminate::BackendAway(why.into()))?;
        if let Some(next) = next {
            return Ok(next);
        }
        let earliest = consumer.log_start_offset(partition).await?;
        sqlx::query(
            "insert into partition_offset (topic, partition, next_offset)
             values ($1, $2, $3)
                 on conflict do nothing",
        )
        .bind(topic)
        .bind(partition.number)
        .bind(earliest)
        .execute(&self.pipeline.context.database)
        .await?;
        Ok(earliest)
    }
    // ANCHOR_END: next-offset

    /// Counts decisions by priority, if there is any.
    fn count_decided(&self, decisions: &[Decision]) {
        let Some(metrics) = &self.pipeline.context.metrics.priority else {
            return;
        };
        for (order, _) in decisions {
            if let Some((partition, _)) = order.read_from {
                metrics.count_decided(partition.priority, 1);
            }
        }
    }

    /// Locks the offsets, before a release locks the sale. A batch without releases locks them in
    /// the same order: in opposite orders, a consumer that is fenced and its successor would
    /// deadlock. Returns whether this consumer is not fenced.
    async fn lock_offsets(&self, tx: &mut Transaction, fences: &Offsets) -> Result<bool, ReserveError> {
        for (partition, fence) in fences {
            let locked = sqlx::query(
                "select
                   from partition_offset
                  where topic = $1
                    and partition = $2
                    and next_offset = $3
                    for update",
            )
            .bind(self.pipeline.topics.of(partition.priority))
            .bind(partition.number)
            .bind(fence)
            .execute(&mut **tx)
            .await?;
            if locked.rows_affected() == 0 {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// The first status of an order that gets a ticket.
    fn granted(&self) -> &'static str {
        match self.sagas {
            None => "confirmed",
            Some(_) => api::Reservation::HELD,
        }
    }

    /// Begins the sagas of the tickets that were taken, if tickets are held.
    async fn hold(&self, tx: &mut Transaction, decisions: &[Decision]) -> Result<(), ReserveError> {
        let Some(sagas) = &self.sagas else {
            return Ok(());
        };
        let held = decisions.iter().filter(|(_, refused)| refused.is_none());
        let held: Vec<_> = held
            .map(|(order, _)| (order.id, order.sale_id, order.buyer_id))
            .collect();
        sagas.hold(tx, &held).await
    }

    /// Decodes the orders of a batch. Poison messages are dead-lettered.
    async fn orders(&self, batch: Vec<ConsumedMessage>) -> Result<Vec<(ConsumedMessage, OrderMessage)>, ReserveError> {
        let mut orders = Vec::with_capacity(batch.len());
        for message in batch {
            match message.order(&self.pipeline.ids) {
                Ok(order) => orders.push((message, order)),
                Err(poison) => self.pipeline.dead_letters.dead_letter(&message, &poison).await?,
            }
        }
        Ok(orders)
    }

    // ANCHOR: decide_batch
    /// Decides the orders one after another, in the order of the partition. No other consumer
    /// decides orders of these sales.
    async fn decide_batch(
        &self,
        mut state: BatchState,
        orders: Vec<(ConsumedMessage, OrderMessage)>,
    ) -> Result<Vec<Decision>, ReserveError> {
        let mut decisions = Vec::with_capacity(orders.len());
        for (message, order) in orders {
            let sale = order.sale_id;
            let Some(stock) = state.stock.get_mut(&sale) else {
                let poison = PoisonMessage::UnknownSale(sale);
                self.pipeline.dead_letters.dead_letter(&message, &poison).await?;
                continue;
            };
            if !state.decided.insert(order.id) {
                continue; // redelivered, replayed or repeated by the buyer: an order is decided once
            }
            let key_of = state.keys.entry((sale, order.request_key.to_string()));
            let key_of = *key_of.or_insert(order.buyer_id);
            let refused = match state.tickets.get(&(sale, order.buyer_id)) {
                _ if self.pipeline.is_expired(&order) => Some(Refusal::Expired),
                _ if key_of != order.buyer_id => Some(Refusal::KeyOfAnotherBuyer),
                Some(&id) => Some(Refusal::AlreadyReserved {
                    earlier: Reservation { id },
                }),
                None if *stock <= 0 => Some(Refusal::SoldOut),
                None => {
                    *stock -= 1;
                    state.tickets.insert((sale, order.buyer_id), order.id);
                    None
                }
            };
            decisions.push((order, refused));
        }
        Ok(decisions)
    }
    // ANCHOR_END: decide_batch
}

/// The offsets at which to resume, if the database lacks messages before a batch. `None`: it lacks
/// none that the topics still have.
///
/// Those in between have no rows here, whatever the group has committed: this database was restored
/// from a backup, or is a replica that lacked the last transactions when it was promoted.
fn missed(fences: &Offsets, first: &Offsets, consumer: &OrderConsumer) -> Option<Offsets> {
    let mut resume_at = first.clone();
    for (&partition, &first) in first {
        let fence = fences[&partition];
        if fence < first && !consumer.has_rewound_to(partition, fence) {
            tracing::warn!(
                %partition,
                next_offset = fence,
                first_offset = first,
                "the database's offset is behind this batch: seeking back to it"
            );
            resume_at.insert(partition, fence);
        } else if fence < first {
            tracing::error!(
                %partition,
                next_offset = fence,
                first_offset = first,
                "DATA LOSS: the messages from the database's offset to this batch were never processed, and the topic no longer has them"
            );
        }
    }
    (resume_at != *first).then_some(resume_at)
}

/// Reads the state on which the orders of a batch depend.
async fn read(tx: &mut Transaction, orders: &[(ConsumedMessage, OrderMessage)]) -> Result<BatchState, ReserveError> {
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
        "select r.id, r.sale_id, r.buyer_id, r.request_key, r.status in ('confirmed', 'held')
           from unnest($1::bigint[], $2::bigint[]) as o (sale_id, buyer_id)
           join reservation r using (sale_id, buyer_id)
          union
         select r.id, r.sale_id, r.buyer_id, r.request_key, r.status in ('confirmed', 'held')
           from unnest($1::bigint[], $3::text[]) as o (sale_id, request_key)
           join reservation r using (sale_id, request_key)",
    )
    .bind(&sales)
    .bind(&buyers)
    .bind(&keys)
    .fetch_all(&mut **tx)
    .await?;
    let mut state = BatchState {
        stock: stock.into_iter().collect(),
        decided: HashSet::new(),
        tickets: HashMap::new(),
        keys: HashMap::new(),
    };
    for (id, sale, buyer, key, has_ticket) in rows {
        state.decided.insert(id);
        state.keys.entry((sale, key)).or_insert(buyer);
        if has_ticket {
            state.tickets.insert((sale, buyer), id);
        }
    }
    Ok(state)
}

/// Writes the decisions, and takes the tickets off the stock.
async fn write(tx: &mut Transaction, decisions: &[Decision], granted: &'static str) -> Result<(), ReserveError> {
    let mut sold: HashMap<SaleId, i64> = HashMap::new();
    for (order, _) in decisions.iter().filter(|(_, refused)| refused.is_none()) {
        *sold.entry(order.sale_id).or_default() += 1;
    }
    let (sales, counts): (Vec<SaleId>, Vec<i64>) = sold.into_iter().unzip();
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
    let reasons = decisions.iter().map(|&(_, refused)| DecisionRow::new(refused, granted));
    let reasons: Vec<DecisionRow> = reasons.collect();
    sqlx::query(
        "insert into reservation (id, sale_id, buyer_id, request_key, status, reason, earlier)
            select id, sale_id, buyer_id, request_key, status, reason, earlier
              from unnest($1::uuid[], $2::bigint[], $3::bigint[], $4::text[], $5::text[], $6::text[], $7::uuid[])
                as decided (id, sale_id, buyer_id, request_key, status, reason, earlier)",
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

/// Records where each order stood in its topic, in the order of the decisions: the record by which the
/// judge checks that order.
async fn record_order(
    tx: &mut Transaction,
    decisions: &[Decision],
    pipeline: &OrderPipeline,
) -> Result<(), ReserveError> {
    let orders = decisions.iter().map(|(order, _)| order);
    let places = orders.filter_map(|order| order.read_from.map(|(partition, offset)| (order.id, partition, offset)));
    let places: Vec<(Uuid, OrderPartition, i64)> = places.collect();
    let topic = |partition: &OrderPartition| pipeline.topics.of(partition.priority);
    sqlx::query(
        "insert into decision (reservation_id, topic, partition, log_offset)
            select *
              from unnest($1::uuid[], $2::text[], $3::integer[], $4::bigint[])",
    )
    .bind(places.iter().map(|(id, ..)| *id).collect::<Vec<_>>())
    .bind(
        places
            .iter()
            .map(|(_, partition, _)| topic(partition))
            .collect::<Vec<_>>(),
    )
    .bind(
        places
            .iter()
            .map(|(_, partition, _)| partition.number)
            .collect::<Vec<_>>(),
    )
    .bind(places.iter().map(|(.., offset)| *offset).collect::<Vec<_>>())
    .execute(&mut **tx)
    .await?;
    Ok(())
}

/// Appends the events to the outbox, in the transaction of the rows: all are stored, or none is.
async fn append_to_outbox(tx: &mut Transaction, decisions: &[Decision], granted: &str) -> Result<(), ReserveError> {
    // Only the event of a ticket that is held is not the last of its order.
    let is_held = |refused: &Option<Refusal>| refused.is_none() && granted == api::Reservation::HELD;
    let statuses = decisions.iter().map(|(_, refused)| is_held(refused).then_some(granted));
    let statuses: Vec<Option<&str>> = statuses.collect();
    let ids: Vec<Uuid> = decisions.iter().map(|(order, _)| order.id).collect();
    append_events(tx, &ids, &statuses).await
}

/// Appends an event for each of these reservations, and notifies all instances once the transaction is
/// committed. An event without a status reports the row's own.
///
/// # Errors
/// The error of the database.
pub(crate) async fn append_events(
    tx: &mut Transaction,
    ids: &[Uuid],
    statuses: &[Option<&str>],
) -> Result<(), ReserveError> {
    sqlx::query("insert into outbox (reservation_id, status) select * from unnest($1::uuid[], $2::text[])")
        .bind(ids)
        .bind(statuses)
        .execute(&mut **tx)
        .await?;
    sqlx::query("select pg_notify($1, named) from unnest($2::text[]) as named")
        .bind(NOTIFY_CHANNEL)
        .bind(notify_payloads(ids))
        .execute(&mut **tx)
        .await?;
    Ok(())
}

#[async_trait]
impl Reserve for SingleWriter {
    async fn reserve(&self, order: &Order, steps: &Steps) -> Result<Outcome, ReserveError> {
        // ANCHOR: accept
        let id = self.pipeline.ids.for_order(order);
        let accepted = Outcome::Accepted(Reservation { id });
        if self.pipeline.admit(order, id).await? == Admission::Repeat {
            return Ok(accepted);
        }
        let message = OrderMessage::new(id, order).to_bytes();
        steps.at("order checked").await;

        // Keyed by its sale: all orders of a sale are in one partition, in the order in which the
        // broker appended them.
        let sale = order.sale.to_be_bytes();
        let topic = self.pipeline.topics.of(order.priority);
        let record = FutureRecord::to(topic).key(&sale).payload(&message);
        let delivered = self.pipeline.send(record).await?;
        steps.at("acknowledged").await;
        if let Some(ttl) = &self.pipeline.ttl {
            ttl.remember_partition(order.sale, delivered.partition);
        }
        self.pipeline.remember_accepted(id);
        Ok(accepted)
        // ANCHOR_END: accept
    }

    async fn ready(&self) -> Result<(), ReserveError> {
        self.pipeline.ready().await
    }

    fn accepted(&self, id: Uuid) -> bool {
        self.pipeline.ids.verify(id)
    }

    async fn events(&self, id: Uuid, after: i64, timeout: Duration) -> Result<Option<Vec<Event>>, ReserveError> {
        self.pipeline.outbox.events_after(id, after, timeout).await.map(Some)
    }

    async fn cancel(&self, id: Uuid) -> Result<bool, ReserveError> {
        saga::cancel(&self.pipeline.context.database, id).await
    }

    async fn name_vips(&self, sale: SaleId, buyers: &[BuyerId]) -> Result<(), ReserveError> {
        match &self.pipeline.vips {
            Some(vips) => vips.name(sale, buyers).await,
            None => Ok(()),
        }
    }

    async fn close(&self) {
        self.pipeline.close().await;
    }

    async fn decidable(&self) -> Result<(), ReserveError> {
        self.pipeline.decidable().await
    }
}
