//! Pods whose volumes are in a folder that both nodes see: nothing of them moves, and there is one writer at each moment.

use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use migrator::api::types::VolumeList;
use migrator_tests::lab::{POD, TestLab, writer_yaml};
use xtask::cmd;
use xtask::lab::Node;

const VOLUME: &str = "records";

/// The pod that writes; its own files are shared, too.
fn yaml() -> String {
    writer_yaml(VOLUME).replace(
        "    migrator/vm-memory",
        "    migrator/storage-class: shared\n    migrator/vm-memory",
    )
}

fn mount(test: &TestLab) -> PathBuf {
    test.lab().dir().join("shared")
}

fn with_pod() -> Result<TestLab> {
    let mut test = TestLab::up_with(|test| {
        let path = mount(test);
        format!(
            "storage: {{ classes: {{ shared: {{ driver: file, path: {} }} }} }}",
            path.display()
        )
    })?;
    // Not there yet, as a mount that failed: nothing is made in its place.
    let create = [
        "volume", "create", VOLUME, "--size", "128Mi", "--class", "shared",
    ];
    let said = test.says(Node::A, &create)?;
    ensure!(
        said.code != Some(0) && said.err.contains("mount the file system"),
        "{said:?}"
    );
    ensure!(!mount(&test).exists());
    std::fs::create_dir(mount(&test))?;
    test.succeeds(Node::A, &["volume", "init", "shared"])?;
    test.succeeds(Node::B, &create)?;
    test.run_pod_of(&yaml())?;
    test.said(Node::A, 3)?;
    Ok(test)
}

/// Who has the volume, as this node sees it.
fn held_by(test: &TestLab, node: Node) -> Result<Option<String>> {
    let list: VolumeList =
        serde_json::from_str(&test.succeeds(node, &["--output", "json", "volume", "ls"])?)?;
    let volume = list.volumes.into_iter().find(|v| v.name == VOLUME);
    Ok(volume.context("the volume is not listed")?.node)
}

#[test]
fn shared_disks_stay_where_they_are_and_their_pod_moves() -> Result<()> {
    let test = with_pod()?;
    ensure!(held_by(&test, Node::B)?.as_deref() == Some("a"));
    // The destination is killed before the grant: the source goes on, and has it.
    let id = test.begins(Node::A, &["--bandwidth", "2", "--compress", "none"])?;
    test.comes_to(Node::A, &id, "the first pages", |status| {
        status.bytes_sent > 0
    })?;
    test.lab().kill_node(Node::B)?;
    test.fails(&id)?;
    test.lab().start_node(Node::B)?;
    test.runs_on(Node::A)?;
    test.nothing_is_left_on(Node::B)?;
    let mut floor = test.said(Node::A, 0)?;
    floor = test.said(Node::A, floor)?;
    for from in [Node::A, Node::B] {
        let report = test.moves(from)?;
        println!("downtime {} ms", report.downtime_ms);
        ensure!(report.disk.is_none(), "blocks were sent: {:?}", report.disk);
        let to = from.other();
        floor = test.said(to, floor)?;
        test.file_is_whole(to, floor)?;
        ensure!(held_by(&test, from)?.as_deref() == Some(to.name()));
        // No other pod gets it meanwhile, on neither node.
        let said = test.says(from, &["volume", "rm", VOLUME])?;
        ensure!(said.code == Some(4), "{said:?}");
        let said = test.says(from, &["volume", "release", VOLUME, "--force"])?;
        ensure!(said.code == Some(4), "released under its pod: {said:?}");
    }
    // A service that is killed, and its successor, which takes the lock again.
    test.restart(Node::A, || Ok(()))?;
    floor = test.said(Node::A, floor)?;
    test.end_of(floor)
}

/// The end of the test, once the pod is stopped.
trait End {
    fn end_of(self, floor: u64) -> Result<()>;
}

impl End for TestLab {
    fn end_of(mut self, floor: u64) -> Result<()> {
        self.probe_is_perfect()?;
        self.file_is_whole(Node::A, floor)?;
        self.succeeds(Node::A, &["stop", POD])?;
        let image = mount(&self).join(format!("{VOLUME}.img"));
        cmd::output(Command::new("e2fsck").args(["-f", "-n"]).arg(&image))?;
        ensure!(held_by(&self, Node::B)?.is_none());
        self.succeeds(Node::B, &["volume", "rm", VOLUME])?;
        // The disk that ended with the pod is gone as well.
        let left: Vec<_> = std::fs::read_dir(mount(&self))?.flatten().collect();
        ensure!(left.len() == 1, "{left:?}");
        self.end()
    }
}
