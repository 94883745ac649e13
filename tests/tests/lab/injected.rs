//! A service is killed as a packet has just got into the guest's TAP, or out of a queue, and before it could note anything: the next one knows that
//! all the same.

use anyhow::{Context, Result, ensure};
use migrator::api::types::PodState;
use migrator::migration::status::Phase;
use migrator_tests::lab::{POD, SOON, TestLab};
use migrator_tests::tracer;
use nix::sys::signal::Signal;
use vm_runtime::vm::VmRecord;
use xtask::lab::Node;
use xtask::process::{ProcessId, poll_until};

use crate::any_moment::settles;

/// Which of the packets.
const PACKETS: [u32; 3] = [1, 2, 4];

/// A move whose switchover has begun may be over before it can be broken off.
const ATTEMPTS: u32 = 5;

/// Kills the service of a node as this call of its pod's port's thread returns for the so-manieth time. False: it makes fewer.
fn kill_after(test: &TestLab, node: Node, call: libc::c_long, packets: u32) -> Result<bool> {
    let state = test.lab().state()?;
    let service = state.service(node).context("the node was never started")?;
    let killed = tracer::kill_at(service, "port-", call, packets)?;
    if killed {
        println!("killed after {packets} packets");
        test.lab().kill_node(node)?;
    }
    Ok(killed)
}

/// As it has given the guest so many packets.
fn kill_after_packets(test: &TestLab, node: Node, packets: u32) -> Result<bool> {
    kill_after(test, node, libc::SYS_sendto, packets)
}

/// As it has taken so many out of the park, or out of the TAP of a guest that has stopped. They are in no queue then.
fn kill_after_reads(test: &TestLab, node: Node, packets: u32) -> Result<bool> {
    kill_after(test, node, libc::SYS_readv, packets)
}

#[test]
fn a_source_killed_as_it_has_read_a_packet_loses_none() -> Result<()> {
    let mut test = TestLab::with_pod()?;
    let mut from = Node::A;
    for packets in [1, 2, 9] {
        test.begins(from, &[])?;
        let killed = kill_after_reads(&test, from, packets)?;
        ensure!(killed, "fewer than {packets} packets were held");
        test.lab().start_node(from)?;
        from = settles(&mut test)?;
    }
    test.end()
}

#[test]
fn a_destination_killed_as_it_has_read_a_packet_loses_and_doubles_none() -> Result<()> {
    let mut test = TestLab::with_pod()?;
    let mut from = Node::A;
    for packets in [1, 3] {
        let mut attempts = 0..ATTEMPTS;
        let mut killed = false;
        while !killed {
            ensure!(attempts.next().is_some(), "too few packets came directly");
            let id = test.begins(from, &[])?;
            killed = kill_after_reads(&test, from.other(), packets)?;
            test.comes_to(from, &id, "an end, or doubt", |status| {
                status.report.is_some()
                    || matches!(status.phase, Phase::InDoubt | Phase::Forwarding)
            })?;
            if killed {
                test.lab().start_node(from.other())?;
            }
            from = settles(&mut test)?;
        }
    }
    test.end()
}

#[test]
fn a_destination_killed_as_a_packet_of_the_log_is_in_the_tap_doubles_none() -> Result<()> {
    let mut test = TestLab::with_pod()?;
    let mut from = Node::A;
    for packets in PACKETS {
        let id = test.begins(from, &[])?;
        let killed = kill_after_packets(&test, from.other(), packets)?;
        ensure!(killed, "fewer than {packets} packets came by the log");
        test.comes_to(from, &id, "an end, or doubt", |status| {
            status.report.is_some() || matches!(status.phase, Phase::InDoubt | Phase::Forwarding)
        })?;
        test.lab().start_node(from.other())?;
        from = settles(&mut test)?;
    }
    test.end()
}

#[test]
fn a_source_killed_as_a_packet_is_back_in_the_tap_doubles_none() -> Result<()> {
    let mut test = TestLab::with_pod()?;
    let mut from = Node::A;
    for packets in PACKETS {
        let mut attempts = 0..ATTEMPTS;
        let mut killed = false;
        while !killed {
            ensure!(attempts.next().is_some(), "no move was broken off");
            let id = test.begins(from, &[])?;
            test.comes_to(from, &id, "the switchover", |status| {
                status.phase == Phase::Switchover
            })?;
            test.lab().kill_node(from.other())?;
            killed = kill_after_packets(&test, from, packets)?;
            if killed {
                test.lab().start_node(from)?;
            }
            test.lab().start_node(from.other())?;
            from = settles(&mut test)?;
        }
    }
    test.end()
}

/// Both are gone as the first packet is in the TAP: after the grant, and before the arrival is over.
#[test]
fn a_pod_whose_service_and_vmm_end_just_after_the_grant_can_be_started_where_it_is() -> Result<()> {
    let mut test = TestLab::with_pod()?;
    let id = test.begins(Node::A, &[])?;
    let vmm = || VmRecord::load(&test.state(Node::B).join("pods").join(POD));
    ensure!(
        kill_after_packets(&test, Node::B, 1)?,
        "no packet came by the log"
    );
    ProcessId::of("the VMM of node b", vmm()?.pid)?.signal(Signal::SIGKILL)?;
    test.comes_to(Node::A, &id, "doubt, or more", |status| {
        matches!(status.phase, Phase::InDoubt | Phase::Forwarding)
    })?;
    test.lab().start_node(Node::B)?;
    let failed = poll_until(SOON, || {
        let state = |node| test.pod_state(node).ok().flatten();
        state(Node::A).is_none() && state(Node::B) == Some(PodState::Failed)
    });
    ensure!(failed, "the pod is not shown as failed, on b alone");
    test.succeeds(Node::B, &["start", POD])?;
    test.runs_on(Node::B)?;
    // It lost what it was sent while it had no guest.
    test.stop_probe()?;
    test.end()
}
