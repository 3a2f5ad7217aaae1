//! The server of LV.3.

use std::process::ExitCode;

fn main() -> ExitCode {
    box_office::main(&lv3_redis_lock::LEVEL)
}
