//! Services are killed, and a node's power fails, while a pod with a disk moves: the disk is whole at whoever owns the pod afterwards,
//! with everything that was synced, and the pod runs there, or can be started there.

use std::time::{Duration, Instant};

use anyhow::{Result, bail, ensure};
use migrator::api::types::PodState;
use migrator::migration::status::Phase;
use migrator_tests::lab::{POD, SOON, TestLab};
use nix::sys::signal::Signal;
use vm_runtime::vm::VmRecord;
use xtask::demo_image;
use xtask::lab::Node;
use xtask::process::{ProcessId, poll_until};

use crate::moving_disks::{VOLUME, is_whole_after_a_cut, volume};

/// When it happens.
#[derive(Clone, Copy, Debug)]
enum Moment {
    /// Blocks cross, slowly: before the grant.
    Blocks,
    /// So many milliseconds after the switchover began: before the grant, or after it.
    Switchover(u64),
    /// The source has noted that it hands the pod over: the grant is on its way, and may get lost.
    HandedOver,
    /// The destination runs the guest: after the grant.
    Forwarding,
}

use Moment::{Blocks, Forwarding, HandedOver, Switchover};

/// A pod that says each number once it is synced, and goes on where the volume ends.
fn yaml() -> String {
    format!(
        "apiVersion: v1
kind: Pod
metadata:
  name: {POD}
  annotations: {{migrator/ipv4: 10.77.0.10/24, migrator/vm-memory: 256Mi}}
spec:
  volumes:
    - name: {VOLUME}
      persistentVolumeClaim: {{claimName: {VOLUME}}}
  containers:
    - name: writer
      image: {image}
      command: [/bin/sh, -c]
      args: ['touch /data/log; i=$(grep -c . /data/log); while :; do i=$((i+1)); echo $i >> /data/log; dd if=/dev/urandom of=/data/blob bs=64k count=1 seek=$((i % 200)) conv=notrunc 2>/dev/null; sync; echo $i; done']
      volumeMounts:
        - {{name: {VOLUME}, mountPath: /data}}
",
        image = demo_image::REFERENCE
    )
}

fn with_pod() -> Result<TestLab> {
    let test = TestLab::up()?;
    for node in Node::ALL {
        test.import_demo(node)?;
    }
    test.succeeds(Node::A, &["volume", "create", VOLUME, "--size", "128Mi"])?;
    test.run(Node::A, &yaml(), &[])?;
    test.said(Node::A, 3)?;
    Ok(test)
}

/// Begins a move and waits for the moment; its id.
fn begin(test: &TestLab, from: Node, moment: Moment) -> Result<String> {
    let slow: &[&str] = match moment {
        Blocks => &["--bandwidth", "2", "--compress", "none"],
        Switchover(_) | HandedOver | Forwarding => &[],
    };
    let id = test.begins(from, slow)?;
    match moment {
        Blocks => test.comes_to(from, &id, "the first blocks", |status| {
            status.disk_bytes_sent > 0
        })?,
        Switchover(ms) => {
            let status = test.comes_to(from, &id, "the switchover", |status| {
                status.phase == Phase::Switchover || is_after_the_grant(status.phase)
            })?;
            let since = Instant::now();
            let delay = Duration::from_millis(ms);
            poll_until(delay, || since.elapsed() >= delay);
            status
        }
        HandedOver => {
            let path = test.state(from).join(format!("journal/owners/{POD}.json"));
            let until = Instant::now() + SOON;
            // Looked at without a pause: the grant follows within a millisecond.
            while !std::fs::read_to_string(&path)?.contains(&id) {
                ensure!(Instant::now() < until, "the pod is not handed over");
                std::thread::yield_now();
            }
            return Ok(id);
        }
        Forwarding => test.comes_to(from, &id, "forwarding", |status| {
            is_after_the_grant(status.phase)
        })?,
    };
    Ok(id)
}

fn is_after_the_grant(phase: Phase) -> bool {
    matches!(phase, Phase::Forwarding | Phase::InDoubt | Phase::Done)
}

/// The service of a node, and every VMM of it, at once.
fn cut_power(test: &TestLab, node: Node) -> Result<()> {
    let vmm = VmRecord::load(&test.state(node).join("pods").join(POD));
    test.lab().kill_node(node)?;
    // It may have none any more, or not yet.
    if let Ok(record) = vmm {
        let vmm = ProcessId {
            what: format!("the VMM of node {}", node.name()),
            pid: record.pid,
            start_time: record.start_time,
        };
        if vmm.alive() {
            vmm.signal(Signal::SIGKILL)?;
        }
    }
    Ok(())
}

/// The one node that has the pod in the end, and whether it runs there.
fn owner(test: &TestLab) -> Result<(Node, bool)> {
    let mut states = Vec::new();
    let mut found = None;
    poll_until(SOON, || {
        states = Node::ALL
            .iter()
            .map(|node| test.pod_state(*node).ok().flatten())
            .collect();
        let over = |state| match state {
            PodState::Running => Some(true),
            PodState::Failed => Some(false),
            _ => None,
        };
        found = match states.as_slice() {
            [Some(state), None] => over(*state).map(|runs| (Node::A, runs)),
            [None, Some(state)] => over(*state).map(|runs| (Node::B, runs)),
            _ => None,
        };
        found.is_some()
    });
    match found {
        Some(found) => Ok(found),
        None => bail!("the pod is {states:?} on a and b"),
    }
}

/// The disk is whole at the owner and nowhere else, and the guest runs there, or does so again. The owner.
fn settles(test: &TestLab, floor: u64) -> Result<Node> {
    let (at, runs) = owner(test)?;
    println!("    the pod is on {}, running: {runs}", at.name());
    test.nothing_is_left_on(at.other())?;
    let gone = poll_until(SOON, || !volume(test, at.other()).exists());
    ensure!(gone, "the volume is on {} as well", at.other().name());
    if !runs {
        is_whole_after_a_cut(&volume(test, at), floor)?;
        test.succeeds(at, &["start", POD])?;
    }
    test.said(at, floor)?;
    Ok(at)
}

#[test]
fn power_cuts_while_a_disk_moves_leave_it_whole_at_the_owner() -> Result<()> {
    let test = with_pod()?;
    let mut from = Node::A;
    for moment in [Blocks, Switchover(5), HandedOver, Forwarding] {
        for at_source in [true, false] {
            let floor = test.said(from, 0)?;
            let id = begin(&test, from, moment)?;
            let cut = if at_source { from } else { from.other() };
            cut_power(&test, cut)?;
            println!("{moment:?}, the power of {} fails", cut.name());
            if !at_source {
                test.comes_to(from, &id, "an end, or doubt", |status| {
                    status.report.is_some() || is_after_the_grant(status.phase)
                })?;
            }
            test.lab().start_node(cut)?;
            let at = settles(&test, floor)?;
            match moment {
                Blocks => ensure!(at == from, "it has moved without a grant"),
                Forwarding => ensure!(at != from, "it is where it came from, after the grant"),
                Switchover(_) | HandedOver => {}
            }
            from = at;
        }
    }
    test.end()
}

/// The power of both nodes fails just after one has noted that it hands the pod over. While the other is dark, nobody knows whose it is.
#[test]
fn a_pod_without_vm_is_left_alone_as_long_as_it_is_in_doubt() -> Result<()> {
    let test = with_pod()?;
    let floor = test.said(Node::A, 0)?;
    begin(&test, Node::A, HandedOver)?;
    cut_power(&test, Node::A)?;
    cut_power(&test, Node::B)?;
    test.lab().start_node(Node::A)?;
    ensure!(test.pod_state(Node::A)? == Some(PodState::InDoubt));
    for verb in ["start", "stop"] {
        let said = test.says(Node::A, &[verb, POD])?;
        ensure!(said.code != Some(0), "{verb} works");
        for part in ["in_doubt", "migrator status"] {
            ensure!(said.err.contains(part), "{verb} says: {}", said.err);
        }
    }
    ensure!(volume(&test, Node::A).exists(), "its volume is gone");
    test.lab().start_node(Node::B)?;
    settles(&test, floor)?;
    test.end()
}

#[test]
fn a_destination_killed_after_the_grant_has_the_disk_with_everything_in_it() -> Result<()> {
    let test = with_pod()?;
    let mut from = Node::A;
    for moment in [Switchover(15), Switchover(40), Forwarding] {
        let floor = test.said(from, 0)?;
        let id = begin(&test, from, moment)?;
        test.lab().kill_node(from.other())?;
        test.comes_to(from, &id, "an end, or doubt", |status| {
            status.report.is_some() || is_after_the_grant(status.phase)
        })?;
        test.lab().start_node(from.other())?;
        println!(
            "{moment:?}, the service of {} is killed",
            from.other().name()
        );
        let at = settles(&test, floor)?;
        ensure!(owner(&test)? == (at, true), "the guest did not live on");
        if matches!(moment, Forwarding) {
            ensure!(at != from, "it is where it came from, after the grant");
        }
        from = at;
    }
    // The VMM alone: the pod has failed, at the destination, with the whole disk.
    let floor = test.said(from, 0)?;
    begin(&test, from, Forwarding)?;
    test.runs_on(from.other())?;
    let record = VmRecord::load(&test.state(from.other()).join("pods").join(POD))?;
    let vmm = ProcessId {
        what: "the VMM of the destination".to_owned(),
        pid: record.pid,
        start_time: record.start_time,
    };
    vmm.signal(Signal::SIGKILL)?;
    let at = settles(&test, floor)?;
    ensure!(at != from, "it is where it came from, after the grant");
    test.end()
}
