//! The `migrator` program.

fn main() {}
