//! The destination's side of a migration, pure: events in, actions out, time as an argument.
//!
//! ```text
//! Checking -> Images -> Preparing -> Receiving -> Loading -> Ready -> Resuming -> Running -> Done
//!    |          |           |            |            |           |         |        |            |
//!  Refuse       +-----------+-- any failure, lost link or question ---------+        +-- Grant ---+
//!    |                                       |                                   journaled: this node's
//!    v                                       v                                   for good, whatever fails
//!   Done                 journal Discarded, Discarding -> Done
//! ```
//!
//! With post-copy the guest lacks pages when it runs: Running lasts until it has them and the source has let go of its copy.
//!
//! Discarded is final before anybody hears of it: a grant that comes late is nothing. The grant is final before anything runs.

use vm_runtime::units::Epoch;

use crate::migration::journal::{DestinationRecord, DestinationState, OwnerRecord};
use crate::wire::id::MigrationId;
use crate::wire::message::{Handover, Offer, Verdict};

mod events;
mod unwind;
mod way;
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
    /// The pod has writable disks.
    disks: Option<Disks>,
    /// The source asked over a new link while the guest was being resumed.
    asked: bool,
    /// The guest lacks pages, or will when it runs.
    wants_pages: bool,
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
    Loading(Loading),
    Ready,
    Resuming,
    Running,
    Discarding { reason: String },
    Done,
}

/// What has come of the memory and the state.
#[derive(Clone, Copy, Debug, Default)]
struct Receiving {
    /// The VMM waits for the state.
    vm: bool,
    /// Pages are to be made missing as soon as there is a VMM.
    stale: bool,
    placed: u32,
    last: Option<u32>,
    /// What is not there is missing.
    marked: bool,
    state: bool,
    hashes: bool,
}

/// What has come of the disks. They load nothing and wait for nothing, but there is no Ready before all of it is durable.
#[derive(Clone, Copy, Debug, Default)]
struct Disks {
    placed: u32,
    last: Option<u32>,
}

impl Disks {
    fn complete(self) -> bool {
        self.last.is_some_and(|last| last <= self.placed)
    }
}

/// What is still missing once memory and state are there. The device state loads while pages are compared.
#[derive(Clone, Copy, Debug)]
struct Loading {
    loaded: bool,
    /// Whether the hashes are complete, and the comparison has begun.
    comparing: bool,
    /// Pages that were compared and found equal.
    verified: Option<u64>,
}

impl Destination {
    /// A machine for the offer of the node `from`, whose name is its certificate's. Nothing happens before [`Input::Begin`].
    pub fn new(offer: Box<Offer>, from: String) -> Self {
        let record = DestinationRecord {
            migration: offer.migration,
            pod: offer.pod.name.clone(),
            from,
            epoch: offer.epoch,
            state: DestinationState::Prepared,
        };
        Self {
            verify: offer.options.verify,
            disks: (!offer.disks.is_empty()).then(Disks::default),
            offer: Some(offer),
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
            disks: None,
            asked: false,
            wants_pages: false,
            pod_failed: None,
            give_up_at: None,
            timer: None,
        }
    }

    /// Takes a migration up again that a service did not end: the journal is all it has. `owner` is the pod's owner record, `vm_alive` tells
    /// whether the VMM is there, `wants_pages` whether the guest lacks pages. Carry out the outputs like those of [`Destination::handle`].
    pub fn recover(
        now: u64,
        record: DestinationRecord,
        owner: Option<OwnerRecord>,
        vm_alive: bool,
        wants_pages: bool,
    ) -> (Self, Vec<Output>) {
        let mut destination = Self::blank(record);
        destination.wants_pages = vm_alive && wants_pages;
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
            // It runs, and the source may still have packets for it.
            DestinationState::Owner { resumed: true }
                if vm_alive && owner.as_ref() == Some(&granted) =>
            {
                destination.state = State::Running;
                destination.give_up_at = Some(now + SOURCE_LIMIT_US);
                out.push(Output::Adopt { handover: None });
                if wants_pages {
                    out.push(Output::AwaitPages);
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

    /// The migration.
    pub fn migration(&self) -> MigrationId {
        self.record.migration
    }

    /// Name of the pod.
    pub fn pod(&self) -> &str {
        &self.record.pod
    }

    /// Name of the source node.
    pub fn source(&self) -> &str {
        &self.record.from
    }

    /// The offered epoch.
    pub fn epoch(&self) -> Epoch {
        self.record.epoch
    }

    /// Whether the guest lacks pages, or will when it runs.
    pub fn wants_pages(&self) -> bool {
        self.wants_pages
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
            Input::Failed { reason } => {
                if self.before_grant() {
                    self.failed(&reason, &mut out);
                }
            }
            Input::ResumeFailed { reason } => {
                if matches!(self.state, State::Resuming) {
                    self.failed(&reason, &mut out);
                }
            }
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
}

#[cfg(test)]
mod tests;
