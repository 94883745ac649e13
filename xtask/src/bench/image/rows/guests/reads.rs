//! How fast a guest reads its disk: through the block server, against QEMU's raw driver on a file of the same content.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};

use super::MIB;
use crate::bench::figures::{Aim, Metric, Run, Samples, records};
use crate::bench::image::rows::Bench;
use crate::bench::plan::told;
use crate::bench::stage::load::{Load, Work};
use crate::bench::stage::peer::Memory;
use crate::bench::stage::{Stage, settle};

/// One request at a time, past the guest's page cache.
const KINDS: [(&str, Work); 3] = [
    ("disk-guest-read-1m", Work::Scan(1 << 20)),
    ("disk-guest-read-64k", Work::Scan(64 << 10)),
    ("disk-guest-read-random-4k", Work::Pick(4 << 10)),
];
/// How long a run lasts.
const RUN: Duration = Duration::from_secs(3);

const RATE: Metric = Metric {
    name: "rate",
    unit: "MB/s",
    aims: &[Aim::RatioAtLeast(0.8)],
};

pub(super) fn cases() -> Vec<String> {
    KINDS.iter().map(|(name, _)| (*name).to_owned()).collect()
}

pub(super) fn measure(bench: &mut Bench<'_>, stage: &mut Stage, wanted: &[String]) -> Result<()> {
    for (case, work) in KINDS {
        if !wanted.iter().any(|wanted| wanted == case) {
            continue;
        }
        let (mut ours, mut peer) = (Samples::default(), Samples::default());
        for _ in 0..bench.plan.runs {
            let pair = stage.pair(MIB, Memory::Private)?;
            ours.add(told("ours", once(&pair.ours.load, work)));
            peer.add(told("QEMU's raw file driver", once(&pair.peer.load, work)));
        }
        let against = format!("{}, raw file driver", stage.qemu());
        bench
            .records
            .extend(records(case, &against, &[RATE], &ours, &peer));
    }
    Ok(())
}

fn once(load: &Load, work: Work) -> Result<Run> {
    settle(load, work)?;
    let (began, before) = (Instant::now(), load.report()?.disk_bytes);
    std::thread::sleep(RUN);
    let (bytes, took) = (load.report()?.disk_bytes - before, began.elapsed());
    load.set(Work::Idle)?;
    ensure!(bytes > 0, "the guest reads nothing");
    Ok(vec![("rate", bytes as f64 / 1e6 / took.as_secs_f64())])
}
