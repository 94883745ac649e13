//! Pods whose volumes are images of a real Ceph cluster. Run by `cargo xtask test ceph`, which installs it.

mod cluster;

use std::cell::OnceCell;
use std::process::Command;
use std::thread;

use anyhow::{Context, Result, ensure};
use cluster::{Cluster, POOL};
use migrator::api::template_types::TemplateList;
use migrator::api::types::{VolumeInfo, VolumeList};
use migrator_tests::lab::{POD, SOON, TestLab, is_whole, writer_yaml};
use xtask::cmd;
use xtask::lab::Node;
use xtask::process::poll_until;

const VOLUME: &str = "records";
/// Beside the nodes, on the lab's switch.
const ADDRESS: &str = "10.78.0.100";

/// The pod that writes; its own files are on Ceph, too.
fn yaml() -> String {
    writer_yaml(VOLUME).replace(
        "    migrator/vm-memory",
        "    migrator/storage-class: ceph\n    migrator/vm-memory",
    )
}

struct Test {
    lab: TestLab,
    cluster: Cluster,
}

impl Test {
    fn up() -> Result<Self> {
        // Both nodes' configurations name the one cluster.
        let started: OnceCell<Result<Cluster>> = OnceCell::new();
        let lab = TestLab::up_with(|test| match started.get_or_init(|| start(test)) {
            Ok(cluster) => format!("storage: {{ classes: {{ ceph: {} }} }}", cluster.class()),
            Err(_) => String::new(),
        })?;
        let cluster = started.into_inner().context("no cluster")??;
        Ok(Self { lab, cluster })
    }

    fn volume(&self, node: Node) -> Result<Option<VolumeInfo>> {
        let text = self
            .lab
            .succeeds(node, &["--output", "json", "volume", "ls"])?;
        let list: VolumeList = serde_json::from_str(&text)?;
        ensure!(list.problems.is_empty(), "{:?}", list.problems);
        Ok(list.volumes.into_iter().find(|v| v.name == VOLUME))
    }

    fn held_by(&self, node: Node) -> Result<Option<String>> {
        Ok(self.volume(node)?.context("the volume is not listed")?.node)
    }

    /// A template's disks are empty: the guest is told by QEMU how large an image of the cluster is.
    fn starts_from_a_template(&mut self) -> Result<()> {
        let lab = &mut self.lab;
        let file = lab.lab().dir().join("template.yaml");
        std::fs::write(&file, yaml())?;
        let file = file.to_str().context("a path that is not UTF-8")?;
        lab.succeeds(Node::A, &["template", "build", file])?;
        lab.run_pod_of(&yaml())?;
        lab.said(Node::A, 3)?;
        let list = lab.succeeds(Node::A, &["--output", "json", "template", "ls"])?;
        let made = serde_json::from_str::<TemplateList>(&list)?.templates;
        ensure!(made.len() == 1 && made[0].starts == 1, "{made:?}");
        lab.stop_probe()?;
        lab.succeeds(Node::A, &["stop", POD]).map(drop)
    }

    fn comes_to_be_held_by(&self, node: Node) -> Result<()> {
        let mut last = None;
        let comes = poll_until(SOON, || {
            last = self.held_by(Node::A).ok().flatten();
            last.as_deref() == Some(node.name())
        });
        ensure!(comes, "the volume is held by {last:?}");
        Ok(())
    }
}

fn start(test: &TestLab) -> Result<Cluster> {
    let switch = test.lab().netns("switch");
    let address = format!("{ADDRESS}/24");
    cmd::run(Command::new("ip").args(["-n", &switch, "addr", "add", &address, "dev", "sw0"]))?;
    Cluster::start(&test.lab().dir().join("ceph"), &switch, ADDRESS)
}

#[test]
fn volumes_on_ceph_stay_where_they_are_and_their_pod_moves() -> Result<()> {
    let mut test = Test::up()?;
    let create = |name: &'static str| {
        [
            "volume", "create", name, "--size", "128Mi", "--class", "ceph",
        ]
    };
    // Nothing is there before the pool is prepared.
    let said = test.lab.says(Node::A, &create(VOLUME))?;
    ensure!(said.err.contains("migrator volume init ceph"), "{said:?}");
    test.lab.succeeds(Node::A, &["volume", "init", "ceph"])?;
    test.lab.succeeds(Node::B, &create(VOLUME))?;
    test.lab.succeeds(Node::A, &create("other"))?;
    let said = test.lab.says(Node::A, &create(VOLUME))?;
    ensure!(said.code == Some(4), "made twice: {said:?}");
    test.lab.succeeds(Node::B, &["volume", "rm", "other"])?;
    let made = test.volume(Node::A)?.context("it is not listed")?;
    ensure!(
        made.class == "ceph" && made.size_bytes == 128 << 20,
        "{made:?}"
    );

    test.lab.run_pod_of(&yaml())?;
    test.lab.said(Node::A, 3)?;
    ensure!(test.held_by(Node::B)?.as_deref() == Some("a"));
    // The key is nowhere to be seen.
    let key = std::fs::read_to_string(test.lab.lab().dir().join("ceph/key"))?;
    let inspected = test
        .lab
        .succeeds(Node::A, &["--output", "json", "inspect", POD])?;
    let inspected: serde_json::Value = serde_json::from_str(&inspected)?;
    let vmm = inspected["vmm_pid"].as_i64().context("no vmm_pid")?;
    let command_line = std::fs::read(format!("/proc/{vmm}/cmdline"))?;
    let log = std::fs::read_to_string(test.lab.lab().log(Node::A))?;
    ensure!(!String::from_utf8_lossy(&command_line).contains(key.trim()));
    ensure!(!log.contains(key.trim()));

    // The destination is killed before the grant: the source goes on, and has it.
    let id = test
        .lab
        .begins(Node::A, &["--bandwidth", "2", "--compress", "none"])?;
    test.lab
        .comes_to(Node::A, &id, "the first pages", |status| {
            status.bytes_sent > 0
        })?;
    test.lab.lab().kill_node(Node::B)?;
    test.lab.fails(&id)?;
    test.lab.lab().start_node(Node::B)?;
    test.lab.runs_on(Node::A)?;
    let mut floor = test.lab.said(Node::A, 0)?;
    floor = test.lab.said(Node::A, floor)?;

    for from in [Node::A, Node::B] {
        let to = from.other();
        let report = test.lab.moves(from)?;
        println!("downtime {} ms", report.downtime_ms);
        ensure!(report.disk.is_none(), "blocks were sent: {:?}", report.disk);
        floor = test.lab.said(to, floor)?;
        test.comes_to_be_held_by(to)?;
        test.lab.file_is_whole(to, floor)?;
    }

    // The source's service is killed after the grant: its QEMU is shut out, and the guest writes on.
    let blocklisted = || {
        test.cluster
            .admin(&["osd", "blocklist", "ls", "--format", "json"])
    };
    let before = blocklisted()?;
    thread::scope(|scope| {
        let moving = scope.spawn(|| test.lab.says(Node::A, &["migrate", POD, "--to", "b"]));
        test.lab.runs_on(Node::B)?;
        test.lab.lab().kill_node(Node::A)?;
        // Its answer does not come any more.
        drop(moving.join());
        Ok::<_, anyhow::Error>(())
    })?;
    let shut_out = poll_until(SOON, || blocklisted().is_ok_and(|now| now != before));
    ensure!(shut_out, "nobody is blocklisted: {before}");
    floor = test.lab.said(Node::B, floor)?;
    test.lab.lab().start_node(Node::A)?;
    floor = test.lab.said(Node::B, floor)?;
    test.comes_to_be_held_by(Node::B)?;
    let said = test.lab.says(Node::A, &["volume", "rm", VOLUME])?;
    ensure!(said.code == Some(4), "{said:?}");

    // What is on the image is whole.
    test.lab.stop_probe()?;
    test.lab.succeeds(Node::B, &["stop", POD])?;
    ensure!(test.held_by(Node::A)?.is_none());
    let copy = test.lab.lab().dir().join("copy");
    let image = format!("{POOL}/{VOLUME}");
    let path = copy.to_str().context("a path that is not UTF-8")?;
    test.cluster
        .tool("rbd", &["export", "--no-progress", &image, path])?;
    cmd::output(Command::new("e2fsck").args(["-f", "-n"]).arg(&copy))?;
    let mut cat = Command::new("debugfs");
    let file = cmd::output(cat.args(["-R", "cat /volume/log"]).arg(&copy))?;
    is_whole(&file, floor)?;
    test.starts_from_a_template()?;
    let used = test.volume(Node::A)?.context("it is not listed")?;
    ensure!(
        (1..used.size_bytes).contains(&used.allocated_bytes),
        "{used:?}"
    );
    test.lab.succeeds(Node::A, &["volume", "rm", VOLUME])?;
    // The disk that ended with the pod is gone as well: templates alone are left.
    let left = test.cluster.tool("rbd", &["ls", POOL])?;
    ensure!(
        left.lines()
            .all(|image| image.starts_with("migrator.ext4.")),
        "{left}"
    );
    test.cluster.end()?;
    test.lab.end()
}
