//! The command `oversold`.

use std::process::ExitCode;

fn main() -> ExitCode {
    oversold::run()
}
