//! `cargo xtask bench image`: how soon a pod runs where its image is not, what its disks cost while they are used, and what moving them costs.
//!
//! Records, options and table are those of `bench memory`. docs/benchmarks.md says how each figure is taken.

mod rows;

use std::process::ExitCode;

use anyhow::{Result, bail};

use self::rows::Bench;
use super::plan::{Args, Plan, Results};
use crate::project::Project;
use crate::setup;

/// The form.
///
/// # Errors
/// Nothing could be measured. A row that cannot be run is told of, and makes the exit code 1; a missed aim does not.
pub(super) fn main(project: &Project, args: &Args) -> Result<ExitCode> {
    let plan = Plan::new(args);
    let rows = rows::all(&plan);
    if rows.is_empty() {
        bail!("no case matches: `cargo xtask bench image --list` names them");
    }
    if args.list {
        for case in rows.iter().flat_map(|row| &row.cases) {
            println!("{case}");
        }
        return Ok(ExitCode::SUCCESS);
    }
    setup::require_root("to make network namespaces")?;
    let peers = setup::Args {
        bench: true,
        ..setup::Args::default()
    };
    setup::ensure(project, &peers)?;
    let mut results = Results::new(args);
    for row in &rows {
        results.row(row.name, &row.cases, |records| {
            let mut bench = Bench {
                project,
                plan: &plan,
                records,
            };
            (row.run)(&mut bench, &row.cases)
        })?;
    }
    Ok(results.conclude())
}
