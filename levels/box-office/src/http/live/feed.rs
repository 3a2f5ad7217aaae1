//! The feed: one task reads the watched sales and publishes what has changed to all watchers.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use tokio::{
    sync::watch,
    time::{Instant, sleep, timeout},
};
use tracing::Instrument;

use super::{About, RushTarget, json, state::Reader};
use crate::{
    Indeterminate, Origin, ReserveError, SaleId,
    http::App,
    problem::{Problem, ProblemKind},
};

/// The time between two readings.
const INTERVAL: Duration = Duration::from_millis(100);

/// A reading that took long is followed by a pause of this many times its duration: the feed takes
/// a quarter of one connection's time at most, from a database that others wait for.
const PAUSE: u32 = 3;

/// The time limit of a reading.
const TIMEOUT: Duration = Duration::from_secs(5);

/// The pause before it tries again to reach the database.
const RETRY_DELAY: Duration = Duration::from_secs(1);

/// The maximum number of watchers. The last state is copied for each, and one that reads slowly
/// keeps its copy.
const MOST_WATCHERS: usize = 1024;

/// The maximum number of sales that are watched at once, besides the newest.
const MOST_SALES: usize = 16;

/// The watchers of a server, and the settings of its page.
pub(crate) struct LiveFeed {
    pub(super) about: About,
    peers: Vec<Origin>,
    pub(super) rush_target: RushTarget,
    watched: Mutex<Watched>,
}

/// Each watched sale, `None` for the newest, with its last frame. A watcher that does not read keeps
/// one frame, the last, from being freed: memory does not grow with what it misses.
#[derive(Default)]
struct Watched {
    sales: HashMap<Option<SaleId>, watch::Sender<Option<Arc<Frame>>>>,
    is_polled: bool,
}

/// One event, for all watchers.
#[derive(PartialEq)]
pub(super) struct Frame {
    pub(super) event: &'static str,
    pub(super) data: String,
}

impl LiveFeed {
    pub(crate) fn new(about: About, peers: Vec<Origin>, rush_target: RushTarget) -> Self {
        Self {
            about,
            peers,
            rush_target,
            watched: Mutex::default(),
        }
    }

    /// The servers whose sales this page shows as well, and whose pages may show this one.
    pub(crate) fn peers(&self) -> &[Origin] {
        &self.peers
    }

    fn watched(&self) -> MutexGuard<'_, Watched> {
        self.watched.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The sales with watchers. `None`: there is no watcher left, and the task ends.
    fn still_watched(&self) -> Option<Vec<Option<SaleId>>> {
        let mut watched = self.watched();
        watched.sales.retain(|_, frames| frames.receiver_count() > 0);
        watched.is_polled = !watched.sales.is_empty();
        watched.is_polled.then(|| watched.sales.keys().copied().collect())
    }

    /// Publishes a frame, unless it is the same as the last.
    fn publish(&self, sale: Option<SaleId>, frame: Frame) {
        if let Some(frames) = self.watched().sales.get(&sale) {
            frames.send_if_modified(|last| {
                let is_new = last.as_deref() != Some(&frame);
                if is_new {
                    *last = Some(Arc::new(frame));
                }
                is_new
            });
        }
    }
}

/// Watches a sale, `None` for the newest. The last frame, if there is one, counts as changed.
///
/// # Errors
/// [`ProblemKind::Overloaded`] if there are too many watchers, or too many sales that are watched.
pub(super) fn subscribe(app: &Arc<App>, sale: Option<SaleId>) -> Result<watch::Receiver<Option<Arc<Frame>>>, Problem> {
    let mut watched = app.live.watched();
    let watchers: usize = watched.sales.values().map(watch::Sender::receiver_count).sum();
    // The newest sale is one more: whoever asks for many others keeps nobody from it.
    let others = watched.sales.keys().flatten().count();
    let is_one_too_many = sale.is_some() && others >= MOST_SALES && !watched.sales.contains_key(&sale);
    if watchers >= MOST_WATCHERS || is_one_too_many {
        return Err(ProblemKind::Overloaded.into());
    }
    let frames = watched.sales.entry(sale).or_insert_with(|| watch::channel(None).0);
    let mut receiver = frames.subscribe();
    receiver.mark_changed();
    if !watched.is_polled {
        watched.is_polled = true;
        let (app, stop) = (Arc::clone(app), app.stop.clone());
        let polling = async move { stop.run_until_cancelled(poll(&app)).await };
        tokio::spawn(polling.instrument(tracing::info_span!("live")));
    }
    Ok(receiver)
}

/// Reads every watched sale again and again, on one connection that reservations do not share: they
/// would keep it waiting, and it would keep them waiting.
async fn poll(app: &App) {
    let mut reader = None;
    while let Some(sales) = app.live.still_watched() {
        let began = Instant::now();
        let mut pause = INTERVAL;
        for sale in sales {
            let frame = match read(app, &mut reader, sale).await {
                Ok(frame) => frame,
                Err(why) => {
                    pause = RETRY_DELAY;
                    app.causes.warn("the live page cannot read the database", &why);
                    away()
                }
            };
            app.live.publish(sale, frame);
        }
        sleep(pause.max(began.elapsed() * PAUSE)).await;
    }
    if let Some(reader) = reader {
        reader.close().await;
    }
}

fn away() -> Frame {
    Frame {
        event: "away",
        data: json(&serde_json::json!({
            "detail": "This server cannot read its database. What is shown is the last that it has read; it tries again.",
        })),
    }
}

/// One reading. A connection that was open before may have been closed, or hold plans of views that
/// have changed since: then a new one is tried at once.
async fn read(app: &App, reader: &mut Option<Reader>, sale: Option<SaleId>) -> Result<Frame, ReserveError> {
    let was_open = reader.is_some();
    match read_once(app, reader, sale).await {
        Err(_) if was_open => read_once(app, reader, sale).await,
        result => result,
    }
}

async fn read_once(app: &App, open: &mut Option<Reader>, sale: Option<SaleId>) -> Result<Frame, ReserveError> {
    let reading = async {
        // Taken out, so that a reading that fails or is cut off closes its connection.
        let mut reader = match open.take() {
            Some(reader) => reader,
            None => Reader::connect(&app.database).await?,
        };
        let state = reader.read(sale, app).await?;
        *open = Some(reader);
        Ok(Frame {
            event: "state",
            data: json(&state),
        })
    };
    timeout(TIMEOUT, reading)
        .await
        .unwrap_or(Err(Indeterminate::TimedOut.into()))
}
