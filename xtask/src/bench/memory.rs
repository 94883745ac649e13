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

mod rows;

use std::process::ExitCode;

use anyhow::{Result, bail};

use self::rows::{Bench, Row};
use super::plan::{Args, Plan, Results};
use super::stage::{Stage, Which};
use crate::project::Project;
use crate::{iperf, setup};

/// The form.
///
/// # Errors
/// Nothing could be measured. A row that cannot be run is told of, and makes the exit code 1; a missed aim does not.
pub(super) fn main(project: &Project, args: &Args) -> Result<ExitCode> {
    let plan = Plan::new(args);
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
    let mut results = Results::new(args);
    for which in [Which::Ten, Which::Installed] {
        let rows: Vec<&Row> = rows.iter().filter(|row| row.which == which).collect();
        if rows.is_empty() {
            continue;
        }
        let mut stage = Stage::up(project, which)?;
        for row in rows {
            results.row(row.name, &row.cases, |records| {
                let mut bench = Bench {
                    project,
                    stage: &mut stage,
                    plan: &plan,
                    records,
                };
                (row.run)(&mut bench, &row.cases)
            })?;
        }
    }
    Ok(results.conclude())
}
