//! Pods whose volumes are in a folder that both nodes see: nothing of them moves, and there is one writer at each moment.

use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use migrator::api::types::VolumeList;
use migrator_tests::lab::{POD, POD_IPV4, POD_IPV6, SOON, TestLab, pod_yaml};
use xtask::cmd;
use xtask::demo_image;
use xtask::lab::Node;
use xtask::process::poll_until;

const VOLUME: &str = "records";

/// The usual pod, and a container that says each number once it is in a file, synced; its own files are shared, too.
fn yaml() -> String {
    let writer = format!(
        "    - name: writer
      image: {image}
      command: [/bin/sh, -c]
      args: ['i=0; while :; do i=$((i+1)); echo $i >> /data/log; dd if=/dev/urandom of=/data/blob bs=64k count=1 seek=$((i % 200)) conv=notrunc 2>/dev/null; sync; echo $i > /own; echo $i; done']
      resources:
        limits:
          ephemeral-storage: 64Mi
      volumeMounts:
        - name: data
          mountPath: /data
  volumes:
    - name: data
      persistentVolumeClaim:
        claimName: {VOLUME}
",
        image = demo_image::REFERENCE
    );
    let yaml = pod_yaml(POD, POD_IPV4, POD_IPV6) + &writer;
    yaml.replace(
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
    said_more(&test, Node::A, 3)?;
    Ok(test)
}

/// Waits until the writer has said more than `floor`; the last number.
fn said_more(test: &TestLab, node: Node, floor: u64) -> Result<u64> {
    let mut last = 0;
    poll_until(SOON, || {
        let log = test.succeeds(node, &["logs", POD, "writer"]);
        let log = log.unwrap_or_default();
        last = log.lines().last().and_then(|n| n.parse().ok()).unwrap_or(0);
        last > floor
    });
    ensure!(last > floor, "the writer is at {last}");
    Ok(last)
}

/// Who has the volume, as this node sees it.
fn held_by(test: &TestLab, node: Node) -> Result<Option<String>> {
    let list: VolumeList =
        serde_json::from_str(&test.succeeds(node, &["--output", "json", "volume", "ls"])?)?;
    let volume = list.volumes.into_iter().find(|v| v.name == VOLUME);
    Ok(volume.context("the volume is not listed")?.node)
}

fn is_whole(test: &TestLab, node: Node, least: u64) -> Result<()> {
    let file = test.succeeds(
        node,
        &["exec", POD, "-c", "writer", "--", "/bin/cat", "/data/log"],
    )?;
    let mut last = 0;
    // The last line may be under way.
    for line in file.split_inclusive('\n').filter(|l| l.ends_with('\n')) {
        ensure!(
            line.trim() == (last + 1).to_string(),
            "{line:?} after {last}"
        );
        last += 1;
    }
    ensure!(last >= least, "the file ends with {last}, {least} was said");
    Ok(())
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
    let mut floor = said_more(&test, Node::A, 0)?;
    floor = said_more(&test, Node::A, floor)?;
    for from in [Node::A, Node::B] {
        let report = test.moves(from)?;
        println!("downtime {} ms", report.downtime_ms);
        ensure!(report.disk.is_none(), "blocks were sent: {:?}", report.disk);
        let to = from.other();
        floor = said_more(&test, to, floor)?;
        is_whole(&test, to, floor)?;
        ensure!(held_by(&test, from)?.as_deref() == Some(to.name()));
        // No other pod gets it meanwhile, on neither node.
        let said = test.says(from, &["volume", "rm", VOLUME])?;
        ensure!(said.code == Some(4), "{said:?}");
        let said = test.says(from, &["volume", "release", VOLUME, "--force"])?;
        ensure!(said.code == Some(4), "released under its pod: {said:?}");
    }
    // A service that is killed, and its successor, which takes the lock again.
    test.restart(Node::A, || Ok(()))?;
    floor = said_more(&test, Node::A, floor)?;
    test.end_of(floor)
}

/// The end of the test, once the pod is stopped.
trait End {
    fn end_of(self, floor: u64) -> Result<()>;
}

impl End for TestLab {
    fn end_of(mut self, floor: u64) -> Result<()> {
        self.probe_is_perfect()?;
        is_whole(&self, Node::A, floor)?;
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
