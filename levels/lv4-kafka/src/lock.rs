//! A small distributed lock: LV.3's spin lock, no more than this level needs of it.
//!
//! One command takes it, and a script gives it back if it still is the owner's. Its lease is fixed, so it has the limit that LV.3 shows: a
//! holder that stands still for longer than the lease goes on with a lock that somebody else has.

use std::time::Duration;

use anyhow::Context;
use box_office::{Indeterminate, ReserveError, StrategyContext};
use redis::{
    Client, ConnectionInfo, IntoConnectionInfo, RedisResult, Script,
    aio::{ConnectionManager, ConnectionManagerConfig},
};
use tokio::time::{Instant, sleep};
use uuid::Uuid;

/// How long Redis may take for one command.
const COMMAND: Duration = Duration::from_millis(500);

/// The pauses between two attempts: short at first, as a lock is held for about a millisecond.
const FIRST_PAUSE: Duration = Duration::from_millis(1);
const LONGEST_PAUSE: Duration = Duration::from_millis(4);

/// Takes locks.
#[derive(Clone)]
pub struct Locks {
    redis: ConnectionManager,
    prefix: String,
    lease: Duration,
    release: Script,
}

/// A lock that was taken. It is given back with [`Locks::release`], or ends with its lease.
pub struct Held {
    key: String,
    owner: String,
}

impl Locks {
    /// In the Redis of this context.
    ///
    /// # Errors
    /// There is none, or it does not answer.
    pub async fn on(context: &StrategyContext) -> anyhow::Result<Self> {
        let place = context.redis.as_ref().context("this strategy needs REDIS_URL")?;
        let config = ConnectionManagerConfig::new()
            .set_response_timeout(Some(COMMAND))
            .set_connection_timeout(Some(COMMAND))
            .set_max_delay(Duration::from_millis(500));
        let client = Client::open(missed_soon(place.url.expose().into_connection_info()?))?;
        let redis = ConnectionManager::new_with_config(client, config)
            .await
            .with_context(|| format!("REDIS_URL (--redis-url): no connection to Redis at {}", place.url))?;
        Ok(Self {
            redis,
            prefix: place.prefix.clone(),
            lease: place.lease,
            release: Script::new(
                "if redis.call('get', KEYS[1]) == ARGV[1] then
                     return redis.call('del', KEYS[1])
                 end
                 return 0",
            ),
        })
    }

    /// Takes the lock of this name, or gives up after `wait`.
    ///
    /// # Errors
    /// It stayed somebody else's, or Redis does not answer.
    pub async fn acquire(&self, name: &str, wait: Duration) -> Result<Held, ReserveError> {
        let held = Held {
            key: format!("{}lock:{name}", self.prefix),
            owner: Uuid::new_v4().simple().to_string(),
        };
        let give_up = Instant::now() + wait;
        let mut longest = FIRST_PAUSE;
        loop {
            let asked: Result<Option<String>, _> = redis::cmd("SET")
                .arg(&held.key)
                .arg(&held.owner)
                .arg("NX")
                .arg("PX")
                .arg(u64::try_from(self.lease.as_millis()).unwrap_or(u64::MAX))
                .query_async(&mut self.redis.clone())
                .await;
            match asked {
                Ok(None) => {}
                Ok(Some(_)) => return Ok(held),
                Err(why) => {
                    tokio::spawn(self.clone().take_back(held));
                    return Err(away(why));
                }
            }
            if Instant::now() >= give_up {
                return Err(Indeterminate::Overloaded.into());
            }
            sleep(longest.mul_f64(rand::random_range(0.0..1.0))).await;
            longest = (longest * 2).min(LONGEST_PAUSE);
        }
    }

    /// Gives it back, if it still is the owner's.
    pub async fn release(&self, held: Held) {
        if let Err(why) = self.give_back(&held).await {
            tracing::warn!(%why, "a lock could not be given back; it ends with its lease");
        }
    }

    async fn give_back(&self, held: &Held) -> RedisResult<i32> {
        let mut redis = self.redis.clone();
        self.release
            .key(&held.key)
            .arg(&held.owner)
            .invoke_async(&mut redis)
            .await
    }

    /// Gives back what may have been taken, or will be once Redis goes on: nobody would know whose it is. Commands of a connection are carried out
    /// in their order, so once one of these is answered nothing is left.
    async fn take_back(self, held: Held) {
        let ends = Instant::now() + self.lease;
        while self.give_back(&held).await.is_err() && Instant::now() < ends {
            sleep(COMMAND).await;
        }
    }

    /// Whether Redis answers.
    ///
    /// # Errors
    /// It does not.
    pub async fn ready(&self) -> Result<(), ReserveError> {
        let pong: Result<String, _> = redis::cmd("PING").query_async(&mut self.redis.clone()).await;
        pong.map(drop).map_err(away)
    }
}

/// A connection whose other end is gone without a word breaks when nothing was acknowledged for so long.
fn missed_soon(redis: ConnectionInfo) -> ConnectionInfo {
    #[cfg(target_os = "linux")]
    let redis = {
        let tcp = redis.tcp_settings().clone();
        redis.set_tcp_settings(tcp.set_user_timeout(4 * COMMAND))
    };
    redis
}

fn away(why: redis::RedisError) -> ReserveError {
    Indeterminate::BackendAway(why.into()).into()
}
