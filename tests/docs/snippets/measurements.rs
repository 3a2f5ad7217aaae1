//! Tables of measurements, made from the result files in `results/`, each with how and where it was measured.

use std::{collections::BTreeMap, fs, path::Path};

use oversold::results::RunMetadata;
use serde::de::DeserializeOwned;

use super::tables;
use crate::{Problem, none, only, pages, root};

/// The tables of measurements that a page can include: the name of the snippet, and how it is made from result files. `make results` measures
/// them.
const TABLES: &[(&str, MakeTable)] = &[
    ("lv1-rush", |name| table_of(&[name], tables::rush)),
    ("lv2-rush", |name| table_of(&[name], tables::rush)),
    ("lv2-rush-3", |name| table_of(&[name], tables::rush)),
    ("lv2-rush-once", |name| table_of(&[name], tables::rush)),
    ("lv2-bench", |_| {
        let strategies = ["mutex", "pessimistic", "optimistic", "conditional-update"];
        table_of(&strategies.map(|it| format!("lv2-bench-{it}")), tables::bench)
    }),
    ("lv2-pools", |_| {
        let strategies = ["pessimistic", "conditional-update"];
        table_of(&strategies.map(|it| format!("lv2-pools-{it}")), tables::pools)
    }),
    ("lv3-rush", |name| table_of(&[name], tables::rush)),
    ("lv3-rush-3", |name| table_of(&[name], tables::rush)),
    ("lv3-rush-3-once", |name| table_of(&[name], tables::rush)),
    ("lv3-and-lv2", |_| {
        // All strategies in one run: other load on the machine affects them alike.
        let runs = ["lv2-and-lv3-rush", "lv2-and-lv3-rush-3"];
        table_of(&runs, tables::side_by_side)
    }),
    ("lv3-bench", |_| {
        table_of(&LV3_STRATEGIES.map(|it| format!("lv3-bench-{it}")), tables::rates)
    }),
    ("lv3-waiters", |_| {
        table_of(&LV3_STRATEGIES.map(|it| format!("lv3-waiters-{it}")), tables::waiters)
    }),
    ("lv3-lock", |name| table_of(&[name], tables::lock)),
    ("lv4-rush", |name| table_of(&[name], tables::two_clocks)),
    ("lv4-rush-3", |name| table_of(&[name], tables::two_clocks)),
    ("lv4-rush-once", |name| table_of(&[name], tables::two_clocks)),
    ("lv4-accept", |_| {
        table_of(&LV4_STRATEGIES.map(|it| format!("lv4-accept-{it}")), tables::accept)
    }),
    ("lv4-drain", |_| {
        table_of(&LV4_STRATEGIES.map(|it| format!("lv4-drain-{it}")), tables::drain)
    }),
    ("road", |_| table_of(&["road", "road-3"], tables::all_levels)),
];

/// The beginning of a snippet without result files.
pub(crate) const NOT_MEASURED: &str = "not measured yet";

/// The main strategies of LV.3, each with a lock of its own.
const LV3_STRATEGIES: [&str; 3] = ["spin", "rlock", "fenced"];

/// The main strategies of LV.4.
const LV4_STRATEGIES: [&str; 2] = ["locked", "single-writer"];

/// Makes the snippet with this name.
type MakeTable = fn(&str) -> String;

/// All tables.
pub(super) fn all() -> impl Iterator<Item = (String, String)> {
    TABLES
        .iter()
        .map(|(name, make)| (format!("figures/{name}.md"), make(name)))
}

/// A table of these files of `results/` and how they were measured; or how to measure them.
fn table_of<R: DeserializeOwned>(names: &[impl AsRef<str>], table: impl Fn(&[R]) -> String) -> String {
    let mut runs: Vec<R> = vec![];
    let mut measured: BTreeMap<String, MeasuredAlike> = BTreeMap::new();
    for name in names {
        let file = root().join(format!("results/{}.json", name.as_ref()));
        let Ok(json) = fs::read_to_string(&file) else { continue };
        let read = || Ok::<_, serde_json::Error>((serde_json::from_str(&json)?, serde_json::from_str(&json)?));
        let (run, metadata): (R, RunMetadata) = read().unwrap_or_else(|error| panic!("{}: {error}", file.display()));
        runs.push(run);
        let alike = measured.entry(where_measured(&metadata)).or_default();
        alike.commands.push(format!("`{}`", metadata.command));
        alike.fdatasync_ms.extend(metadata.fdatasync_ms);
    }
    if runs.is_empty() {
        return format!("{NOT_MEASURED}: `make results`\n");
    }
    let how = measured
        .iter()
        .map(|(place, alike)| format!("measured by {} {place}{}\n", alike.commands.join(", "), alike.disk()));
    format!("{}\n{}", table(&runs), how.collect::<Vec<_>>().join("\n"))
}

/// Result files that were measured on the same machine, services and commit.
#[derive(Default)]
struct MeasuredAlike {
    commands: Vec<String>,
    fdatasync_ms: Vec<f64>,
}

impl MeasuredAlike {
    /// Duration of an `fdatasync`, which bounds the rate of durable commits, if it was measured.
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

/// Machine, services and commit, in words.
fn where_measured(metadata: &RunMetadata) -> String {
    let machine = &metadata.machine;
    let mut text = format!("on {}, ", machine.system);
    if let Some(processor) = &machine.processor {
        text += &format!("{processor}, ");
    }
    text += &format!("{} cores", machine.cores);
    if let Some(mib) = machine.memory_mib {
        text += &format!(", {} GiB of memory", (mib as f64 / 1024.0).round());
    }
    for (name, backend) in [
        ("Postgres", &metadata.postgres),
        ("Redis", &metadata.redis),
        ("Kafka", &metadata.kafka),
    ] {
        let Some(backend) = backend else { continue };
        text += &format!("; {name} {}", backend.version);
        for (setting, value) in &backend.durability {
            let value = if value.is_empty() { "off" } else { value };
            text += &format!(", `{setting}` {value}");
        }
    }
    text + &format!("; commit {}", metadata.commit.as_deref().unwrap_or("unknown"))
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
    assert_eq!(
        where_measured(&metadata(true, "4b825dc642cb", &[])),
        "on linux x86_64, 2 cores, 4 GiB of memory; Postgres 17.2, `fsync` on; commit 4b825dc642cb"
    );
}

#[test]
fn results_say_what_the_disk_took() {
    let measured = |fdatasync_ms: &[f64]| MeasuredAlike {
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
