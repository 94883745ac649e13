//! The straight way, a step at a time.

use super::late::Pages;
use super::{
    ANSWER_LIMIT_US, ASK_EVERY_US, BYE_LIMIT_US, Dialing, Input, Outcome, Output, Sending, Sent,
    Source, SourceState, State,
};
use crate::migration::journal::{Entry, OwnerState};
use crate::migration::mode::Mode;
use crate::migration::rounds::{Decision, RoundSample};
use crate::wire::message::{
    Control, DisksDone, Grant, Handover, ImageDone, Ledger, MemoryDone, Ready, RoundEnd,
};

impl Source {
    /// Messages of the peer. Late and doubled ones meet a state that does not wait for them, and are nothing.
    pub(super) fn peer(&mut self, now: u64, message: Control, out: &mut Vec<Output>) {
        match (message, &mut self.state) {
            (Control::Accept(accept), State::Offered) => {
                if accept.wants.is_empty() {
                    self.state = State::Preparing;
                    self.deadline = Some(now + ANSWER_LIMIT_US);
                } else {
                    self.state = State::Images;
                    self.deadline = None;
                    out.push(Output::SendImages(accept.wants));
                }
            }
            (Control::Prepared(_), State::Preparing) => {
                self.deadline = None;
                self.begun.stop_tracking = true;
                if self.disks {
                    self.state = State::Disks;
                    out.push(Output::SendDisks);
                } else {
                    self.track(out);
                }
            }
            (Control::VmWaits(_), state) => {
                self.vm_waits = true;
                if let State::Waiting { round } = *state {
                    self.state = State::Scanning { round };
                    self.deadline = None;
                    out.push(Output::Scan);
                }
            }
            (
                Control::RoundAck(ack),
                State::Round {
                    round, acked_at, ..
                },
            ) if ack.round == *round => {
                acked_at.get_or_insert(now);
                self.scan_if_round_complete(out);
            }
            (Control::StaleAck(_), State::Marking { round }) => {
                let round = *round;
                self.freeze(round, now, out);
            }
            (Control::Ready(ready), State::Sending(sending)) => match doubts(self.verify, ready) {
                Some(reason) => self.unwind(&reason, out),
                None => {
                    sending.ready = true;
                    self.grant_if_complete(now, out);
                }
            },
            (Control::Running(running), State::Granted | State::Doubt(_)) => {
                let pages = match self.postcopy {
                    true => Pages::Known,
                    false => Pages::None,
                };
                self.taken_over(running.failed, pages, out);
            }
            (Control::QueryReply(reply), _) if reply.migration == self.record.migration => {
                self.verdict(reply.verdict, reply.wants_pages, out);
            }
            (Control::Wanted(_), State::Forwarding(_)) if self.pages_due => {
                out.push(Output::PushPages);
            }
            (Control::MemoryComplete(_), _) => self.memory_complete(out),
            (Control::Refuse(refuse), _) => self.refused(&refuse.reason, out),
            (Control::Abort(abort), _) => self.turned_down(&abort.reason, out),
            (Control::Bye(bye), State::Closing(_)) if bye.migration == self.record.migration => {
                self.complete(Some(bye.ledger), out);
            }
            _ => {}
        }
    }

    /// Steps of the way there; a step that nobody waits for belongs to what was rolled back.
    pub(super) fn step(&mut self, now: u64, step: Input, out: &mut Vec<Output>) {
        match (step, &mut self.state) {
            (Input::ImagesSent, State::Images) => {
                self.state = State::Preparing;
                out.push(Output::Send(ImageDone.into()));
                self.deadline = Some(now + ANSWER_LIMIT_US);
            }
            (Input::DisksSent, State::Disks) => self.track(out),
            (Input::TrackingStarted, State::Tracking) => {
                self.scanned_at = now;
                match self.mode {
                    Mode::Postcopy => self.mark_stale(1, now, out),
                    Mode::Precopy | Mode::Hybrid | Mode::Auto => self.start_round(1, now, out),
                }
            }
            (Input::RoundSent { pages, bytes }, State::Round { round, sent, .. }) => {
                *sent = Some(Sent {
                    pages,
                    bytes,
                    at: now,
                });
                let round = *round;
                out.push(Output::Send(RoundEnd { round, pages }.into()));
                self.scan_if_round_complete(out);
            }
            (Input::Scanned { dirtied, pending }, State::Scanning { round }) => {
                let round = *round;
                self.rounds
                    .scanned(dirtied, now.saturating_sub(self.scanned_at));
                self.scanned_at = now;
                self.decide(round, pending, now, out);
            }
            (
                Input::AgentDetached { state },
                State::Holding {
                    agent: agent @ None,
                    ..
                },
            ) => {
                *agent = Some(state);
                // Only now: while the gate holds, nothing reaches the guest.
                self.begun.release_hold = true;
                out.push(Output::Hold);
            }
            (Input::Held, State::Holding { held, .. }) => {
                *held = true;
                self.drain_if_held(out);
            }
            (Input::Drained, State::Draining { round, agent }) => {
                let (round, agent) = (*round, std::mem::take(agent));
                self.state = State::Stopping { round, agent };
                self.begun.resume_vm = true;
                out.push(Output::StopVm);
            }
            (Input::Stopped { at_unix_us }, State::Stopping { round, agent }) => {
                let handover = Handover {
                    stopped_at_unix_us: at_unix_us,
                    agent: std::mem::take(agent),
                };
                let round = *round;
                self.stopped(round, handover, now, out);
            }
            (Input::ResidueRead, State::Sending(sending)) => {
                sending.residue = true;
                self.grant_if_complete(now, out);
            }
            (Input::FlowsSent { .. }, State::Sending(sending)) => {
                sending.flows = true;
                self.grant_if_complete(now, out);
            }
            (Input::LastPagesSent { pages }, State::Sending(sending)) => {
                sending.pages = true;
                let round = sending.round;
                out.push(Output::Send(MemoryDone { round, pages }.into()));
                self.grant_if_complete(now, out);
            }
            (Input::LastBlocksSent { round, bytes }, State::Sending(sending)) => {
                sending.disks = true;
                out.push(Output::Send(DisksDone { round, bytes }.into()));
                self.grant_if_complete(now, out);
            }
            (Input::StaleSent { last: true, .. }, State::Sending(sending)) => {
                sending.pages = true;
                self.grant_if_complete(now, out);
            }
            (Input::StateSent, State::Sending(sending)) => {
                sending.state = true;
                self.grant_if_complete(now, out);
            }
            (Input::HashesSent, State::Sending(sending)) => {
                sending.hashes = true;
                self.grant_if_complete(now, out);
            }
            _ => {}
        }
    }

    fn track(&mut self, out: &mut Vec<Output>) {
        self.state = State::Tracking;
        out.push(Output::StartTracking);
    }

    pub(super) fn start_round(&mut self, round: u32, now: u64, out: &mut Vec<Output>) {
        self.state = State::Round {
            round,
            started: now,
            sent: None,
            acked_at: None,
        };
        out.push(Output::SendRound { round });
    }

    pub(super) fn scan_if_round_complete(&mut self, out: &mut Vec<Output>) {
        if let State::Round {
            round,
            started,
            sent: Some(Sent { pages, bytes, at }),
            acked_at: Some(acked_at),
        } = self.state
        {
            // The acknowledgement is of the pages; what the round sent of disks is acknowledged when it is sent.
            let done_at = match self.disks {
                true => acked_at.max(at),
                false => acked_at,
            };
            self.rounds.round_done(RoundSample {
                pages,
                bytes,
                duration_us: done_at.saturating_sub(started),
            });
            self.state = State::Scanning { round };
            out.push(Output::Scan);
        }
    }

    pub(super) fn decide(&mut self, round: u32, pending: u64, now: u64, out: &mut Vec<Output>) {
        let decision = self.rounds.decide(pending);
        if self.mode == Mode::Hybrid && !self.rounds.fits(pending) {
            return self.mark_stale(round + 1, now, out);
        }
        match decision {
            Decision::Round => self.start_round(round + 1, now, out),
            Decision::Freeze => self.freeze(round + 1, now, out),
            Decision::Stalled(stall) => {
                self.stall = Some(stall);
                self.stalled(round + 1, stall, now, out);
            }
        }
    }

    pub(super) fn freeze(&mut self, round: u32, now: u64, out: &mut Vec<Output>) {
        if !self.vm_waits {
            // What is written meanwhile is looked at again then.
            self.state = State::Waiting { round: round - 1 };
            self.deadline = Some(now + ANSWER_LIMIT_US);
            return;
        }
        self.state = State::Holding {
            round,
            agent: None,
            held: false,
        };
        self.deadline = None;
        self.begun.attach_agent = true;
        out.push(Output::DetachAgent);
    }

    pub(super) fn drain_if_held(&mut self, out: &mut Vec<Output>) {
        if let State::Holding {
            round,
            agent,
            held: true,
        } = &mut self.state
            && let Some(agent) = agent.take()
        {
            self.state = State::Draining {
                round: *round,
                agent,
            };
            out.push(Output::DrainTap);
        }
    }

    pub(super) fn stopped(
        &mut self,
        round: u32,
        handover: Handover,
        now: u64,
        out: &mut Vec<Output>,
    ) {
        self.state = State::Sending(Sending {
            round,
            pages: false,
            state: false,
            residue: false,
            flows: !self.flows,
            disks: !self.disks,
            hashes: !self.verify,
            ready: false,
        });
        if self.flows {
            out.push(Output::SendFlows);
        }
        if self.disks {
            // First: they have the longest way, down to the destination's disk.
            out.push(Output::SendLastBlocks);
        }
        out.extend(match self.postcopy {
            true => vec![Output::ServeFaults, Output::SendStale { last: true }],
            false => vec![Output::SendLastPages { round }],
        });
        out.extend([
            Output::SaveState,
            Output::ReadResidue,
            Output::Send(handover.into()),
        ]);
        if self.verify {
            out.push(Output::SendHashes);
        }
        self.deadline = Some(now + self.freeze_limit_us);
    }

    /// Everything sent: journal, while the destination loads. Everything loaded too: grant.
    pub(super) fn grant_if_complete(&mut self, now: u64, out: &mut Vec<Output>) {
        let State::Sending(sending) = &self.state else {
            return;
        };
        let Sending {
            pages,
            state,
            residue,
            flows,
            disks,
            hashes,
            ready: _,
            round: _,
        } = *sending;
        if !(pages && state && residue && flows && disks && hashes) {
            return;
        }
        let ready = sending.ready;
        if !self.handed_over {
            self.handed_over = true;
            out.push(Output::Journal(Entry::Owner(self.owner(
                OwnerState::HandedOver {
                    to: self.record.to.clone(),
                    migration: self.record.migration,
                    offered: self.record.offered,
                },
            ))));
        }
        if ready {
            self.state = State::Granted;
            let epoch = self.record.offered;
            out.push(Output::Send(Grant { epoch }.into()));
            self.deadline = Some(now + ASK_EVERY_US);
        }
    }

    /// The destination runs the guest: this copy must never run again. It is kept until nothing is forwarded any more, since
    /// the pod's network devices, and the packets in them, live as long as this service or the VMM does.
    pub(super) fn taken_over(
        &mut self,
        failed: Option<String>,
        pages: Pages,
        out: &mut Vec<Output>,
    ) {
        self.deadline = None;
        // Packets first: the guest waits for them.
        if failed.is_none() {
            out.push(Output::Forward);
        }
        match pages {
            Pages::Told if self.memory_gone => {
                let reason = "the guest's memory was lost with its VM at the source";
                out.push(Output::Send(Self::abort_message(reason)));
            }
            Pages::Known | Pages::Told if failed.is_none() => {
                self.pages_due = true;
                if pages == Pages::Known {
                    out.push(Output::PushPages);
                }
            }
            Pages::None | Pages::Known | Pages::Told => {}
        }
        let mut dialing = Dialing::default();
        if !self.link {
            self.dial(&mut dialing, out);
        }
        self.state = match failed {
            None => State::Forwarding(dialing),
            // The guest that the parked packets were for is gone at both ends.
            Some(_) => {
                self.let_go(out);
                State::Releasing(dialing)
            }
        };
    }

    pub(super) fn forwarded(&mut self, out: &mut Vec<Output>) {
        if self.pages_due {
            self.forwarding_over = true;
            return;
        }
        if let State::Forwarding(dialing) = self.state {
            self.let_go(out);
            self.state = State::Releasing(dialing);
        }
    }

    pub(super) fn released(&mut self, now: u64, ledger: Ledger, out: &mut Vec<Output>) {
        let State::Releasing(mut dialing) = self.state else {
            return;
        };
        self.ledger = ledger;
        dialing.give_up_at = Some(now + BYE_LIMIT_US);
        if self.link {
            out.push(Output::Send(self.released_message()));
        }
        self.state = State::Closing(dialing);
    }

    pub(super) fn complete(&mut self, destination: Option<Ledger>, out: &mut Vec<Output>) {
        self.state = State::Done;
        out.push(Output::Note(self.ended(SourceState::Completed)));
        out.push(Output::Finish(Outcome::Completed {
            source: self.ledger,
            destination,
        }));
    }
}

/// What speaks against a grant although the destination is ready.
fn doubts(verify: bool, ready: Ready) -> Option<String> {
    if ready.mismatched > 0 {
        let Ready {
            verified,
            mismatched,
        } = ready;
        return Some(format!(
            "{mismatched} of {verified} pages differ at the destination"
        ));
    }
    (verify && ready.verified == 0)
        .then(|| "the destination compared no page, although verify was asked for".to_owned())
}
