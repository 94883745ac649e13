//! `cargo xtask bench memory`: what our engine does, and beside it what QEMU, iperf3 and rustls do alone on the same path.
//!
//! A *row* is a file of `memory/rows/` and a line of the specification; it has *cases*, and a case has runs: ours and the
//! peer's in turn, so that what else happens on the machine meets both. A case gives a record for each metric: the medians,
//! the extremes, the ratio, and whether the aim is met. docs/benchmarks.md says how each figure is taken.
//!
//! ```text
//! stage   the lab on one QEMU: two nodes, a client, certificates
//!   pair    the guest under migrator (ours) and the same one under QEMU alone (peer), each with the load (load) inside
//!     rows    runs -> figures (samples, records) -> table
//! ```

mod figures;
mod image;
mod load;
mod ours;
mod peer;
mod pod;
mod rows;
mod stage;
mod table;

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use self::figures::Record;
use self::rows::{Bench, Row};
use self::stage::{Stage, Which};
use crate::project::Project;
use crate::{iperf, setup};

/// A guest boots in 5 s under emulation, on an idle machine.
const BOOTS_WITHIN: Duration = Duration::from_secs(120);
/// What has not moved after this does not converge.
const MOVES_WITHIN: Duration = Duration::from_secs(120);
/// The longest predicted downtime that lets either side freeze the guest: QEMU's default, and ours.
const DOWNTIME_LIMIT_MS: u32 = 300;

/// Arguments of the form.
#[derive(Clone, Debug, clap::Args)]
pub(super) struct Args {
    /// One small case of each row
    #[arg(long)]
    quick: bool,
    /// Only cases whose name contains these words, such as `copy` or `move-512`
    #[arg(long, value_name = "FILTER")]
    case: Option<String>,
    /// Runs of each side
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..))]
    runs: u32,
    /// Only print the names of the cases
    #[arg(long)]
    list: bool,
    /// Write the records to this file, as a list
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

/// What is wanted.
#[derive(Clone, Debug)]
pub(super) struct Plan {
    quick: bool,
    filter: Option<String>,
    runs: u32,
}

impl Plan {
    /// Words of a case's name are matched from their beginning: `copy` is not a part of `precopy`.
    fn wants(&self, case: &str) -> bool {
        self.filter
            .as_deref()
            .is_none_or(|filter| format!("-{case}").contains(&format!("-{filter}")))
    }
}

/// One move of a guest, on either side.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Moved {
    /// From the request until nothing is left to do.
    total_ms: f64,
    /// What the start of the destination's QEMU took before that; 0 where the total has it in it.
    start_ms: f64,
    /// From the source's stop to the destination's resume.
    downtime_ms: f64,
    /// When the source stopped, in microseconds of Unix time.
    stopped_at_unix_us: u64,
}

/// The form.
///
/// # Errors
/// Nothing could be measured. A row that cannot be run is told of, and makes the exit code 1; a missed aim does not.
pub(super) fn main(project: &Project, args: &Args) -> Result<ExitCode> {
    let plan = Plan {
        quick: args.quick,
        filter: args.case.clone(),
        runs: args.runs,
    };
    let rows = rows::all(&plan);
    if rows.is_empty() {
        bail!("no case matches: `cargo xtask bench memory --list` names them");
    }
    if args.list {
        for case in rows.iter().flat_map(|row| &row.cases) {
            println!("{case}");
        }
        return Ok(ExitCode::SUCCESS);
    }
    setup::require_root("to make network namespaces")?;
    setup::ensure(project, &setup::Args::default())?;
    iperf::check_installed()?;
    let began = Instant::now();
    let mut records = Vec::new();
    let mut failures = Vec::new();
    for which in [Which::Ten, Which::Installed] {
        let rows: Vec<&Row> = rows.iter().filter(|row| row.which == which).collect();
        if rows.is_empty() {
            continue;
        }
        let mut bench = Bench {
            project,
            stage: Stage::up(project, which)?,
            plan: &plan,
            records: &mut records,
        };
        for row in rows {
            println!("bench: {}: {}", row.name, row.cases.join(", "));
            let begun = Instant::now();
            // What was measured before a row broke is kept.
            if let Err(error) = (row.run)(&mut bench, &row.cases) {
                println!("bench: {} FAILED: {error:#}", row.name);
                failures.push(format!("{}: {error:#}", row.name));
            }
            println!(
                "bench: {} took {:.0} s",
                row.name,
                begun.elapsed().as_secs_f64()
            );
            write(args, bench.records)?;
        }
    }
    println!("\n{}", table::render(&records));
    println!(
        "{} runs of each side, in turn; {:.0} s",
        args.runs,
        began.elapsed().as_secs_f64()
    );
    for failure in &failures {
        println!("NOT MEASURED: {failure}");
    }
    Ok(if failures.is_empty() {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

/// After each row: a run of hours that is interrupted has left what it measured.
fn write(args: &Args, records: &[Record]) -> Result<()> {
    let Some(path) = &args.json else {
        return Ok(());
    };
    std::fs::write(path, serde_json::to_string_pretty(records)? + "\n")
        .with_context(|| format!("cannot write {}", path.display()))
}
