//! `oversold bench-waiters`: one process of `oversold bench --waiters`, and how that command talks to it.
//!
//! The process says `ready`, runs a round for each line that it reads, and answers with a line of JSON. It ends with its input.

use std::{
    env,
    io::{Write, stdin, stdout},
    process::Stdio,
    sync::Arc,
};

use anyhow::{Context, ensure};
use box_office::trace::now_monotonic_us;
use clap::Args;
use lv3_redis_lock::lock::Released;
use serde::{Deserialize, Serialize};
use tokio::{
    io::{AsyncBufReadExt, AsyncWriteExt, BufReader, Lines},
    process::{Child, ChildStdin, ChildStdout},
    sync::Barrier,
    task::{JoinSet, spawn_blocking},
};

use super::Lock;
use crate::{commands::tool, exit::ExitKind};

/// The line of a process that waits for the next round.
const READY: &str = "ready";
/// Where a process finds the Redis.
const REDIS_URL: &str = "REDIS_URL";

#[derive(Args)]
pub(crate) struct WaitersArgs {
    /// The strategy whose lock it is.
    strategy: String,
    /// Tasks that wait for it.
    waiters: u32,
    /// The Redis of the lock.
    #[arg(long, env = REDIS_URL, hide_env_values = true)]
    redis_url: String,
}

/// What a process reports of a round. All times are microseconds on the machine's monotonic clock, which its processes share.
#[derive(Serialize, Deserialize)]
pub(super) struct ProcessRound {
    /// From when to when each waiter was inside the critical section.
    pub(super) holds_us: Vec<(u64, u64)>,
    /// When the last waiter had released the lock.
    pub(super) ended_us: u64,
}

/// Runs rounds until the input ends.
pub(crate) async fn run(args: &WaitersArgs) -> anyhow::Result<ExitKind> {
    let lock = Arc::new(Lock::open(&args.strategy, &args.redis_url).await?);
    loop {
        let round = Waiters::start(&lock, args.waiters);
        say(READY)?;
        let go = spawn_blocking(|| stdin().read_line(&mut String::new())).await??;
        if go == 0 {
            return Ok(ExitKind::AsPromised);
        }
        say(&serde_json::to_string(&round.go().await?)?)?;
    }
}

fn say(line: &str) -> anyhow::Result<()> {
    let mut out = stdout().lock();
    writeln!(out, "{line}")?;
    out.flush()?;
    Ok(())
}

/// Tasks that stand at a barrier, and will all acquire and release one lock.
struct Waiters {
    ready: Arc<Barrier>,
    tasks: JoinSet<anyhow::Result<(u64, u64)>>,
}

impl Waiters {
    fn start(lock: &Arc<Lock>, waiters: u32) -> Self {
        let ready = Arc::new(Barrier::new(waiters as usize + 1));
        let mut tasks = JoinSet::new();
        for _ in 0..waiters {
            let (lock, ready) = (lock.clone(), ready.clone());
            tasks.spawn(async move {
                ready.wait().await;
                let guard = lock.acquire("sale:1").await?;
                let hold = (now_monotonic_us(), now_monotonic_us());
                ensure!(
                    guard.release().await? == Released::Free,
                    "a lock was lost while it was held"
                );
                Ok(hold)
            });
        }
        Self { ready, tasks }
    }

    async fn go(mut self) -> anyhow::Result<ProcessRound> {
        self.ready.wait().await;
        let mut holds_us = vec![];
        while let Some(hold) = self.tasks.join_next().await {
            holds_us.push(hold??);
        }
        Ok(ProcessRound {
            holds_us,
            ended_us: now_monotonic_us(),
        })
    }
}

/// A process of waiters, as the command sees it.
pub(super) struct WaiterProcess {
    input: ChildStdin,
    output: Lines<BufReader<ChildStdout>>,
    /// Ends when this is dropped.
    _process: Child,
}

impl WaiterProcess {
    /// Starts it.
    pub(super) fn start(strategy: &str, waiters: u32, redis_url: &str) -> anyhow::Result<Self> {
        let mut process = tool::command(&env::current_exe()?)?
            .args(["bench-waiters", strategy, &waiters.to_string()])
            .env(REDIS_URL, redis_url)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()?;
        Ok(Self {
            input: process.stdin.take().context("it has an input")?,
            output: BufReader::new(process.stdout.take().context("it has an output")?).lines(),
            _process: process,
        })
    }

    /// Waits until all of its waiters stand at the barrier.
    pub(super) async fn ready(&mut self) -> anyhow::Result<()> {
        let line = self.line().await?;
        ensure!(line == READY, "a process of waiters says {line:?}");
        Ok(())
    }

    /// Opens the barrier.
    pub(super) async fn go(&mut self) -> anyhow::Result<()> {
        self.input.write_all(b"\n").await?;
        Ok(self.input.flush().await?)
    }

    /// Waits for the end of the round.
    pub(super) async fn round(&mut self) -> anyhow::Result<ProcessRound> {
        Ok(serde_json::from_str(&self.line().await?)?)
    }

    async fn line(&mut self) -> anyhow::Result<String> {
        let line = self.output.next_line().await?;
        line.context("a process of waiters has ended; it said why")
    }
}
