//! The generated snippets of the book: each is made here, held against what is committed, and written with `OVERSOLD_BLESS=1`.

use std::{
    collections::{BTreeMap, BTreeSet},
    env, fmt, fs,
    path::{Path, PathBuf},
    process::Command,
    sync::LazyLock,
};

use box_office::{Level, Promise, Promises, Service, Strategy};
use regex::Regex;
use serde::Deserialize;
use similar::TextDiff;

use crate::{Problem, none, only, pages, root, strategies};

/// Set by `make generated`.
const BLESS: &str = "OVERSOLD_BLESS";

/// Where the snippets are, from the root of the repository.
const FOLDER: &str = "book/generated";

/// The figures that a page can include: the snippet, and where its figures come from. `make results` measures them.
const FIGURES: &[(&str, Figures)] = &[
    ("lv1-rush", |name| figures(&[name], rush_table)),
    ("lv2-rush", |name| figures(&[name], rush_table)),
    ("lv2-rush-3", |name| figures(&[name], rush_table)),
    ("lv2-rush-once", |name| figures(&[name], rush_table)),
    ("lv2-bench", |_| {
        let strategies = ["mutex", "pessimistic", "optimistic", "conditional-update"];
        figures(&strategies.map(|it| format!("lv2-bench-{it}")), bench_table)
    }),
    ("lv2-pools", |_| {
        let strategies = ["pessimistic", "conditional-update"];
        figures(&strategies.map(|it| format!("lv2-pools-{it}")), pools_table)
    }),
    ("lv3-rush", |name| figures(&[name], rush_table)),
    ("lv3-rush-3", |name| figures(&[name], rush_table)),
    ("lv3-rush-3-once", |name| figures(&[name], rush_table)),
    ("lv3-and-lv2", |_| {
        // Of one run each: what else the machine does meets all of them.
        let runs = ["lv2-and-lv3-rush", "lv2-and-lv3-rush-3"];
        figures(&runs, side_by_side_table)
    }),
    ("lv3-bench", |_| {
        figures(&LOCKS.map(|it| format!("lv3-bench-{it}")), rates_table)
    }),
    ("lv3-waiters", |_| {
        figures(&LOCKS.map(|it| format!("lv3-waiters-{it}")), waiters_table)
    }),
    ("lv3-lock", |name| figures(&[name], lock_table)),
    ("lv4-rush", |name| figures(&[name], two_clocks_table)),
    ("lv4-rush-3", |name| figures(&[name], two_clocks_table)),
    ("lv4-rush-once", |name| figures(&[name], two_clocks_table)),
    ("lv4-accept", |_| {
        figures(&PATHS.map(|it| format!("lv4-accept-{it}")), accept_table)
    }),
    ("lv4-drain", |_| {
        figures(&PATHS.map(|it| format!("lv4-drain-{it}")), drain_table)
    }),
    ("road", |_| figures(&["road", "road-3"], road_table)),
];

/// How a snippet begins whose figures nobody has measured.
pub(crate) const NO_FIGURES: &str = "no figures yet";

/// The strategies of LV.3 that have a lock of their own.
const LOCKS: [&str; 3] = ["spin", "rlock", "fenced"];

/// The strategies of LV.4 that are measured.
const PATHS: [&str; 2] = ["locked", "single-writer"];

/// Makes the table of the figures with this name.
type Figures = fn(&str) -> String;

/// A file of the folder and its text.
type Snippets = BTreeMap<PathBuf, String>;

/// All of them that are the same on every machine.
fn snippets() -> Snippets {
    let mut snippets = Snippets::new();
    let mut add = |name: String, text: String| snippets.insert(PathBuf::from(name), text.trim_end().to_owned() + "\n");
    // What consumers decide beside the requests has no trace.
    let traced = strategies().filter(|(_, strategy)| !strategy.needs.contains(&Service::Kafka));
    for (level, strategy) in traced {
        let name = format!("{}-{}", level.name, strategy.name);
        add(
            format!("traces/{name}.md"),
            trace(&format!("{}/{}", level.name, strategy.name)),
        );
    }
    for (name, figures) in FIGURES {
        add(format!("figures/{name}.md"), figures(name));
    }
    snippets
}

fn source(path: &str) -> String {
    fs::read_to_string(root().join(path)).unwrap_or_else(|error| panic!("{path}: {error}"))
}

/// One exact interleaving, as `oversold trace` prints it.
fn trace(name: &str) -> String {
    let mut command = Command::new(env!("CARGO_BIN_EXE_oversold"));
    let output = command.args(["trace", name, "--markdown"]).output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "oversold trace {name}: {said}");
    with_tokens_numbered(&String::from_utf8(output.stdout).unwrap())
}

/// A fencing token follows the clock. In a trace the first is called so, and so on, in as many letters.
fn with_tokens_numbered(trace: &str) -> String {
    static TOKEN: LazyLock<Regex> = LazyLock::new(|| Regex::new(r"\b\d{16}\b").unwrap());
    let mut seen: Vec<&str> = vec![];
    for token in TOKEN.find_iter(trace).map(|found| found.as_str()) {
        if !seen.contains(&token) {
            seen.push(token);
        }
    }
    let mut text = trace.to_owned();
    for (index, token) in seen.into_iter().enumerate() {
        text = text.replace(token, &format!("{:<16}", format!("token {}", index + 1)));
    }
    text
}

/// What the contract test is red about, strategy by strategy: those of the trail that break something on a single instance.
fn red_ones() -> impl Iterator<Item = (&'static Level, &'static Strategy, PathBuf)> {
    let breaking =
        strategies().filter(|(_, strategy)| strategy.guarantee.single_instance.those(Promise::Breaks).count() > 0);
    breaking.map(|(level, strategy)| {
        let file = PathBuf::from(format!("red/{}-{}.md", level.name, strategy.name));
        (level, strategy, file)
    })
}

/// What `make red` shows. It differs from run to run, so it is recorded, and the check looks only at what it names as broken.
fn red(level: &Level, strategy: &Strategy) -> String {
    let mut make = Command::new("make");
    make.args(["--silent", "--no-print-directory", "red"])
        .arg(format!("LEVEL={}", level.name))
        .arg(format!("STRATEGY={}", strategy.name))
        .current_dir(root());
    // Those of the cargo and the make that run this test would be inherited.
    for (variable, _) in env::vars().filter(|(name, _)| name.starts_with("CARGO") || name.starts_with("MAKE")) {
        if variable != "CARGO_HOME" && variable != "CARGO_TARGET_DIR" {
            make.env_remove(variable);
        }
    }
    let output = make.env_remove("MFLAGS").env_remove(BLESS).output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "make red: {said}");
    format!(
        "```text\n{}\n```\n",
        String::from_utf8(output.stdout).unwrap().trim_end()
    )
}

/// Holds what a recorded failure names as broken against what the strategy says that it breaks.
fn misnamed(file: &Path, text: &str, promises: &Promises) -> Vec<Problem> {
    let named: BTreeSet<&str> = text
        .lines()
        .filter_map(|line| line.trim_start().strip_prefix("BROKEN ")?.split(' ').next())
        .collect();
    let codes = |promise| promises.those(promise).map(|invariant| invariant.code());
    let missing: Vec<&str> = codes(Promise::Breaks).filter(|code| !named.contains(code)).collect();
    let too_many: Vec<&str> = codes(Promise::Keeps).filter(|code| named.contains(code)).collect();
    if missing.is_empty() && too_many.is_empty() {
        return vec![];
    }
    vec![Problem::new(
        file,
        1,
        format!(
            "the recorded run names {named:?} as broken; it lacks {missing:?}, and the strategy keeps {too_many:?}"
        ),
        "record it anew: `make generated`",
    )]
}

/// A table of measured figures from these files of `results/`, and how they were measured; or what to do to get some.
fn figures<Run: for<'a> Deserialize<'a>>(names: &[impl AsRef<str>], table: impl Fn(&[Run]) -> String) -> String {
    let mut runs: Vec<Run> = vec![];
    let mut measured: BTreeMap<String, Measured> = BTreeMap::new();
    for name in names {
        let file = root().join(format!("results/{}.json", name.as_ref()));
        let Ok(json) = fs::read_to_string(&file) else { continue };
        let read = || Ok::<_, serde_json::Error>((serde_json::from_str(&json)?, serde_json::from_str(&json)?));
        let (run, how): (Run, How) = read().unwrap_or_else(|error| panic!("{}: {error}", file.display()));
        runs.push(run);
        let alike = measured.entry(how.to_string()).or_default();
        alike.commands.push(format!("`{}`", how.command));
        alike.fdatasync_ms.extend(how.fdatasync_ms);
    }
    if runs.is_empty() {
        return format!("{NO_FIGURES}: `make results`\n");
    }
    let how = measured
        .iter()
        .map(|(on, alike)| format!("measured by {} {on}{}\n", alike.commands.join(", "), alike.disk()));
    format!("{}\n{}", table(&runs), how.collect::<Vec<_>>().join("\n"))
}

/// Files whose figures were measured in the same way.
#[derive(Default)]
struct Measured {
    commands: Vec<String>,
    fdatasync_ms: Vec<f64>,
}

impl Measured {
    /// How long the disk took to keep a small write, if it was looked at: no durable commit is faster.
    fn disk(&self) -> String {
        let Some(least) = self.fdatasync_ms.iter().copied().reduce(f64::min) else {
            return String::new();
        };
        let most = self.fdatasync_ms.iter().copied().fold(least, f64::max);
        let (least, most) = (format!("{least:.2}"), format!("{most:.2}"));
        let range = if least == most {
            least
        } else {
            format!("{least} to {most}")
        };
        format!("; one `fdatasync` took {range} ms")
    }
}

/// How figures were measured, as every file of `results/` says it.
#[derive(Deserialize)]
struct How {
    command: String,
    release: bool,
    commit: Option<String>,
    machine: Machine,
    /// Of the disk that a commit waits for; not there if that disk is another machine's, or nothing was committed.
    fdatasync_ms: Option<f64>,
    /// Not there for what a lock does alone.
    postgres: Option<Backend>,
    redis: Option<Backend>,
    kafka: Option<Backend>,
    /// Why they do not count.
    #[serde(default)]
    void: Vec<String>,
}

#[derive(Deserialize)]
struct Machine {
    system: String,
    processor: Option<String>,
    cores: usize,
    memory_mib: Option<u64>,
}

#[derive(Deserialize)]
struct Backend {
    version: String,
    durability: BTreeMap<String, String>,
}

impl fmt::Display for How {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let machine = &self.machine;
        write!(f, "on {}, ", machine.system)?;
        if let Some(processor) = &machine.processor {
            write!(f, "{processor}, ")?;
        }
        write!(f, "{} cores", machine.cores)?;
        if let Some(mib) = machine.memory_mib {
            write!(f, ", {} GiB of memory", (mib as f64 / 1024.0).round())?;
        }
        for (name, backend) in [
            ("Postgres", &self.postgres),
            ("Redis", &self.redis),
            ("Kafka", &self.kafka),
        ] {
            let Some(Backend { version, durability }) = backend else {
                continue;
            };
            write!(f, "; {name} {version}")?;
            for (setting, value) in durability {
                let value = if value.is_empty() { "off" } else { value };
                write!(f, ", `{setting}` {value}")?;
            }
        }
        write!(f, "; commit {}", self.commit.as_deref().unwrap_or("unknown"))
    }
}

/// What `oversold rush --json` writes, as far as the book shows it.
#[derive(Deserialize)]
struct RushRun {
    instances: u32,
    strategies: Vec<Rush>,
}

#[derive(Deserialize)]
struct Rush {
    strategy: String,
    sold: u64,
    oversold_by: u64,
    duplicates: u64,
    stock: Option<i64>,
    requests_a_second: f64,
    answered: Percentiles,
    verdict: String,
    sales_a_second: f64,
    all_answered_ms: f64,
    completed: Option<Percentiles>,
    all_completed_ms: Option<f64>,
    rounds: Option<Rounds>,
}

/// Several rounds of one strategy.
#[derive(Deserialize)]
struct Rounds {
    times: u32,
    requests_a_second: MedianRange,
    all_answered_ms: MedianRange,
    all_completed_ms: Option<MedianRange>,
}

impl Rush {
    fn requests_a_second(&self) -> String {
        self.figure(self.requests_a_second, |rounds| Some(&rounds.requests_a_second))
    }

    fn all_answered_ms(&self) -> String {
        self.figure(self.all_answered_ms, |rounds| Some(&rounds.all_answered_ms))
    }

    fn all_completed_ms(&self) -> String {
        self.figure(self.all_completed_ms.unwrap_or_default(), |rounds| {
            rounds.all_completed_ms.as_ref()
        })
    }

    /// With the range, where there were several rounds.
    fn figure(&self, of_this_one: f64, of_all: fn(&Rounds) -> Option<&MedianRange>) -> String {
        let of_all = self.rounds.as_ref().and_then(of_all);
        of_all.map_or_else(|| format!("{of_this_one:.0}"), MedianRange::to_string)
    }
}

/// What a table says about the rounds that its figures come from.
fn rounds_note(runs: &[RushRun]) -> String {
    let mut all = runs.iter().flat_map(|run| &run.strategies);
    all.find_map(|it| it.rounds.as_ref())
        .map_or_else(String::new, |rounds| {
            format!(
                "\nWith a range: the median of {} rounds. Without: the round in the middle.\n",
                rounds.times
            )
        })
}

#[derive(Deserialize)]
struct Percentiles {
    p50_ms: f64,
    p95_ms: f64,
    p99_ms: f64,
}

fn rush_table(runs: &[RushRun]) -> String {
    let mut table = "\
| strategy | sold | oversold by | duplicates | stock | req/s | p50 ms | p95 ms | p99 ms | everybody after ms | verdict |
|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|---|
"
    .to_owned();
    for it in runs.iter().flat_map(|run| &run.strategies) {
        let stock = it.stock.map_or_else(|| "?".to_owned(), |stock| stock.to_string());
        let Percentiles { p50_ms, p95_ms, p99_ms } = it.answered;
        table += &format!(
            "| `{}` | {} | {} | {} | {stock} | {} | {p50_ms:.0} | {p95_ms:.0} | {p99_ms:.0} | {} | {} |\n",
            it.strategy,
            it.sold,
            it.oversold_by,
            it.duplicates,
            it.requests_a_second(),
            it.all_answered_ms(),
            it.verdict
        );
    }
    table + &rounds_note(runs)
}

/// Every strategy on each number of instances that it was run on: what it answered, and how fast.
fn side_by_side_table(runs: &[RushRun]) -> String {
    let mut table = "\
| strategy | instances | sold | req/s | p50 ms | p95 ms | p99 ms | everybody after ms | verdict |
|---|--:|--:|--:|--:|--:|--:|--:|---|
"
    .to_owned();
    let rows = runs
        .iter()
        .flat_map(|run| run.strategies.iter().map(|it| (run.instances, it)));
    for (instances, it) in rows {
        let Percentiles { p50_ms, p95_ms, p99_ms } = it.answered;
        table += &format!(
            "| `{}` | {instances} | {} | {} | {p50_ms:.0} | {p95_ms:.0} | {p99_ms:.0} | {} | {} |\n",
            it.strategy,
            it.sold,
            it.requests_a_second(),
            it.all_answered_ms(),
            it.verdict
        );
    }
    table + &rounds_note(runs)
}

/// The whole road: what each strategy costs the buyer, what it sells, where it holds, and how much there is to read of it.
///
/// The figures are those of the run on one instance; others only add by how much they oversold.
fn road_table(runs: &[RushRun]) -> String {
    let mut table = "\
| strategy | answered p50 ms | answered p95 ms | completed p95 ms | sales/s | oversold by | holds on | lines of its own file |
|---|--:|--:|--:|--:|--:|---|--:|
"
    .to_owned();
    let Some(alone) = runs.iter().find(|run| run.instances == 1) else {
        return table;
    };
    for it in &alone.strategies {
        let (level, name) = it.strategy.split_once('/').expect("a name is LEVEL/STRATEGY");
        let (level, strategy) = strategies()
            .find(|(other, strategy)| other.name == level && strategy.name == name)
            .unwrap_or_else(|| panic!("{} is on no trail: `make results`", it.strategy));
        let oversold = runs.iter().filter_map(|run| {
            let here = run.strategies.iter().find(|other| other.strategy == it.strategy)?;
            Some(match run.instances {
                1 => here.oversold_by.to_string(),
                instances => format!("{} on {instances}", here.oversold_by),
            })
        });
        // Who has the answer has it all, unless it is told later.
        let completed = it.completed.as_ref().map_or_else(
            || "as answered".to_owned(),
            |completed| format!("{:.0}", completed.p95_ms),
        );
        table += &format!(
            "| `{}` | {:.0} | {:.0} | {completed} | {:.0} | {} | {} | {} |\n",
            it.strategy,
            it.answered.p50_ms,
            it.answered.p95_ms,
            it.sales_a_second,
            oversold.collect::<Vec<_>>().join(", "),
            holds_on(strategy),
            lines_of_code(&source(&level.source(strategy))),
        );
    }
    table += "
*Within the lease*: as long as no holder of the lock stands still for longer than its lease. The lines are those of the strategy's own file, \
without comments, and without `lock/`, `lock.rs` and `path/`, which it may stand on.
";
    table + &rounds_note(runs)
}

/// On how many instances a strategy keeps what it is about: no guarantee broken.
fn holds_on(strategy: &Strategy) -> &'static str {
    let breaks = |promises: Promises| promises.those(Promise::Breaks).count() > 0;
    let guarantee = strategy.guarantee;
    match (breaks(guarantee.single_instance), breaks(guarantee.multi_instance)) {
        (true, _) => "none",
        (false, true) => "one instance",
        // What ends it, on the trail, is the end of a lease.
        (false, false) if !guarantee.failure_modes.is_empty() => "any number, within the lease",
        (false, false) => "any number",
    }
}

/// Lines of a file that are neither empty nor a comment.
fn lines_of_code(source: &str) -> usize {
    let is_code = |line: &&str| !line.is_empty() && !line.starts_with("//");
    source.lines().map(str::trim).filter(is_code).count()
}

/// A rush whose orders are accepted first and decided later.
fn two_clocks_table(runs: &[RushRun]) -> String {
    let mut table = "\
| strategy | sold | answered p50 ms | p95 ms | p99 ms | everybody after ms | completed p50 ms | p95 ms | p99 ms | all after ms | verdict |
|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|---|
"
    .to_owned();
    for it in runs.iter().flat_map(|run| &run.strategies) {
        let three =
            |Percentiles { p50_ms, p95_ms, p99_ms }: &Percentiles| format!("{p50_ms:.0} | {p95_ms:.0} | {p99_ms:.0}");
        table += &format!(
            "| `{}` | {} | {} | {} | {} | {} | {} |\n",
            it.strategy,
            it.sold,
            three(&it.answered),
            it.all_answered_ms(),
            it.completed.as_ref().map_or_else(|| " | | ".to_owned(), three),
            it.all_completed_ms(),
            it.verdict
        );
    }
    table + &rounds_note(runs)
}

/// What `oversold bench lv4/… --json` writes, as far as the book shows it.
#[derive(Deserialize)]
struct Accept {
    strategy: String,
    clients: u32,
    orders_a_second: MedianRange,
    p95_ms: MedianRange,
    without_produce: WithoutProduce,
    producer_perf_test: Option<Produced>,
}

#[derive(Deserialize)]
struct WithoutProduce {
    orders_a_second: MedianRange,
    ratio: MedianRange,
}

#[derive(Deserialize)]
struct Produced {
    records_a_second: f64,
}

fn accept_table(runs: &[Accept]) -> String {
    let mut table = "\
| strategy | connections | accepted/s: median (range) | p95 ms | with a produce that does nothing | ratio | `kafka-producer-perf-test`, records/s |
|---|--:|--:|--:|--:|--:|--:|
"
    .to_owned();
    for it in runs {
        let produced = it.producer_perf_test.as_ref();
        table += &format!(
            "| `{}` | {} | {} | {:.0} | {} | {:.2} | {} |\n",
            it.strategy,
            it.clients,
            it.orders_a_second,
            it.p95_ms,
            it.without_produce.orders_a_second,
            it.without_produce.ratio,
            produced.map_or_else(|| "not measured".to_owned(), |it| format!("{:.0}", it.records_a_second))
        );
    }
    table
}

/// What `oversold bench lv4/… --drain --json` writes, as far as the book shows it.
#[derive(Deserialize)]
struct Drain {
    strategy: String,
    orders: u32,
    orders_a_second: MedianRange,
    ceiling: Option<Batches>,
    most_mib: MedianRange,
}

#[derive(Deserialize)]
struct Batches {
    orders_in_a_transaction: u32,
    orders_a_second: MedianRange,
    ratio: MedianRange,
}

fn drain_table(runs: &[Drain]) -> String {
    let mut table = "\
| strategy | orders that waited | decided/s: median (range) | pgbench, orders/s | of them in a transaction | ratio | memory at most, MiB |
|---|--:|--:|--:|--:|--:|--:|
"
    .to_owned();
    for it in runs {
        let (ceiling, batch, ratio) = match &it.ceiling {
            Some(it) => (
                it.orders_a_second.to_string(),
                it.orders_in_a_transaction.to_string(),
                format!("{:.2}", it.ratio),
            ),
            None => ("not measured".to_owned(), String::new(), String::new()),
        };
        table += &format!(
            "| `{}` | {} | {} | {ceiling} | {batch} | {ratio} | {:.0} |\n",
            it.strategy, it.orders, it.orders_a_second, it.most_mib
        );
    }
    table
}

/// What `oversold bench --json` writes, as far as the book shows it.
#[derive(Deserialize)]
struct Bench {
    strategy: String,
    reservations_a_second: MedianRange,
    p50_ms: MedianRange,
    p99_ms: MedianRange,
    ceiling: Option<Ceiling>,
}

#[derive(Deserialize)]
struct Ceiling {
    transactions_a_second: MedianRange,
    ratio: MedianRange,
}

#[derive(Deserialize)]
struct MedianRange {
    median: f64,
    least: f64,
    most: f64,
}

impl fmt::Display for MedianRange {
    /// With as many digits as were asked for: `{:.2}`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let digits = f.precision().unwrap_or(0);
        let Self { median, least, most } = self;
        write!(f, "{median:.digits$} ({least:.digits$} to {most:.digits$})")
    }
}

fn bench_table(runs: &[Bench]) -> String {
    let mut table = "\
| strategy | reservations/s: median (range) | pgbench, transactions/s | ratio | p50 ms | p99 ms |
|---|--:|--:|--:|--:|--:|
"
    .to_owned();
    for it in runs {
        let (ceiling, ratio) = match &it.ceiling {
            Some(ceiling) => (
                ceiling.transactions_a_second.to_string(),
                format!("{:.2}", ceiling.ratio),
            ),
            None => ("not measured".to_owned(), String::new()),
        };
        table += &format!(
            "| `{}` | {} | {ceiling} | {ratio} | {:.1} | {:.1} |\n",
            it.strategy, it.reservations_a_second, it.p50_ms, it.p99_ms
        );
    }
    table
}

/// The same where pgbench knows no ceiling.
fn rates_table(runs: &[Bench]) -> String {
    let mut table = "\
| strategy | reservations/s: median (range) | p50 ms | p99 ms |
|---|--:|--:|--:|
"
    .to_owned();
    for it in runs {
        table += &format!(
            "| `{}` | {} | {:.1} | {:.1} |\n",
            it.strategy, it.reservations_a_second, it.p50_ms, it.p99_ms
        );
    }
    table
}

/// What `oversold bench --waiters … --json` writes, as far as the book shows it.
#[derive(Deserialize)]
struct Waiters {
    strategy: String,
    waiters: u32,
    took_ms: MedianRange,
    commands_sent_each: MedianRange,
    commands_in_scripts_each: MedianRange,
}

fn waiters_table(runs: &[Waiters]) -> String {
    let mut table = "\
| the lock of | waiters | everybody had it after, ms: median (range) | commands sent, each | commands in scripts, each |
|---|--:|--:|--:|--:|
"
    .to_owned();
    for it in runs {
        table += &format!(
            "| `{}` | {} | {} | {:.2} | {:.2} |\n",
            it.strategy, it.waiters, it.took_ms, it.commands_sent_each, it.commands_in_scripts_each
        );
    }
    table
}

/// What `oversold bench --lock --json` writes, as far as the book shows it.
#[derive(Deserialize)]
struct Lock {
    strategy: String,
    clients: u32,
    pairs_a_second: MedianRange,
    redis_benchmark: Pairs,
    redis_benchmark_on_one_connection: Pairs,
}

#[derive(Deserialize)]
struct Pairs {
    pairs_a_second: MedianRange,
    ratio: MedianRange,
}

fn lock_table(runs: &[Lock]) -> String {
    let mut table = "\
| | taken and given back, a second: median (range) | the lock in proportion to it |
|---|--:|--:|
"
    .to_owned();
    for it in runs {
        let Lock { strategy, clients, .. } = it;
        table += &format!(
            "| the lock of `{strategy}`, {clients} tasks on one connection | {} | |\n",
            it.pairs_a_second
        );
        for (name, pairs) in [
            (format!("-c {clients}"), &it.redis_benchmark),
            (format!("-c 1 -P {clients}"), &it.redis_benchmark_on_one_connection),
        ] {
            table += &format!(
                "| `redis-benchmark {name}` | {} | {:.2} |\n",
                pairs.pairs_a_second, pairs.ratio
            );
        }
    }
    table
}

/// What `oversold bench --pools … --json` writes, as far as the book shows it.
#[derive(Deserialize)]
struct Curve {
    strategy: String,
    pools: Vec<Pool>,
}

#[derive(Deserialize)]
struct Pool {
    pool_size: u32,
    reservations_a_second: MedianRange,
    p50_ms: MedianRange,
    p99_ms: MedianRange,
}

fn pools_table(runs: &[Curve]) -> String {
    let mut table = "\
| strategy | connections in the pool | reservations/s: median (range) | p50 ms | p99 ms |
|---|--:|--:|--:|--:|
"
    .to_owned();
    for Curve { strategy, pools } in runs {
        for it in pools {
            table += &format!(
                "| `{strategy}` | {} | {} | {:.1} | {:.1} |\n",
                it.pool_size, it.reservations_a_second, it.p50_ms, it.p99_ms
            );
        }
    }
    table
}

/// Holds the snippets against the files that are committed: each is there, as it should be, and none beside them.
fn differences(snippets: &Snippets, committed: &Snippets) -> Vec<Problem> {
    let to_do = "`make generated` writes it anew: read what has changed, then commit it";
    let mut problems = vec![];
    for (file, text) in snippets {
        let shown = Path::new(FOLDER).join(file);
        match committed.get(file) {
            None => problems.push(Problem::new(shown, 1, "this snippet is not written yet", to_do)),
            Some(old) if old != text => {
                let line = old
                    .lines()
                    .zip(text.lines())
                    .take_while(|(old, new)| old == new)
                    .count()
                    + 1;
                let diff = TextDiff::from_lines(old, text);
                let diff = diff.unified_diff().context_radius(1).to_string();
                problems.push(Problem::new(
                    shown,
                    line,
                    format!("this is out of date:\n{diff}"),
                    to_do,
                ));
            }
            Some(_) => {}
        }
    }
    for file in committed.keys().filter(|file| !snippets.contains_key(*file)) {
        let to_do = "`make generated` deletes it";
        problems.push(Problem::new(
            Path::new(FOLDER).join(file),
            1,
            "nothing makes this snippet",
            to_do,
        ));
    }
    problems
}

fn committed() -> Snippets {
    let folder = root().join(FOLDER);
    let files = pages::files_below(&folder).into_iter();
    files
        .map(|file| {
            let text = fs::read_to_string(&file).unwrap();
            (file.strip_prefix(&folder).unwrap().to_owned(), text)
        })
        .collect()
}

fn write(snippets: &Snippets) {
    let folder = root().join(FOLDER);
    for file in committed().keys().filter(|file| !snippets.contains_key(*file)) {
        fs::remove_file(folder.join(file)).unwrap();
    }
    for (file, text) in snippets {
        let file = folder.join(file);
        fs::create_dir_all(file.parent().unwrap()).unwrap();
        fs::write(file, text).unwrap();
    }
}

#[test]
fn the_generated_snippets_are_up_to_date() {
    let mut snippets = snippets();
    let mut committed = committed();
    if env::var_os(BLESS).is_some() {
        snippets.extend(red_ones().map(|(level, strategy, file)| (file, red(level, strategy))));
        write(&snippets);
        return;
    }
    let mut problems = vec![];
    for (_, strategy, file) in red_ones() {
        let recorded = committed.remove(&file).unwrap_or_default();
        problems.extend(misnamed(
            &Path::new(FOLDER).join(file),
            &recorded,
            &strategy.guarantee.single_instance,
        ));
    }
    problems.extend(differences(&snippets, &committed));
    none(problems);
}

#[test]
fn a_snippet_that_is_missing_or_out_of_date_or_left_behind_is_found() {
    let snippets = |files: &[(&str, &str)]| -> Snippets {
        let owned = files
            .iter()
            .map(|(file, text)| (PathBuf::from(file), (*text).to_owned()));
        owned.collect()
    };
    let made = snippets(&[("a.md", "1\n2\n")]);

    none(differences(&made, &made));
    let found = only(differences(&made, &snippets(&[])));
    assert!(found.contains("a.md:1: this snippet is not written yet"), "{found}");
    let found = only(differences(&made, &snippets(&[("a.md", "1\n3\n")])));
    assert!(
        found.contains("a.md:2: this is out of date") && found.contains("-3\n+2"),
        "{found}"
    );
    let found = only(differences(&snippets(&[]), &made));
    assert!(found.contains("nothing makes this snippet"), "{found}");
}

#[test]
fn a_recorded_failure_that_names_something_else_is_found() {
    use box_office::Invariant::{Conservation, NoOversell};
    let promises = Promises::ALL_KEPT.breaks(&[NoOversell, Conservation]);
    let misnamed = |text| misnamed(Path::new("red.md"), text, &promises);

    none(misnamed("BROKEN I1 (no oversell): …\n…\nBROKEN I2 (conservation): …"));
    let found = only(misnamed("BROKEN I1 (no oversell): …"));
    assert!(found.contains("lacks [\"I2\"]"), "{found}");
    let found = only(misnamed("BROKEN I1 (…)\nBROKEN I2 (…)\nBROKEN I4 (…)"));
    assert!(found.contains("keeps [\"I4\"]"), "{found}");
}

/// Figures of a debug build, or of a checkout with changes, say nothing about the commit that they name.
#[test]
fn figures_are_measured_in_release_and_on_a_commit() {
    let problems = pages::files_below(&root().join("results"))
        .into_iter()
        .filter(|file| file.extension().is_some_and(|extension| extension == "json"))
        .flat_map(|file| {
            let json = fs::read_to_string(&file).unwrap();
            let how: How = serde_json::from_str(&json).unwrap_or_else(|error| panic!("{}: {error}", file.display()));
            unfit(file.strip_prefix(root()).unwrap(), &how)
        });
    none(problems.collect());
}

fn unfit(file: &Path, how: &How) -> Option<Problem> {
    let wrong = match how.commit.as_deref() {
        _ if !how.void.is_empty() => "these figures are void, as the file itself says",
        _ if !how.release => "these figures were measured in a debug build",
        Some(commit) if !commit.ends_with('+') => return None,
        _ => "these figures were measured with changes that no commit has",
    };
    Some(Problem::new(
        file,
        1,
        wrong,
        "commit, then measure anew: `make results`",
    ))
}

/// A file of `results/`, as far as it says how.
fn how(release: bool, commit: &str, void: &[&str]) -> How {
    let json = serde_json::json!({
        "command": "oversold rush lv1",
        "release": release,
        "commit": commit,
        "machine": { "system": "linux x86_64", "processor": null, "cores": 2, "memory_mib": 4000 },
        "postgres": { "version": "17.2", "durability": { "fsync": "on" } },
        "void": void,
    });
    serde_json::from_value(json).unwrap()
}

#[rstest::rstest]
#[case::debug(how(false, "4b825dc642cb", &[]), "in a debug build")]
#[case::changes(how(true, "4b825dc642cb+", &[]), "with changes")]
#[case::void(how(true, "4b825dc642cb", &["a row is missing"]), "void")]
fn figures_that_say_nothing_are_found(#[case] how_not: How, #[case] expected: &str) {
    assert!(unfit(Path::new("rush.json"), &how(true, "4b825dc642cb", &[])).is_none());
    let found = only(unfit(Path::new("rush.json"), &how_not).into_iter().collect());
    assert!(found.contains(expected), "{found}");
}

#[test]
fn figures_say_where_they_were_measured() {
    assert_eq!(
        how(true, "4b825dc642cb", &[]).to_string(),
        "on linux x86_64, 2 cores, 4 GiB of memory; Postgres 17.2, `fsync` on; commit 4b825dc642cb"
    );
}

#[test]
fn figures_say_what_the_disk_took() {
    let measured = |fdatasync_ms: &[f64]| Measured {
        commands: vec![],
        fdatasync_ms: fdatasync_ms.to_vec(),
    };
    assert_eq!(measured(&[]).disk(), "");
    assert_eq!(measured(&[0.104]).disk(), "; one `fdatasync` took 0.10 ms");
    assert_eq!(
        measured(&[0.105, 0.084, 1.2]).disk(),
        "; one `fdatasync` took 0.08 to 1.20 ms"
    );
}

#[test]
fn the_road_has_both_clocks_and_says_where_each_strategy_holds() {
    let run = |instances: u32, oversold_by: u64| -> RushRun {
        let percentiles = |ms: f64| serde_json::json!({ "p50_ms": ms, "p95_ms": ms + 0.4, "p99_ms": ms });
        let strategy = |name: &str, completed: serde_json::Value| {
            serde_json::json!({
                "strategy": name, "sold": 100, "oversold_by": oversold_by, "duplicates": 0, "stock": 0, "requests_a_second": 1.0,
                "sales_a_second": 250.0, "all_answered_ms": 30.0, "answered": percentiles(20.0), "completed": completed, "verdict": "as promised",
            })
        };
        let json = serde_json::json!({
            "instances": instances,
            "strategies": [
                strategy("lv2/mutex", serde_json::Value::Null),
                strategy("lv3/spin", serde_json::Value::Null),
                strategy("lv3/rlock", serde_json::Value::Null),
                strategy("lv3/fenced", serde_json::Value::Null),
                strategy("lv4/locked", percentiles(300.0)),
                strategy("lv4/single-writer", percentiles(300.0)),
            ],
        });
        serde_json::from_value(json).unwrap()
    };
    let table = road_table(&[run(1, 0), run(3, 7)]);
    for row in [
        "| `lv2/mutex` | 20 | 20 | as answered | 250 | 0, 7 on 3 | one instance | ",
        "| `lv3/spin` | 20 | 20 | as answered | 250 | 0, 7 on 3 | any number, within the lease | ",
        "| `lv3/rlock` | 20 | 20 | as answered | 250 | 0, 7 on 3 | any number, within the lease | ",
        "| `lv3/fenced` | 20 | 20 | as answered | 250 | 0, 7 on 3 | any number | ",
        "| `lv4/locked` | 20 | 20 | 300 | 250 | 0, 7 on 3 | any number, within the lease | ",
        "| `lv4/single-writer` | 20 | 20 | 300 | 250 | 0, 7 on 3 | any number | ",
    ] {
        assert!(table.contains(row), "{table}");
    }
    assert_eq!(lines_of_code("//! Docs.\n\nuse a;\n    // why\n    sell();\n"), 2);
}

#[test]
fn a_trace_shows_tokens_by_their_number() {
    let line = |token: &str| format!("| lock taken: {token} |\n");
    assert_eq!(
        with_tokens_numbered(&(line("1795470000000001") + &line("1795470000000009") + &line("1795470000000001"))),
        line("token 1         ") + &line("token 2         ") + &line("token 1         ")
    );
}
