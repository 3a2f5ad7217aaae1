//! Every command in the book and the README exists, with its arguments and flags.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    process::Command,
    sync::LazyLock,
};

use regex::Regex;

use crate::{
    LEVELS, Problem, none, only,
    pages::{self, Kind, Page},
    root,
};

/// Code that looks like a command, but is a column of a table.
const NOT_COMMANDS: &[&str] = &["oversold by"];

/// All commands and arguments that exist.
#[derive(Default)]
struct Known {
    /// The targets of the Makefile.
    targets: BTreeSet<String>,
    /// Of the Makefile, those that a reader may set.
    variables: BTreeSet<String>,
    /// The subcommands of `oversold`, each with its flags.
    subcommands: BTreeMap<String, BTreeSet<String>>,
    packages: BTreeSet<String>,
    /// `lv1` and `lv1/read-then-write`.
    names: BTreeSet<String>,
    /// The source of all tests, to search for a test's name.
    tests: String,
}

/// All matches of the pattern's first group.
fn all(pattern: &str, text: &str) -> BTreeSet<String> {
    let pattern = Regex::new(pattern).unwrap();
    pattern.captures_iter(text).map(|found| found[1].to_owned()).collect()
}

fn help(words: &[&str]) -> String {
    let output = Command::new(env!("CARGO_BIN_EXE_oversold"))
        .args(words)
        .arg("--help")
        .output()
        .unwrap();
    String::from_utf8(output.stdout).unwrap()
}

impl Known {
    fn here() -> Self {
        let makefile = fs::read_to_string(root().join("Makefile")).unwrap();
        let general = help(&[]);
        let commands = general.split("Commands:").nth(1).expect("the help lists commands");
        let sources = |folder: &str| {
            let files = pages::files_below(&root().join(folder)).into_iter();
            files.filter(|file| file.extension().is_some_and(|extension| extension == "rs"))
        };
        let manifests = ["tests", "runner", "load", "levels"]
            .into_iter()
            .flat_map(|folder| pages::files_below(&root().join(folder)))
            .filter(|file| file.ends_with("Cargo.toml"));
        let mut names = BTreeSet::new();
        for level in LEVELS {
            names.insert(level.name.to_owned());
            names.extend(level.all().map(|it| format!("{}/{}", level.name, it.name)));
        }
        Self {
            targets: all(r"(?m)^([a-z][a-z-]*):", &makefile),
            variables: all(r"(?m)^([A-Z_]+) \?=", &makefile),
            subcommands: all(r"(?m)^  ([a-z-]+) ", commands)
                .into_iter()
                .map(|command| {
                    let flags = all("(--[a-z][a-z-]*)", &help(&[command.as_str()]));
                    (command, flags)
                })
                .collect(),
            packages: manifests
                .flat_map(|file| {
                    let manifest = fs::read_to_string(file).unwrap();
                    all(r#"\[package\]\nname = "([^"]+)""#, &manifest)
                })
                .collect(),
            names,
            tests: ["tests", "levels", "runner"]
                .into_iter()
                .flat_map(sources)
                .map(|file| fs::read_to_string(file).unwrap())
                .collect(),
        }
    }

    /// What is wrong with a command, and how to fix it.
    fn objection(&self, command: &str) -> Option<(String, String)> {
        let words = shlex::split(command.split(" #").next()?)?;
        let words: Vec<&str> = words
            .iter()
            .map(String::as_str)
            .skip_while(|word| *word == "$" || is_assignment(word))
            .collect();
        match words.split_first()? {
            (&"make", words) => self.make(words),
            (&"cargo", ["test", words @ ..]) => self.cargo_test(words),
            (&"cargo", ["run", words @ ..]) => {
                let words = words.split(|word| *word == "--").nth(1)?;
                self.oversold(words)
            }
            (program, words) if program.rsplit('/').next() == Some("oversold") => self.oversold(words),
            _ => None,
        }
    }

    fn make(&self, words: &[&str]) -> Option<(String, String)> {
        let mut target = None;
        let mut set = BTreeMap::new();
        for word in words {
            match word.split_once('=') {
                Some((variable, value)) if is_assignment(word) => {
                    if !self.variables.contains(variable) {
                        return Some((
                            format!("the Makefile takes no variable `{variable}`"),
                            format!("it takes {}", listed(&self.variables)),
                        ));
                    }
                    set.insert(variable, value);
                }
                _ if word.starts_with('-') => {}
                _ if !self.targets.contains(*word) => {
                    return Some((
                        format!("the Makefile has no target `{word}`"),
                        format!("it has {}", listed(&self.targets)),
                    ));
                }
                _ => target = Some(*word),
            }
        }
        if let Some(level) = set.get("LEVEL") {
            let strategy = set.get("STRATEGY").map(|strategy| format!("/{strategy}"));
            let unknown = self.named(&format!("{level}{}", strategy.unwrap_or_default()));
            if unknown.is_some() {
                return unknown;
            }
        }
        let flags = self.subcommands.get(target?)?;
        let arguments = shlex::split(set.get("ARGS")?)?;
        flags_of(target?, flags, arguments.iter().map(String::as_str))
    }

    fn oversold(&self, words: &[&str]) -> Option<(String, String)> {
        let (command, words) = words.split_first()?;
        if command.starts_with('-') {
            return None;
        }
        let Some(flags) = self.subcommands.get(*command) else {
            let known: BTreeSet<String> = self.subcommands.keys().cloned().collect();
            return Some((
                format!("`oversold` has no subcommand `{command}`"),
                format!("it has {}", listed(&known)),
            ));
        };
        let unknown = words.iter().find_map(|word| self.named(word));
        unknown.or_else(|| flags_of(command, flags, words.iter().copied()))
    }

    fn cargo_test(&self, words: &[&str]) -> Option<(String, String)> {
        let mut words = words.iter();
        while let Some(&word) = words.next() {
            match word {
                "--" => return None,
                "-p" | "--package" => {
                    let package = words.next()?;
                    if !self.packages.contains(*package) {
                        return Some((
                            format!("there is no package `{package}`"),
                            format!("there is {}", listed(&self.packages)),
                        ));
                    }
                }
                "--test" | "--features" => drop(words.next()),
                _ if word.starts_with('-') => {}
                test => {
                    let name = test.split("::").next()?;
                    if !self.tests.contains(name) {
                        return Some((
                            format!("no test is called `{test}`, so this runs none"),
                            "take the name of a test, or a part of it".to_owned(),
                        ));
                    }
                }
            }
        }
        None
    }

    /// What is wrong with a word that looks like a level or strategy.
    fn named(&self, word: &str) -> Option<(String, String)> {
        static NAME: LazyLock<Regex> = LazyLock::new(|| Regex::new(r"^lv\d+(/[a-z/-]+)?$").unwrap());
        let wrong = NAME.is_match(word) && !self.names.contains(word);
        wrong.then(|| {
            (
                format!("there is no level or strategy `{word}`"),
                "`oversold list` lists what there is".to_owned(),
            )
        })
    }
}

fn is_assignment(word: &str) -> bool {
    word.split_once('=').is_some_and(|(name, _)| {
        !name.is_empty()
            && name
                .chars()
                .all(|c| c.is_ascii_uppercase() || c.is_ascii_digit() || c == '_')
    })
}

fn flags_of<'a>(
    command: &str,
    flags: &BTreeSet<String>,
    words: impl Iterator<Item = &'a str>,
) -> Option<(String, String)> {
    let mut words = words.map(|word| word.split('=').next().unwrap_or(word));
    let unknown = words.find(|word| word.starts_with("--") && !flags.contains(*word))?;
    Some((
        format!("`oversold {command}` takes no `{unknown}`"),
        format!("it takes {}", listed(flags)),
    ))
}

fn listed(words: &BTreeSet<String>) -> String {
    words.iter().map(String::as_str).collect::<Vec<_>>().join(", ")
}

/// The commands in inline or fenced code, with their line numbers.
fn commands(page: &Page) -> Vec<(usize, &str)> {
    const SHELL: [&str; 6] = ["", "sh", "bash", "shell", "console", "text"];
    let fenced = page.lines.iter().filter_map(|line| match &line.kind {
        Kind::Code(language) if SHELL.contains(&language.as_str()) => Some((line.number, line.text.trim())),
        _ => None,
    });
    page.inline_code()
        .filter(|(_, code)| !NOT_COMMANDS.contains(code))
        .chain(fenced)
        .flat_map(|(number, code)| code.split(" && ").map(move |command| (number, command)))
        .collect()
}

fn unknown_commands(pages: &[Page], known: &Known) -> Vec<Problem> {
    let mut problems = vec![];
    for page in pages {
        for (number, command) in commands(page) {
            if let Some((wrong, to_do)) = known.objection(command) {
                problems.push(Problem::new(&page.file, number, format!("`{command}`: {wrong}"), to_do));
            }
        }
    }
    problems
}

#[test]
fn every_command_is_there() {
    none(unknown_commands(&pages::all(), &Known::here()));
}

#[rstest::rstest]
#[case::target("Run `make rash`.", "no target `rash`")]
#[case::target_in_a_fence("```sh\n$ make rash LEVEL=lv1\n```", "no target `rash`")]
#[case::variable("`make rush LEVLE=lv1`", "no variable `LEVLE`")]
#[case::level("`make rush LEVEL=lv9`", "no level or strategy `lv9`")]
#[case::strategy("`make red LEVEL=lv1 STRATEGY=mutex`", "no level or strategy `lv1/mutex`")]
#[case::flag_in_args("`make rush ARGS=\"--byers 50\"`", "takes no `--byers`")]
#[case::subcommand("`oversold rash lv1`", "no subcommand `rash`")]
#[case::flag("`PORT=0 oversold rush lv1 --byers 50`", "takes no `--byers`")]
#[case::flag_after_cargo_run("`cargo run -p oversold -- rush --byers=50`", "takes no `--byers`")]
#[case::package("`cargo test -p lv1`", "no package `lv1`")]
#[case::test(
    "`make test && cargo test -p harness no_such_thing`",
    "no test is called `no_such_thing`"
)]
fn a_command_that_is_not_there_is_found(#[case] text: &str, #[case] expected: &str) {
    let known = Known {
        // Without this file, which contains the wrong name.
        tests: "fn a_sale_keeps_its_guarantee() {}".to_owned(),
        ..Known::here()
    };
    let found = only(unknown_commands(&[Page::new("page.md", text)], &known));
    assert!(found.starts_with("page.md:") && found.contains(expected), "{found}");
}

#[test]
fn a_command_that_is_there_is_let_pass() {
    let text = r#"
`make rush LEVEL=lv2 STRATEGY=mutex ARGS="--instances 3"`, `oversold by`, `oversold trace lv1/read-then-write --markdown`
```console
$ WORK_MS=5 oversold serve lv2 --port 8080
$ make test && cargo test -p lv1-race-condition a_sale_keeps   # the contract
```"#;
    none(unknown_commands(&[Page::new("page.md", text)], &Known::here()));
}
