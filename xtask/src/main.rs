//! `cargo xtask VERB`.

use std::process::ExitCode;

use clap::{Parser, Subcommand};
use xtask::project::Project;
use xtask::{bench, check, lab, run, setup, test};

/// Builds, runs and checks migrator. Each verb installs what it needs first.
#[derive(Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask", version)]
struct Cli {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Subcommand)]
enum Verb {
    /// Installs packages, the eBPF linker and the guest's kernel: only what is missing
    Setup(setup::Args),
    /// The demo: a pod under traffic moves between two nodes; with `-- ARGS`, runs `migrator ARGS` instead
    Run(run::Args),
    /// Two nodes, a client and a switch in network namespaces
    Lab(lab::Args),
    /// Formatting, lints, licences, documentation, unit tests, and the tests that need root
    Test(test::Args),
    /// Formatting, lints, licences and documentation
    Check(check::Args),
    /// What moving costs: many moves of the demo, or each part of the engine beside its like
    Bench(bench::Args),
}

fn main() -> ExitCode {
    let outcome = Project::discover().and_then(|project| match Cli::parse().verb {
        Verb::Setup(args) => setup::main(&project, &args),
        Verb::Run(args) => run::main(&project, &args),
        Verb::Lab(args) => lab::main(&project, args),
        Verb::Test(args) => test::main(&project, &args),
        Verb::Check(args) => check::main(&project, &args),
        Verb::Bench(args) => bench::main(&project, &args),
    });
    match outcome {
        Ok(code) => code,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}
