//! `cargo xtask bench`: what moving costs. One file per form.

mod demo;
mod figures;
mod image;
mod memory;
mod network;
mod plain;
mod plan;
mod stage;
mod table;

use std::process::ExitCode;

use anyhow::Result;

use crate::project::Project;

/// Arguments of the verb.
#[derive(Clone, Debug, clap::Args)]
#[command(args_conflicts_with_subcommands = true)]
pub struct Args {
    #[command(subcommand)]
    form: Option<Form>,
    #[command(flatten)]
    demo: demo::Args,
}

#[derive(Clone, Debug, clap::Subcommand)]
enum Form {
    /// The spread of downtime and blackout over many moves of the demo; what `bench` alone does
    Demo(demo::Args),
    /// Moves, silence, copy rate, faults, slowdown and VMM replacement, against QEMU's own, iperf3 and rustls
    Memory(plan::Args),
    /// The gate's cost, parking and injecting, the flip, and latency around a move, against plain sockets and QEMU's own
    Network(plan::Args),
    /// Start without the image, what crosses before the resume, the block server, and start from a template, against podman and QEMU's own
    Image(plan::Args),
}

/// The verb.
///
/// # Errors
/// What is measured could not be run.
pub fn main(project: &Project, args: &Args) -> Result<ExitCode> {
    match &args.form {
        None => demo::main(project, &args.demo),
        Some(Form::Demo(args)) => demo::main(project, args),
        Some(Form::Memory(args)) => memory::main(project, args),
        Some(Form::Network(args)) => network::main(project, args),
        Some(Form::Image(args)) => image::main(project, args),
    }
}
