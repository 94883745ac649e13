//! How long the guest waits for a page during post-copy: the same program in both guests touches random pages and times each
//! touch; and what our own report says of its faults.

use anyhow::{Result, anyhow, ensure};

use super::Bench;
use crate::bench::figures::{Aim, Metric, Run, Samples, records};
use crate::bench::plan::told;
use crate::bench::stage::load::{Load, Work};
use crate::bench::stage::ours::{self, Faults};
use crate::bench::stage::peer::{How, Memory};
use crate::bench::stage::settle;

/// The guests' RAM in MiB: a small one is over before a thousand pages were waited for.
const SIZES: [u32; 2] = [512, 2048];
/// What was measured: by the guest, against QEMU; by our own report.
const TIMED: &str = "qemu10-preempt";
const REPORTED: &str = "report";

/// Nobody gets a page over a socket in less. One that is there is read in a microsecond, also under emulation, unless something
/// interrupts just then, which a few touches in 10,000 meet.
const FAULT_NS: u64 = 20_000;

const GUEST: [Metric; 4] = [
    metric("p50", &[Aim::RatioAtMost(1.0)]),
    metric("p99", &[Aim::RatioAtMost(1.0), Aim::Below(500.0)]),
    metric("p99.9", &[Aim::RatioAtMost(1.0)]),
    Metric {
        name: "faults",
        unit: "touches",
        aims: &[],
    },
];
const REPORT: [Metric; 4] = [
    metric("p50", &[]),
    metric("p99", &[Aim::Below(500.0)]),
    metric("p99.9", &[]),
    Metric {
        name: "faults",
        unit: "faults",
        aims: &[],
    },
];

const fn metric(name: &'static str, aims: &'static [Aim]) -> Metric {
    Metric {
        name,
        unit: "us",
        aims,
    }
}

pub(super) fn cases(quick: bool) -> Vec<String> {
    let sizes: &[u32] = if quick { &SIZES[..1] } else { &SIZES };
    let both = |mib: &u32| [case(*mib, TIMED), case(*mib, REPORTED)];
    sizes.iter().flat_map(both).collect()
}

fn case(mib: u32, what: &str) -> String {
    format!("fault-{mib}-{what}")
}

pub(super) fn run(bench: &mut Bench<'_>, wanted: &[String]) -> Result<()> {
    for mib in SIZES {
        let (timed, reported) = (case(mib, TIMED), case(mib, REPORTED));
        let timed = wanted.contains(&timed).then_some(timed);
        let reported = wanted.contains(&reported).then_some(reported);
        if timed.is_some() || reported.is_some() {
            measure(bench, mib, timed.as_deref(), reported.as_deref())?;
        }
    }
    Ok(())
}

fn measure(
    bench: &mut Bench<'_>,
    mib: u32,
    timed_case: Option<&str>,
    reported_case: Option<&str>,
) -> Result<()> {
    let can = ours::knows(bench.stage.lab(), "migrate", Some("--mode"));
    let start = || match can {
        true => Samples::default(),
        false => Samples::unavailable("this migrator's `migrate` has no --mode"),
    };
    let (mut timed, mut reported, mut peer) = (start(), start(), Samples::default());
    for _ in 0..bench.plan.runs {
        let pair = bench.stage.pair(mib, Memory::Private)?;
        if can {
            begin(&pair.ours.load)?;
            let moved = pair.ours.migrate(&["--mode", "postcopy"]);
            let (guest, report) = match moved {
                Ok((_, faults)) => (by_guest(&pair.ours.load), by_report(faults)),
                Err(error) => (Err(anyhow!("{error:#}")), Err(error)),
            };
            timed.add(told("ours", guest));
            reported.add(told("our report", report));
        }
        if timed_case.is_some() {
            let pair = bench.stage.pair(mib, Memory::Private)?;
            begin(&pair.peer.load)?;
            let moved = pair.peer.migrate(How {
                postcopy: true,
                ..How::default()
            });
            let guest = moved.and_then(|_| by_guest(&pair.peer.load));
            peer.add(told("QEMU", guest));
        }
    }
    if let Some(case) = timed_case {
        let records = records(case, &bench.stage.qemu(), &GUEST, &timed, &peer);
        bench.records.extend(records);
    }
    if let Some(case) = reported_case {
        let none = Samples::unavailable("it has no latencies before 10.1");
        let records = records(case, "QEMU's report", &REPORT, &reported, &none);
        bench.records.extend(records);
    }
    Ok(())
}

/// Begins to touch, and begins the histogram anew: what came before were pages that are there.
fn begin(load: &Load) -> Result<()> {
    settle(load, Work::Touch)?;
    load.set(Work::Touch).map(drop)
}

fn by_report(faults: Option<Faults>) -> Result<Run> {
    let Some(faults) = faults else {
        anyhow::bail!("the migration's report has no memory.faults");
    };
    Ok(vec![
        ("p50", faults.p50_us),
        ("p99", faults.p99_us),
        ("p99.9", faults.p999_us),
        ("faults", faults.count as f64),
    ])
}

fn by_guest(load: &Load) -> Result<Run> {
    let touches = load.report()?.touches_ns;
    let faults: Vec<(u64, u64)> = touches
        .into_iter()
        .filter(|(upper_ns, _)| *upper_ns >= FAULT_NS)
        .collect();
    let count: u64 = faults.iter().map(|(_, count)| count).sum();
    ensure!(count > 0, "the guest waited for no page");
    let us = |per_mille| percentile(&faults, per_mille) as f64 / 1e3;
    Ok(vec![
        ("p50", us(500)),
        ("p99", us(990)),
        ("p99.9", us(999)),
        ("faults", count as f64),
    ])
}

/// The upper bound of the bucket that so many of a thousand are at or below (nearest rank); 0 of an empty histogram.
fn percentile(histogram: &[(u64, u64)], per_mille: u64) -> u64 {
    let count: u64 = histogram.iter().map(|(_, count)| count).sum();
    let rank = (count * per_mille).div_ceil(1000).max(1);
    let mut seen = 0;
    histogram
        .iter()
        .find(|(_, count)| {
            seen += count;
            seen >= rank
        })
        .map_or(0, |(upper, _)| *upper)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_those_of_the_ranks() {
        let histogram = [(10, 50), (20, 49), (900, 1)];
        let of = |per_mille| percentile(&histogram, per_mille);
        assert_eq!((of(500), of(501), of(990), of(999)), (10, 20, 20, 900));
        assert_eq!(percentile(&[(7, 1)], 500), 7);
        assert_eq!(percentile(&[], 500), 0);
    }
}
