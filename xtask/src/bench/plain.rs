//! What `bench network` and `bench image` have in common: rows that need no guests of their own kept between them.

use std::process::ExitCode;

use anyhow::{Result, bail};

use super::figures::Record;
use super::plan::{Args, Plan, Results};
use crate::project::Project;
use crate::setup;

/// What a row works with.
pub(super) struct Bench<'a> {
    pub(super) project: &'a Project,
    pub(super) plan: &'a Plan,
    pub(super) records: &'a mut Vec<Record>,
}

/// Runs the named cases of a row, and adds their records.
type Run = fn(&mut Bench<'_>, &[String]) -> Result<()>;

/// One row.
pub(super) struct Row {
    name: &'static str,
    /// Its cases, by name.
    pub(super) cases: Vec<String>,
    run: Run,
}

/// A row with all of its cases.
pub(super) fn row(name: &'static str, cases: Vec<String>, run: Run) -> Row {
    Row { name, cases, run }
}

/// Leaves the rows that have a wanted case, with those only.
pub(super) fn wanted(mut rows: Vec<Row>, plan: &Plan) -> Vec<Row> {
    for row in &mut rows {
        row.cases.retain(|case| plan.wants(case));
    }
    rows.retain(|row| !row.cases.is_empty());
    rows
}

/// A form: its rows, after what they need has been prepared.
///
/// # Errors
/// Nothing could be measured. A row that cannot be run is told of, and makes the exit code 1; a missed aim does not.
pub(super) fn form(
    project: &Project,
    args: &Args,
    name: &str,
    rows: fn(&Plan) -> Vec<Row>,
    prepare: impl FnOnce() -> Result<()>,
) -> Result<ExitCode> {
    let plan = Plan::new(args);
    let rows = rows(&plan);
    if rows.is_empty() {
        bail!("no case matches: `cargo xtask bench {name} --list` names them");
    }
    if args.list {
        for case in rows.iter().flat_map(|row| &row.cases) {
            println!("{case}");
        }
        return Ok(ExitCode::SUCCESS);
    }
    setup::require_root("to make network namespaces")?;
    prepare()?;
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
