//! What a client sees of moves by time: the echo's round trips a second before, during, and a second after.

use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use super::Bench;
use crate::bench::figures::{Aim, Metric, Run, Samples, records};
use crate::bench::network::tail::{AROUND_US, Moments, latency};
use crate::bench::plan::told;
use crate::bench::stage::load::Work;
use crate::bench::stage::peer::{How, Memory};
use crate::bench::stage::{Moved, Stage, Which, settle};
use crate::probe::{self, Probe, now_us};

const CASE: &str = "latency-switchover";
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

const METRICS: [Metric; 6] = [
    Metric {
        name: "p50",
        unit: "ms",
        aims: &[],
    },
    Metric {
        name: "p99",
        unit: "ms",
        aims: &[],
    },
    Metric {
        name: "max",
        unit: "ms",
        aims: &[],
    },
    Metric {
        name: "p99 before",
        unit: "ms",
        aims: &[],
    },
    Metric {
        name: "tail",
        unit: "ms",
        aims: &[Aim::Zero],
    },
    Metric {
        name: "lost",
        unit: "packets",
        aims: &[Aim::Zero],
    },
];

pub(super) fn cases() -> Vec<String> {
    vec![CASE.to_owned()]
}

pub(super) fn run(bench: &mut Bench<'_>, _wanted: &[String]) -> Result<()> {
    let mut stage = Stage::up(bench.project, Which::Ten)?;
    let client = stage.lab().client();
    let (mut ours, mut peer) = (Samples::default(), Samples::default());
    for _ in 0..bench.plan.runs {
        let pair = stage.pair(SIZE, Memory::Private)?;
        settle(&pair.ours.load, WORK)?;
        let echo = pair.ours.guest().echo();
        let run = watched(&client, echo, || {
            pair.ours.migrate(&[]).map(|(moved, _)| moved)
        });
        ours.add(told("ours", run));
        let pair = stage.pair(SIZE, Memory::Private)?;
        settle(&pair.peer.load, WORK)?;
        let echo = pair.peer.guest().echo();
        let run = watched(&client, echo, || pair.peer.migrate(How::default()));
        peer.add(told("QEMU", run));
    }
    let records = records(CASE, &stage.qemu(), &METRICS, &ours, &peer);
    bench.records.extend(records);
    Ok(())
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
        ("tail", latency.tail),
        ("lost", record.summary().lost as f64),
    ])
}
