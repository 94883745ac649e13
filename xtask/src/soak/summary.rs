//! What a soak test has found: its moves, its faults, and the figures of each mode. Pure.

use serde::Serialize;

use super::Mode;
use crate::report::{Faults, MigrationReport, Outcome};
use crate::silence::{self, Spread, spread};

/// One move.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Move {
    /// From 1.
    pub number: u32,
    /// What was asked for.
    pub mode: Mode,
    /// What the service says that it did.
    pub reported_mode: String,
    /// Source node.
    pub from: String,
    /// Destination node.
    pub to: String,
    /// From the request to the release of the source's VM.
    pub total_ms: f64,
    /// From the source's stop to the destination's resume.
    pub downtime_ms: f64,
    /// Longest silence that the probe saw around the switchover; known at the end.
    pub blackout_ms: f64,
    /// Unix time of the freeze, in microseconds.
    pub frozen_at_unix_us: u64,
    /// Rounds of the memory.
    pub rounds: u32,
    /// Page bytes sent.
    pub bytes_sent: u64,
    /// What the guest waited for after its resume; absent if it lacked nothing.
    pub waits: Option<Faults>,
}

impl Move {
    /// From a report.
    pub fn new(number: u32, mode: Mode, report: &MigrationReport) -> Self {
        Self {
            number,
            mode,
            reported_mode: report.mode.clone(),
            from: report.from.clone(),
            to: report.to.clone(),
            total_ms: report.total_ms,
            downtime_ms: report.downtime_ms,
            blackout_ms: 0.0,
            frozen_at_unix_us: report.frozen_at_unix_us,
            rounds: report.memory.rounds,
            bytes_sent: report.memory.bytes_sent,
            waits: report.memory.faults,
        }
    }

    /// For people, on one line.
    pub fn line(&self) -> String {
        let line = format!(
            "move {:>4} {:<8} {} -> {}  total {:>6.0} ms, downtime {:>6.1} ms, {:>2} rounds, {:>6.1} MiB",
            self.number,
            self.mode.name(),
            self.from,
            self.to,
            self.total_ms,
            self.downtime_ms,
            self.rounds,
            self.bytes_sent as f64 / 1_048_576.0
        );
        match self.waits {
            None => line,
            Some(waits) => format!(
                "{line}, {} pages late, {} waits: p50 {} us, p99 {} us",
                waits.missing, waits.count, waits.p50_us, waits.p99_us
            ),
        }
    }
}

/// What a report says that must not be; empty if there is nothing.
pub fn defects(report: &MigrationReport) -> Vec<String> {
    let mut defects = Vec::new();
    match &report.outcome {
        Outcome::Completed => {}
        Outcome::Refused(reason) => defects.push(format!("refused: {reason}")),
        Outcome::Failed(reason) => defects.push(format!("failed: {reason}")),
    }
    for (count, what) in [
        (report.packets.lost, "packets lost"),
        (report.packets.held, "packets still held"),
        (report.memory.mismatched, "pages differ"),
        (
            report.memory.faults.map_or(0, |faults| faults.mismatched),
            "late pages differ",
        ),
    ] {
        if count > 0 {
            defects.push(format!("the report has {count} {what}"));
        }
    }
    defects
}

/// Something that must not be, and where.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Fault {
    /// The move that it was seen after; 0 before the first.
    #[serde(rename = "move")]
    pub number: u32,
    /// The move's mode.
    pub mode: Option<Mode>,
    /// What was seen.
    pub what: String,
}

/// The moves of one mode.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct ModeFigures {
    /// The mode.
    pub mode: Mode,
    /// How many moves.
    pub moves: usize,
    /// Their downtimes.
    pub downtime_ms: Option<Spread>,
    /// Longest silences around their switchovers.
    pub blackout_ms: Option<Spread>,
    /// Their totals.
    pub total_ms: Option<Spread>,
}

/// The whole run.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Summary {
    /// How long it took, from the first move.
    pub seconds: f64,
    /// By mode, those that were used.
    pub modes: Vec<ModeFigures>,
    /// Blocks that the workload compared.
    pub verified_blocks: u64,
    /// Blocks that it rewrote.
    pub rewritten_blocks: u64,
    /// How often all of its memory was compared.
    pub full_checks: u32,
    /// TCP connections, open from the beginning to the end.
    pub connections: usize,
    /// Messages that were answered on them.
    pub messages: u64,
    /// The UDP probe.
    pub probe: silence::Summary,
    /// What went wrong; empty if nothing did.
    pub faults: Vec<Fault>,
    /// Every move that was made.
    pub moves: Vec<Move>,
}

/// Figures by mode, in the order in which the modes are declared.
pub fn by_mode(moves: &[Move]) -> Vec<ModeFigures> {
    let figures = |mode| {
        let of = |figure: fn(&Move) -> f64| {
            let list = moves.iter().filter(|m| m.mode == mode).map(figure);
            list.collect::<Vec<f64>>()
        };
        let downtimes = of(|m| m.downtime_ms);
        ModeFigures {
            mode,
            moves: downtimes.len(),
            downtime_ms: spread(&downtimes),
            blackout_ms: spread(&of(|m| m.blackout_ms)),
            total_ms: spread(&of(|m| m.total_ms)),
        }
    };
    let all = Mode::ALL.into_iter().map(figures);
    all.filter(|figures| figures.moves > 0).collect()
}

impl Summary {
    /// The closing lines; the last of them says whether all was well.
    pub fn text(&self) -> String {
        let mut text = String::from(
            "                             downtime ms                blackout ms   total ms\n\
             mode      moves       min  median     max        min  median     max     median\n",
        );
        let three = |spread: Option<Spread>| match spread {
            Some(spread) => format!(
                "{:>7.1} {:>7.1} {:>7.1}",
                spread.min, spread.median, spread.max
            ),
            None => String::new(),
        };
        for figures in &self.modes {
            text += &format!(
                "{:<8} {:>6}   {}    {}    {:>7.0}\n",
                figures.mode.name(),
                figures.moves,
                three(figures.downtime_ms),
                three(figures.blackout_ms),
                figures.total_ms.map_or(0.0, |spread| spread.median)
            );
        }
        let probe = &self.probe;
        text += &format!(
            "memory    {} blocks compared, {} rewritten, {} times all of it\n\
             TCP       {} connections, {} messages answered\n\
             UDP       {} packets, {} lost, {} doubled, {} out of order\n",
            self.verified_blocks,
            self.rewritten_blocks,
            self.full_checks,
            self.connections,
            self.messages,
            probe.sent,
            probe.lost,
            probe.duplicated,
            probe.reordered
        );
        for fault in &self.faults {
            let mode = fault.mode.map_or("", Mode::name);
            text += &format!(
                "FAULT     after move {} {mode}: {}\n",
                fault.number, fault.what
            );
        }
        text += &format!(
            "{}: {} moves in {:.0} s, {} faults\n",
            if self.faults.is_empty() {
                "OK"
            } else {
                "FAILED"
            },
            self.moves.len(),
            self.seconds,
            self.faults.len()
        );
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::{Memory, Packets};

    fn report() -> MigrationReport {
        MigrationReport {
            pod: "soak".into(),
            from: "a".into(),
            to: "b".into(),
            mode: "precopy".into(),
            outcome: Outcome::Completed,
            total_ms: 600.0,
            downtime_ms: 20.0,
            frozen_at_unix_us: 1,
            memory: Memory::default(),
            packets: Packets::default(),
            phases: Vec::new(),
        }
    }

    fn changed_faults(faults: Option<Faults>) -> MigrationReport {
        let mut changed = report();
        changed.memory.faults = faults;
        changed
    }

    #[test]
    fn each_defect_of_a_report_is_named() {
        assert_eq!(defects(&report()), [""; 0]);
        let wrong = Faults {
            mismatched: 3,
            ..Faults::default()
        };
        assert_eq!(defects(&changed_faults(Some(Faults::default()))), [""; 0]);
        assert_eq!(defects(&changed_faults(Some(wrong))).len(), 1);
        let changes: [fn(&mut MigrationReport); 5] = [
            |r| r.outcome = Outcome::Failed("link".into()),
            |r| r.outcome = Outcome::Refused("full".into()),
            |r| r.packets.lost = 3,
            |r| r.packets.held = 3,
            |r| r.memory.mismatched = 3,
        ];
        for change in changes {
            let mut changed = report();
            change(&mut changed);
            assert_eq!(defects(&changed).len(), 1, "{changed:?}");
        }
    }

    #[test]
    fn figures_are_those_of_their_mode_only() {
        let of = |number, mode, downtime_ms| Move {
            downtime_ms,
            ..Move::new(number, mode, &report())
        };
        let moves = [
            of(1, Mode::Auto, 9.0),
            of(2, Mode::Precopy, 1.0),
            of(3, Mode::Auto, 5.0),
        ];
        let figures = by_mode(&moves);
        let short: Vec<_> = figures
            .iter()
            .map(|f| (f.mode, f.moves, f.downtime_ms.unwrap().max))
            .collect();
        assert_eq!(short, [(Mode::Precopy, 1, 1.0), (Mode::Auto, 2, 9.0)]);
    }

    #[test]
    fn the_last_line_tells_of_any_fault() {
        let mut summary = Summary {
            seconds: 1.0,
            modes: Vec::new(),
            verified_blocks: 0,
            rewritten_blocks: 0,
            full_checks: 0,
            connections: 0,
            messages: 0,
            probe: silence::Summary::default(),
            faults: Vec::new(),
            moves: vec![Move::new(1, Mode::Hybrid, &report())],
        };
        assert!(summary.text().ends_with("OK: 1 moves in 1 s, 0 faults\n"));
        summary.faults.push(Fault {
            number: 1,
            mode: Some(Mode::Hybrid),
            what: "a bit".into(),
        });
        let text = summary.text();
        assert!(text.contains("after move 1 hybrid: a bit"), "{text}");
        assert!(
            text.ends_with("FAILED: 1 moves in 1 s, 1 faults\n"),
            "{text}"
        );
    }
}
