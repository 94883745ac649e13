//! The source's side of a migration, pure: events in, actions out, time as an argument.
//!
//! ```text
//! Offered -> Images -> Preparing -> (Disks) -> Tracking -> Round <-> Scanning -> (Marking) -> Holding -> Draining -> Stopping -> Sending
//!    |          |          |           |            |          |          |           |          |           |          |
//!    +----------+----------+-----------+------------+----------+----------+---- any failure -----+-----------+----------+--> RollingBack
//!                                                                                                          |
//!                          the right is given away: only the destination's word decides from here on       v
//!   RollingBack <-- Discarded -- Doubt <-- link lost -- Granted <----------------- Grant ------------------+
//!                                  |                       |
//!                                  +------- Running -------+--> Forwarding -> Releasing -> Closing -> Done
//! ```
//!
//! Marking is the way of post-copy: the destination is told which pages it will lack. Then Forwarding lasts until it has them, the source's copy
//! lives until then, and HandedOver stays in the journal.
//!
//! Disks is the bulk of writable disks, if there are any. What is written to them afterwards crosses beside the rounds of memory and counts to
//! their decision; the last of it crosses in the freeze, with post-copy too.
//!
//! HandedOver is journaled before the grant is sent, and early: while the destination still loads. Until the grant has been sent this machine knows
//! that it was not, and rolls back by itself. A restarted service cannot know, and asks.

use vm_runtime::units::Epoch;

use crate::migration::journal::{Entry, OwnerRecord, OwnerState, SourceRecord, SourceState};
use crate::migration::mode::{Mode, OnStall};
use crate::migration::rounds::{Convergence, Policy, Stall};
use crate::wire::message::{Abort, Control, Ledger, Offer, Query, Released};

mod events;
mod late;
mod recover;
mod unwind;
mod way;
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
    mode: Mode,
    on_stall: OnStall,
    force: bool,
    /// The destination takes entries of connection tracking.
    flows: bool,
    /// The pod has writable disks.
    disks: bool,
    freeze_limit_us: u64,
    relink_limit_us: u64,
    rounds: Convergence,
    state: State,
    /// Whether a link is up.
    link: bool,
    vm_alive: bool,
    /// What a rollback would have to undo.
    begun: Rollback,
    /// Steps of the throttle that were taken.
    throttled: usize,
    /// The destination is told which pages it will lack.
    postcopy: bool,
    /// The guest runs at the destination, and lacks pages that are here.
    pages_due: bool,
    /// The destination's VM waits for its state.
    vm_waits: bool,
    /// The service was restarted and found no VM: no page can be sent.
    memory_gone: bool,
    /// Nothing needs the old way any more, and only pages keep the source's copy alive.
    forwarding_over: bool,
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
    Disks,
    Tracking,
    Round {
        round: u32,
        started: u64,
        sent: Option<Sent>,
        /// The acknowledgement may be heard of before the end of our own sending: they come from different tasks.
        acked_at: Option<u64>,
    },
    Scanning {
        round: u32,
    },
    /// The rest would fit into the freeze, and the destination's VM is not there yet.
    Waiting {
        round: u32,
    },
    Marking {
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
        /// Whether the reason is the destination's `Refuse`.
        refused: bool,
        pod_failed: Option<String>,
    },
    Done,
}

/// What a round has sent.
#[derive(Clone, Copy, Debug)]
struct Sent {
    pages: u64,
    bytes: u64,
    /// When.
    at: u64,
}

/// What has left the frozen guest.
#[derive(Clone, Debug)]
struct Sending {
    round: u32,
    pages: bool,
    state: bool,
    residue: bool,
    flows: bool,
    disks: bool,
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
            mode: plan.mode,
            on_stall: plan.on_stall,
            force: plan.policy.force,
            flows: plan.flows,
            disks: !plan.offer.disks.is_empty(),
            freeze_limit_us: plan.freeze_limit_us,
            relink_limit_us: plan.relink_limit_us,
            offer: Some(Box::new(plan.offer)),
            ..Self::blank(record, plan.policy)
        }
    }

    /// The epoch that the grant carries.
    pub fn offered(&self) -> Epoch {
        self.record.offered
    }

    fn blank(record: SourceRecord, policy: Policy) -> Self {
        Self {
            record,
            offer: None,
            verify: false,
            mode: Mode::default(),
            on_stall: OnStall::default(),
            force: false,
            flows: false,
            disks: false,
            freeze_limit_us: 0,
            relink_limit_us: 30_000_000,
            rounds: Convergence::new(policy),
            state: State::New,
            link: false,
            vm_alive: true,
            begun: Rollback::default(),
            throttled: 0,
            postcopy: false,
            pages_due: false,
            vm_waits: false,
            memory_gone: false,
            forwarding_over: false,
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

    /// Whether pages cross after the resume.
    pub fn is_postcopy(&self) -> bool {
        self.postcopy || self.pages_due
    }

    /// Whether the destination runs the guest and lacks pages.
    pub fn pages_due(&self) -> bool {
        self.pages_due
    }

    /// Part of the time, in percent, for which the guest's CPUs stand still.
    pub fn throttle_percent(&self) -> u8 {
        super::mode::THROTTLE_STEPS[..self.throttled]
            .last()
            .copied()
            .unwrap_or(0)
    }

    /// Whether every page is compared before the grant.
    pub fn verifies(&self) -> bool {
        self.verify
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
            Input::Overflowed { reason } => self.overflowed(&reason, &mut out),
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
        out.push(Output::Send(Control::Offer(offer)));
        self.deadline = Some(now + ANSWER_LIMIT_US);
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
