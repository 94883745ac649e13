//! Memory that crosses after the guest's resume.

use anyhow::{Context, Result, ensure};
use migrator_tests::lab::TestLab;
use xtask::lab::Node;

#[test]
fn a_guest_that_moves_before_its_memory_loses_nothing() -> Result<()> {
    let mut test = TestLab::with_pod()?;
    for mode in ["postcopy", "hybrid"] {
        for from in Node::ALL {
            let report = test.moves_with(from, &["--mode", mode, "--max-downtime", "1"])?;
            ensure!(report.mode == "postcopy", "{report:?}");
            let faults = report
                .memory
                .faults
                .clone()
                .context("no figures of the waits")?;
            ensure!(faults.missing > 0 && faults.mismatched == 0, "{faults:?}");
            println!("{mode}: downtime {:.1} ms, {faults:?}", report.downtime_ms);
            test.probe_is_perfect()?;
            test.exec_works(from.other())?;
            test.nothing_is_left_on(from)?;
            test.start_probe()?;
        }
    }
    test.end()
}
