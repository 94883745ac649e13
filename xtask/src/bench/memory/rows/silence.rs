//! What a client sees of a move: the longest silence, and packets without an answer, at 5,000 packets a second.

use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Result, ensure};

use super::Bench;
use crate::bench::figures::{Aim, Metric, Run, Samples, records};
use crate::bench::plan::told;
use crate::bench::stage::Moved;
use crate::bench::stage::load::Work;
use crate::bench::stage::peer::{How, Memory};
use crate::bench::stage::settle;
use crate::probe::{self, Probe};

/// Packets a second.
const RATE: u32 = 5_000;
/// The guests' RAM in MiB.
const SIZE: u32 = 512;
/// Megabytes that the guest dirties in a second.
const RATES: [u64; 3] = [0, 20, 100];
/// Of traffic before a move.
const BEFORE: Duration = Duration::from_millis(300);
/// Of traffic after it: the first of QEMU's five announcements go out at once, after 50, and after 200 ms.
const AFTER: Duration = Duration::from_millis(700);
/// An echo that is up answers at once.
const ANSWERS_WITHIN: Duration = Duration::from_secs(15);

const METRICS: [Metric; 3] = [
    Metric {
        name: "silence",
        unit: "ms",
        aims: &[Aim::RatioAtMost(1.0)],
    },
    Metric {
        name: "lost",
        unit: "packets",
        aims: &[Aim::Zero],
    },
    // Not the move's doing: a guest that cannot keep up, and a case that says nothing.
    Metric {
        name: "lost before the move",
        unit: "packets",
        aims: &[],
    },
];

/// A packet that left this long before the stop was not waiting when it came.
const LEAD_US: u64 = 200_000;

pub(super) fn cases(quick: bool) -> Vec<String> {
    let rates: &[u64] = if quick { &[20] } else { &RATES };
    rates.iter().map(|rate| case(*rate)).collect()
}

fn case(rate: u64) -> String {
    format!("silence-{SIZE}-{rate}-qemu10-precopy")
}

pub(super) fn run(bench: &mut Bench<'_>, wanted: &[String]) -> Result<()> {
    for rate in RATES {
        let case = case(rate);
        if wanted.contains(&case) {
            measure(bench, rate, &case)?;
        }
    }
    Ok(())
}

fn measure(bench: &mut Bench<'_>, rate: u64, case: &str) -> Result<()> {
    let work = Work::Dirty(rate * 1_000_000);
    let client = bench.stage.lab().client();
    let (mut ours, mut peer) = (Samples::default(), Samples::default());
    for _ in 0..bench.plan.runs {
        let pair = bench.stage.pair(SIZE, Memory::Private)?;
        settle(&pair.ours.load, work)?;
        let echo = pair.ours.guest().echo();
        let run = watched(&client, echo, || {
            pair.ours.migrate(&[]).map(|(moved, _)| moved)
        });
        ours.add(told("ours", run));
        let pair = bench.stage.pair(SIZE, Memory::Private)?;
        settle(&pair.peer.load, work)?;
        let echo = pair.peer.guest().echo();
        peer.add(watched(&client, echo, || pair.peer.migrate(How::default())));
    }
    let records = records(case, &bench.stage.qemu(), &METRICS, &ours, &peer);
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
    std::thread::sleep(BEFORE);
    let moved = migrate();
    std::thread::sleep(AFTER);
    // Also after a failed move: a probe that is not stopped goes on.
    let record = probe.stop()?;
    let moved = moved?;
    let summary = record.summary();
    ensure!(summary.received > 0, "the probe had no answer");
    Ok(vec![
        ("silence", record.blackout_ms(moved.stopped_at_unix_us)),
        ("lost", summary.lost as f64),
        (
            "lost before the move",
            record.lost_before(moved.stopped_at_unix_us.saturating_sub(LEAD_US)) as f64,
        ),
    ])
}
