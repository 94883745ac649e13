//! A new VMM under a running guest: `migrator upgrade`, against QEMU's own ways with a file and with cpr-transfer.

use anyhow::Result;

use super::Bench;
use crate::bench::figures::{Aim, Metric, Run, Samples, records};
use crate::bench::plan::told;
use crate::bench::stage::Moved;
use crate::bench::stage::load::Work;
use crate::bench::stage::ours;
use crate::bench::stage::peer::{Memory, Peer};
use crate::bench::stage::settle;

/// The guests' RAM in MiB.
const SIZES: [u32; 2] = [512, 2048];
/// The guest writes meanwhile, so that one that was not kept whole shows.
const WORK: Work = Work::Dirty(20_000_000);

/// QEMU's ways, with the guest RAM that each needs.
const WAYS: [(&str, Memory, Way); 2] = [
    ("file", Memory::Private, Peer::replace_by_file),
    ("cpr", Memory::Shared, Peer::replace_by_cpr),
];

type Way = fn(&mut Peer) -> Result<Moved>;

const DOWNTIME: Metric = Metric {
    name: "downtime",
    unit: "ms",
    aims: &[Aim::RatioAtMost(1.0), Aim::Below(50.0)],
};
/// A quarter is left for what else happens on the machine.
const GROWTH: Metric = Metric {
    name: "downtime at 2048 MiB by that at 512 MiB",
    unit: "x",
    aims: &[Aim::Below(1.25)],
};

pub(super) fn cases(quick: bool) -> Vec<String> {
    if quick {
        return vec![case(SIZES[0], "file")];
    }
    let mut cases = Vec::new();
    for (way, ..) in WAYS {
        cases.extend(SIZES.map(|mib| case(mib, way)));
    }
    cases
}

fn case(mib: u32, way: &str) -> String {
    format!("replace-{mib}-qemu10-{way}")
}

pub(super) fn run(bench: &mut Bench<'_>, wanted: &[String]) -> Result<()> {
    for (name, memory, way) in WAYS {
        let mut by_size = Vec::new();
        for mib in SIZES {
            let case = case(mib, name);
            if wanted.contains(&case) {
                by_size.push(measure(bench, &case, mib, memory, way)?);
            }
        }
        if let [small, large] = by_size.as_slice() {
            let case = format!("replace-growth-qemu10-{name}");
            let (ours, peer) = (growth(&small.0, &large.0), growth(&small.1, &large.1));
            let records = records(&case, &bench.stage.qemu(), &[GROWTH], &ours, &peer);
            bench.records.extend(records);
        }
    }
    Ok(())
}

/// Ours and the peer's.
fn measure(
    bench: &mut Bench<'_>,
    case: &str,
    mib: u32,
    memory: Memory,
    way: Way,
) -> Result<(Samples, Samples)> {
    let can = ours::knows(bench.stage.lab(), "upgrade", None);
    let mut ours = match can {
        true => Samples::default(),
        false => Samples::unavailable("this migrator has no verb `upgrade`"),
    };
    let mut peer = Samples::default();
    for _ in 0..bench.plan.runs {
        let pair = bench.stage.pair(mib, memory)?;
        if can {
            settle(&pair.ours.load, WORK)?;
            ours.add(told("ours", pair.ours.upgrade().map(figures)));
        }
        let pair = bench.stage.pair(mib, memory)?;
        settle(&pair.peer.load, WORK)?;
        let moved = way(&mut pair.peer);
        peer.add(told("QEMU", moved.map(|moved| figures(moved.downtime_ms))));
    }
    let records = records(case, &bench.stage.qemu(), &[DOWNTIME], &ours, &peer);
    bench.records.extend(records);
    Ok((ours, peer))
}

fn figures(downtime_ms: f64) -> Run {
    vec![(DOWNTIME.name, downtime_ms)]
}

/// One figure of medians: the large guest's by the small one's.
fn growth(small: &Samples, large: &Samples) -> Samples {
    let medians = small.of(DOWNTIME.name).zip(large.of(DOWNTIME.name));
    match medians {
        Some((small, large)) => {
            let mut samples = Samples::default();
            samples.add(Ok(vec![(GROWTH.name, large.median / small.median)]));
            samples
        }
        None => Samples::unavailable("a size has no figure"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn growth_is_a_ratio_of_medians() {
        let samples = |figures_ms: &[f64]| {
            let mut samples = Samples::default();
            figures_ms
                .iter()
                .for_each(|ms| samples.add(Ok(figures(*ms))));
            samples
        };
        let grown = growth(&samples(&[10.0, 20.0, 90.0]), &samples(&[30.0]));
        assert_eq!(grown.of(GROWTH.name).unwrap().median, 1.5);
        assert_eq!(
            growth(&samples(&[]), &samples(&[30.0])).of(GROWTH.name),
            None
        );
    }
}
