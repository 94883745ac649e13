//! A service is killed at one moment of a migration after the other, and started again: the guest runs on one node, and
//! is served there.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use migrator::api::types::PodState;
use migrator::migration::status::{Outcome, Phase};
use migrator_tests::lab::{POD, SOON, TestLab};
use migrator_tests::moments;
use nix::sys::signal::Signal;
use xtask::lab::{Node, Topology};
use xtask::process::{ProcessId, poll_until};

/// When a service is killed.
#[derive(Clone, Copy, Debug)]
enum Moment {
    /// So many milliseconds after the command. A move takes half a second, and what comes after it half a second more.
    Begun(u64),
    /// So many milliseconds after the pod's packets began to be held, which is some tens of milliseconds before the grant.
    Held(u64),
}

const MOMENTS: [Moment; 22] = [
    Moment::Begun(0),
    Moment::Begun(70),
    Moment::Begun(140),
    Moment::Begun(210),
    Moment::Begun(280),
    Moment::Begun(350),
    Moment::Held(0),
    Moment::Held(5),
    Moment::Held(10),
    Moment::Held(15),
    Moment::Held(20),
    Moment::Held(25),
    Moment::Held(30),
    Moment::Held(40),
    Moment::Begun(420),
    Moment::Begun(490),
    Moment::Begun(560),
    Moment::Begun(630),
    Moment::Begun(700),
    Moment::Begun(800),
    Moment::Begun(900),
    Moment::Begun(1_000),
];

/// Begins a migration and waits for the moment; the migration's id, and the phase it is in.
fn begin(test: &TestLab, from: Node, moment: Moment) -> Result<(String, Phase)> {
    let began = Instant::now();
    let id = test.begins(from, &[])?;
    let wait = |since: Instant, ms| {
        let delay = Duration::from_millis(ms);
        poll_until(delay, || since.elapsed() >= delay);
    };
    match moment {
        Moment::Begun(ms) => wait(began, ms),
        Moment::Held(ms) => {
            test.comes_to(from, &id, "the switchover", |status| {
                status.phase == Phase::Switchover
            })?;
            wait(Instant::now(), ms);
        }
    }
    let phase = test.status(from, &id)?.phase;
    Ok((id, phase))
}

/// Where the pod is in the end: running on one node, and unknown on the other.
fn place(test: &TestLab) -> Result<Node> {
    let mut states = Vec::new();
    let mut place = None;
    poll_until(SOON, || {
        states = Node::ALL
            .iter()
            .map(|node| test.pod_state(*node).ok().flatten())
            .collect();
        place = match states.as_slice() {
            [Some(PodState::Running), None] => Some(Node::A),
            [None, Some(PodState::Running)] => Some(Node::B),
            _ => None,
        };
        place.is_some()
    });
    place.ok_or_else(|| anyhow::anyhow!("the pod is {states:?} on a and b"))
}

/// One guest, served where it runs, which has missed nothing. Begins a new probe; the node that it runs on.
pub(crate) fn settles(test: &mut TestLab) -> Result<Node> {
    let at = place(test)?;
    println!("    the pod is on {}", at.name());
    test.probe_is_perfect()?;
    test.log_is_whole(at)?;
    test.exec_works(at)?;
    test.nothing_is_left_on(at.other())?;
    test.start_probe()?;
    Ok(at)
}

/// Those around the switchover.
fn around_the_switchover() -> Vec<Moment> {
    let is_held = |moment: &Moment| matches!(moment, Moment::Held(_));
    MOMENTS.into_iter().filter(is_held).collect()
}

#[test]
fn a_destination_killed_at_any_moment_costs_no_packet() -> Result<()> {
    destination_killed(TestLab::with_pod()?, &moments::some(&MOMENTS, 0))
}

#[test]
fn a_destination_killed_around_the_switchover_costs_a_routed_pod_no_packet() -> Result<()> {
    let test = TestLab::with_pod_as(Topology::Routed)?;
    destination_killed(test, &moments::some(&around_the_switchover(), 1))
}

fn destination_killed(mut test: TestLab, moments: &[Moment]) -> Result<()> {
    let mut from = Node::A;
    for moment in moments {
        let (id, phase) = begin(&test, from, *moment)?;
        test.lab().kill_node(from.other())?;
        // The source must see it with its own eyes, and not only a restarted service. One that forwards knows already that
        // the guest runs there; a guest that has no network for seconds loses packets by itself, in its neighbour table's queue.
        test.comes_to(from, &id, "an end, or doubt", |status| {
            status.report.is_some() || matches!(status.phase, Phase::InDoubt | Phase::Forwarding)
        })?;
        test.lab().start_node(from.other())?;
        println!("{moment:?}, killed in {phase:?}");
        from = settles(&mut test)?;
    }
    test.end()
}

#[test]
fn a_source_killed_at_any_moment_costs_no_packet() -> Result<()> {
    source_killed(TestLab::with_pod()?, &moments::some(&MOMENTS, 1))
}

#[test]
fn a_source_killed_around_the_switchover_costs_a_routed_pod_no_packet() -> Result<()> {
    let test = TestLab::with_pod_as(Topology::Routed)?;
    source_killed(test, &moments::some(&around_the_switchover(), 0))
}

fn source_killed(mut test: TestLab, moments: &[Moment]) -> Result<()> {
    let mut from = Node::A;
    for moment in moments {
        let (_, phase) = begin(&test, from, *moment)?;
        test.lab().kill_node(from)?;
        test.lab().start_node(from)?;
        println!("{moment:?}, killed in {phase:?}");
        from = settles(&mut test)?;
    }
    test.end()
}

/// The machine's power fails, as far as the pod is concerned: service and VMM are gone at once. The guest has left before.
#[test]
fn a_source_that_loses_service_and_vmm_after_the_grant_lets_the_pod_go() -> Result<()> {
    let test = TestLab::with_pod()?;
    let shown = test.succeeds(Node::A, &["--output", "json", "inspect", POD])?;
    let shown: serde_json::Value = serde_json::from_str(&shown)?;
    let vmm = shown["vmm_pid"].as_i64().context("no vmm_pid")?;
    let vmm = ProcessId::of("the VMM", i32::try_from(vmm)?)?;
    let id = test.begins(Node::A, &[])?;
    test.comes_to(Node::A, &id, "forwarding", |status| {
        status.phase == Phase::Forwarding
    })?;
    test.restart(Node::A, || vmm.signal(Signal::SIGKILL))?;
    ensure!(place(&test)? == Node::B, "the pod is not on b");
    test.nothing_is_left_on(Node::A)?;
    let status = test.comes_to(Node::A, &id, "its end", |status| status.report.is_some())?;
    ensure!(
        status
            .report
            .is_some_and(|report| report.outcome == Outcome::Completed),
        "the migration's record is not closed"
    );
    test.moves(Node::B)?;
    test.log_is_whole(Node::A)?;
    test.end()
}
