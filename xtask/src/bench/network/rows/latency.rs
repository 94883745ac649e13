//! What a client sees of moves by time: the echo's round trips a second before, during, and a second after.

use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use super::Bench;
use crate::bench::figures::{Aim, Metric, Run, Samples, records};
use crate::bench::network::tail::{AROUND_US, Moments, latency};
use crate::bench::plan::told;
use crate::bench::stage::load::Work;
use crate::bench::stage::peer::{How, Memory, Peer};
use crate::bench::stage::{Moved, Stage, Which, settle};
use crate::probe::{self, Probe, now_us};

/// A move, against QEMU's own.
const MOVE: &str = "latency-switchover";
/// Against the same guest in a new QEMU of the same node: nothing is copied, and nothing moves in the network.
const CPR: &str = "latency-switchover-cpr";
/// Against the same guest, stopped as long as in our move, and continued.
const STOP: &str = "latency-switchover-stop";
/// Packets a second.
const RATE: u32 = 1_000;
/// The guests' RAM in MiB.
const SIZE: u32 = 512;
/// What the guest does meanwhile: it dirties 20 MB/s, as in `silence-512-20`.
const WORK: Work = Work::Dirty(20_000_000);
/// Of traffic before the request, and after the resume.
const AROUND: Duration = Duration::from_micros(AROUND_US + 200_000);
/// An echo that is up answers at once.
const ANSWERS_WITHIN: Duration = Duration::from_secs(15);

/// A tail against the peer's.
const TAIL: &[Aim] = &[Aim::RatioAtMost(1.0)];

const METRICS: [Metric; 7] = [
    metric("p50", "ms", &[]),
    metric("p99", "ms", &[]),
    metric("max", "ms", &[]),
    metric("p99 before", "ms", &[]),
    metric("first answer", "ms", &[]),
    metric("tail", "ms", TAIL),
    metric("lost", "packets", &[Aim::Zero]),
];

const fn metric(name: &'static str, unit: &'static str, aims: &'static [Aim]) -> Metric {
    Metric { name, unit, aims }
}

pub(super) fn cases(quick: bool) -> Vec<String> {
    let cases: &[&str] = if quick { &[MOVE] } else { &[MOVE, STOP, CPR] };
    cases.iter().map(|case| (*case).to_owned()).collect()
}

pub(super) fn run(bench: &mut Bench<'_>, wanted: &[String]) -> Result<()> {
    let wanted = |case: &str| wanted.iter().any(|wanted| wanted == case);
    let mut stage = Stage::up(bench.project, Which::Ten)?;
    let client = stage.lab().client();
    let mut ours = Samples::default();
    let (mut by_move, mut by_stop, mut by_cpr) = <(Samples, Samples, Samples)>::default();
    for _ in 0..bench.plan.runs {
        let pair = stage.pair(SIZE, Memory::Private)?;
        settle(&pair.ours.load, WORK)?;
        let echo = pair.ours.guest().echo();
        let mut downtime = None;
        let run = watched(&client, echo, || {
            let (moved, _) = pair.ours.migrate(&[])?;
            downtime = Some(Duration::from_secs_f64(moved.downtime_ms / 1e3));
            Ok(moved)
        });
        ours.add(told("ours", run));
        if wanted(MOVE) {
            let run = peers(&mut stage, Memory::Private, &client, |peer| {
                peer.migrate(How::default())
            })?;
            by_move.add(told("QEMU", run));
        }
        if let Some(downtime) = downtime.filter(|_| wanted(STOP)) {
            let run = peers(&mut stage, Memory::Private, &client, |peer| {
                peer.stop_and_go_on(downtime)
            })?;
            by_stop.add(told("stop and cont", run));
        }
    }
    for _ in 0..bench.plan.runs {
        if wanted(CPR) {
            let run = peers(&mut stage, Memory::Shared, &client, Peer::replace_by_cpr)?;
            by_cpr.add(told("cpr-transfer", run));
        }
    }
    let qemu = stage.qemu();
    for (case, against, peer) in [
        (MOVE, "", &by_move),
        (STOP, ": stop and cont", &by_stop),
        (CPR, ": cpr-transfer", &by_cpr),
    ] {
        if wanted(case) {
            let against = format!("{qemu}{against}");
            let records = records(case, &against, &METRICS, &ours, peer);
            bench.records.extend(records);
        }
    }
    Ok(())
}

/// One run of the peer.
fn peers(
    stage: &mut Stage,
    memory: Memory,
    client: &str,
    act: impl FnOnce(&mut Peer) -> Result<Moved>,
) -> Result<Result<Run>> {
    let peer = &mut stage.pair(SIZE, memory)?.peer;
    settle(&peer.load, WORK)?;
    let echo = peer.guest().echo();
    Ok(watched(client, echo, || act(peer)))
}

/// One move with the probe on the guest.
fn watched(client: &str, echo: SocketAddr, migrate: impl FnOnce() -> Result<Moved>) -> Result<Run> {
    ensure!(
        probe::answers(client, echo, ANSWERS_WITHIN)?,
        "the echo at {echo} does not answer"
    );
    let probe = Probe::start(client, echo, RATE)?;
    std::thread::sleep(AROUND);
    let requested_us = now_us();
    let moved = migrate();
    std::thread::sleep(AROUND);
    // Also after a failed move: a probe that is not stopped goes on.
    let record = probe.stop()?;
    let moved = moved?;
    let at = Moments {
        requested_us,
        resumed_us: moved.stopped_at_unix_us + (moved.downtime_ms * 1e3) as u64,
    };
    let latency = latency(&record.round_trips(), at).context("the probe had no answer")?;
    Ok(vec![
        ("p50", latency.p50),
        ("p99", latency.p99),
        ("max", latency.max),
        ("p99 before", latency.p99_before),
        ("first answer", latency.first_answer),
        ("tail", latency.tail),
        ("lost", record.summary().lost as f64),
    ])
}
