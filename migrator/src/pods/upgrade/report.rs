//! What an upgrade tells when it is over.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use vm_runtime::qemu::QemuBinary;

/// A pod's VMM was replaced.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct UpgradeReport {
    /// The pod.
    pub pod: String,
    /// What ran it before.
    pub from: UpgradeQemu,
    /// What runs it now.
    pub to: UpgradeQemu,
    /// From the order to the end of the old QEMU.
    pub total_us: u64,
    /// From the moment that the old QEMU says that the guest stands still, until the new one says that it runs.
    pub downtime_us: u64,
    /// From the order to park the pod's packets until they go to the guest.
    pub held_us: u64,
    /// Size of the device state; `None` if the QEMU that saved it does not count it (7.2 does not).
    pub state_bytes: Option<u64>,
    /// Each step and how long it took, in order. The downtime is `state` to `resume`.
    pub phases: Vec<(String, u64)>,
}

/// One QEMU of a report.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct UpgradeQemu {
    /// The program.
    pub path: PathBuf,
    /// Its version, such as `7.2.22`.
    pub version: String,
}

impl UpgradeQemu {
    pub(super) fn of(qemu: &QemuBinary) -> Self {
        Self {
            path: qemu.path.clone(),
            version: qemu.version_text(),
        }
    }
}

/// The time since the last look, step by step.
pub(super) struct Watch {
    pub(super) began: Instant,
    last: Instant,
    pub(super) phases: Vec<(String, u64)>,
    pub(super) state_bytes: Option<u64>,
}

impl Watch {
    pub(super) fn new() -> Self {
        let now = Instant::now();
        Self {
            began: now,
            last: now,
            phases: Vec::new(),
            state_bytes: None,
        }
    }

    pub(super) fn step(&mut self, name: &str) {
        self.step_until(name, Some(Instant::now()));
    }

    /// The end of a step that is known otherwise; if it is not, all of the time belongs to the next one.
    pub(super) fn step_until(&mut self, name: &str, end: Option<Instant>) {
        let end = end.unwrap_or(self.last);
        let took = end.saturating_duration_since(self.last);
        self.phases.push((name.to_owned(), us(took)));
        self.last = end;
    }

    /// From the end of the step before `first` until now.
    pub(super) fn since(&self, first: &str) -> u64 {
        let from = self.phases.iter().position(|(name, _)| name == first);
        let steps = self.phases.get(from.unwrap_or_default()..);
        steps.unwrap_or_default().iter().map(|(_, us)| us).sum()
    }
}

pub(super) fn us(time: Duration) -> u64 {
    u64::try_from(time.as_micros()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_time_span_is_the_sum_of_its_steps() {
        let mut watch = Watch::new();
        let began = watch.began;
        let after = |ms| Some(began + Duration::from_millis(ms));
        watch.step_until("prepare", after(100));
        watch.step_until("setup", after(103));
        watch.step_until("state", after(110));
        watch.step_until("resume", after(111));
        assert_eq!(watch.since("state"), 8_000);
        assert_eq!(watch.since("setup"), 11_000);
    }

    #[test]
    fn a_stop_that_was_not_seen_counts_as_if_it_had_come_at_once() {
        let mut watch = Watch::new();
        let began = watch.began;
        let after = |ms| Some(began + Duration::from_millis(ms));
        watch.step_until("hold", after(5));
        watch.step_until("setup", None);
        watch.step_until("state", after(12));
        assert_eq!(watch.since("state"), 7_000);
    }
}
