//! What everybody who has a lock has in hand.

use std::{
    mem,
    ops::Deref,
    pin::pin,
    sync::{Arc, Mutex, PoisonError},
    task::Poll,
    time::{Duration, Instant},
};

use futures_util::poll;
use redis::{RedisError, RedisResult, Script, aio::ConnectionManager};
use tokio::{
    runtime::Handle,
    sync::{OwnedMutexGuard, watch},
    task::{AbortHandle, JoinHandle},
    time::{MissedTickBehavior, interval_at, timeout},
};

use super::{Lease, LockError, Owner};

/// A lock that was taken. It is given back by [`Guard::release`], or in the background when it is dropped.
///
/// Having it does not mean that the lock is still held: a lease ends without asking. [`Guard::is_lost`] is what this process knows of it.
#[must_use = "a guard that is dropped gives the lock back at once"]
pub struct Guard {
    /// There until it is given back.
    holding: Option<Arc<Holding>>,
    /// This one among the owner's holds.
    hold: String,
    token: Option<i64>,
}

/// What came of giving a lock back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Released {
    /// It is free.
    Free,
    /// Its owner had taken it more than once, and has it so many times more.
    StillHeld(u64),
    /// It was not this owner's any more: the lease had ended, or somebody forced it open. Nothing was changed.
    NotOwner,
}

/// The scripts that give a lock back and renew it. Both change nothing unless the lock is the owner's.
pub(super) struct Scripts {
    pub(super) release: Script,
    pub(super) renew: Script,
}

/// A lock as one owner holds it, shared by all guards of that owner.
pub(super) struct Holding {
    terms: Terms,
    state: Arc<State>,
    watch: AbortHandle,
}

/// What this process knows of a lock that it holds.
struct State {
    /// Until when the lock is held for sure, by this process's own clock. `None`: it is known to be lost.
    until: watch::Sender<Option<Instant>>,
    /// The place at the head of this process's queue. The next one here asks Redis once it is free.
    head: Mutex<Option<Head>>,
}

/// What those who queue in this process for a lock leave to the next one.
#[derive(Default)]
pub(super) struct Turn {
    /// How often in a row the lock went to the next one before anybody else could have heard of it.
    pub(super) handed_on: u32,
    /// When Redis last failed one of them, and how.
    pub(super) failed: Option<(Instant, RedisError)>,
}

/// The place at the head.
pub(super) type Head = OwnedMutexGuard<Turn>;

impl Deref for Holding {
    type Target = Terms;

    fn deref(&self) -> &Terms {
        &self.terms
    }
}

/// What is needed to take a lock, to renew it and to give it back.
#[derive(Clone)]
pub(super) struct Terms {
    pub(super) key: String,
    pub(super) channel: String,
    pub(super) owner: Owner,
    pub(super) lease: Lease,
    pub(super) scripts: Arc<Scripts>,
    pub(super) commands: ConnectionManager,
}

/// An attempt that Redis has not answered yet. If it is dropped before, nobody knows whether the lock was given, so it is given back: this
/// hold, and no other that the same owner has. Commands go over one connection in their order: this one comes after the one that may have
/// taken the lock.
pub(super) struct Attempt {
    terms: Option<Terms>,
    hold: String,
}

impl Attempt {
    pub(super) fn hold(&self) -> &str {
        &self.hold
    }

    /// Tells the hold that the answer is about.
    pub(super) fn answered(mut self) -> String {
        self.terms = None;
        mem::take(&mut self.hold)
    }
}

impl Drop for Attempt {
    fn drop(&mut self) {
        let Some(terms) = self.terms.take() else { return };
        let hold = mem::take(&mut self.hold);
        if let Ok(runtime) = Handle::try_current() {
            runtime.spawn(async move {
                if let Err(why) = terms.give_back(&hold).await {
                    tracing::warn!(lock = terms.key, %why, "a lock may be taken until its lease ends");
                }
            });
        }
    }
}

impl Terms {
    /// To be made right before Redis is asked for the lock.
    pub(super) fn attempt(&self, hold: String) -> Attempt {
        Attempt {
            terms: Some(self.clone()),
            hold,
        }
    }

    /// Gives a hold back, if there is one.
    pub(super) async fn give_back(&self, hold: &str) -> RedisResult<Released> {
        let holds: i64 = self
            .scripts
            .release
            .key(&self.key)
            .arg(hold)
            .arg(&self.channel)
            .invoke_async(&mut self.commands.clone())
            .await?;
        Ok(match u64::try_from(holds) {
            Ok(0) => Released::Free,
            Ok(holds) => Released::StillHeld(holds),
            Err(_) => Released::NotOwner,
        })
    }

    /// The lock was taken, by a command that was sent at `sent`.
    pub(super) fn hold(self, sent: Instant, head: Option<Head>) -> Holding {
        let state = Arc::new(State {
            until: watch::Sender::new(Some(sent + self.lease.time())),
            head: Mutex::new(head),
        });
        let watch = match self.lease {
            Lease::Fixed(_) => tokio::spawn(see_it_end(state.clone())),
            Lease::Renewed(time) => tokio::spawn(renew(self.clone(), time, state.clone())),
        };
        Holding {
            terms: self,
            state,
            watch: watch.abort_handle(),
        }
    }
}

impl Holding {
    /// It was taken once more, by a command that was sent at `sent`: the lease runs afresh. Not if it was found to be lost in the meantime.
    pub(super) fn taken_again(&self, sent: Instant) -> bool {
        self.state.goes_on(sent + self.lease.time())
    }

    /// It is known to be lost.
    pub(super) fn lose(&self) {
        self.state.lose();
    }

    /// Its last hold is about to be given back. From here on it is nobody's to renew or to take again: a watchdog that went on would find the lock gone
    /// and call that a loss.
    fn ends(&self) {
        self.watch.abort();
        self.state.until.send_replace(None);
    }

    /// Whether it can no longer be said to be held.
    pub(super) fn is_lost(&self) -> bool {
        let until = *self.state.until.borrow();
        until.is_none_or(|until| until <= Instant::now())
    }
}

impl State {
    /// The lease runs until then, unless the lock is lost: that is for good.
    fn goes_on(&self, until: Instant) -> bool {
        self.until.send_if_modified(|known| {
            if known.is_some() {
                *known = Some(until);
            }
            known.is_some()
        })
    }

    /// It is lost. Others of this process may try their luck, though the guard is still there.
    fn lose(&self) {
        self.until.send_replace(None);
        self.leave();
    }

    /// The next one of this process's queue has its turn.
    fn leave(&self) {
        drop(self.take_head());
    }

    /// The same while the release is on its way: the next one here is quicker than anybody elsewhere.
    fn hand_on(&self) {
        if let Some(mut head) = self.take_head() {
            head.handed_on += 1;
        }
    }

    fn take_head(&self) -> Option<Head> {
        self.head.lock().unwrap_or_else(PoisonError::into_inner).take()
    }
}

impl Drop for Holding {
    fn drop(&mut self) {
        // No renewal outlives its holder.
        self.watch.abort();
        // The watchdog's task has the state too, and is gone only some time later. The next one here need not wait for that.
        self.state.leave();
    }
}

impl Guard {
    pub(super) fn new(holding: Arc<Holding>, hold: String, token: Option<i64>) -> Self {
        Self {
            holding: Some(holding),
            hold,
            token,
        }
    }

    /// The fencing token: greater than every one that was handed out for this lock before. Where the protected resource refuses a smaller
    /// token than the greatest it has seen, a holder that came too late can't do harm. `None` for a lock without tokens.
    pub fn token(&self) -> Option<i64> {
        self.token
    }

    /// What this hold is called in Redis. No other is called the same.
    pub fn hold(&self) -> &str {
        &self.hold
    }

    // ANCHOR: lost
    /// Whether the lock is known to be lost, or can no longer be said to be held. "No" is true only at the moment of asking.
    pub fn is_lost(&self) -> bool {
        self.holding.as_ref().is_none_or(|holding| holding.is_lost())
    }
    // ANCHOR_END: lost

    /// Ends when the lock is lost.
    pub async fn lost(&self) {
        let Some(holding) = &self.holding else { return };
        let mut until = holding.state.until.subscribe();
        let _ = until.wait_for(Option::is_none).await;
    }

    /// Gives the lock back, and says whether it still was the owner's. It is given back even if nobody waits for the answer.
    ///
    /// # Errors
    /// Redis does not answer, or there is no runtime to ask it; the lock ends with its lease.
    pub async fn release(mut self) -> Result<Released, LockError> {
        let task = self.give_back().ok_or(LockError::NoRuntime)?;
        // A task that does not come to its end is one whose runtime shuts down.
        Ok(task.await.map_err(|_| LockError::NoRuntime)??)
    }

    // ANCHOR: covers
    /// Runs a commit under this lock to its end, in a task of its own: whoever awaits it may be cancelled.
    ///
    /// If it fails, nobody can say whether it was carried out, or still is: the connection may have broken with the commit on its way. The next
    /// holder would read what was there before it. So the lock is then neither given back nor renewed, and ends with its lease. A commit
    /// that takes longer than that is not covered.
    ///
    /// # Errors
    /// Those of the commit.
    pub async fn covers(
        &mut self,
        commit: impl Future<Output = sqlx::Result<()>> + Send + 'static,
    ) -> sqlx::Result<()> {
        let mut guard = Self {
            holding: self.holding.take(),
            hold: mem::take(&mut self.hold),
            token: self.token,
        };
        let covered = tokio::spawn(async move {
            let committed = commit.await;
            if committed.is_err() {
                drop(guard.holding.take());
            }
            committed.map(|()| guard)
        });
        *self = covered.await.unwrap_or(Err(sqlx::Error::WorkerCrashed))?;
        Ok(())
    }
    // ANCHOR_END: covers

    /// In a task of its own: whoever awaits it may be cancelled.
    fn give_back(&mut self) -> Option<JoinHandle<RedisResult<Released>>> {
        let holding = self.holding.take()?;
        let hold = mem::take(&mut self.hold);
        let runtime = Handle::try_current().ok()?;
        Some(runtime.spawn(async move {
            let is_last = Arc::strong_count(&holding) == 1;
            if is_last {
                holding.ends();
            }
            let mut giving_back = pin!(holding.give_back(&hold));
            let released = match poll!(&mut giving_back) {
                Poll::Ready(released) => released,
                Poll::Pending => {
                    // It is on its way, and Redis takes the commands of a connection in their order: the next one here need not wait for the
                    // answer. Should it come too early after all, it finds the lock taken and waits for the message.
                    if is_last {
                        holding.state.hand_on();
                    }
                    giving_back.await
                }
            };
            match &released {
                Ok(Released::Free | Released::StillHeld(_)) => {}
                Ok(Released::NotOwner) => {
                    tracing::warn!(lock = holding.key, "a lock was lost before it was given back")
                }
                Err(why) => {
                    tracing::warn!(lock = holding.key, %why, "a lock was not given back: it ends with its lease")
                }
            }
            released
        }))
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        self.give_back();
    }
}

/// Waits for a lease to end, which begins again each time it is renewed or the owner takes the lock once more.
async fn see_it_end(state: Arc<State>) {
    let mut known = state.until.subscribe();
    loop {
        let Some(until) = *known.borrow_and_update() else {
            return;
        };
        tokio::time::sleep_until(until.into()).await;
        if known.has_changed().is_ok_and(|changed| !changed) {
            return state.lose();
        }
    }
}

// ANCHOR: watchdog
/// The watchdog: renews a lease every third of its time, until the lock is lost. It keeps no guard alive.
async fn renew(terms: Terms, time: Duration, state: Arc<State>) {
    let renewals = async {
        let mut thirds = interval_at((Instant::now() + time / 3).into(), time / 3);
        // Who stood still does not renew once for every third that has passed.
        thirds.set_missed_tick_behavior(MissedTickBehavior::Skip);
        loop {
            thirds.tick().await;
            let sent = Instant::now();
            let mut renew = terms.scripts.renew.key(&terms.key);
            renew.arg(terms.owner.as_str()).arg(terms.lease.millis());
            let mut commands = terms.commands.clone();
            // An answer that takes longer must not hold up the next renewal: it may be the last that comes in time.
            match timeout(time / 3, renew.invoke_async::<i64>(&mut commands)).await {
                Ok(Ok(1)) => {
                    state.goes_on(sent + time);
                }
                Ok(Ok(_)) => return tracing::warn!(lock = terms.key, "a lock was lost while it was held"),
                // Once more at the next third, as long as the lease may still run.
                Ok(Err(why)) => tracing::warn!(lock = terms.key, %why, "a lease could not be renewed"),
                Err(_) => tracing::warn!(lock = terms.key, "a lease could not be renewed in time"),
            }
        }
    };
    // A Redis that does not answer can't hold up the notice that the lease is over.
    tokio::select! {
        () = renewals => state.lose(),
        () = see_it_end(state.clone()) => tracing::warn!(lock = terms.key, "a lease ended that could not be renewed"),
    }
}
// ANCHOR_END: watchdog
