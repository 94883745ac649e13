//! Everything that is not the straight way: failures, questions, lost links, time.

use super::{Destination, Outcome, Output, SOURCE_LIMIT_US, State};
use crate::migration::journal::{DestinationState, Entry};
use crate::wire::message::{Abort, Control, FaultFigures, QueryReply, Refuse, RefuseCode, Verdict};

impl Destination {
    /// The right is this node's, and there is no guest to run.
    pub(super) fn pod_is_lost(&mut self, reason: &str, out: &mut Vec<Output>) {
        self.pod_failed = Some(reason.to_owned());
        self.wants_pages = false;
        self.state = State::Running;
        self.record.state = DestinationState::Owner { resumed: true };
        self.tell_running(0, Vec::new(), out);
        out.push(Output::PodFailed {
            reason: reason.to_owned(),
        });
        out.push(Output::Note(Entry::Destination(self.record.clone())));
    }

    pub(super) fn refuse(&mut self, refuse: Refuse, out: &mut Vec<Output>) {
        self.state = State::Done;
        let reason = refuse.reason.clone();
        out.push(Output::Send(refuse.into()));
        out.push(Output::Finish(Outcome::Failed { reason }));
    }

    pub(super) fn before_grant(&self) -> bool {
        match self.state {
            State::New
            | State::Checking
            | State::Images { .. }
            | State::Preparing
            | State::Receiving(_)
            | State::Loading(_)
            | State::Ready => true,
            State::Resuming | State::Running | State::Discarding { .. } | State::Done => false,
        }
    }

    /// Final from here on: a grant that is still under way will be nothing.
    pub(super) fn discard(&mut self, reason: &str, out: &mut Vec<Output>) {
        self.record.state = DestinationState::Discarded {
            reason: reason.to_owned(),
        };
        out.push(Output::Note(Entry::Destination(self.record.clone())));
        out.push(Output::Discard);
        self.state = State::Discarding {
            reason: reason.to_owned(),
        };
    }

    pub(super) fn failed(&mut self, reason: &str, out: &mut Vec<Output>) {
        if self.before_grant() {
            let at = out.len();
            self.discard(reason, out);
            if self.link {
                // Behind the journal entry, before the work: the source's guest may be standing still.
                let abort = Abort {
                    reason: reason.to_owned(),
                };
                out.insert(at + 1, Output::Send(abort.into()));
            }
            return;
        }
        match self.state {
            State::Resuming => self.pod_is_lost(reason, out),
            State::Running if self.pod_failed.is_none() => {
                self.pod_failed = Some(reason.to_owned());
                out.push(Output::PodFailed {
                    reason: reason.to_owned(),
                });
                self.pages_here(FaultFigures::default(), out);
            }
            _ => {}
        }
    }

    pub(super) fn journal_failed(&mut self, reason: &str, out: &mut Vec<Output>) {
        match self.state {
            // Nothing was begun and nothing was promised.
            State::Images { .. } | State::Preparing => {
                let refuse = Refuse {
                    code: RefuseCode::Internal,
                    reason: reason.to_owned(),
                };
                self.refuse(refuse, out);
            }
            // The record on disk says Prepared: the grant was not taken.
            State::Resuming => {
                self.state = State::Ready;
                self.failed(reason, out);
            }
            _ => {}
        }
    }

    /// The source wants to know, over the link that is up now.
    pub(super) fn asked(&mut self, out: &mut Vec<Output>) {
        self.link = true;
        self.give_up_at = None;
        match self.state {
            // The resume itself may wait for a page, and the pages for the answer.
            State::Resuming | State::Running if self.wants_pages => {
                out.push(Output::Send(self.reply(Verdict::Running)));
                out.push(Output::SendWanted);
            }
            State::Resuming => self.asked = true,
            State::Running => out.push(Output::Send(self.reply(Verdict::Running))),
            State::Discarding { .. } | State::Done => {
                let verdict = self.record.verdict().unwrap_or(Verdict::Discarded);
                out.push(Output::Send(self.reply(verdict)));
            }
            _ => {
                let at = out.len();
                self.discard("the source lost the link before the grant came", out);
                out.insert(at + 1, Output::Send(self.reply(Verdict::Discarded)));
            }
        }
    }

    pub(super) fn reply(&self, verdict: Verdict) -> Control {
        Control::QueryReply(QueryReply {
            migration: self.record.migration,
            verdict,
            wants_pages: self.wants_pages,
        })
    }

    pub(super) fn link_lost(&mut self, now: u64, reason: &str, out: &mut Vec<Output>) {
        self.link = false;
        if self.before_grant() {
            let reason = format!("the link to {} was lost: {reason}", self.record.from);
            return self.discard(&reason, out);
        }
        if matches!(self.state, State::Resuming | State::Running) {
            self.give_up_at.get_or_insert(now + SOURCE_LIMIT_US);
        }
    }

    pub(super) fn cancel(&mut self, out: &mut Vec<Output>) {
        if self.before_grant() {
            self.failed("cancelled at the destination", out);
        } else if matches!(self.state, State::Resuming | State::Running) {
            out.push(Output::CancelRefused);
        }
    }

    pub(super) fn tick(&mut self, now: u64, out: &mut Vec<Output>) {
        self.timer = None;
        if self.give_up_at.is_some_and(|at| at <= now) {
            self.give_up_at = Some(now + SOURCE_LIMIT_US);
            if matches!(self.state, State::Running) && !self.wants_pages {
                self.finish(false, out);
            }
        }
    }

    pub(super) fn set_timer(&mut self, out: &mut Vec<Output>) {
        let next = match self.state {
            State::Resuming | State::Running => self.give_up_at,
            _ => None,
        };
        if next != self.timer {
            self.timer = next;
            out.extend(next.map(Output::WakeAt));
        }
    }
}
