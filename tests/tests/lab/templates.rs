//! Pods that start from a template: each with an identity of its own, and like any other pod afterwards.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::net::SocketAddr;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::Stdio;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, ensure};
use migrator::api::template_types::{TemplateInfo, TemplateList};
use migrator_tests::lab::{POD, POD_IPV4, POD_IPV6, SOON, TestLab, pod_yaml};
use vm_runtime::vm::VmRecord;
use xtask::demo_image;
use xtask::lab::Node;
use xtask::probe;
use xtask::process::{ProcessId, poll_until};

/// Another pod of the same shape.
const TWIN: &str = "twin";
const TWIN_IPV4: &str = "10.77.0.11";
const TWIN_IPV6: &str = "fd77::11";

/// What a pod writes to its own disk: more than a template's disk has.
const WRITTEN: u64 = 4 << 20;

/// Tells who it is, its first random bytes before anything else.
const WHO: &str = "echo random $(head -c 64 /dev/urandom | md5sum); \
    echo boot $(cat /proc/sys/kernel/random/boot_id); \
    echo time $(date +%s); \
    echo uuid $(cat /sys/class/dmi/id/product_uuid); \
    echo host $(hostname); \
    echo mac $(cat /sys/class/net/eth0/address); \
    echo tables $(ls /sys/firmware | wc -l); \
    echo cpus $(nproc); \
    echo sectors $(cat /sys/block/vda/size) $(cat /sys/block/vdb/size); \
    echo tty $(tty); \
    echo scratch $(grep -c \" /scratch tmpfs \" /proc/mounts); \
    echo link $(grep -o \"^fe80[0-9a-f]*\" /proc/net/if_inet6); \
    dd if=/dev/zero of=/written bs=64k count=64 2>/dev/null && sync; \
    echo written $(wc -c < /written); \
    echo done -; while :; do sleep 60; done";

/// The container that tells is the first: it has the process that waits for it in the template. One pod's has a terminal.
fn yaml(name: &str, ipv4: &str, ipv6: &str) -> String {
    let who = format!(
        "    - name: who
      image: {}
      tty: {}
      command: [/bin/sh, -c, '{WHO}']
      resources:
        limits:
          cpu: 2
          ephemeral-storage: 32Mi
      volumeMounts:
        - name: scratch
          mountPath: /scratch
    - name: echo",
        demo_image::REFERENCE,
        name == TWIN
    );
    let pod = pod_yaml(name, ipv4, ipv6).replacen("    - name: echo", &who, 1);
    pod + "  volumes:\n    - name: scratch\n      emptyDir: { medium: Memory }\n"
}

fn build(test: &TestLab) -> Result<TemplateInfo> {
    let file = test.lab().dir().join("template.yaml");
    fs::write(&file, yaml(POD, POD_IPV4, POD_IPV6))?;
    let file = file.to_str().context("a path that is not UTF-8")?;
    let words = ["--output", "json", "template", "build", file];
    Ok(serde_json::from_str(&test.succeeds(Node::A, &words)?)?)
}

fn list(test: &TestLab) -> Result<Vec<TemplateInfo>> {
    let text = test.succeeds(Node::A, &["--output", "json", "template", "ls"])?;
    Ok(serde_json::from_str::<TemplateList>(&text)?.templates)
}

fn unix(time: SystemTime) -> Result<Duration> {
    Ok(time.duration_since(UNIX_EPOCH)?)
}

/// Runs a pod, and what it tells of itself; its clock must be right when it starts.
fn run(test: &TestLab, name: &str, ipv4: &str, ipv6: &str) -> Result<BTreeMap<String, String>> {
    let before = unix(SystemTime::now())?.as_secs();
    test.run(Node::A, &yaml(name, ipv4, ipv6), &[])?;
    let mut log = String::new();
    let told = poll_until(SOON, || {
        log = test
            .succeeds(Node::A, &["logs", name, "who"])
            .unwrap_or_default();
        log.contains("done -")
    });
    let after = unix(SystemTime::now())?.as_secs();
    ensure!(told, "{name} does not say who it is: {log:?}");
    let lines = log.lines().filter_map(|line| line.split_once(' '));
    let facts: BTreeMap<String, String> = lines
        .map(|(what, value)| (what.to_owned(), value.to_owned()))
        .collect();
    let time: u64 = facts["time"].parse()?;
    ensure!(
        (before - 1..=after + 1).contains(&time),
        "the clock of {name} says {time}, between {before} and {after}"
    );
    ensure!(facts["host"] == name, "{facts:?}");
    let echo: SocketAddr = format!("{ipv4}:7000").parse()?;
    ensure!(
        probe::answers(&test.lab().client(), echo, SOON)?,
        "{name} does not answer at {echo}"
    );
    let record = VmRecord::load(&test.state(Node::A).join("pods").join(name))?;
    ensure!(facts["uuid"] == record.spec.uuid, "{facts:?}");
    ensure!(facts["mac"] == record.spec.mac.to_string(), "{facts:?}");
    ensure!(facts["scratch"] == "1", "{facts:?}");
    ensure!(
        (facts["tty"] == "/dev/pts/0") == (name == TWIN),
        "{facts:?}"
    );
    ensure!(facts["link"] == link_local(record.spec.mac.0), "{facts:?}");
    // Both virtual CPUs, and disks that are as large as its own.
    ensure!(facts["cpus"] == "2", "{facts:?}");
    let sectors: Vec<u64> = facts["sectors"]
        .split(' ')
        .map(str::parse)
        .collect::<Result<_, _>>()?;
    let own = record.spec.writable[0].size.0 / 512;
    ensure!(
        sectors.len() == 2 && sectors.contains(&own) && !sectors.contains(&0),
        "{facts:?}, not {own} sectors"
    );
    ensure!(facts["written"] == WRITTEN.to_string(), "{facts:?}");
    Ok(facts)
}

/// The link-local address that the kernel makes from a MAC address (RFC 4291, appendix A), as /proc shows it.
fn link_local([a, b, c, d, e, f]: [u8; 6]) -> String {
    format!(
        "fe80000000000000{:02x}{b:02x}{c:02x}fffe{d:02x}{e:02x}{f:02x}",
        a ^ 2
    )
}

#[test]
fn pods_of_one_template_share_no_identity_and_move_like_any_other() -> Result<()> {
    let mut test = TestLab::up()?;
    test.import_demo(Node::A)?;
    let made = build(&test)?;
    ensure!(
        made.disks == 2 && made.vcpus == 2 && made.pages > 0,
        "{made:?}"
    );
    // A clock that went on from where it was saved is wrong by now.
    let aged = Duration::from_millis(made.made_unix_ms) + Duration::from_secs(3);
    ensure!(
        poll_until(SOON, || unix(SystemTime::now()).is_ok_and(|now| now > aged)),
        "the node's clock stands still"
    );
    let pod = run(&test, POD, POD_IPV4, POD_IPV6)?;
    let twin = run(&test, TWIN, TWIN_IPV4, TWIN_IPV6)?;
    let listed = list(&test)?;
    ensure!(
        listed.len() == 1 && listed[0].key == made.key && listed[0].starts == 2,
        "they did not start from it: {listed:?}"
    );
    for fact in ["random", "boot", "uuid", "host", "mac"] {
        ensure!(
            !pod[fact].is_empty() && pod[fact] != twin[fact],
            "{fact}: {pod:?} and {twin:?}"
        );
    }
    ensure!(pod["tables"] == "0", "{pod:?}");

    test.start_probe()?;
    let mut counted = 0;
    for from in [Node::A, Node::B] {
        counted = test.log_goes_on(from, counted)?;
        test.moves(from)?;
        counted = test.log_goes_on(from.other(), counted)?;
    }
    let uuid = test.succeeds(
        Node::A,
        &[
            "exec",
            POD,
            "--",
            "/bin/cat",
            "/sys/class/dmi/id/product_uuid",
        ],
    )?;
    ensure!(uuid.trim() == pod["uuid"], "{uuid}");
    test.probe_is_perfect()?;
    let written = test.succeeds(
        Node::A,
        &[
            "exec",
            "-c",
            "who",
            POD,
            "--",
            "/bin/sh",
            "-c",
            "wc -c < /written",
        ],
    )?;
    ensure!(written.trim() == WRITTEN.to_string(), "{written}");

    // A template that is damaged harms nobody.
    let memory = test.state(Node::A).join("templates").join(&made.key);
    let memory = File::options().write(true).open(memory.join("memory"))?;
    memory.write_all_at(b"not what was there", 2 << 20)?;
    run(&test, "third", "10.77.0.12", "fd77::12")?;
    ensure!(list(&test)?.is_empty(), "it is still there");
    test.succeeds(Node::A, &["exec", TWIN, "--", "/bin/true"])?;
    test.end()
}

/// The folder of the template that is being made, once its VM runs.
fn unfinished(dir: &Path) -> Option<VmRecord> {
    let mut entries = fs::read_dir(dir).ok()?.flatten();
    entries.find_map(|entry| VmRecord::load(&entry.path()).ok())
}

#[test]
fn a_service_that_is_killed_while_it_makes_a_template_leaves_nothing() -> Result<()> {
    let test = TestLab::up()?;
    test.import_demo(Node::A)?;
    let file = test.lab().dir().join("template.yaml");
    fs::write(&file, yaml(POD, POD_IPV4, POD_IPV6))?;
    let mut client = test.lab().on(Node::A);
    let client = client.args(["template", "build"]).arg(&file);
    let mut client = client
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()?;
    let dir = test.state(Node::A).join("templates");
    let mut found = None;
    poll_until(SOON, || {
        found = unfinished(&dir);
        found.is_some()
    });
    let record = found.context("no VM of a template was started")?;
    let vmm = ProcessId {
        what: "the VMM of a template".to_owned(),
        pid: record.pid,
        start_time: record.start_time,
    };
    test.restart(Node::A, || Ok(()))?;
    client.wait()?;
    ensure!(
        poll_until(SOON, || !vmm.alive()),
        "its VMM has outlived the service"
    );
    let left: BTreeSet<_> = fs::read_dir(&dir)?
        .flatten()
        .map(|entry| entry.file_name())
        .collect();
    ensure!(left.is_empty(), "{left:?}");
    test.nothing_is_left_on(Node::A)?;
    test.end()
}
