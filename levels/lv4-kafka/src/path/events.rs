//! Tells those who wait what became of their orders, from stored state: any instance can, whoever accepted or decided the order.

use std::{collections::HashMap, time::Duration};

use box_office::{Event, Indeterminate, ReserveError, api};
use sqlx::{
    PgPool,
    postgres::{PgListener, PgPoolOptions},
};
use tokio::{
    sync::{mpsc, oneshot},
    time::{Instant, sleep, timeout},
};
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

/// The channel on which a transaction that decides orders names them, with commas in between.
pub const DECIDED: &str = "decided";

/// A message on that channel can be lost, with the connection that listens. Whoever waits looks by himself as often as this.
const LOOK_ANYWAY: Duration = Duration::from_secs(1);

/// How many may stand at the door at once; more wait before it.
const DOOR: usize = 1024;

/// Everybody in this instance who waits for an event.
pub struct Events {
    door: mpsc::Sender<Waiter>,
}

struct Waiter {
    id: Uuid,
    after: i64,
    tell: oneshot::Sender<Vec<Event>>,
}

#[derive(sqlx::FromRow)]
struct Row {
    number: i64,
    #[sqlx(flatten)]
    reservation: api::Reservation,
}

impl Events {
    /// Listens on a connection of its own, beside those of the pool, until told to stop.
    ///
    /// # Errors
    /// There is none to be had.
    pub async fn open(database: &PgPool, stop: CancellationToken) -> sqlx::Result<Self> {
        // One that is kept for ever would be missing in the pool.
        let own = PgPoolOptions::new()
            .max_connections(1)
            .max_lifetime(None)
            .idle_timeout(None);
        let own = own.connect_with((*database.connect_options()).clone()).await?;
        let mut listener = PgListener::connect_with(&own).await?;
        listener.listen(DECIDED).await?;
        let (door, waiters) = mpsc::channel(DOOR);
        let (heard, news) = mpsc::channel(DOOR);
        let watching = watch(database.clone(), news, waiters);
        tokio::spawn(async move {
            // Two tasks: who comes in at the door must not cut off a listener that is about to connect again.
            let listening = tokio::spawn(listen(listener, heard));
            stop.run_until_cancelled(watching).await;
            listening.abort();
        });
        Ok(Self { door })
    }

    /// Every event of an order after the one with this number. Where there is none yet, waits for one for so long; then there are none.
    ///
    /// # Errors
    /// This instance is about to end, or can't read what is stored.
    pub async fn after(&self, id: Uuid, after: i64, patience: Duration) -> Result<Vec<Event>, ReserveError> {
        let (tell, told) = oneshot::channel();
        let waiting = async {
            self.door.send(Waiter { id, after, tell }).await.ok()?;
            told.await.ok()
        };
        match timeout(patience, waiting).await {
            Ok(Some(events)) => Ok(events),
            Ok(None) => Err(Indeterminate::TimedOut.into()),
            Err(_) => Ok(vec![]),
        }
    }
}

/// What can be heard on the channel.
enum Heard {
    /// These orders were decided.
    Decided(Vec<Uuid>),
    /// The connection was lost, and with it perhaps a message.
    Nothing,
}

/// Passes on what is heard, and connects again when the connection is lost.
async fn listen(mut listener: PgListener, heard: mpsc::Sender<Heard>) {
    loop {
        let named = match listener.try_recv().await {
            Ok(Some(named)) => {
                let ids = named.payload().split(',').filter_map(|id| id.parse().ok());
                Heard::Decided(ids.collect())
            }
            Ok(None) => Heard::Nothing,
            Err(why) => {
                tracing::warn!(%why, "nothing can be heard of decided orders");
                sleep(Duration::from_millis(100)).await;
                continue;
            }
        };
        if heard.send(named).await.is_err() {
            return;
        }
    }
}

/// Looks for all who wait at once: for those who are new, for those whose order was named, and now and then for everybody.
async fn watch(database: PgPool, mut news: mpsc::Receiver<Heard>, mut door: mpsc::Receiver<Waiter>) {
    let mut waiting: HashMap<Uuid, Vec<Waiter>> = HashMap::new();
    let mut look_anyway = Instant::now() + LOOK_ANYWAY;
    loop {
        let mut look: Vec<Uuid> = vec![];
        let mut heard = None;
        tokio::select! {
            waiter = door.recv() => match waiter {
                None => return,
                Some(waiter) => enter(&mut waiting, &mut look, waiter),
            },
            Some(named) = news.recv() => heard = Some(named),
            () = tokio::time::sleep_until(look_anyway) => {}
        }
        while let Ok(waiter) = door.try_recv() {
            enter(&mut waiting, &mut look, waiter);
        }
        while let Some(named) = heard.take().or_else(|| news.try_recv().ok()) {
            match named {
                Heard::Decided(ids) => look.extend(ids),
                Heard::Nothing => look_anyway = Instant::now(),
            }
        }
        if look_anyway <= Instant::now() {
            look_anyway = Instant::now() + LOOK_ANYWAY;
            // Who has gone meanwhile is forgotten here.
            waiting.retain(|_, waiters| {
                waiters.retain(|waiter| !waiter.tell.is_closed());
                !waiters.is_empty()
            });
            look.extend(waiting.keys());
        }
        look.retain(|id| waiting.contains_key(id));
        if !look.is_empty() {
            match stored(&database, &look).await {
                Ok(events) => tell(&mut waiting, events),
                Err(why) => {
                    tracing::warn!(%why, "the outbox can't be read: those who wait are sent to ask elsewhere");
                    for id in look {
                        waiting.remove(&id);
                    }
                }
            }
        }
    }
}

fn enter(waiting: &mut HashMap<Uuid, Vec<Waiter>>, look: &mut Vec<Uuid>, waiter: Waiter) {
    look.push(waiter.id);
    waiting.entry(waiter.id).or_default().push(waiter);
}

// ANCHOR: stored
/// What the outbox holds about these orders, in the order in which it was written.
async fn stored(database: &PgPool, ids: &[Uuid]) -> sqlx::Result<HashMap<Uuid, Vec<Event>>> {
    let rows: Vec<Row> = sqlx::query_as(
        "select outbox.number, reservation.*
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
// ANCHOR_END: stored

fn tell(waiting: &mut HashMap<Uuid, Vec<Waiter>>, events: HashMap<Uuid, Vec<Event>>) {
    for (id, events) in events {
        let Some(waiters) = waiting.remove(&id) else { continue };
        let mut left = vec![];
        for waiter in waiters {
            let new: Vec<Event> = events
                .iter()
                .filter(|event| event.number > waiter.after)
                .cloned()
                .collect();
            if new.is_empty() {
                left.push(waiter);
            } else {
                // Who has gone meanwhile comes back and asks from where he was.
                let _ = waiter.tell.send(new);
            }
        }
        if !left.is_empty() {
            waiting.insert(id, left);
        }
    }
}
