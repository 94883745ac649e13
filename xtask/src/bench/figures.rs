//! From what the runs gave to what is reported: medians, extremes, ratios, and whether the aim is met. Pure.

use std::collections::BTreeMap;

use serde::Serialize;

use crate::silence::{Spread, spread};

/// What one run of one side gave: figures by the name of their metric.
pub(super) type Run = Vec<(&'static str, f64)>;

/// All runs of one side of a case.
#[derive(Clone, Debug, Default)]
pub(super) struct Samples {
    figures: BTreeMap<&'static str, Vec<f64>>,
    failures: Vec<String>,
    unavailable: Option<String>,
    remarks: Vec<String>,
}

impl Samples {
    /// A side that cannot be measured, and why.
    pub(super) fn unavailable(reason: impl Into<String>) -> Samples {
        Samples {
            unavailable: Some(reason.into()),
            ..Samples::default()
        }
    }

    /// Adds a run; one that failed is counted, and has no figures.
    pub(super) fn add(&mut self, run: anyhow::Result<Run>) {
        match run {
            Ok(run) => {
                for (metric, figure) in run {
                    self.figures.entry(metric).or_default().push(figure);
                }
            }
            Err(error) => self.failures.push(format!("{error:#}")),
        }
    }

    /// Adds what a reader of the figures should know.
    pub(super) fn remark(&mut self, text: impl Into<String>) {
        self.remarks.push(text.into());
    }

    /// The spread of one metric; none if no run gave it.
    pub(super) fn of(&self, metric: &str) -> Option<Spread> {
        spread(self.figures.get(metric)?)
    }
}

/// What a figure should come to.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Aim {
    /// Ours is at most this many times the peer's.
    RatioAtMost(f64),
    /// Ours is at least this many times the peer's.
    RatioAtLeast(f64),
    /// Ours is below this, in the metric's unit.
    Below(f64),
    /// Ours is 0.
    Zero,
}

impl Aim {
    fn met(self, ours: f64, ratio: Option<f64>) -> bool {
        match self {
            Aim::RatioAtMost(limit) => ratio.is_some_and(|ratio| ratio <= limit),
            Aim::RatioAtLeast(limit) => ratio.is_some_and(|ratio| ratio >= limit),
            Aim::Below(limit) => ours < limit,
            Aim::Zero => ours == 0.0,
        }
    }

    fn text(self, unit: &str) -> String {
        match self {
            Aim::RatioAtMost(limit) => format!("<= {limit}x"),
            Aim::RatioAtLeast(limit) => format!(">= {limit}x"),
            Aim::Below(limit) => format!("< {limit} {unit}"),
            Aim::Zero => "0".to_owned(),
        }
    }
}

/// One quantity that the runs of a case give.
#[derive(Clone, Copy, Debug)]
pub(super) struct Metric {
    /// Its name, as in [`Run`].
    pub(super) name: &'static str,
    /// Its unit.
    pub(super) unit: &'static str,
    /// All of these have to hold; none is a figure without an aim.
    pub(super) aims: &'static [Aim],
}

/// One line of the table and of the JSON. Medians; null where there is none.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub(super) struct Record {
    pub(super) case: String,
    pub(super) metric: String,
    pub(super) unit: &'static str,
    pub(super) ours: Option<f64>,
    pub(super) peer: Option<f64>,
    /// Ours divided by the peer's.
    pub(super) ratio: Option<f64>,
    /// In words; empty if there is none.
    pub(super) aim: String,
    /// False also where the figure is missing.
    pub(super) met: bool,
    /// What the peer is.
    pub(super) against: String,
    pub(super) ours_min: Option<f64>,
    pub(super) ours_max: Option<f64>,
    pub(super) peer_min: Option<f64>,
    pub(super) peer_max: Option<f64>,
    /// Runs that gave our figure.
    pub(super) n: usize,
    /// Runs that gave the peer's.
    pub(super) peer_n: usize,
    /// Runs that failed on our side.
    pub(super) ours_failed: usize,
    /// Runs that failed on the peer's side.
    pub(super) peer_failed: usize,
    /// Why a figure is missing, how runs failed, and what limits the figures.
    pub(super) note: Option<String>,
}

/// A record for each metric of a case.
pub(super) fn records(
    case: &str,
    against: &str,
    metrics: &[Metric],
    ours: &Samples,
    peer: &Samples,
) -> Vec<Record> {
    metrics
        .iter()
        .map(|metric| record(case, against, metric, ours, peer))
        .collect()
}

fn record(case: &str, against: &str, metric: &Metric, ours: &Samples, peer: &Samples) -> Record {
    let (mine, theirs) = (ours.of(metric.name), peer.of(metric.name));
    let ratio = mine
        .zip(theirs)
        .filter(|(_, theirs)| theirs.median != 0.0)
        .map(|(mine, theirs)| mine.median / theirs.median);
    let met = mine.is_some_and(|mine| metric.aims.iter().all(|aim| aim.met(mine.median, ratio)));
    let aims: Vec<String> = metric
        .aims
        .iter()
        .map(|aim| aim.text(metric.unit))
        .collect();
    let runs = |samples: &Samples| samples.figures.get(metric.name).map_or(0, Vec::len);
    Record {
        case: case.to_owned(),
        metric: metric.name.to_owned(),
        unit: metric.unit,
        ours: mine.map(|spread| spread.median),
        peer: theirs.map(|spread| spread.median),
        ratio,
        aim: aims.join(" and "),
        met,
        against: against.to_owned(),
        ours_min: mine.map(|spread| spread.min),
        ours_max: mine.map(|spread| spread.max),
        peer_min: theirs.map(|spread| spread.min),
        peer_max: theirs.map(|spread| spread.max),
        n: runs(ours),
        peer_n: runs(peer),
        ours_failed: ours.failures.len(),
        peer_failed: peer.failures.len(),
        note: note(ours, peer, against),
    }
}

/// What is missing, how runs failed (each reason once), and what else there is to know.
fn note(ours: &Samples, peer: &Samples, against: &str) -> Option<String> {
    let mut parts = Vec::new();
    for (whose, samples) in [("ours", ours), (against, peer)] {
        if let Some(reason) = &samples.unavailable {
            parts.push(format!("{whose}: not available: {reason}"));
        }
        let mut reasons: BTreeMap<&str, usize> = BTreeMap::new();
        for failure in &samples.failures {
            *reasons.entry(failure).or_default() += 1;
        }
        for (reason, times) in reasons {
            parts.push(format!("{whose}: {times} failed: {reason}"));
        }
        parts.extend(samples.remarks.iter().cloned());
    }
    (!parts.is_empty()).then(|| parts.join("; "))
}

#[cfg(test)]
mod tests {
    use anyhow::anyhow;

    use super::*;

    const TIME: Metric = Metric {
        name: "time",
        unit: "ms",
        aims: &[Aim::RatioAtMost(0.5), Aim::Below(12.0)],
    };

    fn samples(figures: &[f64]) -> Samples {
        let mut samples = Samples::default();
        for figure in figures {
            samples.add(Ok(vec![("time", *figure)]));
        }
        samples
    }

    fn one(ours: &Samples, peer: &Samples) -> Record {
        records("case", "QEMU", &[TIME], ours, peer).remove(0)
    }

    #[test]
    fn figures_are_medians_with_their_extremes() {
        let record = one(
            &samples(&[9.0, 5.0, 70.0, 4.0, 6.0]),
            &samples(&[10.0, 30.0, 12.0]),
        );
        assert_eq!((record.ours, record.peer), (Some(6.0), Some(12.0)));
        assert_eq!((record.ours_min, record.ours_max), (Some(4.0), Some(70.0)));
        assert_eq!((record.peer_min, record.peer_max), (Some(10.0), Some(30.0)));
        assert_eq!((record.n, record.peer_n), (5, 3));
        assert_eq!((record.ratio, record.met), (Some(0.5), true));
        assert_eq!(record.aim, "<= 0.5x and < 12 ms");
        assert_eq!(record.note, None);
    }

    #[test]
    fn every_aim_has_to_hold() {
        assert!(!one(&samples(&[12.0]), &samples(&[24.0])).met);
        assert!(!one(&samples(&[11.0]), &samples(&[21.0])).met);
        for (aim, ours, peer, met) in [
            (Aim::RatioAtLeast(0.9), 90.0, 100.0, true),
            (Aim::RatioAtLeast(0.9), 89.0, 100.0, false),
            (Aim::Zero, 0.0, 0.0, true),
            (Aim::Zero, 1.0, 5.0, false),
            // A ratio to nothing is none.
            (Aim::RatioAtMost(1.0), 0.0, 0.0, false),
        ] {
            let ratio = (peer != 0.0).then(|| ours / peer);
            assert_eq!(aim.met(ours, ratio), met, "{aim:?} {ours} {peer}");
        }
    }

    #[test]
    fn failed_runs_are_counted_and_told() {
        let mut peer = samples(&[20.0]);
        for _ in 0..2 {
            peer.add(Err(anyhow!("guest dead")));
        }
        let record = one(&samples(&[5.0]), &peer);
        assert_eq!((record.peer_n, record.peer_failed), (1, 2));
        assert_eq!(record.note.as_deref(), Some("QEMU: 2 failed: guest dead"));
    }

    #[test]
    fn a_remark_is_part_of_the_note() {
        let mut ours = samples(&[5.0]);
        ours.remark("the sender is slow");
        let record = one(&ours, &samples(&[20.0]));
        assert!(record.met);
        assert_eq!(record.note.as_deref(), Some("the sender is slow"));
    }

    #[test]
    fn what_is_not_there_is_null_and_not_met() {
        let record = one(&Samples::unavailable("no such verb"), &samples(&[20.0]));
        assert!(!record.met);
        let json = serde_json::to_value(&record).unwrap();
        for field in ["ours", "ratio", "ours_min", "ours_max"] {
            assert!(json[field].is_null(), "{field}");
        }
        assert_eq!(json["note"], "ours: not available: no such verb");
    }

    #[test]
    fn the_json_has_the_documented_fields() {
        let json = serde_json::to_value(one(&samples(&[5.0]), &samples(&[20.0]))).unwrap();
        assert_eq!(
            json,
            serde_json::json!({
                "case": "case", "metric": "time", "unit": "ms", "ours": 5.0, "peer": 20.0, "ratio": 0.25,
                "aim": "<= 0.5x and < 12 ms", "met": true, "against": "QEMU",
                "ours_min": 5.0, "ours_max": 5.0, "peer_min": 20.0, "peer_max": 20.0,
                "n": 1, "peer_n": 1, "ours_failed": 0, "peer_failed": 0, "note": null,
            })
        );
    }
}
