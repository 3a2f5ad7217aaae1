//! A spin lock: a key that is set only if it does not exist, with a TTL and its owner as the value.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use redis::Script;

use super::{
    Connections, Guard, Lease, LockError, Owner,
    guard::{LockRequest, Scripts},
};

/// Exponential backoff with full jitter between two attempts.
///
/// Without jitter, all waiters that failed together would retry together (AWS Architecture Blog,
/// "Exponential Backoff And Jitter", 2015).
#[derive(Clone, Copy, Debug)]
pub struct Backoff {
    /// The longest first pause.
    pub initial: Duration,
    /// The longest pause of all.
    pub max: Duration,
}

impl Default for Backoff {
    /// The values of Redisson's spin lock.
    fn default() -> Self {
        Self {
            initial: Duration::from_millis(1),
            max: Duration::from_millis(128),
        }
    }
}

impl Backoff {
    // ANCHOR: pauses
    /// The pause after this many failed attempts, for a random number `jitter` from 0 to 1.
    pub fn pause(self, failures: u32, jitter: f64) -> Duration {
        let doubled = self
            .initial
            .saturating_mul(2_u32.saturating_pow(failures.saturating_sub(1)));
        doubled.min(self.max).mul_f64(jitter)
    }
    // ANCHOR_END: pauses
}

/// A lock that sends `SET key owner NX PX lease` until the key is set.
pub struct SpinLock {
    connections: Connections,
    lease: Lease,
    backoff: Backoff,
    scripts: Arc<Scripts>,
}

impl SpinLock {
    /// Creates a lock with this lease on this Redis.
    ///
    /// # Errors
    /// [`LockError::LeaseTooShort`] or [`LockError::LeaseTooLong`].
    pub fn new(connections: Connections, lease: Lease, backoff: Backoff) -> Result<Self, LockError> {
        Ok(Self {
            connections,
            lease: lease.validated()?,
            backoff,
            scripts: Arc::new(Scripts {
                release: Script::new(include_str!("spin_release.lua")),
                renew: Script::new(include_str!("spin_renew.lua")),
            }),
        })
    }

    /// The connections of this lock.
    pub fn connections(&self) -> &Connections {
        &self.connections
    }

    /// Checks that Redis does what an acquisition and a release need: it runs scripts and accepts
    /// writes. Its waiters need no channel.
    ///
    /// # Errors
    /// [`LockError::Redis`] with the reason; [`LockError::Forbidden`] if this Redis user lacks a
    /// permission.
    pub async fn ready(&self) -> Result<(), LockError> {
        self.connections.check_writes().await
    }

    /// Acquires the lock if it is free. The lock is not reentrant: its owner is rejected like any
    /// other.
    ///
    /// # Errors
    /// [`LockError::Redis`] if Redis does not answer.
    pub async fn try_acquire(&self, name: &str, owner: &Owner) -> Result<Option<Guard>, LockError> {
        let request = LockRequest {
            causes: self.connections.causes.clone(),
            lost_leases: self.connections.lost_leases.clone(),
            key: self.connections.key(name),
            // Releases are not published.
            channel: String::new(),
            // A cancelled attempt is released, as it may have acquired the lock. It must not
            // release another acquisition of the same owner.
            owner: owner.for_one_acquisition(),
            lease: self.lease,
            scripts: self.scripts.clone(),
            commands: self.connections.commands.clone(),
        };
        // ANCHOR: try-acquire
        let mut set = redis::cmd("SET");
        // One command: with a second one for the TTL, an owner that dies in between would leave the
        // lock for ever.
        set.arg(&request.key)
            .arg(request.owner.as_str())
            .arg("NX")
            .arg("PX")
            .arg(self.lease.millis());

        let pending = request.pending(request.owner.as_str().to_owned());
        let sent_at = Instant::now();
        let reply: Option<String> = set.query_async(&mut request.commands.clone()).await?;
        let id = pending.answered();
        Ok(reply.map(|_| Guard::new(Arc::new(request.into_held(sent_at, None)), id, None)))
        // ANCHOR_END: try-acquire
    }

    /// Acquires the lock, and tries at most this long.
    ///
    /// # Errors
    /// [`LockError::NotAcquired`] after the wait; [`LockError::Redis`] if Redis does not answer.
    pub async fn acquire(&self, name: &str, owner: &Owner, wait: Duration) -> Result<Guard, LockError> {
        // `None`: too far in the future for the clock.
        let deadline = Instant::now().checked_add(wait);
        let mut failures = 0;
        loop {
            if let Some(guard) = self.try_acquire(name, owner).await? {
                return Ok(guard);
            }
            failures += 1;
            let left = deadline.map_or(Duration::MAX, |deadline| {
                deadline.saturating_duration_since(Instant::now())
            });
            if left.is_zero() {
                return Err(LockError::NotAcquired(wait));
            }
            let pause = self.backoff.pause(failures, rand::random());
            tokio::time::sleep(pause.min(left)).await;
        }
    }
}
