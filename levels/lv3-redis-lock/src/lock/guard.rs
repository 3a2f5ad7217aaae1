//! The guard of a lock in Redis, and the state behind it: the request, the lease, the watchdog, the
//! release.

use std::{
    mem,
    ops::Deref,
    pin::pin,
    sync::{Arc, Mutex, PoisonError},
    task::Poll,
    time::{Duration, Instant},
};

use box_office::{CauseLog, LostLeases};
use futures_util::poll;
use redis::{RedisError, RedisResult, Script};
use tokio::{
    runtime::Handle,
    sync::{OwnedMutexGuard, watch},
    task::{AbortHandle, JoinHandle},
    time::{MissedTickBehavior, interval_at, timeout},
};

use super::{Lease, LockError, Owner, commands::Commands};

/// An acquired lock. [`Guard::release`] releases it; a dropped guard releases it in the background.
///
/// A guard does not prove that the lock is still held: a lease expires without notice.
/// [`Guard::is_lost`] returns what this process knows.
#[must_use = "a guard that is dropped releases the lock at once"]
pub struct Guard {
    /// `None` once the lock is released.
    held: Option<Arc<HeldLock>>,
    acquisition_id: String,
    token: Option<i64>,
}

/// The outcome of a release.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Released {
    /// The lock is free.
    Free,
    /// The owner had acquired the lock more than once, and still holds it this many times.
    StillHeld(u64),
    /// The owner no longer held the lock: its lease had expired, or the lock was released by force.
    /// Nothing was changed.
    NotOwner,
}

/// The scripts that release a lock and renew its lease. Both check the owner and change nothing
/// unless it holds the lock.
pub(super) struct Scripts {
    pub(super) release: Script,
    pub(super) renew: Script,
}

/// A lock held by one owner, shared by all guards of that owner.
pub(super) struct HeldLock {
    request: LockRequest,
    state: Arc<LeaseState>,
    watchdog: AbortHandle,
}

/// What this process knows of a lock that it holds.
struct LeaseState {
    /// The time up to which the lock is certainly held, on this process's clock. `None`: it is
    /// lost.
    expires_at: watch::Sender<Option<Instant>>,
    /// Keeps the next task of this process from asking Redis while the lock is held here.
    queue_permit: Mutex<Option<LocalQueuePermit>>,
}

/// State shared by the tasks of this process that queue for one lock.
#[derive(Default)]
pub(super) struct LocalQueueState {
    /// How often in a row the lock went to the next task of this process.
    pub(super) consecutive_handoffs: u32,
    /// The last error of Redis that a task at the head of the queue met, and when.
    pub(super) last_error: Option<(Instant, RedisError)>,
}

/// The head of the local queue: only its holder may ask Redis for the lock.
pub(super) type LocalQueuePermit = OwnedMutexGuard<LocalQueueState>;

impl Deref for HeldLock {
    type Target = LockRequest;

    fn deref(&self) -> &LockRequest {
        &self.request
    }
}

/// Everything that acquiring, renewing and releasing one lock takes.
#[derive(Clone)]
pub(super) struct LockRequest {
    pub(super) causes: CauseLog,
    pub(super) lost_leases: LostLeases,
    pub(super) key: String,
    pub(super) channel: String,
    pub(super) owner: Owner,
    pub(super) lease: Lease,
    pub(super) scripts: Arc<Scripts>,
    pub(super) commands: Commands,
}

/// An acquisition that Redis has not answered yet.
///
/// If it is dropped before the answer, the outcome is unknown, so the drop releases this
/// acquisition and no other of the same owner. Redis runs the commands of a connection in order:
/// the release runs after the command that may have acquired the lock.
pub(super) struct PendingAcquire {
    request: Option<LockRequest>,
    acquisition_id: String,
}

impl PendingAcquire {
    pub(super) fn acquisition_id(&self) -> &str {
        &self.acquisition_id
    }

    /// Redis has answered: returns the id of the acquisition, and the drop releases nothing.
    pub(super) fn answered(mut self) -> String {
        self.request = None;
        mem::take(&mut self.acquisition_id)
    }
}

impl Drop for PendingAcquire {
    fn drop(&mut self) {
        let Some(request) = self.request.take() else { return };
        let acquisition_id = mem::take(&mut self.acquisition_id);
        if let Ok(runtime) = Handle::try_current() {
            runtime.spawn(async move {
                if let Err(why) = request.release(&acquisition_id).await {
                    request
                        .causes
                        .warn("a lock may stay held until its lease expires", &why);
                }
            });
        }
    }
}

impl LockRequest {
    /// Starts an acquisition; to be called right before the command is sent.
    pub(super) fn pending(&self, acquisition_id: String) -> PendingAcquire {
        PendingAcquire {
            request: Some(Self {
                commands: self.commands.pinned(),
                ..self.clone()
            }),
            acquisition_id,
        }
    }

    /// Releases one acquisition, if the lock still counts it.
    pub(super) async fn release(&self, acquisition_id: &str) -> RedisResult<Released> {
        /// What the script returns for a lock that is free although the message failed.
        const NOT_NOTIFIED: i64 = -2;

        let remaining: i64 = self
            .scripts
            .release
            .key(&self.key)
            .arg(acquisition_id)
            .arg(&self.channel)
            .invoke_async(&mut self.commands.clone())
            .await?;
        if remaining == NOT_NOTIFIED {
            let channel = &self.channel;
            let cause = format!("Redis rejected PUBLISH to {channel}");
            self.causes
                .warn_text("a lock was released, but its waiters could not be notified", &cause);
            return Ok(Released::Free);
        }
        Ok(match u64::try_from(remaining) {
            Ok(0) => Released::Free,
            Ok(remaining) => Released::StillHeld(remaining),
            Err(_) => Released::NotOwner,
        })
    }

    /// The held lock, after Redis has granted this request by a command sent at `sent_at`. Starts
    /// the watchdog.
    pub(super) fn into_held(self, sent_at: Instant, queue_permit: Option<LocalQueuePermit>) -> HeldLock {
        let state = Arc::new(LeaseState {
            expires_at: watch::Sender::new(Some(sent_at + self.lease.duration())),
            queue_permit: Mutex::new(queue_permit),
        });
        let watchdog = match self.lease {
            Lease::Fixed(_) => tokio::spawn(watch_expiry(state.clone())),
            Lease::Renewed(duration) => tokio::spawn(renew(self.clone(), duration, state.clone())),
        };
        HeldLock {
            request: self,
            state,
            watchdog: watchdog.abort_handle(),
        }
    }
}

impl HeldLock {
    /// Restarts the lease after a reentrant acquisition by a command sent at `sent_at`. Returns
    /// whether the lock was still held.
    pub(super) fn reacquired(&self, sent_at: Instant) -> bool {
        self.state.extend(sent_at + self.lease.duration())
    }

    pub(super) fn mark_lost(&self) {
        self.state.mark_lost();
    }

    /// Prepares the last release: stops the watchdog, which would find the lock gone and report a
    /// loss, and prevents a reentrant acquisition.
    fn close(&self) {
        self.watchdog.abort();
        self.state.expires_at.send_replace(None);
    }

    /// Whether the lock is lost, or its lease has expired on this process's clock.
    pub(super) fn is_lost(&self) -> bool {
        let expires_at = *self.state.expires_at.borrow();
        expires_at.is_none_or(|expires_at| expires_at <= Instant::now())
    }
}

impl LeaseState {
    /// Sets the end of the lease, unless the lock is lost: a loss is final. Returns whether it was
    /// set.
    fn extend(&self, expires_at: Instant) -> bool {
        self.expires_at.send_if_modified(|known| {
            if known.is_some() {
                *known = Some(expires_at);
            }
            known.is_some()
        })
    }

    /// Marks the lock as lost, and lets other tasks of this process compete for it although the
    /// guard lives.
    fn mark_lost(&self) {
        self.expires_at.send_replace(None);
        self.leave_queue();
    }

    /// Lets the next task of this process ask Redis.
    fn leave_queue(&self) {
        drop(self.take_permit());
    }

    /// Lets the next task of this process ask Redis while the release is still in flight: it is
    /// faster than a waiter of any other process.
    fn hand_off(&self) {
        if let Some(mut permit) = self.take_permit() {
            permit.consecutive_handoffs += 1;
        }
    }

    fn take_permit(&self) -> Option<LocalQueuePermit> {
        self.queue_permit.lock().unwrap_or_else(PoisonError::into_inner).take()
    }
}

impl Drop for HeldLock {
    fn drop(&mut self) {
        // No renewal may outlive the holder.
        self.watchdog.abort();
        // The aborted task shares the state and is dropped some time later; the next waiter must
        // not wait for that.
        self.state.leave_queue();
    }
}

impl Guard {
    pub(super) fn new(held: Arc<HeldLock>, acquisition_id: String, token: Option<i64>) -> Self {
        Self {
            held: Some(held),
            acquisition_id,
            token,
        }
    }

    /// The fencing token: greater than every token issued for this lock before. `None` for a lock
    /// without tokens.
    ///
    /// If the protected resource rejects a token smaller than the greatest one it has seen, a stale
    /// holder can do no harm.
    pub fn token(&self) -> Option<i64> {
        self.token
    }

    /// The unique id of this acquisition in Redis.
    pub fn acquisition_id(&self) -> &str {
        &self.acquisition_id
    }

    // ANCHOR: lost
    /// Whether the lock is known to be lost, or its lease has expired. A result of `false` may be
    /// outdated as soon as it is returned.
    pub fn is_lost(&self) -> bool {
        self.held.as_ref().is_none_or(|held| held.is_lost())
    }
    // ANCHOR_END: lost

    /// Completes when the lock is lost.
    pub async fn lost(&self) {
        let Some(held) = &self.held else { return };
        let mut expires_at = held.state.expires_at.subscribe();
        let _ = expires_at.wait_for(Option::is_none).await;
    }

    /// Releases the lock, also if the returned future is dropped before it completes.
    ///
    /// # Errors
    /// [`LockError::Redis`] if Redis does not answer, [`LockError::NoRuntime`] outside a runtime.
    /// The lock then stays held until its lease expires.
    pub async fn release(mut self) -> Result<Released, LockError> {
        let task = self.spawn_release().ok_or(LockError::NoRuntime)?;
        // The task does not finish if its runtime shuts down.
        Ok(task.await.map_err(|_| LockError::NoRuntime)??)
    }

    // ANCHOR: covers
    /// Runs a commit under this lock to its end, in a task of its own: cancelling the caller does
    /// not cancel the commit.
    ///
    /// The outcome of a failed commit is unknown: the connection may have broken while the commit
    /// was in flight, and Postgres may carry it out later. The next holder would read the state
    /// before it. So after an error the lock is neither released nor renewed, and expires with its
    /// lease. A commit that takes longer than the lease is not covered.
    ///
    /// # Errors
    /// The error of the commit.
    pub async fn commit_under_lock(
        &mut self,
        commit: impl Future<Output = sqlx::Result<()>> + Send + 'static,
    ) -> sqlx::Result<()> {
        let mut guard = Self {
            held: self.held.take(),
            acquisition_id: mem::take(&mut self.acquisition_id),
            token: self.token,
        };
        let task = tokio::spawn(async move {
            let committed = commit.await;
            if committed.is_err() {
                drop(guard.held.take());
            }
            committed.map(|()| guard)
        });
        *self = task.await.unwrap_or(Err(sqlx::Error::WorkerCrashed))?;
        Ok(())
    }
    // ANCHOR_END: covers

    /// Releases the lock in a task of its own: cancelling the caller does not cancel the release.
    fn spawn_release(&mut self) -> Option<JoinHandle<RedisResult<Released>>> {
        let held = self.held.take()?;
        let acquisition_id = mem::take(&mut self.acquisition_id);
        let runtime = Handle::try_current().ok()?;
        Some(runtime.spawn(async move {
            let is_last = Arc::strong_count(&held) == 1;
            if is_last {
                held.close();
            }
            let mut release = pin!(held.release(&acquisition_id));
            let released = match poll!(&mut release) {
                Poll::Ready(released) => released,
                Poll::Pending => {
                    // The release is in flight, and Redis runs the commands of a connection in
                    // order, so the next waiter of this process need not wait for the answer. If it
                    // is too early after all, it finds the lock held and waits for the message.
                    if is_last {
                        held.state.hand_off();
                    }
                    release.await
                }
            };
            match &released {
                Ok(Released::Free | Released::StillHeld(_)) => {}
                Ok(Released::NotOwner) => {
                    held.lost_leases.count();
                    tracing::warn!(lock = held.key, "a lock was lost before its release")
                }
                Err(why) => held
                    .causes
                    .warn("a lock was not released: it expires with its lease", why),
            }
            released
        }))
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        self.spawn_release();
    }
}

/// Marks the lock as lost when its lease expires. A renewal or a reentrant acquisition moves that
/// time.
async fn watch_expiry(state: Arc<LeaseState>) {
    let mut known = state.expires_at.subscribe();
    loop {
        let Some(expires_at) = *known.borrow_and_update() else {
            return;
        };
        tokio::time::sleep_until(expires_at.into()).await;
        if known.has_changed().is_ok_and(|changed| !changed) {
            return state.mark_lost();
        }
    }
}

// ANCHOR: watchdog
/// The watchdog: renews the lease every third of its duration, until the lock is lost. It keeps no
/// guard alive.
async fn renew(request: LockRequest, duration: Duration, state: Arc<LeaseState>) {
    let renewals = async {
        let mut thirds = interval_at((Instant::now() + duration / 3).into(), duration / 3);
        // A process that was frozen does not make up for the renewals it missed.
        thirds.set_missed_tick_behavior(MissedTickBehavior::Skip);
        loop {
            thirds.tick().await;
            let sent_at = Instant::now();
            let mut renew = request.scripts.renew.key(&request.key);
            renew.arg(request.owner.as_str()).arg(request.lease.millis());
            let mut commands = request.commands.clone();
            // A slow answer must not delay the next renewal, which may be the last one in time.
            match timeout(duration / 3, renew.invoke_async::<i64>(&mut commands)).await {
                Ok(Ok(1)) => {
                    state.extend(sent_at + duration);
                }
                Ok(Ok(_)) => return tracing::warn!(lock = request.key, "a lock was lost while it was held"),
                // The next third tries again, as long as the lease may still run.
                Ok(Err(why)) => tracing::warn!(lock = request.key, %why, "a lease could not be renewed"),
                Err(_) => tracing::warn!(lock = request.key, "a lease could not be renewed in time"),
            }
        }
    };
    // The expiry is noticed in time even if Redis does not answer.
    tokio::select! {
        () = renewals => state.mark_lost(),
        () = watch_expiry(state.clone()) => tracing::warn!(lock = request.key, "a lease expired that could not be renewed"),
    }
}
// ANCHOR_END: watchdog
