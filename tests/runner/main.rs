//! The command `oversold`: its exit codes, its error messages, and the names in its JSON. `bench.rs` is a test target of its own.

#![allow(clippy::unwrap_used)]

mod checkout;
mod dead_letters;
mod doctor;
mod exercise;
mod incomplete;
mod judge;
mod list;
mod missing;
mod pipes;
mod rush;
mod size;
mod trace;
mod usage;
mod waiters;

use std::process::{Command, Output};

/// Runs the command without settings from the environment.
fn oversold(arguments: &[&str]) -> Output {
    command(arguments).output().unwrap()
}

fn command(arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_oversold"));
    command.args(arguments);
    for variable in [
        "STRATEGY",
        "PORT",
        "DATABASE_POOL_SIZE",
        "WORK_MS",
        "OVERSOLD_TRACE_FILE",
        "REDIS_PREFIX",
        "LOCK_LEASE_MS",
        "KAFKA_PREFIX",
        "KAFKA_CONSUMERS",
        "KAFKA_SESSION_MS",
        "ORDER_TTL_MS",
        "ORDER_PRIORITY",
        "RATE_LIMIT",
        "RATE_LIMIT_PER_BUYER",
    ] {
        command.env_remove(variable);
    }
    command
}

fn out(output: &Output) -> String {
    String::from_utf8(output.stdout.clone()).unwrap()
}

fn err(output: &Output) -> String {
    String::from_utf8(output.stderr.clone()).unwrap()
}
