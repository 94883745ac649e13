//! Two nodes, a pod under traffic, and what goes wrong: whatever happens before the grant, the guest runs on at the
//! source, no packet is lost, and nothing is left behind at the destination.
#![allow(missing_docs, unreachable_pub)]

mod any_moment;
mod cancel;
mod certificate;
mod connection;
mod conntrack;
mod cut_disks;
mod disks;
mod exec;
mod fast;
mod images;
mod injected;
mod large_image;
mod large_pages;
mod limits;
mod moving_disks;
mod net;
mod onward;
mod policies;
mod postcopy;
mod registry;
mod restarts;
mod routed;
mod shared_disks;
mod soak;
mod start;
mod templates;
mod tunnel;
mod upgrade;

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, ensure};
use migrator_tests::lab::{POD, POD_IPV6, SOON, TestLab, pod_yaml};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use vm_runtime::vm::VmRecord;
use xtask::cmd;
use xtask::lab::Node;
use xtask::process::{ProcessId, poll_until};

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
    ensure!(reason.contains("link to b"), "the reason is `{reason}`");
    test.answers_on()?;
    let images = test.state(Node::B).join("images");
    ensure!(
        std::fs::read(images.join("names.json")).is_ok_and(|names| names != b"{}"),
        "no image was on its way"
    );
    test.lab().start_node(Node::B)?;
    stayed(&test)?;
    let left = test.succeeds(Node::B, &["image", "ls"])?;
    ensure!(left.lines().count() <= 1, "an image is left: {left}");
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
    ensure!(reason.contains("link to b"), "the reason is `{reason}`");
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
    ensure!(reason.contains("restarted"), "the reason is `{reason}`");
    stayed(&test)?;
    let counted = test.log_goes_on(Node::A, 0)?;
    test.moves(Node::A)?;
    test.log_goes_on(Node::B, counted)?;
    test.end()
}

#[test]
fn a_full_disk_at_the_destination_refuses_and_leaves_the_source_running() -> Result<()> {
    let test = TestLab::with_pod()?;
    let images = test.state(Node::B).join("images");
    test.restart(Node::B, || {
        let (fs, size) = (Some("tmpfs"), Some("size=1m"));
        mount(fs, &images, fs, MsFlags::empty(), size).context("cannot mount a small disk")
    })?;
    let (reason, report) = test.fails(&test.begins(Node::A, &[])?)?;
    ensure!(
        reason.contains("b: ") && reason.contains("the disk of") && reason.contains("images"),
        "the reason is `{reason}`"
    );
    ensure!(report.memory.bytes_sent == 0, "{report:?}");
    stayed(&test)?;
    test.restart(Node::B, || {
        // A killed process is dead before its last thread has let go of its files.
        let gone = poll_until(SOON, || umount2(&images, MntFlags::empty()).is_ok());
        ensure!(gone, "the small disk stays in use");
        Ok(())
    })?;
    test.moves(Node::A)?;
    test.end()
}

#[test]
fn a_bad_certificate_is_refused_with_what_to_do() -> Result<()> {
    let test = TestLab::with_pod()?;
    let dir = test.lab().node_dir(Node::B);
    let good = certificate::read(&dir)?;
    let bad = certificate::of_another_authority("b.migrator")?;
    test.restart(Node::B, || certificate::write(&dir, &bad))?;
    let said = test.says(Node::A, &["migrate", POD, "--to", "b", "--watch"])?;
    ensure!(said.code == Some(1), "{said:?}");
    for word in ["certificate", "ca"] {
        ensure!(said.err.contains(word), "`{word}` is missing: {}", said.err);
    }
    for phase in ["image", "precopy", "switchover"] {
        let shown = said
            .err
            .lines()
            .any(|line| line.starts_with(&format!("{POD} a -> b: {phase}")));
        ensure!(!shown, "it came to {phase}: {}", said.err);
    }
    stayed(&test)?;
    test.restart(Node::B, || certificate::write(&dir, &good))?;
    test.moves(Node::A)?;
    test.end()
}

#[test]
fn a_refused_offer_says_why() -> Result<()> {
    let test = TestLab::with_pod()?;
    test.import_demo(Node::B)?;
    // Only the address that the probe does not use: both pods are on one network.
    test.run(Node::B, &pod_yaml("other", "10.77.0.11", POD_IPV6), &[])?;
    refused(&test, &[POD_IPV6, "other"])?;
    test.succeeds(Node::B, &["stop", "other", "--grace", "0"])?;
    test.run(
        Node::B,
        &pod_yaml(POD, "10.77.0.11", "fd77::11"),
        &["--no-wait"],
    )?;
    refused(&test, &["b", POD])?;
    test.succeeds(Node::B, &["stop", POD, "--grace", "0"])?;
    stayed(&test)?;
    test.end()
}

/// The destination refuses the pod, with these words.
fn refused(test: &TestLab, words: &[&str]) -> Result<()> {
    let said = test.says(Node::A, &["migrate", POD, "--to", "b"])?;
    ensure!(said.code == Some(4), "{said:?}");
    for word in words {
        ensure!(said.err.contains(word), "`{word}` is missing: {}", said.err);
    }
    test.runs_on(Node::A)?;
    test.answers_on()
}

#[test]
fn a_pod_moves_under_qemu_10() -> Result<()> {
    let root = std::env::var("MIGRATOR_QEMU10_DIR").context(
        "MIGRATOR_QEMU10_DIR is not set: `cargo xtask test` sets it to the folder where it unpacks QEMU 10",
    )?;
    let usr = format!("{root}/usr");
    let mut test = TestLab::up_with_qemu(&format!(
        "  binary: {usr}/bin/qemu-system-x86_64\n  lib_dir: {usr}/lib/x86_64-linux-gnu\n  \
         data_dirs: [{usr}/share/qemu, {usr}/share/seabios]\n"
    ))?;
    let node: serde_json::Value = test.get(Node::B, "/v1/node")?;
    let version = node["qemu"]["version"].as_str().unwrap_or_default();
    ensure!(version.starts_with("10."), "QEMU is {version}");
    test.run_pod()?;
    test.moves(Node::A)?;
    test.moves(Node::B)?;
    test.log_goes_on(Node::A, 0)?;
    test.exec_works(Node::A)?;
    test.end()
}
