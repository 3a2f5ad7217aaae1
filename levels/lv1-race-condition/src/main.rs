//! The server of LV.1.

use std::process::ExitCode;

fn main() -> ExitCode {
    box_office::main(&lv1_race_condition::LEVEL)
}
