//! The ceiling: what the database makes of the same statements when nothing stands between them and it but `pgbench`.

use std::{
    path::{Path, PathBuf},
    thread::available_parallelism,
    time::Duration,
};

use anyhow::Context;
use box_office::Strategy;
use serde::Serialize;
use suite::{
    backends::{Database, postgres_program},
    rush::SALE,
};

use super::tool::{self, ToolMissing};

/// The program, and the statements of one strategy.
pub(super) struct Pgbench {
    program: PathBuf,
    statements: PathBuf,
}

/// What it counted.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub(super) struct Ceiling {
    pub(super) transactions: u64,
    pub(super) failed: u64,
    pub(super) a_second: f64,
}

impl Pgbench {
    /// `None` where a strategy has no file of statements: what it does can't be said in pgbench's language.
    pub(super) fn find(strategy: &Strategy) -> Result<Option<Self>, ToolMissing> {
        let Some(statements) = statements(strategy) else {
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

    /// Runs the statements over so many connections, each the next transaction as soon as the last is done.
    pub(super) async fn run(&self, database: &Database, clients: u32, time: Duration) -> anyhow::Result<Ceiling> {
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
            .args(["--time", &time.as_secs().to_string()])
            .args(["--define", &format!("sale={SALE}"), "--define", "buyer=0"]);
        parse(&tool::output(&mut command, "pgbench").await?)
    }
}

/// The file of statements beside the strategy's source.
fn statements(strategy: &Strategy) -> Option<PathBuf> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent()?;
    let file = root.join(strategy.source).with_extension("pgbench.sql");
    file.is_file().then_some(file)
}

fn parse(output: &str) -> anyhow::Result<Ceiling> {
    let after = |name: &str| {
        let value = output.lines().rev().find_map(|line| line.strip_prefix(name));
        value.with_context(|| format!("pgbench does not say {name:?}:\n{output}"))
    };
    // What follows the number is a remark, or the number that was asked for.
    let number = |text: &str| text.trim().split([' ', '/']).next().unwrap_or_default().to_owned();
    Ok(Ceiling {
        transactions: number(after("number of transactions actually processed:")?).parse()?,
        // Before version 15 a failed transaction ended its client.
        failed: after("number of failed transactions:").map_or(Ok(0), |text| number(text).parse())?,
        a_second: number(after("tps =")?).parse()?,
    })
}
