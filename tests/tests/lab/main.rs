//! Two nodes, a pod under traffic, and what goes wrong: whatever happens before the grant, the guest runs on at the
//! source, no packet is lost, and nothing is left behind at the destination.
#![allow(missing_docs, unreachable_pub)]

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Result, ensure};
use migrator_tests::lab::{POD, TestLab};
use vm_runtime::vm::VmRecord;
use xtask::cmd;
use xtask::lab::Node;
use xtask::process::ProcessId;

/// After a migration that failed: the guest runs at the source as before, and the destination has nothing of it.
fn stayed(test: &TestLab) -> Result<()> {
    test.runs_on(Node::A)?;
    test.answers_on()?;
    test.exec_works(Node::A)?;
    test.nothing_is_left_on(Node::B)
}

#[test]
fn a_pod_moves_there_and_back_without_losing_a_packet() -> Result<()> {
    let test = TestLab::with_pod()?;
    let mut counted = 0;
    for from in [Node::A, Node::B] {
        let to = from.other();
        counted = test.log_goes_on(from, counted)?;
        let report = test.moves(from)?;
        test.nothing_is_left_on(from)?;
        counted = test.log_goes_on(to, counted)?;
        test.exec_works(to)?;
        clock_is_right(&test, to)?;
        let listed = test.succeeds(from, &["status"])?;
        ensure!(
            listed
                .lines()
                .any(|line| line.starts_with(&report.id) && line.contains("completed")),
            "status says {listed}"
        );
    }
    test.end()
}

fn clock_is_right(test: &TestLab, node: Node) -> Result<()> {
    let said = test.succeeds(node, &["exec", POD, "--", "/bin/date", "+%s"])?;
    let guest: u64 = said.trim().parse()?;
    let here = SystemTime::now().duration_since(UNIX_EPOCH)?.as_secs();
    ensure!(
        here.abs_diff(guest) <= 2,
        "the guest's clock says {guest}, the node's {here}"
    );
    Ok(())
}

#[test]
fn a_killed_destination_service_leaves_the_source_running() -> Result<()> {
    let test = TestLab::with_pod()?;
    let id = test.is_in_precopy()?;
    test.lab().kill_node(Node::B)?;
    let (reason, _) = test.fails(&id)?;
    eprintln!("reason: {reason}");
    test.answers_on()?;
    test.lab().start_node(Node::B)?;
    stayed(&test)?;
    test.moves(Node::A)?;
    test.log_goes_on(Node::B, 0)?;
    test.end()
}

#[test]
fn a_killed_destination_vmm_leaves_the_source_running() -> Result<()> {
    let test = TestLab::with_pod()?;
    let id = test.is_in_precopy()?;
    let record = VmRecord::load(&test.state(Node::B).join("pods").join(POD))?;
    let vmm = ProcessId {
        what: "the VMM of node b".to_owned(),
        pid: record.pid,
        start_time: record.start_time,
    };
    ensure!(vmm.alive(), "there is no VMM on node b");
    vmm.end(Duration::ZERO)?;
    let (reason, _) = test.fails(&id)?;
    eprintln!("reason: {reason}");
    ensure!(reason.contains("QEMU"), "the reason is `{reason}`");
    stayed(&test)?;
    test.end()
}

#[test]
fn a_cut_link_leaves_the_source_running() -> Result<()> {
    let test = TestLab::with_pod()?;
    let id = test.is_in_precopy()?;
    // The nodes' own network only: the client's packets take the same cable, and must not notice.
    let address = |verb: &str| {
        let (namespace, address) = (test.lab().netns("b"), format!("{}/24", Node::B.address()));
        let words = ["-n", &namespace, "addr", verb, &address, "dev", "br0"];
        cmd::output(&mut cmd::command("ip", words))
    };
    address("del")?;
    let (reason, _) = test.fails(&id)?;
    eprintln!("reason: {reason}");
    test.nothing_is_left_on(Node::B)?;
    address("add")?;
    stayed(&test)?;
    test.moves(Node::A)?;
    test.end()
}

#[test]
fn a_cancelled_migration_leaves_everything_as_it_was() -> Result<()> {
    let test = TestLab::with_pod()?;
    let before = test.succeeds(Node::A, &["--output", "json", "inspect", POD])?;
    let id = test.is_in_precopy()?;
    test.succeeds(Node::A, &["cancel", &id])?;
    let (reason, _) = test.fails(&id)?;
    ensure!(reason.contains("cancel"), "the reason is `{reason}`");
    stayed(&test)?;
    let after = test.succeeds(Node::A, &["--output", "json", "inspect", POD])?;
    ensure!(before == after, "before: {before}after: {after}");
    test.end()
}

#[test]
fn a_killed_source_service_leaves_the_guest_running_and_finds_it_again() -> Result<()> {
    let test = TestLab::with_pod()?;
    let id = test.is_in_precopy()?;
    test.lab().kill_node(Node::A)?;
    test.answers_on()?;
    test.nothing_is_left_on(Node::B)?;
    test.answers_on()?;
    test.lab().start_node(Node::A)?;
    let (reason, _) = test.fails(&id)?;
    eprintln!("reason: {reason}");
    stayed(&test)?;
    let counted = test.log_goes_on(Node::A, 0)?;
    test.moves(Node::A)?;
    test.log_goes_on(Node::B, counted)?;
    test.end()
}
