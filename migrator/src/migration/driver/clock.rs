//! Wall-clock stamps that cross the wire, and microseconds since a start.

use std::time::{SystemTime, UNIX_EPOCH};

/// Unix time in microseconds.
pub(super) fn unix_us() -> u64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |since| since.as_micros() as u64)
}

/// Names and lengths of consecutive steps, in microseconds.
#[derive(Debug)]
pub(super) struct Steps {
    last: std::time::Instant,
    steps: Vec<(String, u64)>,
}

impl Steps {
    pub(super) fn start() -> Self {
        Self {
            last: std::time::Instant::now(),
            steps: Vec::new(),
        }
    }

    /// Ends the step that began where the one before ended.
    pub(super) fn done(&mut self, name: &str) {
        let now = std::time::Instant::now();
        let us = (now - self.last).as_micros() as u64;
        self.last = now;
        self.steps.push((name.to_owned(), us));
    }

    pub(super) fn take(&mut self) -> Vec<(String, u64)> {
        std::mem::take(&mut self.steps)
    }
}
