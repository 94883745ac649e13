//! The source's part in a routed cluster: END follows the end markers of the other nodes.
//!
//! ```text
//! the last marker comes out of the park     each lane of each CPU of each sender has ended ...
//! a moment, and a visit to each CPU         ... and what GRO kept back, or another CPU had in its hands, is in the park
//! the park is empty                         everything of the old ways is in the log: END
//! ```

use std::sync::Arc;
use std::time::{Duration, Instant};

use migrator_ebpf::EndMarker;

use super::super::endpoints::EndMarks;
use super::super::error::PortError;
use super::super::grace;
use super::{Dataplane, ECHO_LIMIT, END_DELAY, MARKS_LIMIT, Setup, Stage};

impl Setup {
    /// How long the end of the old ways is waited for, once the guest runs elsewhere.
    pub(super) fn end_limit(&self) -> Duration {
        match self.routed {
            true => MARKS_LIMIT,
            false => ECHO_LIMIT,
        }
    }
}

impl Dataplane {
    pub(super) fn await_marks(&mut self, marks: Arc<EndMarks>) -> Result<(), PortError> {
        self.expect("wait for end markers", &[Stage::Holding, Stage::Forwarding])?;
        if self.log.ended() {
            return Ok(());
        }
        let now = Instant::now();
        if self.stage == Stage::Forwarding {
            self.end_due = Some(now + MARKS_LIMIT);
        }
        // There may be nobody to wait for.
        self.marks_due = marks.are_complete().then(|| now + END_DELAY);
        self.marks = Some(marks);
        Ok(())
    }

    /// A marker came out of the park. No bucket waits for it, and no book has it.
    pub(super) fn marker(&mut self, marker: EndMarker, now: Instant) {
        let Some(marks) = &self.marks else { return };
        if marks.note(marker) && self.marks_due.is_none() {
            self.marks_due = Some(now + END_DELAY);
        }
    }

    pub(super) fn old_ways_have_ended(&mut self, now: Instant) {
        self.marks_due = None;
        self.marks = None;
        if let Err(error) = grace::grace_period() {
            tracing::warn!(pod = %self.setup.pod, %error, "no grace period: a frame of the old way may come behind its end");
        }
        // What has come meanwhile is read first.
        self.park_empty = false;
        self.end_within(Duration::ZERO, now);
    }

    /// The time is up.
    pub(super) fn give_marks_up(&mut self) {
        self.marks_due = None;
        let Some(marks) = self.marks.take() else {
            return;
        };
        self.tally.mark_timeouts += 1;
        tracing::warn!(
            pod = %self.setup.pod,
            nodes = marks.missing(),
            "not all nodes have ended their old way to the pod in time: frames that they sent before may come behind later ones"
        );
    }
}
