//! The server of LV.4.

use std::process::ExitCode;

fn main() -> ExitCode {
    box_office::main(&lv4_kafka::LEVEL)
}
