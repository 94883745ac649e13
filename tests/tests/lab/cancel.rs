//! A cancel in every phase: the guest goes on where it runs, and whoever cancels is told what came of it.

use anyhow::{Result, ensure};
use migrator::migration::status::{MigrationStatus, Phase};
use migrator_tests::lab::{POD, SOON, TestLab};
use xtask::lab::Node;
use xtask::process::poll_until;

/// Cancels a migration away from a that is in `phase`; exit code and all that was said.
fn cancelled(
    test: &TestLab,
    options: &[&str],
    phase: Phase,
) -> Result<(Option<i32>, String, Phase)> {
    let id = test.begins(Node::A, options)?;
    let reached = |status: &MigrationStatus| status.phase == phase;
    let status = test.comes_to(Node::A, &id, &format!("{phase:?}"), reached)?;
    let said = test.says(Node::A, &["cancel", &id])?;
    Ok((said.code, said.out + &said.err, status.phase))
}

/// As before the migration, down to the tracking of its memory.
fn stays(test: &TestLab) -> Result<()> {
    test.runs_on(Node::A)?;
    test.answers_on()?;
    test.exec_works(Node::A)?;
    test.nothing_is_left_on(Node::B)?;
    ensure!(!tracked(test)?, "its memory is still tracked");
    Ok(())
}

/// Whether the VMM's memory is registered with a userfaultfd: `um` or `uw` in its `VmFlags`, proc_pid_smaps(5).
fn tracked(test: &TestLab) -> Result<bool> {
    let record = vm_runtime::vm::VmRecord::load(&test.state(Node::A).join("pods").join(POD))?;
    let maps = std::fs::read_to_string(format!("/proc/{}/smaps", record.pid))?;
    ensure!(maps.contains("VmFlags"), "no flags of its mappings");
    let flags = maps
        .lines()
        .filter_map(|line| line.strip_prefix("VmFlags:"));
    Ok(flags
        .flat_map(str::split_whitespace)
        .any(|flag| ["um", "uw", "ui"].contains(&flag)))
}

#[test]
fn a_cancel_before_the_grant_leaves_the_source_as_it_was_and_says_so() -> Result<()> {
    let test = TestLab::with_pod()?;
    ensure!(!tracked(&test)?, "tracked before any migration");
    let slow = ["--bandwidth", "2", "--compress", "none"];
    for (phase, options) in [(Phase::Handshake, &slow[..]), (Phase::Precopy, &slow[..])] {
        let (code, said, _) = cancelled(&test, options, phase)?;
        ensure!(code == Some(0), "{phase:?}: {code:?}: {said}");
        ensure!(said.contains("demo stays on a: cancelled in"), "{said}");
        ensure!(
            said.contains("its guest was not stopped, and b keeps nothing of it"),
            "{said}"
        );
        stays(&test)?;
    }
    test.moves(Node::A)?;
    test.end()
}

#[test]
fn a_cancel_in_the_switchover_ends_on_one_side_or_the_other() -> Result<()> {
    let mut test = TestLab::with_pod()?;
    // Each page is compared in the freeze, which makes it longer.
    for options in [&["--verify"][..], &["--verify", "--mode", "postcopy"]] {
        let (code, said, _) = cancelled(&test, options, Phase::Switchover)?;
        match code {
            Some(0) => {
                ensure!(said.contains("demo stays on a"), "{said}");
                stays(&test)?;
            }
            Some(4) => {
                test.runs_on(Node::B)?;
                test.nothing_is_left_on(Node::A)?;
                test.moves(Node::B)?;
            }
            _ => anyhow::bail!("{code:?}: {said}"),
        }
        test.probe_is_perfect()?;
        test.start_probe()?;
    }
    test.end()
}

#[test]
fn a_cancel_while_pages_cross_is_refused_with_what_is_still_to_come() -> Result<()> {
    let test = TestLab::with_pod()?;
    let options = [
        "--mode",
        "postcopy",
        "--bandwidth",
        "20",
        "--compress",
        "none",
    ];
    let (code, said, _) = cancelled(&test, &options, Phase::Postcopy)?;
    ensure!(code == Some(4), "{code:?}: {said}");
    ensure!(said.contains("the guest runs at b already"), "{said}");
    ensure!(
        said.contains("pages of its memory are still to come"),
        "{said}"
    );
    // Neither is it moved on before it has everything. It shows there a moment after its resume.
    let shows = poll_until(SOON, || matches!(test.pod_state(Node::B), Ok(Some(_))));
    ensure!(shows, "the pod does not show on b");
    let again = test.says(Node::B, &["migrate", POD, "--to", "a"])?;
    ensure!(again.code == Some(4), "{again:?}");
    test.runs_on(Node::B)?;
    test.nothing_is_left_on(Node::A)?;
    test.moves(Node::B)?;
    test.end()
}
