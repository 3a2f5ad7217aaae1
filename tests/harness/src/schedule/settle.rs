//! One move of a schedule: lets a request go on, and waits until no request runs any more.

use std::{sync::Arc, time::Duration};

use anyhow::{Context, anyhow};
use box_office::{Steps, trace::now_monotonic_us};

use super::{
    blocked::{Blocked, Holder, WORKS_FOR},
    runner::answer_of,
    state::{Held, Moved, Standing},
    stepping::Script,
    trace::{Event, Happened},
};
use crate::judge::in_words;

/// How long a step may take before the script gives up and says what it waited for.
pub(super) const PATIENCE: Duration = Duration::from_secs(10);

/// How long to leave Postgres alone between two looks at who is blocked.
const LOOK_AGAIN: Duration = Duration::from_millis(1);

impl Script<'_> {
    /// Lets one request move, and waits until everything stands still again.
    pub(super) async fn advance(&mut self, lane: usize) -> anyhow::Result<Moved> {
        let (standing, before) = {
            let board = self.shared.board();
            (board.lanes[lane].standing, board.trace.events.len())
        };
        match standing {
            Standing::Answered => return Ok(Moved::Answered),
            Standing::NotStarted => self.start(lane),
            Standing::Held(_) => {
                self.shared.board().lanes[lane].standing = Standing::Running;
                self.requests[lane].go.add_permits(1);
            }
            // It is blocked, unless somebody else's move has freed it.
            Standing::Running | Standing::Waiting => {}
        }
        let moved = tokio::time::timeout(PATIENCE, self.standstill(lane)).await.map_err(|_| {
            anyhow!(
                "after {PATIENCE:?} {} had not reached a point, answered, or been seen blocked by a held request\n{}",
                self.name(lane),
                self.trace()
            )
        })?;
        // Whoever was set free by this move runs beside it; in the table, cause comes before effect.
        self.shared.board().trace.events[before..].sort_by_key(|event| event.lane != lane);
        moved
    }

    /// Ends when no request moves any more.
    async fn standstill(&mut self, moved: usize) -> anyhow::Result<Moved> {
        let shared = self.shared.clone();
        loop {
            let changed = shared.changed.notified();
            if self.is_still_to_come() {
                let _ = tokio::time::timeout(LOOK_AGAIN, changed).await;
                continue;
            }
            let running = self.running();
            if running.is_empty() {
                break;
            }
            let blocked = Blocked::look(&self.rehearsal.observer)
                .await
                .context("asking Postgres who is blocked")?;
            // Nobody moved while Postgres was looking, and all that run wait for one that is held.
            if self.running() == running
                && let Some(waits) = self.all_wait_for_held_ones(&blocked, &running)
            {
                self.note(&waits);
                break;
            }
            // Either way we look again; the pause only spares Postgres.
            let _ = tokio::time::timeout(LOOK_AGAIN, changed).await;
        }
        Ok(match self.shared.board().lanes[moved].standing {
            Standing::Held(step) => Moved::Held(step),
            Standing::Answered => Moved::Answered,
            Standing::Running | Standing::Waiting | Standing::NotStarted => Moved::Blocked,
        })
    }

    /// Whether something is sure to happen by itself: a lock was given back and one who waited for it has not said yet that it got it, or
    /// a request has its answer and its transaction is still being rolled back.
    fn is_still_to_come(&self) -> bool {
        let board = self.shared.board();
        let answered = board
            .lanes
            .iter()
            .enumerate()
            .filter(|(_, state)| state.standing == Standing::Answered);
        board.releases > 0
            || answered
                .into_iter()
                .any(|(lane, _)| self.rehearsal.holders.holds(self.holder(lane)))
    }

    /// Who of those that run waits for whom, as lanes, if each of them does wait, and in the end for one that is held.
    fn all_wait_for_held_ones(&self, blocked: &Blocked, running: &[usize]) -> Option<Vec<(usize, usize)>> {
        let lane_of = |pid| {
            let holder = self.rehearsal.holders.of(pid)?;
            (holder.script == self.sale).then_some(holder.lane)
        };
        let waits: Vec<(usize, usize)> = blocked
            .pids()
            .filter_map(|pid| Some((lane_of(pid)?, lane_of(blocked.root(pid)?)?)))
            .collect();
        let board = self.shared.board();
        let each = running
            .iter()
            .all(|lane| waits.iter().any(|(waiting, _)| waiting == lane));
        let held = waits
            .iter()
            .all(|&(_, root)| !matches!(board.lanes[root].standing, Standing::Running | Standing::Answered));
        (each && held).then_some(waits)
    }

    /// Writes a row of the trace for each that was not blocked before.
    fn note(&mut self, waits: &[(usize, usize)]) {
        let mut board = self.shared.board();
        self.blocked
            .retain(|lane| waits.iter().any(|(waiting, _)| waiting == lane));
        for &(lane, root) in waits {
            if self.blocked.insert(lane) {
                let why = format!("waits for {}'s row lock", board.trace.lanes[root]);
                board.trace.events.push(Event {
                    lane,
                    happened: Happened::Waits { why },
                });
            }
        }
    }

    fn holder(&self, lane: usize) -> Holder {
        Holder {
            script: self.sale,
            lane,
        }
    }

    fn running(&self) -> Vec<usize> {
        let board = self.shared.board();
        let lanes = board.lanes.iter().enumerate();
        lanes
            .filter(|(_, state)| state.standing == Standing::Running)
            .map(|(lane, _)| lane)
            .collect()
    }

    fn start(&mut self, lane: usize) {
        let now = now_monotonic_us() - self.started_us;
        {
            let mut board = self.shared.board();
            board.lanes[lane].standing = Standing::Running;
            board.lanes[lane].sent_us = now;
        }
        let steps = Steps::observed_by(Arc::new(Held {
            lane,
            shared: self.shared.clone(),
            go: self.requests[lane].go.clone(),
            started_us: self.started_us,
        }));
        let order = self.requests[lane].order.clone();
        let (reserve, shared, started_us) = (self.rehearsal.reserve.clone(), self.shared.clone(), self.started_us);
        let answering = async move {
            let answer = answer_of(reserve.reserve(&order, &steps).await);
            {
                let mut board = shared.board();
                board.got_on(lane, Standing::Answered);
                board.lanes[lane].answered_us = Some(now_monotonic_us() - started_us);
                let words = in_words(&answer);
                board.lanes[lane].answer = Some(answer);
                board.trace.events.push(Event {
                    lane,
                    happened: Happened::Answered { answer: words },
                });
            }
            shared.changed.notify_one();
        };
        tokio::spawn(WORKS_FOR.scope(self.holder(lane), answering));
    }
}
