//! The log is bounded: what is done with frames beyond that.

use super::super::allowance::OnOverflow;
use super::{Dataplane, Stage};

impl Dataplane {
    /// Whether the log takes no frame any more. In other stages than these, there is none.
    pub(super) fn is_full(&self) -> bool {
        matches!(self.stage, Stage::Holding | Stage::Forwarding) && !self.setup.share.has_room()
    }

    /// Whether frames beyond the limit are taken from the park and dropped, rather than left there.
    pub(super) fn drops_newest(&self) -> bool {
        self.on_overflow == OnOverflow::Drop
    }

    /// Says what the log keeps now, and whether that is all it may.
    pub(super) fn account(&mut self) {
        self.setup.share.set(self.log.kept_bytes());
        if self.stage == Stage::Holding && self.is_full() {
            self.setup
                .full
                .send_if_modified(|full| !std::mem::replace(full, true));
        }
    }

    /// A hold begins.
    pub(super) fn begin_account(&mut self) {
        self.setup.full.send_replace(false);
    }
}
