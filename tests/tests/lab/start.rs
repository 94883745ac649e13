//! A pod whose VM is gone is started again, with everything that its disks had.

use anyhow::{Result, ensure};
use migrator::api::types::{PodDetail, PodState};
use migrator_tests::lab::{POD, SOON, TestLab};
use nix::sys::signal::Signal;
use vm_runtime::vm::VmRecord;
use xtask::demo_image;
use xtask::lab::Node;
use xtask::process::{ProcessId, poll_until};

/// Prints how often it was started, as each of its disks knows it, then stays.
fn yaml() -> String {
    format!(
        "apiVersion: v1
kind: Pod
metadata:
  name: {POD}
  annotations: {{ migrator/ipv4: 10.77.0.10/24, migrator/vm-memory: 256Mi }}
spec:
  volumes:
    - name: kept
      persistentVolumeClaim: {{ claimName: kept }}
    - name: scratch
      emptyDir: {{ sizeLimit: 32Mi }}
  containers:
    - name: counter
      image: {image}
      command: [/bin/sh, -c]
      args: ['for d in / /kept/ /scratch/; do echo x >> $d/starts; done; sync; echo $(cat /starts | wc -l) $(cat /kept/starts | wc -l) $(cat /scratch/starts | wc -l) starts; while :; do sleep 1; done']
      resources: {{ limits: {{ ephemeral-storage: 32Mi }} }}
      volumeMounts:
        - {{ name: kept, mountPath: /kept }}
        - {{ name: scratch, mountPath: /scratch }}
",
        image = demo_image::REFERENCE
    )
}

/// Waits until it has printed that this is its start number `least`, or a later one; which.
fn has_started(test: &TestLab, node: Node, least: u32) -> Result<u32> {
    let (mut log, mut starts) = (String::new(), 0);
    let found = poll_until(SOON, || {
        log = test.succeeds(node, &["logs", POD]).unwrap_or_default();
        let count = |line: &str| -> Option<u32> {
            let n = line.split(' ').next()?.parse().ok()?;
            (line == format!("{n} {n} {n} starts")).then_some(n)
        };
        starts = log.lines().filter_map(count).max().unwrap_or(0);
        starts >= least
    });
    ensure!(found, "it printed of no start {least}, but:\n{log}");
    Ok(starts)
}

fn kill_vmm(test: &TestLab, node: Node) -> Result<()> {
    let record = VmRecord::load(&test.state(node).join("pods").join(POD))?;
    let vmm = ProcessId {
        what: "the VMM".to_owned(),
        pid: record.pid,
        start_time: record.start_time,
    };
    vmm.signal(Signal::SIGKILL)
}

/// Waits until it is shown as failed; why.
fn has_failed(test: &TestLab, node: Node) -> Result<String> {
    let failed = poll_until(SOON, || {
        test.pod_state(node).ok().flatten() == Some(PodState::Failed)
    });
    ensure!(failed, "the pod is {:?}", test.pod_state(node)?);
    let pod: PodDetail = test.get(node, &format!("/v1/pods/{POD}"))?;
    Ok(pod.summary.reason.unwrap_or_default())
}

#[test]
fn a_pod_whose_vm_is_gone_starts_again_with_its_disks() -> Result<()> {
    let test = TestLab::up()?;
    for node in Node::ALL {
        test.import_demo(node)?;
    }
    test.succeeds(Node::A, &["volume", "create", "kept", "--size", "32Mi"])?;
    test.run(Node::A, &yaml(), &[])?;
    has_started(&test, Node::A, 1)?;
    let said = test.says(Node::A, &["start", POD])?;
    ensure!(
        said.code == Some(4) && said.err.contains("running: cannot start it now"),
        "{said:?}"
    );
    kill_vmm(&test, Node::A)?;
    has_failed(&test, Node::A)?;
    let said = test.succeeds(Node::A, &["start", POD])?;
    ensure!(said == format!("{POD} running on a\n"), "{said}");
    has_started(&test, Node::A, 2)?;

    // The service is killed while it boots: what it began is ended, and nothing is lost.
    kill_vmm(&test, Node::A)?;
    has_failed(&test, Node::A)?;
    std::thread::scope(|scope| -> Result<()> {
        let starter = scope.spawn(|| test.says(Node::A, &["start", POD]));
        let begun = poll_until(SOON, || {
            test.pod_state(Node::A).ok().flatten() == Some(PodState::Starting)
        });
        test.lab().kill_node(Node::A)?;
        ensure!(begun, "it is not being started");
        let said = starter.join().expect("the starter does not panic")?;
        ensure!(said.code != Some(0), "it was started: {said:?}");
        Ok(())
    })?;
    test.lab().start_node(Node::A)?;
    let reason = has_failed(&test, Node::A)?;
    ensure!(reason.contains("being started again"), "{reason}");
    let record = VmRecord::load(&test.state(Node::A).join("pods").join(POD));
    ensure!(record.is_err(), "its VMM is still there: {record:?}");
    test.succeeds(Node::A, &["start", POD])?;
    // The one that was killed may have come to its containers.
    let starts = has_started(&test, Node::A, 3)?;
    ensure!(starts <= 4, "{starts} starts");

    test.moves(Node::A)?;
    has_started(&test, Node::B, starts)?;
    kill_vmm(&test, Node::B)?;
    has_failed(&test, Node::B)?;
    test.succeeds(Node::B, &["start", POD])?;
    has_started(&test, Node::B, starts + 1)?;
    test.end()
}
