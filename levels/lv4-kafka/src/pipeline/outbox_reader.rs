//! The outbox: delivers the events of orders to the clients that wait for them, from stored state.
//! Any instance can deliver them, whichever one accepted or decided the order.

use std::{collections::HashMap, io, mem, time::Duration};

use box_office::{CauseLog, Database, Event, Indeterminate, ReserveError, api};
use sqlx::{
    Acquire, ConnectOptions, Connection, Executor,
    postgres::{PgConnectOptions, PgListener, PgNotification, PgPoolOptions},
};
use tokio::{
    sync::{mpsc, oneshot},
    time::{Instant, sleep, timeout},
};
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

/// The `LISTEN`/`NOTIFY` channel of the outbox. The payload of a notification is the ids of the
/// decided orders, separated by commas.
pub const NOTIFY_CHANNEL: &str = "decided";

/// The interval at which the outbox is polled for all waiting clients: a notification is lost if
/// the connection breaks.
const POLL_INTERVAL: Duration = Duration::from_secs(1);

/// The delay before the connection is retried.
const RECONNECT_DELAY: Duration = Duration::from_millis(100);

/// How long the listening connection may be quiet until it is probed: nothing arrives while no
/// order is decided, so silence does not tell a quiet connection from a dead one.
const PROBE_AFTER: Duration = Duration::from_secs(2);

/// The timeout of every answer on the listening connection.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(5);

/// The capacity of the queues of new waiters and of notifications.
const QUEUE_CAPACITY: usize = 1024;

/// Splits ids into the payloads of notifications: Postgres limits each to 8,000 bytes.
pub fn notify_payloads(ids: &[Uuid]) -> Vec<String> {
    const MAX_IDS: usize = 200;
    let join = |ids: &[Uuid]| ids.iter().map(Uuid::to_string).collect::<Vec<_>>().join(",");
    ids.chunks(MAX_IDS).map(join).collect()
}

/// Reads the outbox for all clients of this instance that wait for an event: one query serves them
/// all.
pub struct OutboxReader {
    new_waiters: mpsc::Sender<Waiter>,
}

struct Waiter {
    id: Uuid,
    /// The number of the last event that the client has seen.
    after: i64,
    reply: oneshot::Sender<Vec<Event>>,
}

/// An event as it is stored.
#[derive(sqlx::FromRow)]
pub(super) struct Row {
    pub(super) number: i64,
    #[sqlx(flatten)]
    pub(super) reservation: api::Reservation,
}

impl OutboxReader {
    /// Starts to listen for notifications, on a connection outside the pool, until `stop` is
    /// cancelled.
    ///
    /// # Errors
    /// If the connection cannot be opened.
    pub async fn open(database: &Database, stop: CancellationToken) -> sqlx::Result<Self> {
        let connect = (*database.pool().connect_options()).clone();
        let listener = open_listener(&connect).await?;
        let (new_waiters, waiters) = mpsc::channel(QUEUE_CAPACITY);
        let (sender, notifications) = mpsc::channel(QUEUE_CAPACITY);
        let serving = serve(database.clone(), notifications, waiters);
        tokio::spawn(async move {
            // Two tasks: a new waiter must not cancel a listener that is reconnecting.
            let listening = tokio::spawn(listen(listener, connect, sender));
            stop.run_until_cancelled(serving).await;
            listening.abort();
        });
        Ok(Self { new_waiters })
    }

    /// The events of an order with a number above `after`. If there is none yet, waits for one; the
    /// result is empty after `timeout`.
    ///
    /// # Errors
    /// [`Indeterminate::TimedOut`] if this instance is shutting down or cannot read the outbox.
    pub async fn events_after(&self, id: Uuid, after: i64, timeout: Duration) -> Result<Vec<Event>, ReserveError> {
        let (reply, events) = oneshot::channel();
        let waiting = async {
            self.new_waiters.send(Waiter { id, after, reply }).await.ok()?;
            events.await.ok()
        };
        match tokio::time::timeout(timeout, waiting).await {
            Ok(Some(events)) => Ok(events),
            Ok(None) => Err(Indeterminate::TimedOut.into()),
            Err(_) => Ok(vec![]),
        }
    }
}

/// What the listener reports.
enum Notification {
    /// These orders were decided.
    Decided(Vec<Uuid>),
    /// The connection was lost, and perhaps notifications with it.
    ConnectionLost,
}

/// Forwards the notifications, and reconnects when the connection is lost.
async fn listen(mut listener: PgListener, connect: PgConnectOptions, notifications: mpsc::Sender<Notification>) {
    let causes = CauseLog::default();
    loop {
        let notification = match next(&mut listener).await {
            Ok(notification) => {
                let ids = notification.payload().split(',').filter_map(|id| id.parse().ok());
                Notification::Decided(ids.collect())
            }
            Err(why) => {
                causes.warn("listening for decided orders was interrupted", &why);
                listener = reopened(listener, &connect, &causes).await;
                Notification::ConnectionLost
            }
        };
        if notifications.send(notification).await.is_err() {
            return;
        }
    }
}

/// Waits for the next notification.
///
/// # Errors
/// If the connection is lost, or no longer answers.
async fn next(listener: &mut PgListener) -> sqlx::Result<PgNotification> {
    loop {
        match timeout(PROBE_AFTER, listener.try_recv()).await {
            Ok(Ok(Some(notification))) => return Ok(notification),
            Ok(Ok(None)) => return Err(io::Error::from(io::ErrorKind::ConnectionAborted).into()),
            Ok(Err(why)) => return Err(why),
            Err(_) => in_time(listener.execute("select 1")).await.map(drop)?,
        }
    }
}

/// Opens a connection that listens, outside the pool of the requests: one that is kept for good
/// would be missing there.
async fn open_listener(connect: &PgConnectOptions) -> sqlx::Result<PgListener> {
    let pool = PgPoolOptions::new()
        .max_connections(1)
        .max_lifetime(None)
        .idle_timeout(None);
    let pool = in_time(pool.connect_with(connect.clone())).await?;
    let mut listener = in_time(PgListener::connect_with(&pool)).await?;
    // `reopened` does it.
    listener.eager_reconnect(false);
    in_time(listener.listen(NOTIFY_CHANNEL)).await?;
    Ok(listener)
}

/// Replaces a listener whose connection is lost or silent.
async fn reopened(mut old: PgListener, connect: &PgConnectOptions, causes: &CauseLog) -> PgListener {
    loop {
        match reopen(&mut old, connect).await {
            Ok(listener) => return listener,
            Err(why) => {
                causes.warn("listening for decided orders failed and will be retried", &why);
                sleep(RECONNECT_DELAY).await;
            }
        }
    }
}

async fn reopen(old: &mut PgListener, connect: &PgConnectOptions) -> sqlx::Result<PgListener> {
    // A dropped listener waits for the answer to `unlisten`, on a silent connection for ever. So
    // its connection is closed here, and it gets another one for that.
    let mut silent = in_time(connect.connect()).await?;
    mem::swap(in_time(old.acquire()).await?, &mut silent);
    silent.close_hard().await?;
    open_listener(connect).await
}

/// Limits an answer to [`ANSWER_TIMEOUT`].
async fn in_time<T>(answer: impl Future<Output = sqlx::Result<T>>) -> sqlx::Result<T> {
    let answered = timeout(ANSWER_TIMEOUT, answer).await;
    answered.unwrap_or_else(|_| Err(io::Error::from(io::ErrorKind::TimedOut).into()))
}

/// Reads the outbox for all waiters at once: for new ones, for those whose order was named in a
/// notification, and at each interval for all.
async fn serve(
    database: Database,
    mut notifications: mpsc::Receiver<Notification>,
    mut new_waiters: mpsc::Receiver<Waiter>,
) {
    let causes = CauseLog::default();
    let mut waiting: HashMap<Uuid, Vec<Waiter>> = HashMap::new();
    let mut poll_all_at = Instant::now() + POLL_INTERVAL;
    loop {
        let mut due: Vec<Uuid> = vec![];
        let mut received = None;
        tokio::select! {
            waiter = new_waiters.recv() => match waiter {
                None => return,
                Some(waiter) => add(&mut waiting, &mut due, waiter),
            },
            Some(notification) = notifications.recv() => received = Some(notification),
            () = tokio::time::sleep_until(poll_all_at) => {}
        }
        while let Ok(waiter) = new_waiters.try_recv() {
            add(&mut waiting, &mut due, waiter);
        }
        while let Some(notification) = received.take().or_else(|| notifications.try_recv().ok()) {
            match notification {
                Notification::Decided(ids) => due.extend(ids),
                Notification::ConnectionLost => poll_all_at = Instant::now(),
            }
        }
        if poll_all_at <= Instant::now() {
            poll_all_at = Instant::now() + POLL_INTERVAL;
            // Clients that have disconnected are removed here.
            waiting.retain(|_, waiters| {
                waiters.retain(|waiter| !waiter.reply.is_closed());
                !waiters.is_empty()
            });
            due.extend(waiting.keys());
        }
        due.retain(|id| waiting.contains_key(id));
        if !due.is_empty() {
            match read(&database, &due).await {
                Ok(events) => deliver(&mut waiting, events),
                Err(why) => {
                    causes.warn("the outbox cannot be read; waiting clients are disconnected", &why);
                    for id in due {
                        waiting.remove(&id);
                    }
                }
            }
        }
    }
}

fn add(waiting: &mut HashMap<Uuid, Vec<Waiter>>, due: &mut Vec<Uuid>, waiter: Waiter) {
    due.push(waiter.id);
    waiting.entry(waiter.id).or_default().push(waiter);
}

// ANCHOR: read
/// Reads the events of these orders from the outbox, by number.
async fn read(database: &Database, ids: &[Uuid]) -> sqlx::Result<HashMap<Uuid, Vec<Event>>> {
    let rows: Vec<Row> = sqlx::query_as(
        "select outbox.number,
                reservation.id,
                reservation.sale_id,
                reservation.buyer_id,
                coalesce(outbox.status, reservation.status) as status,
                reservation.reason,
                reservation.earlier
           from outbox
           join reservation on reservation.id = outbox.reservation_id
          where outbox.reservation_id = any($1)
          order by outbox.number",
    )
    .bind(ids)
    .fetch_all(database)
    .await?;
    let mut events: HashMap<Uuid, Vec<Event>> = HashMap::new();
    for Row { number, reservation } in rows {
        events
            .entry(reservation.id)
            .or_default()
            .push(Event { number, reservation });
    }
    Ok(events)
}
// ANCHOR_END: read

/// Sends each waiter the events that are new to it. The others keep waiting.
fn deliver(waiting: &mut HashMap<Uuid, Vec<Waiter>>, events: HashMap<Uuid, Vec<Event>>) {
    for (id, events) in events {
        let Some(waiters) = waiting.remove(&id) else { continue };
        let mut remaining = vec![];
        for waiter in waiters {
            let new: Vec<Event> = events
                .iter()
                .filter(|event| event.number > waiter.after)
                .cloned()
                .collect();
            if new.is_empty() {
                remaining.push(waiter);
            } else {
                // A client that has disconnected meanwhile reconnects and resumes after the last
                // event it saw.
                let _ = waiter.reply.send(new);
            }
        }
        if !remaining.is_empty() {
            waiting.insert(id, remaining);
        }
    }
}
