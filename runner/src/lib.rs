//! The command `oversold`: runs the sale, shows it step by step, checks recorded histories, and measures throughput.
//!
//! Each command is a module of `commands`. The model of `oversold size` is in [`sizing`]. What the commands write with `--json` is in [`results`], which the tests of the book read back.

#[macro_use(print, println, eprint, eprintln)]
extern crate harness;

mod checkout;
mod cli;
mod commands;
mod exit;
mod interrupt;
mod levels;
pub mod results;
pub mod sizing;
pub mod statistics;

pub use cli::run;
