//! The simplest lock that is one: a key that is set if it is not there, with an end, and a name in it.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use redis::Script;

use super::{
    Connections, Guard, Lease, LockError, Owner,
    guard::{Scripts, Terms},
};

/// How long to pause between two attempts: twice as long each time, up to a bound, and by chance somewhere between nothing and that.
///
/// Without chance, all who failed together would come again together (AWS Architecture Blog, "Exponential Backoff And Jitter", 2015).
#[derive(Clone, Copy, Debug)]
pub struct Pauses {
    /// The first one at most.
    pub first: Duration,
    /// Any one at most.
    pub longest: Duration,
}

impl Default for Pauses {
    /// Those of Redisson's spin lock.
    fn default() -> Self {
        Self {
            first: Duration::from_millis(1),
            longest: Duration::from_millis(128),
        }
    }
}

impl Pauses {
    // ANCHOR: pauses
    /// The pause after so many attempts that failed, for a number from 0 to 1 that chance has picked.
    pub fn after(self, failures: u32, chance: f64) -> Duration {
        let doubled = self
            .first
            .saturating_mul(2_u32.saturating_pow(failures.saturating_sub(1)));
        doubled.min(self.longest).mul_f64(chance)
    }
    // ANCHOR_END: pauses
}

/// `SET key owner NX PX lease`, again and again.
pub struct SpinLock {
    connections: Connections,
    lease: Lease,
    pauses: Pauses,
    scripts: Arc<Scripts>,
}

impl SpinLock {
    /// Locks on this Redis, with this lease.
    ///
    /// # Errors
    /// The lease is shorter or longer than Redis can count.
    pub fn new(connections: Connections, lease: Lease, pauses: Pauses) -> Result<Self, LockError> {
        Ok(Self {
            connections,
            lease: lease.checked()?,
            pauses,
            scripts: Arc::new(Scripts {
                release: Script::new(include_str!("spin_release.lua")),
                renew: Script::new(include_str!("spin_renew.lua")),
            }),
        })
    }

    /// The connections that it uses.
    pub fn connections(&self) -> &Connections {
        &self.connections
    }

    /// Takes the lock if it is free. It is not reentrant: its owner finds it taken as everybody else does.
    ///
    /// # Errors
    /// Redis does not answer.
    pub async fn try_acquire(&self, name: &str, owner: &Owner) -> Result<Option<Guard>, LockError> {
        let terms = Terms {
            key: self.connections.key(name),
            // Nobody listens.
            channel: String::new(),
            // An attempt that is cancelled is given back, as it may have been the one that took the lock. It must not give back what the same
            // owner has by another one.
            owner: owner.once(),
            lease: self.lease,
            scripts: self.scripts.clone(),
            commands: self.connections.commands.clone(),
        };
        // ANCHOR: try-acquire
        let mut set = redis::cmd("SET");
        // One command: a lock that was set and got its end by a second one would stay for ever if its owner died in between.
        set.arg(&terms.key)
            .arg(terms.owner.as_str())
            .arg("NX")
            .arg("PX")
            .arg(self.lease.millis());

        let attempt = terms.attempt(terms.owner.as_str().to_owned());
        let sent = Instant::now();
        let answer: Option<String> = set.query_async(&mut terms.commands.clone()).await?;
        let hold = attempt.answered();
        Ok(answer.map(|_| Guard::new(Arc::new(terms.hold(sent, None)), hold, None)))
        // ANCHOR_END: try-acquire
    }

    /// Takes the lock, and asks for it so long at most.
    ///
    /// # Errors
    /// [`LockError::NotAcquired`] when the wait is over; or Redis does not answer.
    pub async fn acquire(&self, name: &str, owner: &Owner, wait: Duration) -> Result<Guard, LockError> {
        // None is too far to be reckoned with.
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
            let pause = self.pauses.after(failures, rand::random());
            tokio::time::sleep(pause.min(left)).await;
        }
    }
}
