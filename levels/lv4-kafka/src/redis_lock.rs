//! A minimal distributed lock: LV.3's spin lock, reduced to what this level needs.
//!
//! One command acquires it, and a script releases it if the owner still holds it. The lease is
//! fixed, so the lock has the limit that LV.3 shows: a holder that is frozen for longer than the
//! lease resumes while another one holds the lock.
//!
//! Source: Redis documentation, "Distributed Locks with Redis", "Correct implementation with a
//! single instance".

use std::{
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use anyhow::Context;
use box_office::{CauseLog, Indeterminate, LostLeases, ReserveError, StrategyContext};
use redis::{
    Client, ConnectionInfo, IntoConnectionInfo, RedisError, RedisResult, Script,
    aio::{ConnectionManager, ConnectionManagerConfig},
};
use tokio::time::{Instant, sleep, timeout};
use uuid::Uuid;

/// The timeout of a Redis command and of a connection attempt.
const COMMAND_TIMEOUT: Duration = Duration::from_millis(500);

/// The bounds of the delay between two attempts: short at first, as a lock is held for about a
/// millisecond.
const MIN_BACKOFF: Duration = Duration::from_millis(1);
const MAX_BACKOFF: Duration = Duration::from_millis(4);

/// Acquires and releases locks.
#[derive(Clone)]
pub struct LockClient {
    /// Replaced when it falls silent: redis-rs reconnects only when a connection breaks.
    redis: Arc<Mutex<ConnectionManager>>,
    client: Client,
    config: ConnectionManagerConfig,
    prefix: String,
    lease: Duration,
    release: Script,
    causes: CauseLog,
    lost_leases: LostLeases,
}

/// A lock that was acquired. [`LockClient::release`] releases it; otherwise it expires with its
/// lease.
pub struct HeldLock {
    key: String,
    owner: String,
}

impl LockClient {
    /// Connects to the Redis of this context.
    ///
    /// # Errors
    /// If Redis is not configured or does not answer.
    pub async fn connect(context: &StrategyContext) -> anyhow::Result<Self> {
        let settings = context.redis.as_ref().context("this strategy needs REDIS_URL")?;
        let config = ConnectionManagerConfig::new()
            .set_response_timeout(Some(COMMAND_TIMEOUT))
            .set_connection_timeout(Some(COMMAND_TIMEOUT))
            .set_max_delay(Duration::from_millis(500));
        let client = Client::open(with_tcp_user_timeout(settings.url.expose().into_connection_info()?))?;
        let redis = ConnectionManager::new_with_config(client.clone(), config.clone())
            .await
            .with_context(|| format!("REDIS_URL (--redis-url): no connection to Redis at {}", settings.url))?;
        let client = Self {
            redis: Arc::new(Mutex::new(redis)),
            client,
            config,
            prefix: settings.prefix.clone(),
            lease: settings.lease,
            causes: CauseLog::default(),
            lost_leases: context.metrics.lost_leases.clone(),
            release: Script::new(
                "if redis.call('get', KEYS[1]) == ARGV[1] then
                     return redis.call('del', KEYS[1])
                 end
                 return 0",
            ),
        };
        // A fault that passes does not keep a server from starting: it is not ready until then.
        if let Err(why) = client.probe().await
            && is_forbidden(&why)
        {
            let (url, prefix) = (&settings.url, &settings.prefix);
            return Err(why).with_context(|| {
                format!("REDIS_URL (--redis-url): {url}: this Redis user needs `~{prefix}lock:*`, SET and scripts")
            });
        }
        Ok(client)
    }

    /// Acquires the lock of this name.
    ///
    /// # Errors
    /// [`Indeterminate::Overloaded`] if another owner holds it for longer than `timeout`;
    /// [`Indeterminate::BackendAway`] if Redis does not answer.
    pub async fn acquire(&self, name: &str, timeout: Duration) -> Result<HeldLock, ReserveError> {
        let held = HeldLock {
            key: format!("{}lock:{name}", self.prefix),
            owner: Uuid::new_v4().simple().to_string(),
        };
        let deadline = Instant::now() + timeout;
        let mut max_delay = MIN_BACKOFF;
        let mut redis = self.redis();
        loop {
            match self.try_acquire(&held, &mut redis).await {
                Ok(false) => {}
                Ok(true) => return Ok(held),
                Err(why) => {
                    tokio::spawn(self.clone().release_until_lease_ends(held, redis));
                    self.replace_if_silent(&why).await;
                    return Err(away(why));
                }
            }
            if Instant::now() >= deadline {
                return Err(Indeterminate::Overloaded.into());
            }
            sleep(max_delay.mul_f64(rand::random_range(0.0..1.0))).await;
            max_delay = (max_delay * 2).min(MAX_BACKOFF);
        }
    }

    /// Whether the lock was free and is acquired.
    async fn try_acquire(&self, held: &HeldLock, redis: &mut ConnectionManager) -> RedisResult<bool> {
        let set: Option<String> = redis::cmd("SET")
            .arg(&held.key)
            .arg(&held.owner)
            .arg("NX")
            .arg("PX")
            .arg(u64::try_from(self.lease.as_millis()).unwrap_or(u64::MAX))
            .query_async(redis)
            .await?;
        Ok(set.is_some())
    }

    /// Releases a lock if the owner still holds it.
    pub async fn release(&self, held: HeldLock) {
        match self.try_release(&held, &mut self.redis()).await {
            Ok(0) => self.lost_leases.count(),
            Ok(_) => {}
            Err(why) => {
                self.replace_if_silent(&why).await;
                self.causes
                    .warn("a lock could not be released; it expires with its lease", &why);
            }
        }
    }

    async fn try_release(&self, held: &HeldLock, redis: &mut ConnectionManager) -> RedisResult<i32> {
        self.release.key(&held.key).arg(&held.owner).invoke_async(redis).await
    }

    fn redis(&self) -> ConnectionManager {
        self.redis.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Replaces the connection after a command that was not answered, if Redis answers on a new
    /// one.
    async fn replace_if_silent(&self, why: &RedisError) {
        if !why.is_timeout() {
            return;
        }
        let answering = async {
            let mut new = ConnectionManager::new_with_config(self.client.clone(), self.config.clone()).await?;
            redis::Cmd::ping().exec_async(&mut new).await?;
            RedisResult::Ok(new)
        };
        if let Ok(Ok(new)) = timeout(2 * COMMAND_TIMEOUT, answering).await {
            tracing::warn!("the connection to Redis fell silent and is replaced");
            *self.redis.lock().unwrap_or_else(PoisonError::into_inner) = new;
        }
    }

    /// Releases a lock whose acquisition failed with an unknown outcome: Redis may have granted it,
    /// or grant it later. Redis executes the commands of a connection in order, so one successful
    /// release suffices.
    async fn release_until_lease_ends(self, held: HeldLock, mut redis: ConnectionManager) {
        let ends = Instant::now() + self.lease;
        while self.try_release(&held, &mut redis).await.is_err() && Instant::now() < ends {
            sleep(COMMAND_TIMEOUT).await;
        }
    }

    /// Readiness: Redis does what a lock needs. It accepts writes, and runs scripts.
    ///
    /// # Errors
    /// [`Indeterminate::BackendAway`] otherwise.
    pub async fn ready(&self) -> Result<(), ReserveError> {
        let probed = self.probe().await;
        if let Err(why) = &probed {
            self.replace_if_silent(why).await;
        }
        probed.map_err(away)
    }

    /// Acquires and releases a lock that no sale has.
    async fn probe(&self) -> RedisResult<()> {
        let owner = Uuid::new_v4().simple().to_string();
        let held = HeldLock {
            key: format!("{}lock:probe:{owner}", self.prefix),
            owner,
        };
        let mut redis = self.redis();
        self.try_acquire(&held, &mut redis).await?;
        self.try_release(&held, &mut redis).await.map(drop)
    }
}

/// Whether this Redis user lacks a permission, for a command or for a command in a script.
fn is_forbidden(why: &RedisError) -> bool {
    why.code() == Some("NOPERM") || why.to_string().contains("ACL failure in script")
}

/// Sets `TCP_USER_TIMEOUT`: the connection is closed when sent data stays unacknowledged for four
/// command timeouts.
fn with_tcp_user_timeout(redis: ConnectionInfo) -> ConnectionInfo {
    #[cfg(target_os = "linux")]
    let redis = {
        let tcp = redis.tcp_settings().clone();
        redis.set_tcp_settings(tcp.set_user_timeout(4 * COMMAND_TIMEOUT))
    };
    redis
}

fn away(why: RedisError) -> ReserveError {
    Indeterminate::BackendAway(why.into()).into()
}
