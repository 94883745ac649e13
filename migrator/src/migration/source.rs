//! The source's side of a migration, pure: events in, actions out, time as an argument.
//!
//! ```text
//! Offered -> Images -> Preparing -> Tracking -> Round <-> Scanning -> Holding -> Draining -> Stopping -> Sending
//!    |          |          |           |          |          |           |          |           |          |
//!    +----------+----------+-----------+----------+----------+---- any failure -----+-----------+----------+--> RollingBack
//!                                                                                                          |
//!                          the right is given away: only the destination's word decides from here on       v
//!   RollingBack <-- Discarded -- Doubt <-- link lost -- Granted <----------------- Grant ------------------+
//!                                  |                       |
//!                                  +------- Running -------+--> Forwarding -> Releasing -> Closing -> Done
//! ```
//!
//! HandedOver is journaled before the grant is sent, and early: while the destination still loads. Until the grant has been sent this machine knows
//! that it was not, and rolls back by itself. A restarted service cannot know, and asks.

use crate::migration::journal::{Entry, OwnerRecord, OwnerState, SourceRecord, SourceState};
use crate::migration::rounds::{Convergence, Decision, Policy, RoundSample, Stall};
use crate::wire::message::{
    Abort, Control, Grant, Handover, ImageDone, Ledger, MemoryDone, Offer, Query, Ready, Released,
    RoundEnd,
};

mod events;
mod recover;
mod unwind;
pub use events::{Input, Outcome, Output, Plan, Rollback};

/// Time for the destination's checks, and for its VM to be ready for state, in microseconds.
const ANSWER_LIMIT_US: u64 = 60_000_000;
/// After this long without an answer to the grant or to a query over a live link, ask again, in microseconds.
const ASK_EVERY_US: u64 = 5_000_000;
/// Longest pause between two dials, in microseconds: the guest stands still meanwhile.
const REDIAL_MAX_US: u64 = 1_000_000;
/// Time for the destination to close the books, in microseconds.
const BYE_LIMIT_US: u64 = 3_000_000;

/// The source's machine.
#[derive(Clone, Debug)]
pub struct Source {
    record: SourceRecord,
    offer: Option<Box<Offer>>,
    verify: bool,
    force: bool,
    freeze_limit_us: u64,
    relink_limit_us: u64,
    rounds: Convergence,
    state: State,
    /// Whether a link is up.
    link: bool,
    vm_alive: bool,
    /// What a rollback would have to undo.
    begun: Rollback,
    /// HandedOver is in the journal.
    handed_over: bool,
    /// When the current wait is over.
    deadline: Option<u64>,
    scanned_at: u64,
    stall: Option<Stall>,
    ledger: Ledger,
    /// The timer that the driver was asked for.
    timer: Option<u64>,
}

#[derive(Clone, Debug)]
enum State {
    New,
    Offered,
    Images,
    Preparing,
    Tracking,
    Round {
        round: u32,
        started: u64,
        sent: Option<(u64, u64)>,
        /// The acknowledgement may be heard of before the end of our own sending: they come from different tasks.
        acked_at: Option<u64>,
    },
    Scanning {
        round: u32,
    },
    Holding {
        round: u32,
        agent: Option<Vec<u8>>,
        held: bool,
    },
    Draining {
        round: u32,
        agent: Vec<u8>,
    },
    Stopping {
        round: u32,
        agent: Vec<u8>,
    },
    Sending(Sending),
    Granted,
    Doubt(Dialing),
    Forwarding(Dialing),
    Releasing(Dialing),
    Closing(Dialing),
    RollingBack {
        reason: String,
        pod_failed: Option<String>,
    },
    Done,
}

/// What has left the frozen guest.
#[derive(Clone, Debug)]
struct Sending {
    round: u32,
    pages: bool,
    state: bool,
    residue: bool,
    hashes: bool,
    ready: bool,
}

/// The state of a link that has to be had again.
#[derive(Clone, Copy, Debug, Default)]
struct Dialing {
    attempt: u32,
    /// A dial is under way.
    busy: bool,
    /// When to dial next, or to ask again.
    at: Option<u64>,
    /// When to give up, where giving up is allowed.
    give_up_at: Option<u64>,
}

impl Source {
    /// A machine for `plan`. Nothing happens before [`Input::Begin`].
    pub fn new(plan: Plan) -> Self {
        let record = SourceRecord {
            migration: plan.offer.migration,
            pod: plan.offer.pod.name.clone(),
            to: plan.to,
            epoch: plan.epoch,
            offered: plan.offer.epoch,
            state: SourceState::Started,
        };
        Self {
            verify: plan.offer.options.verify,
            force: plan.policy.force,
            freeze_limit_us: plan.freeze_limit_us,
            relink_limit_us: plan.relink_limit_us,
            offer: Some(Box::new(plan.offer)),
            ..Self::blank(record, plan.policy)
        }
    }

    fn blank(record: SourceRecord, policy: Policy) -> Self {
        Self {
            record,
            offer: None,
            verify: false,
            force: false,
            freeze_limit_us: 0,
            relink_limit_us: 30_000_000,
            rounds: Convergence::new(policy),
            state: State::New,
            link: false,
            vm_alive: true,
            begun: Rollback::default(),
            handed_over: false,
            deadline: None,
            scanned_at: 0,
            stall: None,
            ledger: Ledger::default(),
            timer: None,
        }
    }

    /// The measurements, for progress.
    pub fn convergence(&self) -> &Convergence {
        &self.rounds
    }

    /// The last stall that the rounds ran into, for progress.
    pub fn stall(&self) -> Option<Stall> {
        self.stall
    }

    /// Whether the right has been given away, so that only the destination's word decides.
    pub fn in_doubt(&self) -> bool {
        matches!(self.state, State::Granted | State::Doubt(_))
    }

    /// Takes in what happened at `now` (microseconds of any monotonic clock) and says what to do.
    pub fn handle(&mut self, now: u64, input: Input) -> Vec<Output> {
        let mut out = Vec::new();
        match input {
            Input::Begin => self.begin(now, &mut out),
            Input::Peer(message) => self.peer(now, message, &mut out),
            Input::LinkLost { reason } => self.link_lost(now, &reason, &mut out),
            Input::LinkUp => self.link_up(now, &mut out),
            Input::Cancel => self.cancel(&mut out),
            Input::VmDied { reason } => self.vm_died(&reason, &mut out),
            Input::Failed { reason } => self.failed(&reason, &mut out),
            Input::JournalFailed { reason } => self.journal_failed(&reason, &mut out),
            Input::RolledBack => self.rolled_back(&mut out),
            Input::Tick => self.tick(now, &mut out),
            Input::Forwarded => self.forwarded(&mut out),
            Input::Released { ledger } => self.released(now, ledger, &mut out),
            step => self.step(now, step, &mut out),
        }
        self.set_timer(&mut out);
        out
    }

    fn begin(&mut self, now: u64, out: &mut Vec<Output>) {
        let Some(offer) = self.offer.take() else {
            return;
        };
        self.link = true;
        self.state = State::Offered;
        out.push(Output::Journal(Entry::Source(self.record.clone())));
        out.push(Output::Send(Control::Offer(*offer)));
        self.deadline = Some(now + ANSWER_LIMIT_US);
    }

    /// Messages of the peer. Late and doubled ones meet a state that does not wait for them, and are nothing.
    fn peer(&mut self, now: u64, message: Control, out: &mut Vec<Output>) {
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
                self.state = State::Tracking;
                self.deadline = None;
                self.begun.stop_tracking = true;
                out.push(Output::StartTracking);
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
            (Control::Ready(ready), State::Sending(sending)) => match doubts(self.verify, ready) {
                Some(reason) => self.unwind(&reason, out),
                None => {
                    sending.ready = true;
                    self.grant_if_complete(now, out);
                }
            },
            (Control::Running(running), State::Granted | State::Doubt(_)) => {
                self.taken_over(running.failed, out);
            }
            (Control::QueryReply(reply), _) if reply.migration == self.record.migration => {
                self.verdict(reply.verdict, out);
            }
            (Control::Refuse(refuse), _) => self.turned_down(&refuse.reason, out),
            (Control::Abort(abort), _) => self.turned_down(&abort.reason, out),
            (Control::Bye(bye), State::Closing(_)) if bye.migration == self.record.migration => {
                self.complete(Some(bye.ledger), out);
            }
            _ => {}
        }
    }

    /// Steps of the way there; a step that nobody waits for belongs to what was rolled back.
    fn step(&mut self, now: u64, step: Input, out: &mut Vec<Output>) {
        match (step, &mut self.state) {
            (Input::ImagesSent, State::Images) => {
                self.state = State::Preparing;
                out.push(Output::Send(ImageDone.into()));
                self.deadline = Some(now + ANSWER_LIMIT_US);
            }
            (Input::TrackingStarted, State::Tracking) => {
                self.scanned_at = now;
                self.start_round(1, now, out);
            }
            (Input::RoundSent { pages, bytes }, State::Round { round, sent, .. }) => {
                *sent = Some((pages, bytes));
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
            (Input::AgentDetached { state }, State::Holding { agent, .. }) => {
                *agent = Some(state);
                self.drain_if_held(out);
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
            (Input::LastPagesSent { pages }, State::Sending(sending)) => {
                sending.pages = true;
                let round = sending.round;
                out.push(Output::Send(MemoryDone { round, pages }.into()));
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

    fn start_round(&mut self, round: u32, now: u64, out: &mut Vec<Output>) {
        self.state = State::Round {
            round,
            started: now,
            sent: None,
            acked_at: None,
        };
        out.push(Output::SendRound { round });
    }

    fn scan_if_round_complete(&mut self, out: &mut Vec<Output>) {
        if let State::Round {
            round,
            started,
            sent: Some((pages, bytes)),
            acked_at: Some(acked_at),
        } = self.state
        {
            self.rounds.round_done(RoundSample {
                pages,
                bytes,
                duration_us: acked_at.saturating_sub(started),
            });
            self.state = State::Scanning { round };
            out.push(Output::Scan);
        }
    }

    fn decide(&mut self, round: u32, pending: u64, now: u64, out: &mut Vec<Output>) {
        match self.rounds.decide(pending) {
            Decision::Round => self.start_round(round + 1, now, out),
            Decision::Freeze => self.freeze(round + 1, out),
            Decision::Stalled(stall) => {
                self.stall = Some(stall);
                match (stall.exhausted, self.force) {
                    (false, _) => self.start_round(round + 1, now, out),
                    (true, true) => self.freeze(round + 1, out),
                    (true, false) => self.unwind(&stall.to_string(), out),
                }
            }
        }
    }

    fn freeze(&mut self, round: u32, out: &mut Vec<Output>) {
        self.state = State::Holding {
            round,
            agent: None,
            held: false,
        };
        self.begun.attach_agent = true;
        self.begun.release_hold = true;
        out.extend([Output::DetachAgent, Output::Hold]);
    }

    fn drain_if_held(&mut self, out: &mut Vec<Output>) {
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

    fn stopped(&mut self, round: u32, handover: Handover, now: u64, out: &mut Vec<Output>) {
        self.state = State::Sending(Sending {
            round,
            pages: false,
            state: false,
            residue: false,
            hashes: !self.verify,
            ready: false,
        });
        out.extend([
            Output::SendLastPages { round },
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
    fn grant_if_complete(&mut self, now: u64, out: &mut Vec<Output>) {
        let State::Sending(sending) = &self.state else {
            return;
        };
        if !(sending.pages && sending.state && sending.residue && sending.hashes) {
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

    /// The destination runs the guest: this copy must never run again.
    fn taken_over(&mut self, failed: Option<String>, out: &mut Vec<Output>) {
        self.deadline = None;
        let released = OwnerState::Released {
            to: self.record.to.clone(),
            migration: self.record.migration,
        };
        // Packets first: the guest waits for them, and for nothing else here.
        if failed.is_none() {
            out.push(Output::Forward);
        }
        out.push(Output::Note(Entry::Owner(self.owner(released))));
        out.push(Output::KillVm);
        let mut dialing = Dialing::default();
        if !self.link {
            self.dial(&mut dialing, out);
        }
        self.state = match failed {
            None => State::Forwarding(dialing),
            // The guest that the parked packets were for is gone at both ends.
            Some(_) => {
                out.push(Output::Release);
                State::Releasing(dialing)
            }
        };
    }

    fn forwarded(&mut self, out: &mut Vec<Output>) {
        if let State::Forwarding(dialing) = self.state {
            self.state = State::Releasing(dialing);
            out.push(Output::Release);
        }
    }

    fn released(&mut self, now: u64, ledger: Ledger, out: &mut Vec<Output>) {
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

    fn complete(&mut self, destination: Option<Ledger>, out: &mut Vec<Output>) {
        self.state = State::Done;
        out.push(Output::Note(self.ended(SourceState::Completed)));
        out.push(Output::Finish(Outcome::Completed {
            source: self.ledger,
            destination,
        }));
    }

    fn released_message(&self) -> Control {
        Control::Released(Released {
            migration: self.record.migration,
            ledger: self.ledger,
        })
    }

    fn query_message(&self) -> Control {
        Control::Query(Query {
            migration: self.record.migration,
        })
    }

    fn abort_message(reason: &str) -> Control {
        Control::Abort(Abort {
            reason: reason.to_owned(),
        })
    }

    fn owner(&self, state: OwnerState) -> OwnerRecord {
        OwnerRecord {
            pod: self.record.pod.clone(),
            epoch: self.record.epoch,
            state,
        }
    }

    fn ended(&self, state: SourceState) -> Entry {
        Entry::Source(SourceRecord {
            state,
            ..self.record.clone()
        })
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
