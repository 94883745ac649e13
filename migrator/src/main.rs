//! The `migrator` program.

use std::process::ExitCode;

fn main() -> ExitCode {
    migrator::cli::main()
}
