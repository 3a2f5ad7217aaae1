//! A reentrant lock: a pub/sub message wakes its waiters, a watchdog renews its lease.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError, Weak},
    time::{Duration, Instant},
};

use redis::{RedisResult, Script};
use tokio::sync::Mutex as LocalQueue;
use uuid::Uuid;

use super::{
    Connections, Guard, Lease, LockError, Owner, PROBE,
    guard::{HeldLock, LocalQueuePermit, LocalQueueState, LockRequest, Scripts},
    notifier::ReleaseSubscription,
};

/// How often in a row a lock goes from one task of this process to the next without a pause.
///
/// The next task's command follows right behind the release, before any other process receives its
/// message. Without a bound, a process whose queue never empties would starve all others.
pub const MAX_LOCAL_HANDOFFS: u32 = 100;

/// The pause after that many handoffs: other processes receive the message of the release and ask.
const YIELD_TO_OTHERS: Duration = Duration::from_millis(2);

/// Whether a lock issues fencing tokens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FencingTokens {
    /// It issues none.
    None,
    /// Each acquisition gets a token greater than all before it, even if Redis lost its data in
    /// between.
    Monotonic,
}

/// A reentrant lock for any number of processes.
///
/// The tasks of a process queue locally, and only the head of the queue asks Redis: 1,000 waiters
/// of one process send Redis no more commands than one.
pub struct RLock {
    connections: Connections,
    lease: Lease,
    tokens: FencingTokens,
    acquire: Script,
    force: Script,
    scripts: Arc<Scripts>,
    local: Mutex<HashMap<String, LocalLock>>,
}

/// What this process knows of one lock.
struct LocalLock {
    queue: Arc<LocalQueue<LocalQueueState>>,
    holder: Weak<HeldLock>,
}

/// The state of a lock in Redis.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LockInfo {
    /// The owner that holds it.
    pub owner: String,
    /// How often the owner has acquired it.
    pub hold_count: u64,
    /// The time until the lease expires, if it is not renewed.
    pub ttl: Duration,
}

/// The answer of Redis to one command that asks for the lock.
enum AcquireReply {
    Acquired(Acquisition),
    HeldByOther { ttl: Duration },
}

/// One acquisition that Redis has granted.
struct Acquisition {
    id: String,
    /// How often the owner holds the lock, this acquisition included.
    hold_count: i64,
    token: Option<i64>,
    sent_at: Instant,
}

impl RLock {
    /// Creates a lock with this lease on this Redis.
    ///
    /// # Errors
    /// [`LockError::LeaseTooShort`] or [`LockError::LeaseTooLong`].
    pub fn new(connections: Connections, lease: Lease, tokens: FencingTokens) -> Result<Self, LockError> {
        Ok(Self {
            connections,
            lease: lease.validated()?,
            tokens,
            acquire: Script::new(match tokens {
                FencingTokens::None => include_str!("acquire.lua"),
                FencingTokens::Monotonic => include_str!("acquire_with_token.lua"),
            }),
            force: Script::new(include_str!("force.lua")),
            scripts: Arc::new(Scripts {
                release: Script::new(include_str!("release.lua")),
                renew: Script::new(include_str!("renew.lua")),
            }),
            local: Mutex::default(),
        })
    }

    /// Acquires the lock if it is free or already held by this owner. Never waits.
    ///
    /// # Errors
    /// [`LockError::Redis`] if Redis does not answer.
    pub async fn try_acquire(&self, name: &str, owner: &Owner) -> Result<Option<Guard>, LockError> {
        if let Some(again) = self.reacquire(name, owner).await? {
            return Ok(Some(again));
        }
        // Another task of this process holds the lock or is at the head of the queue.
        let Ok(mut permit) = self.queue(name).try_lock_owned() else {
            return Ok(None);
        };
        let request = self.request(name, owner);
        Ok(match self.ask_at_head(&request, &mut permit).await? {
            AcquireReply::Acquired(acquisition) => Some(self.guard(name, request, acquisition, permit)),
            AcquireReply::HeldByOther { .. } => None,
        })
    }

    /// Acquires the lock, and waits for it at most this long. A cancelled wait leaves nothing
    /// behind.
    ///
    /// The owner of a lock may acquire it again. Of two concurrent first acquisitions of one owner,
    /// the second waits for the release of the first.
    ///
    /// # Errors
    /// [`LockError::NotAcquired`] after the wait; [`LockError::Redis`] if Redis does not answer
    /// this task or another one of this process's queue.
    pub async fn acquire(&self, name: &str, owner: &Owner, wait: Duration) -> Result<Guard, LockError> {
        if wait.is_zero() {
            let tried = self.try_acquire(name, owner).await?;
            return tried.ok_or(LockError::NotAcquired(wait));
        }
        match tokio::time::timeout(wait, self.wait_for(name, owner)).await {
            Ok(acquired) => acquired,
            Err(_) => Err(LockError::NotAcquired(wait)),
        }
    }

    /// Waits without a time limit: first in the queue of this process, then for Redis.
    async fn wait_for(&self, name: &str, owner: &Owner) -> Result<Guard, LockError> {
        if let Some(again) = self.reacquire(name, owner).await? {
            return Ok(again);
        }
        let (queue, queued_at) = (self.queue(name), Instant::now());
        let (mut permit, mut released) = match queue.clone().try_lock_owned() {
            Ok(permit) => (permit, None),
            Err(_) => {
                // Queued tasks subscribe at once, so that the subscription outlives each head of
                // the queue.
                let released = self.subscribe(name);
                (queue.lock_owned().await, Some(released))
            }
        };
        // Tasks that were queued when Redis failed share that error: they do not run into one
        // time-out each.
        if let Some((failed_at, why)) = &permit.last_error
            && *failed_at >= queued_at
        {
            return Err(why.clone().into());
        }
        if permit.consecutive_handoffs >= MAX_LOCAL_HANDOFFS {
            permit.consecutive_handoffs = 0;
            tokio::time::sleep(YIELD_TO_OTHERS).await;
        }
        let request = self.request(name, owner);
        // ANCHOR: wait
        loop {
            let ttl = match self.ask_at_head(&request, &mut permit).await? {
                AcquireReply::Acquired(acquisition) => return Ok(self.guard(name, request, acquisition, permit)),
                AcquireReply::HeldByOther { ttl } => ttl,
            };
            match &mut released {
                // Subscribes before it asks again: a message published in between would be lost.
                None => released = Some(self.subscribe(name)),
                // The lease bounds the wait: after it the lock is free unless renewed, even if the
                // message is lost.
                Some(released) => {
                    let _ = tokio::time::timeout(ttl, released.notified()).await;
                }
            }
        }
        // ANCHOR_END: wait
    }

    /// Checks that Redis does what an acquisition, a wait and a release need: it runs scripts,
    /// accepts writes, and delivers messages on the channels of the releases.
    ///
    /// # Errors
    /// [`LockError::Redis`] with the reason; [`LockError::Forbidden`] if this Redis user lacks a
    /// permission.
    pub async fn ready(&self) -> Result<(), LockError> {
        self.connections.check_writes().await?;
        self.connections.check_messages(self.channel(PROBE)).await
    }

    /// Checks that this Redis user may send and receive the messages of releases, which no time
    /// heals: without that a server must not start. [`Connections::from_context`] has checked the
    /// writes. Other faults pass, and are for [`ready`](Self::ready).
    ///
    /// # Errors
    /// [`LockError::Forbidden`].
    pub async fn check_permissions(&self) -> Result<(), LockError> {
        match self.connections.check_messages(self.channel(PROBE)).await {
            Err(forbidden @ LockError::Forbidden { .. }) => Err(forbidden),
            _ => Ok(()),
        }
    }

    /// Subscribes to the messages of this lock's releases.
    ///
    /// Waiting for a message alone is a mistake: a dead holder publishes none, and a message
    /// published while the connection is down is lost.
    pub fn subscribe(&self, name: &str) -> ReleaseSubscription {
        self.connections.notifier.subscribe(self.channel(name))
    }

    /// Acquires the lock again, if this owner holds it in this process.
    async fn reacquire(&self, name: &str, owner: &Owner) -> RedisResult<Option<Guard>> {
        let Some(held) = self.held_by(name, owner) else {
            return Ok(None);
        };
        match self.ask(&held).await? {
            AcquireReply::Acquired(again) if again.hold_count > 1 && held.reacquired(again.sent_at) => {
                return Ok(Some(Guard::new(held, again.id, again.token)));
            }
            // The lock had been lost. Keeping it under the old guard would hide the loss from that
            // guard's user.
            AcquireReply::Acquired(anew) => drop(held.release(&anew.id).await?),
            // The lock was lost, and another owner holds it.
            AcquireReply::HeldByOther { .. } => {}
        }
        held.mark_lost();
        Ok(None)
    }

    /// Asks Redis from the head of the local queue. An error is recorded for the other tasks in the
    /// queue.
    async fn ask_at_head(&self, request: &LockRequest, permit: &mut LocalQueuePermit) -> RedisResult<AcquireReply> {
        let reply = self.ask(request).await;
        reply.inspect_err(|why| permit.last_error = Some((Instant::now(), why.clone())))
    }

    /// Asks Redis for the lock. If this future is dropped, an acquisition that it may have made is
    /// released.
    async fn ask(&self, request: &LockRequest) -> RedisResult<AcquireReply> {
        let pending = request.pending(Uuid::new_v4().simple().to_string());
        let mut acquire = self.acquire.prepare_invoke();
        acquire.key(&request.key);
        if self.tokens == FencingTokens::Monotonic {
            acquire.key(format!("{}:token", request.key));
        }
        acquire
            .arg(request.owner.as_str())
            .arg(request.lease.millis())
            .arg(pending.acquisition_id());
        let sent_at = Instant::now();
        let (acquired, value, token): (u8, i64, i64) = acquire.invoke_async(&mut request.commands.clone()).await?;
        let id = pending.answered();
        Ok(match acquired {
            1 => AcquireReply::Acquired(Acquisition {
                id,
                hold_count: value,
                token: (self.tokens == FencingTokens::Monotonic).then_some(token),
                sent_at,
            }),
            _ => AcquireReply::HeldByOther {
                // A key without a TTL was not set by this lock: another client has to delete it.
                ttl: u64::try_from(value).map_or(request.lease.duration(), Duration::from_millis),
            },
        })
    }

    /// The connections of this lock.
    pub fn connections(&self) -> &Connections {
        &self.connections
    }

    /// Releases the lock, whoever holds it. Returns whether it was held.
    ///
    /// A holder in this process is notified at once, one in another process at its next renewal or
    /// release; the tasks queued behind that holder in its process wait for that as well.
    ///
    /// # Errors
    /// [`LockError::Redis`] if Redis does not answer.
    pub async fn force_release(&self, name: &str) -> Result<bool, LockError> {
        // Read before the script: this holder has lost the lock afterwards, a later one has not.
        let holder = self.local_locks().get(name).and_then(|local| local.holder.upgrade());
        let released: i64 = self
            .force
            .key(self.connections.key(name))
            .arg(self.channel(name))
            .invoke_async(&mut self.connections.commands.clone())
            .await?;
        // A local holder need not wait for its next renewal, nor the local queue for the end of the
        // lease.
        if released == 1
            && let Some(holder) = holder
        {
            holder.mark_lost();
        }
        Ok(released == 1)
    }

    /// Reads the state of the lock; `None` if it is free.
    ///
    /// # Errors
    /// [`LockError::Redis`] if Redis does not answer.
    pub async fn info(&self, name: &str) -> Result<Option<LockInfo>, LockError> {
        let key = self.connections.key(name);
        let (owner, fields, ttl_ms): (Option<String>, u64, i64) = redis::pipe()
            .atomic()
            .cmd("HGET")
            .arg(&key)
            .arg("owner")
            .cmd("HLEN")
            .arg(&key)
            .cmd("PTTL")
            .arg(&key)
            .query_async(&mut self.connections.commands.clone())
            .await?;
        Ok(owner.map(|owner| LockInfo {
            owner,
            hold_count: fields - 1,
            ttl: Duration::from_millis(u64::try_from(ttl_ms).unwrap_or(0)),
        }))
    }

    fn request(&self, name: &str, owner: &Owner) -> LockRequest {
        LockRequest {
            causes: self.connections.causes.clone(),
            lost_leases: self.connections.lost_leases.clone(),
            key: self.connections.key(name),
            channel: self.channel(name),
            owner: owner.clone(),
            lease: self.lease,
            scripts: self.scripts.clone(),
            commands: self.connections.commands.clone(),
        }
    }

    /// The guard of a new acquisition, recorded as the holder in this process.
    fn guard(&self, name: &str, request: LockRequest, acquisition: Acquisition, permit: LocalQueuePermit) -> Guard {
        let held = Arc::new(request.into_held(acquisition.sent_at, Some(permit)));
        if let Some(local) = self.local_locks().get_mut(name) {
            local.holder = Arc::downgrade(&held);
        }
        Guard::new(held, acquisition.id, acquisition.token)
    }

    fn channel(&self, name: &str) -> String {
        format!("{}:released", self.connections.key(name))
    }

    fn local_locks(&self) -> MutexGuard<'_, HashMap<String, LocalLock>> {
        self.local.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The local queue of a lock. Drops the queues of unused locks once there are too many.
    fn queue(&self, name: &str) -> Arc<LocalQueue<LocalQueueState>> {
        const MAX_UNUSED: usize = 1024;

        let mut local = self.local_locks();
        if local.len() >= MAX_UNUSED {
            local.retain(|_, lock| Arc::strong_count(&lock.queue) > 1 || lock.holder.strong_count() > 0);
        }
        let lock = local.entry(name.to_owned()).or_insert_with(|| LocalLock {
            queue: Arc::default(),
            holder: Weak::new(),
        });
        lock.queue.clone()
    }

    /// The lock as this owner holds it in this process, unless it is lost.
    fn held_by(&self, name: &str, owner: &Owner) -> Option<Arc<HeldLock>> {
        let held = self.local_locks().get(name)?.holder.upgrade()?;
        (held.owner == *owner && !held.is_lost()).then_some(held)
    }
}
