//! Memory that does not cross in time: stalls, and the way of post-copy.

use super::{ANSWER_LIMIT_US, Output, Source, State};
use crate::migration::journal::{Entry, OwnerState};
use crate::migration::mode::{Mode, OnStall, THROTTLE_STEPS};
use crate::migration::rounds::Stall;

/// What the guest at the destination lacks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Pages {
    /// Nothing.
    None,
    /// The pages that are pending here.
    Known,
    /// Pages that it will tell.
    Told,
}

impl Source {
    /// Rounds do not get on: what the user wants then.
    pub(super) fn stalled(&mut self, round: u32, stall: Stall, now: u64, out: &mut Vec<Output>) {
        match (self.mode, self.on_stall) {
            (Mode::Auto | Mode::Hybrid | Mode::Postcopy, _) => self.mark_stale(round, now, out),
            (Mode::Precopy, OnStall::Wait) if !(self.force && stall.exhausted) => {
                self.start_round(round, now, out);
            }
            (Mode::Precopy, OnStall::Throttle) => match THROTTLE_STEPS.get(self.throttled) {
                Some(percent) => {
                    self.throttled += 1;
                    self.begun.unthrottle = true;
                    self.rounds.eased();
                    out.push(Output::Throttle { percent: *percent });
                    self.start_round(round, now, out);
                }
                None if self.force => self.freeze(round, now, out),
                None => self.unwind(&stall.to_string(), out),
            },
            (Mode::Precopy, OnStall::Wait | OnStall::Fail) if self.force => {
                self.freeze(round, now, out)
            }
            (Mode::Precopy, OnStall::Wait | OnStall::Fail) => self.unwind(&stall.to_string(), out),
        }
    }

    /// The way of post-copy: the destination makes ready to wait for pages while the guest still runs here.
    pub(super) fn mark_stale(&mut self, round: u32, now: u64, out: &mut Vec<Output>) {
        self.postcopy = true;
        self.state = State::Marking { round };
        self.deadline = Some(now + ANSWER_LIMIT_US);
        out.push(Output::SendStale { last: false });
    }

    /// Nothing of this copy is needed any more: not a page, not a packet.
    pub(super) fn let_go(&mut self, out: &mut Vec<Output>) {
        let released = OwnerState::Released {
            to: self.record.to.clone(),
            migration: self.record.migration,
        };
        out.push(Output::Note(Entry::Owner(self.owner(released))));
        out.push(Output::Release);
    }

    /// The destination has every page.
    pub(super) fn memory_complete(&mut self, out: &mut Vec<Output>) {
        if !std::mem::take(&mut self.pages_due) {
            return;
        }
        if self.forwarding_over {
            self.forwarded(out);
        }
    }
}
