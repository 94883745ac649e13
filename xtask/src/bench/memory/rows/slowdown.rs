//! What tracking and copying cost the guest: loops of CPU and memory work a second during a pre-copy, as a share of the same
//! guest's loops just before.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};

use super::Bench;
use crate::bench::figures::{Aim, Metric, Run, Samples, records};
use crate::bench::plan::told;
use crate::bench::stage::load::{Load, Work};
use crate::bench::stage::peer::Memory;
use crate::bench::stage::settle;

/// The guests' RAM in MiB.
const SIZE: u32 = 512;
/// The limit of both sides: at it, the first pass takes some seconds, and rounds follow while the loop goes on writing.
const BYTES_PER_S: u64 = 100_000_000;
/// How long loops are counted, before and during.
const WINDOW: Duration = Duration::from_secs(5);
const QUICK_WINDOW: Duration = Duration::from_secs(1);

const AGAINST_QEMU: &str = "slowdown-512-qemu10-precopy";
const AGAINST_NOTHING: &str = "slowdown-512-unmigrated";

const SHARE: Metric = Metric {
    name: "share of the unmigrated rate",
    unit: "%",
    aims: &[Aim::RatioAtLeast(1.0)],
};
const LOOPS: Metric = Metric {
    name: "loops",
    unit: "1/s",
    aims: &[],
};

pub(super) fn cases(_quick: bool) -> Vec<String> {
    vec![AGAINST_QEMU.to_owned(), AGAINST_NOTHING.to_owned()]
}

pub(super) fn run(bench: &mut Bench<'_>, wanted: &[String]) -> Result<()> {
    let window = if bench.plan.quick {
        QUICK_WINDOW
    } else {
        WINDOW
    };
    let wants = |case: &str| wanted.iter().any(|wanted| wanted == case);
    let (mut ours, mut peer) = (Samples::default(), Samples::default());
    let mut unmigrated = Samples::default();
    for _ in 0..bench.plan.runs {
        let pair = bench.stage.pair(SIZE, Memory::Private)?;
        settle(&pair.ours.load, Work::Spin)?;
        let before = loops_per_s(&pair.ours.load, window)?;
        unmigrated.add(Ok(vec![(LOOPS.name, before)]));
        let during = pair
            .ours
            .while_copied(BYTES_PER_S, |load| loops_per_s(load, window));
        ours.add(told("ours", during.map(|during| figures(before, during))));
        if !wants(AGAINST_QEMU) {
            continue;
        }
        let pair = bench.stage.pair(SIZE, Memory::Private)?;
        settle(&pair.peer.load, Work::Spin)?;
        let before = loops_per_s(&pair.peer.load, window)?;
        let during = pair
            .peer
            .while_copied(BYTES_PER_S, |load| loops_per_s(load, window));
        peer.add(told("QEMU", during.map(|during| figures(before, during))));
    }
    if wants(AGAINST_QEMU) {
        let qemu = bench.stage.qemu();
        let records = records(AGAINST_QEMU, &qemu, &[SHARE], &ours, &peer);
        bench.records.extend(records);
    }
    if wants(AGAINST_NOTHING) {
        let against = "the same guest, unmigrated";
        let records = records(AGAINST_NOTHING, against, &[LOOPS], &ours, &unmigrated);
        bench.records.extend(records);
    }
    Ok(())
}

fn figures(before: f64, during: f64) -> Run {
    vec![(SHARE.name, during / before * 100.0), (LOOPS.name, during)]
}

/// Counts by the host's clock: the guest's own stands still when the guest does.
fn loops_per_s(load: &Load, window: Duration) -> Result<f64> {
    let first = load.report()?;
    let begun = Instant::now();
    std::thread::sleep(window);
    let last = load.report()?;
    let loops = last.loops.saturating_sub(first.loops);
    ensure!(loops > 0, "the guest has not looped in {window:?}");
    Ok(loops as f64 / begun.elapsed().as_secs_f64())
}
