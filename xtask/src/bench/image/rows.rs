//! The rows of the table: which cases each has, and what runs them.

mod guests;
mod handover;
mod reads;
mod start;
mod template;

use crate::bench::plain::{Bench, Row, row, wanted};
use crate::bench::plan::Plan;

/// The rows that have a wanted case, in the order in which they run.
pub(super) fn all(plan: &Plan) -> Vec<Row> {
    let rows = vec![
        row("start", start::cases(plan), start::run),
        row("handover", handover::cases(plan.quick), handover::run),
        row(
            "start from a template",
            template::cases(plan.quick),
            template::run,
        ),
        row("disks", reads::cases(plan.quick), reads::run),
        row("guests with disks", guests::cases(plan.quick), guests::run),
    ];
    wanted(rows, plan)
}
