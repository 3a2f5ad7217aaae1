//! The server of LV.2.

use std::process::ExitCode;

fn main() -> ExitCode {
    box_office::main(&lv2_db_lock::LEVEL)
}
