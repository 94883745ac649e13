//! `cargo xtask bench demo`, and `cargo xtask bench` alone: the spread of downtime and blackout over many moves of the demo.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, Result};
use serde::Serialize;

use crate::lab::{Node, Topology};
use crate::project::Project;
use crate::report::Report;
use crate::run;
use crate::silence::{Spread, spread};

/// Arguments of the form.
#[derive(Clone, Debug, clap::Args)]
pub(super) struct Args {
    /// How many times the pod moves
    #[arg(long, default_value_t = 20, value_parser = clap::value_parser!(u32).range(1..))]
    moves: u32,
    /// Compare every page before the grant, as the demo does; this is outside the downtime's floor
    #[arg(long)]
    verify: bool,
    /// Write the figures and the whole report to this file
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

/// The figures of one run.
#[derive(Serialize)]
struct Figures<'a> {
    moves: usize,
    downtime_ms: Option<Spread>,
    blackout_ms: Option<Spread>,
    total_ms: Option<Spread>,
    report: &'a Report,
}

/// The form.
///
/// # Errors
/// The moves could not be made.
pub(super) fn main(project: &Project, args: &Args) -> Result<ExitCode> {
    let plan = run::Plan {
        moves: args.moves,
        verify: args.verify,
        keep: false,
        topology: Topology::Bridge,
        via: Node::A,
    };
    let report = run::demo(project, &plan)?;
    let of = |figure: fn(&crate::report::Migration) -> f64| {
        spread(&report.migrations.iter().map(figure).collect::<Vec<_>>())
    };
    let figures = Figures {
        moves: report.migrations.len(),
        downtime_ms: of(|m| m.downtime_ms),
        blackout_ms: of(|m| m.blackout_ms),
        total_ms: of(|m| m.total_ms),
        report: &report,
    };
    println!(
        "\n{} moves                min    median       p95       max",
        figures.moves
    );
    for (name, spread) in [
        ("downtime ms", figures.downtime_ms),
        ("blackout ms", figures.blackout_ms),
        ("total ms", figures.total_ms),
    ] {
        if let Some(Spread {
            min,
            median,
            p95,
            max,
        }) = spread
        {
            println!("  {name:<16} {min:>9.1} {median:>9.1} {p95:>9.1} {max:>9.1}");
        }
    }
    if let Some(path) = &args.json {
        std::fs::write(path, serde_json::to_string_pretty(&figures)? + "\n")
            .with_context(|| format!("cannot write {}", path.display()))?;
    }
    let defects = report.defects(args.moves as usize, args.verify);
    for defect in &defects {
        println!("DEFECT: {defect}");
    }
    Ok(if defects.is_empty() {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}
