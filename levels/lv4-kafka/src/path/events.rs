//! Tells those who wait what became of their orders, from stored state: any instance can, whoever accepted or decided the order.

use std::{collections::HashMap, time::Duration};

use box_office::{Event, No, Undecided, api};
use sqlx::{PgPool, postgres::PgListener};
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
    /// Listens on a connection of its own, until told to stop.
    ///
    /// # Errors
    /// There is none to be had.
    pub async fn open(database: &PgPool, stop: CancellationToken) -> sqlx::Result<Self> {
        let mut listener = PgListener::connect_with(database).await?;
        listener.listen(DECIDED).await?;
        let (door, waiters) = mpsc::channel(DOOR);
        let watching = watch(database.clone(), listener, waiters);
        tokio::spawn(async move { stop.run_until_cancelled(watching).await });
        Ok(Self { door })
    }

    /// Every event of an order after the one with this number. Where there is none yet, waits for one for so long; then there are none.
    ///
    /// # Errors
    /// This instance is about to end.
    pub async fn after(&self, id: Uuid, after: i64, patience: Duration) -> Result<Vec<Event>, No> {
        let (tell, told) = oneshot::channel();
        let waiting = async {
            self.door.send(Waiter { id, after, tell }).await.ok()?;
            told.await.ok()
        };
        match timeout(patience, waiting).await {
            Ok(Some(events)) => Ok(events),
            Ok(None) => Err(Undecided::TimedOut.into()),
            Err(_) => Ok(vec![]),
        }
    }
}

/// Looks for all who wait at once: for those who are new, for those whose order was named, and now and then for everybody.
async fn watch(database: PgPool, mut listener: PgListener, mut door: mpsc::Receiver<Waiter>) {
    let mut waiting: HashMap<Uuid, Vec<Waiter>> = HashMap::new();
    let mut look_anyway = Instant::now() + LOOK_ANYWAY;
    loop {
        let mut look: Vec<Uuid> = vec![];
        tokio::select! {
            waiter = door.recv() => match waiter {
                None => return,
                Some(waiter) => enter(&mut waiting, &mut look, waiter),
            },
            named = listener.try_recv() => match named {
                Ok(Some(named)) => look.extend(named.payload().split(',').filter_map(|id| id.parse::<Uuid>().ok())),
                // The connection was lost, and with it perhaps a message.
                Ok(None) => look_anyway = Instant::now(),
                Err(why) => {
                    tracing::warn!(%why, "nothing can be heard of decided orders");
                    sleep(Duration::from_millis(100)).await;
                }
            },
            () = tokio::time::sleep_until(look_anyway) => {}
        }
        while let Ok(waiter) = door.try_recv() {
            enter(&mut waiting, &mut look, waiter);
        }
        while let Some(named) = listener.next_buffered() {
            look.extend(named.payload().split(',').filter_map(|id| id.parse::<Uuid>().ok()));
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
                Err(why) => tracing::warn!(%why, "the outbox can't be read; those who wait go on waiting"),
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
