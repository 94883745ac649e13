//! A guest that writes its memory faster than the link carries it: what becomes of it is the user's choice.

use anyhow::{Context, Result, ensure};
use migrator_tests::lab::{POD, TestLab};
use xtask::lab::Node;

/// Writes 24 MiB of memory over and over, with contents that change, until its file is removed.
const WRITES: &str = "touch /tmp/on; (while [ -e /tmp/on ]; do dd if=/dev/urandom of=/tmp/load bs=1M count=24 conv=notrunc \
                      2>/dev/null; done) >/dev/null 2>&1 &";
/// Less than it writes, and enough for a first pass in some seconds.
const BANDWIDTH: [&str; 4] = ["--bandwidth", "8", "--compress", "none"];

fn busy() -> Result<TestLab> {
    let test = TestLab::with_pod()?;
    test.succeeds(Node::A, &["exec", POD, "--", "/bin/sh", "-c", WRITES])?;
    Ok(test)
}

fn calm(test: &TestLab, node: Node) -> Result<()> {
    test.succeeds(node, &["exec", POD, "--", "/bin/rm", "/tmp/on"])
        .map(drop)
}

#[test]
fn by_default_a_guest_that_does_not_converge_moves_ahead_of_its_memory() -> Result<()> {
    let test = busy()?;
    let options = [&BANDWIDTH[..], &["--max-downtime", "50"]].concat();
    let report = test.moves_with(Node::A, &options)?;
    ensure!(report.mode == "postcopy", "{report:?}");
    ensure!(
        report.memory.history.len() > 1,
        "{:?}",
        report.memory.history
    );
    let faults = report
        .memory
        .faults
        .clone()
        .context("no figures of the waits")?;
    ensure!(faults.missing > 0, "{faults:?}");
    calm(&test, Node::B)?;
    test.exec_works(Node::B)?;
    test.end()
}

#[test]
fn a_stall_that_is_to_fail_fails_with_its_figures_and_the_guest_stays() -> Result<()> {
    let test = busy()?;
    let options = [
        "--mode",
        "precopy",
        "--on-stall",
        "fail",
        "--max-downtime",
        "50",
    ];
    let id = test.begins(Node::A, &[&BANDWIDTH[..], &options].concat())?;
    let (reason, report) = test.fails(&id)?;
    ensure!(
        reason.contains("writes memory as fast as it can be sent"),
        "{reason}"
    );
    ensure!(report.frozen_at_unix_us == 0, "it was frozen: {report:?}");
    test.runs_on(Node::A)?;
    test.nothing_is_left_on(Node::B)?;
    calm(&test, Node::A)?;
    test.end()
}

#[test]
fn a_guest_that_is_slowed_converges_and_runs_at_full_speed_afterwards() -> Result<()> {
    let test = busy()?;
    let options = [
        "--mode",
        "precopy",
        "--on-stall",
        "throttle",
        "--max-downtime",
        "400",
    ];
    let report = test.moves_with(Node::A, &[&BANDWIDTH[..], &options].concat())?;
    ensure!(report.mode == "precopy", "{report:?}");
    ensure!(
        report.memory.throttle_percent > 0,
        "it was not slowed: {report:?}"
    );
    calm(&test, Node::B)?;
    test.exec_works(Node::B)?;
    test.end()
}

#[test]
fn who_waits_for_a_guest_to_calm_down_moves_it_then() -> Result<()> {
    let test = busy()?;
    let options = [
        "--mode",
        "precopy",
        "--on-stall",
        "wait",
        "--max-downtime",
        "300",
    ];
    let id = test.begins(Node::A, &[&BANDWIDTH[..], &options].concat())?;
    test.comes_to(Node::A, &id, "a sixth round", |status| status.round >= 5)?;
    calm(&test, Node::A)?;
    let status = test.comes_to(Node::A, &id, "its end", |status| status.report.is_some())?;
    let report = status.report.context("no report")?;
    ensure!(report.mode == "precopy", "{report:?}");
    test.runs_on(Node::B)?;
    test.end()
}
