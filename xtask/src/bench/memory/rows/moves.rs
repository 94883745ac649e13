//! Total time and downtime of a move: idle and writing guests, against QEMU's own pre-copy and multifd, plain and with TLS.

use anyhow::Result;

use super::Bench;
use crate::bench::figures::{Aim, Metric, Run, Samples, records};
use crate::bench::plan::told;
use crate::bench::stage::Moved;
use crate::bench::stage::Which;
use crate::bench::stage::load::Work;
use crate::bench::stage::peer::{How, Memory};
use crate::bench::stage::settle;

/// The guests' RAM in MiB.
const SIZES: [u32; 2] = [512, 2048];
/// Megabytes that the guest dirties in a second.
const RATES: [u64; 3] = [0, 20, 100];
/// QEMU's own ways, by their names in cases.
const WAYS: [(&str, How); 4] = [
    ("precopy", way(false, false)),
    ("precopy-tls", way(false, true)),
    ("multifd", way(true, false)),
    ("multifd-tls", way(true, true)),
];

const fn way(multifd: bool, tls: bool) -> How {
    How {
        multifd,
        tls,
        postcopy: false,
    }
}

const TOTAL: &str = "total";
const WITH_START: &str = "total with the destination's start";
const DOWNTIME: &str = "downtime";

const METRICS: [Metric; 3] = [
    Metric {
        name: TOTAL,
        unit: "ms",
        aims: &[Aim::RatioAtMost(0.5)],
    },
    // Ours begins with the start of the destination's VMM; QEMU's own total does not know of one.
    Metric {
        name: WITH_START,
        unit: "ms",
        aims: &[],
    },
    Metric {
        name: DOWNTIME,
        unit: "ms",
        aims: &[Aim::RatioAtMost(1.0), Aim::Below(12.0)],
    },
];

pub(super) fn cases(which: Which, quick: bool) -> Vec<String> {
    if quick {
        return vec![case(which, 512, 20, "precopy")];
    }
    let mut cases = Vec::new();
    for mib in SIZES {
        for rate in RATES {
            cases.extend(WAYS.map(|(name, _)| case(which, mib, rate, name)));
        }
    }
    cases
}

fn case(which: Which, mib: u32, rate: u64, way: &str) -> String {
    format!("move-{mib}-{rate}-{}-{way}", which.name())
}

pub(super) fn run(bench: &mut Bench<'_>, wanted: &[String]) -> Result<()> {
    let which = bench.stage.which();
    for mib in SIZES {
        for rate in RATES {
            let ways: Vec<(String, How)> = WAYS
                .iter()
                .map(|(name, how)| (case(which, mib, rate, name), *how))
                .filter(|(case, _)| wanted.contains(case))
                .collect();
            if !ways.is_empty() {
                measure(bench, mib, rate, &ways)?;
            }
        }
    }
    Ok(())
}

/// One run of ours, and one of each way of the peer, in turn.
fn measure(bench: &mut Bench<'_>, mib: u32, rate: u64, ways: &[(String, How)]) -> Result<()> {
    let work = Work::Dirty(rate * 1_000_000);
    let mut ours = Samples::default();
    let mut peers = vec![Samples::default(); ways.len()];
    for _ in 0..bench.plan.runs {
        let pair = bench.stage.pair(mib, Memory::Private)?;
        settle(&pair.ours.load, work)?;
        let moved = pair.ours.migrate(&[]);
        ours.add(told("ours", moved.map(|(moved, _)| figures(moved))));
        for ((case, how), samples) in ways.iter().zip(&mut peers) {
            let pair = bench.stage.pair(mib, Memory::Private)?;
            settle(&pair.peer.load, work)?;
            samples.add(told(case, pair.peer.migrate(*how).map(figures)));
        }
    }
    let against = bench.stage.qemu();
    for ((case, _), peer) in ways.iter().zip(&peers) {
        let records = records(case, &against, &METRICS, &ours, peer);
        bench.records.extend(records);
    }
    Ok(())
}

fn figures(moved: Moved) -> Run {
    vec![
        (TOTAL, moved.total_ms),
        (WITH_START, moved.total_ms + moved.start_ms),
        (DOWNTIME, moved.downtime_ms),
    ]
}
