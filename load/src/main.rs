//! The command `oversold`.
fn main() {}
