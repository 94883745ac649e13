//! The rows of the table: which cases each has, and what runs them.

mod copy;
mod faults;
mod moves;
mod replace;
mod silence;
mod slowdown;

use anyhow::Result;

use crate::bench::figures::Record;
use crate::bench::plan::Plan;
use crate::bench::stage::{Stage, Which};
use crate::project::Project;

/// What a row works with.
pub(super) struct Bench<'a> {
    pub(super) project: &'a Project,
    pub(super) stage: &'a mut Stage,
    pub(super) plan: &'a Plan,
    pub(super) records: &'a mut Vec<Record>,
}

/// Runs the named cases of a row, and adds their records.
type Run = fn(&mut Bench<'_>, &[String]) -> Result<()>;

/// One row on one QEMU.
pub(super) struct Row {
    pub(super) name: &'static str,
    pub(super) which: Which,
    /// Its cases that are wanted, by name.
    pub(super) cases: Vec<String>,
    pub(super) run: Run,
}

/// The rows that have a wanted case, in the order in which they run: sizes that follow each other share their guests.
pub(super) fn all(plan: &Plan) -> Vec<Row> {
    let ten = Which::Ten;
    let mut rows = vec![
        row("copy rate", ten, copy::cases(plan.quick), copy::run),
        row("silence", ten, silence::cases(plan.quick), silence::run),
        row("slowdown", ten, slowdown::cases(plan.quick), slowdown::run),
        row("faults", ten, faults::cases(plan.quick), faults::run),
        row("moves", ten, moves::cases(ten, plan.quick), moves::run),
        row(
            "VMM replacement",
            ten,
            replace::cases(plan.quick),
            replace::run,
        ),
    ];
    if !plan.quick {
        let installed = Which::Installed;
        let cases = moves::cases(installed, false);
        rows.push(row("moves", installed, cases, moves::run));
    }
    for row in &mut rows {
        row.cases.retain(|case| plan.wants(case));
    }
    rows.retain(|row| !row.cases.is_empty());
    rows
}

fn row(name: &'static str, which: Which, cases: Vec<String>, run: Run) -> Row {
    Row {
        name,
        which,
        cases,
        run,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plan(quick: bool, filter: Option<&str>) -> Plan {
        Plan {
            quick,
            filter: filter.map(str::to_owned),
            runs: 5,
        }
    }

    fn names(plan: &Plan) -> Vec<String> {
        all(plan).into_iter().flat_map(|row| row.cases).collect()
    }

    #[test]
    fn a_quick_run_has_every_row_and_only_cases_of_the_whole() {
        let (quick, whole) = (plan(true, None), plan(false, None));
        let rows = |plan: &Plan| -> std::collections::BTreeSet<&'static str> {
            all(plan).iter().map(|row| row.name).collect()
        };
        assert_eq!(rows(&quick), rows(&whole));
        let all = names(&whole);
        for case in names(&quick) {
            assert!(all.contains(&case), "{case}");
        }
    }

    #[test]
    fn names_of_cases_are_unique_and_can_be_filtered() {
        let all = names(&plan(false, None));
        let unique: std::collections::BTreeSet<&String> = all.iter().collect();
        assert_eq!(unique.len(), all.len());
        let some = names(&plan(false, Some("move-2048-100-qemu10")));
        assert_eq!(some.len(), 4, "{some:?}");
        assert_eq!(names(&plan(false, Some("no such case"))), [""; 0]);
        let copies = names(&plan(false, Some("copy")));
        assert!(
            copies.iter().all(|case| case.starts_with("copy-")),
            "{copies:?}"
        );
    }
}
