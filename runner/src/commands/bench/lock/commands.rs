//! The commands of a lock, as redis-benchmark sends them.

use anyhow::bail;
use harness::backends::{Redis, Reply};
use lv3_redis_lock::lock::Owner;

use super::{super::redis_benchmark::RedisBenchmark, LEASE, WAIT, check};

/// How many of each command redis-benchmark sends in a round.
const REQUESTS: u32 = 25_000;
/// Locks that are held before redis-benchmark releases some. It picks them at random with replacement: of this many, 2 or 3 in 100 are picked
/// that were released before, which is less work.
const HELD: u32 = 500_000;
/// Locks that one command acquires: few enough that it is answered long before any time-out, on a slow machine too.
const HELD_BATCH: u32 = 25_000;
/// The range of random keys to acquire: the same one hardly ever comes up twice.
const KEYS: u32 = 2_000_000_000;

const KEY: &str = "oversold:lock:{__rand_int__}";
const TOKEN: &str = "oversold:lock:{__rand_int__}:token";
const CHANNEL: &str = "oversold:lock:{__rand_int__}:released";

/// Acquires a range of locks. The keys are as redis-benchmark writes them.
const ACQUIRE_ALL: &str = "for i = tonumber(ARGV[3]), tonumber(ARGV[4]) - 1 do
    local key = string.format('%s{%012d}', ARGV[5], i)
    redis.call('hset', key, 'owner', ARGV[1], ARGV[1], 1)
    redis.call('pexpire', key, ARGV[2])
end";
const ACQUIRE_ALL_SPIN: &str = "for i = tonumber(ARGV[3]), tonumber(ARGV[4]) - 1 do
    redis.call('set', string.format('%s{%012d}', ARGV[5], i), ARGV[1], 'nx', 'px', ARGV[2])
end";

/// The commands that redis-benchmark sends in place of the lock, word by word.
pub(super) struct LockCommands {
    acquire: Vec<String>,
    release: Vec<String>,
    owner: String,
    /// The script that acquires the locks that are released later.
    acquire_all: &'static str,
}

/// Commands per second, as redis-benchmark counted them.
#[derive(Clone, Copy)]
pub(super) struct Rates {
    pub(super) acquire: f64,
    pub(super) release: f64,
}

impl Rates {
    /// Pairs per second, one command after the other.
    pub(super) fn pairs(self) -> f64 {
        1.0 / (1.0 / self.acquire + 1.0 / self.release)
    }
}

impl LockCommands {
    /// Loads the scripts of a strategy's lock into Redis.
    pub(super) async fn load(strategy: &str, redis: &Redis) -> anyhow::Result<Self> {
        macro_rules! script {
            ($name:literal) => {
                load_script(
                    redis,
                    include_str!(concat!("../../../../../levels/lv3-redis-lock/src/lock/", $name)),
                )
                .await?
            };
        }
        let fresh = Owner::fresh();
        let owner = fresh.as_str();
        // No owner acquires a lock twice here.
        let hold = owner;
        let lease = LEASE.as_millis().to_string();
        let words = |words: &[&str]| words.iter().map(|&word| word.to_owned()).collect::<Vec<_>>();
        let (acquire, release) = match strategy {
            "spin" => (
                words(&["SET", KEY, owner, "NX", "PX", &lease]),
                words(&["EVALSHA", &script!("spin_release.lua"), "1", KEY, owner]),
            ),
            "fenced" => {
                let acquire = script!("acquire_with_token.lua");
                (
                    words(&["EVALSHA", &acquire, "2", KEY, TOKEN, owner, &lease, hold]),
                    words(&["EVALSHA", &script!("release.lua"), "1", KEY, hold, CHANNEL]),
                )
            }
            _ => (
                words(&["EVALSHA", &script!("acquire.lua"), "1", KEY, owner, &lease, hold]),
                words(&["EVALSHA", &script!("release.lua"), "1", KEY, hold, CHANNEL]),
            ),
        };
        Ok(Self {
            acquire,
            release,
            owner: owner.to_owned(),
            acquire_all: if strategy == "spin" {
                ACQUIRE_ALL_SPIN
            } else {
                ACQUIRE_ALL
            },
        })
    }

    /// Measures many acquires and many releases with redis-benchmark; `shape` is connections and commands in flight on each.
    pub(super) async fn measure(
        &self,
        redis: &Redis,
        benchmark: &RedisBenchmark,
        shape: (u32, u32),
    ) -> anyhow::Result<Rates> {
        let (connections, pipeline) = shape;
        let run = async |keys, words| {
            benchmark
                .run(redis.url(), connections, pipeline, REQUESTS, keys, words)
                .await
        };
        delete_all(redis).await?;
        let acquire = run(KEYS, &self.acquire).await?;
        delete_all(redis).await?;
        // By the owner as whom redis-benchmark releases them, and for as long as that takes.
        let lease = WAIT.as_millis().to_string();
        for from in (0..HELD).step_by(HELD_BATCH as usize) {
            let (from, to) = (from.to_string(), (from + HELD_BATCH).to_string());
            let acquire_all = [
                "EVAL",
                self.acquire_all,
                "0",
                &self.owner,
                &lease,
                &from,
                &to,
                "oversold:lock:",
            ];
            check(redis.command(&acquire_all).await?)?;
        }
        let release = run(HELD, &self.release).await?;
        delete_all(redis).await?;
        Ok(Rates { acquire, release })
    }
}

/// Loads a script into Redis, and returns its SHA-1.
async fn load_script(redis: &Redis, script: &str) -> anyhow::Result<String> {
    match redis.command(&["SCRIPT", "LOAD", script]).await? {
        Reply::Bulk(sha) => Ok(sha),
        other => bail!("Redis answered SCRIPT LOAD with {other:?}"),
    }
}

/// Deletes all keys of this private Redis.
async fn delete_all(redis: &Redis) -> anyhow::Result<()> {
    check(redis.command(&["FLUSHALL"]).await?)
}
