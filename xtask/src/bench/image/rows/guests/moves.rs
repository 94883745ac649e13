//! What it costs to move a guest with a disk that it writes to: ours against `blockdev-mirror` over NBD, as libvirt does it.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};

use super::MIB;
use crate::bench::figures::{Aim, Metric, Run, Samples, records};
use crate::bench::image::rows::Bench;
use crate::bench::plan::told;
use crate::bench::stage::load::{Load, Work};
use crate::bench::stage::peer::Memory;
use crate::bench::stage::{Moved, Stage, settle};
use crate::process::poll_until;

/// What the guest is to write in a second.
const RATE: u64 = 20_000_000;
/// How long its rate is measured before the move.
const RATED: Duration = Duration::from_secs(2);
/// A guest that has arrived writes on within this.
const WRITES_WITHIN: Duration = Duration::from_secs(20);

const METRICS: [Metric; 4] = [
    Metric {
        name: "total",
        unit: "ms",
        aims: &[Aim::RatioAtMost(1.0)],
    },
    Metric {
        name: "total with the destination's start",
        unit: "ms",
        aims: &[],
    },
    Metric {
        name: "downtime",
        unit: "ms",
        aims: &[Aim::RatioAtMost(1.0)],
    },
    Metric {
        name: "written before the move",
        unit: "MB/s",
        aims: &[],
    },
];

pub(super) fn case(mib: u32) -> String {
    format!("mirror-{mib}")
}

pub(super) fn measure(bench: &mut Bench<'_>, stage: &mut Stage, disk_mib: u32) -> Result<()> {
    let (mut ours, mut peer) = (Samples::default(), Samples::default());
    for _ in 0..bench.plan.runs {
        let pair = stage.pair(MIB, Memory::Private)?;
        let rate = writes(&pair.ours.load)?;
        let moved = pair.ours.migrate(&[]).and_then(|(moved, _)| {
            writes_on(&pair.ours.load)?;
            Ok(figures(moved, rate))
        });
        ours.add(told("ours", moved));
        let pair = stage.pair(MIB, Memory::Private)?;
        let rate = writes(&pair.peer.load)?;
        let moved = pair.peer.migrate_with_disk().and_then(|moved| {
            writes_on(&pair.peer.load)?;
            Ok(figures(moved, rate))
        });
        peer.add(told("QEMU", moved));
    }
    let against = format!("{}, blockdev-mirror", stage.qemu());
    let records = records(&case(disk_mib), &against, &METRICS, &ours, &peer);
    bench.records.extend(records);
    Ok(())
}

/// Begins to write, and measures how fast: the emulator may be slower than what is asked for.
fn writes(load: &Load) -> Result<f64> {
    settle(load, Work::Disk(RATE))?;
    let (began, before) = (Instant::now(), load.report()?.disk_bytes);
    std::thread::sleep(RATED);
    let bytes = load.report()?.disk_bytes - before;
    Ok(bytes as f64 / 1e6 / began.elapsed().as_secs_f64())
}

/// The file takes writes where the guest is now; one that fails would have ended them.
fn writes_on(load: &Load) -> Result<()> {
    let before = load.report()?.disk_bytes;
    let more = RATE / 10;
    let goes_on = || {
        load.report()
            .is_ok_and(|now| now.disk_bytes > before + more)
    };
    ensure!(
        poll_until(WRITES_WITHIN, goes_on),
        "the guest no longer writes to its disk"
    );
    Ok(())
}

fn figures(moved: Moved, rate: f64) -> Run {
    vec![
        ("total", moved.total_ms),
        (
            "total with the destination's start",
            moved.total_ms + moved.start_ms,
        ),
        ("downtime", moved.downtime_ms),
        ("written before the move", rate),
    ]
}
