//! Tables of measurements, made from the result files in `results/`, each with how and where it was measured.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt, fs,
    path::Path,
    process::Command,
};

use oversold::{
    results::{RunMetadata, rush::RushResults},
    sizing::{Demand, Measured},
};
use serde::de::DeserializeOwned;
use serde_json::Value;

use super::{road, tables};
use crate::{Problem, none, only, pages, root};

/// A table of measurements that a page can include.
struct Table {
    /// The name of the snippet.
    snippet: &'static str,
    /// The names of the result files that it is made of. `make results` writes them.
    files: Vec<String>,
    text: String,
}

impl Table {
    fn new<R: DeserializeOwned>(
        snippet: &'static str,
        files: impl IntoIterator<Item = impl Into<String>>,
        table: impl Fn(&[R]) -> String,
    ) -> Self {
        let files: Vec<String> = files.into_iter().map(Into::into).collect();
        Self {
            snippet,
            text: table_of(&files, table),
            files,
        }
    }
}

fn made() -> Vec<Table> {
    let of_level = |level: &'static str| move |runs: &[RushResults]| tables::rush(&tables::of_levels(runs, &[level]));
    let orders = |runs: &[RushResults]| tables::two_clocks(&tables::of_levels(runs, &["lv4"]));
    let sustained = [
        named("lv2-bench", &LV2),
        named("lv3-bench", &LV3),
        named("lv4-drain", &LV4),
    ]
    .concat();
    vec![
        Table::new("lv1-rush", ["lv1-rush"], tables::rush),
        Table::new("lv2-rush", [ROAD], of_level("lv2")),
        Table::new("lv2-rush-3", [ROAD_3], of_level("lv2")),
        Table::new("lv2-rush-once", ["lv2-rush-once"], tables::rush),
        Table::new("lv2-bench", named("lv2-bench", &LV2), tables::bench),
        Table::new(
            "lv2-pools",
            named("lv2-pools", &["pessimistic", "conditional-update"]),
            tables::pools,
        ),
        Table::new("lv3-rush", [ROAD], of_level("lv3")),
        Table::new("lv3-rush-3", [ROAD_3], of_level("lv3")),
        Table::new("lv3-rush-3-once", ["lv3-rush-3-once"], tables::rush),
        Table::new("lv3-and-lv2", [ROAD, ROAD_3], |runs| {
            tables::side_by_side(&tables::of_levels(runs, &["lv2", "lv3"]))
        }),
        Table::new("lv3-bench", named("lv3-bench", &LV3), tables::rates),
        Table::new(
            "lv3-waiters",
            [named("lv3-waiters", &LV3), named("lv3-waiters-3", &LV3)].concat(),
            tables::waiters,
        ),
        Table::new("lv3-lock", ["lv3-lock"], tables::lock),
        Table::new("lv4-rush", [ROAD], orders),
        Table::new("lv4-rush-3", [ROAD_3], orders),
        Table::new("lv4-rush-once", ["lv4-rush-once"], tables::two_clocks),
        Table::new("lv4-accept", named("lv4-accept", &LV4), tables::accept),
        Table::new("lv4-drain", named("lv4-drain", &LV4), tables::drain),
        Table::new("lv4-payments", ["lv4-payments"], tables::payments),
        Table::new(
            "road",
            [vec![ROAD.to_owned(), ROAD_3.to_owned()], sustained].concat(),
            road::all_levels,
        ),
        Table::new(
            "sizing-lv4",
            ["lv4-accept-single-writer", "lv4-drain-single-writer", ROAD],
            |_: &[Value]| sizing("lv4/single-writer"),
        ),
        Table::new(
            "sizing-lv2",
            ["lv2-bench-conditional-update", "lv2-pools-conditional-update"],
            |_: &[Value]| sizing("lv2/conditional-update"),
        ),
    ]
}

/// What sales of three sizes take, as `oversold size` computes it.
fn sizing(strategy: &str) -> String {
    let demands = [10_000, 1_000_000, 5_000_000].map(|buyers| Demand {
        buyers,
        minutes: 10,
        peak: 5,
        sales: 1,
    });
    match Measured::read(strategy, &root().join("results")) {
        Ok(measured) => measured.markdown(&demands),
        Err(why) => format!("{NOT_MEASURED}: {why:#}\n"),
    }
}

/// All strategies of all levels on one instance. In each round they take turns, so other load on the machine affects them alike, and all have
/// the same buyers, clicks and tickets.
const ROAD: &str = "road";

/// The same on three instances.
const ROAD_3: &str = "road-3";

/// The beginning of a snippet without result files.
pub(crate) const NOT_MEASURED: &str = "not measured yet";

/// The main strategies of three levels.
const LV2: [&str; 4] = ["mutex", "pessimistic", "optimistic", "conditional-update"];
const LV3: [&str; 3] = ["spin", "rlock", "fenced"];
const LV4: [&str; 2] = ["locked", "single-writer"];

/// A result file for each strategy.
fn named(bench: &str, strategies: &[&str]) -> Vec<String> {
    strategies
        .iter()
        .map(|strategy| format!("{bench}-{strategy}"))
        .collect()
}

/// All tables.
pub(super) fn all() -> impl Iterator<Item = (String, String)> {
    made()
        .into_iter()
        .map(|table| (format!("figures/{}.md", table.snippet), table.text))
}

/// A table of these files of `results/` and how they were measured; or how to measure them.
fn table_of<R: DeserializeOwned>(names: &[String], table: impl Fn(&[R]) -> String) -> String {
    let mut runs: Vec<R> = vec![];
    let mut measured: BTreeMap<String, MeasuredAlike> = BTreeMap::new();
    for name in names {
        let file = root().join(format!("results/{name}.json"));
        let Ok(json) = fs::read_to_string(&file) else { continue };
        let read = || Ok::<_, serde_json::Error>((serde_json::from_str(&json)?, serde_json::from_str(&json)?));
        let (run, metadata): (R, RunMetadata) = read().unwrap_or_else(|error| panic!("{}: {error}", file.display()));
        runs.push(run);
        measured.entry(machine(&metadata)).or_default().add(&metadata);
    }
    if runs.is_empty() {
        return format!("{NOT_MEASURED}: `make results`\n");
    }
    let how = measured.iter().map(|(machine, alike)| format!("{machine}{alike}"));
    format!("{}\n{}", table(&runs), how.collect::<Vec<_>>().join("\n"))
}

/// Build and machine, in words.
fn machine(metadata: &RunMetadata) -> String {
    let machine = &metadata.machine;
    let build = if metadata.release { "release" } else { "debug" };
    let mut text = format!("Measured in a {build} build on {}, ", machine.system);
    if let Some(processor) = &machine.processor {
        text += &format!("{processor}, ");
    }
    text += &format!("{} cores", machine.cores);
    if let Some(mib) = machine.memory_mib {
        text += &format!(", {} GiB of memory", (mib as f64 / 1024.0).round());
    }
    text + "; clients, servers and services shared the cores."
}

/// Result files that were measured by the same build on the same machine.
#[derive(Default)]
struct MeasuredAlike {
    /// By services and commit.
    commands: BTreeMap<String, Vec<String>>,
    /// Of each run on a Postgres, if it was recorded.
    fdatasync_ms: Vec<Option<f64>>,
}

impl MeasuredAlike {
    fn add(&mut self, metadata: &RunMetadata) {
        let commands = self.commands.entry(services(metadata)).or_default();
        commands.push(format!("`{}`", metadata.command));
        if metadata.postgres.is_some() {
            self.fdatasync_ms.push(metadata.fdatasync_ms);
        }
    }

    /// Duration of an `fdatasync`, which bounds the rate of durable commits.
    fn disk(&self) -> String {
        if self.fdatasync_ms.is_empty() {
            return " Nothing waited for a disk.".to_owned();
        }
        let recorded = || self.fdatasync_ms.iter().flatten().copied();
        let Some(least) = recorded().reduce(f64::min) else {
            return " How long an `fdatasync` took on the disk of Postgres was not recorded.".to_owned();
        };
        let most = recorded().fold(least, f64::max);
        let (least, most) = (format!("{least:.2}"), format!("{most:.2}"));
        let range = if least == most {
            least
        } else {
            format!("{least} to {most}")
        };
        let missing = match self.fdatasync_ms.iter().any(Option::is_none) {
            true => ", where it was recorded",
            false => "",
        };
        format!(" One `fdatasync` on the disk of Postgres took {range} ms{missing}.")
    }
}

impl fmt::Display for MeasuredAlike {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{}\n", self.disk())?;
        for (services, commands) in &self.commands {
            writeln!(f, "- {}: {services}", commands.join(", "))?;
        }
        Ok(())
    }
}

/// Services and commit, in words.
fn services(metadata: &RunMetadata) -> String {
    let mut text = String::new();
    for (name, backend) in [
        ("Postgres", &metadata.postgres),
        ("Redis", &metadata.redis),
        ("Kafka", &metadata.kafka),
    ] {
        let Some(backend) = backend else { continue };
        text += &format!("{name} {}", backend.version);
        for (setting, value) in &backend.durability {
            let value = if value.is_empty() { "off" } else { value };
            text += &format!(", `{setting}` {value}");
        }
        text += "; ";
    }
    text + &format!("commit {}", metadata.commit.as_deref().unwrap_or("unknown"))
}

/// Results of a debug build, or of a checkout with changes, say nothing about the commit that they name.
#[test]
fn results_are_measured_in_release_and_on_a_commit() {
    let problems = pages::files_below(&root().join("results"))
        .into_iter()
        .filter(|file| file.extension().is_some_and(|extension| extension == "json"))
        .flat_map(|file| {
            let json = fs::read_to_string(&file).unwrap();
            let metadata: RunMetadata =
                serde_json::from_str(&json).unwrap_or_else(|error| panic!("{}: {error}", file.display()));
            unfit(file.strip_prefix(root()).unwrap(), &metadata)
        });
    none(problems.collect());
}

fn unfit(file: &Path, metadata: &RunMetadata) -> Option<Problem> {
    let wrong = match metadata.commit.as_deref() {
        _ if !metadata.void.is_empty() => "these results are void, as the file itself says",
        _ if !metadata.release => "these results were measured in a debug build",
        Some(commit) if !commit.ends_with('+') => return None,
        _ => "these results were measured with changes that no commit has",
    };
    Some(Problem::new(
        file,
        1,
        wrong,
        "commit, then measure anew: `make results`",
    ))
}

/// The metadata of a result file.
fn metadata(release: bool, commit: &str, void: &[&str]) -> RunMetadata {
    let json = serde_json::json!({
        "command": "oversold rush lv1",
        "release": release,
        "commit": commit,
        "machine": { "system": "linux x86_64", "processor": null, "cores": 2, "memory_mib": 4000 },
        "postgres": {
            "service": "postgres", "source": "native", "reason": "", "version": "17.2", "address": "127.0.0.1:1", "start_up_ms": 1,
            "durability": { "fsync": "on" },
        },
        "void": void,
    });
    serde_json::from_value(json).unwrap()
}

#[rstest::rstest]
#[case::debug(metadata(false, "4b825dc642cb", &[]), "in a debug build")]
#[case::changes(metadata(true, "4b825dc642cb+", &[]), "with changes")]
#[case::void(metadata(true, "4b825dc642cb", &["a row is missing"]), "void")]
fn results_that_say_nothing_are_found(#[case] unfit_one: RunMetadata, #[case] expected: &str) {
    assert!(unfit(Path::new("rush.json"), &metadata(true, "4b825dc642cb", &[])).is_none());
    let found = only(unfit(Path::new("rush.json"), &unfit_one).into_iter().collect());
    assert!(found.contains(expected), "{found}");
}

#[test]
fn results_say_where_they_were_measured() {
    let metadata = metadata(true, "4b825dc642cb", &[]);
    assert_eq!(
        machine(&metadata),
        "Measured in a release build on linux x86_64, 2 cores, 4 GiB of memory; clients, servers and services shared the cores."
    );
    assert_eq!(services(&metadata), "Postgres 17.2, `fsync` on; commit 4b825dc642cb");
    let mut alike = MeasuredAlike::default();
    alike.add(&metadata);
    alike.add(&metadata);
    assert_eq!(
        alike.to_string(),
        " How long an `fdatasync` took on the disk of Postgres was not recorded.\n\n\
         - `oversold rush lv1`, `oversold rush lv1`: Postgres 17.2, `fsync` on; commit 4b825dc642cb\n"
    );
}

#[rstest::rstest]
#[case::no_postgres(&[], "Nothing waited for a disk.")]
#[case::not_recorded(&[None, None], "How long an `fdatasync` took on the disk of Postgres was not recorded.")]
#[case::once(&[Some(0.104)], "One `fdatasync` on the disk of Postgres took 0.10 ms.")]
#[case::a_range(&[Some(0.105), Some(0.084), Some(1.2)], "One `fdatasync` on the disk of Postgres took 0.08 to 1.20 ms.")]
#[case::not_always(&[None, Some(0.104)], "One `fdatasync` on the disk of Postgres took 0.10 ms, where it was recorded.")]
fn results_say_what_the_disk_took(#[case] fdatasync_ms: &[Option<f64>], #[case] expected: &str) {
    let measured = MeasuredAlike {
        fdatasync_ms: fdatasync_ms.to_vec(),
        ..MeasuredAlike::default()
    };
    assert_eq!(measured.disk().trim(), expected);
}

/// The names of the result files that a command of `make results` writes.
fn written_by_make_results() -> BTreeSet<String> {
    let listed = Command::new(root().join("infra/results.sh"))
        .arg("--list")
        .output()
        .unwrap();
    assert!(listed.status.success(), "{listed:?}");
    let names = String::from_utf8(listed.stdout).unwrap();
    names.lines().map(str::to_owned).collect()
}

#[test]
fn make_results_writes_each_file_that_a_table_is_made_of_and_no_other() {
    let written = written_by_make_results();
    let read: BTreeSet<String> = made().into_iter().flat_map(|table| table.files).collect();
    assert_eq!(written, read);
    let files = pages::files_below(&root().join("results"));
    let left_behind = files.iter().filter(|file| {
        let name = file.file_stem().unwrap().to_string_lossy();
        !written.contains(&*name)
    });
    assert_eq!(
        left_behind.count(),
        0,
        "of {files:?}, some are written by no command: {written:?}"
    );
}
