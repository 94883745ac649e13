//! Wall-clock stamps that cross the wire, and lengths of steps.

use std::time::{Instant, SystemTime, UNIX_EPOCH};

/// Unix time in microseconds.
pub(super) fn unix_us() -> u64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |since| since.as_micros() as u64)
}

/// Names and lengths of a machine's steps, in microseconds. Steps may overlap.
#[derive(Debug, Default)]
pub(super) struct Steps {
    under_way: Vec<(&'static str, Instant)>,
    done: Vec<(String, u64)>,
}

impl Steps {
    pub(super) fn begin(&mut self, name: &'static str) {
        self.under_way.push((name, Instant::now()));
    }

    /// Ends the step of that name, if it was begun.
    pub(super) fn end(&mut self, name: &'static str) {
        if let Some(index) = self.under_way.iter().position(|(step, _)| *step == name) {
            let (_, began) = self.under_way.swap_remove(index);
            let us = began.elapsed().as_micros() as u64;
            self.done.push((name.to_owned(), us));
        }
    }

    pub(super) fn take(&mut self) -> Vec<(String, u64)> {
        std::mem::take(&mut self.done)
    }
}
