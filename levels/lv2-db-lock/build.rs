//! Compiles the mutants of this level into it.

fn main() -> Result<(), Box<dyn std::error::Error>> {
    Ok(mutants::build()?)
}
