//! The rows of the table: which cases each has, and what runs them.

mod latency;
mod paths;

use crate::bench::plain::{Bench, Row, row, wanted};
use crate::bench::plan::Plan;

/// The rows that have a wanted case, in the order in which they run.
pub(super) fn all(plan: &Plan) -> Vec<Row> {
    let rows = vec![
        row("idle gate", paths::gate_idle(plan.quick), paths::run),
        row(
            "park and inject",
            paths::park_inject(plan.quick),
            paths::run,
        ),
        row("flip", paths::flip(), paths::run),
        row("xdp uplink", paths::xdp_uplink(), paths::run),
        row("forward", paths::forward(plan.quick), paths::run),
        row("latency", latency::cases(plan.quick), latency::run),
    ];
    wanted(rows, plan)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(quick: bool, filter: Option<&str>) -> Vec<String> {
        let plan = Plan {
            quick,
            filter: filter.map(str::to_owned),
            runs: 5,
        };
        all(&plan).into_iter().flat_map(|row| row.cases).collect()
    }

    #[test]
    fn a_quick_run_has_one_case_of_each_row() {
        let quick = names(true, None);
        assert_eq!(
            quick,
            [
                "gate-idle-64",
                "park-inject-64",
                "flip",
                "xdp-uplink",
                "forward-vxlan",
                "latency-switchover"
            ]
        );
        let whole = names(false, None);
        assert!(quick.iter().all(|case| whole.contains(case)));
        assert!(whole.len() > quick.len());
    }

    #[test]
    fn cases_can_be_filtered() {
        assert_eq!(names(false, Some("park")).len(), 5);
        assert_eq!(names(false, Some("idle-1400")), ["gate-idle-1400"]);
        assert_eq!(names(false, Some("switch")).len(), 3);
    }
}
