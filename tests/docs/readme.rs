//! The recorded outputs in the README, compared with what the commands print.

use std::process::Command;

use regex::Regex;

use crate::{Problem, none, only, root};

/// A recorded output: the arguments of the command that printed it, and its first line.
struct Recorded<'a> {
    words: Vec<&'a str>,
    line: usize,
    text: Vec<&'a str>,
}

/// The outputs below a marker: `<!-- output of: make rush LEVEL=lv1 -->`.
fn recorded(readme: &str) -> Vec<Recorded<'_>> {
    let mut found = vec![];
    let mut lines = readme.lines().enumerate();
    while let Some((number, line)) = lines.next() {
        let Some(make) = line
            .strip_prefix("<!-- output of: make ")
            .and_then(|line| line.strip_suffix(" -->"))
        else {
            continue;
        };
        lines.next(); // the fence
        found.push(Recorded {
            words: make.split([' ', '=']).filter(|word| *word != "LEVEL").collect(),
            line: number + 1,
            text: lines
                .by_ref()
                .map(|(_, line)| line)
                .take_while(|line| !line.starts_with("```"))
                .collect(),
        });
    }
    found
}

/// What all rushes have in common: the headings of the table, and the guarantee of each strategy.
fn shape(rush: &[&str]) -> Vec<String> {
    let promised = Regex::new(r"^    promised: .*; verdict: ").unwrap();
    let headings = rush.iter().take_while(|line| !line.starts_with('╞')).skip(1);
    let headings = headings
        .filter(|line| line.starts_with('│'))
        .map(|line| line.split_whitespace().collect::<Vec<_>>().join(" "));
    let promises = rush
        .iter()
        .filter_map(|line| Some(promised.find(line)?.as_str().to_owned()));
    headings.chain(promises).collect()
}

fn out_of_date(recorded: &Recorded<'_>, printed: &str) -> Option<Problem> {
    let printed: Vec<&str> = printed.trim_end().lines().collect();
    let same = match recorded.words[0] {
        "rush" => !shape(&printed).is_empty() && shape(&recorded.text) == shape(&printed),
        _ => recorded.text == printed,
    };
    (!same).then(|| {
        Problem::new(
            "README.md",
            recorded.line,
            format!(
                "`{}` prints something else now:\n{}",
                recorded.words.join(" "),
                printed.join("\n")
            ),
            "run the command above it, and record what it prints",
        )
    })
}

#[test]
fn what_the_readme_shows_is_what_the_commands_print() {
    let readme = std::fs::read_to_string(root().join("README.md")).unwrap();
    let recorded = recorded(&readme);
    assert!(
        recorded.len() >= 2,
        "the outputs are not where this test looks for them"
    );
    let problems = recorded.iter().filter_map(|recorded| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_oversold"));
        command.args(&recorded.words);
        if recorded.words[0] == "rush" {
            // What is compared does not depend on the number of buyers.
            command.args(["--buyers", "2", "--capacity", "1"]);
        }
        let output = command.output().unwrap();
        out_of_date(recorded, &String::from_utf8(output.stdout).unwrap())
    });
    none(problems.collect());
}

#[test]
fn an_output_that_is_out_of_date_is_found() {
    let rush = |heading: &str, sold: u32, promised: &str| {
        format!(
            "2 buyers\n┌───┐\n│ strategy ┆ {heading} │\n│          ┆      │\n╞═══╡\n│ lv1/a ┆ {sold} │\n└───┘\nlv1/a: {sold} sold\n    promised: {promised}; verdict: as promised\n"
        )
    };
    let readme = format!(
        "# Oversold\n\n<!-- output of: make rush LEVEL=lv1 -->\n```text\n{}```\n\n<!-- output of: make trace LEVEL=lv1 -->\n```text\n| 1 | Ann |\n```\n",
        rush("sold", 375, "breaks I1")
    );
    let recorded = recorded(&readme);
    assert_eq!(recorded[0].words, ["rush", "lv1"]);
    assert_eq!(recorded[1].words, ["trace", "lv1"]);
    assert_eq!(recorded[1].line, 16);

    let found = |number: usize, printed: &str| out_of_date(&recorded[number], printed).into_iter().collect();
    none(found(0, &rush("sold", 103, "breaks I1")));
    none(found(1, "| 1 | Ann |\n\n"));
    for printed in [
        rush("sales", 375, "breaks I1"),
        rush("sold", 375, "breaks I2"),
        String::new(),
    ] {
        assert!(only(found(0, &printed)).starts_with("README.md:3:"));
    }
    assert!(only(found(1, "| 1 | Bob |")).starts_with("README.md:16:"));
}
