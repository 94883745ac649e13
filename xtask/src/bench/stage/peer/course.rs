//! What the events of two QEMUs say of a migration between them. Pure.

use vm_runtime::qmp::QmpEvent;

use crate::bench::stage::Moved;

/// Which QEMU an event came from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Side {
    Source,
    Destination,
}

/// A migration so far. Times are in microseconds of Unix time, by the host's clock on both sides.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Course {
    pub(super) stopped_at: Option<u64>,
    pub(super) resumed_at: Option<u64>,
    /// The source has told that pages are being sent.
    pub(super) is_active: bool,
    /// The mirror of its disk has everything, but for what is being written.
    pub(super) mirrors: bool,
    /// The mirror has ended, with everything.
    pub(super) mirrored: bool,
    /// The source has stopped, and waits for its disk.
    pub(super) is_held: bool,
    source_done_at: Option<u64>,
    destination_done_at: Option<u64>,
    failure: Option<String>,
}

impl Course {
    /// Takes an event in.
    pub(super) fn observe(&mut self, side: Side, event: &QmpEvent) {
        let at = Some(event.at_unix_us);
        match (side, event.name.as_str()) {
            (Side::Source, "STOP") => self.stopped_at = at,
            (Side::Destination, "RESUME") => self.resumed_at = at,
            (_, "MIGRATION") => {
                let status = event.data["status"].as_str().unwrap_or_default();
                match (side, status) {
                    (Side::Source, "active") => self.is_active = true,
                    (Side::Source, "pre-switchover") => self.is_held = true,
                    (Side::Source, "completed") => self.source_done_at = at,
                    (Side::Destination, "completed") => self.destination_done_at = at,
                    (_, "failed" | "cancelled" | "postcopy-paused") => {
                        self.fail(format!("the {}'s migration is {status}", name(side)));
                    }
                    _ => {}
                }
            }
            (Side::Source, "BLOCK_JOB_READY") => self.mirrors = true,
            (Side::Source, "BLOCK_JOB_COMPLETED") => match event.data["error"].as_str() {
                None => self.mirrored = true,
                Some(error) => self.fail(format!("the mirror failed: {error}")),
            },
            (_, "SHUTDOWN" | "GUEST_PANICKED") => {
                let reason = event.data["reason"].as_str().unwrap_or("no reason given");
                self.fail(format!(
                    "the guest ended at the {}: {} ({reason})",
                    name(side),
                    event.name
                ));
            }
            _ => {}
        }
    }

    /// The monitor's connection has ended.
    pub(super) fn lost(&mut self, side: Side) {
        self.fail(format!("QEMU died at the {}", name(side)));
    }

    /// Why it will not end well, if so. The first reason is the cause.
    pub(super) fn failure(&self) -> Option<&str> {
        self.failure.as_deref()
    }

    fn fail(&mut self, why: String) {
        self.failure.get_or_insert(why);
    }

    /// Its figures, once the guest runs at the destination and nothing is left to send. The destination was begun at
    /// `requested_at`, the migration at `begun_at`.
    pub(super) fn moved(&self, requested_at: u64, begun_at: u64) -> Option<Moved> {
        let stopped_at = self.stopped_at?;
        let resumed_at = self.resumed_at?;
        let over_at = self
            .source_done_at?
            .max(self.destination_done_at?)
            .max(resumed_at);
        Some(Moved {
            total_ms: ms(begun_at, over_at),
            start_ms: ms(requested_at, begun_at),
            downtime_ms: ms(stopped_at, resumed_at),
            stopped_at_unix_us: stopped_at,
        })
    }
}

/// Milliseconds from one time to a later one, both in microseconds.
pub(super) fn ms(from: u64, to: u64) -> f64 {
    to.saturating_sub(from) as f64 / 1e3
}

fn name(side: Side) -> &'static str {
    match side {
        Side::Source => "source",
        Side::Destination => "destination",
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn event(name: &str, data: Value, at_unix_us: u64) -> QmpEvent {
        QmpEvent {
            name: name.to_owned(),
            data,
            at_unix_us,
        }
    }

    fn status(status: &str, at: u64) -> QmpEvent {
        event("MIGRATION", json!({ "status": status }), at)
    }

    #[test]
    fn downtime_is_from_stop_to_resume_and_total_to_the_last_end() {
        let mut course = Course::default();
        let null = || Value::Null;
        let events = [
            (Side::Source, status("setup", 1_000)),
            (Side::Destination, status("active", 1_100)),
            (Side::Source, status("active", 1_200)),
            (
                Side::Source,
                event("MIGRATION_PASS", json!({"pass": 1}), 1_300),
            ),
            (Side::Source, event("STOP", null(), 500_000)),
            (Side::Destination, status("completed", 515_000)),
            (Side::Destination, event("RESUME", null(), 520_500)),
        ];
        for (side, event) in &events {
            course.observe(*side, event);
            assert_eq!(course.moved(0, 500), None);
        }
        assert!(course.is_active);
        course.observe(Side::Source, &status("completed", 519_000));
        let moved = course.moved(0, 500).unwrap();
        assert_eq!((moved.total_ms, moved.downtime_ms), (520.0, 20.5));
        assert_eq!(moved.start_ms, 0.5);
        assert_eq!(moved.stopped_at_unix_us, 500_000);
        // After a post-copy the guest resumes first.
        course.observe(Side::Source, &status("completed", 900_500));
        assert_eq!(course.moved(0, 500).unwrap().total_ms, 900.0);
    }

    #[test]
    fn the_first_failure_is_the_cause() {
        let mut course = Course::default();
        let panic = event("SHUTDOWN", json!({ "reason": "guest-reset" }), 7);
        course.observe(Side::Destination, &panic);
        course.lost(Side::Destination);
        course.observe(Side::Source, &status("failed", 9));
        let why = "the guest ended at the destination: SHUTDOWN (guest-reset)";
        assert_eq!(course.failure(), Some(why));
    }

    #[test]
    fn a_cancelled_migration_is_a_failure() {
        let mut course = Course::default();
        course.observe(Side::Source, &status("cancelling", 1));
        assert_eq!(course.failure(), None);
        course.observe(Side::Source, &status("cancelled", 2));
        assert_eq!(
            course.failure(),
            Some("the source's migration is cancelled")
        );
    }
}
