//! The subject of this level: a lock that lives in Redis, so that every instance of a server can take it.
//!
//! Two locks share one guard. [`SpinLock`] is a key that is set if it is not there, and asked for again and again. [`RLock`] is what
//! Redisson's `RLock` is to Java: reentrant by owner, woken by a message when the lock is given back, and with a [`Lease`] that is renewed
//! for as long as the holder lives. With [`Tokens::Growing`] it also hands out a fencing token.
//!
//! Every lock here ends with its lease, whether its holder knows or not. A process that stands still for longer than that, in a pause of
//! its virtual machine or under SIGSTOP, goes on with a lock that somebody else has by then. No lock of this kind can prevent it; see
//! [`Guard::token`] for what can.
//!
//! Sources: Redis documentation, "Distributed Locks with Redis"; Redisson reference, "Locks and synchronizers"; M. Kleppmann, "How to do
//! distributed locking" (2016), for fencing.

mod guard;
mod rlock;
mod spin;
mod wakeup;

use std::{fmt, time::Duration};

use anyhow::Context;
use box_office::{Indeterminate, ReserveError, StrategyContext};
use redis::{
    Client, Cmd, ConnectionInfo, FromRedisValue, IntoConnectionInfo,
    aio::{ConnectionManager, ConnectionManagerConfig},
};
use uuid::Uuid;

pub use guard::{Guard, Released};
pub use rlock::{HANDED_ON_AT_MOST, Probe, RLock, Tokens};
pub use spin::{Pauses, SpinLock};
pub use wakeup::Releases;

/// How long a buyer waits for a lock before the answer is "undecided".
pub const WAIT: Duration = Duration::from_secs(10);

/// How long Redis may take for one command.
pub const COMMAND_TIMEOUT: Duration = Duration::from_millis(500);

/// How long a lock outlives its holder.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lease {
    /// So long from the moment it is taken, and then it is gone.
    Fixed(Duration),
    /// A watchdog renews it every third of that time, for as long as the guard is there and its process runs.
    Renewed(Duration),
}

impl Lease {
    /// The time-to-live that is set in Redis.
    pub fn time(self) -> Duration {
        let (Self::Fixed(time) | Self::Renewed(time)) = self;
        time
    }

    /// The lease, if Redis can count it.
    fn checked(self) -> Result<Self, LockError> {
        /// Redis adds it to its clock, and so does this process.
        const LONGEST: Duration = Duration::from_secs(100 * 365 * 24 * 60 * 60);

        match self.time() {
            time if time < Duration::from_millis(1) => Err(LockError::LeaseTooShort(time)),
            time if time > LONGEST => Err(LockError::LeaseTooLong(time)),
            _ => Ok(self),
        }
    }

    fn millis(self) -> u64 {
        u64::try_from(self.time().as_millis()).unwrap_or(u64::MAX)
    }
}

/// Who holds a lock. The same owner may take it again; everybody else waits.
#[derive(Clone, PartialEq, Eq, Hash)]
pub struct Owner(String);

impl Owner {
    /// The same owner, this once.
    fn once(&self) -> Self {
        Self(format!("{}:{}", self.0, Uuid::new_v4().simple()))
    }

    /// One that nobody else is, on this machine or another.
    pub fn fresh() -> Self {
        Self(Uuid::new_v4().simple().to_string())
    }

    /// As it stands in Redis.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Owner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Why there is no lock, or why nobody can say.
#[derive(Debug, thiserror::Error)]
pub enum LockError {
    /// It stayed somebody else's until the wait was over.
    #[error("the lock was not free within {0:?}")]
    NotAcquired(Duration),
    /// Redis can't be reached, or answered with an error. A lock may have been taken all the same: it ends with its lease.
    #[error("Redis does not answer as it should")]
    Redis(#[from] redis::RedisError),
    /// Nobody is there to talk to Redis.
    #[error("the asynchronous runtime is gone, so the lock was not given back: it ends with its lease")]
    NoRuntime,
    /// A lease that Redis can't count.
    #[error("a lease of {0:?} is none: it takes at least a millisecond")]
    LeaseTooShort(Duration),
    /// Another one.
    #[error("a lease of {0:?} is too long: it takes a hundred years at most")]
    LeaseTooLong(Duration),
}

impl From<LockError> for ReserveError {
    /// A lock never refuses anybody: without it, nobody has looked at the sale.
    fn from(error: LockError) -> Self {
        Self::Indeterminate(match error {
            LockError::NotAcquired(_) => Indeterminate::Overloaded,
            away => Indeterminate::BackendAway(away.into()),
        })
    }
}

/// A connection whose other end is gone without a word breaks when nothing was acknowledged for so long. Until then all that is sent on it is sent in
/// vain, though a new connection might do.
///
/// `TCP_NODELAY` stays off: a thousand tasks share the connection, and while something is on its way their commands are better sent together.
fn missed_soon(redis: ConnectionInfo) -> ConnectionInfo {
    #[cfg(target_os = "linux")]
    let redis = {
        let tcp = redis.tcp_settings().clone();
        redis.set_tcp_settings(tcp.set_user_timeout(4 * COMMAND_TIMEOUT))
    };
    redis
}

/// Connections to one Redis: one for commands, which all tasks share, and one for messages.
#[derive(Clone)]
pub struct Connections {
    commands: ConnectionManager,
    wakeups: wakeup::Wakeups,
    prefix: String,
}

impl Connections {
    /// Connects to the Redis of a context. Tells the lease of its locks as well.
    ///
    /// # Errors
    /// There is none, or it does not answer.
    pub async fn on(context: &StrategyContext) -> anyhow::Result<(Self, Duration)> {
        let redis = context.redis.as_ref().context("this strategy needs REDIS_URL")?;
        let connections = Self::open(redis.url.expose(), &redis.prefix)
            .await
            .with_context(|| format!("REDIS_URL (--redis-url): no connection to Redis at {}", redis.url))?;
        Ok((connections, redis.lease))
    }

    /// Connects. `prefix` stands before every key and every channel.
    ///
    /// # Errors
    /// The URL is none, or Redis does not answer.
    pub async fn open(url: &str, prefix: &str) -> redis::RedisResult<Self> {
        let client = Client::open(missed_soon(url.into_connection_info()?))?;
        let config = ConnectionManagerConfig::new()
            .set_response_timeout(Some(COMMAND_TIMEOUT))
            .set_connection_timeout(Some(COMMAND_TIMEOUT))
            // A command that can't be sent says so; whoever sent it decides whether to try again.
            .set_number_of_retries(1)
            .set_max_delay(Duration::from_millis(100));
        Ok(Self {
            commands: ConnectionManager::new_with_config(client.clone(), config).await?,
            wakeups: wakeup::Wakeups::new(client),
            prefix: prefix.to_owned(),
        })
    }

    /// Sends one command.
    ///
    /// # Errors
    /// Redis does not answer, or not in the way that was asked for.
    pub async fn send<T: FromRedisValue>(&self, command: Cmd) -> Result<T, LockError> {
        Ok(command.query_async(&mut self.commands.clone()).await?)
    }

    /// The key of a lock. Braces keep all that belongs to one lock in one slot of a cluster; those that are there already count.
    pub fn key(&self, name: &str) -> String {
        let prefix = &self.prefix;
        let has_a_tag = name
            .split_once('{')
            .is_some_and(|(_, rest)| rest.find('}').is_some_and(|at| at > 0));
        match has_a_tag {
            true => format!("{prefix}lock:{name}"),
            false => format!("{prefix}lock:{{{name}}}"),
        }
    }
}
