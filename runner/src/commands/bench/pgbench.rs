//! The ceiling of a strategy: the same statements, sent to the database by `pgbench` without a server in between.

use std::{path::PathBuf, thread::available_parallelism, time::Duration};

use crate::{checkout::root, levels::SelectedStrategy};
use anyhow::Context;
use harness::{
    backends::{Database, postgres_program},
    rush::SALE,
};

use crate::{
    commands::tool::{self, ToolMissing},
    results::bench::PgbenchReport,
};

/// The program `pgbench`, and the file with the statements of one strategy.
pub(super) struct Pgbench {
    program: PathBuf,
    statements: PathBuf,
}

/// How long a run takes.
#[derive(Clone, Copy, Debug)]
pub(super) enum Length {
    /// A duration, in whole seconds.
    Time(Duration),
    /// Transactions of each client.
    #[cfg(feature = "lv4")]
    Transactions(u32),
}

impl Pgbench {
    /// `None` where a strategy has no file of statements: pgbench's script language can't express what it does.
    pub(super) fn find(selected: SelectedStrategy) -> Result<Option<Self>, ToolMissing> {
        Self::with(statements(selected, "pgbench.sql"))
    }

    /// The same for the batches of a consumer, and the number of orders in a batch.
    #[cfg(feature = "lv4")]
    pub(super) fn find_batches(selected: SelectedStrategy) -> anyhow::Result<Option<(Self, u32)>> {
        let file = statements(selected, "batch.pgbench.sql");
        let Some(path) = file.clone() else { return Ok(None) };
        let text = std::fs::read_to_string(&path)?;
        let batch = text.lines().find_map(|line| line.strip_prefix("\\set batch "));
        let batch = batch.with_context(|| format!("{} sets no batch", path.display()))?;
        let batch = batch.trim().parse()?;
        Ok(Self::with(file)?.map(|pgbench| (pgbench, batch)))
    }

    fn with(statements: Option<PathBuf>) -> Result<Option<Self>, ToolMissing> {
        let Some(statements) = statements else {
            return Ok(None);
        };
        let install = if cfg!(target_os = "macos") {
            "brew install postgresql@17"
        } else {
            "sudo apt-get install --yes postgresql (it comes with the server; elsewhere it may be in postgresql-contrib)"
        };
        let program = tool::needed(postgres_program("pgbench"), "pgbench", install)?;
        Ok(Some(Self { program, statements }))
    }

    /// Runs the statements in a closed loop with this many clients. The buyers of each client are numbered from `first_buyer`, which is
    /// below a thousand million.
    pub(super) async fn run(
        &self,
        database: &Database,
        clients: u32,
        length: Length,
        first_buyer: u64,
    ) -> anyhow::Result<PgbenchReport> {
        let processors = available_parallelism().map_or(1, usize::from);
        let threads = processors.min(clients as usize);
        let mut command = tool::command(&self.program)?;
        for (variable, _) in std::env::vars_os() {
            if variable.to_string_lossy().starts_with("PG") {
                command.env_remove(variable);
            }
        }
        command
            .envs(database.environment())
            .args(["--no-vacuum", "--protocol=prepared"])
            .arg("--file")
            .arg(&self.statements)
            .args(["--client", &clients.to_string()])
            .args(["--jobs", &threads.to_string()])
            .args(["--define", &format!("sale={SALE}")])
            // The files count buyers up from the variable of one of these names.
            .args(["--define", &format!("buyer={first_buyer}")])
            .args(["--define", &format!("first={first_buyer}")]);
        match length {
            Length::Time(time) => command.args(["--time", &time.as_secs().to_string()]),
            #[cfg(feature = "lv4")]
            Length::Transactions(number) => command.args(["--transactions", &number.to_string()]),
        };
        parse(&tool::output(&mut command, "pgbench").await?)
    }
}

/// The file of statements next to the strategy's source.
fn statements(selected: SelectedStrategy, extension: &str) -> Option<PathBuf> {
    let file = root().join(selected.source()).with_extension(extension);
    file.is_file().then_some(file)
}

fn parse(output: &str) -> anyhow::Result<PgbenchReport> {
    let after = |name: &str| {
        let value = output.lines().rev().find_map(|line| line.strip_prefix(name));
        value.with_context(|| format!("pgbench does not report {name:?}:\n{output}"))
    };
    // What follows the number is a remark, or the number that was asked for.
    let number = |text: &str| text.trim().split([' ', '/']).next().unwrap_or_default().to_owned();
    let transactions = number(after("number of transactions actually processed:")?).parse()?;
    Ok(PgbenchReport {
        transactions,
        // Before version 15 a failed transaction ended its client.
        failed: after("number of failed transactions:").map_or(Ok(0), |text| number(text).parse())?,
        a_second: match transactions {
            // Then pgbench leaves the rate out.
            0 => 0.0,
            _ => number(after("tps =")?).parse()?,
        },
    })
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    #[test]
    fn the_rate_is_the_one_without_connecting() {
        let counted = parse(include_str!("samples/pgbench.txt")).expect("it is a real output");
        let expected = PgbenchReport {
            transactions: 425,
            failed: 0,
            a_second: 141.806_157,
        };
        assert_eq!(counted, expected);
    }

    #[test]
    fn no_transaction_in_all_the_time_is_a_rate_of_none() {
        let counted = parse(
            "number of transactions actually processed: 0\n\
             number of failed transactions: 0 (NaN%)\n",
        );
        assert_eq!(counted.expect("it is a real output").a_second, 0.0);
    }

    #[test]
    fn an_output_without_a_rate_is_quoted() {
        let error = parse("pgbench: error: client 0 aborted\n").expect_err("nothing was counted");
        assert!(error.to_string().contains("client 0 aborted"), "{error}");
    }

    /// The words of a statement; parameters are all the same, as they are written differently on the two sides.
    fn words(text: &str) -> String {
        let spaced: String = text.split_whitespace().collect::<Vec<_>>().join(" ");
        let mut words = String::new();
        let mut rest = spaced.chars().peekable();
        while let Some(character) = rest.next() {
            let next = rest.peek().copied();
            let next_is = |wanted: fn(&char) -> bool| next.as_ref().is_some_and(wanted);
            let parameter = match character {
                '$' => next_is(char::is_ascii_digit),
                ':' => !words.ends_with(':') && next_is(char::is_ascii_alphabetic),
                _ => false,
            };
            words.push(if parameter { '?' } else { character });
            while parameter
                && rest
                    .next_if(|next| next.is_ascii_alphanumeric() || *next == '_')
                    .is_some()
            {}
        }
        words
    }

    /// The statements of a file for pgbench, in their order.
    fn statements_of(file: &str) -> Vec<String> {
        let lines = file
            .lines()
            .filter(|line| !line.starts_with("--") && !line.starts_with("\\set "));
        let text = lines
            .map(|line| if line == "\\gset" { ";" } else { line })
            .collect::<Vec<_>>()
            .join("\n");
        let statements = text.split(';').map(|statement| {
            // The strategy makes the id itself.
            words(&statement.replace("lpad(:who::text, 32, '0')::uuid", ":id"))
        });
        statements.filter(|statement| !statement.is_empty()).collect()
    }

    #[test]
    fn pgbench_runs_the_statements_of_the_strategy_in_their_order() {
        let strategies = SelectedStrategy::all_main_strategies();
        let mut checked = 0;
        for strategy in strategies {
            let Some(file) = statements(strategy, "pgbench.sql") else {
                continue;
            };
            let source = file.with_file_name(Path::new(&strategy.source()).file_name().expect("a source is a file"));
            let source = words(&std::fs::read_to_string(source).expect("the source is there"));
            // The first statement is in what sells, not in what explains a refusal before it.
            let mut rest = &source[source.find("async fn reserve(").expect("it sells")..];
            for statement in statements_of(&std::fs::read_to_string(&file).expect("it is there")) {
                let written = match statement.as_str() {
                    "begin" => "context.begin()".to_owned(),
                    "commit" => "tx.commit()".to_owned(),
                    _ => format!("\"{statement}\""),
                };
                let found = rest.find(&written);
                let found =
                    found.unwrap_or_else(|| panic!("{} does not send, or not now: {statement}", strategy.source()));
                rest = &rest[found + written.len()..];
            }
            assert!(
                !rest.contains("sqlx::query"),
                "{} sends more than {}",
                strategy.source(),
                file.display()
            );
            checked += 1;
        }
        if cfg!(feature = "lv2") {
            assert!(checked >= 2, "pessimistic and conditional-update have their statements");
        }
    }

    /// What a batch does to the database: the statements by their first words, and what they are about.
    #[cfg(feature = "lv4")]
    #[test]
    fn the_batches_of_pgbench_are_those_of_the_strategy() {
        for (name, most) in [("single-writer", "const MAX_BATCH: usize = 2000;"), ("locked", "")] {
            let strategy = SelectedStrategy::one(&format!("lv4/{name}")).expect("LV.4 has it");
            let (pgbench, batch) = Pgbench::find_batches(strategy)
                .expect("pgbench is there")
                .expect("it has batches");
            let source = std::fs::read_to_string(root().join(strategy.source())).expect("the source is there");
            assert!(source.contains(most) && (most.is_empty() || most.contains(&batch.to_string())));
            let statements = std::fs::read_to_string(&pgbench.statements).expect("it is there");
            for part in [
                "insert into reservation",
                "insert into outbox",
                "pg_notify(",
                "update sale",
                "update partition_offset",
            ] {
                assert_eq!(
                    source.contains(part),
                    statements.contains(part),
                    "{part} in {}",
                    strategy.source()
                );
            }
        }
    }
}
