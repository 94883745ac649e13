//! Rows of `packet-path`: an idle gate, a hold with its rollback, a flip, the uplink's two ways, late frames that are sent on.

use anyhow::{Context, Result};

use super::Bench;
use crate::bench::figures::{Aim, Metric, Samples, records};
use crate::bench::network::program::{self, Call};

/// One of the program's measurements.
struct Path {
    /// Its name in cases.
    name: &'static str,
    /// The same for the program, and what follows it.
    words: &'static [&'static str],
    /// Which frames, in cases and for the program; none where there is no choice.
    frames: &'static [&'static str],
    /// What the peer is.
    against: &'static str,
    /// Why there is no figure of it, if there is none.
    no_peer: Option<&'static str>,
    metrics: &'static [Metric],
}

const GATE_IDLE: Path = Path {
    name: "gate-idle",
    words: &["gate-idle"],
    frames: &["64", "1400"],
    against: "the same path without the programs",
    no_peer: None,
    metrics: &[
        metric("rate", "packets/s", &[Aim::RatioAtLeast(0.97)]),
        metric("CPU time", "ns/packet", &[Aim::RatioAtMost(1.03)]),
        // Ours alone: without a program there is nothing to count.
        metric("program", "ns/packet", &[]),
    ],
};

const HOLD: &[Metric] = &[
    metric("lost", "frames", &[Aim::Zero]),
    metric("doubled or overtaken", "frames", &[Aim::Zero]),
    metric("offered", "frames/s", &[]),
    metric("parked", "frames", &[]),
    metric("drain rate", "frames/s", &[]),
];

const PARK_INJECT: Path = Path {
    name: "park-inject",
    words: &["park-inject"],
    frames: &["64", "1400", "gso"],
    against: "AF_PACKET receive and send",
    no_peer: None,
    metrics: HOLD,
};

/// Segments that are not cut yet are no frames that XDP sees.
const PARK_INJECT_XDP: Path = Path {
    name: "park-inject-xdp",
    words: &["park-inject", "--sockets", "xdp"],
    frames: &["64", "1400"],
    against: "AF_XDP receive and send",
    no_peer: None,
    metrics: HOLD,
};

const FLIP: Path = Path {
    name: "flip",
    words: &["flip"],
    frames: &[],
    against: "published figures",
    no_peer: Some("nobody publishes this step alone; docs/benchmarks.md has what is published"),
    metrics: &[
        metric("store to the first parked", "us", &[Aim::Below(100.0)]),
        metric("slowest of a run", "us", &[Aim::Below(100.0)]),
        metric("the call of hold", "us", &[]),
    ],
};

const XDP_UPLINK: Path = Path {
    name: "xdp-uplink",
    words: &["xdp-uplink"],
    frames: &[],
    against: "the bridge and the gate",
    no_peer: None,
    metrics: &[
        metric("rate", "packets/s", &[Aim::RatioAtLeast(2.0)]),
        metric("CPU time", "ns/packet", &[Aim::RatioAtMost(0.5)]),
    ],
};

const FORWARD_VXLAN: Path = Path {
    name: "forward-vxlan",
    words: &["forward-vxlan"],
    frames: &[],
    against: "a bridge and the kernel's VXLAN",
    no_peer: None,
    metrics: &[
        metric("rate", "packets/s", &[Aim::RatioAtLeast(1.0)]),
        metric("CPU time", "ns/packet", &[Aim::RatioAtMost(1.0)]),
    ],
};

const FORWARD_GATE: Path = Path {
    name: "forward-gate",
    words: &["forward-gate"],
    against: "our gate and the kernel's VXLAN",
    ..FORWARD_VXLAN
};

const FORWARD_ROUTE: Path = Path {
    name: "forward-route",
    words: &["forward-route"],
    frames: &[],
    against: "Linux routing, without a tunnel",
    no_peer: None,
    // By the clock it is mostly the kernel's own preparing of frames: see docs/benchmarks.md.
    metrics: &[metric("CPU time", "ns/packet", &[Aim::RatioAtMost(1.0)])],
};

const PATHS: [Path; 8] = [
    GATE_IDLE,
    PARK_INJECT,
    PARK_INJECT_XDP,
    FLIP,
    XDP_UPLINK,
    FORWARD_VXLAN,
    FORWARD_GATE,
    FORWARD_ROUTE,
];

const fn metric(name: &'static str, unit: &'static str, aims: &'static [Aim]) -> Metric {
    Metric { name, unit, aims }
}

impl Path {
    fn cases(&self, quick: bool) -> Vec<String> {
        if self.frames.is_empty() {
            return vec![self.name.to_owned()];
        }
        let frames = if quick {
            &self.frames[..1]
        } else {
            self.frames
        };
        frames
            .iter()
            .map(|frames| format!("{}-{frames}", self.name))
            .collect()
    }

    /// The frames of a case of this row; none if it is another's.
    fn frames_of(&self, case: &str) -> Option<Option<&'static str>> {
        if self.frames.is_empty() {
            return (case == self.name).then_some(None);
        }
        let wanted = case.strip_prefix(self.name)?.strip_prefix('-')?;
        let frames = self.frames.iter().find(|frames| **frames == wanted)?;
        Some(Some(frames))
    }
}

pub(super) fn gate_idle(quick: bool) -> Vec<String> {
    GATE_IDLE.cases(quick)
}

pub(super) fn park_inject(quick: bool) -> Vec<String> {
    let mut cases = PARK_INJECT.cases(quick);
    if !quick {
        cases.extend(PARK_INJECT_XDP.cases(quick));
    }
    cases
}

pub(super) fn flip() -> Vec<String> {
    FLIP.cases(false)
}

pub(super) fn xdp_uplink() -> Vec<String> {
    XDP_UPLINK.cases(false)
}

pub(super) fn forward(quick: bool) -> Vec<String> {
    let mut cases = FORWARD_VXLAN.cases(quick);
    if !quick {
        cases.extend(FORWARD_GATE.cases(quick));
        cases.extend(FORWARD_ROUTE.cases(quick));
    }
    cases
}

pub(super) fn run(bench: &mut Bench<'_>, wanted: &[String]) -> Result<()> {
    for case in wanted {
        let (path, frames) = PATHS
            .iter()
            .find_map(|path| Some((path, path.frames_of(case)?)))
            .with_context(|| format!("{case} is no case of this row"))?;
        let call = Call {
            words: path.words,
            frames,
            runs: bench.plan.runs,
            quick: bench.plan.quick,
        };
        let (ours, mut peer) = program::run(bench.project, &call, path.metrics)?;
        if let Some(reason) = path.no_peer {
            peer = Samples::unavailable(reason);
        }
        let records = records(case, path.against, path.metrics, &ours, &peer);
        bench.records.extend(records);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_case_belongs_to_one_row_and_names_its_frames() {
        for path in &PATHS {
            for case in path.cases(false) {
                let owners = PATHS.iter().filter(|path| path.frames_of(&case).is_some());
                assert_eq!(owners.count(), 1, "{case}");
            }
        }
        assert_eq!(PARK_INJECT.frames_of("park-inject-gso"), Some(Some("gso")));
        assert_eq!(PARK_INJECT.frames_of("park-inject"), None);
        assert_eq!(FLIP.frames_of("flip"), Some(None));
    }
}
