//! The destination's side of a migration, pure: events in, actions out, time as an argument.
//!
//! ```text
//! Checking -> Images -> Preparing -> Receiving -> Verifying -> Loading -> Ready -> Resuming -> Running -> Done
//!    |          |           |            |            |           |         |        |            |
//!  Refuse       +-----------+-- any failure, lost link or question ---------+        +-- Grant ---+
//!    |                                       |                                   journaled: this node's
//!    v                                       v                                   for good, whatever fails
//!   Done                 journal Discarded, Discarding -> Done
//! ```
//!
//! Discarded is final before anybody hears of it: a grant that comes late is nothing. The grant is final before anything runs.

use vm_runtime::units::Epoch;

use crate::migration::journal::{DestinationRecord, DestinationState, Entry, OwnerRecord};
use crate::wire::message::{
    Abort, Accept, Control, Handover, Offer, Prepared, QueryReply, Ready, Refuse, RefuseCode,
    RoundAck, Running, Verdict,
};

mod events;
pub use events::{Input, Outcome, Output};

/// How long a running guest's machine waits for a source whose link is lost, in microseconds. Afterwards the journal answers.
const SOURCE_LIMIT_US: u64 = 60_000_000;

/// The destination's machine.
#[derive(Clone, Debug)]
pub struct Destination {
    record: DestinationRecord,
    offer: Option<Box<Offer>>,
    verify: bool,
    state: State,
    link: bool,
    handover: Option<Handover>,
    /// The source asked over a new link while the guest was being resumed.
    asked: bool,
    /// The grant was taken and the guest is gone.
    pod_failed: Option<String>,
    give_up_at: Option<u64>,
    timer: Option<u64>,
}

#[derive(Clone, Debug)]
enum State {
    New,
    Checking,
    Images { received: bool, all_sent: bool },
    Preparing,
    Receiving(Receiving),
    Verifying,
    Loading { ready: Ready },
    Ready,
    Resuming,
    Running,
    Discarding { reason: String },
    Done,
}

/// What has come of the memory and the state.
#[derive(Clone, Copy, Debug, Default)]
struct Receiving {
    placed: u32,
    last: Option<u32>,
    state: bool,
    hashes: bool,
}

impl Destination {
    /// A machine for the offer of the node `from`, whose name is its certificate's. Nothing happens before [`Input::Begin`].
    pub fn new(offer: Offer, from: String) -> Self {
        let record = DestinationRecord {
            migration: offer.migration,
            pod: offer.pod.name.clone(),
            from,
            epoch: offer.epoch,
            state: DestinationState::Prepared,
        };
        Self {
            verify: offer.options.verify,
            offer: Some(Box::new(offer)),
            link: true,
            ..Self::blank(record)
        }
    }

    fn blank(record: DestinationRecord) -> Self {
        Self {
            record,
            offer: None,
            verify: false,
            state: State::New,
            link: false,
            handover: None,
            asked: false,
            pod_failed: None,
            give_up_at: None,
            timer: None,
        }
    }

    /// Takes a migration up again that a service did not end: the journal is all it has. `owner` is the pod's owner record, `vm_alive` tells
    /// whether the VMM is there. Carry out the outputs like those of [`Destination::handle`].
    pub fn recover(
        now: u64,
        record: DestinationRecord,
        owner: Option<OwnerRecord>,
        vm_alive: bool,
    ) -> (Self, Vec<Output>) {
        let mut destination = Self::blank(record);
        let mut out = Vec::new();
        let granted = destination.record.owner();
        match destination.record.state {
            DestinationState::Prepared => {
                destination.discard("the service was restarted before the grant came", &mut out);
            }
            // The right may have gone on from here since: then nothing here may run.
            DestinationState::Owner { resumed: false } if owner.as_ref() == Some(&granted) => {
                destination.state = State::Resuming;
                destination.give_up_at = Some(now + SOURCE_LIMIT_US);
                if vm_alive {
                    out.extend([Output::OpenNetwork, Output::Resume]);
                } else {
                    destination.pod_is_lost("the VM exited while the service was down", &mut out);
                }
            }
            DestinationState::Owner { .. }
            | DestinationState::Settled
            | DestinationState::Discarded { .. } => {
                destination.state = State::Done;
                let settled = destination.record.state == DestinationState::Settled;
                out.push(Output::Finish(Outcome::Completed { settled }));
            }
        }
        destination.set_timer(&mut out);
        (destination, out)
    }

    /// The offered epoch.
    pub fn epoch(&self) -> Epoch {
        self.record.epoch
    }

    /// Whether the grant was taken.
    pub fn granted(&self) -> bool {
        self.record.verdict() == Some(Verdict::Running)
    }

    /// Takes in what happened at `now` (microseconds of any monotonic clock) and says what to do.
    pub fn handle(&mut self, now: u64, input: Input) -> Vec<Output> {
        let mut out = Vec::new();
        match input {
            Input::Begin => self.begin(&mut out),
            Input::Peer(message) => self.peer(message, &mut out),
            Input::Asked => self.asked(&mut out),
            Input::LinkLost { reason } => self.link_lost(now, &reason, &mut out),
            Input::Cancel => self.cancel(&mut out),
            Input::VmDied { reason } => {
                self.failed(
                    &format!("the VM exited at the destination: {reason}"),
                    &mut out,
                );
            }
            Input::Failed { reason } => self.step_failed(&reason, &mut out),
            Input::JournalFailed { reason } => self.journal_failed(&reason, &mut out),
            Input::Tick => self.tick(now, &mut out),
            step => self.step(step, &mut out),
        }
        self.set_timer(&mut out);
        out
    }

    fn begin(&mut self, out: &mut Vec<Output>) {
        if let Some(offer) = self.offer.take() {
            self.state = State::Checking;
            out.push(Output::Check(offer));
        }
    }

    /// Messages of the source. Late and doubled ones meet a state that does not wait for them, and are nothing.
    fn peer(&mut self, message: Control, out: &mut Vec<Output>) {
        let early = self.before_grant();
        match (message, &mut self.state) {
            (Control::ImageDone(_), State::Images { all_sent, .. }) => {
                *all_sent = true;
                self.prepare_if_complete(out);
            }
            (Control::MemoryDone(done), State::Receiving(receiving)) => {
                receiving.last = Some(done.round);
                self.load_if_complete(out);
            }
            (Control::StateEnd(_), State::Receiving(receiving)) => {
                receiving.state = true;
                self.load_if_complete(out);
            }
            (Control::HashesEnd(_), State::Receiving(receiving)) => {
                receiving.hashes = true;
                self.load_if_complete(out);
            }
            (Control::Handover(handover), State::Receiving(_)) => self.handover = Some(handover),
            (Control::Grant(grant), State::Ready) => self.take_grant(grant.epoch, out),
            (Control::Abort(abort), _) if early => {
                let reason = format!("{}: {}", self.record.from, abort.reason);
                self.discard(&reason, out);
            }
            (Control::Query(query), _) if query.migration == self.record.migration => {
                self.asked(out);
            }
            (Control::Released(released), State::Running)
                if released.migration == self.record.migration =>
            {
                self.settled(out);
            }
            _ => {}
        }
    }

    /// Steps of the way there; a step that nobody waits for belongs to what was discarded.
    fn step(&mut self, step: Input, out: &mut Vec<Output>) {
        match (step, &mut self.state) {
            (Input::Checked(Err(refuse)), State::Checking) => self.refuse(refuse, out),
            (Input::Checked(Ok(wants)), State::Checking) => {
                out.push(Output::Journal(Entry::Destination(self.record.clone())));
                let none = wants.is_empty();
                if !none {
                    out.push(Output::ReceiveImages(wants.clone()));
                }
                out.push(Output::Send(Accept { wants }.into()));
                self.state = State::Images {
                    received: none,
                    all_sent: none,
                };
                self.prepare_if_complete(out);
            }
            (Input::ImagesReceived, State::Images { received, .. }) => {
                *received = true;
                self.prepare_if_complete(out);
            }
            (Input::VmPrepared, State::Preparing) => {
                self.state = State::Receiving(Receiving::default());
                out.push(Output::Send(Prepared.into()));
            }
            (Input::RoundPlaced { round }, State::Receiving(receiving)) => {
                receiving.placed = receiving.placed.max(round);
                out.push(Output::Send(RoundAck { round }.into()));
                self.load_if_complete(out);
            }
            (
                Input::Verified {
                    pages,
                    mismatched: 0,
                },
                State::Verifying,
            ) => {
                self.state = State::Loading {
                    ready: Ready {
                        verified: pages,
                        mismatched: 0,
                    },
                };
                out.push(Output::LoadState);
            }
            (Input::Verified { pages, mismatched }, State::Verifying) => {
                let reason = format!("{mismatched} of {pages} pages differ from the source's");
                self.failed(&reason, out);
            }
            (Input::StateLoaded, State::Loading { ready }) => {
                let ready = *ready;
                self.state = State::Ready;
                out.push(Output::Send(ready.into()));
            }
            (Input::Resumed { at_unix_us, steps }, State::Resuming) => {
                self.resumed(at_unix_us, steps, out);
            }
            (Input::Discarded, State::Discarding { reason }) => {
                let reason = std::mem::take(reason);
                self.state = State::Done;
                out.push(Output::Finish(Outcome::Failed { reason }));
            }
            _ => {}
        }
    }

    fn prepare_if_complete(&mut self, out: &mut Vec<Output>) {
        if let State::Images {
            received: true,
            all_sent: true,
        } = self.state
        {
            self.state = State::Preparing;
            out.push(Output::PrepareVm);
        }
    }

    fn load_if_complete(&mut self, out: &mut Vec<Output>) {
        let State::Receiving(receiving) = self.state else {
            return;
        };
        let memory = receiving.last.is_some_and(|last| last == receiving.placed);
        if !(memory && receiving.state && self.handover.is_some()) {
            return;
        }
        if !self.verify {
            let ready = Ready {
                verified: 0,
                mismatched: 0,
            };
            self.state = State::Loading { ready };
            out.push(Output::LoadState);
        } else if receiving.hashes {
            self.state = State::Verifying;
            out.push(Output::Verify);
        }
    }

    /// The one step that gives this node the right: durable before the gate opens, and before a single instruction.
    fn take_grant(&mut self, epoch: Epoch, out: &mut Vec<Output>) {
        if epoch != self.record.epoch {
            let reason = format!(
                "a grant for epoch {epoch} came, {} was offered",
                self.record.epoch
            );
            return self.failed(&reason, out);
        }
        self.record.state = DestinationState::Owner { resumed: false };
        self.state = State::Resuming;
        out.extend([
            Output::Journal(Entry::Destination(self.record.clone())),
            Output::OpenNetwork,
            Output::Resume,
        ]);
    }

    fn resumed(
        &mut self,
        resumed_at_unix_us: u64,
        steps: Vec<(String, u64)>,
        out: &mut Vec<Output>,
    ) {
        self.state = State::Running;
        self.record.state = DestinationState::Owner { resumed: true };
        self.tell_running(resumed_at_unix_us, steps, out);
        let handover = self.handover.take();
        out.push(Output::Adopt { handover });
        out.push(Output::Note(Entry::Destination(self.record.clone())));
    }

    fn tell_running(
        &mut self,
        resumed_at_unix_us: u64,
        steps: Vec<(String, u64)>,
        out: &mut Vec<Output>,
    ) {
        if !self.link {
            return;
        }
        out.push(Output::Send(match std::mem::take(&mut self.asked) {
            true => self.reply(Verdict::Running),
            false => Control::Running(Running {
                epoch: self.record.epoch,
                resumed_at_unix_us,
                steps,
                failed: self.pod_failed.clone(),
            }),
        }));
    }

    /// The right is this node's, and there is no guest to run.
    fn pod_is_lost(&mut self, reason: &str, out: &mut Vec<Output>) {
        self.pod_failed = Some(reason.to_owned());
        self.state = State::Running;
        self.record.state = DestinationState::Owner { resumed: true };
        self.tell_running(0, Vec::new(), out);
        out.push(Output::PodFailed {
            reason: reason.to_owned(),
        });
        out.push(Output::Note(Entry::Destination(self.record.clone())));
    }

    fn settled(&mut self, out: &mut Vec<Output>) {
        self.record.state = DestinationState::Settled;
        out.push(Output::Note(Entry::Destination(self.record.clone())));
        out.push(Output::SendBye);
        self.finish(true, out);
    }

    fn finish(&mut self, settled: bool, out: &mut Vec<Output>) {
        self.state = State::Done;
        out.push(Output::Finish(match self.pod_failed.take() {
            None => Outcome::Completed { settled },
            Some(reason) => Outcome::PodFailed { reason },
        }));
    }

    fn refuse(&mut self, refuse: Refuse, out: &mut Vec<Output>) {
        self.state = State::Done;
        let reason = refuse.reason.clone();
        out.push(Output::Send(refuse.into()));
        out.push(Output::Finish(Outcome::Failed { reason }));
    }

    fn before_grant(&self) -> bool {
        match self.state {
            State::New
            | State::Checking
            | State::Images { .. }
            | State::Preparing
            | State::Receiving(_)
            | State::Verifying
            | State::Loading { .. }
            | State::Ready => true,
            State::Resuming | State::Running | State::Discarding { .. } | State::Done => false,
        }
    }

    /// Final from here on: a grant that is still under way will be nothing.
    fn discard(&mut self, reason: &str, out: &mut Vec<Output>) {
        self.record.state = DestinationState::Discarded {
            reason: reason.to_owned(),
        };
        out.push(Output::Note(Entry::Destination(self.record.clone())));
        out.push(Output::Discard);
        self.state = State::Discarding {
            reason: reason.to_owned(),
        };
    }

    fn failed(&mut self, reason: &str, out: &mut Vec<Output>) {
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
            }
            _ => {}
        }
    }

    /// A step that failed. After the resume the guest lives on whatever else fails.
    fn step_failed(&mut self, reason: &str, out: &mut Vec<Output>) {
        if !matches!(self.state, State::Running) {
            self.failed(reason, out);
        }
    }

    fn journal_failed(&mut self, reason: &str, out: &mut Vec<Output>) {
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
    fn asked(&mut self, out: &mut Vec<Output>) {
        self.link = true;
        self.give_up_at = None;
        match self.state {
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

    fn reply(&self, verdict: Verdict) -> Control {
        Control::QueryReply(QueryReply {
            migration: self.record.migration,
            verdict,
        })
    }

    fn link_lost(&mut self, now: u64, reason: &str, out: &mut Vec<Output>) {
        self.link = false;
        if self.before_grant() {
            let reason = format!("the link to {} was lost: {reason}", self.record.from);
            return self.discard(&reason, out);
        }
        if matches!(self.state, State::Resuming | State::Running) {
            self.give_up_at.get_or_insert(now + SOURCE_LIMIT_US);
        }
    }

    fn cancel(&mut self, out: &mut Vec<Output>) {
        if self.before_grant() {
            self.failed("cancelled at the destination", out);
        } else if matches!(self.state, State::Resuming | State::Running) {
            out.push(Output::CancelRefused);
        }
    }

    fn tick(&mut self, now: u64, out: &mut Vec<Output>) {
        self.timer = None;
        if self.give_up_at.is_some_and(|at| at <= now) {
            self.give_up_at = Some(now + SOURCE_LIMIT_US);
            if matches!(self.state, State::Running) {
                self.finish(false, out);
            }
        }
    }

    fn set_timer(&mut self, out: &mut Vec<Output>) {
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
