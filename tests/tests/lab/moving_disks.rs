//! Pods that write to disks move with them: what was synced and said to be is there afterwards, and the file system is whole.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use migrator_tests::lab::{POD, TestLab, is_whole, writer_yaml};
use nix::sys::signal::Signal;
use xtask::cmd;
use xtask::lab::Node;
use xtask::process::ProcessId;

/// The volume that is written to.
pub(crate) const VOLUME: &str = "data";

fn with_pod() -> Result<TestLab> {
    let mut test = TestLab::up()?;
    test.succeeds(Node::A, &["volume", "create", VOLUME, "--size", "128Mi"])?;
    test.run_pod_of(&writer_yaml(VOLUME))?;
    test.said(Node::A, 3)?;
    Ok(test)
}

pub(crate) fn volume(test: &TestLab, node: Node) -> PathBuf {
    test.state(node).join(format!("volumes/{VOLUME}.img"))
}

/// What a power cut would leave: the journal is replayed on a copy, which is whole then, and has what was said.
pub(crate) fn is_whole_after_a_cut(image: &Path, least: u64) -> Result<()> {
    let dir = tempfile::tempdir()?;
    let copy = dir.path().join("copy");
    std::fs::copy(image, &copy).with_context(|| format!("cannot copy {}", image.display()))?;
    let mut replay = Command::new("e2fsck");
    // 1: the journal was replayed.
    let replayed = replay.arg("-p").arg(&copy).output()?;
    ensure!(
        matches!(replayed.status.code(), Some(0 | 1)),
        "{replayed:?}"
    );
    cmd::output(Command::new("e2fsck").args(["-f", "-n"]).arg(&copy))?;
    let file = cmd::output(
        Command::new("debugfs")
            .args(["-R", "cat /volume/log"])
            .arg(&copy),
    )?;
    is_whole(&file, least)
}

#[test]
fn disks_move_with_their_pod_there_and_back() -> Result<()> {
    let test = with_pod()?;
    let mut floor = 0;
    for from in [Node::A, Node::B] {
        floor = test.said(from, floor)?;
        let report = test.moves(from)?;
        let disk = report.disk.context("no disks in the report")?;
        println!("{disk:?}, downtime {} ms", report.downtime_ms);
        ensure!(
            disk.disks == 2 && disk.rounds >= 2 && disk.bytes_sent > 0,
            "{disk:?}"
        );
        ensure!(disk.bytes < disk.bytes_size, "{disk:?}");
        let to = from.other();
        floor = test.said(to, floor)?;
        test.file_is_whole(to, floor)?;
        ensure!(!volume(&test, from).exists(), "the volume is left behind");
        ensure!(
            volume(&test, to).exists(),
            "the volume is not among the volumes"
        );
    }
    test.end()
}

#[test]
fn killed_services_and_a_power_cut_leave_the_disk_at_its_owner() -> Result<()> {
    let mut test = with_pod()?;
    // Before the grant: the destination, and then the source.
    for killed in [Node::B, Node::A] {
        let id = test.begins(Node::A, &["--bandwidth", "2", "--compress", "none"])?;
        test.comes_to(Node::A, &id, "the first blocks", |status| {
            status.disk_bytes_sent > 0
        })?;
        test.lab().kill_node(killed)?;
        if killed == Node::B {
            test.fails(&id)?;
        }
        test.lab().start_node(killed)?;
        test.runs_on(Node::A)?;
        test.nothing_is_left_on(Node::B)?;
        ensure!(
            !volume(&test, Node::B).exists(),
            "a part of the volume is left on b"
        );
        let floor = test.said(Node::A, 0)?;
        test.said(Node::A, floor)?;
    }
    test.moves(Node::A)?;
    let floor = test.said(Node::B, 0)?;
    // The power of the owner fails.
    test.stop_probe()?;
    let shown = test.succeeds(Node::B, &["--output", "json", "inspect", POD])?;
    let shown: serde_json::Value = serde_json::from_str(&shown)?;
    let vmm = shown["vmm_pid"].as_i64().context("no vmm_pid")?;
    let vmm = ProcessId::of("the VMM", i32::try_from(vmm)?)?;
    test.lab().kill_node(Node::B)?;
    vmm.signal(Signal::SIGKILL)?;
    is_whole_after_a_cut(&volume(&test, Node::B), floor)?;
    test.lab().start_node(Node::B)?;
    test.end()
}
