//! LV.3's lock on its own, without the sale that it protects: taken and given back by nobody but one, beside `redis-benchmark` with the
//! same commands; and by a crowd that wants the same one.
//!
//! Redis is one that nobody else uses, so that what it counts is the lock's.

use std::{
    collections::BTreeMap,
    fs::File,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering::SeqCst},
    },
    time::{Duration, Instant},
};

use anyhow::{Context, bail, ensure};
use comfy_table::{Table, presets};
use harness::backends::{Redis, Reply, Report};
use lv3_redis_lock::lock::{Backoff, Connections, FencingTokens, Guard, Lease, Owner, RLock, Released, SpinLock};
use serde::Serialize;
use tokio::{sync::Barrier, task::JoinSet};

use super::{figures::MedianRange, redis_benchmark::RedisBenchmark, say};
use crate::{
    BenchArgs, Ended,
    machine::{Machine, commit, this_command},
};

/// As long as a server's, unless told otherwise.
const LEASE: Duration = Duration::from_secs(10);
/// Longer than any crowd takes: who is not served in time is an error here.
const WAIT: Duration = Duration::from_secs(60);
/// What all keys begin with, as those of a server do.
const PREFIX: &str = "oversold:";
/// The tasks of ours, and the connections of redis-benchmark.
const CLIENTS: u32 = 50;
/// redis-benchmark twice, as connections and commands on the way in each: a connection for each client, and one for all.
const SHAPES: [(u32, u32); 2] = [(CLIENTS, 1), (1, CLIENTS)];
/// What one round of redis-benchmark sends of each command.
const REQUESTS: u32 = 25_000;
/// The locks that are taken before redis-benchmark gives some back. It picks them by chance, with replacement: of so many, 2 or 3 in 100 are
/// picked that were given back before, which is less work.
const TAKEN: u32 = 500_000;
/// How many of them one command takes: it is answered long before anybody gives up on it, on a slow machine too.
const TAKEN_AT_ONCE: u32 = 25_000;
/// How often the same key comes up by chance among those to take: next to never.
const MANY: u32 = 2_000_000_000;
/// What a client sends first, so that no script is new to Redis.
const WARM_UP: Duration = Duration::from_millis(500);

/// What a Redis command does inside a script of these locks, and nothing else here does.
const IN_SCRIPTS: [&str; 12] = [
    "exists", "hget", "hset", "hlen", "hdel", "pexpire", "pttl", "del", "publish", "get", "set", "time",
];

/// The strategies whose lock is measured.
const WITH_A_LOCK: [&str; 3] = ["spin", "rlock", "fenced"];

/// A strategy's lock.
enum Lock {
    Spin(SpinLock),
    RLock(RLock),
}

impl Lock {
    async fn open(strategy: &str, url: &str) -> anyhow::Result<Self> {
        let connections = Connections::open(url, PREFIX).await?;
        Ok(match strategy {
            "spin" => Self::Spin(SpinLock::new(connections, Lease::Fixed(LEASE), Backoff::default())?),
            "rlock" => Self::RLock(RLock::new(connections, Lease::Renewed(LEASE), FencingTokens::None)?),
            "fenced" => Self::RLock(RLock::new(
                connections,
                Lease::Renewed(LEASE),
                FencingTokens::Monotonic,
            )?),
            other => bail!("{other} has no lock that is measured"),
        })
    }

    async fn acquire(&self, name: &str) -> anyhow::Result<Guard> {
        // Everybody is somebody else, as each request of a server is.
        let owner = Owner::fresh();
        Ok(match self {
            Self::Spin(lock) => lock.acquire(name, &owner, WAIT).await?,
            Self::RLock(lock) => lock.acquire(name, &owner, WAIT).await?,
        })
    }
}

/// What redis-benchmark sends in the lock's place, word by word.
struct Commands {
    acquire: Vec<String>,
    release: Vec<String>,
    owner: String,
    /// Takes the locks of these numbers, written as redis-benchmark writes them.
    take_all: &'static str,
}

const TAKE_ALL: &str = "for i = tonumber(ARGV[3]), tonumber(ARGV[4]) - 1 do
    local key = string.format('%s{%012d}', ARGV[5], i)
    redis.call('hset', key, 'owner', ARGV[1], ARGV[1], 1)
    redis.call('pexpire', key, ARGV[2])
end";
const TAKE_ALL_SPIN: &str = "for i = tonumber(ARGV[3]), tonumber(ARGV[4]) - 1 do
    redis.call('set', string.format('%s{%012d}', ARGV[5], i), ARGV[1], 'nx', 'px', ARGV[2])
end";

impl Commands {
    async fn load(strategy: &str, redis: &Redis) -> anyhow::Result<Self> {
        macro_rules! script {
            ($name:literal) => {
                load(
                    redis,
                    include_str!(concat!("../../../levels/lv3-redis-lock/src/lock/", $name)),
                )
                .await?
            };
        }
        const KEY: &str = "oversold:lock:{__rand_int__}";
        const TOKEN: &str = "oversold:lock:{__rand_int__}:token";
        const CHANNEL: &str = "oversold:lock:{__rand_int__}:released";
        let owner = Owner::fresh();
        let (name, owner) = (owner.as_str().to_owned(), owner.as_str());
        // No owner takes a lock twice here.
        let hold = owner;
        let lease = LEASE.as_millis().to_string();
        let words = |words: &[&str]| words.iter().map(|&word| word.to_owned()).collect::<Vec<_>>();
        Ok(match strategy {
            "spin" => Self {
                acquire: words(&["SET", KEY, owner, "NX", "PX", &lease]),
                release: words(&["EVALSHA", &script!("spin_release.lua"), "1", KEY, owner]),
                owner: name,
                take_all: TAKE_ALL_SPIN,
            },
            "fenced" => Self {
                acquire: words(&[
                    "EVALSHA",
                    &script!("acquire_with_token.lua"),
                    "2",
                    KEY,
                    TOKEN,
                    owner,
                    &lease,
                    hold,
                ]),
                release: words(&["EVALSHA", &script!("release.lua"), "1", KEY, hold, CHANNEL]),
                owner: name,
                take_all: TAKE_ALL,
            },
            _ => Self {
                acquire: words(&["EVALSHA", &script!("acquire.lua"), "1", KEY, owner, &lease, hold]),
                release: words(&["EVALSHA", &script!("release.lua"), "1", KEY, hold, CHANNEL]),
                owner: name,
                take_all: TAKE_ALL,
            },
        })
    }
}

impl Commands {
    /// Takes many locks by redis-benchmark, and gives many back.
    async fn count(&self, redis: &Redis, benchmark: &RedisBenchmark, shape: (u32, u32)) -> anyhow::Result<Counted> {
        let (connections, pipeline) = shape;
        let run = async |keys, words| {
            benchmark
                .run(redis.url(), connections, pipeline, REQUESTS, keys, words)
                .await
        };
        empty(redis).await?;
        let acquire = run(MANY, &self.acquire).await?;
        empty(redis).await?;
        // By the owner that redis-benchmark gives them back as, and until that is done.
        let lease = WAIT.as_millis().to_string();
        for from in (0..TAKEN).step_by(TAKEN_AT_ONCE as usize) {
            let (from, to) = (from.to_string(), (from + TAKEN_AT_ONCE).to_string());
            let taking = [
                "EVAL",
                self.take_all,
                "0",
                &self.owner,
                &lease,
                &from,
                &to,
                "oversold:lock:",
            ];
            refused(redis.command(&taking).await?)?;
        }
        let release = run(TAKEN, &self.release).await?;
        empty(redis).await?;
        Ok(Counted { acquire, release })
    }
}

/// Makes a script known to Redis.
async fn load(redis: &Redis, script: &str) -> anyhow::Result<String> {
    match redis.command(&["SCRIPT", "LOAD", script]).await? {
        Reply::Bulk(sha) => Ok(sha),
        other => bail!("Redis answered SCRIPT LOAD with {other:?}"),
    }
}

/// Deletes all keys. It is nobody else's Redis.
async fn empty(redis: &Redis) -> anyhow::Result<()> {
    refused(redis.command(&["FLUSHALL"]).await?)
}

fn refused(reply: Reply) -> anyhow::Result<()> {
    match reply {
        Reply::Error(why) => bail!("Redis refuses: {why}"),
        _ => Ok(()),
    }
}

/// The figures of one run of this command. The names are stable.
#[derive(Serialize)]
struct Figures<'a> {
    command: String,
    commit: Option<String>,
    release: bool,
    machine: Machine,
    redis: &'a Report,
    strategy: String,
    #[serde(flatten)]
    measured: Measured<'a>,
    void: &'a [String],
}

#[derive(Serialize)]
#[serde(untagged)]
enum Measured<'a> {
    Alone(&'a Alone),
    Crowd(&'a Crowd),
}

/// Nobody wants the same lock.
#[derive(Serialize)]
struct Alone {
    clients: u32,
    connections: u32,
    pairs_a_second: MedianRange,
    /// A connection for each client, as most clients of Redis do it.
    redis_benchmark: Ceiling,
    /// One connection for all, as ours.
    redis_benchmark_on_one_connection: Ceiling,
}

#[derive(Serialize)]
struct Ceiling {
    connections: u32,
    pipeline: u32,
    pairs_a_second: MedianRange,
    acquire_a_second: MedianRange,
    release_a_second: MedianRange,
    /// Of ours to this, of the two rounds beside each other.
    ratio: MedianRange,
}

/// What redis-benchmark counted in a second.
#[derive(Clone, Copy)]
struct Counted {
    acquire: f64,
    release: f64,
}

impl Counted {
    /// Both, one after the other.
    fn pairs(self) -> f64 {
        1.0 / (1.0 / self.acquire + 1.0 / self.release)
    }
}

impl Ceiling {
    fn of((connections, pipeline): (u32, u32), ours: &[f64], counted: &[Counted]) -> anyhow::Result<Self> {
        let of = |figure: fn(Counted) -> f64| MedianRange::of(counted.iter().copied().map(figure));
        let ratio = MedianRange::of(ours.iter().zip(counted).map(|(ours, it)| ours / it.pairs()));
        let spreads = (of(Counted::pairs), of(|it| it.acquire), of(|it| it.release), ratio);
        let (Some(pairs_a_second), Some(acquire_a_second), Some(release_a_second), Some(ratio)) = spreads else {
            bail!("there was no round");
        };
        Ok(Self {
            connections,
            pipeline,
            pairs_a_second,
            acquire_a_second,
            release_a_second,
            ratio,
        })
    }
}

/// Everybody wants the same lock.
#[derive(Serialize)]
struct Crowd {
    waiters: u32,
    took_ms: MedianRange,
    /// What Redis was asked for, by each.
    commands_sent_each: MedianRange,
    /// What it did besides, in the scripts.
    commands_in_scripts_each: MedianRange,
    rounds: Vec<OneCrowd>,
}

#[derive(Serialize)]
struct OneCrowd {
    took_ms: f64,
    commands: BTreeMap<String, u64>,
}

/// Measures the lock of one of the level's strategies.
pub(super) async fn bench(strategy: &str, args: &BenchArgs) -> anyhow::Result<Ended> {
    // Before anything is started, as the file is.
    ensure!(
        WITH_A_LOCK.contains(&strategy),
        "{}; lv3/{strategy} is none of them",
        super::ONLY_LV3
    );
    let benchmark = match args.waiters {
        None => Some(RedisBenchmark::find()?),
        Some(_) => None,
    };
    let json = args.json.as_deref().map(crate::rush::create).transpose()?;
    super::warn_of_debug();
    let redis = Redis::private().await?;
    let lock = Arc::new(Lock::open(strategy, redis.url()).await?);
    match (benchmark, args.waiters) {
        (Some(benchmark), _) => alone(strategy, &lock, &redis, &benchmark, args, json).await,
        (None, waiters) => crowd(strategy, &lock, &redis, waiters.unwrap_or_default(), args, json).await,
    }
}

/// `oversold bench lv3/… --lock`: without contention, beside redis-benchmark.
async fn alone(
    strategy: &str,
    lock: &Arc<Lock>,
    redis: &Redis,
    benchmark: &RedisBenchmark,
    args: &BenchArgs,
    json: Option<File>,
) -> anyhow::Result<Ended> {
    let commands = Commands::load(strategy, redis).await?;
    let time = Duration::from_secs(args.seconds.into());
    let rounds = args.rounds.unwrap_or(5);

    let mut ours = vec![];
    let mut ceilings = [vec![], vec![]];
    take_turns(lock, WARM_UP).await?;
    for number in 1..=rounds {
        say(&format!("round {number} of {rounds}: lv3/{strategy}"));
        ours.push(take_turns(lock, time).await?);
        for (shape, counted) in SHAPES.into_iter().zip(&mut ceilings) {
            say(&format!("round {number} of {rounds}: redis-benchmark"));
            counted.push(commands.count(redis, benchmark, shape).await?);
        }
    }
    say("");

    let [many, one] = SHAPES;
    let alone = Alone {
        clients: CLIENTS,
        connections: 1,
        redis_benchmark: Ceiling::of(many, &ours, &ceilings[0])?,
        redis_benchmark_on_one_connection: Ceiling::of(one, &ours, &ceilings[1])?,
        pairs_a_second: MedianRange::of(ours).context("there was no round")?,
    };
    alone.print(strategy, rounds);
    end(strategy, redis.report(), Measured::Alone(&alone), &[], json)
}

impl Alone {
    fn print(&self, strategy: &str, rounds: u32) {
        let mut table = Table::new();
        table.load_style(presets::UTF8_FULL_CONDENSED).set_header([
            &format!("lv3/{strategy}, {CLIENTS} clients, a lock for each"),
            &format!("pairs a second: median (range) of {rounds} rounds"),
            "taken",
            "given back",
            "ratio",
        ]);
        let none = String::new;
        table.add_row([
            "the lock, on one connection".to_owned(),
            self.pairs_a_second.to_string(),
            none(),
            none(),
            none(),
        ]);
        for ceiling in [&self.redis_benchmark, &self.redis_benchmark_on_one_connection] {
            let name = match ceiling.connections {
                1 => format!("redis-benchmark -c 1 -P {}", ceiling.pipeline),
                many => format!("redis-benchmark -c {many}"),
            };
            table.add_row([
                name,
                ceiling.pairs_a_second.to_string(),
                format!("{:.0}", ceiling.acquire_a_second.median),
                format!("{:.0}", ceiling.release_a_second.median),
                format!("{:.2}", ceiling.ratio),
            ]);
        }
        println!("{table}");
        println!(
            "A pair is a lock that was taken and given back. The {CLIENTS} clients of the lock are tasks whose commands share one connection, \
             as in a server. redis-benchmark sends the same commands, first all that take, then all that give back; its pairs are worked \
             out of both."
        );
    }
}

/// Each client takes a lock that nobody else wants and gives it back, and so on with the next; how many a second.
async fn take_turns(lock: &Arc<Lock>, time: Duration) -> anyhow::Result<f64> {
    let mut clients = JoinSet::new();
    let began = Instant::now();
    let deadline = began + time;
    for client in 0..CLIENTS {
        let lock = lock.clone();
        clients.spawn(async move {
            let mut pairs = 0_u64;
            while Instant::now() < deadline {
                let guard = lock.acquire(&format!("{client}-{pairs}")).await?;
                let released = guard.release().await?;
                ensure!(
                    released == Released::Free,
                    "a lock was not free after it was given back: {released:?}"
                );
                pairs += 1;
            }
            Ok(pairs)
        });
    }
    let mut pairs = 0;
    while let Some(client) = clients.join_next().await {
        pairs += client??;
    }
    Ok(pairs as f64 / began.elapsed().as_secs_f64())
}

/// `oversold bench lv3/… --waiters 1000`: everybody waits for the same lock, and does nothing with it.
async fn crowd(
    strategy: &str,
    lock: &Arc<Lock>,
    redis: &Redis,
    waiters: u32,
    args: &BenchArgs,
    json: Option<File>,
) -> anyhow::Result<Ended> {
    let rounds = args.rounds.unwrap_or(5);
    let mut void = vec![];
    let mut measured = vec![];
    // Nothing is new to Redis or to this process after a first round.
    for number in 0..=rounds {
        say(&format!("round {number} of {rounds}"));
        let (before, again) = (counted(redis).await?, counted(redis).await?);
        let (took, met) = all_at_once(lock, waiters).await?;
        // Connections and subscriptions come and go on their own: by now they have, or count in the next round.
        let after = counted(redis).await?;
        if number == 0 {
            continue;
        }
        if met > 0 {
            void.push(format!("round {number}: {met} waiters met somebody inside"));
        }
        let of = |counts: &BTreeMap<String, u64>, name: &str| counts.get(name).copied().unwrap_or(0);
        let commands = after.iter().map(|(name, &count)| {
            // Asking counts as well: as much as it did the time before.
            let asking = of(&again, name) - of(&before, name);
            (name.clone(), (count - of(&again, name)).saturating_sub(asking))
        });
        measured.push(OneCrowd {
            took_ms: took.as_secs_f64() * 1e3,
            commands: commands.filter(|(_, count)| *count > 0).collect(),
        });
    }
    say("");

    let each = |inside: bool| {
        let all = measured.iter().map(|round| {
            let those = round
                .commands
                .iter()
                .filter(|(name, _)| is_in_a_script(strategy, name) == inside);
            those.map(|(_, &count)| count).sum::<u64>() as f64 / f64::from(waiters)
        });
        MedianRange::of(all).context("there was no round")
    };
    let crowd = Crowd {
        waiters,
        took_ms: MedianRange::of(measured.iter().map(|round| round.took_ms)).context("there was no round")?,
        commands_sent_each: each(false)?,
        commands_in_scripts_each: each(true)?,
        rounds: measured,
    };

    let mut table = Table::new();
    table.load_style(presets::UTF8_FULL_CONDENSED).set_header([
        &format!("the lock of lv3/{strategy}, {waiters} waiters"),
        &format!("median (range) of {rounds} rounds"),
    ]);
    let mut row = |what: &str, figure: String| {
        table.add_row([what.to_owned(), figure]);
    };
    row("everybody had it after", format!("{:.0} ms", crowd.took_ms));
    row("commands to Redis, each", format!("{:.2}", crowd.commands_sent_each));
    row(
        "commands inside the scripts, each",
        format!("{:.2}", crowd.commands_in_scripts_each),
    );
    println!("{table}");
    println!(
        "One process, whose commands share one connection; the critical section is empty. Counted by Redis: INFO commandstats."
    );
    end(strategy, redis.report(), Measured::Crowd(&crowd), &void, json)
}

/// Whether the lock of a strategy lets its scripts run this command, and sends it in no other way. `spin` takes the lock by `set` alone.
fn is_in_a_script(strategy: &str, command: &str) -> bool {
    IN_SCRIPTS.contains(&command) && !(strategy == "spin" && command == "set")
}

/// Lets all waiters go for one lock. Tells how long it took until the last had given it back, and how many met somebody else inside.
async fn all_at_once(lock: &Arc<Lock>, waiters: u32) -> anyhow::Result<(Duration, usize)> {
    let ready = Arc::new(Barrier::new(waiters as usize + 1));
    let inside = Arc::new(AtomicUsize::new(0));
    let mut tasks = JoinSet::new();
    for _ in 0..waiters {
        let (lock, ready, inside) = (lock.clone(), ready.clone(), inside.clone());
        tasks.spawn(async move {
            ready.wait().await;
            let guard = lock.acquire("sale:1").await?;
            let met = inside.fetch_add(1, SeqCst);
            inside.fetch_sub(1, SeqCst);
            ensure!(
                guard.release().await? == Released::Free,
                "a lock was lost while it was held"
            );
            Ok(met)
        });
    }
    ready.wait().await;
    let began = Instant::now();
    let mut met = 0;
    while let Some(waiter) = tasks.join_next().await {
        met += waiter??;
    }
    Ok((began.elapsed(), met))
}

/// How often Redis has run each command.
async fn counted(redis: &Redis) -> anyhow::Result<BTreeMap<String, u64>> {
    match redis.command(&["INFO", "commandstats"]).await? {
        Reply::Bulk(text) => parse(&text),
        other => bail!("Redis answered INFO with {other:?}"),
    }
}

/// Lines such as `cmdstat_evalsha:calls=12,usec=…`.
fn parse(text: &str) -> anyhow::Result<BTreeMap<String, u64>> {
    let lines = text
        .lines()
        .filter_map(|line| line.strip_prefix("cmdstat_")?.split_once(":calls="));
    lines
        .map(|(name, rest)| {
            let calls = rest.split(',').next().unwrap_or_default();
            let calls = calls
                .parse()
                .with_context(|| format!("INFO commandstats tells of {name}: {rest}"))?;
            Ok((name.to_owned(), calls))
        })
        .collect()
}

/// Says what it was measured on, and writes the file.
fn end(
    strategy: &str,
    redis: &Report,
    measured: Measured<'_>,
    void: &[String],
    json: Option<File>,
) -> anyhow::Result<Ended> {
    println!(
        "redis {} ({}), which keeps nothing on disk",
        redis.version, redis.source
    );
    for reason in void {
        println!("VOID: {reason}");
    }
    if let Some(json) = json {
        let figures = Figures {
            command: this_command(),
            commit: commit(),
            release: !cfg!(debug_assertions),
            machine: Machine::this(),
            redis,
            strategy: format!("lv3/{strategy}"),
            measured,
            void,
        };
        super::write(json, &figures)?;
    }
    Ok(if void.is_empty() {
        Ended::AsPromised
    } else {
        Ended::Broken
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_calls_of_each_command_are_read() {
        let text = "# Commandstats\r\ncmdstat_evalsha:calls=12,usec=80,usec_per_call=6.67,rejected_calls=0,failed_calls=0\r\n\
                    cmdstat_client|setinfo:calls=2,usec=1,usec_per_call=0.50,rejected_calls=0,failed_calls=0\r\n";
        let counted = parse(text).expect("it is what Redis says");
        let expected = [("client|setinfo".to_owned(), 2), ("evalsha".to_owned(), 12)];
        assert_eq!(counted, BTreeMap::from(expected));
        parse("cmdstat_get:calls=none,usec=1\r\n").expect_err("that is no number");
    }

    #[test]
    fn what_a_script_runs_is_told_from_what_is_sent() {
        assert!(is_in_a_script("rlock", "hget") && is_in_a_script("fenced", "set"));
        assert!(!is_in_a_script("spin", "set") && !is_in_a_script("rlock", "evalsha"));
    }
}
