//! `oversold bench lv3/… --waiters 1000`: many tasks, in one process or several, wait for the same lock, and the critical section is empty.

use std::collections::BTreeMap;

use anyhow::{Context, bail};
use box_office::trace::now_monotonic_us;
use harness::backends::{Redis, Reply};

use super::{
    super::{BenchArgs, MeasurementTable, bench_setup::Rounds, progress},
    LockBench,
    waiters::WaiterProcess,
};
use crate::{
    exit::ExitKind,
    interrupt::Signals,
    results::{
        ResultFile,
        bench::{ContendedLock, ContendedRound},
    },
    statistics::MedianRange,
};

/// Commands that Redis runs only inside the scripts of these locks, in this bench.
const IN_SCRIPTS: [&str; 12] = [
    "exists", "hget", "hset", "hlen", "hdel", "pexpire", "pttl", "del", "publish", "get", "set", "time",
];

/// How often Redis has run each command.
type CommandCounts = BTreeMap<String, u64>;

/// Measures how long the waiters take, and how many commands they send.
pub(super) async fn run(
    bench: &LockBench<'_>,
    waiters: u32,
    args: &BenchArgs,
    mut signals: Signals,
    json: Option<ResultFile>,
) -> anyhow::Result<ExitKind> {
    let rounds = args.rounds.unwrap_or(5);
    let mut processes = (0..args.instances)
        .map(|number| {
            let share = waiters / args.instances + u32::from(number < waiters % args.instances);
            WaiterProcess::start(bench.strategy, share, bench.redis.url())
        })
        .collect::<anyhow::Result<Vec<_>>>()?;
    let mut void = vec![];
    let mut measured = vec![];
    let ended = signals
        .or_end(async {
            // Round 0 warms up Redis and the processes.
            for number in 0..=rounds {
                progress(&format!("round {number} of {rounds}"));
                let (round, met) = contended_round(bench, &mut processes).await?;
                if number == 0 {
                    continue;
                }
                if met > 0 {
                    void.push(format!(
                        "round {number}: {met} waiters came in while another was inside"
                    ));
                }
                measured.push(round);
            }
            Ok(())
        })
        .await;
    progress("");
    let rounds = Rounds::of(rounds, measured.len(), ended)?;

    let each = |in_scripts: bool| {
        MedianRange::over(&measured, |round: &ContendedRound| {
            let commands = round.commands.iter();
            let those = commands.filter(|(name, _)| is_in_a_script(bench.strategy, name) == in_scripts);
            those.map(|(_, &count)| count).sum::<u64>() as f64 / f64::from(waiters)
        })
    };
    let result = ContendedLock {
        waiters,
        instances: args.instances,
        took_ms: MedianRange::over(&measured, |round| round.took_ms)?,
        commands_sent_each: each(false)?,
        commands_in_scripts_each: each(true)?,
        rounds: measured,
    };
    print(bench.strategy, &result, rounds.measured);
    bench.finish(None, result, rounds, void, json)
}

/// One round, and how many waiters came into the critical section while another one was inside.
async fn contended_round(
    bench: &LockBench<'_>,
    processes: &mut [WaiterProcess],
) -> anyhow::Result<(ContendedRound, usize)> {
    for process in &mut *processes {
        process.ready().await?;
    }
    let (before, again) = (command_counts(&bench.redis).await?, command_counts(&bench.redis).await?);
    let began_us = now_monotonic_us();
    for process in &mut *processes {
        process.go().await?;
    }
    let (mut holds_us, mut ended_us) = (vec![], began_us);
    for process in processes {
        let round = process.round().await?;
        holds_us.extend(round.holds_us);
        ended_us = ended_us.max(round.ended_us);
    }
    // Connections and subscriptions come and go on their own: those of this round have by now, or count in the next.
    let after = command_counts(&bench.redis).await?;
    let count = |counts: &CommandCounts, name: &str| counts.get(name).copied().unwrap_or(0);
    let commands = after.iter().map(|(name, &total)| {
        // The queries themselves count as well: as much as between the first two.
        let queries = count(&again, name) - count(&before, name);
        (name.clone(), (total - count(&again, name)).saturating_sub(queries))
    });
    let round = ContendedRound {
        took_ms: (ended_us - began_us) as f64 / 1e3,
        commands: commands.filter(|(_, count)| *count > 0).collect(),
    };
    Ok((round, met_another(holds_us)))
}

/// How many of these stays, each from when to when, began while another one lasted.
fn met_another(mut stays: Vec<(u64, u64)>) -> usize {
    stays.sort_unstable();
    let mut free_from = 0;
    let met = stays.iter().filter(|&&(from, to)| {
        let met = from < free_from;
        free_from = free_from.max(to);
        met
    });
    met.count()
}

/// Whether a strategy's lock runs this command inside its scripts, and sends it in no other way. `spin` acquires by a plain `set`.
fn is_in_a_script(strategy: &str, command: &str) -> bool {
    IN_SCRIPTS.contains(&command) && !(strategy == "spin" && command == "set")
}

async fn command_counts(redis: &Redis) -> anyhow::Result<CommandCounts> {
    match redis.command(&["INFO", "commandstats"]).await? {
        Reply::Bulk(text) => parse(&text),
        other => bail!("Redis answered INFO with {other:?}"),
    }
}

/// Reads lines such as `cmdstat_evalsha:calls=12,usec=…`.
fn parse(text: &str) -> anyhow::Result<CommandCounts> {
    let lines = text
        .lines()
        .filter_map(|line| line.strip_prefix("cmdstat_")?.split_once(":calls="));
    lines
        .map(|(name, rest)| {
            let calls = rest.split(',').next().unwrap_or_default();
            let calls = calls
                .parse()
                .with_context(|| format!("INFO commandstats has a bad line for {name}: {rest}"))?;
            Ok((name.to_owned(), calls))
        })
        .collect()
}

fn print(strategy: &str, result: &ContendedLock, rounds: usize) {
    let mut table = MeasurementTable::new(
        format!(
            "the lock of lv3/{strategy}, {} waiters in {} process{}",
            result.waiters,
            result.instances,
            if result.instances == 1 { "" } else { "es" }
        ),
        format!("median (range) of {rounds} rounds"),
    );
    table.row("all had it after", format!("{:.0} ms", result.took_ms));
    table.row("commands to Redis, each", format!("{:.2}", result.commands_sent_each));
    table.row(
        "commands inside the scripts, each",
        format!("{:.2}", result.commands_in_scripts_each),
    );
    table.print();
    println!(
        "The tasks of a process share one connection, and the critical section is empty. Of a lock with a local queue, one task in each \
         process asks Redis: in one process this measures that queue. Counted by Redis: INFO commandstats."
    );
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_calls_of_each_command_are_read() {
        let text = "# Commandstats\r\ncmdstat_evalsha:calls=12,usec=80,usec_per_call=6.67,rejected_calls=0,failed_calls=0\r\n\
                    cmdstat_client|setinfo:calls=2,usec=1,usec_per_call=0.50,rejected_calls=0,failed_calls=0\r\n";
        let counts = parse(text).expect("it is what Redis says");
        let expected = [("client|setinfo".to_owned(), 2), ("evalsha".to_owned(), 12)];
        assert_eq!(counts, BTreeMap::from(expected));
        parse("cmdstat_get:calls=none,usec=1\r\n").expect_err("that is no number");
    }

    #[test]
    fn waiters_that_were_inside_together_are_counted() {
        assert_eq!(met_another(vec![(5, 9), (0, 5), (9, 9)]), 0);
        assert_eq!(met_another(vec![(4, 6), (0, 5), (7, 8), (1, 2)]), 2);
    }

    #[test]
    fn commands_in_scripts_are_told_from_commands_that_are_sent() {
        assert!(is_in_a_script("rlock", "hget") && is_in_a_script("fenced", "set"));
        assert!(!is_in_a_script("spin", "set") && !is_in_a_script("rlock", "evalsha"));
    }
}
