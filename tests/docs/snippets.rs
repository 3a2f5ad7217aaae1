//! The generated snippets of the book: each is made here, held against what is committed, and written with `OVERSOLD_BLESS=1`.

use std::{
    collections::{BTreeMap, BTreeSet},
    env, fs,
    path::{Path, PathBuf},
    process::Command,
};

use box_office::{Place, Promise, Promises};
use serde::Deserialize;
use similar::TextDiff;

use crate::{Problem, none, only, pages, root, strategies};

/// Set by `make generated`.
const BLESS: &str = "OVERSOLD_BLESS";

/// Where the snippets are, from the root of the repository.
const FOLDER: &str = "book/generated";

/// The one recorded run that the book shows of the failing contract.
const RED: (&str, &str) = ("lv1", "read-then-write");

/// A file of the folder and its text.
type Snippets = BTreeMap<PathBuf, String>;

/// All of them that are the same on every machine.
fn snippets() -> Snippets {
    let mut snippets = Snippets::new();
    let mut add = |name: String, text: String| snippets.insert(PathBuf::from(name), text.trim_end().to_owned() + "\n");
    for (level, strategy) in strategies(Place::Trail) {
        let name = format!("{}-{}", level.name, strategy.name);
        add(format!("traces/{name}.md"), trace(&format!("{}/{}", level.name, strategy.name)));
    }
    for (level, broken) in strategies(Place::Broken) {
        let text = source(broken.source);
        let twin = twin_of(&text).unwrap_or_else(|| panic!("{}: its docs name no `Twin: `", broken.source));
        let twin = level
            .strategy(twin)
            .unwrap_or_else(|| panic!("{}: its twin {twin:?} is no strategy of {}", broken.source, level.name));
        let name = broken.name.trim_start_matches("broken/");
        add(
            format!("diffs/{}-{name}.md", level.name),
            diff((twin.source, &source(twin.source)), (broken.source, &text)),
        );
    }
    for name in ["lv1-rush", "lv2-rush", "lv2-rush-3"] {
        add(format!("figures/{name}.md"), figures(name, rush_table));
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
    String::from_utf8(output.stdout).unwrap()
}

/// The name after `Twin: ` in a broken strategy's docs.
fn twin_of(source: &str) -> Option<&str> {
    source.split("Twin: `").nth(1)?.split('`').next()
}

/// The code of a strategy: what stands below the docs of its file, without the marks that the book includes parts by.
fn code(source: &str) -> String {
    let lines = source
        .lines()
        .filter(|line| !line.starts_with("//!") && !line.contains("// ANCHOR"));
    let code: Vec<&str> = lines.skip_while(|line| line.is_empty()).collect();
    code.join("\n") + "\n"
}

/// What a broken strategy does otherwise than its twin; each is the path and the text of a file.
fn diff(twin: (&str, &str), broken: (&str, &str)) -> String {
    let (before, after) = (code(twin.1), code(broken.1));
    let diff = TextDiff::from_lines(&before, &after);
    let mut text = format!("```diff\n--- {}\n+++ {}\n", twin.0, broken.0);
    for hunk in diff.unified_diff().context_radius(3).iter_hunks() {
        // Without the line numbers, which would be counted below the docs.
        let hunk = hunk.to_string();
        let (_, lines) = hunk.split_once('\n').unwrap_or_default();
        text += "@@\n";
        text += lines;
    }
    text + "```\n"
}

/// What `make red` shows. It differs from run to run, so it is recorded, and the check looks only at what it names as broken.
fn red() -> String {
    let (level, strategy) = RED;
    let mut make = Command::new("make");
    make.args(["--silent", "--no-print-directory", "red"])
        .arg(format!("LEVEL={level}"))
        .arg(format!("STRATEGY={strategy}"))
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
    format!("```text\n{}\n```\n", String::from_utf8(output.stdout).unwrap().trim_end())
}

fn red_file() -> PathBuf {
    PathBuf::from(format!("red/{}-{}.md", RED.0, RED.1))
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
        format!("the recorded run names {named:?} as broken; it lacks {missing:?}, and the strategy keeps {too_many:?}"),
        "record it anew: `make generated`",
    )]
}

/// A table of measured figures, or what to do to get one.
fn figures<Run: for<'a> Deserialize<'a>>(name: &str, table: impl Fn(&Run) -> String) -> String {
    let file = root().join(format!("results/{name}.json"));
    let Ok(json) = fs::read_to_string(&file) else {
        return "no figures yet: `make results`\n".to_owned();
    };
    let measured: Measured<Run> =
        serde_json::from_str(&json).unwrap_or_else(|error| panic!("{}: {error}", file.display()));
    format!("{}\n{}\n", table(&measured.run), measured.how)
}

/// A file of `results/`: what was measured, and how.
#[derive(Deserialize)]
struct Measured<Run> {
    #[serde(flatten)]
    how: How,
    #[serde(flatten)]
    run: Run,
}

#[derive(Deserialize)]
struct How {
    command: String,
    profile: String,
    commit: Option<String>,
    machine: Machine,
    postgres: Postgres,
}

#[derive(Deserialize)]
struct Machine {
    system: String,
    processor: Option<String>,
    cores: usize,
    memory_mib: Option<u64>,
}

#[derive(Deserialize)]
struct Postgres {
    version: String,
    durability: BTreeMap<String, String>,
}

impl std::fmt::Display for How {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let machine = &self.machine;
        write!(f, "measured by `{}` on {}, ", self.command, machine.system)?;
        if let Some(processor) = &machine.processor {
            write!(f, "{processor}, ")?;
        }
        write!(f, "{} cores", machine.cores)?;
        if let Some(mib) = machine.memory_mib {
            write!(f, ", {} GiB of memory", (mib as f64 / 1024.0).round())?;
        }
        write!(f, "; Postgres {}", self.postgres.version)?;
        for (setting, value) in &self.postgres.durability {
            write!(f, ", `{setting}` {value}")?;
        }
        write!(f, "; commit {}", self.commit.as_deref().unwrap_or("unknown"))
    }
}

/// What `oversold rush --json` writes, as far as the book shows it.
#[derive(Deserialize)]
struct RushRun {
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
}

#[derive(Deserialize)]
struct Percentiles {
    p50_ms: f64,
    p95_ms: f64,
    p99_ms: f64,
}

fn rush_table(run: &RushRun) -> String {
    let mut table = "\
| strategy | sold | oversold by | duplicates | stock | req/s | p50 ms | p95 ms | p99 ms | verdict |
|---|--:|--:|--:|--:|--:|--:|--:|--:|---|
"
    .to_owned();
    for it in &run.strategies {
        let stock = it.stock.map_or_else(|| "?".to_owned(), |stock| stock.to_string());
        let Percentiles { p50_ms, p95_ms, p99_ms } = it.answered;
        table += &format!(
            "| `{}` | {} | {} | {} | {stock} | {:.0} | {p50_ms:.0} | {p95_ms:.0} | {p99_ms:.0} | {} |\n",
            it.strategy, it.sold, it.oversold_by, it.duplicates, it.requests_a_second, it.verdict
        );
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
                let line = old.lines().zip(text.lines()).take_while(|(old, new)| old == new).count() + 1;
                let diff = TextDiff::from_lines(old, text);
                let diff = diff.unified_diff().context_radius(1).to_string();
                problems.push(Problem::new(shown, line, format!("this is out of date:\n{diff}"), to_do));
            }
            Some(_) => {}
        }
    }
    for file in committed.keys().filter(|file| !snippets.contains_key(*file)) {
        let to_do = "`make generated` deletes it";
        problems.push(Problem::new(Path::new(FOLDER).join(file), 1, "nothing makes this snippet", to_do));
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
        snippets.insert(red_file(), red());
        write(&snippets);
        return;
    }
    let mut problems = vec![];
    let promises = |(level, name): (&str, &str)| {
        let mut all = strategies(Place::Trail);
        let (_, strategy) = all.find(|(it, strategy)| it.name == level && strategy.name == name)?;
        Some(strategy.guarantee.alone)
    };
    let recorded = committed.remove(&red_file()).unwrap_or_default();
    let promises = promises(RED).expect("the recorded strategy is on the trail");
    problems.extend(misnamed(&Path::new(FOLDER).join(red_file()), &recorded, &promises));
    problems.extend(differences(&snippets, &committed));
    none(problems);
}

#[test]
fn a_snippet_that_is_missing_or_out_of_date_or_left_behind_is_found() {
    let snippets = |files: &[(&str, &str)]| -> Snippets {
        let owned = files.iter().map(|(file, text)| (PathBuf::from(file), (*text).to_owned()));
        owned.collect()
    };
    let made = snippets(&[("a.md", "1\n2\n")]);

    none(differences(&made, &made));
    let found = only(differences(&made, &snippets(&[])));
    assert!(found.contains("a.md:1: this snippet is not written yet"), "{found}");
    let found = only(differences(&made, &snippets(&[("a.md", "1\n3\n")])));
    assert!(found.contains("a.md:2: this is out of date") && found.contains("-3\n+2"), "{found}");
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

#[test]
fn a_diff_shows_the_mistake_and_not_the_docs() {
    let twin = "//! Right.\n\nuse a;\n\n// ANCHOR: lock\nlet guard = lock();\n// ANCHOR_END: lock\nsell();\n";
    let broken = "//! Broken: dropped at once.\n//!\n//! Twin: `right`. Caught by I1.\n\nuse a;\n\nlet _ = lock();\nsell();\n";
    assert_eq!(twin_of(broken), Some("right"));
    assert_eq!(
        diff(("right.rs", twin), ("broken.rs", broken)),
        "```diff\n--- right.rs\n+++ broken.rs\n@@\n use a;\n \n-let guard = lock();\n+let _ = lock();\n sell();\n```\n"
    );
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
    let wrong = match (&*how.profile, how.commit.as_deref()) {
        ("release", Some(commit)) if !commit.ends_with('+') => return None,
        ("release", _) => "these figures were measured with changes that no commit has",
        _ => "these figures were measured in a debug build",
    };
    Some(Problem::new(file, 1, wrong, "commit, then measure anew: `make results`"))
}

#[rstest::rstest]
#[case::debug("debug", Some("4b825dc642cb"), "in a debug build")]
#[case::changes("release", Some("4b825dc642cb+"), "with changes")]
#[case::no_commit("release", None, "with changes")]
fn figures_of_a_debug_build_or_of_no_commit_are_found(
    #[case] profile: &str,
    #[case] commit: Option<&str>,
    #[case] expected: &str,
) {
    let how = |profile: &str, commit: Option<&str>| How {
        command: "oversold rush lv1".to_owned(),
        profile: profile.to_owned(),
        commit: commit.map(str::to_owned),
        machine: Machine {
            system: "linux".to_owned(),
            processor: None,
            cores: 2,
            memory_mib: None,
        },
        postgres: Postgres {
            version: "17".to_owned(),
            durability: BTreeMap::new(),
        },
    };
    assert!(unfit(Path::new("rush.json"), &how("release", Some("4b825dc642cb"))).is_none());
    let found = only(unfit(Path::new("rush.json"), &how(profile, commit)).into_iter().collect());
    assert!(found.contains(expected), "{found}");
}
