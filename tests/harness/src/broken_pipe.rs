//! `println!` and its siblings for programs whose output may be closed early, as in `oversold list |
//! head -1`. They shadow those of std, which panic then.
//!
//! A program uses them everywhere with `#[macro_use(print, println, eprint, eprintln)] extern crate harness;`.

use std::{
    fmt::Arguments,
    io::{self, ErrorKind, Write, stderr, stdout},
    panic::{AssertUnwindSafe, catch_unwind},
};

/// Writes to stdout. Output that no process reads any more is discarded: a command still writes its
/// files, and ends with its own exit code.
///
/// # Panics
/// Like std's `print!`, if stdout fails for another reason, such as a full disk.
pub fn out(text: Arguments) {
    ignore_broken_pipe(stdout().write_fmt(text), "stdout");
}

/// The same for stderr.
///
/// # Panics
/// Like std's `eprint!`, if stderr fails for another reason.
pub fn err(text: Arguments) {
    ignore_broken_pipe(stderr().write_fmt(text), "stderr");
}

/// Prints a line to stderr from code that tests run, too: they capture what std's `eprintln!` prints, and nothing else. It is
/// dropped if stderr fails.
pub(crate) fn notice(text: Arguments) {
    // The message of the panic goes where this line could not go.
    let _ = catch_unwind(AssertUnwindSafe(|| std::eprintln!("{text}")));
}

fn ignore_broken_pipe(written: io::Result<()>, to: &str) {
    match written {
        Err(why) if why.kind() != ErrorKind::BrokenPipe => panic!("failed printing to {to}: {why}"),
        _ => {}
    }
}

/// Prints to stdout.
#[macro_export]
macro_rules! print {
    ($($text:tt)*) => { $crate::broken_pipe::out(::std::format_args!($($text)*)) };
}

/// Prints a line to stdout.
#[macro_export]
macro_rules! println {
    () => { $crate::broken_pipe::out(::std::format_args!("\n")) };
    ($($text:tt)*) => { $crate::broken_pipe::out(::std::format_args!("{}\n", ::std::format_args!($($text)*))) };
}

/// Prints to stderr.
#[macro_export]
macro_rules! eprint {
    ($($text:tt)*) => { $crate::broken_pipe::err(::std::format_args!($($text)*)) };
}

/// Prints a line to stderr.
#[macro_export]
macro_rules! eprintln {
    () => { $crate::broken_pipe::err(::std::format_args!("\n")) };
    ($($text:tt)*) => { $crate::broken_pipe::err(::std::format_args!("{}\n", ::std::format_args!($($text)*))) };
}
