//! A distributed lock in Redis, for all instances of a server.
//!
//! Two locks share one guard. [`SpinLock`] is a key that is set if it does not exist; its waiters
//! poll.
//! [`RLock`] corresponds to Redisson's `RLock`: reentrant by owner, its waiters are woken by a
//! pub/sub message of the release, and a watchdog renews its [`Lease`] while the holder lives. With
//! [`FencingTokens::Monotonic`] it also issues a fencing token.
//!
//! Every lock here expires with its lease, whether its holder notices or not. A process that is
//! frozen for longer than the lease, by a pause of its virtual machine or by SIGSTOP, resumes with
//! a lock that another process may hold. No lock with a lease can prevent that; a fencing token
//! protects the resource instead, see [`Guard::token`].
//!
//! Sources: Redis documentation, "Distributed Locks with Redis"; Redisson reference, "Locks and
//! synchronizers"; M. Kleppmann, "How to do distributed locking" (2016), for fencing.

mod commands;
mod guard;
mod notifier;
mod rlock;
mod spin;

use std::{fmt, io, time::Duration};

use anyhow::Context;
use box_office::{CauseLog, Indeterminate, LostLeases, ReserveError, StrategyContext};
use redis::{Client, Cmd, ConnectionInfo, FromRedisValue, IntoConnectionInfo, Script, aio::ConnectionManagerConfig};
use tokio::time::timeout;
use uuid::Uuid;

pub use guard::{Guard, Released};
pub use notifier::ReleaseSubscription;
pub use rlock::{FencingTokens, LockInfo, MAX_LOCAL_HANDOFFS, RLock};
pub use spin::{Backoff, SpinLock};

/// How long a reservation waits for the lock before its answer is [`Indeterminate::Overloaded`].
pub const LOCK_TIMEOUT: Duration = Duration::from_secs(10);

/// The time limit of one Redis command.
pub const COMMAND_TIMEOUT: Duration = Duration::from_millis(500);

/// The name of the lock that a probe writes. No sale has it.
const PROBE: &str = "probe";

/// The lease of a lock: how long the lock outlives its holder.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lease {
    /// Expires this long after the acquisition.
    Fixed(Duration),
    /// Has this duration; a watchdog renews it every third of it while the guard exists and its
    /// process runs.
    Renewed(Duration),
}

impl Lease {
    /// The TTL that is set in Redis.
    pub fn duration(self) -> Duration {
        let (Self::Fixed(duration) | Self::Renewed(duration)) = self;
        duration
    }

    /// Checks that Redis can represent the lease.
    fn validated(self) -> Result<Self, LockError> {
        /// Redis and this process add the lease to their clocks, which must not overflow.
        const MAX: Duration = Duration::from_secs(100 * 365 * 24 * 60 * 60);

        match self.duration() {
            duration if duration < Duration::from_millis(1) => Err(LockError::LeaseTooShort(duration)),
            duration if duration > MAX => Err(LockError::LeaseTooLong(duration)),
            _ => Ok(self),
        }
    }

    fn millis(self) -> u64 {
        u64::try_from(self.duration().as_millis()).unwrap_or(u64::MAX)
    }
}

/// The identity of a lock holder. The same owner may acquire an [`RLock`] again; every other waits.
#[derive(Clone, PartialEq, Eq, Hash)]
pub struct Owner(String);

impl Owner {
    /// This owner, made unique for one acquisition.
    fn for_one_acquisition(&self) -> Self {
        Self(format!("{}:{}", self.0, Uuid::new_v4().simple()))
    }

    /// A globally unique owner.
    pub fn fresh() -> Self {
        Self(Uuid::new_v4().simple().to_string())
    }

    /// The value stored in Redis.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Owner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// The reasons why a lock was not acquired, or why its state is unknown.
#[derive(Debug, thiserror::Error)]
pub enum LockError {
    /// Another owner held the lock for the whole wait.
    #[error("the lock was not acquired within {0:?}")]
    NotAcquired(Duration),
    /// Redis is unreachable or answered with an error. The lock may have been acquired all the
    /// same; it then expires with its lease.
    #[error("the Redis command failed")]
    Redis(#[from] redis::RedisError),
    /// This Redis user lacks a permission.
    #[error(
        "this Redis user lacks a permission that the lock needs: `acl setuser {user} on ~{pattern} &{pattern} +@all` allows its keys and its channels"
    )]
    Forbidden {
        /// The name of the user.
        user: String,
        /// The pattern of the keys and of the channels of all locks.
        pattern: String,
        /// What Redis says.
        #[source]
        why: redis::RedisError,
    },
    /// No asynchronous runtime is left to send the release.
    #[error("no asynchronous runtime: the lock was not released and expires with its lease")]
    NoRuntime,
    /// Redis counts in whole milliseconds.
    #[error("a lease of {0:?} is too short: the minimum is one millisecond")]
    LeaseTooShort(Duration),
    /// The lease would overflow a clock.
    #[error("a lease of {0:?} is too long: the maximum is 100 years")]
    LeaseTooLong(Duration),
}

impl From<LockError> for ReserveError {
    /// A lock error is never a refusal: without the lock, the sale has not been read.
    fn from(error: LockError) -> Self {
        Self::Indeterminate(match error {
            LockError::NotAcquired(_) => Indeterminate::Overloaded,
            away => Indeterminate::BackendAway(away.into()),
        })
    }
}

/// Sets `TCP_USER_TIMEOUT`: the connection is closed when sent data stays unacknowledged this long.
/// Until then, commands sent to a peer that vanished are lost, although a new connection might
/// work.
///
/// `TCP_NODELAY` stays off: many tasks share the connection, and Nagle's algorithm batches their
/// commands.
fn with_tcp_user_timeout(redis: ConnectionInfo) -> ConnectionInfo {
    #[cfg(target_os = "linux")]
    let redis = {
        let tcp = redis.tcp_settings().clone();
        redis.set_tcp_settings(tcp.set_user_timeout(4 * COMMAND_TIMEOUT))
    };
    redis
}

/// The connections to one Redis: one for the commands of all tasks, one for pub/sub.
#[derive(Clone)]
pub struct Connections {
    commands: commands::Commands,
    notifier: notifier::ReleaseNotifier,
    prefix: String,
    /// The Redis user that the locks run as.
    user: String,
    causes: CauseLog,
    lost_leases: LostLeases,
}

impl Connections {
    /// Connects to the Redis of a context. Also returns the configured lease.
    ///
    /// # Errors
    /// No Redis is configured, or it does not answer.
    pub async fn from_context(context: &StrategyContext) -> anyhow::Result<(Self, Duration)> {
        let redis = context.redis.as_ref().context("this strategy needs REDIS_URL")?;
        let mut connections = Self::open(redis.url.expose(), &redis.prefix)
            .await
            .with_context(|| format!("REDIS_URL (--redis-url): no connection to Redis at {}", redis.url))?;
        connections.lost_leases = context.metrics.lost_leases.clone();
        // A fault that passes does not keep a server from starting: it is not ready until then.
        if let Err(forbidden @ LockError::Forbidden { .. }) = connections.check_writes().await {
            return Err(forbidden).context(format!("REDIS_URL (--redis-url): {}", redis.url));
        }
        Ok((connections, redis.lease))
    }

    /// Connects. Every key and every channel starts with `prefix`.
    ///
    /// # Errors
    /// The URL is invalid, or Redis does not answer.
    pub async fn open(url: &str, prefix: &str) -> redis::RedisResult<Self> {
        let info = with_tcp_user_timeout(url.into_connection_info()?);
        let user = info.redis_settings().username().unwrap_or("default").to_owned();
        let causes = CauseLog::default();
        let client = Client::open(info)?;
        let config = ConnectionManagerConfig::new()
            .set_response_timeout(Some(COMMAND_TIMEOUT))
            .set_connection_timeout(Some(COMMAND_TIMEOUT))
            // A command that cannot be sent fails; its caller decides whether to retry.
            .set_number_of_retries(1)
            .set_max_delay(Duration::from_millis(100));
        Ok(Self {
            commands: commands::Commands::open(client.clone(), config).await?,
            notifier: notifier::ReleaseNotifier::new(client, causes.clone()),
            prefix: prefix.to_owned(),
            user,
            causes,
            lost_leases: LostLeases::default(),
        })
    }

    /// Sends one command.
    ///
    /// # Errors
    /// [`LockError::Redis`] if Redis does not answer, or its answer has another type.
    pub async fn send<T: FromRedisValue>(&self, command: Cmd) -> Result<T, LockError> {
        Ok(command.query_async(&mut self.commands.clone()).await?)
    }

    /// Checks that Redis runs scripts and accepts the writes of a lock.
    async fn check_writes(&self) -> Result<(), LockError> {
        let probe = Script::new(include_str!("probe.lua"));
        let key = self.key(&format!("{PROBE}:{}", Uuid::new_v4().simple()));
        let written: redis::RedisResult<i64> = probe.key(key).invoke_async(&mut self.commands.clone()).await;
        written.map(drop).map_err(|why| self.failed(why))
    }

    /// Checks that what is published to this channel arrives.
    async fn check_messages(&self, channel: String) -> Result<(), LockError> {
        let mut subscription = self.notifier.subscribe(channel.clone());
        let published: redis::RedisResult<i64> = Cmd::publish(channel, PROBE)
            .query_async(&mut self.commands.clone())
            .await;
        published.map_err(|why| self.failed(why))?;
        // Either the message or the new subscription.
        match timeout(notifier::SUBSCRIBE_TIMEOUT, subscription.notified()).await {
            Ok(()) => Ok(()),
            Err(_) => {
                let why = self.notifier.last_error();
                Err(self.failed(why.unwrap_or_else(|| io::Error::from(io::ErrorKind::TimedOut).into())))
            }
        }
    }

    /// The error of a probe.
    fn failed(&self, why: redis::RedisError) -> LockError {
        // Of a command, and of a command in a script.
        let is_forbidden = why.code() == Some("NOPERM") || why.to_string().contains("ACL failure in script");
        match is_forbidden {
            true => LockError::Forbidden {
                user: self.user.clone(),
                pattern: format!("{}lock:*", self.prefix),
                why,
            },
            false => LockError::Redis(why),
        }
    }

    /// The key of a lock. The hash tag in braces keeps all keys of one lock in one slot of a
    /// cluster; a name that has a hash tag keeps it.
    pub fn key(&self, name: &str) -> String {
        let prefix = &self.prefix;
        let has_hash_tag = name
            .split_once('{')
            .is_some_and(|(_, rest)| rest.find('}').is_some_and(|at| at > 0));
        match has_hash_tag {
            true => format!("{prefix}lock:{name}"),
            false => format!("{prefix}lock:{{{name}}}"),
        }
    }
}
