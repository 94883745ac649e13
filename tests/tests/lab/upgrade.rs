//! The VMM of a running pod is replaced under traffic: no packet is lost, connections and commands live on, and whatever goes wrong
//! leaves one guest that runs.

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use migrator::pods::upgrade::UpgradeReport;
use migrator_tests::lab::{POD, SOON, TestLab};
use migrator_tests::moments;
use vm_runtime::vm::VmRecord;
use xtask::lab::Node;
use xtask::process::poll_until;

use crate::connection::Connection;

/// The options that name QEMU 10, unpacked.
fn qemu10() -> Result<Vec<String>> {
    let root = std::env::var("MIGRATOR_QEMU10_DIR").context(
        "MIGRATOR_QEMU10_DIR is not set: `cargo xtask test` sets it to the folder where it unpacks QEMU 10",
    )?;
    let options = [
        ("--qemu", "bin/qemu-system-x86_64"),
        ("--qemu-lib-dir", "lib/x86_64-linux-gnu"),
        ("--qemu-data-dir", "share/qemu"),
        ("--qemu-data-dir", "share/seabios"),
    ];
    let words = options.map(|(name, path)| [name.to_owned(), format!("{root}/usr/{path}")]);
    Ok(words.concat())
}

/// The words of an upgrade.
fn words(options: &[String]) -> Vec<&str> {
    let mut words = vec!["--output", "json", "upgrade", POD];
    words.extend(options.iter().map(String::as_str));
    words
}

/// Upgrades the pod on node a; the report.
fn upgraded(test: &TestLab, options: &[String]) -> Result<UpgradeReport> {
    let report: UpgradeReport = serde_json::from_str(&test.succeeds(Node::A, &words(options))?)?;
    println!("    {report:?}");
    test.runs_on(Node::A)?;
    one_vmm(test)?;
    Ok(report)
}

/// Waits until node a has one VMM, and no TAP but the pod's.
fn one_vmm(test: &TestLab) -> Result<()> {
    let mut left = Vec::new();
    let found = poll_until(SOON, || {
        left = test.leftovers(Node::A).unwrap_or_default();
        let count = |what: &str| left.iter().filter(|name| name.starts_with(what)).count();
        count("VMM") == 1 && count("mt") == 1 && count("ms") == 0
    });
    ensure!(found, "on node a are {left:?}");
    Ok(())
}

fn inspect(test: &TestLab) -> Result<serde_json::Value> {
    let text = test.succeeds(Node::A, &["--output", "json", "inspect", POD])?;
    Ok(serde_json::from_str(&text)?)
}

#[test]
fn a_pod_goes_on_in_qemu_10_and_back_without_losing_a_packet() -> Result<()> {
    let mut test = TestLab::with_pod()?;
    let mut connection = Connection::open(&test)?;
    let mut counted = test.log_goes_on(Node::A, 0)?;
    let before = inspect(&test)?;
    for (options, version) in [(qemu10()?, "10."), (Vec::new(), "7.2.")] {
        let report = upgraded(&test, &options)?;
        ensure!(report.to.version.starts_with(version), "{report:?}");
        ensure!(report.downtime_us < 1_000_000, "{report:?}");
        connection.lives_on()?;
        counted = test.log_goes_on(Node::A, counted)?;
        test.exec_works(Node::A)?;
        test.probe_is_perfect()?;
        let now = inspect(&test)?;
        ensure!(
            now["qemu"]["version"] == report.to.version.as_str(),
            "{now}"
        );
        ensure!(now["vmm_pid"] != before["vmm_pid"], "{now}");
        test.start_probe()?;
        if version == "10." {
            // The other node's QEMU is older, and the device state of this one does not go there.
            let said = test.says(Node::A, &["migrate", POD, "--to", "b"])?;
            ensure!(
                said.code == Some(4) && said.err.contains("older"),
                "{said:?}"
            );
        }
    }
    connection.close()?;
    // What was handed over twice can be moved.
    test.moves(Node::A)?;
    test.nothing_is_left_on(Node::A)?;
    test.log_goes_on(Node::B, counted)?;
    test.end()
}

/// A program that answers for QEMU's version and machines, and is something else when it is started.
fn impostor(dir: &Path, name: &str, machine: &str, start: &str) -> Result<Vec<String>> {
    let path = dir.join(name);
    let script = format!(
        "#!/bin/sh\ncase \"$*\" in\n--version) echo 'QEMU emulator version 7.2.99';;\n\
         '-machine help') echo '{machine} Standard PC';;\n*) {start};;\nesac\n"
    );
    std::fs::write(&path, script)?;
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755))?;
    Ok(vec!["--qemu".to_owned(), path.display().to_string()])
}

/// The real QEMU without one of the devices: it takes the state's first part, and refuses the rest.
const ONE_DEVICE_LESS: &str = "for word; do shift; case \"$word\" in virtio-rng-pci*) set -- \"$@\" \
     pvpanic;; *) set -- \"$@\" \"$word\";; esac; done; exec qemu-system-x86_64 \"$@\"";

#[test]
fn an_upgrade_that_fails_leaves_the_pod_as_it_was() -> Result<()> {
    let mut test = TestLab::with_pod()?;
    let mut connection = Connection::open(&test)?;
    let before = inspect(&test)?;
    let dir = tempfile::tempdir()?;
    let real = "pc-q35-7.2";
    let named = |path: &str| vec!["--qemu".to_owned(), path.to_owned()];
    let cases = [
        (
            "no such program",
            named("/nonexistent/qemu"),
            "/nonexistent/qemu",
        ),
        ("no QEMU", named("/bin/true"), "does not answer"),
        (
            "another machine",
            impostor(dir.path(), "other", "pc-q35-9.9", "exit 1")?,
            "does not know the machine type",
        ),
        (
            "one that ends at once",
            impostor(dir.path(), "ends", real, "echo broken >&2; exit 1")?,
            "broken",
        ),
        (
            "one that does not take the state",
            impostor(dir.path(), "less", real, ONE_DEVICE_LESS)?,
            "does not take the state",
        ),
    ];
    for (what, options, wanted) in cases {
        let said = test.says(Node::A, &words(&options))?;
        println!("    {what}: {}", said.err.trim());
        ensure!(said.code == Some(4), "{what}: {said:?}");
        ensure!(said.err.contains(wanted), "{what}: {said:?}");
        ensure!(said.err.contains("goes on as it was"), "{what}: {said:?}");
        one_vmm(&test)?;
        connection.lives_on()?;
        test.exec_works(Node::A)?;
        test.probe_is_perfect()?;
        let now = inspect(&test)?;
        ensure!(now == before, "{what}: before {before}, now {now}");
        test.start_probe()?;
    }
    // And after all that, a good one.
    upgraded(&test, &[])?;
    connection.lives_on()?;
    connection.close()?;
    test.moves(Node::A)?;
    test.end()
}

#[test]
fn a_pod_that_is_upgraded_is_left_alone_by_everything_else() -> Result<()> {
    let test = TestLab::with_pod()?;
    let dir = tempfile::tempdir()?;
    // It takes its time to die.
    let slow = impostor(dir.path(), "slow", "pc-q35-7.2", "sleep 3; exit 1")?;
    let upgrade = begun(&test, &words(&slow))?;
    let upgrading = poll_until(SOON, || {
        inspect(&test).is_ok_and(|pod| pod["state"] == "upgrading")
    });
    ensure!(upgrading, "it is not shown as upgrading");
    for verb in [
        &["stop", POD][..],
        &["migrate", POD, "--to", "b"],
        &["upgrade", POD],
    ] {
        let said = test.says(Node::A, verb)?;
        ensure!(said.code == Some(4), "{said:?}");
        ensure!(said.err.contains("is upgrading: cannot"), "{said:?}");
    }
    test.exec_works(Node::A)?;
    ended(upgrade)?;
    test.runs_on(Node::A)?;
    test.moves(Node::A)?;
    test.end()
}

/// Starts a verb on node a, whatever comes of it.
fn begun(test: &TestLab, words: &[&str]) -> Result<Child> {
    let mut command: Command = test.lab().on(Node::A);
    let command = command.args(words).stdin(Stdio::null());
    Ok(command
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()?)
}

fn ended(mut child: Child) -> Result<()> {
    let ended = poll_until(SOON, || matches!(child.try_wait(), Ok(Some(_))));
    ensure!(ended, "the verb does not end");
    Ok(())
}

/// What of an upgrade is seen from outside, as a moment to kill the service.
#[derive(Clone, Copy, Debug)]
enum Sign {
    /// The new QEMU has its record: it is started.
    Started,
    /// The new QEMU awaits the state.
    Listens,
    /// The new QEMU has the state, the old one is suspended, and the guest stands still or has just gone on.
    Suspended,
    /// The record says that the pod is in the new one.
    Decided,
}

const MOMENTS: [(Sign, u64); 15] = [
    (Sign::Started, 0),
    (Sign::Started, 50),
    (Sign::Listens, 0),
    (Sign::Listens, 4),
    (Sign::Listens, 8),
    (Sign::Listens, 11),
    (Sign::Listens, 14),
    (Sign::Listens, 18),
    (Sign::Listens, 24),
    (Sign::Suspended, 0),
    (Sign::Suspended, 0),
    (Sign::Suspended, 1),
    (Sign::Suspended, 3),
    (Sign::Decided, 0),
    (Sign::Decided, 20),
];

/// Whether a process is suspended, by its state in `/proc/PID/stat`.
fn is_suspended(pid: i32) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit_once(')')
        .is_some_and(|(_, rest)| rest.trim_start().starts_with('T'))
}

/// The folder of the VMM that is the pod's by the record.
fn decides(pod: &Path) -> Result<PathBuf> {
    Ok(VmRecord::load(pod)?.dir)
}

/// Waits for a moment of the upgrade that has begun, looking often.
fn moment(pod: &Path, (sign, ms): (Sign, u64), was: &VmRecord) -> Result<()> {
    let folder = match was.dir.ends_with("v1") {
        true => pod.join("v2"),
        false => pod.join("v1"),
    };
    let until = Instant::now() + SOON;
    let seen = || match sign {
        Sign::Started => folder.join("vmm.json").exists(),
        Sign::Listens => folder.join("load.sock").exists(),
        // Its end is as good: then it was too short to be seen.
        Sign::Suspended => is_suspended(was.pid) || decides(pod).is_ok_and(|now| now != was.dir),
        Sign::Decided => decides(pod).is_ok_and(|now| now != was.dir),
    };
    while !seen() {
        ensure!(Instant::now() < until, "it never came to {sign:?}");
        std::hint::spin_loop();
    }
    let (began, delay) = (Instant::now(), Duration::from_millis(ms));
    poll_until(delay, || began.elapsed() >= delay);
    Ok(())
}

#[test]
fn a_service_killed_at_any_moment_of_an_upgrade_leaves_one_guest() -> Result<()> {
    let mut test = TestLab::with_pod()?;
    let pod = test.state(Node::A).join("pods").join(POD);
    for at in moments::some(&MOMENTS, 0) {
        let was = VmRecord::load(&pod)?;
        let upgrade = begun(&test, &words(&[]))?;
        moment(&pod, at, &was)?;
        test.lab().kill_node(Node::A)?;
        let others = test.leftovers(Node::A)?;
        let count = others.iter().filter(|what| what.starts_with("VMM")).count();
        let decided = decides(&pod)? != was.dir;
        ended(upgrade)?;
        test.lab().start_node(Node::A)?;
        let now = decides(&pod)?;
        println!(
            "    {at:?}: {count} VMMs were left, decided: {decided}, then {}",
            now != was.dir
        );
        ensure!(
            !decided || now != was.dir,
            "it went back to a VMM that is gone"
        );
        test.runs_on(Node::A)?;
        one_vmm(&test)?;
        test.answers_on()?;
        let summary = test.stop_probe()?.summary();
        // The one frame that the killed service was giving to the guest is given again by the next one: it cannot know.
        ensure!(
            summary.lost == 0 && summary.reordered == 0 && summary.duplicated <= 1,
            "{summary:?}"
        );
        // The next service has to find the guest's agent again.
        let found = poll_until(SOON, || test.exec_works(Node::A).is_ok());
        ensure!(found, "the guest's agent is not found again");
        test.log_is_whole(Node::A)?;
        test.start_probe()?;
    }
    test.moves(Node::A)?;
    test.nothing_is_left_on(Node::A)?;
    test.end()
}
