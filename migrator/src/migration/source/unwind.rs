//! Everything that is not the straight way: failures before the grant, doubt after it, lost links, time.

use super::late::Pages;
use super::{
    ASK_EVERY_US, Dialing, Outcome, Output, REDIAL_MAX_US, Rollback, Source, SourceState, State,
};
use crate::migration::journal::{Entry, OwnerRecord, OwnerState};
use crate::wire::message::Verdict;

impl Source {
    /// Whether the grant has certainly not been sent, and nothing is being undone.
    fn before_grant(&self) -> bool {
        match self.state {
            State::New
            | State::Offered
            | State::Images
            | State::Preparing
            | State::Disks
            | State::Tracking
            | State::Round { .. }
            | State::Scanning { .. }
            | State::Waiting { .. }
            | State::Marking { .. }
            | State::Holding { .. }
            | State::Draining { .. }
            | State::Stopping { .. }
            | State::Sending(_) => true,
            State::Granted
            | State::Doubt(_)
            | State::Forwarding(_)
            | State::Releasing(_)
            | State::Closing(_)
            | State::RollingBack { .. }
            | State::Done => false,
        }
    }

    /// Gives up before the grant, and tells the destination. Nothing is waited for: a destination without the grant never runs.
    pub(super) fn unwind(&mut self, reason: &str, out: &mut Vec<Output>) {
        if self.link {
            out.push(Output::Send(Self::abort_message(reason)));
        }
        self.roll_back(reason.to_owned(), out);
    }

    /// Takes the right back where it was journaled as given away, and undoes what was begun.
    fn roll_back(&mut self, reason: String, out: &mut Vec<Output>) {
        if self.handed_over {
            self.handed_over = false;
            out.push(Output::Note(Entry::Owner(OwnerRecord {
                pod: self.record.pod.clone(),
                // Above the offered one, which shall never be in force anywhere.
                epoch: self.record.offered.next(),
                state: OwnerState::Owner,
            })));
        }
        out.push(Output::Rollback(Rollback {
            resume_vm: self.begun.resume_vm && self.vm_alive,
            ..self.begun
        }));
        self.deadline = None;
        let pod_failed = (!self.vm_alive).then(|| "the VM exited at the source".to_owned());
        self.state = State::RollingBack {
            reason,
            refused: false,
            pod_failed,
        };
    }

    pub(super) fn rolled_back(&mut self, out: &mut Vec<Output>) {
        let State::RollingBack {
            reason,
            refused,
            pod_failed,
        } = &self.state
        else {
            return;
        };
        let (reason, refused, pod_failed) = (reason.clone(), *refused, pod_failed.clone());
        self.state = State::Done;
        out.push(Output::Note(self.ended(SourceState::Failed {
            reason: reason.clone(),
        })));
        out.push(Output::Finish(match pod_failed {
            None if refused => Outcome::Refused { reason },
            None => Outcome::Failed { reason },
            Some(reason) => Outcome::PodFailed { reason },
        }));
    }

    /// The destination does not take the pod.
    pub(super) fn refused(&mut self, reason: &str, out: &mut Vec<Output>) {
        let before = self.before_grant();
        self.turned_down(reason, out);
        if let State::RollingBack { refused, .. } = &mut self.state {
            // One that comes while something else is undone is no longer the reason.
            *refused |= before;
        }
    }

    /// `Refuse` or `Abort`: the destination keeps nothing, and has journaled so where it had begun.
    pub(super) fn turned_down(&mut self, reason: &str, out: &mut Vec<Output>) {
        let reason = format!("{}: {reason}", self.record.to);
        if self.before_grant() || self.in_doubt() {
            self.roll_back(reason, out);
        }
    }

    /// A final answer to our question.
    pub(super) fn verdict(&mut self, verdict: Verdict, wants_pages: bool, out: &mut Vec<Output>) {
        match (verdict, &self.state) {
            (Verdict::Running, State::Granted | State::Doubt(_)) => {
                let pages = match wants_pages {
                    true => Pages::Told,
                    false => Pages::None,
                };
                self.taken_over(None, pages, out);
            }
            // It had got the last page, and its word of that was lost with the link.
            (Verdict::Running, State::Forwarding(_)) if !wants_pages => self.memory_complete(out),
            (Verdict::Running, State::Closing(_)) => {
                out.push(Output::Send(self.released_message()));
            }
            (Verdict::Discarded, State::Granted | State::Doubt(_)) => {
                let to = &self.record.to;
                self.roll_back(
                    format!("the link was lost and {to} had not taken the grant"),
                    out,
                );
            }
            // Not asked, or no longer of interest.
            (Verdict::Running | Verdict::Discarded, _) => {}
        }
    }

    pub(super) fn link_lost(&mut self, now: u64, reason: &str, out: &mut Vec<Output>) {
        self.link = false;
        if self.before_grant() {
            let to = &self.record.to;
            return self.unwind(&format!("the link to {to} was lost: {reason}"), out);
        }
        let (relink_limit_us, pages_due) = (self.relink_limit_us, self.pages_due);
        match &mut self.state {
            State::Granted => {
                let mut dialing = Dialing::default();
                self.deadline = None;
                self.dial(&mut dialing, out);
                self.state = State::Doubt(dialing);
            }
            State::Doubt(dialing) => dialing.failed(now),
            State::Forwarding(dialing) | State::Releasing(dialing) | State::Closing(dialing) => {
                dialing.failed(now);
                // A guest that lacks pages is not given up.
                if !pages_due {
                    dialing.give_up_at.get_or_insert(now + relink_limit_us);
                }
            }
            _ => {}
        }
    }

    pub(super) fn link_up(&mut self, now: u64, out: &mut Vec<Output>) {
        self.link = true;
        let query = self.query_message();
        match &mut self.state {
            State::Doubt(dialing) => {
                *dialing = Dialing {
                    at: Some(now + ASK_EVERY_US),
                    ..Dialing::default()
                };
                out.push(Output::Send(query));
            }
            // The destination must learn which migration this link is for, and the answer is known.
            State::Forwarding(dialing) | State::Releasing(dialing) => {
                *dialing = Dialing::default();
                out.push(Output::Send(query));
            }
            State::Closing(dialing) => {
                *dialing = Dialing {
                    give_up_at: dialing.give_up_at,
                    ..Dialing::default()
                };
                out.push(Output::Send(query));
            }
            _ => {}
        }
    }

    pub(super) fn cancel(&mut self, out: &mut Vec<Output>) {
        if self.before_grant() {
            self.unwind("cancelled by the user", out);
        } else if !matches!(self.state, State::RollingBack { .. } | State::Done) {
            out.push(Output::CancelRefused);
        }
    }

    pub(super) fn vm_died(&mut self, reason: &str, out: &mut Vec<Output>) {
        self.vm_alive = false;
        let reason = format!("the VM exited at the source: {reason}");
        if self.before_grant() {
            self.unwind(&reason, out);
        }
        if let State::RollingBack { pod_failed, .. } = &mut self.state {
            *pod_failed = Some(reason);
        }
    }

    pub(super) fn failed(&mut self, failure: &str, out: &mut Vec<Output>) {
        if self.before_grant() {
            return self.unwind(failure, out);
        }
        match &mut self.state {
            State::RollingBack { reason, .. } => {
                *reason = format!("{reason}; and while going back: {failure}");
            }
            // Forwarding that fails has lost what it had; it must not keep the pod here for ever.
            State::Forwarding(_) => self.forwarded(out),
            _ => {}
        }
    }

    /// Before the grant the guest gets everything here. Afterwards packets wait where they are: nothing else can take them.
    pub(super) fn overflowed(&mut self, how: &str, out: &mut Vec<Output>) {
        if self.before_grant() {
            self.unwind(how, out);
        }
    }

    /// The machine journals twice: before the offer, and before the grant. In either case nothing has been sent.
    pub(super) fn journal_failed(&mut self, reason: &str, out: &mut Vec<Output>) {
        match self.state {
            State::Offered => {
                self.state = State::Done;
                self.deadline = None;
                let reason = reason.to_owned();
                out.push(Output::Finish(Outcome::Failed { reason }));
            }
            State::Sending(_) | State::Granted => {
                // The record on disk is still the one that says Owner.
                self.handed_over = false;
                self.unwind(reason, out);
            }
            _ => {}
        }
    }

    pub(super) fn tick(&mut self, now: u64, out: &mut Vec<Output>) {
        // It has fired: a wait that goes on needs another.
        self.timer = None;
        if self.deadline.is_some_and(|at| at <= now) {
            self.deadline = None;
            match self.state {
                State::Granted => {
                    self.deadline = Some(now + ASK_EVERY_US);
                    out.push(Output::Send(self.query_message()));
                }
                State::Sending(_) => {
                    let ms = self.freeze_limit_us / 1000;
                    let to = &self.record.to;
                    let reason = format!("{to} was not ready within {ms} ms of the guest's stop");
                    self.unwind(&reason, out);
                }
                _ if self.before_grant() => {
                    let (to, s) = (&self.record.to, super::ANSWER_LIMIT_US / 1_000_000);
                    self.unwind(&format!("{to} gave no answer within {s} s"), out);
                }
                _ => {}
            }
        }
        let mut dialing = match self.state {
            State::Doubt(d) | State::Forwarding(d) | State::Releasing(d) | State::Closing(d) => d,
            _ => return,
        };
        if dialing.give_up_at.is_some_and(|at| at <= now) {
            match self.state {
                State::Forwarding(_) => return self.forwarded(out),
                State::Closing(_) => return self.complete(None, out),
                _ => dialing.give_up_at = None,
            }
        }
        if dialing.at.is_some_and(|at| at <= now) {
            if self.link {
                dialing.at = Some(now + ASK_EVERY_US);
                out.push(Output::Send(self.query_message()));
            } else {
                self.dial(&mut dialing, out);
            }
        }
        match &mut self.state {
            State::Doubt(slot)
            | State::Forwarding(slot)
            | State::Releasing(slot)
            | State::Closing(slot) => *slot = dialing,
            _ => {}
        }
    }

    pub(super) fn dial(&mut self, dialing: &mut Dialing, out: &mut Vec<Output>) {
        if !dialing.busy {
            dialing.busy = true;
            dialing.at = None;
            out.push(Output::Redial);
        }
    }

    /// Asks for a timer when the next thing to wait for has changed.
    pub(super) fn set_timer(&mut self, out: &mut Vec<Output>) {
        let dialing = match self.state {
            State::Doubt(d) | State::Forwarding(d) | State::Releasing(d) | State::Closing(d) => d,
            _ => Dialing::default(),
        };
        let next = [self.deadline, dialing.at, dialing.give_up_at];
        let next = next.into_iter().flatten().min();
        if next != self.timer {
            self.timer = next;
            out.extend(next.map(Output::WakeAt));
        }
    }
}

impl Dialing {
    /// The dial failed, or the link that it gave was lost.
    fn failed(&mut self, now: u64) {
        self.busy = false;
        self.attempt += 1;
        let pause = 50_000u64 << self.attempt.min(10);
        self.at = Some(now + pause.min(REDIAL_MAX_US));
    }
}
