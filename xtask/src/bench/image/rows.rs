//! The rows of the table: which cases each has, and what runs them.

mod handover;
mod reads;
mod start;
mod template;

use anyhow::Result;

use crate::bench::figures::Record;
use crate::bench::plan::Plan;
use crate::project::Project;

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
    pub(super) name: &'static str,
    /// Its cases that are wanted, by name.
    pub(super) cases: Vec<String>,
    pub(super) run: Run,
}

/// The rows that have a wanted case, in the order in which they run.
pub(super) fn all(plan: &Plan) -> Vec<Row> {
    let mut rows: Vec<Row> = vec![
        row("start", start::cases(plan), start::run),
        row("handover", handover::cases(plan.quick), handover::run),
        row(
            "start from a template",
            template::cases(plan.quick),
            template::run,
        ),
        row("disks", reads::cases(plan.quick), reads::run),
    ];
    for row in &mut rows {
        row.cases.retain(|case| plan.wants(case));
    }
    rows.retain(|row| !row.cases.is_empty());
    rows
}

fn row(name: &'static str, cases: Vec<String>, run: Run) -> Row {
    Row { name, cases, run }
}
